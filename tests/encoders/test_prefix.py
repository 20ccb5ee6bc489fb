"""Cached hidden states on disk: each text once, the right rows, nothing half made, no surprise."""

import json
import os
import signal
import time
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

from llmrec import runs
from llmrec.encoders import prefix
from llmrec.encoders.prefix import cache_states
from llmrec.encoders.text import EncoderConfig, TextEncoder
from llmrec.errors import UsageError
from llmrec.runs import sha256_of, write_manifest

CPU = torch.device("cpu")
TEXTS = ["red shoe", "", "blue hat for men", "red shoe", "coat"]
LENGTHS = [4, 0, 6, 4, 3]  # words and two special tokens
TOKENS = 4 + 6 + 3  # of distinct texts


@pytest.fixture
def cache(tiny_models, tmp_path):
    """Texts -> their states below the highest block, in `cache.store`."""

    def call(texts=TEXTS, top=1, dtype="float32", limit=1.0, template="t1", **options):
        options = {"model": str(tiny_models["bert"]), "batch_tokens": 8} | options
        config = EncoderConfig(**options)
        encoder = call.encoder = TextEncoder(config, CPU)
        call.prepare(encoder)
        return cache_states(texts, encoder, config, top, dtype, limit, call.store, template)

    call.store, call.prepare = tmp_path / "store", lambda encoder: None
    return call


def folders(store):
    return sorted(path.name for path in store.iterdir()) if store.exists() else []


@pytest.fixture
def never_computed(monkeypatch):
    """From then on no text may run through the model."""

    def forbid():
        monkeypatch.setattr(prefix, "only_lower", None)

    return forbid


def one_by_one(encoder, text, layer):
    """transformers' own hidden states of a layer, (T, H), without batch or padding."""
    ids = torch.tensor([encoder.tokenize([text])[0]])
    with torch.inference_mode():
        return encoder.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]


@pytest.mark.parametrize("top", [1, 2])
def test_every_row_holds_the_states_of_its_own_text(cache, top):
    cached = cache(top=top)
    assert cached.lengths.tolist() == LENGTHS
    assert cached.lengths.dtype == np.int32
    rows = np.array([4, 2, 0, 3, 2])
    states, ids, real = cached.batch(rows)
    assert states.shape == (5, 6, 32)
    for row, found, tokens, own in zip(rows, states, ids, real, strict=True):
        length = LENGTHS[row]
        expected = one_by_one(cache.encoder, TEXTS[row], 3 - top)
        torch.testing.assert_close(found[:length], expected, rtol=1e-5, atol=1e-6)
        assert own.tolist() == [True] * length + [False] * (6 - length)
        assert tokens[:length].tolist() == cache.encoder.tokenize([TEXTS[row]])[0]
        assert not found[length:].any()
        assert not tokens[length:].any()


def test_a_batch_is_trimmed_to_its_longest_text(cache):
    cached = cache()
    assert [part.shape[1] for part in cached.batch(np.array([4]))] == [3, 3, 3]
    assert [part.shape[1] for part in cached.batch(np.array([4, 0]))] == [4, 4, 4]


def test_an_item_without_text_has_no_states_to_give(cache):
    with pytest.raises(ValueError, match="without text has no states"):
        cache().batch(np.array([0, 1]))


def test_each_distinct_text_is_computed_once_and_costs_what_it_costs(cache):
    cost = cache(top=2).cost
    attention, feed_forward, norms = 4 * (32 * 32 + 32), 32 * 64 + 64 + 64 * 32 + 32, 2 * 64
    block = attention + feed_forward + norms
    assert cost.pop("seconds") > 0
    assert cost == {
        "items": 5, "texts": 3, "tokens": TOKENS, "flops": 2 * block * TOKENS,
        "encoded_now": 3, "tokens_now": TOKENS,
    }  # fmt: skip


def test_a_second_call_reads_the_same_and_computes_nothing(cache, never_computed):
    first = cache()
    never_computed()
    second = cache()
    assert second.cost == first.cost | {"encoded_now": 0, "tokens_now": 0}
    rows = np.array([2, 0, 4])
    for one, other in zip(first.batch(rows), second.batch(rows), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_same_texts_in_another_order_are_the_same_cache(cache, never_computed):
    first = cache()
    never_computed()
    turned = cache(texts=["coat", "blue hat for men", "red shoe"])
    assert turned.lengths.tolist() == [3, 6, 4]
    torch.testing.assert_close(turned.batch(np.array([1]))[0], first.batch(np.array([2]))[0])


@pytest.mark.parametrize(
    "change",
    [
        {"top": 2}, {"dtype": "bfloat16"}, {"template": "t2"}, {"texts": [*TEXTS, "scarf"]},
        {"texts": TEXTS[:3]}, {"max_item_tokens": 5}, {"prompt": "hat "}, {"dtype_of_model": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_decides_the_states_makes_another_cache(cache, change):
    cache()
    if change.pop("dtype_of_model", False):
        # `dtype` names the cache's format here, so the model's own is set past the fixture.
        config = replace(cache.encoder.config, dtype="bfloat16")
        arguments = (config, 1, "float32", 1.0, cache.store, "t1")
        assert cache_states(TEXTS, TextEncoder(config, CPU), *arguments).cost["encoded_now"] == 3
    else:
        assert cache(**change).cost["encoded_now"] > 0
    assert len(folders(cache.store)) == 2


@pytest.mark.parametrize(
    "change", [{"pooling": "cls"}, {"final_norm": False}, {"batch_tokens": 512}], ids=str
)
def test_what_comes_later_or_changes_only_speed_shares_a_cache(cache, change):
    cache()
    assert cache(**change).cost["encoded_now"] == 0


def test_a_layer_counts_from_below(cache):
    """Layer 1 is below the highest of 2 blocks that run, and below the two highest of 3."""
    cache(top=2)
    assert cache(top=1, layers=2).cost["encoded_now"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_holds_the_states_rounded_once(cache, dtype):
    whole, half = cache(), cache(dtype=dtype)
    rows = np.array([2, 4, 0])
    states, ids, _ = half.batch(rows)
    expected, whole_ids, _ = whole.batch(rows)
    assert states.dtype == getattr(torch, dtype)
    torch.testing.assert_close(states, expected.to(states.dtype), rtol=0, atol=0)
    assert not torch.equal(states.float(), expected)
    assert torch.equal(ids, whole_ids)
    sizes = sorted(file.stat().st_size - 128 for file in cache.store.glob("*/states.npy"))
    assert sizes == [TOKENS * 32 * 2, TOKENS * 32 * 4]  # numpy's header takes 128 bytes


def scale(value):
    def change(encoder):
        torch.nn.init.constant_(encoder.blocks[1].output.LayerNorm.weight, value)

    return change


@pytest.mark.parametrize(
    ("dtype", "weight", "message"),
    [
        ("float16", 1e5, r"hidden state of \d\S+ does not fit into encoder\.cache_dtype=float16"),
        ("float32", torch.inf, r"states that are not finite in float32\. Use encoder\.dtype"),
    ],
)
def test_an_overflow_is_refused_and_leaves_nothing(cache, dtype, weight, message):
    cache.prepare = scale(weight)
    with pytest.raises(UsageError, match=message):
        cache(dtype=dtype)
    assert folders(cache.store) == []
    assert len(cache.encoder.blocks) == 3


def test_bfloat16_holds_what_float16_cannot(cache):
    cache.prepare = scale(1e5)
    assert cache(dtype="bfloat16").batch(np.array([0]))[0].abs().max() > 65504


def test_states_beyond_the_limit_are_refused_before_anything_runs(cache, never_computed):
    never_computed()
    size = TOKENS * 32 * 4 / 1e9  # 1664 bytes
    message = (
        r"^cached states of 3 texts with 13 tokens, width 32 in float32, take 1\.66e-06 GB, more "
        r"than encoder\.cache_gigabytes=1\.663e-06\. Raise it, or set encoder\.cache_dtype "
        r"bfloat16, a smaller encoder\.max_item_tokens, or encoder\.cache_states false\.$"
    )
    with pytest.raises(UsageError, match=message):
        cache(limit=size - 1e-9)
    assert folders(cache.store) == []
    with pytest.raises(TypeError):  # it would run
        cache(limit=size)


def test_the_limit_holds_for_states_that_are_there_too(cache):
    cache()
    with pytest.raises(UsageError, match=r"encoder\.cache_gigabytes=1e-06"):
        cache(limit=1e-6)


def test_a_catalogue_without_texts_is_refused(cache):
    with pytest.raises(UsageError, match="none of the 2 items has a text"):
        cache(texts=["", ""])


def test_a_cache_of_an_encoder_in_training_mode_has_no_drop_out(cache, never_computed):
    cache.prepare = lambda encoder: encoder.model.train()
    cached = cache()
    expected = one_by_one(cache.encoder, TEXTS[2], 2)
    torch.testing.assert_close(cached.batch(np.array([2]))[0][0], expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ faults

FILES = ["states.npy", "tokens.npy", "offsets.npy", "texts.npy", "states.json", "manifest.json"]
REMEDY = r"Delete the folder \S+; its texts will be encoded again\.$"


@pytest.mark.parametrize("harm", ["missing", "cut", "changed"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_remedy(cache, name, harm):
    cache()
    file = next(cache.store.glob(f"*/{name}"))
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    else:
        turned = bytes([content[-1] ^ 1])
        file.write_bytes(content[:-1] + (turned if harm == "changed" else b""))
    with pytest.raises(UsageError, match=rf"{name}.* {REMEDY}"):
        cache()


def sealed_again(folder):
    """A manifest that vouches for whatever the files hold now."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    write_manifest(folder, {name: sha256_of(folder / name) for name in names})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("states.npy", np.zeros((TOKENS, 32), np.float64)),
        ("states.npy", np.zeros((TOKENS - 1, 32), np.float32)),
        ("tokens.npy", np.zeros(TOKENS + 1, np.int32)),
        ("offsets.npy", np.zeros(3, np.int64)),
    ],
    ids=["other type", "too few states", "too many tokens", "too few texts"],
)
def test_files_that_do_not_belong_together_are_refused(cache, name, content):
    cache()
    folder = next(cache.store.iterdir())
    np.save(folder / name, content)
    sealed_again(folder)
    with pytest.raises(UsageError, match=REMEDY):
        cache()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts["encoder"].update(layer=1), "names other states than its folder"),
        (lambda facts: facts.pop("seconds"), "does not say what made its states"),
    ],
)
def test_states_that_say_otherwise_than_their_folder_are_refused(cache, change, message):
    cache()
    folder = next(cache.store.iterdir())
    facts = json.loads((folder / "states.json").read_text())
    change(facts)
    (folder / "states.json").write_text(json.dumps(facts))
    sealed_again(folder)
    with pytest.raises(UsageError, match=rf"{message}.* {REMEDY}"):
        cache()


def killed_at(cache, number):
    """Fill the store in a forked process that is killed at its n-th step; its exit code.

    Steps are the batches and every time something is forced to the disk.
    """
    child = os.fork()
    if child == 0:
        steps = []

        def deadly(function):
            def step(*arguments):
                steps.append(function)
                if len(steps) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return step

        code = 99
        try:
            TextEncoder.inputs = deadly(TextEncoder.inputs)
            runs.sync = deadly(runs.sync)
            cache()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_at_any_step_leaves_nothing_half_made_that_is_read(cache, tmp_path, figure):
    rows = np.array([2, 4, 0])
    expected = cache().batch(rows)[0]
    kept = []
    for number in count(1):
        cache.store = tmp_path / f"killed-{number}"
        code = killed_at(cache, number)
        if code == 0:  # there is no such step any more
            break
        assert code == -signal.SIGKILL
        kept.append([name for name in folders(cache.store) if not name.startswith(".")])
        cached = cache()
        assert cached.cost["encoded_now"] == (0 if kept[-1] else 3)
        torch.testing.assert_close(cached.batch(rows)[0], expected, rtol=0, atol=0)
    # Made: the store's folder, 2 batches, 5 files, the manifest's folder; then the name.
    assert list(map(len, kept)) == [0] * 9 + [1]
    figure("kills survived", f"{len(kept)} of {len(kept)}")


def test_what_a_kill_left_a_day_ago_is_swept_and_younger_work_is_not(cache):
    assert killed_at(cache, 3) == -signal.SIGKILL
    old = next(cache.store.iterdir())
    assert killed_at(cache, 3) == -signal.SIGKILL
    young = next(path for path in cache.store.iterdir() if path != old)
    yesterday = time.time() - prefix.ABANDONED_SECONDS - 60
    for path in (old, *old.iterdir(), young):  # the young one's file is still being written
        os.utime(path, (yesterday, yesterday))
    cache()
    assert not old.exists()
    assert young.exists()


def test_what_another_process_made_meanwhile_stays_and_is_read(cache, monkeypatch):
    check, there = prefix.check_writable, []

    def meanwhile(folder):
        monkeypatch.setattr(prefix, "check_writable", check)
        cache()
        there.append((folder / "states.npy").stat().st_ino)

    monkeypatch.setattr(prefix, "check_writable", meanwhile)
    cached = cache()
    assert cached.lengths.tolist() == LENGTHS
    (folder,) = cache.store.iterdir()
    assert there == [(folder / "states.npy").stat().st_ino]


def test_a_model_changed_while_it_is_read_is_refused_and_leaves_nothing(cache, monkeypatch):
    places = []

    def moving(config):
        places.append(replace(locate(config), identity=f"saved {len(places)} times"))
        return places[-1]

    locate = prefix.locate
    monkeypatch.setattr(prefix, "locate", moving)
    with pytest.raises(UsageError, match="was changed while it was being read"):
        cache()
    assert folders(cache.store) == []


def test_a_store_that_cannot_be_written_is_said_before_anything_runs(cache, never_computed):
    never_computed()
    cache.store.write_text("a file")
    with pytest.raises(UsageError, match="cannot be written"):
        cache()
