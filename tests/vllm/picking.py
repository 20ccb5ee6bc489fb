"""A tiny Llama that learns, in minutes on a processor, to pick 1 of 4 from the shipped prompts.

It sees training parts of the simulated shop alone. Three heads that are thrown away afterwards read
the state at each title's closing quote, and tell the small model what to look for: the title's
genre, whether the candidate is the one, and its letter. The answer itself is learned as a chat
model's next token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import chat_models
import numpy as np
import torch
from served import HISTORY, ITEMS, USERS
from torch.nn.functional import cross_entropy

from llmrec.chat.plan import Plan
from llmrec.chat.tasks import TaskConfig
from llmrec.data.interactions import Cases, Dataset, Split
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.simulated import SimulatedConfig
from llmrec.data.splits import SplitConfig, split
from llmrec.evaluation.pools import PoolConfig, draw_pools

CANDIDATES = 4
VOCABULARY = 1200
WIDTH, LAYERS = 64, 4
BATCH, STEPS, WARM_UP = 16, 1600, 50
RATE = 3e-3


@dataclass(frozen=True)
class Lessons:
    """Prompts with their answers."""

    tokens: list[list[int]]
    truths: list[int]
    """Place of the right candidate."""
    genres: list[list[int]]
    """Of every title that the prompt shows, in order."""


def shop() -> tuple[Dataset, Split]:
    """The data that ``served.DATA`` names."""
    dataset = load_dataset(DataConfig(simulated=SimulatedConfig(users=USERS, items=ITEMS)))
    return dataset, split(dataset, SplitConfig())


def plan_of(dataset: Dataset, cut: Split, seed: int) -> Plan:
    """Every interaction of the training parts that has two before it, asked about."""
    offsets = dataset.interactions.offsets
    ends = [np.arange(start + 2, end) for start, end in zip(offsets, cut.train_end, strict=False)]
    users = np.repeat(np.arange(len(ends)), [len(found) for found in ends]).astype(np.int32)
    positions = np.concatenate(ends)
    cases = Cases(users, positions, positions)
    pool = PoolConfig(size=CANDIDATES, users="all", seed=seed)
    alike = np.ones(dataset.item_count + 1, dtype=np.int64)
    kept, pools = draw_pools(dataset, cases, cut.test_candidates, alike, pool)
    return Plan(TaskConfig(history_items=HISTORY), dataset, cases.take(kept), pools.items, 0)


def lessons_of(plan: Plan, tokenizer: object) -> Lessons:
    """The plan's prompts, as a server would put them to the model."""
    fields, interactions = plan.dataset.catalog.fields, plan.dataset.interactions
    names = sorted(set(fields["genres"]))
    genre = np.array([0, *map(names.index, fields["genres"])])
    truths, genres, chats = [], [], []
    for number in range(plan.count):
        end = plan.cases.end[number]
        start = max(int(interactions.offsets[plan.cases.user[number]]), end - HISTORY)
        shown = [*interactions.items[start:end], *plan.items[number]]
        genres.append(genre[shown].tolist())
        truths.append(plan.question(number, 0).truth or 0)
        chats.append([{"role": "user", "content": plan.request(number).prompt}])
    encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    return Lessons(encoded["input_ids"], truths, genres)


def endless_batches(
    dataset: Dataset, cut: Split, tokenizer: object
) -> Iterator[tuple[Lessons, list[int]]]:
    """Lessons and the rows of a batch; each round draws other candidates in another order."""
    rng, seed = np.random.default_rng(0), 1
    while True:
        lessons = lessons_of(plan_of(dataset, cut, seed), tokenizer)
        order = rng.permutation(len(lessons.tokens)).tolist()
        for start in range(0, len(order) - BATCH, BATCH):
            yield lessons, order[start : start + BATCH]
        seed += 1


class Teacher:
    """The model, the two heads and the loss."""

    def __init__(self, model: torch.nn.Module, tokenizer: object, genres: int) -> None:
        self.model = model
        self.genre, self.choice = torch.nn.Linear(WIDTH, genres), torch.nn.Linear(WIDTH, 1)
        self.letter = torch.nn.Linear(WIDTH, CANDIDATES)
        self.parts = (model, self.genre, self.choice, self.letter)
        self.quote = tokenizer.convert_tokens_to_ids('"')
        self.letters = tokenizer.convert_tokens_to_ids(list("ABCD"))

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for part in self.parts for p in part.parameters()]

    def loss(self, lessons: Lessons, rows: list[int]) -> torch.Tensor:
        texts = [torch.tensor(lessons.tokens[row]) for row in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # (B, T)
        truth = torch.tensor([lessons.truths[row] for row in rows])  # (B,)
        states = self.model.model(input_ids=tokens).last_hidden_state  # (B, T, D)
        last = torch.tensor([len(text) - 1 for text in texts])
        answers = self.model.lm_head(states[torch.arange(len(rows)), last])
        quotes = [(text == self.quote).nonzero()[:, 0] for text in texts]
        titles = torch.cat([state[places] for state, places in zip(states, quotes, strict=True)])
        candidates = torch.stack(
            [state[places[-CANDIDATES:]] for state, places in zip(states, quotes, strict=True)]
        )  # (B, C, D)
        genres = torch.tensor([genre for row in rows for genre in lessons.genres[row]])
        places = torch.arange(CANDIDATES).repeat(len(rows))
        return (
            cross_entropy(answers, torch.tensor(self.letters)[truth])
            + cross_entropy(self.choice(candidates)[:, :, 0], truth)
            + cross_entropy(self.genre(titles), genres)
            + cross_entropy(self.letter(candidates).flatten(0, 1), places)
        )


def train(folder: Path, steps: int = STEPS) -> Path:
    """Train the model and save it with its tokeniser."""
    torch.set_num_threads(2)
    dataset, cut = shop()
    plan = plan_of(dataset, cut, 0)
    prompts = [plan.request(number).prompt for number in range(0, plan.count, 10)]
    tokenizer = chat_models.train_tokenizer(prompts, VOCABULARY)
    model = chat_models.llama(tokenizer, WIDTH, LAYERS)
    teacher = Teacher(model, tokenizer, len(set(dataset.catalog.fields["genres"])))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=RATE, betas=(0.9, 0.98))
    batches = endless_batches(dataset, cut, tokenizer)
    for step, (lessons, rows) in zip(range(steps), batches, strict=False):
        share = min((step + 1) / WARM_UP, max(1 - step / steps, 0.05))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        optimizer.zero_grad()
        teacher.loss(lessons, rows).backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
