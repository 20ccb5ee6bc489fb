"""Written texts against reference texts: BLEU, ROUGE, how many differ, how long they are.

No torch. sacrebleu and rouge-score come with the extra `text` and are imported when needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import numpy as np

from llmrec.errors import UsageError

ROUGE = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
"""Our names for those of the package."""
TEXT_MEASURES = ("BLEU-4", *ROUGE, "distinct", "words")


def text_values(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """What the texts are worth, over the cases that have a reference.

    Numbers are comparable over the same cases and the same versions of the packages. A hypothesis
    may be empty: it scores 0 and counts.

    Args:
        references: (C,) the true texts; cases where it is empty (or white space) are left out.
        hypotheses: (C,) the written ones.

    Returns:
        ``BLEU-4``: of the corpus as a whole, 0..100 (sacrebleu: its own tokens, case kept,
        exponential smoothing). ``ROUGE-1``, ``ROUGE-2``, ``ROUGE-L``: mean F1 of the cases, 0..1
        (rouge-score: lower case, stemmed). ``distinct``: distinct hypotheses by hypotheses, 0..1.
        ``words``: mean length of a hypothesis in words, by white space. ``cases`` that were
        judged and ``skipped`` ones. Without a single case all measures are NaN.

    Raises:
        UsageError: A package is not installed.
        ValueError: Not as many hypotheses as references.
    """
    pairs = [
        (reference.strip(), hypothesis.strip())
        for reference, hypothesis in zip(references, hypotheses, strict=True)
        if reference.strip()
    ]
    counts = {"cases": float(len(pairs)), "skipped": float(len(references) - len(pairs))}
    bleu, scorer = _package("sacrebleu"), _package("rouge_score.rouge_scorer")
    if not pairs:
        return dict.fromkeys(TEXT_MEASURES, float("nan")) | counts
    truths, told = map(list, zip(*pairs, strict=True))
    rouge = scorer.RougeScorer(list(ROUGE.values()), use_stemmer=True)
    scores = [rouge.score(truth, text) for truth, text in pairs]
    return {
        "BLEU-4": float(bleu.corpus_bleu(told, [truths]).score),
        **{
            name: float(np.mean([score[theirs].fmeasure for score in scores]))
            for name, theirs in ROUGE.items()
        },
        "distinct": len(set(told)) / len(told),
        "words": float(np.mean([len(text.split()) for text in told])),
        **counts,
    }


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"BLEU and ROUGE need the package {name.partition('.')[0].replace('_', '-')}: "
            "pip install 'llmrec[text]'."
        ) from error
