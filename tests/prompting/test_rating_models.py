"""The networks that predict ratings: where they begin, what they read, what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.data.interactions import Interactions
from llmrec.encoders.tuning import LoraOptions, TunableEncoder
from llmrec.errors import UsageError
from llmrec.prompting.rating_data import Offsets, Rated
from llmrec.prompting.rating_language import LanguageRater
from llmrec.prompting.rating_models import Head, RatingModelConfig, TransformerRater
from llmrec.prompting.templates import load_prompt

ROOT = Path(__file__).resolve().parents[2]
TITLES = ["red shoe", "green boot", "blue hat", "winter coat", "summer scarf", "rain coat"]
SMALL = {"width": 16, "heads": 1, "dropout": 0.0}


def rated(users=7, seed=0):
    rng = np.random.default_rng(seed)
    length = 5
    return Rated.of(
        Interactions(
            items=np.concatenate([1 + rng.permutation(6)[:length] for _ in range(users)]).astype(
                np.int32
            ),
            offsets=np.arange(users + 1, dtype=np.int64) * length,
            ratings=rng.integers(1, 6, users * length).astype(np.float32),
        ),
        "made",
    )


def parts(config, known=None):
    known = known or rated()
    training = known.training(known.interactions.offsets[1:])
    return (
        known,
        Offsets.of(known, training, 6, config.item_shrinkage, config.user_shrinkage),
        training,
    )


def transformer(**options):
    torch.manual_seed(0)
    config = RatingModelConfig(**SMALL | options)
    known, offsets, training = parts(config)
    return TransformerRater(config, known, offsets, training, 6), training


def language(folder, known=None, tokens=40, history=50, **options):
    torch.manual_seed(0)
    head = options.pop("head", "regression")
    config = RatingModelConfig(name="language_model", history=history, head=head, **SMALL)
    encoder = TunableEncoder(model=str(folder), max_item_tokens=tokens, **options)
    known, offsets, training = parts(config, known)
    prompt = load_prompt("rating/stars", "model.template")
    device = torch.device("cpu")
    rater = LanguageRater(config, encoder, prompt, TITLES, known, offsets, training, device)
    return rater, training


def head(kind, levels=(1.0, 2.0, 3.0, 4.0, 5.0)):
    return Head(3, RatingModelConfig(head=kind, **SMALL), np.array(levels))


def test_a_new_regression_head_predicts_its_base():
    base = torch.tensor([1.5, 4.0])
    new = head("regression")
    assert torch.equal(new.stars(new(torch.randn(2, 3), base)), base)


def test_a_new_classification_head_is_a_bell_around_its_base():
    # Logits -(k - 3)^2 = -4 -1 0 -1 -4: symmetric, so 3 stars are expected.
    new = head("classification")
    output = new(torch.randn(1, 3), torch.tensor([3.0]))
    assert output[0].tolist() == [-4, -1, 0, -1, -4]
    assert new.stars(output).item() == pytest.approx(3)


def test_a_classification_head_predicts_the_expected_stars():
    new = head("classification", levels=(1.0, 5.0))
    output = torch.log(torch.tensor([[0.25, 0.75]]))
    assert new.stars(output).item() == pytest.approx(0.25 * 1 + 0.75 * 5)


def test_the_losses_are_squared_error_and_cross_entropy_summed():
    stars = torch.tensor([5.0, 1.0])
    squared = head("regression").loss(torch.tensor([[4.0], [3.0]]), stars)
    assert squared.item() == 1 + 4
    probabilities = torch.tensor([[0.5, 0.5], [0.8, 0.2]])
    entropy = head("classification", levels=(1.0, 5.0)).loss(probabilities.log(), stars)
    assert entropy.item() == pytest.approx(-np.log(0.5) - np.log(0.8))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_an_untrained_network_predicts_what_offsets_do(kind):
    rater, training = transformer(head=kind)
    rater.eval()
    with torch.inference_mode():
        predicted = rater.predict(training)
    expected = rater.offsets.clip(rater.offsets.expected(training))
    assert predicted == pytest.approx(expected, abs=1e-5 if kind == "regression" else 0.3)


def test_with_base_mean_an_untrained_network_predicts_the_mean_and_is_told_no_offset():
    rater, training = transformer(base="mean")
    with torch.inference_mode():
        assert rater.eval().predict(training) == pytest.approx(rater.offsets.overall)
    assert rater.head.hidden.in_features == 2 * 16
    assert transformer()[0].head.hidden.in_features == 2 * 16 + 5


def test_predictions_of_a_transformer_do_not_depend_on_who_else_is_asked():
    rater, training = transformer()
    torch.nn.init.normal_(rater.head.out.weight)
    rater.eval()
    with torch.inference_mode():
        together = rater.predict(training)
        alone = [rater.predict(training.take(np.array([row])))[0] for row in range(len(training))]
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_transformer_reads_the_stars_of_the_history_and_the_item_asked_for():
    rater, training = transformer(base="mean")
    torch.nn.init.normal_(rater.head.out.weight)
    rater.eval()
    last = training.take(np.array([4]))
    with torch.inference_mode():
        states = [rater.state(last)]
        rater.rated.stars[int(last.stop[0]) - 1] = 6 - rater.rated.stars[int(last.stop[0]) - 1]
        states.append(rater.state(last))
        last.item[0] = 1 + last.item[0] % 6
        states.append(rater.state(last))
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


def test_a_transformer_reads_no_rating_from_the_asked_one_on():
    rater, training = transformer(base="mean")
    rater.eval()
    third = training.take(np.array([2]))
    with torch.inference_mode():
        before = rater.state(third)
        rater.rated.stars[2:5] = 1
        rater.rated.items[3:5] = 6
        assert torch.equal(before, rater.state(third))


def test_the_history_is_as_long_as_the_option_says():
    rater, training = transformer(history=2, base="mean")
    rater.eval()
    last = training.take(np.array([4]))  # has four ratings before it
    with torch.inference_mode():
        before = rater.state(last)
        rater.rated.stars[:2] = 6 - rater.rated.stars[:2]
        assert torch.equal(before, rater.state(last))
        rater.rated.items[2] = 1 + rater.rated.items[2] % 6
        assert not torch.equal(before, rater.state(last))


def test_a_classification_head_refuses_a_scale_without_steps():
    config = RatingModelConfig(head="classification", **SMALL)
    known = rated()
    known.stars[:] = np.linspace(1, 5, len(known.stars))
    assert known.interactions.ratings is not None
    known.interactions.ratings[:] = known.stars
    with pytest.raises(UsageError, match=r"model\.head=regression"):
        TransformerRater(config, *parts(config, known), 6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"history": 0}, "model.history"),
        ({"width": 10, "heads": 4}, "model.heads"),
        ({"item_shrinkage": -1.0}, "model.item_shrinkage"),
    ],
)
def test_options_without_a_meaning_are_refused(options, named):
    with pytest.raises(UsageError, match=named):
        RatingModelConfig(**options)


def test_the_shipped_prompt_renders_as_its_golden():
    prompt = load_prompt("rating/stars", "model.template")
    told = [
        prompt.render(rated=rated, candidate="Blue Tent", scale=("1", "5"))
        for rated in ([("Camp Stove", "5"), ("Sleeping Bag", "3.5")], [])
    ]
    golden = ROOT / "tests" / "goldens" / "rating" / "stars.txt"
    assert "\n=====\n".join(told) + "\n" == golden.read_text(encoding="utf-8")
    assert prompt.template.id == "stars"


def test_a_prompt_holds_the_rated_titles_oldest_first_and_the_item(tiny_models):
    rater, training = language(tiny_models["bert"], tokens=60)
    third = training.take(np.array([2]))
    items, stars = rater.rated.items, rater.rated.stars
    assert rater.reader.fitted(third).splitlines() == [
        "A customer's ratings, oldest first, from 1 (worst) to 5 (best):",
        f'- "{TITLES[items[0] - 1]}": {stars[0]:g}',
        f'- "{TITLES[items[1] - 1]}": {stars[1]:g}',
        f'What the customer now rates: "{TITLES[items[2] - 1]}"',
    ]


def test_the_first_rating_of_a_user_is_asked_without_a_history(tiny_models):
    rater, training = language(tiny_models["bert"])
    assert rater.reader.fitted(training.take(np.array([0]))).splitlines() == [
        "A customer without ratings, which go from 1 (worst) to 5 (best).",
        f'What the customer now rates: "{TITLES[rater.rated.items[0] - 1]}"',
    ]


def test_half_stars_are_written_with_their_half(tiny_models):
    known = rated()
    known.stars[0] = 3.5
    rater, training = language(tiny_models["bert"], known=known, tokens=60)
    assert ": 3.5\n" in rater.reader.fitted(training.take(np.array([1])))


def test_a_prompt_that_is_too_long_loses_its_oldest_ratings_whole(tiny_models):
    whole, training = language(tiny_models["bert"], tokens=64)
    last = training.take(np.array([4]))
    lines = whole.reader.fitted(last).splitlines()
    assert len(lines) == 6
    tokens = len(whole.encoder.tokenizer(whole.reader.fitted(last))["input_ids"])
    cut = language(tiny_models["bert"], tokens=tokens - 1)[0].reader.fitted(last).splitlines()
    assert cut == [lines[0], *lines[2:]]
    none = language(tiny_models["bert"], tokens=10)[0].reader.fitted(last).splitlines()
    assert none[-1] == lines[-1]
    assert not any(line.startswith("-") for line in none)


def test_the_prompt_shows_at_most_the_history_asked_for(tiny_models):
    rater, training = language(tiny_models["bert"], tokens=64, history=2)
    lines = rater.reader.fitted(training.take(np.array([4]))).splitlines()
    assert sum(line.startswith("-") for line in lines) == 2


@pytest.mark.parametrize("architecture", ["bert", "opt", "qwen3", "t5"])
def test_any_architecture_rates_the_same_alone_and_among_others(tiny_models, architecture):
    rater, training = language(tiny_models[architecture], tune="full", batch_tokens=100)
    torch.nn.init.normal_(rater.head.out.weight)
    rater.eval()
    with torch.inference_mode():
        together = rater.predict(training)
        alone = [rater.predict(training.take(np.array([row])))[0] for row in (3, 0, 17)]
    assert together[[3, 0, 17]] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "learning"),
    [
        ({"tune": "frozen"}, 0),
        ({"tune": "full"}, 1),
        ({"tune": "top:1"}, 1),
        ({"tune": "lora", "lora": LoraOptions(rank=2)}, 1),
    ],
)
def test_gradients_reach_what_is_tuned_and_only_that(tiny_models, options, learning):
    rater, training = language(tiny_models["bert"], **options)
    torch.nn.init.normal_(rater.head.out.weight)
    rater.train()
    rater.prepare(training, lambda done: None)
    rater(training).backward()
    model = rater.encoder.model
    learned = [w for w in model.parameters() if w.requires_grad]
    assert bool(learned) == bool(learning) == (rater.language_model is not None)
    assert all(weight.grad is not None for weight in learned)
    assert all(weight.grad is None for weight in model.parameters() if not weight.requires_grad)
    assert all(weight.grad is not None for weight in rater.head.parameters())
    assert rater.flops > 0


def test_a_frozen_model_predicts_as_the_same_model_read_at_every_step(tiny_models):
    frozen, training = language(tiny_models["bert"])
    tuned, _ = language(tiny_models["bert"], tune="full")
    for rater in (frozen, tuned):
        torch.manual_seed(1)
        torch.nn.init.normal_(rater.head.hidden.weight)
        torch.nn.init.normal_(rater.head.out.weight)
        rater.eval()
    frozen.prepare(training, lambda done: None)
    with torch.inference_mode():
        assert frozen.predict(training) == pytest.approx(tuned.predict(training), abs=1e-4)


def test_a_frozen_model_reads_each_prompt_once(tiny_models):
    rater, training = language(tiny_models["bert"])
    read = []
    rater.prepare(training.take(np.arange(10)), read.append)
    rater.prepare(training.take(np.arange(5, 20)), read.append)
    rater.prepare(training.take(np.arange(20)), read.append)
    assert sum(read) == 20
    assert len(rater.frozen_vectors) == 20
