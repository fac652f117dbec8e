"""Rows charged in turn: who is asked about, by hand, and the same answers as when all are charged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inferenceguard.beams import Beams
from inferenceguard.budget import Accounting, SafetyBudget
from inferenceguard.contracts import Conversation, Models, Sampling, SearchResult, conversation
from inferenceguard.guard import Guard
from inferenceguard.record import replay
from inferenceguard.scorers.safe import FailClosed
from inferenceguard.strategies import InferenceGuard
from inferenceguard.strategies.in_turn import InTurn
from inferenceguard.strategies.ledger import Ledger
from inferenceguard.strategies.ranking import Ranking
from inferenceguard.testing import FaultyScorer, ToyCost, ToyCritic, ToyEngine, ToyReward, toy_models
from test_strategies_objectives import PROMPT, Listed, Numbered, Told, rows

NAN, INF = math.nan, math.inf


class Noted(Listed):
    """Notes which rows it was asked about, call by call."""

    def __init__(self, values: Sequence[float], fails: int = -1) -> None:
        super().__init__(values)
        self.calls: list[list[int]] = []
        self.fails = fails

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        self.calls.append(sorted(int(text.split()[-1]) for text in responses))
        if len(self.calls) - 1 == self.fails:
            raise RuntimeError("this call fails on purpose")
        return super().score(prompts, responses)


def in_turn(reward: Noted, cost: Noted, keep: int, critic: Told | None = None, margin: float = 1.0) -> InTurn:
    models = Models(Numbered(1), reward, cost)
    ledger = Ledger.of([PROMPT], models, SafetyBudget(2.0), "increment", 10)
    return InTurn(ledger, Ranking("augmented", penalty=100.0), critic, keep, margin)


def numbered(z: Sequence[float], finished: Sequence[bool] | None = None) -> Beams:
    """Rows that have drawn their tokens in one block."""
    beams = rows(z, finished)
    return replace(beams, blocks=tuple((len(tokens),) for tokens in beams.token_ids))


SAFE = [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0]


def test_the_best_are_charged_until_k_are_within_the_budget() -> None:
    reward, cost = Noted([1.0, 6.0, 3.0, 5.0, 2.0, 4.0]), Noted([-1.0, 9.0, -1.0, 0.5, -1.0, -1.0])
    turns = in_turn(reward, cost, keep=2)
    charged = turns.charge(numbered([2.0] * 6))
    assert reward.calls == [[0, 1, 2, 3, 4, 5]]
    assert cost.calls == [[1, 3], [2, 5]], "the two best, of which one is over the budget, then twice as many"
    assert charged.cost.tolist() == [INF, 9.0, -1.0, 0.5, INF, -1.0]
    assert charged.beams.budget.tolist() == [-INF, -7.0, 3.0, 1.5, -INF, 3.0]
    scored = turns.score(charged.beams)
    assert scored.feasible.tolist() == [False, False, True, True, False, True]
    assert scored.usable.tolist() == [False, True, True, True, False, True], "who is passed over is never kept"
    assert scored.score.tolist() == [1.0, -100.0, 3.0, 5.0, 2.0, 4.0]
    assert len(reward.calls) == 1, "rewards are not asked for again"


def test_ties_with_the_kth_best_are_charged_too() -> None:
    reward, cost = Noted([1.0, 2.0, 2.0, 2.0, 0.0]), Noted(SAFE)
    in_turn(reward, cost, keep=2).charge(numbered([2.0] * 5))
    assert cost.calls == [[1, 2], [3]], "what is left of the budget decides between equal rewards"


def test_each_prompt_has_its_own_turns() -> None:
    reward, cost = Noted([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), Noted([-1.0, -1.0, -1.0, 9.0, 9.0, -1.0])
    turns = in_turn(reward, cost, keep=1)
    turns.ledger.terms[1] = turns.ledger.terms[0]
    charged = turns.charge(replace(numbered([2.0] * 6), prompt_index=torch.tensor([0, 0, 0, 1, 1, 1])))
    assert cost.calls == [[0, 3], [4], [5]]
    assert turns.score(charged.beams).feasible.tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize(
    ("z", "keep", "objective", "cost_calls", "reward_calls"),
    [
        ([2.0, 2.0, 2.0], 3, "augmented", [[0, 1, 2]], [[0, 1, 2]]),  # no more than K rows
        ([0.5, 0.5, 2.0], 1, "augmented", [[0, 1, 2]], [[0, 1, 2]]),  # most are near the budget
        ([2.0, 2.0, 2.0], 1, "lagrangian", [[0, 1, 2]], [[0, 1, 2]]),  # its score needs the cost
        ([0.5, 2.0, 2.0], 1, "augmented", [[0]], [[0, 1, 2]]),
    ],
)
def test_all_are_charged_at_once_where_turns_do_not_pay(
    z: list[float], keep: int, objective: str, cost_calls: list[list[int]], reward_calls: list[list[int]]
) -> None:
    reward, cost = Noted([3.0, 2.0, 1.0]), Noted(SAFE)
    turns = in_turn(reward, cost, keep)
    turns.ranking = Ranking(objective)
    turns.score(turns.charge(numbered(z)).beams)
    assert (cost.calls, reward.calls) == (cost_calls, reward_calls)


class Bounding(Told):
    """One that says what is the most at any z."""

    def __init__(self, p_safe: Sequence[float], value: Sequence[float], most: Sequence[float]) -> None:
        super().__init__(p_safe, value)
        self.most = torch.tensor(most, dtype=torch.float64)

    def at_most(self, latent: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        row = (progress * 10).round().long() - 2
        return self.p_safe[row], self.most[row]


def test_open_rows_go_by_what_their_value_is_at_most() -> None:
    p_safe, value = [0.9, 0.9, 0.4, 0.9, 0.9, 0.9], [1.0, 3.0, 9.0, 2.5, 0.0, 0.5]
    cost = Noted([-1.0, -1.0, -1.0, 9.0, -1.0, -1.0])
    critic = Bounding(p_safe, value, most=[4.0, 3.5, 9.5, 3.0, 2.0, NAN])
    turns = in_turn(Noted(SAFE), cost, keep=1, critic=critic)
    charged = turns.charge(numbered([0.0] * 6, finished=[False] * 6))
    # 5 has no bound, so it goes first; then 0. Both are within the budget, but 1 and 3 may yet be better. Of these 1 is
    # better than all that 4 may be, and 2 is hopeless at any z.
    assert cost.calls == [[0, 5], [1, 3]]
    scored = turns.score(charged.beams)
    assert scored.score.tolist() == [1.0, 3.0, -100.0, -100.0, 2.0, 0.5]
    assert scored.feasible.tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("answer", [None, (torch.ones(2), torch.ones(2)), (torch.full((3,), torch.nan),) * 2])
def test_a_critic_that_fails_to_bound_has_all_rows_charged(answer: tuple[Tensor, Tensor] | None) -> None:
    class Broken(Told):
        def at_most(self, latent: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
            if answer is None:
                raise RuntimeError("this critic fails on purpose")
            return answer

    cost = Noted(SAFE)
    turns = in_turn(Noted(SAFE), cost, keep=1, critic=Broken([0.9] * 3, [1.0, 2.0, 3.0]))
    scored = turns.score(turns.charge(numbered([0.0] * 3, finished=[False] * 3)).beams)
    assert sorted(row for call in cost.calls for row in call) == [0, 1, 2]
    assert scored.score.tolist() == [1.0, 2.0, 3.0]


def test_hopeless_rows_are_charged_where_nothing_better_is_found() -> None:
    cost = Noted([9.0, -1.0, -1.0])
    critic = Bounding([0.9, 0.4, 0.4], [1.0, 2.0, 3.0], most=[1.5, 2.5, 3.5])
    turns = in_turn(Noted(SAFE), cost, keep=1, critic=critic)
    scored = turns.score(turns.charge(numbered([0.0] * 3, finished=[False] * 3)).beams)
    assert cost.calls == [[0, 1], [2]], "they may have to go on with it, as when all are charged"
    assert scored.usable.tolist() == [True, True, True]


def test_with_a_critic_that_gives_no_bounds_open_rows_are_all_charged() -> None:
    reward, cost = Noted([9.0, 8.0, 3.0, 2.0, 1.0]), Noted(SAFE)
    turns = in_turn(reward, cost, keep=1, critic=Told([0.9] * 5, [0.25] * 5))
    charged = turns.charge(numbered([2.0] * 5, finished=[False, False, True, True, True]))
    assert reward.calls == [[2, 3, 4]]
    assert cost.calls == [[0, 1, 2]], "the open ones, and with them the best of the finished"
    scored = turns.score(charged.beams)
    assert scored.score.tolist() == [0.25, 0.25, 3.0, 2.0, 1.0]
    assert scored.feasible.tolist() == [True, True, True, False, False]


def test_scorers_that_fail_let_nothing_through() -> None:
    reward, cost = Noted([4.0, NAN, 3.0, 2.0, 1.0]), Noted(SAFE, fails=0)
    turns = in_turn(reward, cost, keep=1)
    charged = turns.charge(numbered([2.0] * 5))
    assert cost.calls == [[0], [2]], "a row whose cost is unknown is over the budget; one without a reward is not asked"
    scored = turns.score(charged.beams)
    assert scored.feasible.tolist() == [False, False, True, False, False]
    assert scored.usable.tolist() == [False, False, True, False, False]
    assert charged.cost[:2].isnan().all()
    assert len(charged.faults) == 2

    reward = Noted([4.0, 3.0, 2.0], fails=0)
    turns = in_turn(reward, cost := Noted(SAFE), keep=1)
    scored = turns.score(turns.charge(numbered([2.0] * 3)).beams)
    assert cost.calls == []
    assert not scored.usable.any()


def kept(found: SearchResult) -> list[object]:
    """What a search comes to: its rows, and which proposals it kept."""
    numbers = [*zip(found.beams.token_ids, found.beams.score.tolist(), found.beams.budget.tolist(), strict=True)]
    return [numbers, [[tuple(fate == "kept" for fate in block.fate) for block in trace] for trace in found.trace]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), limit=st.sampled_from([-0.5, 0.0, 0.75, 2.0]), discount=st.sampled_from([1.0, 0.9]),
    accounting=st.sampled_from(["increment", "accumulate", "final"]), critic=st.booleans(), keep=st.integers(1, 4),
    drift=st.sampled_from([-0.25, 0.0, 0.25]),
)  # fmt: skip
def test_the_same_rows_are_kept_as_when_all_are_charged(
    seed: int, limit: float, discount: float, accounting: Accounting, critic: bool, keep: int, drift: float
) -> None:
    engine = ToyEngine(seed=seed % 7, end_logit=-0.5)
    reward, cost = ToyReward(seed), ToyCost(seed + 1, low=-1.0 + drift, high=1.0 + drift)
    prompts = [PROMPT, conversation("be plain")]
    mind = ToyCritic(engine, prompts, reward, cost, 6) if critic and accounting == "increment" else None
    models = Models(engine, reward, cost, critic=mind)
    strategy = InferenceGuard(
        4 * keep, keep, 2, 6, retries=1, budget=SafetyBudget(limit, discount), accounting=accounting, margin=0.0
    )
    found = strategy.generate(prompts, models, Sampling(), [seed, seed + 1])
    expected = replace(strategy, charge_all=True).generate(prompts, models, Sampling(), [seed, seed + 1])
    assert kept(found) == kept(expected)


def test_fewer_rows_are_charged() -> None:
    models = toy_models(cost_mean=-0.5)
    counts = {}
    for name, strategy in (
        ("in turn", InferenceGuard(16, 4, 2, 8)),
        ("all", InferenceGuard(16, 4, 2, 8, charge_all=True)),
    ):
        (trace,) = strategy.generate([PROMPT], models, Sampling(), [1]).trace
        counts[name] = sum(cost is not None for block in trace for cost in block.cost)
        passed = [fate for block in trace for fate, cost in zip(block.fate, block.cost, strict=True) if cost is None]
        assert set(passed) <= {"outranked"}
    assert counts["in turn"] < 0.7 * counts["all"]


def test_the_record_says_who_was_not_charged_and_can_be_replayed() -> None:
    models = toy_models(cost_mean=-0.5)
    guard = Guard(models.engine, models.reward, models.cost, strategy=InferenceGuard(16, 4, 2, 8), fallbacks=["kind"])
    (response,) = guard.generate("be kind", seed=1)
    record = json.loads(json.dumps(response.record, allow_nan=False))
    assert any(cost is None for block in record["search"] for cost in block["cost"])
    assert record["faults"] == []
    assert replay(record, FailClosed(models.cost)).holds


def test_nothing_over_budget_leaves_when_scorers_fail_at_random() -> None:
    prompts, injected = ["be kind", "be plain"], 0
    for seed in range(15):
        models = toy_models(seed, cost_mean=-0.25)
        reward, cost = (FaultyScorer(scorer, seed, raises=0.2, nans=0.2) for scorer in (models.reward, models.cost))
        strategy = InferenceGuard(12, 3, 2, 6, margin=0.0)
        guard = Guard(models.engine, reward, cost, gate_cost=models.cost, strategy=strategy, fallbacks=["kind"])
        for prompt, response in zip(prompts, guard.generate(prompts, seed=seed), strict=True):
            if response.finish_reason != "content_filter":
                assert float(models.cost.score([conversation(prompt)], [response.text])[0]) <= 0
        injected += sum((reward.injected + cost.injected).values())
    assert injected > 30
