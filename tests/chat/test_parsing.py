"""What answers say, told from texts that models write."""

import json
import math
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.chat.injection import payloads
from llmrec.chat.parsing import (
    TitleMatcher,
    obeys,
    parse_list,
    parse_pick,
    parse_rating,
    parse_yes_no,
    pick_scores,
)
from llmrec.chat.requests import Choice, Pattern, Schema
from llmrec.data.titles import displayed, matching_key

TITLES = (
    "Blue Tent",
    "Red Kettle",
    "Fly Rod",
    "Matrix, The (1999)",
    "Lantern, Volume 3: Batteries",
)
SEEN = ("Camp Stove", "Sleeping Bag", "Lantern, Volume 2: Batteries")
MATCHER = TitleMatcher(TITLES, SEEN)
LETTERS = tuple("ABCDE")


@pytest.mark.parametrize(
    ("text", "place", "kind"),
    [
        ("Blue Tent", 0, "exact"),
        ("  Blue Tent\n", 0, "exact"),
        ("blue  TENT!", 0, "normalised"),
        ("“Blue Tent”", 0, "normalised"),
        ("The Matrix (1999)", 3, "fuzzy"),  # the same words in another order
        ("Lantern Volume 3 Bateries", 4, "fuzzy"),
        ("Lantern, Volume", None, "invented"),  # begins a candidate and a seen title
        ("Lantern, Volume 3", 4, "fuzzy"),
        ("Lantern Volume 2 Bateries", None, "seen"),
        ("Lantern Volume 4 Bateries", None, "invented"),  # one digit off is another volume
        ("Camp Stove", None, "seen"),
        ("camp stove.", None, "seen"),
        ("Wooden Spoon", None, "invented"),
        ("Blue", None, "invented"),  # too short to be a shortened title
        ("", None, "invented"),
    ],
)
def test_a_text_means_a_candidate_by_the_closest_way(text, place, kind) -> None:
    assert MATCHER.match(text) == (place, kind)


def test_a_misspelt_title_must_be_clearly_closer_to_one() -> None:
    matcher = TitleMatcher(["Grandfather Clocks", "Grandfather Clocky"], [])
    assert matcher.match("Grandfather Clocke") == (None, "invented")  # both at 17 of 18 letters
    assert TitleMatcher(["Grandfather Clocks"], []).match("Grandfather Clocke") == (0, "fuzzy")


def test_sequels_by_roman_number_are_not_misspellings_of_each_other() -> None:
    matcher = TitleMatcher(["Rocky Mountain Adventures II"], [])
    assert matcher.match("Rocky Mountain Adventures III") == (None, "invented")


def test_titles_that_differ_in_case_only_are_told_apart_by_it_alone() -> None:
    matcher = TitleMatcher(["Blue Tent", "BLUE TENT"], [])
    assert matcher.match("BLUE TENT") == (1, "exact")
    assert matcher.match("blue tent") == (None, "invented")


def test_a_candidate_that_is_in_the_history_too_is_a_candidate() -> None:
    matcher = TitleMatcher(["Blue Tent"], ["Blue Tent"])
    assert matcher.match("Blue Tent") == (0, "exact")
    assert matcher.match("blue tent") == (0, "normalised")


def test_a_clipped_title_is_known_by_its_full_text() -> None:
    full = "A very long title about tents " * 10
    assert TitleMatcher([displayed(full)], []).match(full) == (0, "normalised")


@pytest.mark.parametrize(
    "text",
    [
        '["Fly Rod", "Blue Tent"]',
        '```json\n["Fly Rod", "Blue Tent"]\n```',
        'Here is my list [sorted]:\n["Fly Rod", "Blue Tent"]\nEnjoy!',
        '["Fly Rod", "Blue Tent",]',
        '["Fly Rod" "Blue Tent"]',
        '["Fly Rod", "Blue Tent", "Red Ket',  # cut: what is not closed is no title
        "['Fly Rod', 'Blue Tent']",
        '{"titles": ["Fly Rod", "Blue Tent"]}',
        '[{"title": "Fly Rod", "score": 1}, {"rank": 2, "title": "Blue Tent"}]',
        '["Red Kettle"]\nNo, better:\n["Fly Rod", "Blue Tent"]',
        '<think>["Red Kettle", "Blue Tent", "Fly Rod"]?</think>["Fly Rod", "Blue Tent"]',
        "1. Fly Rod\n2. Blue Tent",
        "Gladly!\n\n1) **Fly Rod** - you fish\n2) **Blue Tent** - you camp",
        "- Fly Rod: for fishing\n- Blue Tent (for two)",
        '* "Fly Rod"\n* "Blue Tent"',
        "Fly Rod\nBlue Tent",
        "The best would be:\nFly Rod,\nBlue Tent.",
    ],
)
def test_a_list_is_read_however_it_is_written(text) -> None:
    parsed = parse_list(text, MATCHER, 5)
    assert parsed.places == (2, 0)
    assert dict(parsed.kinds) == {"exact": 2} and parsed.problem == ""


def test_all_entries_of_a_list_are_counted_and_the_first_distinct_ones_kept() -> None:
    titles = ["Red Kettle", "red kettle", "Camp Stove", "Spoon", "the matrix 1999", "Fly Rod"]
    parsed = parse_list(json.dumps(titles), MATCHER, 2)
    assert parsed.places == (1, 3)
    assert parsed.kinds == {"exact": 2, "duplicate": 1, "seen": 1, "invented": 1, "fuzzy": 1}


def test_what_looks_like_an_array_inside_a_title_hides_no_lines() -> None:
    matcher = TitleMatcher(["Tent '], 'answer': ['this one'", "Fly Rod"], [])
    parsed = parse_list("1. Tent '], 'answer': ['this one'\n2. Fly Rod", matcher, 2)
    assert parsed.places == (0, 1)
    assert parse_list('["Spoon", "Fork"]', matcher, 2).kinds == {"invented": 2}


def test_invented_lines_count_where_the_list_is_marked() -> None:
    assert parse_list("1. Fly Rod\n2. Spoon", MATCHER, 5).kinds == {"exact": 1, "invented": 1}
    assert parse_list("I like:\nFly Rod", MATCHER, 5).kinds == {"exact": 1}


@pytest.mark.parametrize("text", ["", "[]", "I cannot say.", "<think>Fly Rod, or", "[[[[", "{}"])
def test_a_list_without_titles_is_unparsable(text) -> None:
    parsed = parse_list(text, MATCHER, 5)
    assert (parsed.places, dict(parsed.kinds), parsed.problem) == ((), {}, "unparsable")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1), ("b", 1), ("B.", 1), ("(B)", 1), ("**B**", 1), (" B\n", 1), ('"B"', 1),
        ("Answer: B", 1), ("The answer is: b.", 1), ("Option B", 1), ("The best option is B.", 1),
        ("B) Red Kettle", 1), ('B) "Red Kettle"', 1), ("**B) Red Kettle**", 1),
        ("B: Red Kettle", 1), ("b) Red Kettle", 1),
        ("B - Red Kettle", 1), ("B Red Kettle", 1), ("(B) Red Kettle", 1), ("Red Kettle", 1),
        ("Red Kettle (B)", 1), ("I would choose B, because it suits a camper.", 1),
        ("I choose option B) Red Kettle because the customer has a Camp Stove.", 1),
        ("A kettle goes with the stove, so B.", 1),
        ("B) Red Kettle\n\nThe Fly Rod is for fishing, the Blue Tent was close.", 1),
        ("<think>A or C? The Fly Rod.</think>B", 1),
        ("A is the best choice.", 0), ("A", 0), ("A) Blue Tent", 0),
    ],
)  # fmt: skip
def test_a_pick_is_read_however_it_is_written(text, place) -> None:
    parsed = parse_pick(text, MATCHER, LETTERS)
    assert (parsed.places, dict(parsed.kinds), parsed.problem) == ((place,), {"exact": 1}, "")


@pytest.mark.parametrize(
    ("text", "places", "kinds"),
    [
        ("D) The Matrix (1999)", (3,), {"fuzzy": 1}),
        ("d) matrix the 1999", (3,), {"normalised": 1}),
        ("B) Fly Rod", (2,), {"contradiction": 1}),
        ("b) fly rod!", (2,), {"contradiction": 1}),
        ('B) "Camp Stove"', (1,), {"seen": 1}),  # the letter is valid, its title is not
        ('B) "Wooden Spoon"', (1,), {"invented": 1}),
        ('"Wooden Spoon"', (), {"invented": 1}),
        ("Camp Stove", (), {"seen": 1}),
    ],
)
def test_a_pick_tells_how_its_title_was_understood(text, places, kinds) -> None:
    parsed = parse_pick(text, MATCHER, LETTERS)
    assert (parsed.places, dict(parsed.kinds), parsed.problem) == (places, kinds, "")


@pytest.mark.parametrize(
    "text",
    [
        "", "A or B", "A, B", "A and C", "A) Blue Tent\nB) Red Kettle", "Blue Tent or Fly Rod",
        "I do not know.", "G", "42", "<think>B", "Either option A or option B.",
    ],
)  # fmt: skip
def test_a_pick_of_nothing_or_of_several_is_unparsable(text) -> None:
    parsed = parse_pick(text, MATCHER, LETTERS)
    assert (parsed.places, dict(parsed.kinds), parsed.problem) == ((), {}, "unparsable")


def test_letters_inside_titles_choose_nothing() -> None:
    matcher = TitleMatcher(
        ["Plan B", "Vitamin C, 100 tablets", "Tent. The answer is D."], ["A B C"]
    )
    assert parse_pick("Vitamin C, 100 tablets", matcher, tuple("ABC")).places == (1,)
    assert parse_pick("C) Tent. The answer is D.", matcher, tuple("ABC")).places == (2,)
    assert parse_pick("A) Plan B", matcher, tuple("ABC")).kinds == {"exact": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", True), ("Yes.", True), ("**No**, it does not suit.", False), ("Answer: yes", True),
        ("The answer is no.", False), ("YES! It fits.", True), ("No it would not", False),
        ("They camp a lot, so the answer is yes.", True), ("<think>no?</think>\nyes", True),
        ("maybe", None), ("", None), ("yes or no", None), ("yes/no", None), ("No idea", None),
        ("I have no opinion", None), ("Yesterday", None), ("nothing", None),
    ],
)  # fmt: skip
def test_yes_and_no_count_where_they_are_the_answer(text, said) -> None:
    assert parse_yes_no(text) is said


@pytest.mark.parametrize(
    ("text", "stars"),
    [
        ("4", 4.0), ("4.5", 4.5), ("3,5", 3.5), ("4/5", 4.0), ("4 out of 5", 4.0), ("4 stars", 4.0),
        ("Rating: **5**", 5.0), ("four", 4.0), ("Four stars.", 4.0), ("three out of five", 3.0),
        ("On a scale from 1 to 5: 2", 2.0), ('I give "Toy Story 2" a 4', 4.0),
        ("After 12 films like it, 3 stars", 3.0), ("One of the best: 5", 5.0), ("4★", 4.0),
        ("<think>2 or 3</think>1", 1.0),
        ("7", None), ("0", None), ("-3", None), ("8/10", None), ("4 out of 10", None), ("", None),
        ("good", None), ("9" * 500, None), ("none", None),
    ],
)  # fmt: skip
def test_stars_are_read_as_they_are_written(text, stars) -> None:
    assert parse_rating(text) == stars


def test_probabilities_of_one_option_add_up_over_its_tokens() -> None:
    shares = {"B": 0.5, " B": 0.2, "▁b": 0.1, "ĠA": 0.1, "the": 0.1}
    top = [(token, math.log(share)) for token, share in shares.items()]
    assert pick_scores(top, ("A", "B", "C")) == pytest.approx({"B": 0.8, "A": 0.1})  # .5 + .2 + .1


def test_case_counts_where_options_differ_in_nothing_else() -> None:
    top = [("a", math.log(0.5)), ("A", math.log(0.25))]
    assert pick_scores(top, ("a", "A")) == pytest.approx({"a": 0.5, "A": 0.25})
    assert pick_scores([("YES", 0.0)], ("yes", "no")) == {"yes": 1.0}


def test_log_probabilities_that_are_none_do_no_harm() -> None:
    assert pick_scores([("A", math.nan), ("B", 1e9), ("C", -math.inf)], "ABC") == {"B": 1.0, "C": 0}
    assert pick_scores([], ("A",)) == {}


LISTED = Schema(
    {"type": "array", "items": {"type": "string", "enum": ["x", "y"]}, "minItems": 1, "maxItems": 2}
)
STARS = Schema({"type": "integer", "minimum": 1, "maximum": 5})


@pytest.mark.parametrize(
    ("text", "constraint", "holds"),
    [
        ("A", Choice(("A", "B")), True), (" B\n", Choice(("A", "B")), True),
        ("a", Choice(("A", "B")), False), ("A)", Choice(("A", "B")), False),
        ("12", Pattern(r"\d+"), True), ("12x", Pattern(r"\d+"), False),
        ('["x"]', LISTED, True), ('["x", "y"]', LISTED, True), ("[]", LISTED, False),
        ('["x", "y", "x"]', LISTED, False), ('["z"]', LISTED, False), ('["x"', LISTED, False),
        ('{"x": 1}', LISTED, False), ('"x"', LISTED, False), ('Sure: ["x"]', LISTED, False),
        ("[" * 100_000, LISTED, False), ("4", STARS, True), ("6", STARS, False),
        ("true", STARS, False), ("4.0", STARS, False), ("1" * 5000, STARS, False),
    ],
)  # fmt: skip
def test_an_answer_obeys_what_it_was_held_to_or_not(text, constraint, holds) -> None:
    assert obeys(text, constraint) is holds


def test_a_schema_that_cannot_be_checked_is_an_error() -> None:
    with pytest.raises(ValueError, match="pattern"):
        obeys('"x"', Schema({"type": "string", "pattern": "x"}))


PIECES = st.sampled_from(
    [*TITLES, *SEEN, *(p.text for p in payloads()), *'[]{}",:\'\\`*()\n', "A) ", "B.", "1. ", "- ",
     "```json\n", '{"title": "', "Answer: ", "yes", "no", "4/5", " stars", "<think>", "</think>"]
)  # fmt: skip
ANSWERS = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=12).map("".join))


@settings(max_examples=1000, deadline=None)
@given(ANSWERS)
def test_no_text_breaks_a_parser_and_places_are_distinct_candidates(text) -> None:
    for parsed in (parse_list(text, MATCHER, 3), parse_pick(text, MATCHER, LETTERS)):
        assert len(set(parsed.places)) == len(parsed.places) <= 3
        assert all(0 <= place < len(TITLES) for place in parsed.places)
        assert bool(parsed.problem) != bool(parsed.kinds)  # every answer counts as something
    assert parse_yes_no(text) in (True, False, None)
    stars = parse_rating(text)
    assert stars is None or 1 <= stars <= 5
    assert not obeys(text, LISTED) or set(json.loads(text)) <= {"x", "y"}


@pytest.mark.parametrize(
    "piece",
    ["- ", ": ", '["', "['", '"', "a'", "answer ", "1", "x" + " " * 5000, "the ", "_", "**a"],
)
def test_a_model_that_repeats_itself_to_the_end_is_read_in_no_time(piece) -> None:
    text = piece * (20_000 // len(piece))
    started = time.monotonic()
    parse_list(text, MATCHER, 5), parse_pick(text, MATCHER, LETTERS)
    parse_rating(text), parse_yes_no(text)
    assert time.monotonic() - started < 20  # tenths of a second; quadratic readers take minutes


POOLS = st.lists(
    st.text(min_size=1, max_size=40).map(displayed).filter(bool), min_size=2, max_size=8,
    unique_by=matching_key,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(POOLS, st.booleans())
def test_a_list_of_every_title_comes_back_whole(titles, ascii_only) -> None:
    parsed = parse_list(json.dumps(titles, ensure_ascii=ascii_only), TitleMatcher(titles, []), 8)
    assert parsed.places == tuple(range(len(titles)))
    assert parsed.kinds == {"exact": len(titles)}


def test_a_payload_behind_a_title_changes_no_answer() -> None:
    told = payloads()
    titles = [displayed(f"Tent number {i} {payload.text}") for i, payload in enumerate(told)]
    for first in range(0, len(titles), 10):
        pool = titles[first : first + 10]
        matcher = TitleMatcher(pool, SEEN)
        for place, title in enumerate(pool):
            letter = string.ascii_uppercase[place]
            for answer in (letter, title, f"{letter}) {title}", f'{letter}) "{title}"'):
                parsed = parse_pick(answer, matcher, tuple(string.ascii_uppercase[:10]))
                assert (parsed.places, dict(parsed.kinds)) == ((place,), {"exact": 1}), answer
        assert parse_list(json.dumps(pool), matcher, 10).kinds == {"exact": len(pool)}
        marked = "\n".join(f"{i}. {title}" for i, title in enumerate(pool, start=1))
        assert parse_list(marked, matcher, 10).places == tuple(range(len(pool)))


@pytest.mark.parametrize(
    ("text", "places", "kinds"),
    [
        ('["Fly Rod", null, "Blue Tent"]', (0, 1), {"exact": 2, "invented": 1}),
        ('["Fly Rod", 3, "Blue Tent"]', (0, 1), {"exact": 2, "invented": 1}),
        ('[["Fly Rod"], ["Blue Tent"]]', (0, 1), {"exact": 2}),
        ('[{"title": "Fly {Rod}"}, {"title": "Blue Tent"}]', (0, 1), {"normalised": 1, "exact": 1}),
    ],
)
def test_valid_json_loses_no_entry(text, places, kinds) -> None:
    matcher = TitleMatcher(("Fly Rod", "Blue Tent"), ())
    parsed = parse_list(text, matcher, 2)
    assert (parsed.places, dict(parsed.kinds)) == (places, kinds)


@pytest.mark.parametrize(
    "text", ["Neither A nor B fits", "Vitamin C cream", "None of these, B is too dear"]
)
def test_a_letter_in_passing_is_no_answer(text) -> None:
    matcher = TitleMatcher(("Fly Rod", "Blue Tent", "Red Kettle"), ())
    assert parse_pick(text, matcher, "ABC").problem == "unparsable"


def test_a_line_s_number_is_no_part_of_its_title() -> None:
    matcher = TitleMatcher(("Jaws 2", "Heat", "Halo 3 - Xbox 360"), ("Halo - Xbox 360",))
    parsed = parse_list("1. Heat\n2. Jaws\n3. Halo - Xbox 360", matcher, 3)
    assert parsed.places == (1,)
    assert dict(parsed.kinds) == {"exact": 1, "invented": 1, "seen": 1}


@pytest.mark.parametrize(
    "text",
    [
        "**1. Fly Rod**\n**2. Blue Tent**",
        "(1) Fly Rod\n(2) Blue Tent",
        "1 - Fly Rod\n2 - Blue Tent",
        '{"1": "Fly Rod", "2": "Blue Tent"}',
        '{"titles": ["Fly Rod", "Blue Tent"]}',
    ],
)
def test_other_ways_to_write_a_list(text) -> None:
    assert parse_list(text, TitleMatcher(("Fly Rod", "Blue Tent"), ()), 2).places == (0, 1)


def test_a_letter_on_a_line_of_its_own_is_the_answer_whatever_follows() -> None:
    matcher = TitleMatcher(("Fly Rod", "Blue Tent", "Red Kettle"), ())
    assert parse_pick("C\n\nExplanation: A is older, B is red.", matcher, "ABC").places == (2,)


@pytest.mark.parametrize(
    ("text", "stars"),
    [
        ("I'd say 3 or 4", None),
        ("3 or 4", None),
        ("gave 5 to it, so I say 4", None),
        ("4. They liked 3 before.", 4.0),
        ("They gave 5 before, so 4 stars", 4.0),
    ],
)
def test_a_rating_among_several_numbers_must_be_told_apart(text, stars) -> None:
    assert parse_rating(text) == stars


def test_a_wrapped_array_obeys_the_schema_of_the_array() -> None:
    schema = {"type": "array", "items": {"type": "string", "enum": ["a"]}, "maxItems": 1}
    assert obeys('{"titles": ["a"]}', Schema(schema))
    assert not obeys('{"titles": ["b"]}', Schema(schema))
