"""Command line and YAML to a config, and every mistake to one sentence."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.errors import UsageError, exit_code, nearest
from llmrec.options import as_yaml, parse


@dataclass(frozen=True)
class Optim:
    """How."""

    lr: float = 1e-3
    """Rate."""
    epochs: int = 3
    """Passes."""
    layers: int | Literal["all"] = "all"
    """Layers, or all."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UsageError(f"optim.epochs={self.epochs} must be at least 1.")


@dataclass(frozen=True)
class Whole:
    """What."""

    optim: Optim = field(default_factory=Optim)
    name: Literal["id", "text"] = "text"
    """Which."""
    fast: bool = False
    """Whether."""
    folder: str = ""
    """Where."""


def read(*argv):
    """The config of a command line."""
    return parse(Whole, argv, "prog", "A program.")[0]


def refused(*argv):
    """The sentence a command line is refused with."""
    with pytest.raises(UsageError) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    """Writes a YAML file of the given text; gives its path."""

    def write(text, name="x.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_without_options_everything_has_its_default():
    assert read() == Whole()


def test_options_are_dotted_with_or_without_an_equals_sign():
    expected = Whole(Optim(lr=0.1, epochs=5), name="id")
    assert read("--optim.lr", "0.1", "--optim.epochs=5", "--name", "id") == expected


@pytest.mark.parametrize("text", ["optim:\n  epochs: 7\n", "optim.epochs: 7\n"])
def test_yaml_may_be_nested_or_dotted(file, text):
    assert read("--config", file(text)).optim.epochs == 7


def test_options_override_files_wherever_they_stand(file):
    path = file("optim: {epochs: 7, lr: 0.5}\n")
    expected = Optim(lr=0.5, epochs=2)
    assert read("--optim.epochs=2", "--config", path).optim == expected
    assert read(f"--config={path}", "--optim.epochs=2").optim == expected


def test_a_later_file_overrides_an_earlier_one_key_by_key(file):
    first = file("optim: {epochs: 7, lr: 0.5}\n", "first.yaml")
    second = file("optim: {epochs: 9}\n", "second.yaml")
    assert read("--config", first, "--config", second).optim == Optim(lr=0.5, epochs=9)
    assert read("--config", second, "--config", first).optim == Optim(lr=0.5, epochs=7)


def test_the_nearest_option_is_named_on_the_command_line():
    assert refused("--optim.epoch", "3") == (
        "unknown option --optim.epoch: did you mean optim.epochs?"
    )


def test_the_nearest_option_and_the_file_are_named_for_yaml(file):
    path = file("optim: {epoch: 3}\n")
    said = f"{path} has an unknown option optim.epoch: did you mean optim.epochs?"
    assert refused("--config", path) == said


def test_an_abbreviated_option_is_unknown():
    assert "did you mean folder?" in refused("--fold", "x")


def test_where_nothing_is_near_all_are_listed():
    assert nearest("zzz", ["b", "a"]) == "known: a, b."


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--optim.epochs=many", "--optim.epochs got many but takes int."),
        ("--optim.epochs=1.5", "--optim.epochs got 1.5 but takes int."),
        ("--optim.lr=fast", "--optim.lr got fast but takes float."),
        ("--fast=perhaps", "--fast got perhaps but takes bool."),
        ("--name=image", "--name got image but takes one of 'id', 'text'."),
        ("--optim=1", "--optim is a group; name one of its options, as --help lists them."),
        ("--optim.epochs=0", "optim.epochs=0 must be at least 1."),
    ],
)
def test_a_wrong_value_names_the_option_what_it_got_and_what_it_takes(word, said):
    assert refused(word).replace('"', "") == said


def test_a_wrong_value_in_a_file_names_the_option(file):
    said = refused("--config", file("optim: {epochs: many}\n"))
    assert "optim.epochs" in said and "int" in said


def test_a_union_names_all_it_takes():
    said = refused("--optim.layers=some")
    assert said.startswith("--optim.layers got some but takes") and "int" in said and "all" in said


def test_a_word_that_is_no_option_is_refused():
    assert "junk" in refused("junk")


def test_a_missing_file_is_named():
    said = "--config nowhere.yaml cannot be read (No such file or directory)."
    assert refused("--config", "nowhere.yaml").startswith(said)


def test_config_without_a_file_is_refused():
    assert refused("--config").startswith("--config needs a file")


def test_bad_yaml_is_named_with_its_line(file):
    path = file("name: id\noptim: {epochs: 3\nfast: true\n")
    assert refused("--config", path).startswith(f"--config {path} is not YAML at line ")


def test_bytes_that_are_no_text_are_not_yaml(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe")
    assert "is not YAML" in refused("--config", str(tmp_path / "x.yaml"))


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "word\n"])
def test_yaml_without_options_is_refused(file, text):
    assert "holds no options" in refused("--config", file(text))


@given(
    st.builds(
        Whole,
        st.builds(
            Optim,
            lr=st.floats(allow_nan=False),
            epochs=st.integers(1, 10**6),
            layers=st.one_of(st.just("all"), st.integers(1, 99)),
        ),
        name=st.sampled_from(["id", "text"]),
        fast=st.booleans(),
        folder=st.sampled_from(["", "runs/a", "1e3", "null", "true", "x: y", "#", "~"]),
    )
)
@settings(max_examples=40, deadline=None)
def test_a_written_config_reads_back_as_itself(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(as_yaml(config))
    assert read("--config", str(path)) == config


def test_a_mistake_is_exit_code_2_and_one_line(capsys):
    def mistaken(argv):
        raise UsageError(f"{argv[0]} is wrong.")

    assert exit_code(mistaken, ["x"]) == 2
    assert capsys.readouterr() == ("", "llmrec: x is wrong.\n")
    assert exit_code(lambda argv: 0, []) == 0
