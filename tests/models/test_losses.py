"""Every loss against its plain formula, in value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from llmrec.errors import UsageError
from llmrec.models.losses import (
    LossConfig,
    bce,
    bpr,
    full_softmax,
    gbce,
    gbce_beta,
    in_batch_softmax,
    sampled_softmax,
)


def with_gradients(function, *tensors):
    """The value of a function and its gradients, in float64 copies of the tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    "chunk_bytes", [1, 4 * 300 * 7, 1 << 30]
)  # one row, seven rows, all rows at once
def test_full_softmax_equals_cross_entropy_for_any_chunk(chunk_bytes):
    torch.manual_seed(0)
    states, items = torch.randn(50, 16), torch.randn(300, 16)
    targets = torch.randint(0, 300, (50,))
    plain, plain_grads = with_gradients(
        lambda s, v: F.cross_entropy(s @ v.T, targets, reduction="sum") / 50,
        states.double(),
        items.double(),
    )
    ours, our_grads = with_gradients(
        lambda s, v: full_softmax(s, v, targets, chunk_bytes) / 50, states, items
    )
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, reference in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-6)


def test_full_softmax_of_large_scores_does_not_overflow():
    states, items = torch.full((1, 1), 1000.0), torch.tensor([[1.0], [0.999]])
    # scores 1000 and 999: loss of the second is log(1 + e)
    assert full_softmax(states, items, torch.tensor([1])).item() == pytest.approx(
        math.log(1 + math.e), rel=1e-4
    )


def slot_softmax(states, items, targets, rows, slots, log_popularity, places):
    """TCF's and MoRec's form: a column per slot, the own sequence's masked but for the label."""
    total = states.new_zeros(())
    flat = slots.flatten()
    columns = torch.nonzero(flat >= 0)[:, 0]
    for p in range(len(states)):
        label = places[p]  # the label's own slot
        own = set(slots[rows[p]][slots[rows[p]] >= 0].tolist())
        kept = [c for c in columns.tolist() if c == label or flat[c].item() not in own]
        logits = torch.stack([states[p] @ items[flat[c]] - log_popularity[flat[c]] for c in kept])
        total = total + F.cross_entropy(
            logits[None], torch.tensor([kept.index(label)]), reduction="sum"
        )
    return total


def test_in_batch_softmax_over_distinct_items_equals_the_duplicated_columns():
    torch.manual_seed(1)
    # Two users: item 2 is shared, item 4 occurs twice in one sequence, the second is padded.
    slots = torch.tensor([[0, 2, 4, 4], [-1, 1, 2, 3]])
    rows = torch.tensor([0, 0, 0, 1, 1])
    targets = torch.tensor([2, 4, 4, 2, 3])
    places = [1, 2, 3, 6, 7]
    states, items = torch.randn(5, 8).double(), torch.randn(6, 8).double()  # item 5 is in no slot
    multiplicity = torch.tensor([1, 1, 2, 1, 2, 0])  # item 0 is the first slot's
    log_popularity = torch.rand(6).double().log()
    plain, plain_grads = with_gradients(
        lambda s, v: slot_softmax(s, v, targets, rows, slots, log_popularity, places), states, items
    )
    ours, our_grads = with_gradients(
        lambda s, v: in_batch_softmax(
            s, v, targets, rows, slots, multiplicity, log_popularity.float()
        ),
        states.float(),
        items.float(),
    )
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, reference in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-6)


def test_bce_is_the_sum_of_log_odds():
    states = torch.tensor([[1.0, 0.0]])
    items = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 5.0]])
    # One target among 2 negatives: odds of 1 / 2 on top of e^score.
    # log(1 + 2 e^-2) + log(1 + e^-1 / 2) + log(1 + 1 / 2)
    expected = math.log1p(2 * math.exp(-2)) + math.log1p(math.exp(-1) / 2) + math.log(1.5)
    loss = bce(states, items, torch.tensor([1]), torch.tensor([[2, 0]]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("negatives", [[2], [2, 0, 1]])
@pytest.mark.parametrize("own", [False, True])
def test_a_model_that_tells_no_items_apart_begins_at_the_optimum_of_bce_and_gbce(negatives, own):
    """All scores 0: moving all of them by the same number is no help, whatever K and beta."""
    states, items = torch.ones(1, 1), torch.zeros(4, 1)
    sampled = torch.tensor([negatives] if own else negatives)
    for loss in (bce, lambda *given: gbce(*given, 0.3)):
        shift = torch.zeros((), requires_grad=True)
        loss(states, items + shift, torch.tensor([3]), sampled).backward()
        assert shift.grad.item() == pytest.approx(0, abs=1e-7)


def test_one_negative_of_plain_bce_leaves_scores_as_they_are():
    states, items = torch.tensor([[1.0]]), torch.tensor([[2.0], [-1.0]])
    expected = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))
    loss = bce(states, items, torch.tensor([0]), torch.tensor([[1]]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_bpr_is_the_mean_of_log_odds_of_differences():
    states = torch.tensor([[1.0, 0.0]])
    items = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 5.0]])
    # (-log s(2 - (-1)) - log s(2 - 0)) / 2 = (log(1 + e^-3) + log(1 + e^-2)) / 2
    expected = (math.log1p(math.exp(-3)) + math.log1p(math.exp(-2))) / 2
    loss = bpr(states, items, torch.tensor([1]), torch.tensor([[2, 0]]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


P, M, K = 20, 30, 7
CASES = {"shared": M, "own, all items scored": M, "own, gathered": 25 * K}
"""How negatives are held -> M; up to 24 items a negative, all of them are scored."""


def random_case(case="shared"):
    """States, items, targets, negatives: (K,) shared, one of them a target twice, or (P, K)."""
    torch.manual_seed(3)
    states, items = torch.randn(P, 8), torch.randn(CASES[case], 8)
    targets = torch.randint(0, len(items), (P,))
    negatives = torch.randint(0, len(items), (K,) if case == "shared" else (P, K))
    if case == "shared":
        negatives[1] = negatives[4] = targets[0]
    else:  # the same item again and again, and the target itself
        negatives[0, 1:5], negatives[1, 2] = 3, targets[1]
    return states, items, targets, negatives


def kept_negatives(targets, negatives, p):
    """The negatives of position p as a list, without its target where they are shared."""
    if negatives.dim() == 2:
        return negatives[p].tolist()
    return [n for n in negatives.tolist() if n != targets[p].item()]


def same(ours, plain, states, items):
    """Value and gradients of a loss in float32 against its formula in float64."""
    value, grads = with_gradients(plain, states.double(), items.double())
    mine, my_grads = with_gradients(ours, states, items)
    assert mine.item() == pytest.approx(value.item(), rel=1e-6)
    for got, wanted in zip(my_grads, grads, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def plain_bce(case, beta=1.0, parts=1):
    """Bce's formula, its positives to the power of beta, over so many parts."""
    _, _, targets, negatives = case
    prior = math.log(beta / K)

    def plain(s, v):
        total = s.new_zeros(())
        for p in range(P):
            total = total - (torch.sigmoid(prior + s[p] @ v[targets[p]]) ** beta).log() / parts
            for n in kept_negatives(targets, negatives, p):
                total = total - (1 - torch.sigmoid(prior + s[p] @ v[n])).log() / parts
        return total

    return plain


@pytest.mark.parametrize("name", CASES)
def test_bce_equals_its_formula(name):
    case = states, items, targets, negatives = random_case(name)
    same(lambda s, v: bce(s, v, targets, negatives), plain_bce(case), states, items)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
def test_gbce_equals_its_formula(name, calibration):
    case = states, items, targets, negatives = random_case(name)
    catalogue = 1001
    alpha = K / (catalogue - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    ours = gbce_beta(K, catalogue, calibration)
    plain = plain_bce(case, beta, K + 1)
    same(lambda s, v: gbce(s, v, targets, negatives, ours), plain, states, items)


@pytest.mark.parametrize("name", CASES)
def test_bpr_equals_its_formula(name):
    states, items, targets, negatives = random_case(name)

    def plain(s, v):
        total = s.new_zeros(())
        for p in range(P):
            for n in kept_negatives(targets, negatives, p):
                difference = s[p] @ v[targets[p]] - s[p] @ v[n]
                total = total - torch.sigmoid(difference).log() / K
        return total

    same(lambda s, v: bpr(s, v, targets, negatives), plain, states, items)


@pytest.mark.parametrize("name", ["own, all items scored", "own, gathered"])
@pytest.mark.parametrize("rows", [0, 7, 19])  # of a chunk of 20 positions; at least one is taken
def test_a_chunk_of_any_size_gives_the_same(name, rows):
    case = states, items, targets, negatives = random_case(name)
    row = len(items) if name == "own, all items scored" else (1 + K) * 8
    chunk_bytes = 4 * row * rows
    same(lambda s, v: bce(s, v, targets, negatives, chunk_bytes), plain_bce(case), states, items)


@pytest.mark.parametrize("name", ["own, all items scored", "own, gathered"])
def test_all_items_are_scored_where_that_is_less_work(name, monkeypatch):
    states, items, targets, negatives = random_case(name)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a) or mm(*a, **k))
    bce(states, items, targets, negatives)
    assert bool(products) == (name == "own, all items scored")


@pytest.mark.parametrize("name", CASES)
def test_losses_of_half_precision_states_are_summed_in_full(name):
    states, items, targets, negatives = random_case(name)
    states, items = states.bfloat16(), items.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = bce(states, items, targets, negatives)
    full = bce(states.float(), items.float(), targets, negatives)
    # Shared negatives are scored in half precision: 8 bits each, errors of either sign.
    within = 1e-2 if name == "shared" else 1e-7
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=within)


@pytest.mark.parametrize("loss", [bce, bpr, full_softmax])
def test_a_process_without_positions_adds_nothing(loss):
    items = torch.randn(5, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    negatives = () if loss is full_softmax else (none.reshape(0, 3),)
    total = loss(torch.zeros(0, 8), items, none, *negatives)
    total.backward()
    assert total.item() == 0 and not items.grad.any()


@pytest.mark.parametrize(
    ("negatives", "items", "calibration", "beta"),
    [
        (256, 3417, 0.0, 1.0),  # plain bce
        (256, 3417, 1.0, 256 / 3416),  # the sampling rate
        (1, 11, 0.75, 0.325),  # .1 (.75 (1 - 10) + 10) = .1 x 3.25
        (10, 11, 0.5, 1.0),  # all negatives sampled: nothing to calibrate
    ],
)
def test_gbce_beta_as_a_table(negatives, items, calibration, beta):
    assert gbce_beta(negatives, items, calibration) == pytest.approx(beta)


@pytest.mark.parametrize("correct_positive", [False, True])
def test_sampled_softmax_equals_its_formula(correct_positive):
    states, items, targets, negatives = random_case()
    log_expected = torch.randn(len(items))

    def plain(s, v):
        total = s.new_zeros(())
        expected = log_expected.double()
        for p in range(P):
            positive = s[p] @ v[targets[p]]
            if correct_positive:
                positive = positive - expected[targets[p]]
            kept = kept_negatives(targets, negatives, p)
            others = [(s[p] @ v[n] - expected[n]).exp() for n in kept]
            total = total - (positive.exp() / (positive.exp() + sum(others))).log()
        return total

    same(
        lambda s, v: sampled_softmax(s, v, targets, negatives, log_expected, correct_positive),
        plain, states, items,
    )  # fmt: skip


def test_sampled_softmax_estimates_the_sum_over_all_items_without_bias():
    torch.manual_seed(4)
    states, items, targets = torch.randn(1, 4), torch.randn(9, 4), torch.tensor([2])
    share = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9]) / 45
    draws = 200_000  # of one negative each: the mean of the sums is the expected sum
    log_expected = share.log()
    negatives = torch.multinomial(share, draws, replacement=True)
    scores = (states @ items.T)[0]
    weights = torch.where(negatives == 2, 0.0, (scores - log_expected)[negatives].exp())
    estimate = scores[2].exp() + weights.mean()
    assert estimate.item() == pytest.approx(scores.exp().sum().item(), rel=0.02)
    one = sampled_softmax(states, items, targets, negatives[:1], log_expected, False)
    assert one.item() == pytest.approx(
        (scores[2].exp() + weights[0]).log().item() - scores[2].item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "full_softmax", "negatives": 5}, r"loss\.negatives=5 means nothing"),
        ({"name": "in_batch", "chunk_megabytes": 9}, r"loss\.chunk_megabytes=9 means nothing"),
        (
            {"name": "bpr", "share_negatives": True, "chunk_megabytes": 9},
            r"chunk_megabytes=9 means nothing to negatives that the step shares",
        ),
        ({"name": "bpr", "sampler": "popularity"}, "sampler=popularity means nothing"),
        ({"name": "bce", "calibration": 0.5}, r"loss\.calibration=0\.5 means nothing"),
        ({"name": "sampled_softmax", "share_negatives": True}, "share_negatives=true means"),
        ({"name": "gbce", "calibration": 1.5}, r"must lie in \[0, 1\]"),
        ({"name": "bce", "sampler": "popularity"}, "sampler=popularity means nothing"),
    ],
)
def test_an_option_that_the_loss_would_ignore_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        LossConfig(**options)


def test_a_loss_without_negatives_is_refused():
    with pytest.raises(UsageError, match=r"loss\.negatives=0"):
        LossConfig(name="bce", negatives=0)
