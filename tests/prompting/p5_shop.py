"""A data set small enough to know by heart, and templates of three words."""

from pathlib import Path

import numpy as np

from llmrec.data.interactions import Catalog, Dataset, Interactions, Split
from llmrec.data.splits import SplitConfig, split
from llmrec.prompting.families import P5Template, load_family_templates
from llmrec.prompting.indexing import Indexing
from llmrec.prompting.p5 import PromptConfig, PromptGenerator

TEMPLATES = {
    "rating/1-1": ("user, item", "stars", "seen", "{{ user }} on {{ item }}: stars?"),
    "rating/1-2": ("item, stars", "yes_no", "seen", "{{ item }}: {{ stars }} stars?"),
    "rating/1-3": ("title", "like_dislike", "seen", 'Liked "{{ title }}"?'),
    "sequential/2-1": ("history", "item", "seen", "After {{ history }} comes"),
    "sequential/2-2": ("candidates", "item", "seen", "{{ history }} then of {{ candidates }} one"),
    "sequential/2-3": ("history, item", "yes_no", "seen", "{{ history }} then {{ item }}?"),
    "sequential/2-4": ("history", "item", "held_out", "What follows {{ history }}"),
    "explanation/3-1": ("item, feature", "explanation", "seen", "{{ item }}, {{ feature }}: why?"),
    "review/4-1": ("review", "headline", "seen", "Title of: {{ review }}"),
    "direct/5-1": ("user, title", "yes_no", "seen", '{{ user }} takes "{{ title }}"?'),
    "direct/5-2": ("user, candidates", "item", "seen", "{{ user }} takes of {{ candidates }}"),
}
"""Family and id: inputs, target, part and body."""


def templates(folder: Path) -> tuple[P5Template, ...]:
    """The templates above, read from files."""
    for name, (inputs, target, part, body) in TEMPLATES.items():
        if "history" in body and "history" not in inputs:
            inputs = f"history, {inputs}"
        path = folder / f"{name}.jinja"
        path.parent.mkdir(parents=True, exist_ok=True)
        header = f"id: {path.stem} | version: 1 | inputs: {inputs} | target: {target}"
        path.write_text(f"{{# {header} | part: {part} #}}\n{body}\n")
    return load_family_templates(str(folder))


def shop(
    sequences: list[list[int]],
    items: int = 30,
    ratings: list[float] | None = None,
    titles: dict[int, str] | None = None,
    reviews: dict[str, list[str]] | None = None,
    timestamps: list[int] | None = None,
) -> Dataset:
    """Users by their items; item i is called "i17" outside and "Thing 17"."""
    flat = [item for sequence in sequences for item in sequence]
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    texts = [(titles or {}).get(item, f"Thing {item}") for item in range(1, items + 1)]
    return Dataset(
        name="shop",
        interactions=Interactions(
            np.array(flat, dtype=np.int32),
            offsets,
            None if timestamps is None else np.array(timestamps, dtype=np.int64),
            None if ratings is None else np.array(ratings, dtype=np.float32),
        ),
        catalog=Catalog([f"i{item}" for item in range(1, items + 1)], {"title": texts}, texts),
        user_ids=[f"u{user}" for user in range(len(sequences))],
        reviews={name: np.array(texts, dtype=object) for name, texts in (reviews or {}).items()},
    )


def numbered(items: int) -> Indexing:
    """Item 7 is called item_7."""
    return Indexing("random", tuple(f"item_{item}" for item in range(1, items + 1)))


def generator(
    dataset: Dataset,
    templates: tuple[P5Template, ...],
    config: PromptConfig,
    cut: Split | None = None,
) -> PromptGenerator:
    """A generator on the leave-one-out split."""
    cut = cut or split(dataset, SplitConfig())
    return PromptGenerator(dataset, cut, numbered(dataset.item_count), templates, config)
