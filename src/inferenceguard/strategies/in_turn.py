"""Charging in turn: the cost model reads only the rows that may be kept (docs/performance.md)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from inferenceguard.beams import Beams
from inferenceguard.contracts import BoundsRows, Critic
from inferenceguard.scorers.safe import Outcome
from inferenceguard.search import Charged, Scored
from inferenceguard.strategies.ledger import COST_STATE, Ledger
from inferenceguard.strategies.ranking import Ranking, predict


@dataclass(frozen=True)
class _Standing:
    """How good rows are at best. All [B]; a row that is not in turn has NaN everywhere."""

    rewards: Tensor  # of rows that rank by it
    most: Tensor  # the score within the budget: the reward, or what the critic's value is at most; NaN: never kept

    @property
    def waiting(self) -> Tensor:
        """[B] bool: the rows that are charged in turn."""
        return ~torch.isnan(self.most)


@dataclass
class InTurn:
    """Charges rows, those that may be best first, until K of their prompt are known to be better than all others.

    What is kept is what would be kept if all were charged. A row that is passed over counts as having spent everything,
    so that nothing can come of it. Its score is at most its reward, if it is finished or there is no critic, and else
    what the critic's value is at most (BoundsRows).

    Rewards are asked for first only where a prompt has more than K rows and most of those continue rows whose z is
    `margin` or more. Elsewhere the cost model would have to read most rows all the same, and the reward model those
    over the budget for nothing.
    """

    ledger: Ledger
    ranking: Ranking
    critic: Critic | None
    keep: int  # K
    margin: float  # cost units of z
    _rewards: Tensor | None = field(default=None, init=False)  # [B] of the rows charged last; NaN where not asked
    _passed: Tensor | None = field(default=None, init=False)  # [B]: the most that those passed over may be; else NaN

    def charge(self, rows: Beams) -> Charged:
        """z after the block that each row has just drawn. Of rows that are passed over z is -inf and the cost inf."""
        self._rewards = self._passed = None
        late = self._late(rows)
        if not bool(late.any()):
            return self.ledger.charge(rows)
        rows, standing, faults = self._stand(rows, late)
        scores = Outcome(torch.full((len(rows),), torch.nan, dtype=torch.float64), faults)
        asked, turn = torch.zeros_like(late), ~late
        while True:
            charged = self.ledger.spend(rows, scores)
            turn = (~late & ~asked) | self._next(charged.beams, standing, asked)
            if not bool(turn.any()):
                break
            scores = _merged(scores, self.ledger.block_scores(rows, turn), turn)
            asked |= turn
        passed = standing.waiting & ~asked
        self._rewards, self._passed = standing.rewards, torch.where(passed, standing.most, torch.nan)
        return replace(charged, cost=torch.where(passed, torch.inf, charged.cost))

    def score(self, rows: Beams) -> Scored:
        """How they rank. Those passed over stand with what they are at most."""
        scored = self.ranking.score(rows, self.ledger, self.critic, self._rewards)
        if self._passed is None:
            return scored
        return replace(scored, score=torch.where(torch.isnan(self._passed), scored.score, self._passed))

    def _late(self, rows: Beams) -> Tensor:
        """[B] bool: charged in turn."""
        late = torch.zeros(len(rows), dtype=torch.bool)
        if self.ranking.objective != "augmented" or self.ranking.calm is not None or COST_STATE in rows.states:
            return late  # `calm` asks about all rows, and a cost model that keeps a state must read them all
        by_reward, far = self._by_reward(rows), rows.budget >= self.margin
        bounded = isinstance(self.critic, BoundsRows)
        for prompt in set(rows.prompt_index.tolist()):
            mine = rows.prompt_index == prompt
            mostly_far = 2 * int((far & by_reward & mine).sum()) > int((by_reward & mine).sum())
            able = mine & ((by_reward & mostly_far) | (~by_reward & bounded))
            if int(able.sum()) > self.keep:
                late |= able
        return late

    def _by_reward(self, rows: Beams) -> Tensor:
        """[B] bool: rows whose score is their reward."""
        return torch.ones_like(rows.finished) if self.critic is None else rows.finished

    def _stand(self, rows: Beams, late: Tensor) -> tuple[Beams, _Standing, tuple[str, ...]]:
        """(rows with the reward model's states, how good they are at best, faults)."""
        ranked = late & self._by_reward(rows)
        rewards, states = self.ledger.rewards(rows, ranked)
        told = torch.where(ranked, rewards.values, torch.nan)
        most = told.clone()
        if bool((open_rows := late & ~ranked).any()):
            most[open_rows] = self._bounds(rows, open_rows)
        return replace(rows, states=states), _Standing(told, most), rewards.faults

    def _bounds(self, rows: Beams, which: Tensor) -> Tensor:
        """The score of the rows in `which` at most; inf, so that all are charged, where the critic cannot say it."""
        latent, used = rows.latent[which.to(rows.latent.device)], self.ledger.progress(rows)[which]
        try:
            assert isinstance(self.critic, BoundsRows)
            p_safe, value = (part.cpu().double().reshape(used.shape) for part in self.critic.at_most(latent, used))
        except Exception:  # third-party code; whether a row is trusted is for `predict` to say
            return torch.full_like(used, torch.inf)
        value = torch.nan_to_num(value, nan=torch.inf, posinf=torch.inf)
        return torch.where(p_safe <= self.ranking.threshold, -self.ranking.penalty, value)

    def _next(self, rows: Beams, standing: _Standing, asked: Tensor) -> Tensor:
        """[B] bool: whose turn it is among those that may yet be kept. At first K, or 2 K if some are only known by a
        bound; then as many again as so far: a call has its own cost.
        """
        turn, scores = torch.zeros_like(asked), self._scores(rows, standing)
        for prompt in set(rows.prompt_index[standing.waiting].tolist()):
            mine = standing.waiting & (rows.prompt_index == prompt)
            left = torch.nonzero(mine & ~asked)[:, 0]
            found = scores[mine & ~torch.isnan(scores)].sort(descending=True).values
            if len(found) >= self.keep:
                left = left[standing.most[left] >= found[self.keep - 1]]  # a tie is for what is left of the budget
            exact = bool((torch.isfinite(standing.rewards) | ~mine).all())
            count = max(self.keep if exact else 2 * self.keep, int((mine & asked).sum()))
            turn[left[standing.most[left].argsort(descending=True, stable=True)[:count]]] = True
        return turn

    def _scores(self, rows: Beams, standing: _Standing) -> Tensor:
        """[B] of the rows in turn that are feasible; else NaN."""
        safe = standing.waiting & self.ledger.budget.is_safe(rows.budget)
        scores = torch.where(safe, standing.rewards, torch.nan)
        if self.critic is not None and bool((valued := safe & ~rows.finished).any()):
            p_safe, value, _ = predict(self.critic, rows, valued, self.ledger)  # a fault is told when they are scored
            scores[valued] = torch.where(p_safe > self.ranking.threshold, value, torch.nan)
        return scores


def _merged(before: Outcome, new: Outcome, which: Tensor) -> Outcome:
    faults = tuple(dict.fromkeys(before.faults + new.faults))
    return Outcome(torch.where(which, new.values, before.values), faults)
