"""Rows that read texts and learn nothing, against a few lines that compute the same."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from small_runs import mean, per_user, record, refusal, train
from small_shops import TITLES, known, scores

from llmrec.errors import UsageError
from llmrec.evaluation.config import EvaluationConfig
from llmrec.evaluation.metrics import merge
from llmrec.evaluation.ranking import rank_scores
from llmrec.models.baselines import BASELINES


def test_embedding_is_the_mean_cosine_with_the_history():
    vectors = [[3, 0], [0, 2], [1, 1], [-1, 0], [0, 0], [0, -5]]
    found = scores("embedding", [[1, 2, 3], [4, 3]], vectors=vectors)
    half = math.sqrt(0.5)
    # History 1 and 2, directions (1, 0) and (0, 1); then history 4, direction (-1, 0).
    assert found[0] == pytest.approx([1 / 2, 1 / 2, half, -1 / 2, 0, -1 / 2])
    assert found[1] == pytest.approx([-1, 0, -half, 1, 0, 0])


@pytest.mark.parametrize("name", ["embedding", "bm25"])
def test_only_the_last_items_of_a_history_are_read(name):
    vectors = np.eye(6)
    long = scores(name, [[4, 4, 1, 2, 3]], vectors=vectors, max_length=2)
    assert np.array_equal(long, scores(name, [[1, 2, 3]], vectors=vectors))
    assert not np.array_equal(long, scores(name, [[4, 4, 1, 2, 3]], vectors=vectors))


def bm25_by_hand(query, titles, k1=1.5, b=0.75):
    """Lucene's BM25: idf * tf / (tf + k1 (1 - b + b length / mean length)), per query word."""
    documents = [re.findall(r"\w+", title.lower()) for title in titles]
    mean_length = sum(map(len, documents)) / len(documents)
    found = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for word in query:
            df = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            norm = k1 * (1 - b + b * len(document) / mean_length)
            score += idf * counts[word] / (counts[word] + norm)
        found.append(score)
    return found


def test_bm25_asks_for_the_words_of_the_history_as_often_as_they_occur(figure):
    found = scores("bm25", [[1, 3, 2], [4, 1], [6, 1]])
    queries = [["red", "lamp", "red", "chair"], ["oak", "desk"], "a lamp a red lamp".split()]
    expected = np.array([bm25_by_hand(query, TITLES) for query in queries])
    figure("largest difference to BM25 by hand", f"{np.abs(found - expected).max():.1e}")
    assert found == pytest.approx(expected, rel=1e-6)
    assert (found[:, 4] == 0).all()  # no text


def test_a_history_without_any_text_asks_for_nothing_and_all_items_tie():
    assert scores("bm25", [[5, 1]]).tolist() == [[0] * 6]
    assert scores("embedding", [[5, 1]], vectors=[[1, 0]] * 4 + [[0, 0], [1, 0]]).tolist() == [
        [0] * 6
    ]


@pytest.mark.parametrize("name", ["embedding", "bm25"])
def test_items_with_the_same_text_tie_exactly(name):
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(40)]
    titles = [" ".join(rng.choice(words, 5)) for _ in range(50)] * 2
    vectors = np.tile(rng.standard_normal((50, 33)), (2, 1))
    histories = [rng.choice(np.arange(1, 51), 9, replace=False) for _ in range(40)]
    asked = known(name, histories, titles, vectors)
    found = scores(name, histories, titles, vectors)
    assert np.array_equal(found[:, :50], found[:, 50:])
    allowed = np.arange(101) > 0
    ranking = merge(
        [
            rank_scores(
                BASELINES[name](asked), 100, asked.dataset.interactions, asked.cases, allowed,
                EvaluationConfig(filter_seen=False),
            )
        ],
        40,
    )  # fmt: skip
    assert (ranking.equal >= 1).all()


def test_bm25_without_any_word_names_the_way_out():
    with pytest.raises(UsageError, match=r"model.name=bm25 reads item texts, and shop has none"):
        scores("bm25", [[1, 2]], titles=["", "!!", ""])


@pytest.mark.parametrize("name", ["bm25", "embedding"])
@pytest.mark.parametrize("pool", [{}, {"evaluation__pool__size": 20}])
def test_content_baselines_find_more_than_chance_in_full_rankings_and_in_lists(
    tmp_path, name, pool, figure
):
    options = {"tower__name": "text", "tower__control": "tfidf", "data__simulated__users": 300}
    folder = train(tmp_path / "run", model__name=name, **options, **pool)
    chance = 0.5 if pool else 10 / 1000
    figure(f"HR@10 of {name}{', 20 candidates' if pool else ''}", f"{mean(folder, 'HR@10'):.3f}")
    assert mean(folder, "HR@10") > chance + 0.02
    assert set(record(folder)["metrics"]) == {"test"}
    assert record(folder)["cost"]["trainable_parameters"] == 0


def test_a_content_baseline_is_the_same_in_every_run(tmp_path):
    one, two = (
        train(tmp_path / name, model__name="bm25", run__seed=seed)
        for seed, name in enumerate(("one", "two"))
    )
    assert per_user(one).equals(per_user(two))


def test_embedding_tells_the_cost_and_the_maker_of_its_vectors(tmp_path):
    options = {"tower__name": "text", "tower__control": "tfidf"}
    cost = record(train(tmp_path / "run", model__name="embedding", **options))["cost"]
    assert cost["encoder"]["weights"] == "TF-IDF" and cost["encode_items"] > 0


def test_shuffled_texts_take_an_embeddings_worth_away(tmp_path, tiny_models):
    options = {
        "tower__name": "text", "model__name": "embedding", "run__store": str(tmp_path / "store"),
        "encoder__model": str(tiny_models["bert"]),
    }  # fmt: skip
    plain = train(tmp_path / "plain", **options)
    shuffled = train(tmp_path / "shuffled", tower__control="shuffled", **options)
    assert per_user(plain)["greater"].to_list() != per_user(shuffled)["greater"].to_list()


def test_embedding_without_a_reader_of_text_is_refused(tmp_path):
    said = refusal(tmp_path / "run", model__name="embedding", tower__name="id")
    assert "model.name=embedding reads item texts, which tower.name=id leaves out" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["bm25", "embedding"])
def test_data_without_text_is_refused(tmp_path, name):
    table = tmp_path / "plain.csv"
    rows = [f"u{user},i{(user * 7 + n * 3) % 30}" for user in range(40) for n in range(6)]
    table.write_text("\n".join(["user_id,item_id", *rows]))
    options = {"data__source": str(table), "model__name": name, "tower__name": "text"}
    assert "text" in refusal(tmp_path / "run", **options)


@pytest.mark.parametrize("name", ["bm25", "ease", "item_knn", "markov", "repeat_history"])
def test_a_baseline_gives_scores_of_its_own_to_every_block(name):
    asked = known(name, [[1, 2], [3, 1], [4, 2]])
    whole = BASELINES[name](asked)
    parts = torch.cat([whole(np.array([case])).clone() for case in range(3)])
    assert torch.equal(parts, whole(np.arange(3)))
