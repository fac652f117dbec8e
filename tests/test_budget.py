"""The safety state's arithmetic and the objectives, against fractions and hand-worked numbers."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inferenceguard import objectives
from inferenceguard.budget import ACCOUNTINGS, SafetyBudget, block_cost, check_accounting, spend_blocks
from inferenceguard.errors import InvalidArgument, UnknownName

quarters = st.integers(-40, 40).map(lambda n: n / 4)  # exact in binary
discounts = st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.25])
blocks = st.lists(st.tuples(quarters, st.integers(1, 12)), min_size=1, max_size=8)


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def spend_all(budget: SafetyBudget, charges: list[tuple[float, int]]) -> float:
    z = budget.start(1)
    for cost, tokens in charges:
        z = budget.spend(z, row(cost), torch.tensor([tokens]))
    return float(z)


def discounted_sum(charges: list[tuple[float, int]], discount: float) -> Fraction:
    """sum_t gamma^t c_t in fractions, each block's cost standing at the block's last token."""
    total, time = Fraction(0), 0
    for cost, tokens in charges:
        time += tokens
        total += Fraction(discount) ** (time - 1) * Fraction(cost)
    return total


@given(charges=blocks, limit=quarters, discount=st.sampled_from([1.0, 0.5, 0.25]))
def test_safe_exactly_when_the_discounted_cost_is_within_the_budget(charges, limit, discount):
    # All numbers are binary fractions, so the product's arithmetic has no rounding to hide behind.
    budget = SafetyBudget(limit, discount)
    within = discounted_sum(charges, discount) <= Fraction(limit)
    assert bool(budget.is_safe(row(spend_all(budget, charges)))) == within


@given(charges=blocks, limit=quarters, discount=discounts)
def test_z_is_what_is_left_divided_by_the_discount(charges, limit, discount):
    tokens = sum(length for _, length in charges)
    exact = (Fraction(limit) - discounted_sum(charges, discount)) / Fraction(discount) ** tokens
    scale = sum(abs(cost) for cost, _ in charges) + abs(limit)
    assert spend_all(SafetyBudget(limit, discount), charges) == pytest.approx(
        float(exact), rel=1e-9, abs=1e-9 * scale / discount**tokens
    )


@given(limit=quarters, discount=discounts, start=quarters, cost=quarters, tokens=st.integers(1, 40))
def test_a_block_is_its_tokens_one_by_one(limit, discount, start, cost, tokens):
    """z / gamma^m - c / gamma is m single steps of z <- (z - c_t) / gamma with the cost at the last one."""
    z = start
    for step in range(tokens):
        z = (z - (cost if step == tokens - 1 else 0.0)) / discount
    spent = SafetyBudget(limit, discount).spend(row(start), row(cost), torch.tensor([tokens]))
    assert float(spent) == pytest.approx(z, rel=1e-9, abs=1e-9)


@given(charges=blocks, limit=quarters, discount=discounts, data=st.data())
def test_cutting_blocks_changes_nothing(charges, limit, discount, data):
    """A block may be cut anywhere as long as its cost stands at the same token."""
    finer = []
    for cost, tokens in charges:
        cut = data.draw(st.integers(0, tokens - 1))
        finer += ([(0.0, cut)] if cut else []) + [(cost, tokens - cut)]
    budget = SafetyBudget(limit, discount)
    assert spend_all(budget, finer) == pytest.approx(spend_all(budget, charges), rel=1e-9, abs=1e-9)


@given(
    before=blocks,
    after=blocks,
    limit=quarters,
    discount=discounts,
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    tokens=st.integers(1, 5),
)
def test_a_cost_that_is_no_number_spends_everything_for_good(before, after, limit, discount, bad, tokens):
    assert spend_all(SafetyBudget(limit, discount), [*before, (bad, tokens), *after]) == -math.inf


@given(rows=st.lists(st.tuples(quarters, quarters, st.integers(1, 9)), min_size=1, max_size=6), discount=discounts)
def test_rows_do_not_touch_each_other(rows, discount):
    budget = SafetyBudget(0.0, discount)
    z, cost, tokens = zip(*rows, strict=True)
    together = budget.spend(row(*z), row(*cost), torch.tensor(tokens))
    alone = [float(budget.spend(row(a), row(c), torch.tensor([m]))) for a, c, m in rows]
    assert together.tolist() == alone


def test_overflow_fails_closed():
    budget = SafetyBudget(1.0, 0.5)
    assert float(budget.spend(row(1.0), row(0.0), torch.tensor([5000]))) == -math.inf
    assert float(budget.spend(row(0.0), row(0.0), torch.tensor([5000]))) == -math.inf
    assert float(SafetyBudget().spend(row(-1e308), row(1.7e308), torch.tensor([1]))) == -math.inf


def test_is_safe_is_z_at_least_zero_and_nothing_else():
    z = row(0.0, -0.0, 5e-324, -5e-324, math.nan, -math.inf)
    assert SafetyBudget().is_safe(z).tolist() == [True, True, True, False, False, False]


def test_half_precision_costs_are_charged_as_given():
    spent = SafetyBudget(1.0).spend(row(1.0).float(), torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor([1]))
    assert spent.dtype == torch.float64
    assert spent.tolist() == [0.5]


def test_nothing_drawn_costs_nothing():
    budget = SafetyBudget(2.0, 0.5)
    assert budget.spend(row(2.0), row(0.0), torch.tensor([0])).tolist() == [2.0]
    with pytest.raises(InvalidArgument, match="tokens must be >= 1 where a cost is charged"):
        budget.spend(row(2.0), row(0.25), torch.tensor([0]))
    for unknown in (math.nan, math.inf):  # a fault of a scorer, not of the caller
        assert budget.spend(row(2.0), row(unknown), torch.tensor([0])).tolist() == [-math.inf]
    with pytest.raises(InvalidArgument, match="tokens must be >= 1"):
        budget.spend(row(2.0), row(0.25), torch.tensor([-1]))


@pytest.mark.parametrize("limit", [math.nan, math.inf, -math.inf])
def test_budget_must_be_finite(limit):
    with pytest.raises(InvalidArgument, match="budget must be a finite number"):
        SafetyBudget(limit)


@pytest.mark.parametrize("discount", [0.0, -0.5, 1.0001, math.nan, math.inf])
def test_discount_must_be_in_its_bounds(discount):
    with pytest.raises(InvalidArgument, match=r"discount must be in \(0, 1\]"):
        SafetyBudget(0.0, discount)


def test_accountings_are_named():
    for accounting in ACCOUNTINGS:
        check_accounting(accounting)
    with pytest.raises(UnknownName, match="Did you mean 'increment'"):
        check_accounting("increments")


# Three blocks of one response whose text so far scores 1, then -0.5, then 2 (and, alone, 1, -1.5 and 2.5).
@pytest.mark.parametrize(
    ("accounting", "scores", "charges"),
    [
        ("increment", [1.0, -0.5, 2.0], [1.0, -1.5, 2.5]),
        ("accumulate", [1.0, -1.5, 2.5], [1.0, 0.0, 2.5]),
        ("final", [1.0, -0.5, 2.0], [0.0, 0.0, 2.0]),
    ],
)
def test_block_cost_by_hand(accounting, scores, charges):
    previous, found = 0.0, []
    for index, score in enumerate(scores):
        found.append(float(block_cost(accounting, row(score), row(previous), torch.tensor([index == 2]))))
        previous = score
    assert found == charges


# d = 3, blocks of 2, 1 and 3 tokens. gamma 1: 3 less the charges. gamma 1/2, by hand for `increment`:
#   3 / (1/4) - 1 / (1/2) = 10;   10 / (1/2) - (-1.5) / (1/2) = 23;   23 / (1/8) - 2.5 / (1/2) = 179
@pytest.mark.parametrize(
    ("accounting", "scores", "discount", "path"),
    [
        ("increment", [1.0, -0.5, 2.0], 1.0, [2.0, 3.5, 1.0]),
        ("accumulate", [1.0, -1.5, 2.5], 1.0, [2.0, 2.0, -0.5]),
        ("final", [1.0, -0.5, 2.0], 1.0, [3.0, 3.0, 1.0]),
        ("increment", [1.0, -0.5, 2.0], 0.5, [10.0, 23.0, 179.0]),
        ("accumulate", [1.0, -1.5, 2.5], 0.5, [10.0, 20.0, 155.0]),
        ("final", [1.0, -0.5, 2.0], 0.5, [12.0, 24.0, 188.0]),
    ],
)
def test_spend_blocks_by_hand(accounting, scores, discount, path):
    assert spend_blocks(SafetyBudget(3.0, discount), accounting, scores, [2, 1, 3]) == path


@given(scores=st.lists(quarters, min_size=1, max_size=8), limit=quarters, data=st.data())
def test_increments_add_up_to_the_score_of_the_text(scores, limit, data):
    """With gamma = 1 the spent budget is always the score of the text so far, whatever the blocks were."""
    tokens = data.draw(st.lists(st.integers(1, 9), min_size=len(scores), max_size=len(scores)))
    path = spend_blocks(SafetyBudget(limit), "increment", scores, tokens)
    assert path == [float(Fraction(limit) - Fraction(score)) for score in scores]


@given(scores=st.lists(quarters, min_size=1, max_size=8), limit=quarters)
def test_accumulated_cost_is_never_refunded(scores, limit):
    path = spend_blocks(SafetyBudget(limit), "accumulate", scores, [1] * len(scores))
    assert all(later <= earlier for earlier, later in zip([limit, *path], path, strict=False))
    assert path[-1] == float(Fraction(limit) - sum(max(Fraction(score), Fraction(0)) for score in scores))


@pytest.mark.parametrize("accounting", ACCOUNTINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_fails_closed_under_every_accounting(accounting, bad):
    """Also in the middle: a block that could not be scored is not refunded by the next one."""
    for where in range(3):
        scores = [bad if index == where else -1.0 for index in range(3)]
        assert spend_blocks(SafetyBudget(100.0), accounting, scores, [1, 1, 1])[-1] == -math.inf
        last = block_cost(accounting, row(bad), row(0.0), torch.tensor([True]))
        assert not math.isfinite(float(SafetyBudget(100.0).spend(row(100.0), last, torch.tensor([1]))))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_previous_score_that_is_no_number_fails_closed(bad):
    charged = block_cost("increment", row(0.5), row(bad), torch.tensor([True]))
    assert float(SafetyBudget(100.0).spend(row(100.0), charged, torch.tensor([1]))) == -math.inf


finite = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=6))
def test_objectives_row_by_row(rows):
    reward, cost, budget = (row(*column) for column in zip(*rows, strict=True))
    assert objectives.reward_only(reward, cost, budget).tolist() == [r for r, _, _ in rows]
    assert objectives.cost_only(reward, cost, budget).tolist() == [-c for _, c, _ in rows]
    assert objectives.lagrangian(reward, cost, budget, multiplier=5.0).tolist() == [r - 5.0 * c for r, c, _ in rows]
    assert objectives.augmented(reward, cost, budget, penalty=1e7).tolist() == [
        r if z >= 0 else -1e7 for r, _, z in rows
    ]


def test_augmented_penalises_what_is_no_number():
    reward, budget = row(math.nan, math.inf, 1.0, 1.0, 1.0, 1.0), row(1.0, 1.0, math.nan, -math.inf, -1e-12, 0.0)
    assert objectives.augmented(reward, torch.zeros(6), budget, penalty=9.0).tolist() == [-9.0] * 5 + [1.0]
