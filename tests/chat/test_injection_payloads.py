"""The shipped payloads: many kinds, and harmless as text once displayed."""

import re
import unicodedata
from collections import Counter

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from llmrec.chat.injection import Payload, payloads
from llmrec.data.titles import LIMIT, displayed
from llmrec.resources import shipped

KINDS = {
    "order", "role", "delimiter", "special", "json", "letter", "flattery", "language", "unicode",
    "exfiltration",
}  # fmt: skip
SPECIAL = """<|im_start|> <|im_end|> <|eot_id|> <|start_header_id|> <|end_header_id|> [INST] [/INST]
<<SYS>> <</SYS>> <s> </s> <start_of_turn> <end_of_turn> <think> </think>""".split()
TITLE = "x" * 60
"""As much of an item's own title as stands before a payload."""


def ids(payload: Payload) -> str:
    return f"{payload.kind}: {payload.text[:20]!a}"


def test_there_are_fifty_different_payloads_of_every_kind() -> None:
    told = payloads()
    assert len({payload.text for payload in told}) == len(told) == 50
    counts = Counter(payload.kind for payload in told)
    assert counts.keys() == KINDS and min(counts.values()) >= 2


def test_the_file_holds_no_character_that_a_reader_cannot_see() -> None:
    for line in shipped("prompts", "chat/injections.tsv").read_text(encoding="utf-8").splitlines():
        assert line.count("\t") == 1 and line.replace("\t", "").isprintable()


def test_escapes_stand_for_characters() -> None:
    texts = "".join(payload.text for payload in payloads())
    for character in ("\n", "\u2028", "\u200b", "\u202e", "\uff1c"):
        assert character in texts
    assert r"\u" not in texts


@pytest.mark.parametrize("payload", payloads(), ids=ids)
def test_a_displayed_payload_is_one_line_between_quotation_marks(payload) -> None:
    shown = displayed(f"{TITLE} {payload.text}")
    assert shown.isprintable()
    assert not re.search('["`<>]', unicodedata.normalize("NFKC", shown))
    assert len(shown) < LIMIT  # nothing of it is clipped, so all of it is tried


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes and the special tokens that payloads imitate."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken(token, normalized=True) for token in SPECIAL])
    return made


def test_a_tokenizer_finds_special_tokens_in_payloads_but_not_in_displayed_ones(tokenizer) -> None:
    special = {tokenizer.token_to_id(token) for token in SPECIAL}
    raw, shown = set(), set()
    for payload in payloads():
        raw |= special.intersection(tokenizer.encode(payload.text).ids)
        shown |= special.intersection(tokenizer.encode(displayed(payload.text)).ids)
    assert raw == special  # each is tried
    assert not shown
