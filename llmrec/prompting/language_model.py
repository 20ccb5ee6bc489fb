"""A language model that answers prompts: encoder-decoder or decoder-only, pretrained or new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast

from llmrec.encoders.loading import Location
from llmrec.errors import UsageError
from llmrec.prompting.decoding import CausalSteps, Seq2SeqSteps, Steps
from llmrec.prompting.pretrained import (
    OPTION,
    LanguageModelConfig,
    check_positions,
    choose_learning,
    hf_config_of,
    load_model,
)
from llmrec.prompting.tokens import (
    IGNORED,
    WHOLE_WORDS,
    PromptTokenizer,
    Tokenized,
    TrainingBatch,
    add_whole_tokens,
    packed,
    question_batch,
    training_batches,
)


class LanguageModel(nn.Module):
    """A Hugging Face model with P5's whole-word embedding and a loss on answers alone."""

    def __init__(
        self,
        config: LanguageModelConfig,
        place: Location | None,
        tokenizer: PreTrainedTokenizerFast,
        whole: Sequence[str],
        device: torch.device,
    ) -> None:
        """Load the model, or draw a new one from torch's generator.

        Args:
            config: which, and what of it learns.
            place: where `located` found it.
            tokenizer: of a new model, its own; of a pretrained one, as `load_tokenizer` gives it.
            whole: strings that become one token each.
            device: where it is put.

        Raises:
            UsageError: It cannot be loaded, has no language-model head, or is no such model.
        """
        super().__init__()
        known = len(tokenizer)
        add_whole_tokens(tokenizer, whole)
        hf_config = hf_config_of(config, place, tokenizer)
        check_positions(config, hf_config)
        self.encoder_decoder = bool(hf_config.is_encoder_decoder)
        self.model = load_model(config, place, hf_config, device)
        if len(tokenizer) > self.model.get_input_embeddings().num_embeddings:
            self.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.prompts = PromptTokenizer(
            tokenizer, self.encoder_decoder, config.max_input_tokens, config.max_target_tokens
        )
        if config.whole_words is True and not self.encoder_decoder:
            raise UsageError(
                f"model.whole_words=true is for encoder-decoder models; {OPTION}={config.name} "
                "is decoder-only. Leave it out."
            )
        choose_learning(self.model, config, known if len(tokenizer) > known else None)
        self.words: nn.Embedding | None = None
        if self.encoder_decoder and config.whole_words is not False:
            self.words = nn.Embedding(WHOLE_WORDS, self.model.get_input_embeddings().embedding_dim)
            # A pretrained model begins close to what it has learned to read.
            nn.init.normal_(self.words.weight, std=1.0 if config.from_scratch else 0.02)
        if config.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.start = self.prompts.pad
        """What every answer of an encoder-decoder begins with."""
        if self.encoder_decoder:
            self.start = int(self.model.config.decoder_start_token_id)
        self.flops = 0
        """Operations of all training steps so far, of this process."""
        # 2 forward and 4 backward; frozen weights have no gradients of their own.
        self._flops_per_weight = 6 if config.tune == "full" else 4
        self._reading, self._writing = self._parameters_by_part()
        self.to(device)
        self.packs = self._packs(exact=config.tune != "qlora")
        """Whether the model keeps several prompts of a row apart; else each gets a row."""

    @property
    def tables(self) -> list[nn.Module]:
        """What has a row per token: the embedding, and the output layer, which may be the same."""
        return [self.model.get_input_embeddings(), self.model.get_output_embeddings()]

    def forward(self, batches: Sequence[TrainingBatch]) -> Tensor:
        """The summed cross-entropy of all answer tokens of packed batches, a scalar."""
        for batch in batches:
            self.flops += self._flops_per_weight * (
                self._reading * batch.prompt_tokens
                + (self._writing * batch.answer_tokens if self.encoder_decoder else 0)
            )
        return torch.stack([self._loss(batch) for batch in batches]).sum()

    @torch.no_grad()
    def _packs(self, exact: bool) -> bool:
        """Try it: models that count places from the row's beginning cannot, nor running states."""
        self.eval()
        questions = self.prompts.prompts(["a b c d e f", "g h a", "b c d e"])
        targets = self.prompts.answers(["yes", "no", "yes"])
        device = self.model.device
        alone = self._loss(packed(self.prompts, questions, targets, capacity=0).to(device))
        row = packed(self.prompts, questions, targets, capacity=10_000).to(device)
        together = self._loss(row)
        # Weights in 4 bits are multiplied in coarser numbers on a GPU.
        packs = bool((together - alone).abs() <= (1e-4 if exact else 1e-2) * alone.abs())
        if not self.encoder_decoder:
            # What the later prompts lose must not depend at all on what the first one says.
            first = row.segments == 1
            later = replace(row, labels=row.labels.masked_fill(first, IGNORED))
            others = (row.ids + 1) % self.model.get_input_embeddings().num_embeddings
            changed = replace(later, ids=torch.where(first, others, row.ids))
            losses = [self._loss(batch) for batch in (later, changed)]
            packs = packs and bool((losses[0] - losses[1]).abs() <= 1e-6 * losses[0].abs())
        self.train()
        return packs

    def batches(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[TrainingBatch, ...]:
        """Prompts and their answers as this model is trained on them."""
        return training_batches(self.prompts, prompts, answers, self.packs)

    def _loss(self, batch: TrainingBatch) -> Tensor:
        logits = (self._seq2seq if self.encoder_decoder else self._causal)(batch)  # (A, V)
        labels = batch.labels if self.encoder_decoder else batch.labels[:, 1:]
        return functional.cross_entropy(logits.float(), labels[labels != IGNORED], reduction="sum")

    def _seq2seq(self, batch: TrainingBatch) -> Tensor:
        """Logits of the answer tokens, (A, V)."""
        embedded = self._embedded(batch.ids, batch.words)
        own, answers = batch.segments, batch.answer_segments
        real = answers > 0
        labels = batch.labels.masked_fill(~real, self.prompts.pad)
        # Each answer begins with the start token, also in the middle of a row.
        start = self.start
        before = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        opens = torch.ones_like(real)
        opens[:, 1:] = answers[:, 1:] != answers[:, :-1]
        before = before.masked_fill(opens, start)
        later = torch.ones(labels.shape[1], labels.shape[1], device=labels.device).tril().bool()
        states = self.model.get_encoder()(
            inputs_embeds=embedded, attention_mask=_mask(own, own, embedded.dtype)
        ).last_hidden_state
        output = self.model(
            encoder_outputs=(states,),
            attention_mask=_mask(answers, own, embedded.dtype),
            decoder_input_ids=before,
            decoder_attention_mask=_mask(answers, answers, embedded.dtype, later),
            use_cache=False,
        )
        return cast(Tensor, output.logits[real])

    def _causal(self, batch: TrainingBatch) -> Tensor:
        """Logits of the answer tokens, (A, V)."""
        # Positions that begin again at 0 tell transformers where the next prompt of a row begins.
        segments = batch.segments
        places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
        opens = torch.ones_like(segments, dtype=torch.bool)
        opens[:, 1:] = segments[:, 1:] != segments[:, :-1]
        first = torch.where(opens, places, 0).cummax(dim=1).values
        body = self.model.base_model(
            input_ids=batch.ids, position_ids=places - first, use_cache=False
        ).last_hidden_state
        wanted = batch.labels[:, 1:] != IGNORED
        # The head over answers alone: over all tokens it would cost more than the model's blocks.
        return cast(Tensor, self.model.get_output_embeddings()(body[:, :-1][wanted]))

    def _embedded(self, ids: Tensor, words: Tensor) -> Tensor:
        embedded = cast(Tensor, self.model.get_input_embeddings()(ids))
        return embedded if self.words is None else embedded + self.words(words)

    def ask(self, questions: Sequence[Tokenized]) -> Steps:
        """Read some prompts; what comes back gives the next token's logits, step by step."""
        device = self.model.device
        inputs = question_batch(questions, self.prompts.pad, left=not self.encoder_decoder)
        ids, words, mask = (tensor.to(device) for tensor in inputs)
        if not self.encoder_decoder:
            return CausalSteps(self.model, ids, mask)
        return Seq2SeqSteps(self.model, self._states(ids, words, mask), mask)

    def _states(self, ids: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """What the encoder makes of prompts, (B, T, D)."""
        return cast(
            Tensor,
            self.model.get_encoder()(
                inputs_embeds=self._embedded(ids, words), attention_mask=mask
            ).last_hidden_state,
        )

    @torch.inference_mode()
    def write(self, questions: Sequence[Tokenized]) -> list[str]:
        """The likeliest answers, token by token (greedy), as text."""
        device = self.model.device
        inputs = question_batch(questions, self.prompts.pad, left=not self.encoder_decoder)
        ids, words, mask = (tensor.to(device) for tensor in inputs)
        # One of our own: a model's folder may ask for sampling, penalties or forced tokens.
        plain = GenerationConfig(
            max_new_tokens=self.prompts.max_target_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.prompts.end,
            pad_token_id=self.prompts.pad,
            decoder_start_token_id=self.start,
        )
        options = {"attention_mask": mask, "generation_config": plain}
        if self.encoder_decoder:
            from transformers.modeling_outputs import BaseModelOutput

            read = BaseModelOutput(last_hidden_state=self._states(ids, words, mask))
            made = self.model.generate(encoder_outputs=read, **options)[:, 1:]
        else:
            made = self.model.generate(input_ids=ids, **options)[:, ids.shape[1] :]
        return [
            text.strip()
            for text in self.prompts.tokenizer.batch_decode(made, skip_special_tokens=True)
        ]

    def _parameters_by_part(self) -> tuple[int, int]:
        """Non-embedding parameters that read a prompt's tokens, and that make an answer's."""
        if not self.encoder_decoder:
            count = _counted(self.model.base_model)
            return count, count
        return _counted(self.model.get_encoder()), _counted(self.model.get_decoder())


def _counted(module: nn.Module) -> int:
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(weight.numel() for weight in module.parameters() if id(weight) not in tables)


def _mask(queries: Tensor, keys: Tensor, dtype: torch.dtype, also: Tensor | None = None) -> Tensor:
    """Who sees whom among packed pieces: 0 within a piece, the lowest number elsewhere.

    A query of padding sees padding, so that no row of the softmax is empty.

    Args:
        queries: segments, (R, Q).
        keys: segments, (R, K).
        dtype: of the mask, which attention adds to its scores.
        also: (Q, K), a further condition.

    Returns:
        (R, 1, Q, K).
    """
    seen = queries[:, :, None] == keys[:, None, :]
    if also is not None:
        seen = seen & also
    seen = seen | ~seen.any(dim=2, keepdim=True)  # padding without padding to look at
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
