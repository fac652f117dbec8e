"""How the blockwise searches rank rows: any objective, with or without the critic (METHOD sections 5 and 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inferenceguard.beams import Beams, join
from inferenceguard.contracts import Critic, SearchStep
from inferenceguard.objectives import Objective, named_objective
from inferenceguard.search import Scored
from inferenceguard.strategies.ledger import Ledger


@dataclass(frozen=True)
class Calm:
    """Where a few proposals are enough (METHOD 7.4): z is far from 0, and the critic, if asked, is sure of the end."""

    p_safe: float
    margin: float  # cost units of z

    def holds(self, rows: Beams, p_safe: Tensor) -> Tensor:
        """[B] bool. p_safe [B] is NaN where the critic was not asked: for finished rows, or without a critic."""
        return (rows.budget >= self.margin) & (torch.isnan(p_safe) | (p_safe >= self.p_safe))


@dataclass(frozen=True)
class Ranking:
    """Ranks rows by an objective of the reward r, the cost charged so far c, and z.

    r is that of the response so far; with a critic, open rows have its value instead. Under `augmented` a row is
    feasible where z >= 0 and, if it is open and there is a critic, p_safe > threshold. Under the other objectives every
    row that could be scored is feasible.
    """

    objective: str
    multiplier: float = 5.0
    penalty: float = 1e6
    threshold: float = 0.5
    calm: Calm | None = None  # when a narrow search may stop proposing

    @property
    def function(self) -> Objective:
        """The objective, checked."""
        return named_objective(self.objective, multiplier=self.multiplier, penalty=self.penalty)

    def score(self, rows: Beams, ledger: Ledger, critic: Critic | None = None, told: Tensor | None = None) -> Scored:
        """Asks the critic and the reward model for what the objective needs, and no more.

        `told` [B] float64 are rewards that need not be asked for again, NaN elsewhere.
        """
        charged = torch.isfinite(rows.budget)
        eligible = ledger.budget.is_safe(rows.budget) & charged if self.objective == "augmented" else charged
        p_safe = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        value = torch.zeros(len(rows), dtype=torch.float64)
        trusted, asked, faults = eligible, eligible, ()  # type: tuple[Tensor, Tensor, tuple[str, ...]]
        states = rows.states
        if critic is not None and self.objective != "cost":
            open_rows, asked = eligible & ~rows.finished, eligible & rows.finished
            if bool(open_rows.any()):
                p_safe[open_rows], value[open_rows], faults = predict(critic, rows, open_rows, ledger)
            # NaN is not above the threshold, nor is it a number.
            believed = p_safe > self.threshold if self.objective == "augmented" else torch.isfinite(p_safe)
            trusted = eligible & (rows.finished | believed)
        if self.objective != "cost":
            told = torch.full_like(value, torch.nan) if told is None else told
            rewards, states = ledger.rewards(rows, asked & torch.isnan(told))
            found = torch.where(torch.isnan(told), rewards.values, told)
            value, faults = torch.where(asked, found, value), faults + rewards.faults
        known = torch.isfinite(value)
        feasible = trusted & known
        score = self.function(value, ledger.charged(rows), torch.where(feasible, rows.budget, -1.0))
        # Among rows of one score: the likeliest to end safe, then the one with the most budget left.
        tie = torch.where(torch.isfinite(p_safe), 1.0 + p_safe, torch.tanh(rows.budget))
        calm = None if self.calm is None else self.calm.holds(rows, p_safe)
        score = torch.where(feasible, score, -self.penalty)
        return Scored(score, feasible, tie, charged & known, p_safe, faults, calm, states)


def predict(critic: Critic, rows: Beams, which: Tensor, ledger: Ledger) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """(p_safe, value, faults) of the rows in `which`. A critic that fails trusts no row: NaN is above no threshold."""
    used = ledger.progress(rows)[which]
    latent = rows.latent[which.to(rows.latent.device)]
    try:
        p_safe, value = critic.predict(latent, rows.budget[which], used)
        if p_safe.shape != used.shape or value.shape != used.shape:
            raise ValueError(f"{len(used)} rows asked, {list(p_safe.shape)} and {list(value.shape)} answered")
    except Exception as error:  # third-party code: whatever it does, it must not let a row through
        unknown = torch.full_like(used, torch.nan)
        return unknown, torch.zeros_like(used), (f"critic {critic.name}: {type(error).__name__}: {error}",)
    value = value.cpu().double()
    p_safe = torch.where(torch.isfinite(value), p_safe.cpu().double(), torch.nan)
    return p_safe, torch.nan_to_num(value), ()


def with_rejected(steps: Iterator[SearchStep]) -> Iterator[SearchStep]:
    """A comparator's steps: it has no budget to keep, so that rows over it stand last in its result, not aside."""
    for step in steps:
        if step.result is None or step.result.rejected is None:
            yield step
            continue
        rows = join(step.result.beams, step.result.rejected)
        order = sorted(range(len(rows)), key=lambda row: int(rows.prompt_index[row]))  # stable: feasible rows first
        result = replace(step.result, beams=rows.take(order))
        yield SearchStep(result.beams, result)
