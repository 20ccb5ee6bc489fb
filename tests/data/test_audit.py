"""Each check finds its planted fault, and is silent where nothing is wrong."""

import json
import math
import random
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llmrec.data.audit.command import CHECKS, audit, main
from llmrec.data.audit.findings import Finding
from llmrec.data.audit.sizes import cold_targets
from llmrec.data.columns import Columns, assemble
from llmrec.data.interactions import Dataset
from llmrec.data.item_text import parse_template
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.splits import SplitConfig, split

TITLE = parse_template("{# id: title | version: 1 | inputs: title #}\n{{ title }}", "title.jinja")
START = 1_600_000_000  # September 2020
LOO = SplitConfig()


@dataclass
class Shop:
    """A small data set to spoil: per user the items and times, per item the text."""

    items: list[list[str]]
    times: list[list[int]] | None
    texts: dict[str, str]
    minimum: int = 1
    ratings: list[float] | None = None
    reviews: dict[str, list[str]] = field(default_factory=dict)

    def rename(self, names: dict[str, str]) -> None:
        self.items = [[names[item] for item in history] for history in self.items]
        self.texts = {names[item]: text for item, text in self.texts.items()}

    def dataset(self) -> Dataset:
        ids = list(self.texts)
        users = [user for user, history in enumerate(self.items) for _ in history]
        rows = [ids.index(item) for history in self.items for item in history]
        times = None if self.times is None else np.array(list(chain(*self.times)), float)
        columns = Columns(
            np.array(users), np.array(rows), [f"u{user:04d}" for user in range(len(self.items))],
            ids, {"title": list(self.texts.values())}, times,
            ratings=None if self.ratings is None else np.float32(self.ratings),
            reviews={name: pl.Series(texts) for name, texts in self.reviews.items()},
        )  # fmt: skip
        return assemble("tiny", columns, TITLE, self.minimum, None)


def clean(seed: int = 0) -> Shop:
    """200 users with 8 to 15 of 40 items, no two times alike, targets later than all training."""
    draw = random.Random(seed)
    names = [f"k{number:03d}" for number in draw.sample(range(1000), 40)]
    items = [draw.sample(names, draw.randint(8, 15)) for _ in range(200)]
    items[0] = draw.sample(names, 16)  # the longest is no pile
    day = 86_400
    moments = draw.sample(range(day), sum(map(len, items)))
    times = []
    for history in items:
        mine = sorted(moments.pop() for _ in history)
        mine[-2] += day  # validation on the second day, test on the third
        mine[-1] += 2 * day
        times.append([START + moment for moment in mine])
    words = "amber birch cedar delta ember flint grove heath".split()
    texts = {
        name: f"{words[row % 8].title()} {words[row // 8]} lamp" for row, name in enumerate(names)
    }
    return Shop(items, times, texts)


def finding(check: str, shop: Shop, config: SplitConfig = LOO) -> Finding:
    data = shop.dataset()
    found = {f.check: f for f in audit(data, split(data, config))}
    return found[check]


# Plants: each spoils a clean shop in place.


def tied_pairs(shop: Shop) -> None:
    for times in shop.times:
        times[1] = times[0]


def sort_all(shop: Shop) -> None:
    shop.items = [sorted(history) for history in shop.items]


def ids_by_time(shop: Shop) -> None:
    sort_all(shop)
    shop.times = [[1_600_000_000 + 86_400 * int(i[1:]) for i in h] for h in shop.items]


def sort_all_without_times(shop: Shop) -> None:
    sort_all(shop)
    shop.times = None


def sort_all_at_one_time(shop: Shop) -> None:
    sort_all(shop)
    one_time(shop)


def sort_all_backwards_by_number(shop: Shop) -> None:
    shop.times = None
    shop.rename({name: f"k{int(name[1:])}" for name in shop.texts})  # k7, k45: no order of texts
    shop.items = [sorted(history, key=lambda name: -int(name[1:])) for history in shop.items]


def sort_some(shop: Shop) -> None:
    shop.times = None
    shop.items[:20] = [sorted(history) for history in shop.items[:20]]


def sort_ties(shop: Shop) -> None:
    for history, times in zip(shop.items, shop.times, strict=True):
        times[:4] = [times[0]] * 4
        history[:4] = sorted(history[:4])


def one_time(shop: Shop) -> None:
    shop.times = [[START] * len(times) for times in shop.times]


def one_late_time(shop: Shop) -> None:
    shop.times[3][-1] += 10 * 365 * 86_400


def one_zero_time(shop: Shop) -> None:
    shop.times[3][0] = 0


def times_from_zero(shop: Shop) -> None:
    shop.times = [[time - START for time in times] for times in shop.times]


def whole_days(shop: Shop) -> None:
    shop.times = [[time // 86_400 * 86_400 for time in times] for times in shop.times]


def import_at_once(shop: Shop) -> None:
    for times in shop.times[:30]:
        times[0] = START - 1


def same_twice(shop: Shop) -> None:
    for history in shop.items:
        history[1] = history[0]


def same_later(shop: Shop) -> None:
    for history in shop.items[:5]:
        history[3] = history[0]


def last_is_first(shop: Shop) -> None:
    for history in shop.items:
        history[-1] = history[0]


def doubled_rows(shop: Shop) -> None:
    for user in range(3):
        shop.items[user][1], shop.times[user][1] = shop.items[user][0], shop.times[user][0]


def a_double(shop: Shop) -> None:
    shop.items[7], shop.times[7] = shop.items[5][:], shop.times[5][:]


def short_users(shop: Shop) -> None:
    shop.minimum = 14


def nobody_meets(shop: Shop) -> None:
    shop.texts["k9999"] = "Unseen thing"


def a_rare_item(shop: Shop) -> None:
    shop.texts["k9999"] = "Rare thing"
    shop.items[0][0] = "k9999"


def cut_at_eleven(shop: Shop) -> None:
    shop.items = [history[:11] for history in shop.items]
    shop.times = [times[:11] for times in shop.times]


def longest_of_many(shop: Shop) -> None:
    shop.items[0], shop.times[0] = shop.items[0][:15], shop.times[0][:15]


def one_item_everywhere(shop: Shop) -> None:
    for history in shop.items:
        history[::3] = ["k9999"] * len(history[::3])
    shop.texts["k9999"] = "Shopping bag"


def new_last_item(shop: Shop) -> None:
    shop.texts["k9999"] = "Latest thing"
    for history in shop.items[:50]:
        history[-1] = "k9999"


def two_ratings_missing(shop: Shop) -> None:
    shop.ratings = [math.nan, math.nan] + [4.0] * (sum(map(len, shop.items)) - 2)


def users_one_after_another(shop: Shop) -> None:
    for user, times in enumerate(shop.times):
        times[:] = [moment + user * 86_400 for moment in times]


def next_is_the_answer(shop: Shop) -> None:
    order = sorted(shop.texts)
    for history in shop.items[:40]:
        history[-1] = order[order.index(max(history[:-1])) + 1 - len(order)]


def number_along_users(shop: Shop) -> None:
    met = list(dict.fromkeys(chain(*shop.items)))
    shop.rename({name: str(row + 1) for row, name in enumerate(met)})


def number_along_training(shop: Shop) -> None:
    met = list(dict.fromkeys(chain(*(history[:-2] for history in shop.items))))
    shop.rename({name: str(row + 1) for row, name in enumerate(met)})


def number_rare_targets_along(shop: Shop) -> None:
    """Most test targets are the first to meet their item, so that its number tells of them."""
    for user, history in enumerate(shop.items):
        history[-1] = f"m{user}"
        shop.texts[f"m{user}"] = f"Single lamp {user}"
        history[0] = f"m{user - 1}" if user else history[0]
    number_along_users(shop)
    shop.rename({name: f"i_{name}" for name in shop.texts})


def text(planted: str, count: int = 1) -> Callable[[Shop], None]:
    """Give the first items this text, ITEM standing for the item's id."""

    def plant(shop: Shop) -> None:
        for name in sorted(shop.texts)[:count]:
            shop.texts[name] = planted.replace("ITEM", name)

    return plant


def own_ids(shop: Shop) -> None:
    for name in list(shop.texts)[:6]:
        shop.texts[name] += f" ({name})"


def all_empty(shop: Shop) -> None:
    shop.texts = dict.fromkeys(shop.texts, "")


PLANTED = [  # check, plant, verdict, count
    ("ties", tied_pairs, "warning", 400),
    ("ties", sort_ties, "warning", 800),
    ("sorted sequences", sort_all, "fault", 200),  # the times do not explain it
    ("sorted sequences", ids_by_time, "note", 200),  # they do
    ("sorted sequences", sort_all_without_times, "fault", 200),
    ("sorted sequences", sort_all_at_one_time, "fault", 200),
    ("sorted sequences", sort_all_backwards_by_number, "fault", 200),
    ("sorted sequences", sort_some, "warning", 20),
    ("sorted ties", sort_ties, "fault", 200),
    ("time values", one_time, "fault", None),
    ("time values", one_late_time, "warning", 1),
    ("time values", one_zero_time, "warning", 1),
    ("time values", times_from_zero, "note", None),
    ("time values", whole_days, "note", None),
    ("bulk times", import_at_once, "warning", 30),
    ("repeats", same_twice, "warning", 200),
    ("repeats", same_later, "note", 5),
    ("repeated targets", last_is_first, "warning", 200),
    ("duplicate rows", doubled_rows, "warning", 3),
    ("duplicate users", a_double, "warning", 2),
    ("users dropped", short_users, "warning", None),
    ("unmet items", nobody_meets, "note", 1),
    ("rare items", a_rare_item, "note", 1),
    ("core", lambda shop: None, "note", 0),
    ("lengths", cut_at_eleven, "note", 0),
    ("popularity", one_item_everywhere, "warning", None),
    ("target-only items", new_last_item, "note", 1),
    ("cold targets", new_last_item, "warning", 50),
    ("told", two_ratings_missing, "note", 2),
    ("training after test", users_one_after_another, "warning", 197),
    ("next number", next_is_the_answer, "fault", None),
    ("next number", number_rare_targets_along, "fault", None),
    ("numbered along users", number_along_users, "fault", 39),
    ("numbered along users", number_along_training, "note", None),
    ("numbered in time", users_one_after_another, "note", 0),
    ("empty texts", text(""), "note", 1),
    ("empty texts", text("", count=4), "warning", 4),
    ("empty texts", all_empty, "note", 40),
    ("short texts", text("x"), "warning", 1),
    ("shared texts", text("Same lamp", count=3), "warning", 3),
    ("codes as texts", text("https://shop.example/lamp?id=3"), "warning", 1),
    ("codes as texts", text("B000123ABC"), "warning", 1),
    ("codes as texts", text("item_7"), "warning", 1),
    ("ids in texts", own_ids, "fault", 6),
    ("markup", text("Tom &amp; Jerry"), "warning", 1),
    ("markup", text("A <b>bold</b> lamp"), "warning", 1),
    ("markup", text("Caf&#233; lamp"), "warning", 1),
    ("encoding", text("Café lamp".encode().decode("latin-1")), "warning", 1),
    ("encoding", text("Kai\u2019s lamp".encode().decode("cp1252")), "warning", 1),
    ("encoding", text("Mis\ufffdrables"), "warning", 1),
    ("control characters", text("Lamp \x07 bell"), "warning", 1),
    ("control characters", text("Lamp \u200bbell"), "warning", 1),
]


@pytest.mark.parametrize(("check", "plant", "verdict", "count"), PLANTED)
def test_a_check_finds_what_is_planted_and_only_then(
    check: str, plant: Callable[[Shop], None], verdict: str, count: int | None
) -> None:
    shop = clean()
    healthy = deepcopy(shop)
    if check == "core":  # as every user and item of the clean shop has three or more
        a_rare_item(healthy)
    before = finding(check, healthy)
    assert (before.verdict, before.remedy, before.example) == ("ok", "", "")
    plant(shop)
    after = finding(check, shop)
    assert after.verdict == verdict, after.found
    assert after.remedy
    assert count in (None, after.count), after.found


def test_every_check_has_a_planted_fault_and_a_name_of_its_own() -> None:
    data = clean().dataset()
    names = [found.check for found in audit(data, split(data, LOO))]
    assert len(set(names)) == len(names) == len(CHECKS)
    assert set(names) == {check for check, *_ in PLANTED}


@pytest.mark.parametrize(
    ("check", "plant"),
    [
        ("short texts", text("猫の灯")),
        ("codes as texts", text("1984")),
        ("codes as texts", text("Area51 lamp 12345")),
        ("codes as texts", text("Terminator2")),
        ("markup", text("AT&T; 3 < 5 > 2 <3")),
        ("markup", text("R&B; Drum & Bass")),
        ("encoding", text("Ça va? NAÏVE São Tomé ÅÄÖ 猫 и кот 🎮")),
        ("control characters", text("👩\u200d🎤 \u0645\u06cc\u200c\u062e")),
        ("ids in texts", text("prefixITEM", count=8)),
        ("ids in texts", text("ITEMsuffix", count=8)),
        ("bulk times", whole_days),
        ("lengths", longest_of_many),
    ],
)
def test_what_is_unusual_but_healthy_is_no_finding(
    check: str, plant: Callable[[Shop], None]
) -> None:
    shop = clean()
    plant(shop)
    assert finding(check, shop).verdict == "ok"


@pytest.mark.parametrize("mark", ["", "i-"])
def test_a_films_year_that_is_an_items_number_is_an_accident(mark: str) -> None:
    shop = clean()
    shop.rename({name: f"{mark}{1960 + row}" for row, name in enumerate(shop.texts)})
    years = random.Random(2)
    shop.texts = {
        name: f"Film {name[::-1]} ({mark}{years.randint(1960, 1999)})" for name in shop.texts
    }
    shop.texts[f"{mark}1960"] = f"Film of that year ({mark}1960)"
    found = finding("ids in texts", shop)
    assert found.verdict == "ok" and found.count >= 1
    assert "chance gives 1" in found.found or "chance gives 0.9" in found.found


def test_ratings_and_texts_are_counted() -> None:
    shop = Shop([["a", "b", "a"]], None, {"a": "A", "b": "B"})
    assert finding("told", shop).found == "no interaction has a rating; there are no texts"
    shop.ratings = [4.0, math.nan, 1.0]
    shop.reviews = {"review": ["good", "", "bad"], "feature": ["", "", "fit"]}
    assert finding("told", shop).found == (
        "1 of 3 (33.3 %) interactions have no rating; of texts there are 2 review, 1 feature"
    )


def test_targets_left_out_as_cold_are_counted() -> None:
    data = load_dataset(DataConfig())
    cut = split(data, SplitConfig(method="temporal"))
    left_out = sum(cut.counts[f"{part}_dropped_cold"] for part in ("valid", "test"))
    found = cold_targets(data, cut)
    kept = sum(cut.counts[f"{part}_targets_cold"] for part in ("valid", "test"))
    assert left_out and found.count == left_out + kept
    assert found.of == len(cut.valid) + len(cut.test) + left_out
    assert f"{left_out} of them left out as cold" in found.found


def test_the_rule_and_its_chance_are_those_of_a_plain_loop() -> None:
    shop = clean()
    next_is_the_answer(shop)
    order = {name: place for place, name in enumerate(sorted(shop.texts))}
    histories = [[order[item] for item in history] for history in shop.items]
    guesses = [max(history[:-1]) + 1 for history in histories]
    hits = sum(guess == h[-1] for guess, h in zip(guesses, histories, strict=True))
    pairs = sum(guess == h[-1] for guess in guesses for h in histories)
    found = finding("next number", shop)
    assert found.count == hits >= 20
    assert f"chance gives {pairs / len(histories):.2g}" in found.found


def test_chance_counts_the_orders_of_sequences_with_repeats() -> None:
    # a b c d e: sorted in 1 of 5! orders; a a b b c: in 2! 2! of 5!, too often to be judged
    shop = Shop([list("abcde"), list("aabbc")], None, {c: c * 3 for c in "abcde"})
    found = finding("sorted sequences", shop)
    assert (found.count, found.of) == (1, 1)
    shop.items *= 200
    assert "chance gives 1.7" in finding("sorted sequences", shop).found  # 200 / 120
    assert finding("sorted sequences", shop).verdict == "fault"


def test_the_average_share_of_training_after_a_target_is_exact() -> None:
    # times of:        training      valid test
    shop = Shop(
        [list("abcd"), list("dcba")],
        [[START + t for t in (1, 2, 3, 4)], [START + t for t in (4, 5, 6, 7)]],
        {c: c * 3 for c in "abcd"},
    )
    found = finding("training after test", shop)  # training at 1, 2, 4, 5; tests at 4 and 7
    assert (found.count, found.of) == (1, 2)
    assert "before 12.5 % of training; 1 of 4 training" in found.found  # (1/4 + 0) / 2
    assert found.found.endswith("0 after all")


def test_the_temporal_split_trains_on_nothing_later() -> None:
    shop = clean()
    for user, times in enumerate(shop.times):
        times[:] = sorted(time + 7200 * (user % 40) for time in times)
    assert finding("training after test", shop).verdict != "ok"
    found = finding("training after test", shop, SplitConfig(method="temporal"))
    assert (found.verdict, found.count) == ("ok", 0)


def test_without_times_what_needs_them_is_skipped_not_passed() -> None:
    shop = clean()
    shop.times = None
    data = shop.dataset()
    skipped = {f.check for f in audit(data, split(data, LOO)) if f.verdict == "skipped"}
    assert skipped == {
        "ties", "sorted ties", "time values", "bulk times", "duplicate rows",
        "training after test", "numbered in time",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("items", "times"),
    [
        ([["a", "a", "a"]], [[5, 5, 5]]),
        ([["a", "b", "a"]], None),
        ([["a", "b", "c"], ["a"], ["b", "b"]], [[-9, 0, 2], [7], [4_000_000_000, 10**11]]),
        ([["a", "b", "c", "d", "e", "f"]] * 3, [[0, 1, 2, 3, 4, 5]] * 3),
    ],
)
@pytest.mark.parametrize("words", ["", "lamp"])
def test_the_smallest_data_are_audited_too(
    items: list[list[str]], times: list[list[int]] | None, words: str
) -> None:
    data = Shop(items, times, dict.fromkeys(sorted({*chain(*items)}), words)).dataset()
    assert len(audit(data, split(data, LOO))) == len(CHECKS)


def test_random_data_raises_no_false_alarm(figure: Callable[[str, object], None]) -> None:
    seeds, alarms = range(40), []
    for seed in seeds:
        data = clean(seed).dataset()
        found = audit(data, split(data, LOO))
        alarms += [f.check for f in found if f.verdict != "ok" and f.check != "core"]
    figure("alarms on random data without faults", f"{len(alarms)} of {40 * len(CHECKS)} checks")
    assert not alarms


def test_the_simulated_shop_has_what_its_maker_put_in_and_nothing_else() -> None:
    data = load_dataset(DataConfig())
    found = audit(data, split(data, LOO))
    assert [f.check for f in found if f.verdict in ("warning", "fault")] == ["training after test"]
    notes = {f.check for f in found if f.verdict == "note"}
    assert {"repeats", "cold targets", "empty texts"} <= notes


def write(folder: Path, shop: Shop) -> str:
    folder.mkdir()
    rows = [
        f"u{user},{item},{moment}"
        for user, (items, times) in enumerate(zip(shop.items, shop.times, strict=True))
        for item, moment in zip(items, times, strict=True)
    ]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    rows = [f"{item},{title}" for item, title in shop.texts.items()]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *rows]))
    return str(folder)


def test_the_command_prints_a_row_per_check_and_writes_the_same_to_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = clean()
    sort_all_at_one_time(shop)
    shop.texts[sorted(shop.texts)[0]] = "Tom &amp; [bold]Jerry[/nonsense]"
    source, out = write(tmp_path / "shop", shop), tmp_path / "deep" / "audit.json"
    assert main(["--data.source", source, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["data"] == "shop" and written["config"]["split"]["method"] == "leave_one_out"
    by_name = {record["check"]: record for record in written["findings"]}
    assert len(by_name) == len(CHECKS)
    for name, record in by_name.items():
        assert f"\n {name} " in shown
        assert " ".join(record["found"].split()[:3]) in shown
    assert by_name["sorted sequences"]["verdict"] == "fault"
    assert by_name["sorted sequences"]["share"] == 1
    assert "-> bring the real order" in shown
    assert "[bold]" in shown  # a title is no markup of the table's
    verdicts = [record["verdict"] for record in by_name.values()]
    assert shown.rstrip().endswith(f" notes, {verdicts.count('ok')} ok")
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("plant", "codes"),
    [  # exit codes for fail_on never, fault, warning
        (lambda shop: None, (0, 0, 0)),
        (tied_pairs, (0, 0, 1)),
        (one_time, (0, 1, 1)),
    ],
)
def test_the_exit_code_says_what_was_asked_of_it(
    plant: Callable[[Shop], None], codes: tuple[int, ...], tmp_path: Path
) -> None:
    shop = clean()
    plant(shop)
    source = write(tmp_path / "shop", shop)
    for level, code in zip(("never", "fault", "warning"), codes, strict=True):
        assert main(["--data.source", source, "--fail_on", level]) == code, level
    assert main(["--data.source", source]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--data.source", "nowhere"],
        ["--fail_on", "note"],
        ["--split.method", "temporal", "--split.test_share", "2"],
        ["--json", "/dev/null/audit.json"],
    ],
)
def test_what_cannot_be_audited_is_one_sentence_and_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("llmrec: ") and said.count("\n") == 1


# Real data: check -> verdict and count, where not ok or skipped.
REAL = {
    "ml-100k": {
        "ties": ("warning", 75_772),
        "training after test": ("warning", 942),
    },
    "ml-1m": {
        "encoding": ("warning", 38),  # Mis?rables
    },
    "amazon-beauty-2014": {
        "sorted sequences": ("warning", 2_939),  # by ascending id; hardly any descend
    },
    "amazon-games-2018": {
        "next number": ("warning", 836),
        "numbered along users": ("fault", 11_446),  # this copy's ids are numbers given so
        "markup": ("warning", 718),
    },
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_real_data_has_these_faults_and_no_others(
    name: str, data_root: Path, figure: Callable[[str, object], None]
) -> None:
    if not (data_root / name).is_dir():
        pytest.skip(f"no real data: {data_root} holds no {name}")
    text = "movielens_atomic" if name == "ml-100k" else "title"
    data = load_dataset(DataConfig(source=str(data_root / name), item_text=text))
    cut = split(data, LOO)
    began = time.perf_counter()
    findings = audit(data, cut)
    figure(f"{name}: audited in", f"{time.perf_counter() - began:.1f} s")
    serious = {f.check: f for f in findings if f.verdict in ("warning", "fault")}
    for check, found in serious.items():
        figure(f"{name}: {check}", f"{found.verdict}: {found.found}")
    assert {check: (f.verdict, f.count) for check, f in serious.items()} == REAL[name]
