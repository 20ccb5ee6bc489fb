"""``llmrec chat``: ask a chat model about test cases, score its answers like any other row.

llmrec chat --server vllm --model Qwen/Qwen3-0.6B                     starts vLLM, asks, stops it
llmrec chat --base-url http://127.0.0.1:8000/v1 --model my-model      any OpenAI-compatible server
llmrec chat --server offline --model M --task top                     vLLM's engine in this process
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from rich.console import Console

from llmrec.chat import offline
from llmrec.chat.client import ask_all
from llmrec.chat.endpoint import ClientConfig, Endpoint
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.plan import Plan, check_data, templates_of
from llmrec.chat.requests import Answer, Request
from llmrec.chat.scoring import Tally, answered_measures, ranking_of, report, tally
from llmrec.chat.server import ServerConfig, Servers, check_complete
from llmrec.chat.server import identity as model_identity
from llmrec.chat.tasks import POOL_SIZES, TaskConfig, check_pool
from llmrec.data.interactions import Dataset, Int32, Split
from llmrec.data.readers import DataConfig, effective, load_dataset
from llmrec.data.splits import SplitConfig, fit_ends, split, summary
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.card import run_card
from llmrec.evaluation.config import EvaluationConfig
from llmrec.evaluation.pools import PoolConfig, Pools, sample_cases, write_pools
from llmrec.evaluation.ratings import RATING_MEASURES
from llmrec.evaluation.result import RunFacts, build_rating_result, build_result, write_result
from llmrec.options import as_dict, as_yaml, parse
from llmrec.progress import Tell, rate_bar
from llmrec.questions import pool_cases
from llmrec.runs import CONFIG, RESULT, alone, check_vacant, open_run, write_atomically, write_json

PROG, DESCRIPTION = (
    "llmrec chat",
    "Ask a chat model about test cases and score its answers. Short for --server.name, "
    "--server.model, --server.base_url, --chat.task and --run.resume: --server, --model, "
    "--base-url, --task, --resume.",
)
ANSWERS, REPORT, SECONDS = "answers.jsonl", "chat.json", "seconds.json"
SHORT = {
    "--server": "--server.name",
    "--model": "--server.model",
    "--base-url": "--server.base_url",
    "--task": "--chat.task",
    "--resume": "--run.resume",
}
"""Options that may be written short."""


@dataclass(frozen=True)
class ChatRun:
    """One run: its name, seed and folder."""

    label: str = ""
    """The row's name in tables. Empty: chat, task and model."""
    seed: int = 0
    """Decides further orders of candidates, examples, and what a server draws above temperature 0;
    the candidates themselves follow evaluation.pool.seed."""
    folder: str = ""
    """Where the run is written. Empty: runs/<data>-<label>-s<seed>."""
    overwrite: bool = False
    """Whether a finished run in that folder may be replaced. Answers to the very same questions are
    kept: they were paid for."""
    resume: Literal["auto", "never", "failed"] = "auto"
    """auto: answers that the folder's journal holds count; failed: the same, but requests that
    failed are asked again, of a finished run too; never: everything is asked anew. --resume for
    short."""

    def __post_init__(self) -> None:
        """Refuse seeds that not every random generator takes."""
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"run.seed={self.seed} must lie in [0, 2**32).")


@dataclass(frozen=True)
class ChatConfig:
    """Everything that decides a chat run."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    chat: TaskConfig = field(default_factory=TaskConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    run: ChatRun = field(default_factory=ChatRun)


Config = TypeVar("Config", bound=ChatConfig)


@dataclass(frozen=True)
class Session:
    """What is asked, and about what."""

    config: ChatConfig
    dataset: Dataset
    split: Split
    """Its test cases are those that are asked about."""
    pools: Pools | None
    """None for ratings, which show the target alone."""
    plan: Plan

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.folder)

    def fingerprint(self) -> dict[str, Any]:
        """What decides every prompt and answer; a journal of another one is refused."""
        config = self.config
        chat, server = as_dict(config.chat), as_dict(config.server)
        for moves_nothing in ("python", "start_seconds", "api_key_variable", "base_url"):
            server.pop(moves_nothing)
        return {
            **{f"chat.{name}": value for name, value in chat.items()},
            **{f"server.{name}": value for name, value in server.items()},
            "model": model_identity(config.server),
            "run.seed": config.run.seed,
            "data": self.dataset.fingerprint(),
            "templates": templates_of(config.chat),
            "candidates": _digest(self.plan.items),
            "cases": _digest(self.plan.cases.target),
        }


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def configure(argv: Sequence[str]) -> ChatConfig:
    """The config of a command line; label, folder and the number of candidates are filled in."""
    return configure_as(ChatConfig, argv, PROG, DESCRIPTION)


def configure_as(
    config_class: type[Config], argv: Sequence[str], prog: str, description: str
) -> Config:
    """The same for a config that holds more."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(f"{SHORT.get(name, name)}{equals}{value}")
    named = {word.partition("=")[0] for word in words}
    if "--server.base_url" in named and "--server.name" not in named:
        words.append("--server.name=url")
    config, given = parse(config_class, words, prog, description)
    config = replace(config, data=effective(config.data, given))
    check_complete(config.server)
    pool = config.evaluation.pool
    if config.evaluation.filter_seen is not True:
        raise UsageError(
            f"evaluation.filter_seen={config.evaluation.filter_seen} means nothing to llmrec chat: "
            "candidate lists never hold items of the history. Leave it out."
        )
    if "evaluation.pool.size" not in given and config.chat.task != "rating":
        pool = replace(pool, size=POOL_SIZES[config.chat.task])
    if pool.size == "all" and config.chat.task != "rating":
        raise UsageError(
            "evaluation.pool.size=all: no prompt holds a whole catalogue. Name a number of "
            "candidates, or leave it out."
        )
    if pool.size != "all":
        check_pool(pool.size, config.chat)
    verb = prog.split(" ", 1)[1].replace(" ", "-")
    label = config.run.label or f"{verb}-{config.chat.task}-{Path(config.server.model).name}"
    data = Path(config.data.source).stem
    folder = config.run.folder or f"runs/{data}-{label}-s{config.run.seed}"
    return replace(
        config,
        evaluation=replace(config.evaluation, pool=pool),
        run=replace(config.run, label=label, folder=folder),
    )


def prepare(config: ChatConfig) -> Session:
    """Read the data, cut it, draw candidates and plan the requests."""
    dataset = load_dataset(config.data)
    check_data(config.chat, dataset)
    cut, pools = split(dataset, config.split), None
    ends = fit_ends(dataset.interactions, config.split)
    if config.chat.task == "rating":
        cut = rated_cases(dataset, cut, config.evaluation.pool)
        items: Int32 = dataset.interactions.items[cut.test.target][:, None]
    else:
        cut, pools = pool_cases(config.evaluation.pool, dataset, cut, ends, "cpu")
        assert pools is not None
        items = pools.items
    plan = Plan(config.chat, dataset, cut.test, items, config.run.seed)
    return Session(config, dataset, cut, pools, plan)


def ask(session: Session, journal: AnswerJournal, servers: Servers, console: Console) -> None:
    """Ask what the journal does not hold yet, and add up how long that took."""
    config, plan = session.config, session.plan
    if journal.done_count == plan.count:
        return
    requests = plan.requests(lambda number: not journal.is_done(number))
    seed, temperature = config.run.seed, config.chat.temperature
    if config.chat.decoding == "constrained" and not holds(config):
        console.print(
            "  server.dialect=openai has no way to hold an answer to options: these answers are "
            "free and only judged (vLLM's has: --server.dialect vllm)"
        )
    with contextlib.ExitStack() as stack:
        if config.server.name == "offline":
            engine = functools.partial(offline.ask_all, requests, config.server, temperature, seed)
        else:
            log = session.folder / "server.log"
            if config.server.name == "vllm":
                console.print(f"  starting vLLM, or taking the one that runs; its words: {log}")
            endpoint = servers.endpoint(config.server, seed, temperature, log)
            engine = functools.partial(_ask_server, requests, endpoint, config.client)
        stack.callback(_add_seconds, session.folder, time.perf_counter())  # interrupted ones too
        engine(journal, stack.enter_context(rate_bar(console, plan.count, journal.done_count)))


def holds(config: ChatConfig) -> bool:
    """Whether the server is told to hold answers to what is valid."""
    lists = config.chat.task in ("top", "list")
    return config.chat.decoding == "constrained" and (lists or config.server.spoken == "vllm")


def _ask_server(
    requests: Iterator[Request],
    endpoint: Endpoint,
    config: ClientConfig,
    journal: AnswerJournal,
    tell: Tell,
) -> None:
    asyncio.run(ask_all(requests, endpoint, config, journal, tell))


def _add_seconds(folder: Path, began: float) -> None:
    write_json(folder / SECONDS, asked_seconds(folder) + time.perf_counter() - began)


def asked_seconds(folder: Path) -> float:
    """How long a run has asked so far, over all its resumptions but killed ones."""
    path = folder / SECONDS
    return float(json.loads(path.read_text())) if path.exists() else 0.0


def rated_cases(dataset: Dataset, cut: Split, pool: PoolConfig) -> Split:
    """The split with a seeded sample of those test cases whose target has a title and a rating."""
    interactions, texts = dataset.interactions, dataset.catalog.texts
    assert interactions.ratings is not None
    known = ~np.isnan(interactions.ratings[cut.test.target])
    known &= np.array([bool(texts[i - 1]) for i in interactions.items[cut.test.target]])
    kept = sample_cases(dataset, cut.test, np.flatnonzero(known), pool)
    counts = cut.counts | {"test_cases_without_rating_or_title": int((~known).sum())}
    return replace(cut, test=cut.test.take(kept), counts=counts)


def run(argv: Sequence[str], servers: Servers | None = None) -> int:
    """Data -> prompts -> answers -> one ranking -> run folder.

    Args:
        argv: The command line.
        servers: Those of a suite, whose runs share one; else this run starts and stops its own.
    """
    config = configure(argv)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    check_vacant(Path(config.run.folder), config.run.overwrite or config.run.resume == "failed")
    session = prepare(config)
    dataset, plan = session.dataset, session.plan
    console.print(
        f"{config.run.label}, seed {config.run.seed}: {dataset.name}, {len(plan.cases)} cases, "
        f"{plan.count} requests to {config.server.model or config.server.base_url}"
    )
    console.print(f"  {summary(dataset, session.split)}")
    if session.pools is not None and session.pools.counts.get("targets_outside_pool"):
        outside = session.pools.counts["targets_outside_pool"]
        console.print(f"  {outside} targets are not among their candidates and count as missed")
    session.fingerprint()  # refuses a model that is not there, before the folder is made
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone(session.folder))
        journal = stack.enter_context(open_or_resume(session, console))
        ask(session, journal, servers or stack.enter_context(Servers()), console)
        finish(session, journal, console)
    return 0


def open_or_resume(session: Session, console: Console) -> AnswerJournal:
    """The folder's journal where it holds answers to these very questions, else a new one."""
    config, folder, wanted = session.config, session.folder, session.fingerprint()
    path = folder / ANSWERS
    keeps = config.run.resume != "never" and path.exists()
    same = keeps and AnswerJournal.fingerprint_of(path) == json.loads(json.dumps(wanted))
    if not keeps or (config.run.overwrite and not same):
        open_run(folder, as_yaml(config), config.run.overwrite)
        return AnswerJournal(path, wanted)
    if same and config.run.resume == "failed":
        console.print(f"  {AnswerJournal.without_failed(path)} failed requests are asked again")
    journal = AnswerJournal(path, wanted)  # refuses another fingerprint by name
    (folder / RESULT).unlink(missing_ok=True)  # of a finished run that is scored again
    write_atomically(folder / CONFIG, as_yaml(config).encode())
    console.print(
        f"  resuming: {journal.done_count} of {session.plan.count} requests are answered; "
        f"{journal.in_flight_count} were sent without an answer and are sent again"
    )
    return journal


def finish(session: Session, journal: AnswerJournal, console: Console) -> None:
    """Score the journal's answers and write the run."""
    config, folder, plan = session.config, session.folder, session.plan
    statuses = journal.spent(config.client).statuses
    if not statuses.get("answered", 0) + statuses.get("cut", 0):
        problem = next(answer.problem for answer in journal.answers())
        raise UsageError(
            f"none of {plan.count} requests was answered ({problem}): there is nothing to score. "
            "Mend the server or the options; --resume never asks anew."
        )
    found = tally(plan, checked(plan, journal))
    told = facts(session, journal)
    if session.pools is None:
        result = build_rating_result(told, session.dataset, session.split, found.scores[:, 0])
        names: tuple[str, ...] = RATING_MEASURES
    else:
        ranking = ranking_of(plan, found, config.evaluation.top_k)
        write_pools(folder, session.dataset, session.split.test, session.pools)
        rankings, measures = {"test": ranking}, answered_measures(plan, found)
        result = build_result(
            told, session.dataset, session.split, rankings, measures, pools=session.pools
        )
        names = ("HR@10", "NDCG@10") if config.chat.task == "top" else ("HR@1",)
        names = tuple(name for name in names if name in map(str, measures))
    write_json(folder / REPORT, report(plan, found) | {"constrained": holds(config)})
    test = write_result(folder, result, run_card)["metrics"]["test"]
    means = {name: test[name]["mean"] for name in names}
    shown = ", ".join(f"{n} {'-' if v is None else f'{v:.4f}'}" for n, v in means.items())
    console.print(f"  {understood(found)}")
    if statuses.get("failed"):
        console.print(f"  {statuses['failed']} requests failed; --resume failed asks them again")
    console.print(f"{config.run.label}, seed {config.run.seed}: test {shown} -> {folder}")


def checked(plan: Plan, journal: AnswerJournal) -> Iterator[Answer]:
    """The journal's answers, each held against the question that is asked now.

    Raises:
        UsageError: One answers another question than that of its number.
    """
    for answer in journal.answers():
        if answer.digest != plan.request(answer.number).digest():
            raise UsageError(
                f"{journal.path} holds an answer to another question than number {answer.number} "
                "is now. Start over with --resume never, or name another --run.folder."
            )
        yield answer


def understood(found: Tally) -> str:
    """How the answers were understood, in one line."""
    parts = (f"{kind} {count}" for kind, count in sorted(found.kinds.items()))
    return f"understood: {', '.join(parts) or 'nothing'}"


def facts(session: Session, journal: AnswerJournal) -> RunFacts:
    """What result.json says of the run itself; the model's memory is its server's, and not seen."""
    config, spent = session.config, journal.spent(session.config.client)
    cost: dict[str, Any] = {
        "train_seconds": 0.0,
        "ask_seconds": asked_seconds(session.folder),
        "trainable_parameters": 0,
        **as_dict(spent),
        "encoder": {"model": config.server.model, "weights": reader_of(config)},
    }
    return RunFacts(
        name=session.folder.name,
        label=config.run.label,
        seed=config.run.seed,
        config=as_dict(config),
        data_source=config.data.source,
        split=config.split.method,
        filter_seen=str(config.evaluation.filter_seen).lower(),
        fit_on="train",
        selection="none",
        device="server",
        precision=config.server.dtype,
        cost=cost,
    )


def reader_of(config: ChatConfig) -> str:
    """What tells the model's files and the templates that it is asked with from any other's."""
    parts = [model_identity(config.server), templates_of(config.chat)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def main(argv: Sequence[str]) -> int:
    """Entry point of ``llmrec chat``."""
    return exit_code(run, argv)
