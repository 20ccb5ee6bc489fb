# ruff: noqa: RUF001 - titles are shown with these brackets
"""The prompt generator: what it asks, and that no family tells what another is tested on."""

import re
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from p5_shop import generator, numbered, shop, templates

from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.simulated import SimulatedConfig
from llmrec.data.splits import SplitConfig, split
from llmrec.errors import UsageError
from llmrec.prompting.families import P5Template, load_family_templates
from llmrec.prompting.indexing import Indexing
from llmrec.prompting.p5 import Example, PerUser, PromptConfig, PromptGenerator
from llmrec.prompting.p5.draws import Shelf, salt_of
from llmrec.prompting.p5.words import LIKED, STAR_RANGE

NONE = PerUser(*[0] * 9)
Templates = tuple[P5Template, ...]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return templates(tmp_path_factory.mktemp("templates"))


def only(**counts: int) -> PerUser:
    return PerUser(**(vars(NONE) | counts))


def of(templates: Templates, name: str) -> P5Template:
    return next(template for template in templates if template.id == name)


def items_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"item_(\d+)", text)]


def test_a_next_prompt_tells_the_training_items_before_its_answer_and_no_others(
    own: Templates,
) -> None:
    data = shop([[3, 1, 2, 8, 9]])  # trained on 3, 1, 2; validated on 8; tested on 9
    config = PromptConfig(families="sequential", candidates=5, per_user=only(next=2))
    asked = {(p.input, p.target) for p in generator(data, own, config).train(seed=0)}
    assert asked == {("After item_3 comes", "item_1"), ("After item_3, item_1 comes", "item_2")}


def test_a_test_question_tells_all_that_came_before_the_test_item(own: Templates) -> None:
    data = shop([[3, 1, 2, 8, 9], [4, 5, 6]])
    made = generator(data, own, PromptConfig(candidates=5))
    asked = [(p.input, p.target, p.split) for p in made.questions(of(own, "2-1"), "test")]
    assert asked == [
        ("After item_3, item_1, item_2, item_8 comes", "item_9", "test"),
        ("After item_4, item_5 comes", "item_6", "test"),
    ]


def test_only_the_last_items_of_a_history_are_told(own: Templates) -> None:
    data = shop([[3, 1, 2, 8, 9]])
    made = generator(data, own, PromptConfig(candidates=5, history_items=2))
    (prompt,) = made.questions(of(own, "2-1"), "test")
    assert prompt.input == "After item_2, item_8 comes"


def test_items_are_mentioned_by_index_title_or_both_and_answered_by_index(own: Templates) -> None:
    data = shop([[3, 1, 2, 8, 9]], titles={1: "Red, <b>Kettle</b>", 2: ""})
    told = {
        "id": "item_3, item_1, item_2, item_8",
        "title": "Thing 3 -> Red, ‹b›Kettle‹/b› -> item_2 -> Thing 8",
        "both": "item_3 (Thing 3) -> item_1 (Red, ‹b›Kettle‹/b›) -> item_2 -> item_8 (Thing 8)",
    }
    for mention, history in told.items():
        config = PromptConfig(candidates=5, mention=mention)  # type: ignore[arg-type]
        (prompt,) = generator(data, own, config).questions(of(own, "2-1"), "test")
        assert (prompt.input, prompt.target) == (f"After {history} comes", "item_9")


def test_items_named_by_distinct_titles_are_mentioned_so_and_never_by_the_shared_one(
    own: Templates,
) -> None:
    data = shop([[3, 1, 2, 4]], items=5, titles={1: "Kettle", 3: "Kettle"})
    names = Indexing("title", ("Kettle", "Thing 2", "Kettle (2)", "Thing 4", "Thing 5"))
    cut = split(data, SplitConfig())
    made = PromptGenerator(data, cut, names, own, PromptConfig(candidates=2))
    (prompt,) = made.questions(of(own, "2-1"), "test")
    assert prompt.input == "After Kettle (2) -> Kettle -> Thing 2 comes"
    for mention in ("title", "both"):
        config = PromptConfig(candidates=2, mention=mention)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=f"prompts.mention={mention} with indexing.name=title"):
            PromptGenerator(data, cut, names, own, config)


def test_the_same_seed_gives_the_same_prompts_and_another_seed_or_epoch_others(
    own: Templates,
) -> None:
    data = shop([list(range(user + 1, user + 9)) for user in range(20)])
    made = generator(data, own, PromptConfig(candidates=5))
    first = list(made.train(seed=1))
    assert first == list(made.train(seed=1)) == list(made.train(1, epoch=1))
    assert first != list(made.train(seed=2))
    assert first != list(made.train(seed=1, epoch=2))
    with pytest.raises(UsageError, match="seed=-1 must not be negative"):
        next(made.train(seed=-1))


def test_an_epoch_has_as_many_prompts_as_are_counted_by_family_and_kind(own: Templates) -> None:
    # The third user's training part is one item: it has no history to go on from.
    data = shop([[1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12]])
    made = generator(data, own, PromptConfig(candidates=5))
    found = Counter((p.family, p.split) for p in made.train(seed=0))
    # sequential: 5 + 5 + 10 of two users; direct: 10 + 5 of three. No ratings, no texts.
    assert found == {("sequential", "train"): 40, ("direct", "train"): 45}
    assert made.count() == 85
    assert made.users == {"next": 2, "choose": 2, "judge": 2, "direct_judge": 3, "direct_choose": 3}


def test_every_interaction_is_asked_about_once_before_one_is_asked_twice(own: Templates) -> None:
    data = shop([[1, 2, 3, 4, 5, 6, 7, 8]])  # 2..6 follow a history in training
    config = PromptConfig(families="sequential", candidates=5, per_user=only(next=12))
    counts = Counter(p.target for p in generator(data, own, config).train(seed=0))
    assert sorted(counts.values()) == [2, 2, 2, 3, 3]


def test_what_comes_twice_is_asked_in_other_words(own: Templates) -> None:
    data = shop([[1, 2, 3]], ratings=[5, 4, 3])  # one training interaction, three templates fit
    config = PromptConfig(families="rating", per_user=only(rating=3))
    found = [p.template for p in generator(data, own, config).train(seed=0)]
    assert sorted(found) == ["1-1", "1-2", "1-3"]


def test_held_out_templates_are_never_trained_on(own: Templates) -> None:
    data = shop([[1, 2, 3, 4, 5, 6]] * 20)
    config = PromptConfig(families="sequential", candidates=5)
    used = {p.template for p in generator(data, own, config).train(seed=0)}
    assert used == {"2-1", "2-2", "2-3"}


def test_choices_are_distinct_hold_the_answer_once_and_nothing_else_of_the_user_s(
    own: Templates,
) -> None:
    data = shop([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]] * 20)
    config = PromptConfig(families="direct", candidates=12, per_user=only(direct_choose=10))
    for prompt in generator(data, own, config).train(seed=0):
        shown = items_in(prompt.input)
        assert len(set(shown)) == len(shown) == 12
        own_items = set(data.interactions.history(prompt.user).tolist())
        assert [item for item in shown if item in own_items] == [prompt.item]
        assert prompt.target == f"item_{prompt.item}"


def test_the_answer_stands_anywhere_among_the_candidates_alike(own: Templates) -> None:
    data = shop([[1, 2, 3, 4, 5, 6]] * 500)
    config = PromptConfig(families="direct", candidates=10, per_user=only(direct_choose=4))
    made = generator(data, own, config)
    for prompts in (made.train(seed=0), made.questions(of(own, "5-2"), "test")):
        seats = Counter(items_in(prompt.input).index(prompt.item) for prompt in prompts)
        total = seats.total()
        # Chi-square with 9 degrees of freedom exceeds 33.7 once in 10,000 times.
        assert sum((seats[s] - total / 10) ** 2 / (total / 10) for s in range(10)) < 33.7


def test_yes_and_no_are_equally_frequent_and_no_is_about_an_item_never_met(own: Templates) -> None:
    data = shop([[1, 2, 3, 4, 5, 6]] * 100)
    config = PromptConfig(families="sequential", candidates=5, per_user=only(judge=10))
    prompts = list(generator(data, own, config).train(seed=0))
    answers = Counter(prompt.target for prompt in prompts)
    assert abs(answers["yes"] - 500) < 4 * np.sqrt(1000 / 4)  # four deviations
    for prompt in prompts:
        *history, asked = items_in(prompt.input)
        assert asked == prompt.item
        assert history == list(range(1, len(history) + 1))
        if prompt.target == "yes":
            assert asked == len(history) + 1
        else:
            assert asked > 6  # not even the held-out 5 and 6


def test_a_question_by_title_never_names_an_item_without_one(own: Templates) -> None:
    data = shop([[1, 2, 3, 4, 5]] * 30, titles={2: "", **dict.fromkeys(range(6, 30), "")})
    config = PromptConfig(families="direct", candidates=5, per_user=only(direct_judge=10))
    asked = {(p.item, p.target) for p in generator(data, own, config).train(seed=0)}
    assert asked == {(1, "yes"), (3, "yes"), (30, "no")}


def test_a_user_who_has_met_everything_gets_a_short_list_and_no_untrue_question(
    own: Templates,
) -> None:
    data = shop([[1, 2, 3, 4, 5], [1, 2, 3]], items=5)
    config = PromptConfig(candidates=5, families="sequential,direct")
    prompts = [p for p in generator(data, own, config).train(seed=0) if p.user == 0]
    assert {p.target for p in prompts if p.template in ("2-3", "5-1")} == {"yes"}
    assert {len(items_in(p.input)) for p in prompts if p.template == "5-2"} == {1}


def test_stars_are_asked_for_named_rightly_or_wrongly_and_liked_from_four_on(
    own: Templates,
) -> None:
    data = shop([[1, 2, 3, 4, 5, 6]] * 50, ratings=[5, 4, 3, 1, 2, 2] * 50)
    config = PromptConfig(families="rating", per_user=only(rating=12))
    stars = {1: "5", 2: "4", 3: "3", 4: "1"}
    answers = Counter()
    for prompt in generator(data, own, config).train(seed=0):
        truth = stars[prompt.item]
        if prompt.template == "1-1":
            assert prompt.target == truth
        elif prompt.template == "1-2":
            named = prompt.input.split()[1]
            assert named in stars.values()  # 2 stars stand in the held-out part alone
            assert prompt.target == ("yes" if named == truth else "no")
            answers[prompt.target] += 1
        else:
            assert prompt.target == ("like" if int(truth) >= LIKED else "dislike")
    assert abs(answers["yes"] - answers["no"]) < 4 * np.sqrt(answers.total())


def test_interactions_without_stars_are_not_asked_about(own: Templates) -> None:
    nan = float("nan")
    data = shop([[1, 2, 3, 4, 5], [6, 7, 8]], ratings=[nan, 4, nan, 4, 4, nan, 3, nan])
    config = PromptConfig(families="rating", per_user=only(rating=5))
    made = generator(data, own, config)
    assert {(p.user, p.item) for p in made.train(seed=0)} == {(0, 2)}
    assert made.users == {"rating": 1}
    # The second user's test interaction has no stars either.
    assert [p.user for p in made.questions(of(own, "1-1"), "test")] == [0]
    assert len(list(made.questions(of(own, "2-1"), "test"))) == 2


@pytest.mark.parametrize("ratings", [[7, 80, 3, 1, 9], [0, 5, 5, 5, 5]])
def test_ratings_that_are_no_stars_are_refused_by_name(
    own: Templates, ratings: list[float]
) -> None:
    data = shop([[1, 2, 3, 4, 5]], ratings=ratings)
    message = rf"rating needs ratings of {STAR_RANGE[0]} to 5 stars, at most 10 different ones"
    with pytest.raises(UsageError, match=message):
        generator(data, own, PromptConfig(families="rating"))


def test_ten_point_ratings_are_named_as_what_they_are(own: Templates) -> None:
    data = shop([[1, 2, 3, 4, 5, 6]], ratings=[10, 8, 1, 8, 3, 2])
    message = "those of this data are 1 to 10, 3 different ones in training; rescale them"
    with pytest.raises(UsageError, match=message):
        generator(data, own, PromptConfig(families="rating"))
    assert message in generator(data, own, PromptConfig(candidates=5)).left_out["rating"]


def test_half_stars_are_written_as_such(own: Templates) -> None:
    data = shop([[1, 2, 3]], ratings=[4.5, 3, 2])
    config = PromptConfig(families="rating", per_user=only(rating=3))
    found = {p.template: p.target for p in generator(data, own, config).train(seed=0)}
    assert found["1-1"] == "4.5"


def test_texts_are_asked_about_where_they_say_something(own: Templates) -> None:
    reviews = {
        "review": ["Boils\nfast. <pad>", "", "\u200b", "Leaks.", "Fine."],
        "headline": ["Quick", "Bad", "Hm", "Wet", "Ok"],
        "explanation": ["The lid is tight.", "", "Too small.", "No.", "Yes."],
        "feature": ["lid", "size", "", "spout", "all"],
    }
    data = shop([[1, 2, 3, 4, 5]], reviews=reviews)
    config = PromptConfig(families="review, explanation", per_user=only(review=2, explanation=2))
    found = {p[:3] for p in generator(data, own, config).train(seed=0)}
    assert found == {
        ("Title of: Boils fast. ‹pad›", "Quick", "review"),
        ("item_1, lid: why?", "The lid is tight.", "explanation"),
    }


def test_a_family_that_the_data_cannot_feed_is_left_out_or_refused_where_it_is_named(
    own: Templates,
) -> None:
    data = shop([[1, 2, 3, 4, 5]])
    made = generator(data, own, PromptConfig(candidates=5))
    assert {kind.family for kind in made.kinds} == {"sequential", "direct"}
    assert set(made.left_out) == {"rating", "explanation", "review"}
    for family, way_out in (
        ("rating", "data.rating_column"),
        ("explanation", "data.explanation_column"),
        ("review", "data.review_column"),
    ):
        with pytest.raises(UsageError, match=f"{family} needs .*{way_out}.* leave the family out"):
            generator(data, own, PromptConfig(families=f"direct,{family}"))


def test_nothing_at_all_to_ask_is_said_at_once(own: Templates) -> None:
    data = shop([[1, 2, 3, 4, 5]])
    with pytest.raises(UsageError, match="no prompts of the direct family are wanted"):
        generator(data, own, PromptConfig(per_user=NONE))
    with pytest.raises(UsageError, match="zero_shot has no template that is not held out"):
        generator(data, own, PromptConfig(families="zero_shot"))
    made = generator(data, own, PromptConfig(candidates=5))
    with pytest.raises(UsageError, match="rating needs ratings"):
        next(made.questions(of(own, "1-1"), "valid"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": "ratings"}, r"prompts.families has 'ratings': did you mean rating\?"),
        ({"families": " , "}, "names none; use auto or some of rating"),
        ({"candidates": 1}, "prompts.candidates=1: use 2 or more"),
        ({"history_items": 0}, "prompts.history_items=0: use 1 or more"),
        ({"seed": -1}, "prompts.seed=-1: use 0 or more"),
        ({"per_user": PerUser(judge=-1)}, "prompts.per_user.judge=-1: use 0"),
    ],
)
def test_options_that_make_no_prompts_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PromptConfig(**options)  # type: ignore[arg-type]


def test_more_candidates_than_items_are_refused(own: Templates) -> None:
    data = shop([[1, 2, 3, 4, 5]], items=30)
    with pytest.raises(UsageError, match=r"prompts.candidates=31, but there are 30 items"):
        generator(data, own, PromptConfig(candidates=31))


def test_more_candidates_than_items_are_refused_where_only_questions_name_them(
    own: Templates,
) -> None:
    data = shop([[1, 2, 3, 4, 5]], items=30)
    config = PromptConfig(families="sequential", candidates=31, per_user=only(next=1))
    made = generator(data, own, config)
    message = "prompts.candidates=31, but there are 30 items"
    assert message in made.cannot_ask(of(own, "5-2"), "test")
    with pytest.raises(UsageError, match=message):
        next(made.questions(of(own, "2-2"), "valid"))
    with pytest.raises(UsageError, match=message):
        made.text_of(of(own, "5-2"), 0, 1, 1)
    assert not made.cannot_ask(of(own, "2-1"), "test")


def wrong_items(made: PromptGenerator, user: int, epochs: int) -> set[int]:
    """What a user's training prompts call wrong, in so many epochs."""
    own_items = set(made.dataset.interactions.history(user).tolist())
    named: set[int] = set()
    for epoch in range(1, epochs + 1):
        for prompt in made.train(seed=0, epoch=epoch):
            if prompt.user == user:
                named |= {prompt.item, *items_in(prompt.input)}
    return named - own_items


def test_half_of_the_items_are_never_called_wrong_and_which_is_the_user_s_own(
    own: Templates,
) -> None:
    data = shop([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], items=205)
    config = PromptConfig(candidates=20, families="sequential,direct")
    made = generator(data, own, config)
    first, second = (wrong_items(made, user, epochs=12) for user in (0, 1))
    assert first == wrong_items(made, 0, epochs=24)  # all of the shelf was named by then
    # 200 items, each with probability a half: 100 +- 4 x 7.1, and 50 +- 4 x 6.1 on both shelves.
    assert 72 <= len(first) <= 128 and 72 <= len(second) <= 128
    assert 25 <= len(first & second) <= 75
    other = generator(data, own, PromptConfig(candidates=20, families="direct", seed=1))
    assert 25 <= len(first & wrong_items(other, 0, epochs=12)) <= 75
    assert made.crowded == 0


def test_more_than_half_is_called_wrong_where_so_many_candidates_are_wanted(
    own: Templates,
) -> None:
    data = shop([[1, 2, 3, 4, 5], [1, 2, 3]], items=30)
    made = generator(data, own, PromptConfig(candidates=20, families="direct"))
    assert len(wrong_items(made, 0, epochs=9)) == 19  # of 25: as many as a prompt names, no more
    assert made.crowded == 2  # 25 and 27 items never met, and half of them should be 19
    assert generator(data, own, PromptConfig(candidates=13, families="direct")).crowded == 0
    judged = PromptConfig(candidates=20, families="direct", per_user=only(direct_judge=5))
    assert generator(data, own, judged).crowded == 0


def test_questions_are_the_same_again_and_share_candidates_and_verdicts(own: Templates) -> None:
    data = shop([[user + 1, user + 2, user + 3, user + 4] for user in range(25)])
    made = generator(data, own, PromptConfig(candidates=8))
    again = generator(data, own, PromptConfig(candidates=8))
    other = generator(data, own, PromptConfig(candidates=8, seed=1))
    chosen = list(made.questions(of(own, "2-2"), "test"))
    assert chosen == list(again.questions(of(own, "2-2"), "test"))
    assert chosen != list(other.questions(of(own, "2-2"), "test"))
    assert [p.user for p in chosen] == list(range(25))
    shown = [items_in(p.input)[-8:] for p in chosen]
    assert shown == [items_in(p.input) for p in made.questions(of(own, "5-2"), "test")]
    judged = [p.target for p in made.questions(of(own, "2-3"), "test")]
    assert judged == [p.target for p in made.questions(of(own, "5-1"), "test")]
    assert 4 < Counter(judged)["yes"] < 21


def test_only_candidates_of_the_split_are_offered(own: Templates) -> None:
    # 10 items before the cuts; 11..14 come up after the validation cut, the last two at the test.
    sequences = [[1, 2, 3, 4, 11, 5], [6, 7, 8, 9, 12, 1], [10, 1, 2, 3, 4, 13]]
    times = [[1, 2, 3, 4, 50, 90], [1, 2, 3, 4, 50, 91], [1, 2, 3, 4, 80, 92]]
    data = shop(sequences, items=14, timestamps=[t for row in times for t in row])
    cut = split(data, SplitConfig("temporal", valid_share=0.17, test_share=0.17))
    made = generator(data, own, PromptConfig(candidates=6), cut)
    allowed = set(np.flatnonzero(cut.test_candidates).tolist())
    assert 14 not in allowed and 11 in allowed
    for prompt in made.questions(of(own, "5-2"), "test"):
        assert set(items_in(prompt.input)) <= allowed
    early = set(np.flatnonzero(cut.valid_candidates).tolist())
    for prompt in made.train(seed=0):
        assert set(items_in(prompt.input)) <= early


def test_text_of_tells_the_part_and_refuses_what_is_not_there(own: Templates) -> None:
    data = shop([[3, 1, 2, 8, 9]])
    made = generator(data, own, PromptConfig(candidates=5))
    next_item = of(own, "2-1")
    parts = [made.text_of(next_item, 0, row, row).split for row in (1, 2, 3, 4)]
    assert parts == ["train", "train", "valid", "test"]
    with pytest.raises(UsageError, match="this interaction lacks what sequential asks about"):
        made.text_of(next_item, 0, 0, 0)


def test_training_may_end_later_than_the_split_says(own: Templates) -> None:
    data = shop([[3, 1, 2, 8, 9]])
    cut = split(data, SplitConfig())
    config = PromptConfig(families="sequential", candidates=5, per_user=only(next=9))
    made = PromptGenerator(data, cut, numbered(30), own, config, cut.train_end + 1)
    assert {p.target for p in made.train(seed=0)} == {"item_1", "item_2", "item_8"}


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 900),
    blocked=st.lists(st.integers(1, 400), max_size=40),
    wanted=st.integers(1, 120),
    seed=st.integers(0, 99),
    salted=st.booleans(),
)
def test_drawn_items_are_distinct_allowed_and_as_many_as_there_are(
    size: int, blocked: list[int], wanted: int, seed: int, salted: bool
) -> None:
    candidates = np.arange(size + 1) % 7 != 0  # some are none, padding among them
    shelf = Shelf(candidates)
    met = np.array([item for item in blocked if item <= size], dtype=np.int32)
    salt = salt_of(seed, 0) if salted else None
    drawn = shelf.draw(np.random.default_rng(seed), met, 3, wanted, salt)
    free = set(np.flatnonzero(candidates).tolist()) - set(met.tolist())
    assert drawn.shape == (3, min(wanted, len(free)))
    for row in drawn.tolist():
        assert len(set(row)) == len(row)
        assert set(row) <= free


def test_a_user_s_half_is_the_same_ranked_as_a_whole_or_drawn_and_sifted() -> None:
    shelf, met = Shelf(np.arange(1001) > 0), np.array([1, 2, 3], dtype=np.int32)
    rng, salt = np.random.default_rng(0), salt_of(0, 17)
    sifted = set(shelf.draw(rng, met, 900, 20, salt).ravel().tolist())
    whole = set(shelf.draw(rng, met, 90, 400, salt).ravel().tolist())
    assert sifted == whole
    assert 437 <= len(whole) <= 560  # 997 / 2, four deviations


def test_halves_hold_every_item_and_every_pair_of_items_alike() -> None:
    everything, none = Shelf(np.arange(41) > 0), np.array([], dtype=np.int32)
    rng, on = np.random.default_rng(0), np.zeros((4000, 41), dtype=np.int64)
    for user in range(4000):
        on[user, everything.draw(rng, none, 1, 8, salt_of(3, user))[0]] = 1
    single, pairs = on[:, 1:].sum(axis=0), (on.T @ on)[1:, 1:][np.triu_indices(40, 1)]
    # Eight of some twenty: a fifth of 4000 each, and two together 8 x 7 / (40 x 39).
    assert np.abs(single - 800).max() < 4.5 * np.sqrt(4000 * 0.2 * 0.8)
    both = 4000 * 56 / 1560
    assert np.abs(pairs - both).max() < 5 * np.sqrt(both)


@pytest.mark.parametrize("items", [40, 1000])  # ranked as a whole; drawn and sifted
def test_every_item_is_drawn_alike(items: int) -> None:
    shelf = Shelf(np.arange(items + 1) > 0)
    rng, met = np.random.default_rng(0), np.array([1, 2, 3], dtype=np.int32)
    drawn = np.concatenate([shelf.draw(rng, met, 10, 10).ravel() for _ in range(400)])
    counts = np.bincount(drawn, minlength=items + 1)[4:]
    expected = 40_000 / (items - 3)
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < len(counts) + 4 * np.sqrt(2 * len(counts))  # four deviations above its mean


@pytest.fixture(scope="module")
def told() -> PromptGenerator:
    """Simulated visitors who rate and review, and the shipped templates of all six families."""
    config = DataConfig(
        source="simulated", simulated=SimulatedConfig(users=300, items=400, reviews=True)
    )
    data = load_dataset(config)
    families = "rating,sequential,explanation,review,direct,zero_shot"
    shipped = load_family_templates("")
    return generator(data, shipped, PromptConfig(families=families, mention="both"))


def test_no_family_names_a_held_out_item_in_any_role(told: PromptGenerator) -> None:
    interactions, families = told.dataset.interactions, Counter()
    titles = ["", *told.dataset.catalog.texts]
    for prompt in told.train(seed=0):
        end = int(told.train_end[prompt.user])
        start, stop = interactions.offsets[prompt.user : prompt.user + 2]
        trained = set(interactions.items[start:end].tolist())
        held = set(interactions.items[end:stop].tolist()) - trained
        text = f"{prompt.input} {prompt.target}"
        assert prompt.item not in held
        assert not held & set(items_in(text))
        assert not any(titles[item] in text for item in held if titles[item])
        families[prompt.family] += 1
    assert set(families) == {"rating", "sequential", "explanation", "review", "direct", "zero_shot"}


def test_every_shipped_template_is_asked_of_train_or_of_test_alone(told: PromptGenerator) -> None:
    shipped = load_family_templates("")
    trained = {prompt.template for prompt in told.train(seed=0)}
    assert trained == {template.id for template in shipped if not template.held_out}
    for template in shipped:
        first = next(told.questions(template, "test"))
        assert isinstance(first, Example) and first.input and first.target


def test_the_memory_of_a_stream_does_not_grow_with_its_length(own: Templates) -> None:
    config = PromptConfig(families="sequential", candidates=20, per_user=only(choose=2))

    def peak(users: int) -> int:
        made = generator(shop([[1, 2, 3, 4, 5, 6]] * users), own, config)
        tracemalloc.start()
        try:
            assert sum(1 for _ in made.train(seed=0)) == 2 * users
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # compiles the templates
    assert peak(1280) < 1.3 * peak(256)


def test_the_candidates_of_a_question_are_those_that_it_names(own: Templates) -> None:
    data = shop([[user + 1, user + 2, user + 3, user + 4] for user in range(25)])
    made = generator(data, own, PromptConfig(candidates=8))
    for part in ("valid", "test"):
        for prompt in made.questions(of(own, "5-2"), part):  # type: ignore[arg-type]
            named = made.candidates(of(own, "5-2"), prompt).tolist()
            assert named[0] == prompt.item
            assert sorted(named) == sorted(items_in(prompt.input))


def test_no_rival_of_a_test_question_was_called_wrong_to_the_user_in_training(
    own: Templates,
) -> None:
    data = shop([[n % 60 + 1 for n in range(u, u + 6)] for u in range(40)], items=60)
    made = generator(data, own, PromptConfig(families="direct", candidates=8))
    wrong: dict[int, set[str]] = {user: set() for user in range(40)}
    for epoch in range(1, 30):
        for example in made.train(0, epoch):
            if example.template == "5-2":
                shown = example.input.partition(" takes of ")[2].split(" , ")
                wrong[example.user] |= {name for name in shown if name != example.target}
    assert all(wrong.values())
    for question in made.questions(of(own, "5-2"), "test"):
        rivals = set(question.input.partition(" takes of ")[2].split(" , ")) - {question.target}
        assert len(rivals) == 7 and not rivals & wrong[question.user]
