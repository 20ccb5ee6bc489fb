"""The embedding store encodes every text once and never confuses two encoders."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.data.interactions import Catalog
from llmrec.encoders import store
from llmrec.encoders.store import METHOD, encode_catalog, main
from llmrec.encoders.text import EncoderConfig, Location, TextEncoder
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


def test_a_second_call_loads_no_model_and_reads_every_shard_once(encode, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ITEMS", 1)
    encode()
    read, read_shard = [], store._read_shard
    monkeypatch.setattr(
        store, "_read_shard", lambda *about: (read.append(about[0]), read_shard(*about))[1]
    )
    monkeypatch.setattr(store, "TextEncoder", None)
    encode()
    assert len(read) == len(set(read)) == 3


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
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"quantisation": "nf4"},
        {"quantisation": "int8"},
        {"prompt": "winter "},
        {"template": "t2"},
    ],
)
def test_whatever_changes_vectors_changes_the_key(encode, change):
    encode()
    assert encode(**change).cost["encoded_now"] == 3
    assert encode(**change).cost["encoded_now"] == 0


def test_another_way_to_read_texts_in_this_package_changes_the_key(encode, monkeypatch):
    encode()
    monkeypatch.setattr("llmrec.encoders.store.METHOD", METHOD + 1)
    assert encode().cost["encoded_now"] == 3


@pytest.mark.parametrize(
    "change",
    [{"batch_tokens": 8}, {"attention": "eager"}, {"placement": "spread"}, {"placement": "blocks"}],
)
def test_what_moves_vectors_by_rounding_alone_does_not_change_the_key(encode, change):
    encode()
    assert encode(**change).cost["encoded_now"] == 0


def test_the_key_of_a_store_filled_before_there_were_prompts_and_quantisation_is_still_the_same():
    place = Location("some/bert", "commit", "weights")
    encoder = EncoderConfig("some/bert", "commit")
    folder, about = store.encoder_folder(Path("S"), encoder, place, "t1")
    assert folder == Path("S/some-bert-f225b6c7e4587bb0")
    assert {"prompt", "quantisation", "attention", "placement"}.isdisjoint(about)


def test_the_store_says_which_prompt_a_name_stood_for(encode, tiny_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["bert"], folder)
    prompts = {"prompts": {"document": "winter "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    named = encode(model=str(folder), prompt="name:document")
    assert named.encoder["prompt"] == "winter "
    assert encode(model=str(folder), prompt="winter ").cost["encoded_now"] == 0


def rewritten(*replacements):
    """A change of a JSON file's text."""

    def change(data):
        text = data.decode()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        return text.encode()

    return change


IN_PLACE = {
    "fine-tuned weights": ("model.safetensors", lambda data: data[:-4] + b"\x00\x00\x00\x3f"),
    "an activation": ("config.json", rewritten(('"gelu"', '"relu"'))),
    "a norm's epsilon": ("config.json", rewritten(("1e-12", "1e-3"))),
    "a vocabulary": ("tokenizer.json", rewritten(('"red"', '"x"'), ('"blue"', '"red"'))),
    "a tokeniser's option": ("tokenizer_config.json", lambda data: data.replace(b"{", b"{ ", 1)),
    "a vocabulary of rarer format": ("bpe.codes", lambda data: b"re d"),
    "an adapter": ("adapter_model.safetensors", lambda data: b"weights"),
    "a pooling for others": ("config_sentence_transformers.json", lambda data: b"{}"),
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_file_changed_in_place_makes_another_encoder(encode, tiny_models, tmp_path, change):
    folder = tmp_path / "bert"
    shutil.copytree(tiny_models["bert"], folder)
    before = encode(model=str(folder))
    name, harm = IN_PLACE[change]
    file = folder / name
    file.write_bytes(harm(file.read_bytes() if file.exists() else b""))
    after = encode(model=str(folder))
    assert (before.cost["encoded_now"], after.cost["encoded_now"]) == (3, 3)
    assert len(list(encode.store.iterdir())) == 2
    direct, _ = TextEncoder(EncoderConfig(model=str(folder)), CPU).encode(TEXTS)
    np.testing.assert_allclose(after.vectors, direct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["README.md", ".gitattributes"])
def test_a_note_in_a_models_folder_is_no_part_of_the_key(encode, tiny_models, tmp_path, name):
    folder = tmp_path / "bert"
    shutil.copytree(tiny_models["bert"], folder)
    encode(model=str(folder))
    (folder / name).write_text("note")
    assert encode(model=str(folder)).cost["encoded_now"] == 0


def test_another_revision_or_a_moved_branch_is_another_encoder(
    encode, tiny_models, tmp_path, monkeypatch
):
    hub = tmp_path / "hub" / "models--some--bert"
    (hub / "refs").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.parent))
    for commit, branch in (("a" * 40, "main"), ("b" * 40, "tuned")):
        shutil.copytree(tiny_models["bert"], hub / "snapshots" / commit)
        (hub / "refs" / branch).write_text(commit)
    encoded = [encode(model="some/bert", revision=name) for name in ("main", "tuned")]
    assert [e.cost["encoded_now"] for e in encoded] == [3, 3]
    assert [e.encoder["revision"] for e in encoded] == ["a" * 40, "b" * 40]
    (hub / "refs" / "main").write_text("b" * 40)
    assert encode(model="some/bert").encoder["revision"] == "b" * 40
    assert encode(model="some/bert", revision="a" * 40).cost["encoded_now"] == 0  # still there


def test_a_branch_that_moves_before_it_is_loaded_is_read_at_the_commit_of_the_key(
    encode, tiny_models, monkeypatch
):
    commits = iter("ab")
    seen = []

    def moving(config):
        """Two commits of a hub model: its branch moves after the first look."""
        commit = next(commits) if config.revision == "main" else config.revision
        seen.append(config.revision)
        return Location(str(tiny_models["bert"]), commit, commit)

    monkeypatch.setattr("llmrec.encoders.store.locate", moving)
    monkeypatch.setattr("llmrec.encoders.text.locate", moving)
    assert encode(model="some/bert").encoder["revision"] == "a"
    assert seen[0] == "main" and set(seen[1:]) == {"a"}


def test_a_damaged_shard_is_named_and_encoded_again_once_deleted(encode):
    encode()
    file = next(encode.store.glob("*/shard-*/vectors.npy"))
    file.write_bytes(file.read_bytes()[:-1])
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
    about = json.loads(next(tmp_path.glob("*/shard-*/shard.json")).read_text())["encoder"]
    assert about["layers_run"] == 3 and about["has_final_norm"] is False


def test_the_command_names_the_nearest_of_an_unknown_option(capsys):
    assert main(["--encoder.poling", "cls"]) == 2
    assert (
        "unknown option --encoder.poling: did you mean encoder.pooling?" in capsys.readouterr().err
    )
