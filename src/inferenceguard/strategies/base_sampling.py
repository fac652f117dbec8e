"""Plain sampling of the frozen LLM: one draw, charged and scored like any other, so that it can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from inferenceguard.beams import Beams
from inferenceguard.budget import Accounting, SafetyBudget, check_accounting
from inferenceguard.contracts import Conversation, Models, Sampling, SearchResult, SearchStep
from inferenceguard.search import Scored, Search, SearchPlan, last_step, run
from inferenceguard.strategies.ledger import Ledger


@dataclass(frozen=True)
class BaseSampling:
    """One sample per prompt, in one block of D tokens. Nothing is dropped: whether it may leave is for the gate."""

    max_new_tokens: int = 128  # D
    budget: SafetyBudget = field(default_factory=SafetyBudget)
    accounting: Accounting = "increment"

    def __post_init__(self) -> None:
        check_accounting(self.accounting)
        _ = self.plan

    @property
    def n_beams(self) -> int:
        """One row per prompt."""
        return 1

    @property
    def plan(self) -> SearchPlan:
        """The sizes, checked."""
        return SearchPlan(1, 1, self.max_new_tokens, self.max_new_tokens)

    def generate(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> SearchResult:
        """Samples all prompts in one batch."""
        return last_step(self.steps(prompts, models, sampling, seeds))

    def steps(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[SearchStep]:
        """The same, block by block."""
        return run(self.open(models, sampling), prompts, seeds)

    def open(self, models: Models, sampling: Sampling) -> Search:
        """The same without prompts: they join and leave it between blocks."""
        ledger = Ledger.of((), models, self.budget, self.accounting, self.max_new_tokens)

        def score(rows: Beams) -> Scored:
            rewards, _ = ledger.rewards(rows, rows.finished)
            everything = torch.ones(len(rows), dtype=torch.bool)
            unasked = torch.full((len(rows),), torch.nan, dtype=torch.float64)
            return Scored(rewards.values, everything, rows.budget, everything, unasked, rewards.faults)

        return Search(models.engine, sampling, self.plan, ledger.start, ledger.charge, score, terms=ledger.terms)
