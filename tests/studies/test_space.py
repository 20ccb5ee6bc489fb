"""What a search draws from, what it draws, and the file that keeps it."""

import json
from dataclasses import asdict

import pytest

from llmrec.errors import UsageError
from llmrec.studies.space import Choice, Span, described, read_space
from llmrec.studies.trials import Trial, best, propose, read_trials

SPACE = {
    "optim.lr": Span(1e-4, 1e-2, log=True),
    "model.dropout": Span(0.0, 0.5, 0.1),
    "model.width": Span(16, 64, 16),
    "model.dilations": Choice(([1, 4], [1, 2, 4])),
    "loss.scale": Choice((1, 1.5, True)),
}


def done(number, options, value):
    return Trial(number, options, "done", value, 2, 0.1)


def failed(number, options):
    return Trial(number, options, "failed", None, 1, 0.1, "the loss is not finite.")


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ({"optim.lr": {"low": 0.1, "high": 0.2}}, {"optim.lr": Span(0.1, 0.2)}),
        ({"optim": {"lr": {"low": 1, "high": 2}}}, {"optim.lr": Span(1, 2)}),
        ({"optim.lr": {"low": "1e-4", "high": 1, "log": True}},  # YAML 1.1 reads 1e-4 as text
         {"optim.lr": Span(1e-4, 1, log=True)}),
        ({"model.width": [32, 64], "model": {"heads": [1, 2]}},
         {"model.width": Choice((32, 64)), "model.heads": Choice((1, 2))}),
        ({"a": {"low": 0.1, "high": 0.7, "step": 0.2}}, {"a": Span(0.1, 0.7, 0.2)}),
    ],
)  # fmt: skip
def test_a_space_is_read_nested_or_dotted(content, read):
    assert read_space("space", content) == read


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1], "space must name options, such as optim.lr: {low: 1.0e-4"),
        ({"a": 3}, "space.a=3 must be a list of values or {low: 1, high: 8}"),
        ({"a": {}}, "space.a={} must be a list of values or"),
        ({"a": {"lo": 1, "hi": 2}}, "space.a.lo=1 must be a list of values or"),
        ({"a": {"low": 1}}, "space.a has no high. Give both low and high."),
        ({"a": {"low": 2, "high": 2}}, "space.a: low=2 must be below high=2."),
        ({"a": {"low": 3, "high": 2}}, "space.a: low=3 must be below high=2."),
        ({"a": {"low": 0, "high": 2, "log": True}}, "low=0 must be above 0 where log is true."),
        ({"a": {"low": 1, "high": 2, "log": 1}}, "space.a.log must be true or false, not 1."),
        ({"a": {"low": 1, "high": 2, "steps": 1}}, "unknown key steps: did you mean step?"),
        ({"a": {"low": "x", "high": 2}}, "space.a.low must be a number, not 'x'."),
        ({"a": {"low": True, "high": 2}}, "space.a.low must be a number, not True."),
        ({"a": {"low": 0, "high": float("inf")}}, "space.a.high must be a number, not inf."),
        ({"a": {"low": 0, "high": 5, "step": 2}}, "steps of 2 from low=0 do not end at high=5."),
        ({"a": {"low": 0, "high": 5, "step": 0}}, "steps of 0 from low=0 do not end at high=5."),
        ({"a": {"low": 1, "high": 5, "step": 1, "log": True}}, "has both log and step."),
        ({"a": [1]}, "space.a must list two or more different values"),
        ({"a": [1, 2, 1]}, "space.a must list two or more different values"),
    ],
)
def test_a_mistake_in_a_space_is_one_sentence(content, sentence):
    with pytest.raises(UsageError) as refusal:
        read_space("space", content)
    assert sentence in str(refusal.value)


def test_what_is_hashed_does_not_depend_on_how_the_space_was_written():
    nested = read_space("space", {"b": {"c": [1, 2]}, "a": {"low": 1, "high": 2}})
    dotted = read_space("space", {"a": {"high": 2, "low": 1, "log": False}, "b.c": [1, 2]})
    told = {"a": {"low": 1, "high": 2, "step": "any", "log": False}, "b.c": [1, 2]}
    assert json.dumps(described(nested)) == json.dumps(described(dotted)) == json.dumps(told)


def test_proposals_lie_in_the_space_and_have_its_types():
    past = []
    for number in range(15):  # 10 at random, then by what came before
        options = propose(SPACE, 0, past)
        assert 1e-4 <= options["optim.lr"] <= 1e-2
        assert options["model.dropout"] in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # exactly
        assert options["model.width"] in (16, 32, 48, 64)
        assert type(options["model.width"]) is int
        assert options["model.dilations"] in ([1, 4], [1, 2, 4])
        past.append(done(number, options, options["optim.lr"]))
    assert {type(trial.options["loss.scale"]) for trial in past} == {int, float, bool}


def test_proposals_follow_from_seed_and_past_alone():
    past = []
    for number in range(12):
        options = propose(SPACE, 7, past)
        read_back = [Trial(**json.loads(json.dumps(asdict(trial)))) for trial in past]
        assert propose(SPACE, 7, read_back) == options
        past.append(failed(number, options) if number % 3 else done(number, options, number / 99))
    assert propose(SPACE, 8, past) != propose(SPACE, 7, past)


def test_later_proposals_come_nearer_to_a_planted_optimum(figure):
    misses = []
    for seed in range(3):
        space, past = {"x": Span(0.0, 10.0)}, []
        for number in range(30):
            options = propose(space, seed, past)
            past.append(done(number, options, 1 - abs(options["x"] - 3) / 10))
        misses += [abs(trial.options["x"] - 3) for trial in past[-10:]]
    uniform = (3**2 / 2 + 7**2 / 2) / 10  # the mean of |x - 3| over [0, 10]
    missed = sum(misses) / len(misses)
    figure("TPE's distance from a planted optimum, uniform draws 2.90", f"{missed:.2f}")
    assert missed < uniform * 2 / 3


def test_where_trials_failed_fewer_are_proposed():
    space = {"x": Span(0.0, 1.0)}
    halves = [number / 30 for number in range(30)]  # values equal: only failures tell halves apart
    past = [
        failed(n, {"x": x}) if x >= 0.5 else done(n, {"x": x}, 0.1) for n, x in enumerate(halves)
    ]
    drawn = [propose(space, seed, past)["x"] for seed in range(20)]
    assert sum(x < 0.5 for x in drawn) >= 18


def test_the_best_is_the_earliest_of_equals_and_never_a_failed_one():
    trials = [failed(0, {}), done(1, {}, 0.1), done(2, {}, 0.3), done(3, {}, 0.3)]
    assert best(trials) == trials[2]
    assert best(trials[:1]) is None
    assert best([done(0, {}, 0.0)]).value == 0.0


def test_a_line_that_a_kill_cut_short_does_not_count(tmp_path):
    path = tmp_path / "trials.jsonl"
    assert read_trials(path) == []
    lines = [json.dumps(asdict(done(n, {"a": n}, 0.5))) + "\n" for n in range(3)]
    for cut in (1, 2, 40, len(lines[2]) - 1):
        path.write_text("".join(lines)[:-cut])
        assert [trial.number for trial in read_trials(path)] == [0, 1]


@pytest.mark.parametrize("damage", ["{", "{}", "[]", '{"number": 1}'])
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "trials.jsonl"
    path.write_text(f"{damage}\n" + json.dumps(asdict(done(1, {}, 0.5))) + "\n")
    with pytest.raises(UsageError, match=r"trials.jsonl line 1 is damaged. Delete"):
        read_trials(path)
