"""The engine in this process: batches, refusals and the journal; tests/vllm asks the real one."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrec.chat import offline
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.requests import Choice, Pattern, Request, Schema
from llmrec.chat.server import ServerConfig
from llmrec.errors import UsageError

LONGEST = 20


class Refused(Exception):
    """As vLLM's own, it is no ValueError."""


class MadeUpEngine:
    """Answers a prompt with its capitals, takes a word as a token, refuses long prompts."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.adapters: set[Any] = set()
        self.sampling: list[Any] = []
        self.is_open = True
        self.llm_engine = types.SimpleNamespace(
            engine_core=types.SimpleNamespace(shutdown=self._shut)
        )

    def _shut(self) -> None:
        self.is_open = False

    def chat(
        self, messages: list[Any], params: list[Any], use_tqdm: bool, lora_request: Any
    ) -> list[Any]:
        assert not use_tqdm and len(messages) == len(params)
        prompts = [message["content"] for (message,) in messages]
        if any(len(prompt) > LONGEST for prompt in prompts):
            raise Refused("the prompt\nis too long.")
        self.batches.append(len(prompts))
        self.adapters.add(lora_request)
        self.sampling += params
        return [self._output(*pair) for pair in zip(prompts, params, strict=True)]

    def _output(self, prompt: str, sampling: Any) -> Any:
        words = prompt.upper().split()
        taken = words[: sampling.max_tokens]
        first = {
            1: types.SimpleNamespace(decoded_token=words[0], logprob=-0.5),
            2: types.SimpleNamespace(decoded_token="likelier", logprob=-0.25),
            3: types.SimpleNamespace(decoded_token="never", logprob=float("-inf")),
            4: types.SimpleNamespace(decoded_token="one too many", logprob=-3.0),
        }
        found = types.SimpleNamespace(
            text=" ".join(taken),
            token_ids=taken,
            finish_reason="error" if "fails" in prompt else ("stop", "length")[taken != words],
            logprobs=[first] if sampling.logprobs else None,
        )
        return types.SimpleNamespace(outputs=[found], prompt_token_ids=words)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUpEngine]:
    """Stands in for vLLM."""
    made = MadeUpEngine()

    def module(name: str, **names: Any) -> types.ModuleType:
        found = types.ModuleType(name)
        vars(found).update(names)
        monkeypatch.setitem(sys.modules, name, found)
        return found

    record = types.SimpleNamespace
    exceptions = module("vllm.exceptions", VLLMClientError=Refused)
    request = module("vllm.lora.request", LoRARequest=lambda *values: values)
    module("vllm.sampling_params", StructuredOutputsParams=record)
    module(
        "vllm",
        __version__=f"{offline.TESTED}.0",
        LLM=record(from_engine_args=lambda args: made),
        SamplingParams=record,
        exceptions=exceptions,
        lora=module("vllm.lora", request=request),
    )
    monkeypatch.setattr(offline, "_engine_args", lambda config: None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # put back afterwards
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    yield made
    assert not made.is_open


def ask(
    requests: list[Request], folder: Path, **changes: Any
) -> tuple[list[Any], list[tuple[int, int, int]]]:
    """The journal's answers and what was told."""
    told: list[tuple[int, int, int]] = []
    config = ServerConfig(**({"name": "offline", "model": "m"} | changes))
    with AnswerJournal(folder / "answers.jsonl", {"of": "test"}) as journal:
        offline.ask_all(
            iter(requests), config, 0.5, 7, journal, lambda *counts: told.append(counts)
        )
        assert journal.done_count == len(requests)
        return list(journal.answers()), told


def test_answers_come_in_batches_each_journalled_before_it_is_told(
    engine: MadeUpEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "BATCH", 2)
    answers, told = ask([Request(number, "a b c", 3) for number in range(5)], tmp_path)
    assert engine.batches == [2, 2, 1]
    assert told == [(2, 0, 12), (2, 0, 12), (1, 0, 6)]  # 3 tokens asked and 3 answered, each
    assert [(a.number, a.status, a.text) for a in answers] == [
        (number, "answered", "A B C") for number in range(5)
    ]
    assert (answers[0].prompt_tokens, answers[0].completion_tokens) == (3, 3)


def test_a_refused_prompt_costs_no_other_its_answer(engine: MadeUpEngine, tmp_path: Path) -> None:
    prompts = ["a", "b", "too long " * LONGEST, "d", "e"]
    requests = [Request(number, prompt, 8) for number, prompt in enumerate(prompts)]
    answers, _ = ask(requests, tmp_path)
    assert [answer.text for answer in answers] == ["A", "B", "", "D", "E"]
    assert (answers[2].status, answers[2].problem) == ("invalid", "refused: the prompt is too long")
    assert [a.digest for a in answers] == [request.digest() for request in requests]


def test_an_answer_without_room_is_cut_and_a_failed_one_invalid(
    engine: MadeUpEngine, tmp_path: Path
) -> None:
    answers, _ = ask([Request(0, "a b c", 2), Request(1, "it fails", 9)], tmp_path)
    assert [(a.status, a.text) for a in answers] == [("cut", "A B"), ("invalid", "IT FAILS")]
    assert answers[1].problem == "ended by error"


def test_alternatives_are_as_many_as_wanted_and_likeliest_first(
    engine: MadeUpEngine, tmp_path: Path
) -> None:
    answers, _ = ask([Request(0, "a", 1, None, 3), Request(1, "a", 1)], tmp_path)
    assert answers[0].top == (("likelier", -0.25), ("A", -0.5), ("never", -9999.0))
    assert answers[1].top == ()


def test_constraints_and_drawing_reach_the_engine(engine: MadeUpEngine, tmp_path: Path) -> None:
    held = [None, Choice(("a", "b")), Pattern("[ab]"), Schema({"type": "array"})]
    ask([Request(number, "a", 4, constraint) for number, constraint in enumerate(held)], tmp_path)
    record = types.SimpleNamespace
    assert [params.structured_outputs for params in engine.sampling] == [
        None, record(choice=["a", "b"]), record(regex="[ab]"), record(json={"type": "array"}),
    ]  # fmt: skip
    first = engine.sampling[0]
    assert (first.temperature, first.seed, first.max_tokens, first.logprobs) == (0.5, 7, 4, None)


def test_an_adapter_answers_every_request(engine: MadeUpEngine, tmp_path: Path) -> None:
    ask([Request(0, "a", 4)], tmp_path, lora=f"games={tmp_path}")
    assert engine.adapters == {("games", 1, str(tmp_path))}


def test_another_release_of_vllm_is_warned_of(
    engine: MadeUpEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.33.0")
    with pytest.warns(UserWarning, match=r"0\.33\.0 is not the tested 0\.32"):
        ask([Request(0, "a", 4)], tmp_path)


def test_without_vllm_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"pip install 'llmrec\[vllm\]'"):
        ask([Request(0, "a", 4)], tmp_path)
