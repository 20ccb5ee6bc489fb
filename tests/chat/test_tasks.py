"""What each task asks and how its answers become scores."""

import json
import math

import pytest

from llmrec.chat.requests import Answer, Choice, Schema
from llmrec.chat.tasks import Question, TaskConfig, ask, judge, pair_of, parts
from llmrec.errors import UsageError
from llmrec.prompting.templates import load_prompt

TITLES = ("Blue Tent", "Red Kettle", "Fly Rod", "Guitar Capo")
QUESTION = Question(
    history=("Camp Stove", "Sleeping Bag"),
    candidates=TITLES,
    truth=2,
    history_block="1. Camp Stove",
)
RATED = Question(("Camp Stove",), ("Blue Tent",), 0, stars=4.0, rated=(("Camp Stove", 5.0),))


def answer(text: str = "", top: dict[str, float] | None = None, status: str = "answered") -> Answer:
    """An answer; `top` holds probabilities of the first token."""
    alternatives = tuple((token, math.log(share)) for token, share in (top or {}).items())
    return Answer(0, "digest", status, text, alternatives)  # type: ignore[arg-type]


def scores(config: TaskConfig, given: Answer, part: int = 0) -> dict[int, float]:
    return judge(given, QUESTION, part, config).scores


def kinds(config: TaskConfig, given: Answer, part: int = 0) -> dict[str, int]:
    return dict(judge(given, QUESTION, part, config).kinds)


@pytest.mark.parametrize(
    ("task", "count"), [("pick", 1), ("top", 1), ("list", 1), ("pair", 6), ("point", 4)]
)
def test_a_case_takes_so_many_requests(task, count) -> None:
    assert parts(4, TaskConfig(task=task)) == count  # pairs: 4 * 3 / 2


def test_every_pair_is_asked_once_and_half_of_them_turned_round() -> None:
    pairs = [pair_of(part, 5) for part in range(10)]
    assert len({frozenset(pair) for pair in pairs}) == 10
    assert sum(first < second for first, second in pairs) == 5


@pytest.mark.parametrize("task", ["pick", "top", "list", "pair", "point"])
def test_a_prompt_puts_the_instruction_first_and_the_candidates_last(task) -> None:
    prompt = load_prompt(f"chat/{task}", "chat.template")
    asked = ask(QUESTION, 0, TaskConfig(task=task), prompt.render)
    shown = [title for title in TITLES if title in asked.prompt]
    assert shown == list(TITLES) if task in ("pick", "top", "list") else shown
    history = asked.prompt.index("1. Camp Stove")
    assert 0 < history < min(asked.prompt.index(title) for title in shown)


def test_constrained_answers_are_one_of_the_options_and_free_ones_are_not_held() -> None:
    prompt = load_prompt("chat/pick", "chat.template")
    held = ask(QUESTION, 0, TaskConfig(), prompt.render)
    assert held.constraint == Choice(("A", "B", "C", "D"))
    assert (held.max_tokens, held.top_logprobs) == (4, 20)
    free = ask(QUESTION, 0, TaskConfig(decoding="free"), prompt.render)
    assert free.constraint is None
    assert free.max_tokens > 20 and free.top_logprobs == 0
    assert free.prompt != held.prompt  # which asks for the letter alone


def test_a_list_is_constrained_to_its_candidates_and_length() -> None:
    prompt = load_prompt("chat/top", "chat.template")
    asked = ask(QUESTION, 0, TaskConfig(task="top", list_length=3), prompt.render)
    assert isinstance(asked.constraint, Schema)
    schema = asked.constraint.schema
    assert schema["items"]["enum"] == list(TITLES)
    assert (schema["minItems"], schema["maxItems"]) == (3, 3)


def test_more_titles_than_candidates_are_not_asked_for() -> None:
    prompt = load_prompt("chat/top", "chat.template")
    asked = ask(QUESTION, 0, TaskConfig(task="top", list_length=10), prompt.render)
    assert isinstance(asked.constraint, Schema)
    assert asked.constraint.schema["maxItems"] == 4


def test_your_own_number_of_tokens_wins() -> None:
    prompt = load_prompt("chat/pick", "chat.template")
    assert ask(QUESTION, 0, TaskConfig(max_tokens=500), prompt.render).max_tokens == 500


def test_a_pick_is_read_from_the_probabilities_of_its_letters() -> None:
    found = judge(answer("B", {"B": 0.6, " C": 0.2, "the": 0.2}), QUESTION, 0, TaskConfig())
    assert found.scores == pytest.approx({0: 0.0, 1: 0.75, 2: 0.25, 3: 0.0})  # .6 / .8, .2 / .8
    assert found.chosen == 1 and dict(found.kinds) == {"token": 1}


def test_without_probabilities_a_pick_is_the_one_it_names_and_the_rest_are_not_listed() -> None:
    assert scores(TaskConfig(), answer("C")) == {2: 1.0}
    assert scores(TaskConfig(decoding="free", logprobs="off"), answer("C) Fly Rod")) == {2: 1.0}


@pytest.mark.parametrize(
    ("text", "top"),
    [
        ("D", {"the": 1.0}),
        ("<think>hm</think>\nD", {"<think>": 0.99, "A": 0.01}),
        (" D", {" ": 0.7, "A": 0.3}),
    ],
)
def test_a_first_token_that_is_no_option_says_nothing_so_the_text_is_read(text, top) -> None:
    assert scores(TaskConfig(), answer(text, top)) == {3: 1.0}


def test_half_a_word_is_cut_and_a_letter_is_whole() -> None:
    assert kinds(TaskConfig(), answer("I think", status="cut")) == {
        "constraint_ignored": 1, "unparsable": 1, "cut": 1,
    }  # fmt: skip
    assert kinds(TaskConfig(), answer("B", status="cut")) == {"exact": 1}


@pytest.mark.parametrize("status", ["invalid", "failed"])
def test_an_answer_that_never_came_scores_nothing_and_is_counted(status) -> None:
    assert scores(TaskConfig(), answer(status=status)) == {}
    assert kinds(TaskConfig(), answer(status=status)) == {status: 1}


def test_a_list_scores_by_place_and_counts_what_is_wrong_with_it() -> None:
    config = TaskConfig(task="list", decoding="free")
    text = json.dumps(["Fly Rod", "blue tent", "Fly Rod", "Camp Stove", "Wooden Spoon"])
    assert scores(config, answer(text)) == {2: 4.0, 0: 3.0}
    found = kinds(config, answer(text))
    assert found == {"exact": 1, "normalised": 1, "duplicate": 1, "seen": 1, "invented": 1}


def test_a_cut_list_counts_as_cut_and_keeps_what_it_says() -> None:
    config = TaskConfig(task="list", decoding="free")
    found = judge(answer('["Fly Rod", "Blue Te', status="cut"), QUESTION, 0, config)
    assert found.scores[2] == 4.0
    assert found.kinds["cut"] == 1


def test_a_constraint_that_the_server_ignored_is_told() -> None:
    config = TaskConfig(task="list")
    assert kinds(config, answer("I would say Fly Rod."))["constraint_ignored"] == 1
    assert "constraint_ignored" not in kinds(config, answer(json.dumps(TITLES)))


def test_a_pair_gives_a_point_to_the_winner_or_shares_it_by_probability() -> None:
    config = TaskConfig(task="pair")
    first, second = pair_of(0, 4)
    assert scores(config, answer("B")) == {first: 0.0, second: 1.0}
    assert scores(config, answer("A", {"A": 0.6, "B": 0.2})) == pytest.approx(
        {first: 0.75, second: 0.25}
    )


def test_a_point_is_the_probability_of_yes() -> None:
    config = TaskConfig(task="point")
    assert scores(config, answer("no", {"no": 0.6, "Yes": 0.2}), part=3) == pytest.approx({3: 0.25})
    assert scores(config, answer("Yes."), part=3) == {3: 1.0}
    assert kinds(config, answer("maybe"), part=3)["unparsable"] == 1


def test_a_yes_that_a_tokeniser_splits_is_read_as_text() -> None:
    prompt = load_prompt("chat/point", "chat.template")
    config = TaskConfig(task="point")
    assert ask(QUESTION, 0, config, prompt.render).max_tokens == 4
    assert scores(config, answer("yes", {"y": 0.9, "n": 0.1}), part=3) == {3: 1.0}


def test_a_rating_is_the_expected_number_of_stars() -> None:
    config = TaskConfig(task="rating")
    found = judge(answer("5", {"5": 0.5, "3": 0.5}), RATED, 0, config)
    assert found.scores == {0: 4.0}
    assert judge(answer("5"), RATED, 0, config).scores == {0: 5.0}  # five stars are kept


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shuffles": 0}, "must be at least 1"),
        ({"task": "point", "shuffles": 2}, "chat.shuffles=2 means nothing to chat.task=point"),
        ({"task": "pick", "examples": 2}, "examples are shown by chat.task=rating"),
        ({"task": "pick", "list_length": 5}, "chat.list_length=5 means nothing"),
        ({"task": "rating", "history": "recency"}, "chat.history=recency means nothing"),
        ({"max_tokens": 0}, "chat.max_tokens=0 must be at least 1"),
        ({"temperature": 3.0}, "chat.temperature=3.0 must lie in"),
    ],
)
def test_an_option_without_a_meaning_is_refused(options, sentence) -> None:
    with pytest.raises(UsageError, match=sentence):
        TaskConfig(**options)
