"""Charging in turn: where the reward decides, the cost model reads only the rows that may be kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from inferenceguard.beams import Beams
from inferenceguard.contracts import Critic
from inferenceguard.scorers.safe import Outcome
from inferenceguard.search import Charged, Scored
from inferenceguard.strategies.ledger import COST_STATE, Ledger
from inferenceguard.strategies.ranking import Ranking


@dataclass
class InTurn:
    """Charges rows by falling reward until K of their prompt are within the budget, where that is likely to pay.

    What is kept is what would be kept if all were charged: a row that is passed over has a smaller reward than K rows
    within the budget. It counts as having spent everything, so that nothing can come of it.

    In turn go rows that rank by their reward alone (finished ones; without a critic open ones too, but a critic's value
    needs z), where a prompt has more than K of them and most continue rows whose z is `margin` or more. Elsewhere the
    cost model would have to read most rows all the same, and the reward model those over the budget for nothing.
    """

    ledger: Ledger
    ranking: Ranking
    critic: Critic | None
    keep: int  # K
    margin: float  # cost units of z
    _rewards: Tensor | None = field(default=None, init=False)  # [B] of the rows charged last; NaN where not asked
    _passed: Tensor | None = field(default=None, init=False)  # [B] bool: those that were passed over

    def charge(self, rows: Beams) -> Charged:
        """z after the block that each row has just drawn. Of rows that are passed over z is -inf and the cost inf."""
        late = self._late(rows)
        if not bool(late.any()):
            self._rewards = self._passed = None
            return self.ledger.charge(rows)
        rewards, states = self.ledger.rewards(rows, late)
        self._rewards = told = torch.where(late, rewards.values, torch.nan)
        rows, waiting = replace(rows, states=states), torch.isfinite(told)  # without a reward a row is never kept
        scores = Outcome(torch.full_like(told, torch.nan), rewards.faults)
        charged = self.ledger.spend(rows, scores)
        asked, turn = torch.zeros_like(late), ~late | self._next(rows, waiting, charged.beams.budget)
        while bool(turn.any()):
            scores = _merged(scores, self.ledger.block_scores(rows, turn), turn)
            charged, asked = self.ledger.spend(rows, scores), asked | turn
            turn = self._next(rows, waiting, charged.beams.budget, asked)
        self._passed = waiting & ~asked
        return replace(charged, cost=torch.where(self._passed, torch.inf, charged.cost))

    def score(self, rows: Beams) -> Scored:
        """How they rank, with the rewards that charging has asked for. Those passed over stand with their reward."""
        scored = self.ranking.score(rows, self.ledger, self.critic, self._rewards)
        if self._rewards is None or self._passed is None:
            return scored
        return replace(scored, score=torch.where(self._passed, self._rewards, scored.score))

    def _late(self, rows: Beams) -> Tensor:
        """[B] bool: charged in turn."""
        late = torch.zeros(len(rows), dtype=torch.bool)
        if self.ranking.objective != "augmented" or self.ranking.calm is not None or COST_STATE in rows.states:
            return late  # `calm` asks about all rows, and a cost model that keeps a state must read them all
        by_reward = torch.ones_like(late) if self.critic is None else rows.finished
        far = rows.budget >= self.margin
        for prompt in set(rows.prompt_index.tolist()):
            mine = by_reward & (rows.prompt_index == prompt)
            count = int(mine.sum())
            if count > self.keep and 2 * int(far[mine].sum()) > count:
                late |= mine
        return late

    def _next(self, rows: Beams, waiting: Tensor, z: Tensor, asked: Tensor | None = None) -> Tensor:
        """[B] bool: whose turn it is. Twice as many as so far, at first K; ties with the K-th best are asked too."""
        rewards = self._rewards
        assert rewards is not None
        asked = torch.zeros_like(waiting) if asked is None else asked
        turn = torch.zeros_like(waiting)
        for prompt in set(rows.prompt_index[waiting].tolist()):
            mine = waiting & (rows.prompt_index == prompt)
            left = torch.nonzero(mine & ~asked)[:, 0]
            safe = rewards[mine & asked & self.ledger.budget.is_safe(z)].sort(descending=True).values
            if len(safe) >= self.keep:
                turn[left[rewards[left] >= safe[self.keep - 1]]] = True
            else:
                count = max(self.keep, int((mine & asked).sum()))
                turn[left[rewards[left].argsort(descending=True, stable=True)[:count]]] = True
        return turn


def _merged(before: Outcome, new: Outcome, which: Tensor) -> Outcome:
    faults = tuple(dict.fromkeys(before.faults + new.faults))
    return Outcome(torch.where(which, new.values, before.values), faults)
