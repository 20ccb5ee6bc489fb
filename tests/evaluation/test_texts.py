"""Text measures on tables small enough to count by hand."""

import builtins
import importlib
import math
import sys

import pytest

from llmrec.errors import UsageError
from llmrec.evaluation.texts import TEXT_MEASURES, text_values

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")


def test_a_text_like_its_reference_scores_full_marks():
    values = text_values(["a very good film indeed"], ["a very good film indeed"])
    assert values["BLEU-4"] == pytest.approx(100.0)
    assert [values[f"ROUGE-{n}"] for n in ("1", "2", "L")] == [1.0, 1.0, 1.0]
    assert (values["distinct"], values["words"], values["cases"]) == (1.0, 5.0, 1.0)


def test_rouge_counts_shared_words_pairs_and_the_longest_common_sequence():
    # 3 of 4 words are shared: precision 3/4, recall 3/5.
    # Pairs: "red kettle" alone of 3 and of 4. Common sequence: red kettle, then works.
    values = text_values(["the red kettle always works"], ["red kettle hardly works"])
    assert values["ROUGE-1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert values["ROUGE-2"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert values["ROUGE-L"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))


def test_rouge_is_the_mean_of_the_cases():
    values = text_values(["red tent", "blue tent"], ["red tent", "old stove"])
    assert values["ROUGE-1"] == (1 + 0) / 2


def test_bleu_is_of_the_corpus_as_the_geometric_mean_of_four_precisions():
    # Words 5/6, pairs 4/5, threes 3/4, fours 2/3; as long as the reference, so no penalty.
    values = text_values(["the cat sat on the mat"], ["the cat sat on the rug"])
    precisions = [5 / 6, 4 / 5, 3 / 4, 2 / 3]
    expected = 100 * math.exp(sum(map(math.log, precisions)) / 4)
    assert values["BLEU-4"] == pytest.approx(expected)


def test_bleu_punishes_a_text_that_is_shorter_than_its_reference():
    # Every n-gram is right; 5 words instead of 6 cost exp(1 - 6 / 5).
    values = text_values(["the cat sat on the mat"], ["the cat sat on the"])
    assert values["BLEU-4"] == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_the_case_of_a_letter_counts_for_bleu_alone():
    values = text_values(["Red Kettle For Tea"], ["red kettle for tea"])
    assert values["BLEU-4"] < 50
    assert values["ROUGE-1"] == 1.0


def test_empty_references_are_skipped_and_counted():
    values = text_values(["good", "", "  "], ["good", "bad", "worse"])
    assert (values["cases"], values["skipped"]) == (1, 2)
    assert values["ROUGE-1"] == 1.0
    assert values["words"] == 1.0  # of the one case alone


def test_an_empty_answer_scores_nothing_and_counts():
    values = text_values(["good", "good"], ["good", ""])
    assert (values["cases"], values["ROUGE-1"], values["words"]) == (2, 0.5, 0.5)


def test_distinct_is_the_share_of_different_answers():
    values = text_values(["a", "b", "c", "d"], ["nice", "nice", "fine ", "fine"])
    assert values["distinct"] == 2 / 4


def test_without_a_single_reference_nothing_is_measured():
    values = text_values(["", ""], ["good", "bad"])
    assert all(math.isnan(values[name]) for name in TEXT_MEASURES)
    assert (values["cases"], values["skipped"]) == (0, 2)


def test_as_many_answers_as_references_are_needed():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        text_values(["a", "b"], ["a"])


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score"])
def test_a_missing_package_names_the_extra_that_brings_it(package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as an import of what is not there
    with pytest.raises(UsageError, match=r"pip install 'llmrec\[text\]'"):
        text_values(["a"], ["a"])


def test_the_module_itself_needs_neither_package(monkeypatch):
    plain = builtins.__import__

    def refusing(name, *rest):
        assert name.partition(".")[0] not in ("sacrebleu", "rouge_score")
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refusing)
    importlib.reload(importlib.import_module("llmrec.evaluation.texts"))
