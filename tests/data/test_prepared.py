"""A source read once and opened many times is the same data, whole, or not there at all."""

import io
import json
import pickle
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import small_runs

from llmrec import train_tcf
from llmrec.data import prepared
from llmrec.data.interactions import Dataset
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.simulated import SimulatedConfig
from llmrec.errors import UsageError
from llmrec.runs import MANIFEST, sha256_of, write_manifest

SMALL = SimulatedConfig(users=40, items=240)
FILES = [
    "items.npy", "offsets.npy", "timestamps.npy", "catalog.parquet", "users.parquet",
    "dataset.json", "manifest.json",
]  # fmt: skip
"""What simulated data becomes: it has times and no ratings."""


def write(out: Path, config: DataConfig) -> Path:
    prepared.write_prepared(out, load_dataset(config), config)
    return out


def reopen(folder: Path, **options: object) -> Dataset:
    return load_dataset(DataConfig(source=str(folder), **options))


def assert_equal(one: Dataset, other: Dataset) -> None:
    for name in ("items", "offsets", "timestamps", "ratings"):
        a, b = (getattr(data.interactions, name) for data in (one, other))
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b)
    assert one.catalog == other.catalog
    assert list(one.catalog.fields) == list(other.catalog.fields)
    assert (one.name, one.user_ids, one.order) == (other.name, other.user_ids, other.order)
    assert list(one.counts.items()) == list(other.counts.items())
    assert one.fingerprint() == other.fingerprint()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder that tests only read."""
    return write(tmp_path_factory.mktemp("prepared") / "shop", DataConfig(simulated=SMALL))


@pytest.fixture
def shop(simulated: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(simulated, tmp_path / "shop"))


def vouch(folder: Path) -> None:
    """Let the manifest agree with the files as they are: what only a deliberate hand does."""
    files = [file for file in sorted(folder.iterdir()) if file.name != MANIFEST]
    hashes = {file.name: sha256_of(file) for file in files}
    write_manifest(folder, hashes)


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(UsageError) as error:
        reopen(folder, **options)
    return str(error.value)


def test_simulated_data_comes_back_as_it_was_read(simulated: Path) -> None:
    config = DataConfig(simulated=SMALL)
    assert sorted(file.name for file in simulated.iterdir()) == sorted(FILES)
    assert_equal(reopen(simulated), load_dataset(config))


CSV = (  # a title in three scripts, an empty one, quotes, and fields named like our columns
    "user_id,item_id,title,id,text\n"
    "ü,b,Ça va? 猫 и кот,1,x\n"
    'ü,a,,2,"say ""hi"",\nthen go"\n'
    "007,b,Ça va? 猫 и кот,1,x\n"
    "007,a,,2,\n"
    "7,c,🎮 Zelda,,y\n"
)


def test_odd_texts_and_ids_come_back_from_a_table_without_times_and_ratings(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(CSV, encoding="utf-8")
    config = DataConfig(source=str(tmp_path / "mine.csv"), min_user_interactions=1)
    folder = write(tmp_path / "prepared", config)
    assert not {"timestamps.npy", "ratings.npy"} & {file.name for file in folder.iterdir()}
    again = reopen(folder)
    assert_equal(again, load_dataset(config))
    assert again.catalog.texts == ["", "Ça va? 猫 и кот", "🎮 Zelda"]
    assert list(again.catalog.fields) == ["title", "id", "text"]
    assert again.user_ids == ["007", "7", "ü"]


def test_times_and_ratings_come_back_with_missing_ratings(tmp_path: Path) -> None:
    rows = ["user_id,item_id,timestamp,rating", "u,a,30,4.5", "u,b,10,", "v,a,20,1", "v,a,20,2"]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    config = DataConfig(source=str(tmp_path / "mine.csv"), min_user_interactions=2)
    again = reopen(write(tmp_path / "prepared", config))
    assert_equal(again, load_dataset(config))
    assert again.interactions.timestamps.tolist() == [10, 30, 20, 20]
    np.testing.assert_array_equal(again.interactions.ratings, np.float32([np.nan, 4.5, 1, 2]))


def test_a_changed_copy_of_opened_data_has_a_fingerprint_of_its_own(
    simulated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = reopen(simulated)
    other = replace(data, user_ids=[*data.user_ids[:-1], "somebody else"])
    assert other.fingerprint() != data.fingerprint()
    assert replace(data, name="renamed").fingerprint() == data.fingerprint()
    monkeypatch.setattr("hashlib.sha256", None)  # opened data needs no hashing
    assert len(data.fingerprint()) == 64


def test_arrays_are_mapped_and_cannot_be_written_to(simulated: Path) -> None:
    items = reopen(simulated).interactions.items
    assert isinstance(items.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        items[0] = 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_user_interactions": 10}, "data.min_user_interactions=10 but {} was prepared with 7"),
        ({"max_user_interactions": 3}, "data.max_user_interactions=3 but {} was prepared with all"),
        ({"order": "file"}, "data.order=file but {} was prepared with auto"),
        ({"item_text": "titel"}, "data.item_text=titel but {} was prepared with title"),
        (
            {"simulated": SimulatedConfig(users=41, items=240)},
            "data.simulated.users=41 but {} was prepared with 40",
        ),
    ],
)
def test_an_option_that_disagrees_is_refused(
    tmp_path: Path, options: dict[str, object], said: str
) -> None:
    folder = write(tmp_path / "shop", DataConfig(simulated=SMALL, min_user_interactions=7))
    way_out = ". Leave it out, or prepare the data again with it."
    assert refusal(folder, **options) == said.format(folder) + way_out


def test_options_left_out_or_equal_are_accepted_and_the_prepared_ones_are_kept(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "shop", DataConfig(simulated=SMALL, min_user_interactions=7))
    left_out = reopen(folder)
    assert_equal(left_out, reopen(folder, min_user_interactions=7, simulated=SMALL))
    assert left_out.prepared_with["min_user_interactions"] == 7
    assert left_out.prepared_with["simulated"]["users"] == 40


def test_a_sample_comes_back_with_the_options_that_drew_it(tmp_path: Path) -> None:
    config = DataConfig(simulated=SMALL, sample_users=12, sample_seed=5)
    folder = write(tmp_path / "shop", config)
    again = reopen(folder)
    assert_equal(again, load_dataset(config))
    assert len(again.user_ids) == 12
    assert_equal(again, reopen(folder, sample_seed=5))
    assert "data.sample_users=3 but" in refusal(folder, sample_users=3)
    assert "was prepared with 5" in refusal(folder, sample_users=12, sample_seed=6)


def test_a_template_edited_since_is_noticed_where_it_is_named(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{# id: mine | version: 1 | inputs: title #}\n{{ title }}")
    folder = write(tmp_path / "shop", DataConfig(simulated=SMALL, item_text=str(template)))
    reopen(folder, item_text=str(template))
    template.write_text("{# id: mine | version: 2 | inputs: title #}\nA {{ title }}")
    assert "is not what it was when" in refusal(folder, item_text=str(template))
    reopen(folder)


def test_every_truncation_and_flipped_bit_is_detected(
    shop: Path, figure: Callable[[str, object], None]
) -> None:
    rng = np.random.default_rng(0)
    missed, tried = [], 0
    for name in FILES:
        file = shop / name
        whole = file.read_bytes()
        damaged = [whole[:end] for end in (0, 1, len(whole) // 2, len(whole) - 1)]
        for bit in rng.integers(0, 8 * len(whole), 24):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << (bit % 8)
            damaged.append(bytes(flipped))
        for content in damaged:
            file.write_bytes(content)
            tried += 1
            try:
                reopen(shop)
                said = "nothing"
            except UsageError as error:
                said = str(error)
            named = str(file) in said
            missed += [] if named and "prepare it again" in said else [(name, content, said)]
        file.write_bytes(whole)
    reopen(shop)
    figure("truncations and flipped bits detected", f"{tried - len(missed)} of {tried}")
    assert not missed


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(shop: Path, name: str) -> None:
    (shop / name).unlink()
    assert f"{shop / name} is missing" in refusal(shop)


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return exec, (f"open({str(self.mark)!r}, 'w')", "")[:1]  # type: ignore[return-value]


def test_a_pickle_in_place_of_an_array_is_refused_and_not_executed(
    shop: Path, tmp_path: Path
) -> None:
    bomb = np.array([Bomb(tmp_path / "executed")], dtype=object)
    payloads = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(payloads[0], bomb, allow_pickle=True)  # an .npy file of objects
    pickle.dump(bomb, payloads[1])  # a bare pickle
    np.savez(payloads[2], items=bomb, allow_pickle=True)  # an archive of such
    for payload in payloads:
        (shop / "items.npy").write_bytes(payload.getvalue())
        assert "items.npy is damaged" in refusal(shop)
        vouch(shop)
        assert "items.npy" in refusal(shop)
    assert not (tmp_path / "executed").exists()
    pickle.loads(payloads[1].getvalue())
    assert (tmp_path / "executed").exists()  # the bomb works


@pytest.mark.parametrize(
    "array", [np.ones(3, np.int32), np.ones(4, np.int64), np.ones((2, 2), np.int32)]
)
def test_an_array_of_another_kind_is_refused_even_where_the_manifest_agrees(
    shop: Path, array: np.ndarray
) -> None:
    np.save(shop / "items.npy", array)
    vouch(shop)
    assert "items.npy does not hold" in refusal(shop)


def test_a_folder_of_a_later_layout_is_refused(shop: Path) -> None:
    about = json.loads((shop / "dataset.json").read_text())
    (shop / "dataset.json").write_text(json.dumps(about | {"format": 2}))
    vouch(shop)
    assert "has format 2, and this version of llmrec reads 1." in refusal(shop)


def test_a_source_with_a_manifest_of_its_own_is_no_prepared_folder(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text(CSV, encoding="utf-8")
    (tmp_path / "manifest.json").write_text("{}")
    assert reopen(tmp_path, min_user_interactions=1).user_ids == ["007", "7", "ü"]


def command(out: Path, *words: str) -> list[str]:
    return ["--data.simulated.users=40", "--data.simulated.items=240", *words, f"--out={out}"]


def test_the_command_says_what_it_wrote_and_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "in" / "shop"
    assert prepared.main(command(out, "--data.min_user_interactions=7")) == 0
    said, data = capsys.readouterr().out, reopen(out)
    assert f"{len(data.user_ids)} users, {data.item_count} items" in said
    assert data.fingerprint()[:12] in said
    assert f"{40 - len(data.user_ids)} users dropped too few interactions" in said


def test_an_existing_folder_is_refused_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert prepared.main(command(tmp_path / "mine")) == 2
    assert "exists already. Name another folder" in capsys.readouterr().err
    assert [file.read_text() for file in (tmp_path / "mine").iterdir()] == ["years of work"]
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_out_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared.main([]) == 2
    assert capsys.readouterr().err.startswith("llmrec: --out is missing. ")


def test_a_prepared_folder_is_not_prepared_again(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--data.source={simulated}", f"--out={tmp_path / 'again'}"]
    assert prepared.main(words) == 2
    assert "is prepared already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_the_files_that_were_read_are_on_record(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "interactions.csv").write_text(CSV, encoding="utf-8")
    (tmp_path / "source" / "notes.md").write_text("not data")
    config = DataConfig(source=str(tmp_path / "source"), min_user_interactions=1)
    about = json.loads((write(tmp_path / "out", config) / "dataset.json").read_text())
    expected = {"interactions.csv": sha256_of(tmp_path / "source" / "interactions.csv")}
    assert about["source_files"] == expected


KILLED = """
import os, signal, sys
import numpy as np
from llmrec import train_tcf
from llmrec.data import prepared

module, name, calls = {"save": np, "fsync": os, "rename": os}, sys.argv[1], int(sys.argv[2])
real = getattr(module[name], name)

def deadly(*words, **named):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*words, **named)

setattr(module[name], name, deadly)
sys.exit(prepared.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("function", "call"), [("save", 2), ("fsync", 3), ("rename", 1)])
def test_a_kill_in_the_middle_leaves_no_folder_of_that_name(
    tmp_path: Path, repository: Path, function: str, call: int
) -> None:
    out = tmp_path / "shop"
    words = [sys.executable, "-c", KILLED, function, str(call), *command(out)]
    done = subprocess.run(words, cwd=repository, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert len(list(tmp_path.glob(".shop.*"))) == 1  # it had begun
    assert prepared.main(command(out)) == 0  # and nothing stands in the way
    reopen(out)


@pytest.mark.filterwarnings("error")  # a tensor over a read-only array would warn
def test_a_run_on_prepared_data_gives_the_source_s_numbers(tmp_path: Path) -> None:
    sizes = SimulatedConfig(users=61, items=240)
    folder = write(tmp_path / "shop", DataConfig(simulated=sizes))
    loss = {"loss__name": "bce"}  # draws negatives too
    from_source = small_runs.train(tmp_path / "a", **loss)
    from_folder = small_runs.train(tmp_path / "b", data__source=str(folder), **loss)
    one, other = small_runs.record(from_source), small_runs.record(from_folder)
    assert one["metrics"] == other["metrics"]
    assert small_runs.per_user(from_source).equals(small_runs.per_user(from_folder))
    assert one["data"]["fingerprint"] == other["data"]["fingerprint"]
    assert "prepared_with" not in one["data"]
    assert other["data"]["prepared_with"]["simulated"]["users"] == 61


def test_a_run_records_the_options_that_its_data_were_prepared_with(tmp_path: Path) -> None:
    config = DataConfig(simulated=SMALL, min_user_interactions=7)
    folder = write(tmp_path / "shop", config)
    argv = [f"--run.folder={tmp_path / 'run'}", "--model.name=random", f"--data.source={folder}"]
    assert train_tcf.main(argv) == 0
    held = small_runs.record(tmp_path / "run")["config"]["data"]
    assert held == asdict(config) | {"source": str(folder)}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--data.min_user_interactions=5", "data.min_user_interactions=5 but"),  # the default
        ("--data.max_user_interactions=all", "data.max_user_interactions=all but"),
        ("--data.simulated.users=3000", "data.simulated.users=3000 but"),
    ],
)
def test_a_named_default_that_disagrees_is_refused_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, said: str
) -> None:
    config = DataConfig(simulated=SMALL, min_user_interactions=7, max_user_interactions=30)
    folder = write(tmp_path / "shop", config)
    argv = [f"--run.folder={tmp_path / 'run'}", "--model.name=random", f"--data.source={folder}"]
    assert train_tcf.main([*argv, option]) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Leave it out" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.real_data
def test_real_data_opens_equal_and_in_a_tenth_of_a_second(
    data_root: Path, tmp_path: Path, figure: Callable[[str, object], None]
) -> None:
    if not (data_root / "amazon-games-2018").is_dir():
        pytest.skip(f"no real data: {data_root} holds no amazon-games-2018")
    config = DataConfig(source=str(data_root / "amazon-games-2018"))
    folder = write(tmp_path / "games", config)
    assert_equal(reopen(folder), load_dataset(config))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        reopen(folder)
        seconds.append(time.perf_counter() - began)
    figure("opening prepared amazon-games-2018", f"{statistics.median(seconds):.3f} s, median of 5")
    assert statistics.median(seconds) <= 0.1
