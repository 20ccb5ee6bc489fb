"""Templates: golden renders of every shipped file, headers, absent fields."""

from pathlib import Path

import pytest

from llmrec.data.item_text import load_template, parse_template, render
from llmrec.errors import UsageError
from llmrec.resources import listing

GOLDENS = Path(__file__).parents[1] / "goldens" / "item_text"
NAMES = [Path(n).stem for n in listing("prompts") if n.startswith("item_text/")]
FIELDS = {
    "title": ["Toy  Story (1995)", "", "Tom & Jerry", " GoldenEye\n"],
    "genres": ["Animation|Children's", "Drama", "", "Action"],
    "movie_title": ["Toy Story", "", 'M*A*S*H "Pilot"', "GoldenEye"],
    "release_year": ["1995", "", "", "1995"],
    "class": ["Animation Children's Comedy", "", "War", ""],
}


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_template_renders_its_golden_text(name: str) -> None:
    texts = render(load_template(name), FIELDS, 4)
    golden = (GOLDENS / f"{name}.txt").read_text(encoding="utf-8")
    assert "".join(f"{text}\n" for text in texts) == golden


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_template_is_named_as_its_header_says(name: str) -> None:
    assert load_template(name).id == name


def test_an_item_whose_inputs_are_all_empty_has_empty_text() -> None:
    source = "{# id: x | version: 1 | inputs: title, year #}\nTitle: {{ title }}, year {{ year }}."
    fields = {"title": ["", "A"], "year": ["", ""]}
    assert render(parse_template(source, "x.jinja"), fields, 2) == ["", "Title: A, year ."]


def test_a_field_that_the_data_lacks_is_named_with_those_it_has() -> None:
    with pytest.raises(
        UsageError, match=r"data\.item_text=title .*'title'.*its fields: name, price"
    ):
        render(load_template("title"), {"name": ["a"], "price": ["1"]}, 1)


def test_the_hash_changes_with_any_character_of_the_file() -> None:
    header = "{# id: x | version: 1 | inputs: title #}\n"
    one, two = (parse_template(header + body, "x") for body in ("{{ title }}", "{{ title }}."))
    assert one.sha256 != two.sha256


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ title }}", "must be a header"),
        ("{# id: x | version: 1 #}\n{{ title }}", "must be a header"),
        ("{# id: x | version: one | inputs: title #}\n{{ title }}", "version 'one'"),
        ("{# id: x | version: 1 | inputs: title #}\n{{ name }}", "make them equal"),
        ("{# id: x | version: 1 | inputs: title #}\n{{ title", "line 2 is not valid Jinja"),
    ],
)
def test_a_broken_template_is_refused_with_the_reason(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_template(source, "x.jinja")


@pytest.mark.parametrize("body", ["{{ title.__class__.__mro__ }}", "{{ title + 1 }}"])
def test_a_template_that_fails_on_an_item_is_a_usage_error(body: str) -> None:
    template = parse_template("{# id: x | version: 1 | inputs: title #}\n" + body, "x.jinja")
    with pytest.raises(UsageError, match="fails on item number 2"):
        render(template, {"title": ["", "A"]}, 2)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean title"):
        load_template("titel")


def test_a_template_of_ones_own_is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{# id: mine | version: 3 | inputs: name #}\nA {{ name }}\n", encoding="utf-8")
    template = load_template(str(path))
    assert (template.id, template.version, template.inputs) == ("mine", 3, ("name",))
    assert render(template, {"name": ["b"]}, 1) == ["A b"]
    with pytest.raises(UsageError, match="no such file"):
        load_template(str(tmp_path / "other.jinja"))
