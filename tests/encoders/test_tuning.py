"""Which weights of a language model learn, and every request for it that makes no sense."""

import re

import pytest
import torch
from tiny_models import save_tiny_model
from tuned_parts import CPU

from llmrec.assembly import TrainConfig
from llmrec.encoders.text import TextEncoder
from llmrec.encoders.tower import TowerConfig
from llmrec.encoders.tuning import LoraOptions, TunableEncoder, make_trainable
from llmrec.errors import UsageError
from llmrec.models.config import UserModelConfig
from llmrec.options import parse


def learning(folder, **options):
    """(encoder, names of the weights that learn) of a model set up so."""
    config = TunableEncoder(model=str(folder), **options)
    encoder = TextEncoder(config, CPU)
    make_trainable(encoder, config)
    return encoder, {name for name, w in encoder.model.named_parameters() if w.requires_grad}


def blocks_of(names):
    """The numbers in weights' names: bert's layer.2, opt's layers.2, t5's block.2."""
    found = [re.search(r"(?:layer|layers|block)\.(\d)\.", name) for name in names]
    return {int(match[1]) for match in found if match}


@pytest.mark.parametrize("name", ["bert", "opt", "qwen3", "t5"])
def test_full_tunes_all_that_the_vectors_depend_on(tiny_models, name):
    encoder, names = learning(tiny_models[name], tune="full")
    others = {n for n, _ in encoder.model.named_parameters()} - names
    # A pooler reads the states and nobody reads the pooler.
    assert others == ({"pooler.dense.weight", "pooler.dense.bias"} if name == "bert" else set())


@pytest.mark.parametrize("name", ["bert", "opt", "qwen3", "t5"])
def test_top_tunes_the_highest_blocks_and_nothing_else(tiny_models, name):
    encoder, names = learning(tiny_models[name], tune="top:2", cache_states=False)
    held = {id(w) for block in list(encoder.blocks)[1:] for w in block.parameters()}
    expected = {n for n, w in encoder.model.named_parameters() if id(w) in held}
    assert names == expected and blocks_of(names) == {1, 2}


def test_blocks_are_counted_from_the_last_that_runs(tiny_models):
    _, names = learning(tiny_models["bert"], tune="top:1", layers=2, cache_states=False)
    assert blocks_of(names) == {1}
    _, names = learning(tiny_models["bert"], tune="full", layers=2)
    assert blocks_of(names) == {0, 1} and "embeddings.word_embeddings.weight" in names


@pytest.mark.parametrize("name", ["opt", "qwen3", "t5"])
def test_a_closing_norm_that_is_not_applied_does_not_learn(tiny_models, name):
    _, with_norm = learning(tiny_models[name], tune="full")
    _, without = learning(tiny_models[name], tune="full", final_norm=False)
    assert {n for n in with_norm - without} and all("norm" in n for n in with_norm - without)


def modules(names):
    """The adapted linear layers: encoder.layer.0.attention.self.query."""
    return {name.partition(".lora_")[0] for name in names}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("linear", {"query", "key", "value", "attention.output.dense", "intermediate.dense",
                    "output.dense"}),
        ("attention", {"query", "key", "value", "attention.output.dense"}),
        ("query, value", {"query", "value"}),
    ],
)  # fmt: skip
def test_lora_adapts_the_linear_layers_asked_for_and_nothing_else_learns(
    tiny_models, targets, expected
):
    options = LoraOptions(targets=targets)
    encoder, names = learning(tiny_models["bert"], tune="lora", lora=options)
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert len(modules(names)) == 3 * len(expected)
    for number in range(3):
        own = {m for m in modules(names) if f"layer.{number}." in m}
        assert all(any(m.endswith(f".{part}") for m in own) for part in expected)
    linear = {n for n, m in encoder.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {n for n in linear if n.startswith("pooler")} == {"pooler.dense"}  # without adapter


@pytest.mark.parametrize("name", ["bert", "opt", "qwen3", "t5"])
def test_attention_is_found_in_every_architecture(tiny_models, name):
    _, names = learning(tiny_models[name], tune="lora", lora=LoraOptions(targets="attention"))
    assert len(modules(names)) == 3 * 4  # query, key, value and output of 3 blocks


def test_lora_of_few_layers_adapts_the_highest(tiny_models):
    _, names = learning(
        tiny_models["bert"], tune="lora", lora=LoraOptions(layers=1), cache_states=False
    )
    assert blocks_of(names) == {2}


def test_what_peft_is_told(tiny_models):
    options = LoraOptions(rank=4, alpha=2.0, dropout=0.25, dora=True, rslora=True)
    encoder, names = learning(tiny_models["bert"], tune="lora", lora=options)
    layer = encoder.model.get_submodule("encoder.layer.0.attention.self.query")
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert layer.scaling["default"] == pytest.approx(2.0 / 4**0.5)  # rslora: alpha / sqrt(rank)
    assert layer.lora_dropout["default"].p == 0.25
    assert any("lora_magnitude_vector" in name for name in names)  # dora's
    plain = LoraOptions(rank=4, alpha=2.0)
    encoder, names = learning(tiny_models["bert"], tune="lora", lora=plain)
    layer = encoder.model.get_submodule("encoder.layer.0.attention.self.query")
    assert layer.scaling["default"] == pytest.approx(2.0 / 4)
    assert not any("magnitude" in name for name in names)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_of_a_model_in_half_precision_learn_in_float32(tiny_models, dtype, dora):
    options = {"tune": "lora", "dtype": dtype, "lora": LoraOptions(dora=dora)}
    encoder, names = learning(tiny_models["bert"], **options)
    for name, weight in encoder.model.named_parameters():
        assert weight.dtype == (torch.float32 if name in names else getattr(torch, dtype))
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.enable_grad():
        encoder.read(ids, torch.ones_like(ids, dtype=torch.bool)).sum().backward()
    assert all(encoder.model.get_parameter(name).grad is not None for name in names)


def test_looking_for_what_learns_leaves_no_gradient_behind(tiny_models):
    encoder, _ = learning(tiny_models["bert"], tune="full")
    assert all(weight.grad is None for weight in encoder.model.parameters())


LORA = {"tune": "lora"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tune": "lara"}, r"encoder\.tune=lara is none of frozen, lora, qlora, top:k"),
        ({"tune": "top"}, r"encoder\.tune=top is none of .*such as top:2"),
        ({"tune": "top:²"}, r"encoder\.tune=top:² is none of"),
        ({"tune": "top:0"}, r"encoder\.tune=top:0 is none of"),
        ({"tune": "top:-1"}, r"encoder\.tune=top:-1 is none of"),
        ({"tune": "full:2"}, r"encoder\.tune=full:2 is none of"),
        ({"tune": "lora:2"}, r"encoder\.tune=lora:2 is none of"),
        (LORA | {"lr": 0.0}, r"encoder\.lr must be above 0"),
        (LORA | {"lr": float("nan")}, r"encoder\.lr must be above 0"),
        (LORA | {"weight_decay": -1.0}, r"encoder\.weight_decay not below it"),
        (LORA | {"step_tokens": 0}, r"encoder\.step_tokens and encoder\.cache_gigabytes must"),
        ({"tune": "top:1", "cache_gigabytes": 0.0}, r"encoder\.cache_gigabytes must be above 0"),
        ({"lr": 1e-3}, r"encoder\.lr=0\.001 means nothing to encoder\.tune=frozen\. Leave it out"),
        ({"weight_decay": 0.0}, r"encoder\.weight_decay=0\.0 means nothing to"),
        ({"checkpointing": True}, r"encoder\.checkpointing=true means nothing to"),
        ({"step_tokens": 9}, r"encoder\.step_tokens=9 means nothing to encoder\.tune=frozen"),
        ({"tune": "full", "cache_states": False}, r"encoder\.cache_states=false means nothing to "
         r"encoder\.tune=full of all layers"),
        (LORA | {"cache_dtype": "float16"}, r"encoder\.cache_dtype=float16 means nothing to"),
        (LORA | {"cache_gigabytes": 1.0}, r"encoder\.cache_gigabytes=1\.0 means nothing to"),
        ({"lora": LoraOptions(rank=4)}, r"encoder\.lora means nothing to encoder\.tune=frozen\. "
         r"Leave it out, or use encoder\.tune=lora or qlora"),
        ({"tune": "full", "lora": LoraOptions(rank=4)}, r"encoder\.lora means nothing"),
        ({"tune": "full", "dtype": "bfloat16"}, r"encoder\.dtype=bfloat16 is too coarse .*Use "
         r"float32"),
        ({"tune": "top:1", "dtype": "float16"}, r"encoder\.dtype=float16 is too coarse"),
        (LORA | {"quantisation": "nf4"}, r"encoder\.quantisation=nf4 leaves no weight that "
         r"encoder\.tune=lora could move\. Use encoder\.tune=qlora"),
        ({"tune": "full", "quantisation": "int8"}, r"encoder\.quantisation=int8 leaves no"),
        (LORA | {"placement": "blocks"}, r"encoder\.placement=blocks only reads; .*Use "
         r"encoder\.placement=one_device or spread"),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense_are_refused_by_name(options, said):
    with pytest.raises(UsageError, match=said):
        TunableEncoder(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, r"encoder\.lora\.rank and encoder\.lora\.layers must be at least 1"),
        ({"layers": 0}, r"encoder\.lora\.layers must be at least 1"),
        ({"alpha": 0.0}, r"encoder\.lora\.alpha=0\.0 must be above 0"),
        ({"dropout": 1.0}, r"encoder\.lora\.dropout=1\.0 must lie in \[0, 1\)"),
    ],
)
def test_adapters_without_a_meaning_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        TunableEncoder(tune="lora", lora=LoraOptions(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tune": "top:4"}, r"encoder\.tune=top:4 but .* runs 3 blocks\. Use at most 3"),
        ({"tune": "top:3", "layers": 2}, r"encoder\.tune=top:3 but .* runs 2 blocks\. Use at most"),
        ({"tune": "top:3", "cache_states": False}, r"encoder\.cache_states=false means nothing to "
         r"encoder\.tune=top:3 of all layers"),
        (LORA | {"lora": LoraOptions(layers=3), "cache_dtype": "float16"}, r"cache_dtype=float16 "
         r"means nothing to encoder\.tune=lora of all layers"),
        (LORA | {"lora": LoraOptions(layers=4)}, r"encoder\.lora\.layers=4 but .* runs 3 blocks"),
        (LORA | {"lora": LoraOptions(targets="queries")}, r"encoder\.lora\.targets=queries names "
         r"no linear layer .*Use linear, attention, or some of dense, key, query, value"),
    ],
)  # fmt: skip
def test_more_than_the_model_has_is_refused(tiny_models, options, said):
    with pytest.raises(UsageError, match=said):
        learning(tiny_models["bert"], **options)


@pytest.mark.parametrize(
    ("tower", "said"),
    [
        (TowerConfig(name="id"), r"tune=lora .* which tower\.name=id does not have"),
        (TowerConfig(control="random"), r"tune=lora .* which tower\.control=random does not have"),
        (TowerConfig(control="tfidf"), r"which tower\.control=tfidf .* Use encoder\.tune=frozen"),
    ],
)
def test_a_tower_that_reads_no_text_cannot_be_tuned(tower, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(encoder=TunableEncoder(tune="lora"), tower=tower)
    TrainConfig(encoder=TunableEncoder(tune="lora"), tower=TowerConfig(control="shuffled"))


def test_the_command_line_reads_counts_and_adapters():
    words = ["--encoder.tune=lora", "--encoder.lora.layers=2", "--encoder.lora.rank", "16"]
    config, _ = parse(TrainConfig, words, "llmrec train", "")
    assert config.encoder == TunableEncoder(tune="lora", lora=LoraOptions(rank=16, layers=2))
    config, _ = parse(TrainConfig, ["--encoder.tune", "top:1"], "llmrec train", "")
    assert config.encoder.tuned and config.encoder.tuned_blocks(6) == 1


def test_qlora_quantises_in_four_bits_unless_told_otherwise():
    assert TunableEncoder(tune="qlora").quantisation == "nf4"
    assert TunableEncoder(tune="qlora", quantisation="int8").quantisation == "int8"
    assert TunableEncoder(tune="qlora").frozen_encoder.quantisation == "nf4"
    assert TunableEncoder(tune="lora").quantisation == "none"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dropout": True}, r"encoder\.dropout=true means nothing to encoder\.tune=frozen"),
        (
            {"tune": "top:2", "cache_states": False, "cache_dtype": "bfloat16"},
            r"encoder\.cache_dtype=bfloat16 .* with encoder\.cache_states=false\. Leave it out",
        ),
        (
            {"tune": "top:2", "cache_states": False, "cache_gigabytes": 1.0},
            r"encoder\.cache_gigabytes=1\.0 means nothing",
        ),
    ],
)
def test_an_option_that_another_one_makes_idle_is_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        TunableEncoder(**options)


def test_a_baseline_has_no_language_model_to_tune():
    with pytest.raises(UsageError, match=r"model\.name=popularity, which learns nothing"):
        TrainConfig(encoder=TunableEncoder(tune="lora"), model=UserModelConfig(name="popularity"))


def test_checkpointing_that_an_architecture_does_not_offer_is_refused(tmp_path):
    folder = save_tiny_model("mpnet", tmp_path)
    config = TunableEncoder(model=str(folder), tune="full", checkpointing=True)
    with pytest.raises(UsageError, match=r"encoder\.checkpointing=true is not offered by"):
        make_trainable(TextEncoder(config, CPU), config)
