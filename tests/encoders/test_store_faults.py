"""The embedding store under faults: the right vectors or one sentence, nothing encoded again."""

import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.data.interactions import Catalog
from llmrec.encoders import store as store_module
from llmrec.encoders.store import encode_catalog, main
from llmrec.encoders.text import EncoderConfig, TextEncoder
from llmrec.errors import UsageError
from llmrec.runs import sha256_of, write_manifest

CPU = torch.device("cpu")
TITLES = [
    f"{colour} {thing} {season}"
    for colour, thing, season in product(
        ("red", "green", "blue"), ("shoe", "boot", "hat", "coat"), ("summer", "winter", "rain")
    )
]
TWELVE = TITLES[:12]
DELETE = r"Delete the folder \S+; its texts will be encoded again\.$"


@pytest.fixture
def encode(tiny_models, tmp_path, monkeypatch):
    """Titles -> their vectors, in shards of 4, from `encode.store` or another."""
    monkeypatch.setattr(store_module, "SHARD_ITEMS", 4)

    def call(titles=TWELVE, store=None, model=tiny_models["bert"]):
        catalog = Catalog([str(i) for i in range(len(titles))], {}, titles, "template")
        return encode_catalog(catalog, EncoderConfig(str(model)), store or call.store, CPU)

    call.store, call.model = tmp_path / "store", tiny_models["bert"]
    return call


class Child:
    """A forked process: its exit code (negative: the signal it died of) and all that it printed."""

    def __init__(self, function):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.close(reading)
                sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
                code = function() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        self._output = reading

    def running(self):
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self):
        with os.fdopen(self._output) as file:
            output = file.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), output


def shards(store):
    return sorted(store.glob("*/shard-*"))


def texts_in(store):
    """The hashes of all texts in all shards."""
    return [row.tobytes() for path in shards(store) for row in np.load(path / "texts.npy")]


def forge(file, content):
    """Replace a shard's file and make its manifest agree."""
    file.write_bytes(content) if isinstance(content, bytes) else np.save(file, content)
    manifest = file.parent / "manifest.json"
    hashes = json.loads(manifest.read_text())["sha256"]
    write_manifest(file.parent, hashes | {file.name: sha256_of(file)})


# ---------------------------------------------------------------------------------- corruption


def flipped(data, generator):
    place = generator.randrange(8 * len(data))
    return bytes(byte ^ (place // 8 == i) << place % 8 for i, byte in enumerate(data))


def test_every_corruption_is_detected_and_names_its_file(encode, figure):
    encode()
    files = [path for path in encode.store.rglob("*") if path.is_file()]
    assert len(shards(encode.store)) == 3 and len(files) == 3 * 5
    generator = random.Random(0)
    harms = [(generator.choice(files), lambda data: flipped(data, generator)) for _ in range(100)]
    harms += [
        (generator.choice(files), lambda data: data[: generator.randrange(len(data))])
        for _ in range(50)
    ]
    harms += [(file, lambda data: data[:-1]) for file in files]
    harms += [(file, lambda data: b"") for file in files]
    harms += [(file, lambda data: data + b" ") for file in files]
    detected = 0
    for file, harm in harms:
        whole = file.read_bytes()
        file.write_bytes(harm(whole))
        with pytest.raises(UsageError, match=DELETE) as caught:
            encode()
        detected += str(file) in str(caught.value)
        file.write_bytes(whole)
    figure("corruptions of a store with three shards detected", f"{detected} of {len(harms)}")
    assert detected == len(harms)
    assert encode().cost["encoded_now"] == 0  # the harm was what was detected


@pytest.mark.parametrize(
    "name", ["texts.npy", "vectors.npy", "tokens.npy", "shard.json", "manifest.json"]
)
def test_a_file_that_is_gone_is_named(encode, name):
    encode()
    file = shards(encode.store)[1] / name
    file.unlink()
    with pytest.raises(UsageError, match=rf"{re.escape(str(file))} is missing.*{DELETE}"):
        encode()


def test_a_file_in_a_shards_place_is_named(encode):
    encode()
    (shards(encode.store)[0].parent / "shard-1").touch()
    with pytest.raises(UsageError, match=rf"shard-1/manifest\.json cannot be read .*{DELETE}"):
        encode()


MISFITS = {
    "fewer vectors": (
        "vectors.npy",
        np.ones((3, 32), np.float32),
        r"vectors\.npy holds float32 \(3, 32\), not float32 \(4, H\)",
    ),
    "vectors of another type": (
        "vectors.npy",
        np.ones((4, 32)),
        r"vectors\.npy holds float64 \(4, 32\)",
    ),
    "flat vectors": ("vectors.npy", np.ones(4, np.float32), r"vectors\.npy holds float32 \(4,\)"),
    "vectors of another width": (
        "vectors.npy",
        np.ones((4, 8), np.float32),
        r"vectors\.npy holds vectors of width 8",
    ),
    "short hashes": (
        "texts.npy",
        np.ones((4, 31), np.uint8),
        r"texts\.npy holds uint8 \(4, 31\), not uint8 \(n, 32\)",
    ),
    "more texts": (
        "texts.npy",
        np.ones((5, 32), np.uint8),
        r"vectors\.npy holds float32 \(4, 32\), not float32 \(5, H\)",
    ),
    "other counts": ("tokens.npy", np.ones(4), r"tokens\.npy holds float64"),
    "fewer counts": (
        "tokens.npy",
        np.ones(3, np.int32),
        r"tokens\.npy holds int32 \(3,\), not int32 \(4\)",
    ),
    "no array": ("tokens.npy", b"tokens", r"tokens\.npy is missing or no array"),
    "an empty file": ("vectors.npy", b"", r"vectors\.npy is missing or no array"),
    "an archive": (
        "vectors.npy",
        b"PK\x05\x06" + bytes(18),
        r"vectors\.npy is missing or no array",
    ),
    "an empty description": ("shard.json", b"{}", r"shard\.json does not say what made"),
    "a list for a description": ("shard.json", b"[]", r"shard\.json does not say what made"),
    "no time": (
        "shard.json",
        b'{"encoder": {}, "seconds": null}',
        r"shard\.json does not say what made",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_parts_that_do_not_belong_together_are_named(encode, misfit):
    encode()
    name, content, message = MISFITS[misfit]
    forge(shards(encode.store)[1] / name, content)
    with pytest.raises(UsageError, match=rf"{message}.*{DELETE}"):
        encode()


def test_a_shard_from_another_encoders_folder_is_refused(encode, tiny_models):
    encode()
    encode(model=tiny_models["opt"])
    (own, *_), (theirs, *_) = (
        sorted(encode.store.glob(f"{name}-*/shard-*")) for name in ("bert", "opt")
    )
    shutil.copytree(theirs, own.with_name(theirs.name))
    with pytest.raises(UsageError, match=rf"names another encoder .*model.*weights.*{DELETE}"):
        encode()


# ------------------------------------------------------------------------------------------ kill

WRITES = {"open", "os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir", "shutil.rmtree"}


def stepping(store, at_step):
    """Call `at_step` before whatever touches the file system under `store`, and each forward pass.

    For a child only: an audit hook cannot be taken away again.
    """

    def hook(event, arguments):
        if event in WRITES and isinstance(arguments[0], str | os.PathLike):
            if str(arguments[0]).startswith(str(store)):
                at_step()

    def before(function):
        return lambda *args, **options: (at_step(), function(*args, **options))[1]

    sys.addaudithook(hook)
    os.fsync = before(os.fsync)
    TextEncoder._states = before(TextEncoder._states)


def killed_at(encode, store, step):
    """Encode in a child that is killed at its n-th step; exit code and the number of steps."""

    def child():
        done = 0

        def at_step():
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)

        stepping(store, at_step)
        encode(store=store)
        sys.stdout.write(f"\nsteps: {done}\n")

    code, output = Child(child).wait()
    assert code in (0, -signal.SIGKILL), output
    return code, int(output.split()[-1]) if code == 0 else step


def check_after_kill(encode, store, expected):
    """What the killed process finished is kept, the rest is encoded, and all of it is exact."""
    finished = 4 * len(shards(store))
    encoded = encode(store=store)
    assert encoded.cost["encoded_now"] == len(TWELVE) - finished
    np.testing.assert_array_equal(encoded.vectors, expected.vectors)
    assert len(texts_in(store)) == len(TWELVE)
    assert encode(store=store).cost["encoded_now"] == 0
    return finished


def kills(encode, tmp_path, points):
    """How many texts were finished at each point of a kill."""
    expected = encode()
    code, total = killed_at(encode, tmp_path / "undisturbed", 0)
    assert code == 0
    steps = range(1, total + 1)
    if points is not None:
        steps = sorted({int(step) for step in np.linspace(1, total, points)})
    finished = []
    for step in steps:
        store = tmp_path / f"killed-{step}"
        assert killed_at(encode, store, step)[0] == -signal.SIGKILL
        finished.append(check_after_kill(encode, store, expected))
    assert finished == sorted(finished) and set(finished) == {0, 4, 8, 12}
    return finished


def test_a_kill_at_any_step_loses_at_most_the_shard_in_the_making(encode, tmp_path, figure):
    figure("kills survived, quick", f"{len(kills(encode, tmp_path, 20))} of 20")


@pytest.mark.slow
def test_a_kill_at_every_step_loses_at_most_the_shard_in_the_making(encode, tmp_path, figure):
    finished = kills(encode, tmp_path, None)
    figure("kills survived, every step", f"{len(finished)} of {len(finished)}")


def limit_files(size, action):
    """From now on no file of this process grows past `size` bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [0, 100, 200, 600])
def test_a_kill_in_the_middle_of_a_write_leaves_nothing_that_is_read(encode, tmp_path, size):
    def child():
        limit_files(size, signal.SIG_DFL)  # the kernel kills at the byte after
        encode(store=tmp_path / "killed")

    code, output = Child(child).wait()
    assert code == -signal.SIGXFSZ, output
    assert list((tmp_path / "killed").glob("*/.shard-*"))
    assert check_after_kill(encode, tmp_path / "killed", encode()) == 0


# ----------------------------------------------------------------------------------- two writers


def race(encode, store, catalogues, tmp_path):
    """One process a catalogue, all at once, and a reader; their vectors, encoded_now, reads."""
    gate, opener = os.pipe()

    def writer(number, titles):
        def child():
            os.close(opener)
            os.read(gate, 1)  # until the parent closes its end
            encoded = encode(titles, store)
            np.save(tmp_path / f"{number}.npy", encoded.vectors)
            sys.stdout.write(f"\n{encoded.cost['encoded_now']}\n")

        return Child(child)

    children = [writer(number, titles) for number, titles in enumerate(catalogues)]
    os.close(gate)
    os.close(opener)
    reads = 0
    while any(child.running() for child in children):
        for path in shards(store):
            about = json.loads((path / "shard.json").read_text())["encoder"]
            store_module._read_shard(path, about)
            reads += 1
    results = [child.wait() for child in children]
    assert [code for code, _ in results] == [0] * len(children), results
    vectors = [np.load(tmp_path / f"{number}.npy") for number in range(len(children))]
    return vectors, [int(output.split()[-1]) for _, output in results], reads


def check_races(encode, tmp_path, catalogues, tolerance):
    """Five rounds on fresh stores: texts encoded twice, reads while they were written."""
    union = list(dict.fromkeys(title for titles in catalogues for title in titles))
    undisturbed = encode(union, tmp_path / "alone")
    expected = dict(zip(union, undisturbed.vectors, strict=True))
    twice, reads = 0, 0
    for number in range(5):
        store = tmp_path / f"store-{number}"
        folder = store / next((tmp_path / "alone").iterdir()).name
        (folder / ".shard-abandoned").mkdir(parents=True)  # both sweep it
        os.utime(folder / ".shard-abandoned", (0, 0))
        vectors, encoded, seen = race(encode, store, catalogues, tmp_path)
        for found, titles in zip(vectors, catalogues, strict=True):
            alone = [expected[title] for title in titles]
            np.testing.assert_allclose(found, alone, rtol=0, atol=tolerance)
        written = texts_in(store)
        assert len(written) == sum(encoded) and len(set(written)) == len(union)
        whole = encode(union, store)
        assert whole.cost["encoded_now"] == 0
        for name in ("items", "texts", "tokens", "flops"):  # none counts what is there twice
            assert whole.cost[name] == undisturbed.cost[name]
        assert [path.name[:6] for path in folder.iterdir()] == ["shard-"] * len(shards(store))
        twice += len(written) - len(union)
        reads += seen
    return twice, reads


@pytest.mark.parametrize(
    ("case", "catalogues", "tolerance"),
    [
        ("the same catalogue", [TITLES, TITLES], 0),
        # Another batch, another rounding of the last bit; components are near 1.
        ("overlapping halves", [TITLES[:25], TITLES[:11:-1]], 1e-6),
    ],
)
def test_two_writers_at_once_give_exact_vectors(
    encode, tmp_path, figure, case, catalogues, tolerance
):
    twice, reads = check_races(encode, tmp_path, catalogues, tolerance)
    figure(f"two writers, {case}, 5 rounds", f"{twice} texts encoded twice, {reads} shards read")
    assert reads > 0
    assert twice <= 5 * len(set(catalogues[0]) & set(catalogues[1]))


# ------------------------------------------------------------------------------- partial refresh


def test_three_changed_and_two_new_titles_of_fifty_encode_five(encode, figure):
    old = [f"{title} for {who}" for title in TITLES for who in ("men", "women")][:50]
    new = [*old, "snow boot", "snow hat"]
    for changed in (3, 17, 44):
        new[changed] += " kids"
    before, after = encode(old), encode(new)
    assert (before.cost["encoded_now"], after.cost["encoded_now"]) == (50, 5)
    kept = [row for row in range(50) if old[row] == new[row]]
    np.testing.assert_array_equal(before.vectors[kept], after.vectors[kept])
    direct, tokens = TextEncoder(EncoderConfig(str(encode.model)), CPU).encode(new)
    np.testing.assert_allclose(after.vectors, direct, rtol=1e-5, atol=1e-6)
    assert (after.cost["items"], after.cost["texts"]) == (52, 52)
    assert after.cost["tokens"] == tokens.sum() == before.cost["tokens"] + 3 + 2 * 4
    assert after.cost["flops"] == 2 * after.encoder["non_embedding_parameters"] * tokens.sum()
    recorded = [json.loads((p / "shard.json").read_text())["seconds"] for p in shards(encode.store)]
    shares = [1.0] * len(recorded)
    for changed in (3, 17, 44):
        shares[changed // 4] -= 1 / 4  # that text's part of its old shard is no longer needed
    assert after.cost["seconds"] == pytest.approx(np.dot(recorded, shares))
    figure("texts encoded of 52, 3 changed and 2 new", after.cost["encoded_now"])


# ---------------------------------------------------------------------- disk full and read-only


@pytest.fixture
def command(tiny_models, tmp_path, monkeypatch):
    """``llmrec embed`` on the simulated catalogue, in shards of 100, in a child."""
    monkeypatch.setattr(store_module, "SHARD_ITEMS", 100)

    def run(store, before=lambda: None):
        def child():
            before()
            words = ["--encoder.model", str(tiny_models["bert"]), "--data.simulated.users", "50"]
            return main([*words, "--store", str(store), "--device", "cpu"])

        return Child(child).wait()

    run.store = tmp_path / "store"
    return run


def sentence(output):
    """The one line that a failing command printed."""
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1, output
    return lines[0]


def tree(folder):
    """Every path below, with what a write would change."""
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns, path.stat().st_size)
        for path in [folder, *folder.rglob("*")]
    }


def when_shards_are_written(number, action):
    """An action that starts when the n-th shard takes its name."""

    def before():
        renamed = 0

        def hook(event, arguments):
            nonlocal renamed
            if event == "os.rename" and "/shard-" in str(arguments[1]):
                renamed += 1
                if renamed == number:
                    action()

        sys.addaudithook(hook)

    return before


def no_space():
    """Every later fsync finds the disk full."""

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fail


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (no_space, "No space left on device"),
        # Truly refused by the kernel; numpy words what it got of its data to the disk.
        (lambda: limit_files(1000, signal.SIG_IGN), r"File too large|requested and \d+ written"),
    ],
)
def test_a_full_disk_is_one_sentence_and_earlier_shards_stay(command, action, reason):
    code, output = command(command.store, when_shards_are_written(2, action))
    assert code == 2, output
    assert re.search(
        rf"^llmrec: \S+shard-\S+ cannot be written \(.*({reason})\)\. Free some space",
        sentence(output),
    )
    folder = next(command.store.iterdir())
    assert len(shards(command.store)) == 2 and not list(folder.glob(".*"))
    before = tree(shards(command.store)[0])
    code, output = command(command.store)
    total = int(re.search(r"(\d+) distinct texts", output)[1])
    assert code == 0 and f"{total - 200} encoded now, 200 from the store" in output
    assert tree(shards(command.store)[0]) == before


def test_a_store_that_cannot_be_written_is_refused_before_the_model_is_read(
    encode, tmp_path, monkeypatch
):
    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def never(*arguments):
        raise AssertionError("the model was read")

    monkeypatch.setattr(store_module, "TextEncoder", never)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/\S+ cannot be written \(Not a directory\)"):
        encode(store=tmp_path / "file")
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UsageError, match=r"cannot be written \(Read-only file system\)"):
        encode(store=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system has no /proc")
def test_a_truly_read_only_store_is_one_sentence(command):
    code, output = command(Path("/proc/store"))
    assert code == 2
    assert re.search(r"^llmrec: /proc/store/\S+ cannot be written \(.+\)\. Free", sentence(output))


def test_a_complete_store_is_read_without_a_write(encode):
    expected = encode()
    before = tree(encode.store)

    def child():
        def hook(event, arguments):
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            if event in WRITES and str(arguments[0]).startswith(str(encode.store)):
                raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

        sys.addaudithook(hook)
        assert np.array_equal(encode().vectors, expected.vectors)

    code, output = Child(child).wait()
    assert code == 0, output
    assert tree(encode.store) == before


def test_a_model_saved_over_while_it_is_read_leaves_no_vectors(
    encode, tiny_models, tmp_path, monkeypatch
):
    folder = tmp_path / "bert"
    shutil.copytree(tiny_models["bert"], folder)

    def saved_over(self, texts, advance, scratch):
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-4:] = b"\x00\x00\x00\x3f"
        (folder / "other").write_bytes(weights)
        (folder / "other").rename(folder / "model.safetensors")
        return np.ones((len(texts), 32), np.float32), np.ones(len(texts), np.int32)

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="changed while"):
        patch.setattr(TextEncoder, "encode", saved_over)
        encode(model=folder)
    assert not shards(encode.store)
    assert encode(model=folder).cost["encoded_now"] == 12


# ------------------------------------------------------------------------------ nothing executed


class Planted:
    """A pickle of this touches a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def planted(tmp_path):
    """A malicious pickle; no marker may be there when the test is over."""
    control, marker = tmp_path / "control", tmp_path / "executed"
    pickle.loads(pickle.dumps(Planted(control)))
    assert control.exists()  # it would work
    yield Planted(marker)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["texts.npy", "vectors.npy", "tokens.npy"])
@pytest.mark.parametrize("kind", ["a pickle", "an array of objects"])
def test_a_pickle_in_an_arrays_place_is_refused_and_not_executed(encode, planted, name, kind):
    encode()
    file = shards(encode.store)[0] / name
    forge(file, pickle.dumps(planted) if kind == "a pickle" else np.array([planted], object))
    with pytest.raises(UsageError, match=rf"{name} is missing or no array\. {DELETE}"):
        encode()


ADAPTER = {"peft_type": "LORA", "r": 1, "target_modules": ["query"], "base_model_name_or_path": "."}


@pytest.mark.parametrize(
    ("names", "without", "message"),
    [
        (["pytorch_model.bin"], "model.safetensors", "pickled ones are not read"),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], None, None),
        (["tokenizer.pkl", "vocab.pkl", "vocab.bin"], None, None),
        (["tokenizer.model", "vocab.pkl"], "tokenizer.json", "cannot be loaded"),
        (["adapter_model.bin"], None, "cannot be loaded"),
    ],
)
def test_pickles_in_a_models_folder_are_not_executed(
    encode, planted, tmp_path, names, without, message
):
    folder = tmp_path / "model"
    shutil.copytree(encode.model, folder)
    for name in names:
        (folder / name).write_bytes(pickle.dumps(planted))
        if name == "adapter_model.bin":
            (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    if without:
        (folder / without).unlink()
    if message is None:
        np.testing.assert_array_equal(encode(model=folder).vectors, encode().vectors)
    else:
        with pytest.raises(UsageError, match=message):
            encode(model=folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_models_folder_is_not_executed_beside_a_known_type(encode, tmp_path, file):
    folder = tmp_path / "model"
    shutil.copytree(encode.model, folder)
    about = json.loads((folder / file).read_text())
    about["auto_map"] = {
        "AutoConfig": "planted.C",
        "AutoModel": "planted.M",
        "AutoTokenizer": ["planted.T", "planted.T"],
    }
    (folder / file).write_text(json.dumps(about))
    (folder / "planted.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    np.testing.assert_array_equal(encode(model=folder).vectors, encode().vectors)
    assert not (tmp_path / "executed").exists()


# -------------------------------------------------------------------------------- damaged models


def test_a_model_that_may_not_be_read_is_one_sentence(encode, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("llmrec.encoders.loading.sha256_of", refuse)
    with pytest.raises(UsageError, match=r"cannot be read \(.*Permission denied: .*config\.json"):
        encode()


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_truncated_weights_are_one_sentence(encode, tmp_path, size):
    folder = tmp_path / "model"
    shutil.copytree(encode.model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(UsageError, match=r"encoder\.model=\S+ cannot be loaded: "):
        encode(model=folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors.index.json", '{"weight_map": {"a": "../a.safetensors"}}', "outside"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b/a.safetensors"}}', "outside"),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}', "is damaged"),
        ("config.json", '{"transformers_weights": "b/a.safetensors"}', "outside"),
        ("config.json", "{", "is damaged"),
    ],
)
def test_weights_that_the_key_would_not_cover_are_refused(encode, tmp_path, file, content, message):
    folder = tmp_path / "model"
    shutil.copytree(encode.model, folder)
    (folder / file).write_text(content)
    with pytest.raises(UsageError, match=rf"{re.escape(file)} .*{message}.* save_pretrained\."):
        encode(model=folder)
