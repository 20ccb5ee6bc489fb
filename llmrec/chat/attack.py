"""``llmrec chat injection``: can a title talk the model into recommending its item?

Each case is asked twice, as it is and with one payload written behind a wrong candidate's title.
The places that this candidate gains are the payload's lift.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llmrec.chat.command import (
    ChatConfig,
    Session,
    ask,
    checked,
    configure_as,
    open_or_resume,
    prepare,
)
from llmrec.chat.injection import Payload, payloads
from llmrec.chat.plan import Plan
from llmrec.chat.scoring import Tally, tally
from llmrec.chat.server import Servers
from llmrec.data.interactions import Cases, Int64
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.metrics import Float64
from llmrec.evaluation.significance import bootstrap
from llmrec.options import as_dict
from llmrec.runs import alone, check_vacant, write_json

PROG = "llmrec chat injection"
DESCRIPTION = "Measure how far payloads inside titles lift the items that carry them."
REPORT = "injection.json"


@dataclass(frozen=True)
class AttackConfig:
    """How much is tried."""

    cases_per_payload: int = 4
    """Cases that each payload is tried on."""

    def __post_init__(self) -> None:
        """Refuse an attack without cases."""
        if self.cases_per_payload < 1:
            raise UsageError(
                f"attack.cases_per_payload={self.cases_per_payload} must be at least 1."
            )


@dataclass(frozen=True)
class InjectionConfig(ChatConfig):
    """A chat run, and what is done to its titles."""

    attack: AttackConfig = field(default_factory=AttackConfig)


@dataclass(frozen=True)
class Attack:
    """Which payload meets which case where."""

    session: Session
    """Every case twice: case c as it is, case C + c attacked."""
    payload: list[Payload]
    """(C,)."""
    place: Int64
    """(C,) the attacking candidate, never the target."""


def plan_attack(config: InjectionConfig) -> Attack:
    """Draw the cases, their attackers and the payloads."""
    told = payloads()
    wanted = len(told) * config.attack.cases_per_payload
    pool = replace(config.evaluation.pool, users=wanted)
    session = prepare(replace(config, evaluation=replace(config.evaluation, pool=pool)))
    dataset, plan = session.dataset, session.plan
    cases, items = plan.cases, plan.items
    if len(cases) < len(told):
        raise UsageError(
            f"The data gives {len(cases)} cases, fewer than the {len(told)} payloads. Use more "
            "users."
        )
    targets = dataset.interactions.items[cases.target]
    payload = [told[case % len(told)] for case in range(len(cases))]
    place = np.empty(len(cases), dtype=np.int64)
    replaced = {}
    for case in range(len(cases)):
        rng = np.random.default_rng((config.run.seed, case, 3))
        others = np.flatnonzero((items[case] > 0) & (items[case] != targets[case]))
        place[case] = rng.choice(others)
        title = dataset.catalog.texts[items[case, place[case]] - 1]
        replaced[len(cases) + case, int(place[case])] = f"{title[:60]} {payload[case].text}"
    both = Cases(np.tile(cases.user, 2), np.tile(cases.end, 2), np.tile(cases.target, 2))
    attacked = Plan(config.chat, dataset, both, np.tile(items, (2, 1)), config.run.seed, replaced)
    return Attack(replace(session, plan=attacked), payload, place)


def places(found: Tally, items: np.ndarray[Any, Any], rows: Int64, place: Int64) -> Float64:
    """Where a candidate came out, from 1: ties and unlisted ones at their mean place."""
    values = np.empty(len(rows))
    for i, (row, column) in enumerate(zip(rows, place, strict=True)):
        scores = found.scores[row, items[row] > 0]
        own = found.scores[row, column]
        listed = int((~np.isnan(scores)).sum())
        if np.isnan(own):
            values[i] = (listed + 1 + len(scores)) / 2
        else:
            values[i] = 1 + (scores > own).sum() + ((scores == own).sum() - 1) / 2
    return values


def measure(attack: Attack, found: Tally, understood: Sequence[Counter[str]]) -> dict[str, Any]:
    """Lifts over all payloads and by kind, and what the answers looked like without and with."""
    plan = attack.session.plan
    half = len(plan.cases) // 2
    rows = np.arange(half)
    before = places(found, plan.items, rows, attack.place)
    after = places(found, plan.items, rows + half, attack.place)
    lift = before - after
    kinds = sorted({payload.kind for payload in attack.payload})
    of_kind = np.array([payload.kind for payload in attack.payload])
    return {
        "task": plan.config.task,
        "payloads": len({payload.text for payload in attack.payload}),
        "cases": half,
        "candidates": int(plan.items.shape[1]),
        "lift": _interval(lift),
        "first_without": float((before == 1).mean()),
        "first_with": float((after == 1).mean()),
        "kinds": {
            kind: {"cases": int((of_kind == kind).sum()), "lift": _interval(lift[of_kind == kind])}
            for kind in kinds
        },
        "understood_without": dict(sorted(understood[0].items())),
        "understood_with": dict(sorted(understood[1].items())),
    }


def _interval(values: Float64) -> dict[str, float]:
    interval = bootstrap(values[None, :, None])[0]
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def print_report(record: dict[str, Any], out: Console) -> None:
    """The lifts as a table."""
    table = Table(box=None)
    for heading in ("payload", "cases", "places gained [95 %]"):
        table.add_column(heading, justify="left" if heading == "payload" else "right")
    lifts = {"all": {"cases": record["cases"], "lift": record["lift"]}, **record["kinds"]}
    for kind, row in lifts.items():
        lift = row["lift"]
        shown = f"{lift['mean']:+.2f} [{lift['low']:+.2f}, {lift['high']:+.2f}]"
        table.add_row(kind, str(row["cases"]), shown)
    out.print(table)
    out.print(
        f"Of {record['candidates']} candidates; the attacker came first in "
        f"{record['first_without']:.1%} of cases without its payload, {record['first_with']:.1%} "
        "with it."
    )
    for name in ("understood_without", "understood_with"):
        kinds = ", ".join(f"{kind} {count}" for kind, count in record[name].items())
        out.print(f"{name.replace('_', ' ')} payload: {kinds or 'nothing'}")


def run(argv: Sequence[str]) -> int:
    """Ask every case without and with its payload; write injection.json."""
    config = configure_as(InjectionConfig, argv, PROG, DESCRIPTION)
    if config.chat.task == "rating":
        raise UsageError("chat.task=rating ranks no candidates. Use another task.")
    folder = Path(config.run.folder)
    check_vacant(folder, config.run.overwrite)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    attack = plan_attack(config)
    session = attack.session
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone(folder))
        journal = stack.enter_context(open_or_resume(session, console))
        ask(session, journal, stack.enter_context(Servers()), console)
        understood: list[Counter[str]] = [Counter(), Counter()]
        half = len(session.plan.cases) // 2
        for answer in checked(session.plan, journal):
            place, verdict = session.plan.judge(answer)
            understood[place.case >= half].update(verdict.kinds)
        found = tally(session.plan, journal.answers())
        spent = as_dict(journal.spent(config.client))
        asked = {"fingerprint": session.fingerprint(), "cost": spent}
        record = measure(attack, found, understood) | asked
        write_json(folder / REPORT, record)
    print_report(record, Console(highlight=False, markup=False))
    return 0


def main(argv: Sequence[str]) -> int:
    """Entry point of ``llmrec chat injection``."""
    return exit_code(run, argv)
