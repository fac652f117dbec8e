"""The safety state `z`: what is left of the budget. Pure functions; METHOD section 2, paper section 3.

    z_0 = d,   z_{t+1} = (z_t - c_t) / gamma      (t counts tokens)

so z_T = (d - sum_k gamma^k c_k) / gamma^T and z_T >= 0 exactly when the discounted cost is within the budget d.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inferenceguard.errors import InvalidArgument, UnknownName

Accounting = Literal["increment", "accumulate", "final"]
ACCOUNTINGS: tuple[Accounting, ...] = ("increment", "accumulate", "final")


@dataclass(frozen=True)
class SafetyBudget:
    """`limit` d in cost units (0 is legal: only what the cost model calls safe); `discount` gamma in (0, 1]."""

    limit: float = 0.0
    discount: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.limit):
            raise InvalidArgument("budget", "a finite number", self.limit)
        if not (math.isfinite(self.discount) and 0.0 < self.discount <= 1.0):
            raise InvalidArgument("discount", "in (0, 1]", self.discount)

    def start(self, rows: int) -> Tensor:
        """z_0 = d for each of `rows` rows. [rows] float64, cost units."""
        return torch.full((rows,), self.limit, dtype=torch.float64)

    def spend(self, budget: Tensor, cost: Tensor, tokens: Tensor) -> Tensor:
        """Charges a block of `tokens` [B] tokens its `cost` [B] at the block's last token.

        z -> z / gamma^m - c / gamma, where m is the block's length. A cost that is not a finite number spends
        everything (-inf), and what is spent so stays spent: fail closed. A block of no tokens must cost nothing.
        """
        cost = cost.to(torch.float64)
        tokens = tokens.to(torch.float64)
        if bool(((tokens < 0) | ((tokens == 0) & torch.isfinite(cost) & (cost != 0))).any()):
            raise InvalidArgument("tokens", ">= 1 where a cost is charged", tokens.tolist())
        spent = budget.to(torch.float64) / self.discount**tokens - cost / self.discount
        return torch.where(torch.isfinite(cost) & torch.isfinite(spent), spent, -math.inf)

    def is_safe(self, budget: Tensor) -> Tensor:
        """z >= 0, and nothing else: NaN is not safe. bool [B]"""
        return budget >= 0


def check_accounting(accounting: str) -> None:
    """Raises UnknownName unless `accounting` is one of the three kinds of METHOD 7.2."""
    if accounting not in ACCOUNTINGS:
        raise UnknownName("accounting", accounting, ACCOUNTINGS)


def block_cost(accounting: Accounting, score: Tensor, previous: Tensor, finished: Tensor) -> Tensor:
    """What a block is charged, from the cost model's scores (METHOD 7.2). All [B]; cost units.

    increment   score - previous: `score` is that of the text so far: the spent budget is always the text's score
    accumulate  max(score, 0): `score` is that of the block alone; never refunded
    final       score of the finished text, 0 before
    """
    if accounting == "increment":
        charged = score - previous
    elif accounting == "accumulate":
        charged = score.clamp(min=0)
    else:
        charged = torch.where(finished, score, torch.zeros_like(score))
    # NaN compares false with everything and would pass `clamp` and `where`: a score that is no number stays none.
    return torch.where(torch.isfinite(score), charged, torch.nan)


def spend_blocks(
    budget: SafetyBudget, accounting: Accounting, scores: Sequence[float], tokens: Sequence[int]
) -> list[float]:
    """z after each block of one finished response, from its blocks' scores and lengths. For the gate and replay."""
    if accounting == "increment" and budget.discount == 1.0:
        # The increments telescope: z = d - score without the rounding of a running sum.
        whole: Iterator[bool] = itertools.accumulate(
            (math.isfinite(score) for score in scores), lambda so_far, now: so_far and now
        )
        return [budget.limit - score if ok else -math.inf for score, ok in zip(scores, whole, strict=True)]
    z, previous, path = budget.start(1), torch.zeros(1, dtype=torch.float64), []
    for index, (score, length) in enumerate(zip(scores, tokens, strict=True)):
        now = torch.tensor([score], dtype=torch.float64)
        finished = torch.tensor([index == len(scores) - 1])
        z = budget.spend(z, block_cost(accounting, now, previous, finished), torch.tensor([length]))
        previous = now
        path.append(float(z))
    return path
