"""Template families: what is shipped, word by word, how it is rendered, and what is refused."""

import itertools
import pickle
import re
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import SandboxedEnvironment
from rapidfuzz.fuzz import ratio

from llmrec.errors import UsageError
from llmrec.prompting.families import FAMILIES, INPUTS, P5Template, load_family_templates

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "p5"
SHIPPED = load_family_templates("")
EACH = pytest.mark.parametrize("template", SHIPPED, ids=lambda template: template.id)
VALUES = {
    "user": "user_17",
    "history": "item_12, item_7, item_123",
    "item": "item_45",
    "title": "Blue Tent, 2 Persons",
    "candidates": "item_8 , item_45 , item_9",
    "stars": "4",
    "feature": "zip",
    "review": "Kept us dry for a week. The zip is stiff.",
    "headline": "Dry, but fiddly",
    "explanation": "The zip is stiff.",
}


def body(template: P5Template) -> str:
    return template.source.partition("\n")[2]


# What is shipped


@EACH
def test_a_shipped_template_renders_as_its_golden(template: P5Template) -> None:
    golden = GOLDENS / template.family / f"{template.id}.txt"
    assert golden.is_file(), f"add {golden} with the text of {template.id}"
    note = f"version {template.version}, sha256 {template.sha256[:16]}"
    assert golden.read_text(encoding="utf-8") == f"{note}\n{template.render(VALUES)}\n"


def test_every_golden_has_its_template() -> None:
    found = {path.relative_to(GOLDENS).as_posix() for path in GOLDENS.rglob("*") if path.is_file()}
    assert found == {f"{template.family}/{template.id}.txt" for template in SHIPPED}


def test_the_families_hold_as_many_templates_as_p5_and_one_of_each_is_held_out() -> None:
    ids = [f"1-{i}" for i in range(1, 11)]
    ids += [f"2-{i}" for i in range(1, 14)]
    ids += [f"3-{i}" for i in range(1, 13)]
    ids += [f"4-{i}" for i in range(1, 5)]
    ids += [f"5-{i}" for i in range(1, 9)]
    ids += [f"Z-{i}" for i in range(1, 8)]
    assert [template.id for template in SHIPPED] == ids  # 10 + 13 + 12 + 4 + 8 + 7 = 54
    families = "rating sequential explanation review direct zero_shot".split()
    assert list(dict.fromkeys(template.family for template in SHIPPED)) == families
    held_out = [template.id for template in SHIPPED if template.held_out]
    assert held_out == ["1-10", "2-13", "3-12", "4-4", "5-8", "Z-7"]


def test_the_groups_are_those_that_results_of_p5_are_compared_by() -> None:
    ids: dict[tuple[str, str], list[str]] = {}
    for template in SHIPPED:
        ids.setdefault((template.family, template.group), []).append(template.id)
    assert ids == {
        ("rating", "stars"): ["1-1", "1-2", "1-3", "1-10"],
        ("rating", "judge"): ["1-4", "1-5", "1-6", "1-7", "1-8", "1-9"],
        ("sequential", "next"): ["2-1", "2-2", "2-3", "2-4", "2-5", "2-6", "2-13"],
        ("sequential", "choose"): ["2-7", "2-8", "2-9", "2-10"],
        ("sequential", "judge"): ["2-11", "2-12"],
        ("explanation", "text"): [f"3-{i}" for i in range(1, 13)],
        ("review", "text"): ["4-1", "4-3", "4-4"],
        ("review", "stars"): ["4-2"],
        ("direct", "judge"): ["5-1", "5-2", "5-3", "5-4"],
        ("direct", "choose"): ["5-5", "5-6", "5-7", "5-8"],
        ("zero_shot", "stars"): ["Z-1", "Z-7"],
        ("zero_shot", "judge"): ["Z-2", "Z-3", "Z-4"],
        ("zero_shot", "text"): ["Z-5", "Z-6"],
    }


def test_every_kind_of_question_can_be_asked_without_titles() -> None:
    """ML-100K has titles, but a table of interactions need not."""
    asked = {(t.family, t.target) for t in SHIPPED if t.family != "zero_shot"}
    plain = {(t.family, t.target) for t in SHIPPED if not t.held_out and "title" not in t.inputs}
    assert plain == asked


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_templates_of_a_family_are_alike(family: str, figure) -> None:
    bodies = {
        template.id: " ".join(re.sub(r"\{\{.*?\}\}", "_", body(template)).split())
        for template in SHIPPED
        if template.family == family
    }
    likeness, *pair = max(
        (ratio(bodies[a], bodies[b]) / 100, a, b) for a, b in itertools.combinations(bodies, 2)
    )
    figure(f"largest similarity, {family}", f"{likeness:.2f} ({pair[0]} and {pair[1]})")
    assert likeness <= 0.8


@EACH
def test_a_shipped_body_names_each_input_once_and_glues_it_to_no_word(template) -> None:
    text = body(template)
    assert sorted(re.findall(r"\{\{ (\w+) \}\}", text)) == sorted(template.inputs)
    assert not re.search(r"\w\{\{|\}\}\w|\{%", text)


@EACH
def test_words_that_users_wrote_stand_between_quotes_and_identifiers_do_not(template) -> None:
    quoted = set(re.findall(r'"\{\{ (\w+) \}\}"', body(template)))
    assert quoted == set(template.inputs) & {"title", "feature", "review", "headline"}


@EACH
def test_a_shipped_body_says_what_form_of_answer_is_wanted(template: P5Template) -> None:
    forms = {
        "yes_no": r"\byes\b.*\bno\b",
        "like_dislike": r"\blike\b.*\bdislike\b",
        "stars": r"\b(number|figure|score|mark)\b",
        "explanation": r"\bsentence\b",
        "headline": r"\b(headline|title|line)\b",
        "item": r"\b(identifier|item|entry|option|name|thing|step)\b",
    }
    assert re.search(forms[template.target], body(template), re.DOTALL | re.IGNORECASE)


# Rendering


@EACH
def test_a_render_is_what_jinja_gives_on_one_line(template: P5Template) -> None:
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined)
    expected = environment.from_string(template.source).render(VALUES)
    assert template.render(VALUES) == " ".join(expected.split())


def write(folder: Path, text: str, name: str = "sequential/9-1") -> str:
    path = folder / f"{name}.jinja"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(folder)


def header(name: str = "9-1", inputs: str = "history", target: str = "item", part="seen") -> str:
    return f"{{# id: {name} | version: 3 | inputs: {inputs} | target: {target} | part: {part} #}}\n"


def test_your_own_folder_is_read_instead_of_the_shipped_one(tmp_path: Path) -> None:
    write(tmp_path, header(part="held_out") + "Seen:\n\n  {{ history }}\t!\n")
    (tmp_path / "notes.txt").write_text("not a template")
    (only,) = load_family_templates(str(tmp_path))
    assert (only.id, only.family, only.version) == ("9-1", "sequential", 3)
    assert (only.inputs, only.target, only.held_out) == (("history",), "item", True)
    assert only.render({"history": "item_1,\n item_2"}) == "Seen: item_1, item_2 !"


def test_your_own_template_may_use_jinja_on_strings(tmp_path: Path) -> None:
    write(
        tmp_path,
        header(inputs="user, history") + "{% set items = history.split(', ') %}{{ user | upper }}: "
        "{% for item in items %}[{{ item }}]{% endfor %}{% if user == 'u1' %} first{% endif %}",
    )
    (only,) = load_family_templates(str(tmp_path))
    assert only.render({"user": "u1", "history": "a, b"}) == "U1: [a][b] first"
    assert only.render({"user": "u2", "history": "c"}) == "U2: [c]"


def test_braces_and_percent_signs_are_words_like_others(tmp_path: Path) -> None:
    write(tmp_path, header() + "{x} {{ '{{' }} 100 % %s {{ history }}", "sequential/9-1")
    write(tmp_path, header("9-2") + "{x} 100 % %s {0} {{ history }}", "sequential/9-2")
    spelled, plain = load_family_templates(str(tmp_path))
    values = {"history": "{user} {{ 7 * 7 }} %d {% raw %}", "user": "u"}
    assert spelled.render(values) == "{x} {{ 100 % %s {user} {{ 7 * 7 }} %d {% raw %}"
    assert plain.render(values) == "{x} 100 % %s {0} {user} {{ 7 * 7 }} %d {% raw %}"


def test_ids_are_ordered_by_family_and_then_by_number(tmp_path: Path) -> None:
    for name in ("9-10", "9-2", "a", "b-1"):
        write(tmp_path, header(name) + "{{ history }}", f"sequential/{name}")
    write(tmp_path, header("99", "user, item", "stars") + "{{ user }} {{ item }}", "rating/99")
    ids = [template.id for template in load_family_templates(str(tmp_path))]
    assert ids == ["99", "9-2", "9-10", "a", "b-1"]


def test_a_template_goes_to_another_process_whole() -> None:
    template = SHIPPED[0]
    copy = pickle.loads(pickle.dumps(template))
    assert copy == template
    assert copy.render(VALUES) == template.render(VALUES)


def test_an_input_that_nobody_gives_is_an_error_that_names_it() -> None:
    plain = next(template for template in SHIPPED if template.id == "2-3")
    with pytest.raises(UsageError, match=r"prompts\.templates: template 2-3 .* not given history"):
        plain.render({"user": "user_1", "item": "item_1"})


def test_a_template_that_fails_on_some_values_only_is_an_error_then(tmp_path: Path) -> None:
    write(tmp_path, header() + "{{ 12 // (history | length) }}")
    (only,) = load_family_templates(str(tmp_path))
    assert only.render({"history": "abc"}) == "4"
    with pytest.raises(UsageError, match=r"prompts\.templates: template 9-1 fails: .*zero"):
        only.render({"history": ""})


def test_a_template_that_writes_nothing_for_some_values_is_an_error_then(tmp_path: Path) -> None:
    write(tmp_path, header() + "{% if history != 'a' %}Go on: {{ history }}{% endif %}")
    (only,) = load_family_templates(str(tmp_path))
    with pytest.raises(UsageError, match="template 9-1 writes nothing"):
        only.render({"history": "a"})


# What is refused


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{{ history }}", "first line of .* must be a header with id, version, inputs, target"),
        ("{# id: 9-1 | version: 1 | inputs: history #}\n{{ history }}", "must be a header"),
        (header().replace("part:", "part: seen | part:") + "{{ history }}", "must be a header"),
        (header("9-2") + "{{ history }}", "has id '9-2'; an id and the file's name must be equal"),
        (header().replace("3", "new") + "{{ history }}", "has version 'new'"),
        (header(target="itm") + "{{ history }}", "has target 'itm'; did you mean item"),
        (header(part="train") + "{{ history }}", "has part 'train'; use seen or held_out"),
        (header(inputs="histry") + "{{ histry }}", "reads 'histry'; did you mean history"),
        (header(inputs="history, user") + "{{ history }}", "make them equal"),
        (header() + "{{ history }} {{ user }}", "make them equal"),
        (header() + "a\nb {% if history %}", "line 3 is not valid Jinja"),
        (header() + "a\n{{ history | backwards }}", "line 3 is not valid Jinja .*backwards"),
        (header() + "{{ history | random }}", "line 2 is not valid Jinja .*random"),
        (header() + "{{ history * 10**15 }}", "template 9-1 fails: no memory"),
        (header() + "{% for x in history %}{{ x }}{% endfor %}", "line 2 loops over history"),
        (header() + "{% if history == '' %}Go on.{% endif %}", "template 9-1 writes nothing"),
        (header() + "{{ history.__class__.__mro__ }}", "template 9-1 fails: .*unsafe"),
        (header() + "{{ history }}{% include 'x' %}", "template 9-1 fails: no loader"),
        (header() + "{{ history.genre }}", "template 9-1 fails: .*no attribute 'genre'"),
    ],
)
def test_a_broken_file_is_refused_by_the_option_that_named_its_folder(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        load_family_templates(write(tmp_path, text))
    assert str(caught.value).startswith("prompts.templates: ")


@pytest.mark.parametrize(
    ("family", "target", "inputs", "sentence"),
    [
        ("sequential", "stars", "history", "sequential asks for item, yes_no"),
        ("rating", "item", "user", "rating asks for stars, yes_no, like_dislike"),
        ("sequential", "item", "history, item", "reads item, which holds its answer"),
        ("direct", "item", "candidates, title", "reads title, which holds its answer"),
        ("rating", "stars", "item, stars", "reads stars, which holds its answer"),
        ("zero_shot", "like_dislike", "title, stars", "reads stars, which holds its answer"),
        ("explanation", "explanation", "item, review", "reads review, which holds its answer"),
        ("review", "headline", "review, headline", "reads headline, which holds its answer"),
        ("sequential", "yes_no", "history, item, stars", "sequential question for yes_no does not"),
        ("direct", "yes_no", "user, item, review", "reads review, which a direct question"),
        ("zero_shot", "stars", "title, item", "reads item, which a zero_shot question"),
        ("rating", "stars", "item, candidates", "reads candidates, which a rating question"),
        ("sequential", "item", "user", "reads no history"),
        ("sequential", "yes_no", "history", "reads no item or title"),
        ("direct", "item", "user", "reads no candidates"),
        ("direct", "yes_no", "user", "reads no item or title"),
        ("rating", "yes_no", "user, item", "reads no stars"),
        ("zero_shot", "yes_no", "title", "reads no stars"),
        ("zero_shot", "stars", "user", "reads no title"),
        ("review", "stars", "user, item", "reads no review"),
        ("explanation", "explanation", "user", "reads no item or title"),
    ],
)
def test_a_question_that_gives_its_answer_away_or_asks_about_nothing_is_refused(
    tmp_path: Path, family: str, target: str, inputs: str, sentence: str
) -> None:
    text = " ".join(f"{{{{ {name} }}}}" for name in inputs.split(", "))
    folder = write(tmp_path, header("1", inputs, target) + text, f"{family}/1")
    with pytest.raises(UsageError, match=sentence):
        load_family_templates(folder)


def test_an_id_may_stand_in_one_family_only(tmp_path: Path) -> None:
    write(tmp_path, header("1") + "{{ history }}", "sequential/1")
    write(tmp_path, header("1", "candidates") + "{{ candidates }}", "direct/1")
    with pytest.raises(UsageError, match="1 stands both in direct and in sequential"):
        load_family_templates(str(tmp_path))


@pytest.mark.parametrize("name", ["9-1", "sequentail/9-1", "sequential/more/9-1"])
def test_a_file_outside_the_family_folders_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"9-1\.jinja must lie right in the folder of a family"):
        load_family_templates(write(tmp_path, header() + "{{ history }}", name))


def test_an_empty_folder_and_an_absent_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"prompts\.templates=.* holds no template"):
        load_family_templates(str(tmp_path))
    with pytest.raises(UsageError, match=r"prompts\.templates=no/where is not a folder"):
        load_family_templates("no/where")


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "")
    (tmp_path / "sequential" / "9-1.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"prompts\.templates: .* is not UTF-8"):
        load_family_templates(folder)


def test_the_values_of_these_tests_are_all_the_inputs_there_are() -> None:
    assert set(VALUES) == set(INPUTS)
