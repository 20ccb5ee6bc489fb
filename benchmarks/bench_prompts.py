"""Prompts a second, all families and one by one, and the memory of a long stream.

    LLMREC_DATA=data python benchmarks/bench_prompts.py

The default mix asks 5 + 5 + 10 sequential and 10 + 5 direct questions of each user and epoch, and
one each about stars, explanation and review where the data has these; a quarter and more of all
name 100 candidates. The other side writes the same mix in the manner of public code: one prompt
after another, a compiled Jinja template rendered for each, wrong candidates by
`Generator.choice(all_items, replace=False)` and a set; it looks for no stars, texts or repeats.
Memory is that of a stream that nobody keeps.
"""

from measure import Row, Times, extra_memory, report  # isort: skip

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import jinja2
import numpy as np

from llmrec.data.interactions import Dataset
from llmrec.data.readers import DataConfig, data_root, load_dataset
from llmrec.data.simulated import SimulatedConfig
from llmrec.data.splits import SplitConfig, split
from llmrec.prompting.families import P5Template, load_family_templates
from llmrec.prompting.indexing import IndexingConfig, build_indexing
from llmrec.prompting.p5 import PerUser, PromptConfig, PromptGenerator

PROMPTS, FEW, MANY, TURNS = 20_000, 20_000, 200_000, 5
FAMILIES = ("rating", "sequential", "explanation", "review", "direct")


def generator_of(data: Dataset, families: str = "auto") -> PromptGenerator:
    cut = split(data, SplitConfig())
    indexing = build_indexing(IndexingConfig(), data, cut.train_end)
    # One prompt a user and epoch measures the walk over users, so single families ask for ten.
    counts = PerUser() if families == "auto" else PerUser(rating=10, explanation=10, review=10)
    config = PromptConfig(families=families, per_user=counts)
    return PromptGenerator(data, cut, indexing, load_family_templates(""), config)


def stream(made: PromptGenerator, count: int) -> Callable[[], None]:
    """Makes so many prompts, of as many epochs as that takes, and throws them away."""

    def run() -> None:
        epochs = (made.train(0, epoch) for epoch in itertools.count(1))
        deque(itertools.islice(itertools.chain.from_iterable(epochs), count), maxlen=0)

    return run


class OneByOne:
    """The same mix, prompt by prompt."""

    def __init__(self, made: PromptGenerator) -> None:
        self.made, self.data = made, made.dataset
        self.items = np.arange(1, self.data.item_count + 1)
        self.compiled = {
            template.id: jinja2.Template(template.source)
            for kind in made.kinds
            for template in kind.templates
        }

    def stream(self, count: int) -> Callable[[], None]:
        return lambda: deque(itertools.islice(self.prompts(), count), maxlen=0) and None

    def prompts(self) -> Iterator[tuple[str, str]]:
        rng, interactions = np.random.default_rng(0), self.data.interactions
        while True:
            for user in rng.permutation(interactions.user_count):
                start, end = int(interactions.offsets[user]), int(self.made.train_end[user])
                for kind in self.made.kinds:
                    for _ in range(kind.count):
                        row = int(rng.integers(start + 1, end)) if end > start + 1 else start
                        template = kind.templates[rng.integers(len(kind.templates))]
                        yield self.prompt(rng, template, user, row)

    def prompt(
        self, rng: np.random.Generator, template: P5Template, user: int, row: int
    ) -> tuple[str, str]:
        interactions, reviews = self.data.interactions, self.data.reviews
        start = int(interactions.offsets[user])
        item, met = interactions.items[row], set(interactions.history(user).tolist())
        values = {"user": f"user_{user + 1}", "title": self.data.catalog.texts[item - 1]}
        values["history"] = ", ".join(
            f"item_{one}" for one in interactions.items[max(start, row - 20) : row]
        )
        if "candidates" in template.inputs:
            drawn = rng.choice(self.items, 99 + len(met), replace=False)
            shown = [*[int(one) for one in drawn if one not in met][:99], int(item)]
            rng.shuffle(shown)
            values["candidates"] = " , ".join(f"item_{one}" for one in shown)
        answer = f"item_{item}"
        if template.target == "yes_no" and rng.random() < 0.5:
            while item in met:
                item = rng.integers(1, self.data.item_count + 1)
        values["item"] = f"item_{item}"
        if interactions.ratings is not None:
            values["stars"] = f"{interactions.ratings[row]:g}"
        values |= {name: texts[row] for name, texts in reviews.items()}
        return " ".join(self.compiled[template.id].render(**values).split()), answer


def per_second(times: Times, what: str, ours: str, other: str | None, target: str) -> Row:
    if other is None:
        speed = PROMPTS / times.median(ours)
        return Row(what, "", speed, None, "prompts per CPU-s", None, target)
    row = times.speed_row(what, ours, other, PROMPTS, "")
    return replace(row, unit="prompts per CPU-s")


def rows_of(name: str, data: Dataset) -> list[Row]:
    """The default mix, against prompt by prompt, and each family that the data feeds."""
    made = generator_of(data)
    mix = {"ours": stream(made, PROMPTS), "one by one": OneByOne(made).stream(PROMPTS)}
    fed = {kind.family for kind in made.kinds}
    for family in FAMILIES:
        if family in fed:
            mix[family] = stream(generator_of(data, family), PROMPTS)
    times = Times(mix, TURNS)
    rows = [
        per_second(times, f"prompts of {name}, default mix", "ours", None, ">= 10000"),
        per_second(times, f"prompts of {name}, default mix", "ours", "one by one", ""),
    ]
    rows += [
        per_second(times, f"prompts of {name}, {family} alone", family, None, "")
        for family in FAMILIES
        if family in fed
    ]
    return rows


def memory_rows(data: Dataset) -> list[Row]:
    made = generator_of(data)
    stream(made, FEW)()  # what is imported and compiled at the first prompt
    few, many = (extra_memory(lambda count=count: stream(made, count)) for count in (FEW, MANY))
    rows = [
        Row(f"memory of a stream of {count:,} prompts", "", used, None, "MiB", None, "")
        for count, used in ((FEW, few), (MANY, many))
    ]
    growth = f"its growth from {FEW:,} to {MANY:,}"
    return [*rows, Row(growth, "", many - few, None, "MiB", None, "<= 8 MiB")]


def main() -> None:
    told = SimulatedConfig(reviews=True)
    simulated = load_dataset(DataConfig(source="simulated", simulated=told))
    rows, names = rows_of("simulated data with reviews", simulated), "simulated"
    if (data_root() / "ml-100k").is_dir():
        config = DataConfig(source="ml-100k", item_text="movielens_atomic")
        rows, names = [*rows, *rows_of("ml-100k", load_dataset(config))], "simulated, ml-100k"
    report("prompts", [*rows, *memory_rows(simulated)], data=names)


if __name__ == "__main__":
    main()
