"""Language models that answer prompts: the loss is on answers, packing changes nothing."""

import pytest
import tiny_models
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BloomConfig,
    GenerationConfig,
    GPT2Config,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
)

from llmrec.encoders.tuning import LoraOptions
from llmrec.errors import UsageError
from llmrec.models.optim import OptimConfig, build_optimizer
from llmrec.prompting.decoding import choice_log_probs
from llmrec.prompting.language_model import LanguageModel
from llmrec.prompting.pretrained import (
    LanguageModelConfig,
    ScratchConfig,
    load_tokenizer,
    located,
)
from llmrec.prompting.tokens import train_tokenizer, training_batches

CPU = torch.device("cpu")
TEXTS = [f"red shoe for men , item_{n}" + " blue hat" * (3 * (n % 5)) + " ?" for n in range(12)]
ANSWERS = [f"item_{n % 4}" for n in range(12)]
WHOLE = ("<c1_1>", "<c1_2>")
SMALL = ScratchConfig(width=16, layers=2, heads=2, dropout=0.0, vocabulary=60)
SCRATCH = {
    name: LanguageModelConfig(name=name, scratch=SMALL) for name in ("scratch:t5", "scratch:llama")
}


def made(config, whole=(), seed=0):
    torch.manual_seed(seed)
    place = located(config)
    tokenizer = train_tokenizer(TEXTS, 60, whole) if place is None else load_tokenizer(place)
    return LanguageModel(config, place, tokenizer, whole, CPU)


def pretrained(folder, name):
    """A tiny model with its language-model head, as save_pretrained leaves it."""
    torch.manual_seed(0)
    config = tiny_models.ARCHITECTURES["t5"] if name == "t5" else MODELS[name]
    family = AutoModelForSeq2SeqLM if name in ("t5", "bart") else AutoModelForCausalLM
    family.from_config(config).save_pretrained(folder)
    words = "item_0 item_1 item_2 item_3 yes no".split()
    tiny_models.tokenizer([*tiny_models.WORDS, *words]).save_pretrained(folder)
    return folder


SIZES = {"vocab_size": 40, "bos_token_id": 2, "eos_token_id": 3}
MODELS = {
    "llama": tiny_models.MORE_ARCHITECTURES["llama"].__class__(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        num_key_value_heads=1, **SIZES,
    ),
    "qwen3": Qwen3Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=64, **SIZES,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=2, n_inner=64, n_positions=200, **SIZES),
    "bart": BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
        max_position_embeddings=200, decoder_start_token_id=3, forced_eos_token_id=None, **SIZES,
    ),
    "opt": OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, pad_token_id=0,
        word_embed_proj_dim=32, max_position_embeddings=200, **SIZES,
    ),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=2, **SIZES),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **SIZES),
}  # fmt: skip


PACKING = ("t5", "llama", "qwen3", "gpt2")
NOT_PACKING = ("bart", "opt", "bloom", "mamba")


@pytest.mark.parametrize("name", ["scratch:t5", "scratch:llama", *PACKING, *NOT_PACKING])
def test_prompts_lose_as_much_together_as_each_alone(name, tmp_path):
    config = SCRATCH.get(name) or LanguageModelConfig(
        name=str(pretrained(tmp_path, name)), max_input_tokens=100, max_target_tokens=50
    )
    model = made(config).eval()
    packed = model.batches(TEXTS, ANSWERS)
    assert model.packs is any(int(batch.segments.max()) > 1 for batch in packed)
    assert model.packs is (name not in NOT_PACKING)  # absolute positions, a running state
    with torch.no_grad():
        together = model(packed)
        alone = [
            model(training_batches(model.prompts, [text], [answer]))
            for text, answer in zip(TEXTS, ANSWERS, strict=True)
        ]
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["scratch:t5", "scratch:llama"])
def test_the_loss_is_what_the_answers_are_unlikely_in_generation(name):
    model = made(SCRATCH[name]).eval()
    answers = ["item_0", "item_1", "item_2", "item_3"]
    with torch.no_grad():
        steps = model.ask(model.prompts.prompts(TEXTS))
        chances = choice_log_probs(steps, model.prompts.answers(answers))
        wanted = -chances[torch.arange(12), torch.tensor([n % 4 for n in range(12)])].sum()
        loss = model(training_batches(model.prompts, TEXTS, ANSWERS))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)


def test_the_whole_word_embedding_moves_the_answers_of_both_training_and_generation():
    model = made(SCRATCH["scratch:t5"]).eval()
    questions = model.prompts.prompts(TEXTS[:2])
    batch = training_batches(model.prompts, TEXTS[:2], ANSWERS[:2])
    with torch.no_grad():
        before = model(batch), model.ask(questions).start()
        model.words.weight.zero_()
        after = model(batch), model.ask(questions).start()
    assert not torch.allclose(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_whole_words_off_leaves_the_embedding_out_and_decoder_only_models_refuse_it():
    config = LanguageModelConfig(name="scratch:t5", scratch=SMALL, whole_words=False)
    assert made(config).words is None
    assert made(SCRATCH["scratch:llama"]).words is None
    with pytest.raises(UsageError, match=r"model\.whole_words=true"):
        made(LanguageModelConfig(name="scratch:llama", scratch=SMALL, whole_words=True))


@pytest.mark.parametrize("name", ["scratch:t5", "scratch:llama"])
def test_a_few_steps_teach_an_answer(name):
    model = made(SCRATCH[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = training_batches(model.prompts, TEXTS, ANSWERS)
    first = float(model(batch).detach())
    for _ in range(150):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    model.eval()
    assert float(model(batch).detach()) < first / 10
    assert model.write(model.prompts.prompts(TEXTS)) == ANSWERS


@pytest.mark.parametrize("name", ["t5", "qwen3"])
@pytest.mark.parametrize("whole", [(), WHOLE])
def test_lora_moves_adapters_and_the_rows_of_new_tokens_alone(name, whole, tmp_path):
    config = LanguageModelConfig(
        name=str(pretrained(tmp_path, name)), tune="lora", lora=LoraOptions(rank=2)
    )
    model = made(config, whole)
    known = len(model.prompts.tokenizer) - len(whole)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5), tables=model.tables)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    answers = [whole[n % 2] if whole else ANSWERS[n] for n in range(12)]
    texts = [f"{text} {answers[n]}" for n, text in enumerate(TEXTS)]
    for _ in range(2):
        optimizer.zero_grad()
        model(training_batches(model.prompts, texts, answers)).backward()
        optimizer.step()
    moved = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
    tables = {name for name in moved if "lora" not in name and "words" not in name}
    assert any("lora" in name for name in moved)
    assert bool(tables) is bool(whole)
    for name in tables:
        weight = dict(model.named_parameters())[name]
        assert torch.equal(weight[:known], before[name][:known])
        assert not torch.equal(weight[known:], before[name][known:])


def test_qlora_reads_weights_in_four_bits_and_learns(tmp_path):
    config = LanguageModelConfig(name=str(pretrained(tmp_path, "llama")), tune="qlora")
    model = made(config)
    batch = training_batches(model.prompts, TEXTS, ANSWERS)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.02)
    first = float(model(batch).detach())
    for _ in range(20):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    assert float(model(batch).detach()) < first
    assert any(weight.dtype == torch.uint8 for weight in model.parameters())


def test_operations_are_counted_by_what_is_read_and_written():
    model = made(SCRATCH["scratch:llama"])
    (batch,) = training_batches(model.prompts, TEXTS[:1], ANSWERS[:1])
    model([batch])
    body = model.model.base_model
    weights = sum(w.numel() for w in body.parameters()) - body.embed_tokens.weight.numel()
    assert model.flops == 6 * weights * int((batch.segments > 0).sum())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "scratch:t5", "tune": "lora"}, r"model\.tune=lora"),
        ({"name": "x/y", "scratch": SMALL}, r"model\.scratch"),
        ({"lora": LoraOptions(rank=4)}, r"model\.lora"),
        ({"name": "x/y", "tune": "lora", "lora": LoraOptions(layers=2)}, r"model\.lora\.layers"),
        ({"max_input_tokens": 1}, r"model\.max_input_tokens"),
        ({"name": "x/y", "tune": "lora", "lora": LoraOptions(rank=0)}, r"model\.lora\.rank"),
    ],
)
def test_options_that_would_be_ignored_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        LanguageModelConfig(**changes)


@pytest.mark.parametrize(
    "sizes", [{"width": 20, "heads": 4}, {"layers": 0}, {"dropout": 1.0}, {"vocabulary": 0}]
)
def test_sizes_that_make_no_model_are_refused(sizes):
    with pytest.raises(UsageError, match=r"model\.scratch"):
        ScratchConfig(**sizes)


def test_more_tokens_than_a_model_knows_places_are_refused(tmp_path):
    folder = str(pretrained(tmp_path, "gpt2"))
    with pytest.raises(UsageError, match=r"knows 200 places.*needs 1088"):
        made(LanguageModelConfig(name=folder))


def test_a_model_folder_s_own_way_of_writing_is_not_taken_over(tmp_path):
    folder = pretrained(tmp_path, "llama")
    options = {"name": str(folder), "max_target_tokens": 6, "max_input_tokens": 100}
    asked = ["red shoe item_1", "blue hat"]
    plain = made(LanguageModelConfig(**options)).eval()
    told = plain.write(plain.prompts.prompts(asked))
    GenerationConfig(do_sample=True, temperature=9.0, min_new_tokens=5).save_pretrained(folder)
    other = made(LanguageModelConfig(**options)).eval()
    assert other.write(other.prompts.prompts(asked)) == told


def test_a_model_without_a_language_model_head_is_refused(tmp_path):
    tiny_models.save_tiny_model("opt", tmp_path)  # AutoModel: no head; ties make up for it
    folder = tiny_models.save_tiny_model("bert", tmp_path / "bert")
    with pytest.raises(UsageError, match=r"model\.name"):
        made(LanguageModelConfig(name=str(folder)))
    with pytest.raises(UsageError, match=r"model\.name=nobody/nothing"):
        made(LanguageModelConfig(name="nobody/nothing"))
