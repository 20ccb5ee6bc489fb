"""A chat evaluation killed at ten points writes the same bytes, and pays nothing twice."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import answers
import fault_server
import pytest
from test_command import words

from llmrec.chat.command import configure, prepare
from llmrec.chat.journal import AnswerJournal

QUICK = [fault for fault in fault_server.AGAIN if fault != "hang"]  # no timeout: time is no fault
FAULTS = fault_server.hashed(0.3, (*QUICK, *fault_server.FINAL, *fault_server.TEXTS))
CONCURRENCY = 8


def command(url: str, folder: Path) -> list[str]:
    argv = words(
        url, folder, chat__task="top", chat__shuffles=3, evaluation__pool__size=30,
        data__simulated__users=400, evaluation__pool__users=300, client__concurrency=CONCURRENCY,
    )  # fmt: skip
    return [sys.executable, str(Path(__file__).with_name("drive_chat.py")), *argv]


def written(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("chat.json", "per_user.parquet")}


def answered(folder: Path) -> int:
    path = folder / "answers.jsonl"
    return path.read_bytes().count(b'"digest"') if path.exists() else 0


@pytest.mark.slow
def test_ten_kills_change_no_byte_and_send_no_answered_request_again(
    tmp_path, monkeypatch, figure
) -> None:
    monkeypatch.setattr(fault_server, "text_for", answers.guess)
    with fault_server.serving(FAULTS) as server:
        server.seconds = 0.02
        subprocess.run(command(server.base_url, tmp_path / "whole"), check=True)
    whole = written(tmp_path / "whole")
    kills = 0
    with fault_server.serving(FAULTS) as server:
        server.seconds = 0.02
        folder = tmp_path / "killed"
        argv = command(server.base_url, folder)
        while True:
            done = answered(folder)
            process = subprocess.Popen(argv)
            aim = 900 * (kills + 1) // 11
            while process.poll() is None and (kills == 10 or answered(folder) < aim):
                time.sleep(0.005)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert answered(folder) >= done
        assert process.returncode == 0
    assert kills == 10
    assert written(folder) == whole
    cost = json.loads((folder / "result.json").read_text())["cost"]
    sent_again = cost["sent_again"]
    # Every request but those under way at a kill was sent just as often as its journal says.
    plan = prepare(configure(argv[2:])).plan
    path = folder / "answers.jsonl"
    with AnswerJournal(path, AnswerJournal.fingerprint_of(path)) as journal:
        odd = [
            answer.number
            for answer in journal.answers()
            if server.sent[plan.request(answer.number).prompt] != answer.attempts
        ]
    assert len(odd) <= sent_again
    assert sent_again <= kills * (CONCURRENCY + 4)  # and few that waited for a good answer
    figure("kills, requests in flight at them and sent again", f"{kills}, {sent_again} of 900")
