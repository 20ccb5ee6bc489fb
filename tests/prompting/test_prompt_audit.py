"""The audit of prompts: it passes ours, and catches the leaks that it is there for."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_p5
from p5_shop import generator, numbered, shop, templates

from llmrec.data.audit.findings import Finding
from llmrec.data.interactions import Dataset, Split
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.simulated import SimulatedConfig
from llmrec.data.splits import SplitConfig, split
from llmrec.prompting import audit as command
from llmrec.prompting import generate
from llmrec.prompting.audit import audit, largest_plus_one
from llmrec.prompting.audit.leaks import Leaks, Names
from llmrec.prompting.families import P5Template, load_family_templates
from llmrec.prompting.indexing import Indexing, IndexingConfig, build_indexing
from llmrec.prompting.p5 import Example, PromptConfig, PromptGenerator, draws

LEAK, LARGEST = "held-out items in training", "largest number + 1"
NEVER = "items never named"
Templates = tuple[P5Template, ...]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture(scope="module")
def told() -> tuple[Dataset, Split, Templates]:
    """150 simulated visitors who rate and review."""
    config = SimulatedConfig(users=150, items=300, reviews=True)
    data = load_dataset(DataConfig(source="simulated", simulated=config))
    return data, split(data, SplitConfig()), load_family_templates("")


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def everything(made: PromptGenerator, asked: Templates) -> Iterator[Example]:
    yield from made.train(seed=0)
    for template in asked:
        if not made.cannot_ask(template, "test"):
            yield from made.questions(template, "test")


@pytest.mark.parametrize(
    ("name", "mention"),
    [
        *itertools.product(["random", "sequential", "collaborative"], ["id", "title", "both"]),
        ("title", "id"),
    ],
)
def test_our_prompts_have_no_fault(
    name: str, mention: str, told: tuple[Dataset, Split, Templates]
) -> None:
    data, cut, shipped = told
    config = IndexingConfig(name=name)  # type: ignore[arg-type]
    indexing = build_indexing(config, data, cut.train_end)
    prompts = PromptConfig(mention=mention, candidates=20)  # type: ignore[arg-type]
    made = PromptGenerator(data, cut, indexing, shipped, prompts)
    asked = tuple(t for t in shipped if t.id in ("2-1", "2-8", "2-13", "5-8"))
    found = by_check(audit(everything(made, asked), data, cut, indexing, shipped))
    assert [f for f in found.values() if f.verdict == "fault"] == []
    for check in (LEAK, "answers name items", "questions tell no answer", NEVER):
        assert found[check].verdict == "ok"
    assert found[LEAK].of == made.count()
    assert found[LARGEST].verdict == ("skipped" if name in ("collaborative", "title") else "ok")


@pytest.mark.parametrize("name", ["random", "collaborative", "title"])
def test_items_that_are_never_called_wrong_are_a_leak_where_all_others_are_in_time(
    name: str, told: tuple[Dataset, Split, Templates], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cut, shipped = told
    indexing = build_indexing(IndexingConfig(name=name), data, cut.train_end)  # type: ignore[arg-type]
    config = PromptConfig(families="direct,sequential", candidates=20)
    made = PromptGenerator(data, cut, indexing, shipped, config)

    def never(epochs: int) -> Finding:
        prompts = itertools.chain.from_iterable(made.train(0, epoch + 1) for epoch in range(epochs))
        return by_check(audit(prompts, data, cut, indexing, shipped))[NEVER]

    shelved = never(epochs=8)
    assert shelved.verdict == "ok"
    assert "(2." in shelved.found or "(1.9" in shelved.found  # half of the items never come up
    monkeypatch.setattr(draws, "salt_of", lambda seed, user: None)  # wrong answers from all items
    assert never(epochs=1).verdict == "ok"  # 200 of 290 items were drawn, or half of them
    assert never(epochs=8).verdict == "fault"


def test_a_guess_among_what_was_never_named_is_reckoned_by_hand(own: Templates) -> None:
    # Six items. The first user was trained on 1 and 2, is tested on 4 and never met 3 to 6; the
    # second was trained on 3, 1 and 2; the third meets an old item again, the fourth has no prompt.
    data = shop([[1, 2, 3, 4], [3, 1, 2, 5, 6], [1, 2, 3, 1], [6, 5, 4, 3]], items=6)
    cut, names = split(data, SplitConfig()), numbered(6)
    choice = Example("item_1 then of item_5 , item_2 one", "item_2", "s", "2-2", 0, 2, "train")
    judge = Example("item_1 then item_6?", "no", "s", "2-3", 0, 6, "train")
    other = Example("After item_3 comes", "item_1", "s", "2-1", 1, 1, "train")
    third = other._replace(user=2)
    found = by_check(audit([choice, judge, other, third], data, cut, names, own))[NEVER]
    # Never named to the first: 3 and 4, of four never met; to the second: 4, 5, 6, of as many.
    assert found.of == 2
    assert f"HR@1 {(1 / 2 + 1 / 3) / 2:.4f}, by chance {(1 / 4 + 1 / 3) / 2:.4f}" in found.found
    assert by_check(audit([], data, cut, names, own))[NEVER].verdict == "skipped"


def test_questions_that_tell_their_answer_outside_the_candidates_are_a_fault(
    own: Templates,
) -> None:
    data = shop([[1, 2, 4, 3, 5], [1, 2, 4, 3, 2]], titles={5: "Kettle"})
    cut, names = split(data, SplitConfig()), numbered(30)

    def told_in(text: str, template: str, user: int = 0, item: int = 5) -> Finding:
        asked = Example(text, f"item_{item}", "s", template, user, item, "test")
        return by_check(audit([asked], data, cut, names, own))["questions tell no answer"]

    for text, template in (
        ("After item_1, item_3 comes", "2-1"),
        ("After item_1, item_50 comes", "2-1"),
        ("item_3 then of item_7 , item_5 one", "2-2"),
    ):
        assert told_in(text, template).verdict == "ok"
    for text, template in (
        ("After item_1, item_5 comes", "2-1"),
        ("After Thing 1 -> Kettle comes", "2-1"),
        ("item_5 then of item_7 , item_5 one", "2-2"),
    ):
        assert told_in(text, template).verdict == "fault"
    assert told_in("After item_2, item_3 comes", "2-1", user=1, item=2).verdict == "ok"


def test_largest_plus_one_counts_the_targets_that_follow_the_largest_number() -> None:
    # Items 1..5 are numbered 10, 30, 20, 31, 40. Largest numbers: 30, 20, 40.
    numbers = np.array([0, 10, 30, 20, 31, 40])
    histories = [np.array(items, dtype=np.int32) for items in ([1, 2], [3, 1], [5, 4])]
    assert largest_plus_one(histories, np.array([4, 2, 1], np.int32), numbers) == 1 / 3
    assert largest_plus_one(histories, np.array([5, 2, 1], np.int32), numbers) == 0


def along_whole_sequences(data: Dataset) -> Indexing:
    """Items numbered as they first come up, test items included: the leak of public code."""
    items = data.interactions.items
    _, first = np.unique(items, return_index=True)
    order = items[np.sort(first)]
    number = {item: place for place, item in enumerate(order.tolist(), start=1)}
    count = data.item_count
    return Indexing(
        "sequential", tuple(f"item_{number.get(item, item)}" for item in range(1, count + 1))
    )


def test_numbers_along_whole_sequences_are_caught_and_along_training_parts_are_not() -> None:
    # 200 users of 6 items; users share 2 of them, and the last is nobody else's.
    rng = np.random.default_rng(0)
    fresh = rng.permutation(np.arange(51, 851)).reshape(200, 4)
    common = rng.integers(1, 51, size=(200, 2))
    data = shop(
        [[*row[:2], *shared, *row[2:]] for row, shared in zip(fresh, common, strict=True)],
        items=850,
    )
    cut = split(data, SplitConfig())
    leaky = along_whole_sequences(data)
    found = by_check(audit([], data, cut, leaky, ()))[LARGEST]
    assert found.verdict == "fault"
    assert found.count > 150  # nearly all
    safe = build_indexing(IndexingConfig("sequential"), data, cut.train_end)
    assert by_check(audit([], data, cut, safe, ()))[LARGEST].verdict == "ok"


def test_numbers_along_whole_simulated_sequences_are_caught() -> None:
    config = SimulatedConfig(users=300, items=1500)
    data = load_dataset(DataConfig(source="simulated", simulated=config))
    cut = split(data, SplitConfig())
    found = by_check(audit([], data, cut, along_whole_sequences(data), ()))[LARGEST]
    assert found.verdict == "fault"
    safe = build_indexing(IndexingConfig("sequential"), data, cut.train_end)
    assert by_check(audit([], data, cut, safe, ()))[LARGEST].verdict == "ok"


def random_split_of_reviews(made: PromptGenerator, template: P5Template) -> Iterator[Example]:
    """A family's prompts of four of five interactions drawn at random: the other known leak."""
    interactions, rng = made.dataset.interactions, np.random.default_rng(0)
    for row, user in enumerate(interactions.users().tolist()):
        if rng.random() < 0.8 and made.can_ask(template, row):
            yield made.text_of(template, user, row, row)._replace(split="train")


@pytest.mark.parametrize("name", ["4-1", "4-2", "3-2", "3-5", "1-1", "1-2", "1-4"])
def test_a_random_split_of_ratings_or_reviews_is_caught(
    name: str, told: tuple[Dataset, Split, Templates]
) -> None:
    data, cut, shipped = told
    made = generator(data, shipped, PromptConfig(candidates=20))
    template = next(template for template in shipped if template.id == name)
    prompts = list(random_split_of_reviews(made, template))
    found = by_check(audit(prompts, data, cut, numbered(data.item_count), shipped))[LEAK]
    assert found.verdict == "fault"
    trained = [
        set(data.interactions.items[start:end].tolist())
        for start, end in zip(data.interactions.offsets, cut.train_end, strict=False)
    ]
    leaked = sum(prompt.item not in trained[prompt.user] for prompt in prompts)
    assert leaked > 100  # of 300 held-out interactions
    # Beyond these, only texts of a held-out interaction whose item was met in training too.
    assert leaked <= found.count <= (leaked if name.startswith("1") else 300)


@pytest.mark.parametrize("name", ["4-1", "3-2", "1-1"])
def test_the_text_alone_gives_a_leak_away_whatever_item_the_row_claims(
    name: str, told: tuple[Dataset, Split, Templates]
) -> None:
    data, cut, shipped = told
    made = generator(data, shipped, PromptConfig(candidates=20))
    template = next(template for template in shipped if template.id == name)
    first = data.interactions.items[data.interactions.offsets[:-1]]
    prompts = (p._replace(item=int(first[p.user])) for p in random_split_of_reviews(made, template))
    found = by_check(audit(prompts, data, cut, numbered(data.item_count), shipped))[LEAK]
    assert found.verdict == "fault"
    assert found.count > 50


def leaks_of(
    own: Templates,
    titles: dict[int, str] | None = None,
    mentions: tuple[str, ...] | None = None,
    reviews: dict[str, list[str]] | None = None,
) -> Callable[..., str]:
    """Looks at a text about one user, trained on 1, 2 and 12, held out on 3 and 12."""
    data = shop([[1, 2, 12, 3, 12]], titles=titles, reviews=reviews)
    indexing = Indexing("random", mentions) if mentions else numbered(30)
    leaks = Leaks(data, split(data, SplitConfig()).train_end, indexing, own)

    def look(text: str, target: str = "item_2", template: str = "2-1", item: int = 2) -> str:
        return leaks.look(Example(text, target, "sequential", template, 0, item, "train"))

    return look


def test_a_number_is_not_found_inside_a_longer_one(own: Templates) -> None:
    look = leaks_of(own)
    assert look("After item_1, item_30, xitem_3, item_3_ comes") == ""
    assert look("After item_1, item_3 comes") == "name"
    assert look("After item_1 comes", target="item_3") == "name"
    assert look("After item_1 comes", item=3) == "item"


def test_a_held_out_item_that_was_met_in_training_too_is_counted_apart(own: Templates) -> None:
    look = leaks_of(own)
    assert look("After item_1, item_12 comes") == "repeated item"
    assert look("After item_1, item_12 comes", item=12) == "repeated item"
    assert look("After item_12, item_3 comes") == "name"


def test_cluster_tokens_are_told_from_longer_and_shorter_ones(own: Templates) -> None:
    mentions = ["<c1_1><c2_1>", "<c1_1><c2_1><c3_4>", "<c1_2><c2_1>"]
    mentions += [f"<c9_{number}>" for number in range(27)]
    look = leaks_of(own, mentions=tuple(mentions))
    assert look("After <c1_1><c2_1>, <c1_1><c2_1><c3_4> comes") == ""
    assert look("After <c1_2><c2_1><c3_4>, <c8_0><c1_2><c2_1> comes") == ""
    assert look("After <c1_2><c2_1> comes") == "name"


def test_a_title_is_found_whole_and_neither_in_a_longer_one_nor_in_the_question(
    own: Templates,
) -> None:
    look = leaks_of(own, titles={3: "Batman", 7: "Batman Returns", 8: "Batman, the End"})
    assert look("After Batman Returns -> Batman, the End comes") == ""
    assert look("After Batman Returns -> Batman comes") == "title"
    assert look("After Batmania comes") == ""
    after = leaks_of(own, titles={3: "After"})
    assert after("After Thing 1 comes") == ""
    assert after("After After comes") == "title"
    assert after("After Thing 1 comes", template="unknown") == "title"


def test_a_title_that_two_items_have_is_counted_apart(own: Templates) -> None:
    look = leaks_of(own, titles={3: "Kettle", 9: "Kettle"})
    assert look("After Kettle comes") == "shared title"
    assert look("After Kettle, item_3 comes") in ("shared title", "name")


def test_what_a_user_wrote_of_a_held_out_item_is_a_leak_and_of_others_is_none(
    own: Templates,
) -> None:
    texts = ["It boils better than the Pan.", "Good", "Fits", "This one leaks at the lid.", "Fits"]
    look = leaks_of(own, titles={3: "Pan"}, reviews={"review": texts})
    assert look("Title of: This one leaks at the lid.", "Wet", "4-1") == "text"
    assert look("Title of: It boils better than the Pan.", "Hot", "4-1") == "own words"
    assert look("Title of: Fits", "Ok", "4-1") == ""
    assert look("Title of: Pan", "Ok", "4-1") == "title"


def test_names_hold_each_other_only_whole() -> None:
    names = Names(["", "Toy", "Toy Story", "Toys", "My Toy"])
    assert names.longer("Toy") == ("Toy Story", "My Toy")
    assert not names.stands_in("Toy", "Toy Story, My Toy, Toys")
    assert names.stands_in("Toy", "Toy Story, Toy")
    assert not names.stands_in("", "anything")


def test_held_out_templates_in_training_are_a_fault(own: Templates) -> None:
    data = shop([[1, 2, 4, 3, 5]])
    seen = Example("After item_1 comes", "item_2", "sequential", "2-1", 0, 2, "train")
    unseen = seen._replace(input="What follows item_1", template="2-4")
    asked = unseen._replace(split="test")
    cut, names = split(data, SplitConfig()), numbered(30)
    clean = by_check(audit([seen, asked], data, cut, names, own))["templates"]
    assert (clean.verdict, clean.found) == (
        "ok",
        "test: 0 seen, 1 held out; train: 1 seen, 0 held out",
    )
    assert by_check(audit([seen, unseen], data, cut, names, own))["templates"].verdict == "fault"
    foreign = seen._replace(template="9-9")
    noted = by_check(audit([foreign], data, cut, names, own))["templates"]
    assert noted.verdict == "note" and "unknown: 9-9" in noted.found


def test_answers_must_be_among_the_candidates_and_name_the_item(own: Templates) -> None:
    data = shop([[1, 2, 4, 3, 5]])
    cut, names = split(data, SplitConfig()), numbered(30)
    right = Example("item_1 then of item_7 , item_2 one", "item_2", "s", "2-2", 0, 2, "train")
    found = by_check(audit([right], data, cut, names, own))
    assert found["answers among candidates"].verdict == found["answers name items"].verdict == "ok"
    absent = right._replace(input="item_1 then of item_7 , item_20 one")
    found = by_check(audit([right, absent], data, cut, names, own))["answers among candidates"]
    assert (found.verdict, found.count, found.of) == ("fault", 1, 2)
    other = right._replace(item=7)
    found = by_check(audit([other], data, cut, names, own))["answers name items"]
    assert (found.verdict, found.count, found.of) == ("fault", 1, 1)


def test_repeated_prompts_are_counted_and_warned_of_where_they_are_most(own: Templates) -> None:
    data = shop([[1, 2, 4, 3, 5]])
    cut, names = split(data, SplitConfig()), numbered(30)
    one = Example("After item_1 comes", "item_2", "sequential", "2-1", 0, 2, "train")
    other = one._replace(target="item_4", item=4)
    found = by_check(audit([one, one, other], data, cut, names, own))["repeated prompts"]
    assert (found.verdict, found.count, found.of) == ("note", 1, 3)
    found = by_check(audit([one] * 3, data, cut, names, own))["repeated prompts"]
    assert (found.verdict, found.count) == ("warning", 2)


SMALL = ["--data.source", "simulated", "--data.simulated.users", "60"]
SMALL += ["--data.simulated.items", "250", "--prompts.candidates", "20"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    assert generate.main([*SMALL, "--out", str(path), "--indexing.seed", "5"]) == 0
    return path


def test_a_file_of_ours_passes_by_the_names_that_lie_beside_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*SMALL, "--files", str(file)]) == 0
    table = capsys.readouterr().out
    assert "0 of 2,100 (0 %) training prompts tell of an item" in table
    assert "fault" not in table


def test_prompts_are_made_where_no_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(SMALL) == 0
    assert "test: 19 seen, 2 held out; train: 19 seen, 0 held out" in capsys.readouterr().out


@pytest.mark.parametrize("fit_on", ["train", "train+valid"])
def test_what_a_run_was_trained_on_is_made_again(
    fit_on: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[tuple[int, int, list[Example]]] = []
    whole: Callable[..., Iterator[Example]] = PromptGenerator.train

    def noted(self: PromptGenerator, seed: int, epoch: int = 1) -> Iterator[Example]:
        read.append((seed, epoch, list(whole(self, seed, epoch))))
        return iter(read[-1][2])

    monkeypatch.setattr(PromptGenerator, "train", noted)
    run = small_p5.train(tmp_path / "run", run__seed=3, run__fit_on=fit_on, prompts__candidates=20)
    # Epoch 0 is what the tokenizer is learned from; without refitting, the first stage counts.
    trained = [one for one in read if one[1] > 0 and one[0] == 6 + (fit_on == "train+valid")]
    assert trained
    read.clear()
    capsys.readouterr()
    assert command.main(["--run", str(run)]) == 0
    assert read == trained
    assert "0 of " in capsys.readouterr().out
    read.clear()
    assert command.main(["--run", str(run), "--epochs", "1"]) == 0
    assert read == trained[:1]
    for words, message in (
        (["--run", str(run), "--seed", "1"], "--run tells all but --epochs: leave out --seed"),
        (["--run", str(tmp_path / "none")], "none"),
        (["--files", "p.jsonl", "--epochs", "2"], "--epochs is of prompts that are made"),
        (["--epochs", "0"], "use 1 epoch or more"),
    ):
        assert command.main(words) == 2
        assert message in capsys.readouterr().err


def test_a_parquet_file_reads_as_the_lines_do(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "p.parquet"
    assert generate.main([*SMALL, "--out", str(other), "--indexing.seed", "5"]) == 0
    capsys.readouterr()
    tables = []
    for path in (file, other):
        assert command.main([*SMALL, "--files", str(path)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert command.main([*SMALL, "--files", f"{file}, {other}"]) == 0
    assert "of 4,200 (0 %) training prompts tell" in capsys.readouterr().out


def test_a_leak_in_a_file_ends_with_exit_code_one(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "test.jsonl"
    assert generate.main([*SMALL, "--out", str(out), "--part", "test", "--only", "2-3"]) == 0
    rows = [json.loads(line) | {"split": "train"} for line in out.read_text().splitlines()]
    leaky = tmp_path / "leaky.jsonl"
    leaky.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command.main([*SMALL, "--files", str(leaky)]) == 1
    told = capsys.readouterr().out
    assert "fault" in told and "build all families from the training part" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"input": "a"}\n', "row 1: 'target' is missing"),
        ("[1]\n", "row 1"),
        (
            '{"input": "", "target": "", "family": "", "template": "", "user": "nobody", '
            '"item": "i00001", "split": "train"}\n',
            "row 1: 'nobody' is missing, or names no user or item of this data",
        ),
    ],
)
def test_a_file_that_holds_no_prompts_of_the_data_is_one_sentence(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    assert command.main([*SMALL, "--files", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_files_of_another_split_or_data_or_indexing_are_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--files", str(file)]
    assert command.main([*options, "--split.method", "temporal"]) == 2
    assert "was made of other data or with another split" in capsys.readouterr().err
    assert command.main([*options, "--data.simulated.seed", "3"]) == 2
    assert "was made of other data or with another split" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    assert generate.main([*SMALL, "--out", str(other), "--indexing.seed", "6"]) == 0
    assert command.main([*SMALL, "--files", f"{file},{other}"]) == 2
    assert "were made with different indexing" in capsys.readouterr().err
    assert command.main([*SMALL, "--files", str(tmp_path / "none.parquet")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["ml-100k", "amazon-beauty-2014"])
def test_prompts_of_real_data_have_no_fault(
    name: str,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[[str, object], None],
) -> None:
    monkeypatch.setenv("LLMREC_DATA", str(data_root))
    if not (data_root / name).is_dir():
        pytest.skip(f"no {name} below {data_root}")
    config = DataConfig(source=name)
    if name == "ml-100k":
        config = replace(config, item_text="movielens_atomic")
    data = load_dataset(config)
    cut, shipped = split(data, SplitConfig()), load_family_templates("")
    for numbered_along, indexing in (
        ("training parts", build_indexing(IndexingConfig("sequential"), data, cut.train_end)),
        ("whole sequences", along_whole_sequences(data)),
    ):
        made = PromptGenerator(data, cut, indexing, shipped, PromptConfig(candidates=20))
        prompts = (prompt for prompt, _ in zip(made.train(seed=0), range(20_000)))  # noqa: B905
        found = by_check(audit(prompts, data, cut, indexing, shipped))
        assert found[LEAK].verdict == "ok"
        figure(f"{name}, numbered {numbered_along}: {LARGEST}", found[LARGEST].found)
        assert (found[LARGEST].verdict == "fault") == (numbered_along == "whole sequences")
