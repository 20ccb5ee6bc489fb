"""What the journal of answers keeps, drops and refuses."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrec.chat.endpoint import ClientConfig
from llmrec.chat.journal import AnswerJournal, Spent
from llmrec.chat.requests import Answer
from llmrec.errors import UsageError

PRINT = {"model": "m", "chat.task": "pick"}
PRICES = ClientConfig(input_price=2.0, output_price=10.0)


def answer(number: int, text: str = "B", status: str = "answered", attempts: int = 1) -> Answer:
    return Answer(
        number,
        "d" * 32,
        status,  # type: ignore[arg-type]
        text,
        (("B", -0.1),),
        prompt_tokens=100,
        completion_tokens=10,
        attempts=attempts,
        seconds=0.5,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with answers to 0, 2 and 1, in this order, and 3 in flight."""
    path = tmp_path / "answers.jsonl"
    with AnswerJournal(path, PRINT) as journal:
        for number in (0, 1, 2, 3):
            journal.note_sent(number)
        for number in (0, 2, 1):
            journal.add(answer(number))
    return path


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def numbers(path: Path) -> list[int]:
    with AnswerJournal(path, PRINT) as journal:
        return [found.number for found in journal.answers()]


def test_answers_come_back_in_the_order_of_their_numbers_as_they_were(path: Path) -> None:
    with AnswerJournal(path, PRINT) as journal:
        assert list(journal.answers()) == [answer(0), answer(1), answer(2)]
        assert journal.answer(2) == answer(2)
        assert journal.answer(3) is None and journal.answer(99) is None
        assert (journal.done_count, journal.in_flight_count) == (3, 1)
        assert [journal.is_done(number) for number in range(5)] == [True, True, True, False, False]


def test_an_answer_counts_only_after_it_is_committed(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path / "a", PRINT) as journal:
        journal.note_sent(5)
        journal.add(answer(5))
        assert (journal.is_done(5), journal.done_count, journal.in_flight_count) == (False, 0, 0)
        assert journal.commit() == [5]
        assert (journal.is_done(5), journal.done_count) == (True, 1)


def test_a_second_answer_to_a_request_is_refused(path: Path) -> None:
    with AnswerJournal(path, PRINT) as journal, pytest.raises(ValueError, match="request 1 has"):
        journal.add(answer(1))
    path.write_bytes(path.read_bytes() + lines(path)[5])
    with pytest.raises(UsageError, match=r"line 9 answers request 0 a second time\. Start over"):
        AnswerJournal(path, PRINT)


@pytest.mark.parametrize("left", [1, 20, 100])
def test_a_torn_last_line_is_dropped_and_its_request_asked_again(path: Path, left: int) -> None:
    whole = lines(path)
    path.write_bytes(b"".join(whole[:-1]) + whole[-1][:left])
    assert numbers(path) == [0, 2]
    assert lines(path) == whole[:-1]
    with AnswerJournal(path, PRINT) as journal:
        assert journal.in_flight_count == 2
        journal.add(answer(1))
    assert numbers(path) == [0, 1, 2]


def test_a_last_line_of_zeros_is_dropped(path: Path) -> None:
    whole = path.read_bytes()
    for tail in (b"\0" * 50, b"\0" * 50 + b"\n"):
        path.write_bytes(whole + tail)
        assert numbers(path) == [0, 1, 2]
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        b"nonsense\n",
        b"\n",
        b"[1, 2]\n",
        b"12\n",
        b'{"sent": -1}\n',
        b'{"sent": 1000000000000}\n',
        b'{"sent": true}\n',
        b'{"number": 2}\n',
        b"[" * 50_000 + b"\n",
    ],
)
def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(
    path: Path, damage: bytes
) -> None:
    whole = lines(path)
    path.write_bytes(b"".join([*whole[:5], damage, *whole[6:]]))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"answers\.jsonl line 6 is damaged\. Start over with"):
        AnswerJournal(path, PRINT)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("status", "great"), ("text", None), ("number", "0"), ("attempts", -1), ("top", [["B"]])],
)
def test_a_field_of_another_kind_is_damage(path: Path, name: str, value: object) -> None:
    whole = lines(path)
    changed = json.dumps(json.loads(whole[5]) | {name: value}).encode() + b"\n"
    path.write_bytes(b"".join([*whole[:5], changed, *whole[6:]]))
    with pytest.raises(UsageError, match="line 6 is damaged"):
        AnswerJournal(path, PRINT)


def test_another_fingerprint_is_refused_with_the_first_name_that_differs(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r'for model="m", but now it is "xxx[x]*\.\.\.\. Start'):
        AnswerJournal(path, {**PRINT, "model": "x" * 500})
    with pytest.raises(UsageError, match=r'for chat\.task="pick", but now it is absent'):
        AnswerJournal(path, {"model": "m"})
    with pytest.raises(UsageError, match=r"for seed=absent, but now it is null"):
        AnswerJournal(path, {**PRINT, "seed": None})
    assert path.read_bytes() == before
    assert AnswerJournal.fingerprint_of(path) == PRINT


def test_a_fingerprint_of_tuples_is_the_one_that_json_gives_back(tmp_path: Path) -> None:
    for _ in range(2):
        AnswerJournal(tmp_path / "a", {"words": ("x", "y")}).__exit__(None, None, None)


def test_a_kill_before_the_first_line_was_whole_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for begun in (b"", b'{"for', b'{"format": 1, "finger'):
        path.write_bytes(begun)
        assert AnswerJournal.fingerprint_of(path) == {}
        assert numbers(path) == []
        assert AnswerJournal.fingerprint_of(path) == PRINT


@pytest.mark.parametrize("content", [b"my diary", b"my diary\n", b'{"format": 2}\n', b"\xff\n"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="line 1 is damaged, or this is no journal of answers"):
        AnswerJournal(path, PRINT)
    assert path.read_bytes() == content


def test_only_one_process_holds_a_journal(path: Path) -> None:
    with AnswerJournal(path, PRINT):
        code = (
            "import sys; from pathlib import Path; from llmrec.chat.journal import AnswerJournal\n"
            f"AnswerJournal(Path(sys.argv[1]), {PRINT!r})"
        )
        other = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
        )
        assert "UsageError: another process is writing" in other.stderr
    assert numbers(path) == [0, 1, 2]


def test_any_text_comes_back_from_a_file_of_ascii_lines(tmp_path: Path) -> None:
    texts = ["\ud83d alone", "\x00\x1b[2J", "a\nb\r\u2028c", "日本", '"\\', ""]
    with AnswerJournal(tmp_path / "a", PRINT) as journal:
        for number, text in enumerate(texts):
            journal.add(answer(number, text))
    assert (tmp_path / "a").read_bytes().isascii()
    assert len(lines(tmp_path / "a")) == 1 + len(texts)
    with AnswerJournal(tmp_path / "a", PRINT) as journal:
        assert [found.text for found in journal.answers()] == texts


def test_what_was_spent_survives_resuming(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with AnswerJournal(path, PRINT) as journal:
        for number in (0, 1, 2):
            journal.note_sent(number)
        journal.add(answer(0, attempts=3), ["timeout", "status 500"])
    with AnswerJournal(path, PRINT) as journal:
        assert journal.in_flight_count == 2
        for number in (1, 2):
            journal.note_sent(number)
        journal.add(answer(1, attempts=2), ["timeout"])
        journal.add(answer(2, status="cut"))
        live = journal.spent(PRICES)
    with AnswerJournal(path, PRINT) as journal:
        assert journal.spent(PRICES) == live
    assert live == Spent(
        requests=3,
        attempts=3 + 2 + 1,
        sent_again=2,
        prompt_tokens=300,
        completion_tokens=30,
        money=(300 * 2.0 + 30 * 10.0) / 1e6,
        statuses={"answered": 2, "cut": 1},
        retries={"status 500": 1, "timeout": 2},
    )


@pytest.mark.parametrize("part", [0, 10])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """`part` bytes of the line still find room."""
    before, write, room = path.read_bytes(), os.write, [part]

    def full(file: int, data: bytes) -> int:
        if not room or not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: room.pop()])

    with AnswerJournal(path, PRINT) as journal:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
            journal.add(answer(3))
        monkeypatch.undo()
        assert path.read_bytes() == before
        journal.add(answer(3))  # room again
    assert numbers(path) == [0, 1, 2, 3]


def test_a_disk_that_cannot_be_forced_lets_nothing_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with AnswerJournal(path, PRINT) as journal:
        journal.add(answer(3))
        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(UsageError, match=r"cannot be written \(Input/output error\)"):
            journal.commit()
        assert not journal.is_done(3)
        monkeypatch.undo()


def test_a_hundred_thousand_requests_take_some_ten_bytes_each(tmp_path: Path) -> None:
    path = tmp_path / "a"
    count = 100_000
    with path.open("w") as file:
        file.write(json.dumps({"format": 1, "fingerprint": PRINT}) + "\n")
        line = json.dumps(vars(answer(0)))
        for number in range(count):
            file.write(line.replace('"number": 0', f'"number": {number}') + "\n")
    with AnswerJournal(path, PRINT) as journal:
        assert journal.done_count == count
        held = sum(sys.getsizeof(vars(journal)[name]) for name in ("_offsets", "_sent", "_done"))
        assert held < 20 * count  # 10 and what the arrays keep to grow
