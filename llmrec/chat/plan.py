"""Everything a chat run will ask: cases, shuffles and parts as numbered requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from llmrec.chat.requests import Answer, Request
from llmrec.chat.tasks import Question, TaskConfig, Verdict, ask, judge, parts
from llmrec.data.interactions import Cases, Dataset, Int32, Int64
from llmrec.data.titles import displayed
from llmrec.errors import UsageError
from llmrec.prompting.templates import Prompt, load_prompt

NO_TITLE = "(no title)"
"""What is shown of a history item without text; such items are never candidates."""


def check_data(config: TaskConfig, dataset: Dataset) -> None:
    """Refuse data that a task cannot be asked about.

    Raises:
        UsageError: It has no titles, or no ratings where these are asked for.
    """
    if not any(dataset.catalog.texts):
        raise UsageError(
            f"data.source={dataset.name} has no item text, and a chat model reads nothing "
            "else. Add a title column, or name a template with data.item_text."
        )
    if config.task == "rating" and dataset.interactions.ratings is None:
        raise UsageError(
            f"chat.task=rating needs ratings, which data.source={dataset.name} does not have. "
            "Name their column with data.rating_column, or choose another task."
        )
    if config.task == "rating" and dataset.interactions.ratings is not None:
        low, high = np.nanmin(dataset.interactions.ratings), np.nanmax(dataset.interactions.ratings)
        if low < 1 or high > 5:
            raise UsageError(
                f"chat.task=rating asks for 1 to 5 stars, but those of data.source={dataset.name} "
                f"lie in {low:g} to {high:g}. Write them as 1 to 5 first."
            )


def prompts(config: TaskConfig) -> tuple[Prompt, Prompt]:
    """The templates of the task and of its history.

    Raises:
        UsageError: An own template does not show what is asked about.
    """
    task = load_prompt(config.template or f"chat/{config.task}", "chat.template")
    needed = "candidate" if config.task in ("point", "rating") else "candidates"
    if needed not in task.template.inputs:
        raise UsageError(
            f"chat.template={config.template} does not show {needed}, which "
            f"chat.task={config.task} asks about. Name it in the header and in the text."
        )
    return task, load_prompt(f"chat/history/{config.history}", "chat.history")


def templates_of(config: TaskConfig) -> dict[str, str]:
    """sha256 of every template that a task reads."""
    task, history = prompts(config)
    used = {"task": task} if config.task == "rating" else {"task": task, "history": history}
    return {role: prompt.template.sha256 for role, prompt in used.items()}


@dataclass(frozen=True)
class Place:
    """What a request's number stands for."""

    case: int
    shuffle: int
    part: int


class Plan:
    """The requests of a run. Nothing of them is held: each is made when it is asked for."""

    def __init__(
        self,
        config: TaskConfig,
        dataset: Dataset,
        cases: Cases,
        items: Int32,
        seed: int,
        replaced: Mapping[tuple[int, int], str] | None = None,
    ) -> None:
        """What will be asked.

        Args:
            config: The task.
            dataset: Titles, ids and histories.
            cases: The questions, C of them.
            items: (C, K) candidates in the order first shown, padded with 0; the target alone for
                ratings.
            seed: Of further orders and of the examples.
            replaced: Titles to show in the place of an item's own, by case and place.
        """
        self.config, self.dataset, self.cases, self.items = config, dataset, cases, items
        self.seed, self.replaced = seed, replaced or {}
        self.prompt, self.history_prompt = prompts(config)
        sizes = (items > 0).sum(axis=1)  # (C,)
        self.parts: Int64 = np.array([parts(int(size), config) for size in sizes], dtype=np.int64)
        ends = np.cumsum(self.parts * config.shuffles)
        self.starts: Int64 = np.concatenate([[0], ends]).astype(np.int64)  # (C + 1,)
        self._title = lru_cache(maxsize=1 << 16)(self._displayed)
        self._examples = self._solved_examples() if config.examples else []
        self.question = lru_cache(maxsize=256)(self._question)

    @property
    def count(self) -> int:
        """Requests in all."""
        return int(self.starts[-1])

    def place(self, number: int) -> Place:
        """What a request's number stands for."""
        case = int(np.searchsorted(self.starts, number, side="right")) - 1
        shuffle, part = divmod(number - int(self.starts[case]), int(self.parts[case]))
        return Place(case, shuffle, part)

    def order(self, case: int, shuffle: int) -> Int64:
        """The candidates' places in the order shown: the pool's own, then turned by equal steps.

        Over the askings a candidate stands in places that lie evenly over the prompt, in each of
        them once where there are as many askings as candidates, so that a model's love of a place
        cancels out. Further askings turn a seeded order in the same way.
        """
        size = int((self.items[case] > 0).sum())
        steps = min(self.config.shuffles, size)
        turn, step = divmod(shuffle, steps)
        first = np.arange(size)
        if turn:
            first = np.random.default_rng((self.seed, case, turn, 1)).permutation(size)
        return np.roll(first, -(step * size // steps))

    def request(self, number: int) -> Request:
        """One request."""
        place = self.place(number)
        asked = ask(
            self.question(place.case, place.shuffle), place.part, self.config, self.prompt.render
        )
        return Request(number, asked.prompt, asked.max_tokens, asked.constraint, asked.top_logprobs)

    def requests(self, wanted: Callable[[int], bool]) -> Iterator[Request]:
        """The requests whose number is wanted, in order."""
        return (self.request(number) for number in range(self.count) if wanted(number))

    def judge(self, answer: Answer) -> tuple[Place, Verdict]:
        """What an answer says; places are those of `items`, whatever the order shown."""
        place = self.place(answer.number)
        verdict = judge(answer, self.question(place.case, place.shuffle), place.part, self.config)
        order = self.order(place.case, place.shuffle)
        verdict.scores = {int(order[shown]): score for shown, score in verdict.scores.items()}
        if verdict.chosen is not None:
            verdict.chosen = int(order[verdict.chosen])
        return place, verdict

    def _question(self, case: int, shuffle: int) -> Question:
        interactions = self.dataset.interactions
        user, end = self.cases.user[case], int(self.cases.end[case])
        start = max(int(interactions.offsets[user]), end - self.config.history_items)
        seen = interactions.items[start:end]
        history = tuple(self._title(int(item)) or NO_TITLE for item in seen)
        items = self.items[case]
        shown = tuple(
            self._shown(case, int(place), int(items[place])) for place in self.order(case, shuffle)
        )
        target = interactions.items[self.cases.target[case]]
        found = np.flatnonzero(items[self.order(case, shuffle)] == target)
        truth = int(found[0]) if len(found) else None
        if self.config.task == "rating":
            return self._rating_question(case, history, shown, start, end)
        block = self.history_prompt.render(history=list(history))
        return Question(history, shown, truth, block)

    def _rating_question(
        self, case: int, history: tuple[str, ...], shown: tuple[str, ...], start: int, end: int
    ) -> Question:
        ratings = self.dataset.interactions.ratings
        assert ratings is not None
        pairs = zip(history, map(float, ratings[start:end]), strict=True)
        others = [told for drawn, told in self._examples if drawn != case]
        return Question(
            history,
            shown,
            0,
            stars=float(ratings[self.cases.target[case]]),
            rated=tuple((title, stars) for title, stars in pairs if not np.isnan(stars)),
            examples=tuple(others[: self.config.examples]),
        )

    def _solved_examples(self) -> list[tuple[int, dict[str, Any]]]:
        """Cases and what is shown of them: one more than wanted, for none is shown to itself.

        Only visible histories are shown: the last rated item of one is the example's question.
        """
        interactions, wanted = self.dataset.interactions, self.config.examples + 1
        assert interactions.ratings is not None
        found: list[tuple[int, dict[str, Any]]] = []
        for case in np.random.default_rng((self.seed, 2)).permutation(len(self.cases)):
            begin, end = int(interactions.offsets[self.cases.user[case]]), int(self.cases.end[case])
            rows = np.flatnonzero(~np.isnan(interactions.ratings[begin:end])) + begin
            rows = rows[-self.config.history_items - 1 :]
            pairs = [
                [self._title(int(interactions.items[row])), float(interactions.ratings[row])]
                for row in rows
            ]
            pairs = [pair for pair in pairs if pair[0]]
            if len(pairs) >= 2:
                title, stars = pairs[-1]
                told = {"rated": pairs[:-1], "candidate": title, "stars": stars}
                found.append((int(case), told))
            if len(found) == wanted:
                return found
        raise UsageError(
            f"chat.examples={self.config.examples} needs {wanted} users with two rated items to "
            f"show, and there are {len(found)}. Use fewer."
        )

    def _shown(self, case: int, place: int, item: int) -> str:
        told = self.replaced.get((case, place))
        if told is not None:
            return displayed(told)
        return self._title(item)

    def _displayed(self, item: int) -> str:
        return displayed(self.dataset.catalog.texts[item - 1])
