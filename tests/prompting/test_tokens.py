"""Prompts as ids: whole words, packing, what a loss is taken at."""

import numpy as np
import pytest
import torch

from llmrec.errors import UsageError
from llmrec.prompting.tokens import (
    IGNORED,
    PromptTokenizer,
    pack,
    question_batch,
    train_tokenizer,
    training_batches,
    word_numbers,
)

TEXTS = [f"What comes after item_{n} , item_{n * 7 % 40} for user_{n} ?" for n in range(40)]
WHOLE = ["<c1_1>", "<c2_5>"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 120, WHOLE)


def prompts(tokenizer, encoder_decoder=True, longest=100, answer=10):
    return PromptTokenizer(tokenizer, encoder_decoder, longest, answer)


@pytest.mark.parametrize(
    ("text", "offsets", "numbers"),
    [
        ("item_12 x", [(0, 4), (4, 7), (8, 9)], [1, 1, 2]),  # pieces of one id share a number
        ("a bc", [(0, 1), (1, 3), (3, 4)], [1, 2, 2]),  # the space stands in the token before "bc"
        ("a bc", [(0, 1), (1, 2), (2, 4)], [1, 2, 2]),  # a space alone opens the word behind it
        ("<c1><c2> <c1>", [(0, 4), (4, 8), (9, 13)], [1, 1, 2]),  # clusters of one item
        ("", [], []),
    ],
)
def test_a_token_has_the_number_of_its_word(text, offsets, numbers):
    assert word_numbers(text, offsets).tolist() == numbers


def test_words_from_the_511th_on_share_the_last_row():
    text = " ".join("x" * 600)
    offsets = [(2 * n, 2 * n + 1) for n in range(600)]
    numbers = word_numbers(text, offsets)
    assert numbers[[0, 509, 510, 511, 599]].tolist() == [1, 510, 511, 511, 511]


def test_the_words_of_a_real_prompt_are_those_that_white_space_makes(tokenizer):
    text = "after item_3 , <c1_1><c2_5> comes item_39 ?"
    read = prompts(tokenizer).prompts([text])[0]
    pieces = tokenizer.convert_ids_to_tokens(read.ids.tolist())
    words = {}
    for piece, number in zip(pieces, read.words.tolist(), strict=True):
        words[number] = words.get(number, "") + piece.replace("▁", "")
    assert words.pop(0) == "</s>"
    assert [words[n] for n in sorted(words)] == text.split()


def test_whole_word_numbers_are_equal_at_training_and_generation(tokenizer):
    read = prompts(tokenizer)
    trained = training_batches(read, TEXTS, ["item_1"] * len(TEXTS))
    asked = question_batch(read.prompts(TEXTS), read.pad, left=False)
    seen = set()
    for batch in trained:
        for row, segments in zip(range(len(batch.ids)), batch.segments, strict=True):
            for piece in range(1, int(segments.max()) + 1):
                where = batch.segments[row] == piece
                ids, words = batch.ids[row][where], batch.words[row][where]
                seen.add((tuple(ids.tolist()), tuple(words.tolist())))
    questions = {
        (tuple(ids[mask > 0].tolist()), tuple(words[mask > 0].tolist()))
        for ids, words, mask in zip(*asked, strict=True)
    }
    assert seen == questions and len(seen) == len(set(TEXTS))


def test_item_tokens_stay_whole_and_any_character_is_read(tokenizer):
    read = prompts(tokenizer)
    assert tokenizer.convert_ids_to_tokens(read.answers(["<c1_1><c2_5>"])[0]) == [*WHOLE, "</s>"]
    told = "Ünïcode 漢字 item_3"
    assert tokenizer.decode(read.prompts([told])[0].ids[:-1]) == told


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([3, 5, 2], 5, [[1], [0, 2]]),  # 5 fills a row, 3 + 2 another
        ([4, 4, 4], 5, [[0], [1], [2]]),
        ([1], 1, [[0]]),
    ],
)
def test_rows_are_filled_longest_first(lengths, capacity, rows):
    assert pack(lengths, capacity) == rows


def test_a_batch_holds_prompts_of_which_none_is_longer_than_four_times_another(tokenizer):
    read = prompts(tokenizer)
    texts = ["item_1", *TEXTS[:5], " ".join(TEXTS[:5])]
    batches = training_batches(read, texts, ["item_1"] * len(texts))
    pieces = 0
    for batch in batches:
        lengths = [
            int((row == piece).sum()) for row in batch.segments for piece in row.unique() if piece
        ]
        assert max(lengths) <= 4 * min(lengths)
        pieces += len(lengths)
    assert pieces == len(texts)
    assert len(batches) == 3


def test_a_decoder_only_model_is_trained_on_answers_alone(tokenizer):
    read = prompts(tokenizer, encoder_decoder=False)
    (batch,) = training_batches(read, TEXTS[:3], ["item_1", "item_2", "item_30"])
    for row, answer in ((0, "item_1"), (1, "item_2"), (2, "item_30")):
        ids = read.answers([answer])[0]
        question = read.prompts([TEXTS[row]])[0].ids.tolist()
        rows = [line for line in range(len(batch.ids)) if question[0] in batch.ids[line].tolist()]
        found = [
            (line, piece)
            for line in rows
            for piece in range(1, int(batch.segments[line].max()) + 1)
            if batch.ids[line][batch.segments[line] == piece].tolist() == question + ids
        ]
        assert len(found) == 1
        line, piece = found[0]
        labels = batch.labels[line][batch.segments[line] == piece].tolist()
        assert labels == [IGNORED] * len(question) + ids


def test_a_chat_template_is_used_where_the_model_has_one(tokenizer):
    chat = train_tokenizer(TEXTS, 120, [])
    chat.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [answer] {% endif %}"
    )
    read = prompts(chat, encoder_decoder=False)
    assert chat.decode(read.prompts(["after item_3"])[0].ids) == "[user] after item_3 [answer] "


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_a_long_prompt_loses_its_first_words_and_is_counted(tokenizer, encoder_decoder):
    read = prompts(tokenizer, encoder_decoder, longest=8)
    free = prompts(tokenizer, encoder_decoder)
    cut = read.prompts([TEXTS[0], "item_3"])
    words = TEXTS[0].split()
    fitting = [" ".join(words[first:]) for first in range(len(words))]
    kept = next(text for text in fitting if len(free.prompts([text])[0].ids) <= 8)
    assert kept != TEXTS[0]
    assert cut[0].ids.tolist() == free.prompts([kept])[0].ids.tolist()
    assert read.cut_prompts == 1


def test_what_stands_around_a_prompt_in_a_chat_template_is_never_cut(tokenizer):
    chat = train_tokenizer(TEXTS, 120, [])
    chat.chat_template = "{% for m in messages %}<user> {{ m.content }} <end>{% endfor %}"
    read = prompts(chat, encoder_decoder=False, longest=40)
    told = chat.decode(read.prompts([" ".join(TEXTS)])[0].ids)
    assert told.startswith("<user> ") and told.endswith(" ? <end>") and read.cut_prompts == 1


def test_of_a_last_word_that_does_not_fit_the_last_tokens_are_read(tokenizer):
    (whole,) = prompts(tokenizer).prompts(["item_123456789"])
    (cut,) = prompts(tokenizer, longest=3).prompts(["red item_123456789"])
    assert len(whole.ids) > 3 and cut.ids.tolist() == whole.ids[-3:].tolist()


def test_a_long_answer_keeps_its_end_token_and_is_counted(tokenizer):
    read = prompts(tokenizer, answer=3)
    assert read.answers([TEXTS[0]])[0][-1] == read.end
    assert len(read.answers([TEXTS[0]])[0]) == 3
    assert read.cut_answers == 2


def test_questions_are_padded_on_the_side_asked_for(tokenizer):
    read = prompts(tokenizer)
    questions = read.prompts(["item_3", TEXTS[0]])
    for left in (True, False):
        ids, words, mask = question_batch(questions, read.pad, left)
        assert ids.shape == words.shape == mask.shape
        real = mask[0].bool()
        assert ids[0][real].tolist() == questions[0].ids.tolist()
        assert bool(real[0]) is not left and torch.equal(words[0][~real], ids[0][~real] * 0)


def test_a_tokenizer_without_an_end_token_is_refused():
    bare = train_tokenizer(TEXTS, 120, [])
    bare.eos_token = None
    with pytest.raises(UsageError, match=r"model\.name.*end token"):
        prompts(bare)


def test_the_same_prompts_make_the_same_tokenizer():
    a, b = (train_tokenizer(TEXTS, 120, WHOLE) for _ in range(2))
    assert a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str()
    assert np.array_equal(a("item_3 , user_2")["input_ids"], b("item_3 , user_2")["input_ids"])
