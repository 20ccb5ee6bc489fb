"""``llmrec chat show --run R --case N``: prompt, answer, parse and verdict for a person to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from llmrec.chat.command import ANSWERS, ChatConfig, Session, prepare
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.plan import Plan
from llmrec.chat.requests import Answer
from llmrec.errors import UsageError, exit_code
from llmrec.options import parse
from llmrec.runs import CONFIG

PROG, DESCRIPTION = "llmrec chat show", "Show what was asked about one case and what came back."


@dataclass(frozen=True)
class ShowConfig:
    """Which case of which run."""

    run: str = ""
    """Folder of a chat run, finished or not."""
    case: int = 0
    """Number of the case, from 0, in the order of per_user.parquet."""


def reopen(folder: Path) -> Session:
    """What a chat run's folder asked, from its config.

    Raises:
        UsageError: The folder holds no chat run.
    """
    if not (folder / CONFIG).is_file() or not (folder / ANSWERS).is_file():
        raise UsageError(
            f"--run {folder} holds no chat run ({CONFIG} or {ANSWERS} is missing). Name the folder "
            "of one, such as runs/all_systems/chat-0."
        )
    if (folder / "injection.json").exists():
        raise UsageError(
            f"--run {folder} is an injection run, whose cases stand in injection.json."
        )
    config, _ = parse(ChatConfig, ["--config", str(folder / CONFIG)], PROG, DESCRIPTION)
    return prepare(config)


def told(plan: Plan, case: int, answers: Mapping[int, Answer]) -> Iterator[tuple[str, str]]:
    """The case as (heading, text) in reading order."""
    interactions, cases = plan.dataset.interactions, plan.cases
    target = int(interactions.items[cases.target[case]])
    title = plan.dataset.catalog.texts[target - 1]
    yield "case", f"{case}, user {plan.dataset.user_ids[cases.user[case]]}, truth: {title}"
    first, last = int(plan.starts[case]), int(plan.starts[case + 1])
    for number in range(first, last):
        place = plan.place(number)
        yield (
            f"prompt (request {number}, order {place.shuffle}, part {place.part})",
            plan.request(number).prompt,
        )
        answer = answers.get(number)
        if answer is None:
            yield "answer", "none yet"
            continue
        if answer.digest != plan.request(number).digest():
            yield "beware", "another prompt was sent: a template or the data has changed since"
        yield "answer", answer.text or answer.problem or "(empty)"
        yield "as sent", _facts(answer)
        _, verdict = plan.judge(answer)
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(verdict.kinds.items()))
        yield "understood", kinds or "nothing"
        best = sorted(verdict.scores, key=lambda place: -verdict.scores[place])
        shown = [f"{verdict.scores[place]:.4g}  {_mark(plan, case, place)}" for place in best]
        yield "scores", "\n".join(shown) or "none: the target counts as missed"


def _mark(plan: Plan, case: int, place: int) -> str:
    interactions = plan.dataset.interactions
    item = int(plan.items[case, place])
    star = " <- the truth" if item == interactions.items[plan.cases.target[case]] else ""
    if plan.config.task == "rating":
        return f"stars predicted; given: {plan.question(case, 0).stars:g}"
    return f"{plan.dataset.catalog.texts[item - 1]}{star}"


def _readable(text: str) -> str:
    """Text as a terminal may show it: what would steer it is written out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _facts(answer: Answer) -> str:
    facts = [
        answer.status,
        f"{answer.attempts} attempts" if answer.attempts != 1 else "1 attempt",
        f"{answer.seconds:.2f} s",
        f"{answer.prompt_tokens} tokens in, {answer.completion_tokens} out",
    ]
    if answer.top:
        shown = ", ".join(f"{token!r} {value:.2f}" for token, value in answer.top[:6])
        facts.append(f"first token: {shown}")
    return "; ".join(facts)


def _show(argv: Sequence[str]) -> int:
    config, given = parse(ShowConfig, argv, PROG, DESCRIPTION)
    if "run" not in given:
        raise UsageError("--run is missing: name the folder of a chat run.")
    folder = Path(config.run)
    session = reopen(folder)
    plan = session.plan
    if not 0 <= config.case < len(plan.cases):
        raise UsageError(
            f"--case {config.case}: {folder} has cases 0 to {len(plan.cases) - 1}. Name one."
        )
    first, last = int(plan.starts[config.case]), int(plan.starts[config.case + 1])
    answers = AnswerJournal.peek(folder / ANSWERS, range(first, last))
    out = Console(soft_wrap=True, highlight=False)
    for heading, text in told(plan, config.case, answers):
        out.print(escape(f"--- {heading}"), style="bold")
        out.print(escape(_readable(text)))
    return 0


def main(argv: Sequence[str]) -> int:
    """Entry point of ``llmrec chat show``."""
    return exit_code(_show, argv)
