"""The embedding store encodes every text once and never confuses two encoders."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch

from llmrec.data.interactions import Catalog
from llmrec.encoders.store import encode_catalog, main
from llmrec.encoders.text import EncoderConfig, TextEncoder
from llmrec.errors import UsageError

CPU = torch.device("cpu")
TEXTS = ["red shoe", "", "blue hat", "red shoe", "green coat"]


def catalog(texts, template="t1"):
    return Catalog([str(i) for i in range(len(texts))], {}, texts, template)


@pytest.fixture
def encode(tiny_models, tmp_path):
    def call(texts=TEXTS, template="t1", **options):
        config = EncoderConfig(**({"model": str(tiny_models["bert"])} | options))
        return encode_catalog(catalog(texts, template), config, tmp_path / "store", CPU)

    call.store = tmp_path / "store"
    return call


def test_vectors_are_the_encoders_in_catalogue_order(encode, tiny_models):
    encoded = encode()
    direct, _ = TextEncoder(EncoderConfig(model=str(tiny_models["bert"])), CPU).encode(TEXTS)
    np.testing.assert_allclose(encoded.vectors, direct, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(encoded.vectors[0], encoded.vectors[3])  # one text, one vector
    assert encoded.cost["encoded_now"] == 3  # distinct and not empty
    assert encoded.cost["tokens"] == 4 + 4 + 4
    assert encoded.cost["flops"] == 2 * encoded.encoder["non_embedding_parameters"] * 12


def test_a_second_call_encodes_nothing_and_costs_the_same(encode):
    first, second = encode(), encode()
    assert second.cost["encoded_now"] == 0
    assert {**second.cost, "encoded_now": 3} == first.cost
    np.testing.assert_array_equal(first.vectors, second.vectors)


def test_only_new_and_changed_texts_are_encoded(encode):
    encode()
    assert encode([*TEXTS[:4], "green coat winter", "boot"]).cost["encoded_now"] == 2


def test_a_reordered_catalogue_gets_each_item_its_own_vector(encode):
    straight, turned = encode(), encode(TEXTS[::-1])
    assert turned.cost["encoded_now"] == 0
    np.testing.assert_array_equal(straight.vectors, turned.vectors[::-1])


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 2},
        {"pooling": "cls"},
        {"max_item_tokens": 5},
        {"final_norm": False},
        {"dtype": "bfloat16"},
        {"template": "t2"},
    ],
)
def test_whatever_changes_vectors_changes_the_key(encode, change):
    encode()
    assert encode(**change).cost["encoded_now"] == 3


def test_batching_does_not_change_the_key(encode):
    encode()
    assert encode(batch_tokens=8).cost["encoded_now"] == 0


def test_other_weights_under_the_same_folder_name_are_another_encoder(
    encode, tiny_models, tmp_path
):
    folder = tmp_path / "bert"
    shutil.copytree(tiny_models["bert"], folder)
    before = encode(model=str(folder))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\x00\x00\x00\x3f"
    weights.write_bytes(bytes(data))
    after = encode(model=str(folder))
    assert (before.cost["encoded_now"], after.cost["encoded_now"]) == (3, 3)


@pytest.mark.parametrize(
    "name", ["texts.npy", "vectors.npy", "tokens.npy", "shard.json", "manifest.json"]
)
def test_a_damaged_shard_is_named_with_its_remedy(encode, name):
    encode()
    file = next(encode.store.glob(f"*/shard-*/{name}"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UsageError, match=r"Delete the folder .* encoded again"):
        encode()
    shutil.rmtree(file.parent)
    assert encode().cost["encoded_now"] == 3


def test_a_shard_in_the_making_is_invisible(encode):
    encode()
    shard = next(encode.store.glob("*/shard-*"))
    shutil.copytree(shard, shard.with_name(f".{shard.name}.tmp"))
    (shard.with_name(f".{shard.name}.tmp") / "manifest.json").unlink()
    assert encode().cost["encoded_now"] == 0


@pytest.mark.parametrize("damage", [b"", b"{", b"{}", b"[]", None])
def test_a_damaged_description_is_named_with_its_remedy(encode, damage):
    encode()
    file = next(encode.store.glob("*/encoder.json"))
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(UsageError, match=r"encoder\.json is missing or damaged"):
        encode()


def test_what_a_killed_process_left_is_swept_when_it_is_old(encode):
    encode()
    folder = next(encode.store.glob("*-*"))
    for name, age in (("old", 2 * 24 * 3600), ("young", 60)):
        (folder / f".shard-{name}").mkdir()
        os.utime(folder / f".shard-{name}", (time.time() - age,) * 2)
    encode([*TEXTS, "winter boot"])
    assert [path.name for path in folder.glob(".shard-*")] == [".shard-young"]


def test_a_catalogue_without_texts_is_refused_with_the_way_out(encode):
    with pytest.raises(UsageError, match="none of the 2 items has a text"):
        encode(["", ""])


def test_the_command_says_what_it_encoded(tiny_models, tmp_path, capsys):
    words = [
        "--encoder.model",
        str(tiny_models["bert"]),
        "--store",
        str(tmp_path),
        "--data.simulated.users",
        "50",
    ]
    assert main(words) == 0
    assert "from the store" in capsys.readouterr().out
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "0 encoded now" in out and "layer 3 of 3, no final norm in this architecture" in out
    about = json.loads(next(tmp_path.glob("*/encoder.json")).read_text())
    assert about["layers_run"] == 3 and about["has_final_norm"] is False


def test_the_command_names_the_nearest_of_an_unknown_option(capsys):
    assert main(["--encoder.poling", "cls"]) == 2
    assert (
        "unknown option --encoder.poling: did you mean encoder.pooling?" in capsys.readouterr().err
    )
