"""vLLM's engine inside this process: no server, no port; batches of prompts, same answers.

Tested with vLLM 0.32.0; its Python interface changes even in patch releases.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from llmrec.chat.journal import AnswerJournal
from llmrec.chat.requests import Answer, Choice, Pattern, Request, Schema, Status
from llmrec.chat.server import ServerConfig, engine_words
from llmrec.chat.vllm_server import no_vllm
from llmrec.errors import UsageError
from llmrec.progress import Tell

TESTED = "0.32"
"""The release of vLLM that this is tested with."""
BATCH = 256
"""Prompts per batch: enough to fill a GPU; a stop loses the answers of one batch."""
LONGEST_REASON = 300
"""Characters of vLLM's own words that are kept."""
LEAST_LOGPROB = -9999.0
"""What vLLM's server says instead of minus infinity, which JSON cannot."""


def ask_all(
    requests: Iterable[Request],
    config: ServerConfig,
    temperature: float,
    seed: int,
    journal: AnswerJournal,
    tell: Tell,
) -> None:
    """Ask the engine every request and journal what becomes of it, a batch at a time.

    Args:
        requests: Questions that the journal does not answer yet.
        config: The model, of name ``offline``.
        temperature: Of the drawing; 0 takes the likeliest token.
        seed: Of the drawing above temperature 0.
        journal: Takes every answer.
        tell: Told of answers once they are on the disk.

    Raises:
        UsageError: vLLM is missing, does not know an argument, or cannot load the model.
    """
    engine = _Engine(config, temperature, seed)
    try:
        source = iter(requests)
        while batch := list(itertools.islice(source, BATCH)):
            for request in batch:
                journal.note_sent(request.number)
            answers = engine.answers(batch)
            for answer in answers:
                journal.add(answer)
            journal.commit()
            tokens = sum(answer.prompt_tokens + answer.completion_tokens for answer in answers)
            tell(len(answers), 0, tokens)
    finally:
        engine.close()


class _Engine:
    """The engine with its model loaded."""

    def __init__(self, config: ServerConfig, temperature: float, seed: int) -> None:
        # In this process for good: nothing is left where it is killed. Before vLLM is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            import vllm
            import vllm.exceptions
            import vllm.lora.request
        except ImportError as error:
            raise no_vllm(sys.executable) from error
        if not vllm.__version__.startswith(f"{TESTED}."):
            warnings.warn(f"vLLM {vllm.__version__} is not the tested {TESTED}.", stacklevel=2)
        self.temperature, self.seed = temperature, seed
        self.refusals = (ValueError, vllm.exceptions.VLLMClientError)
        self.lora = None
        if config.lora:
            name, folder = config.lora_parts
            self.lora = vllm.lora.request.LoRARequest(name, 1, str(folder.resolve()))
        try:
            self.model = vllm.LLM.from_engine_args(_engine_args(config))
        except (*self.refusals, RuntimeError, OSError) as error:
            raise UsageError(
                f"vLLM cannot load server.model={config.model}: {_words(error)}. "
                "Check server.arguments; its own words are above."
            ) from error

    def answers(self, batch: Sequence[Request]) -> list[Answer]:
        """The answers to a batch, in its order."""
        began = time.monotonic()
        try:
            outputs = self.model.chat(
                [[{"role": "user", "content": request.prompt}] for request in batch],
                [self._sampling(request) for request in batch],
                use_tqdm=False,
                lora_request=self.lora,
            )
        except self.refusals as error:  # before any runs: a prompt too long, an unknown schema
            if len(batch) > 1:
                half = len(batch) // 2
                return self.answers(batch[:half]) + self.answers(batch[half:])
            problem = f"refused: {_words(error)}"
            return [Answer(batch[0].number, batch[0].digest(), "invalid", problem=problem)]
        seconds = round(time.monotonic() - began, 3)
        return [_answer(*pair, seconds) for pair in zip(batch, outputs, strict=True)]

    def close(self) -> None:
        """Let go of the model's memory."""
        self.model.llm_engine.engine_core.shutdown()

    def _sampling(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        match request.constraint:
            case None:
                held = None
            case Choice(options):
                held = StructuredOutputsParams(choice=list(options))
            case Pattern(regex):
                held = StructuredOutputsParams(regex=regex)
            case Schema(schema):
                held = StructuredOutputsParams(json=dict(schema))
        return SamplingParams(
            temperature=self.temperature,
            seed=self.seed,
            max_tokens=request.max_tokens,
            logprobs=request.top_logprobs or None,
            structured_outputs=held,
        )


def _engine_args(config: ServerConfig) -> Any:
    """What vLLM's own parser makes of the words that a server would be started with."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="server.arguments"))
    try:
        known, unknown = parser.parse_known_args(engine_words(config))
    except SystemExit:
        raise UsageError(
            "vLLM does not take server.arguments; its own words are above. Mend them."
        ) from None
    if unknown:
        raise UsageError(
            f"vLLM's engine does not know {unknown[0]} of server.arguments. Leave it out with "
            "server.name=offline."
        )
    return EngineArgs.from_cli_args(known)


def _answer(request: Request, output: Any, seconds: float) -> Answer:
    found = output.outputs[0]
    kinds: dict[str, Status] = {"stop": "answered", "length": "cut"}
    status = kinds.get(found.finish_reason, "invalid")
    top: list[tuple[str, float]] = []
    if request.top_logprobs and found.logprobs:
        # As many as the server gives, the token that was taken first among them.
        first = itertools.islice(found.logprobs[0].values(), request.top_logprobs)
        top = [(token.decoded_token or "", max(token.logprob, LEAST_LOGPROB)) for token in first]
    return Answer(
        request.number,
        request.digest(),
        status,
        text=found.text,
        top=tuple(sorted(top, key=lambda pair: -pair[1])),
        prompt_tokens=len(output.prompt_token_ids),
        completion_tokens=len(found.token_ids),
        seconds=seconds,
        problem="" if status != "invalid" else f"ended by {found.finish_reason}",
    )


def _words(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words[:LONGEST_REASON].rstrip(".")
