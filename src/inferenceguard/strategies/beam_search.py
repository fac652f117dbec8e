"""Blockwise beam search under any objective: the paper's comparator, without critic and retries (METHOD section 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from inferenceguard.beams import Beams
from inferenceguard.budget import Accounting, SafetyBudget, check_accounting
from inferenceguard.contracts import Conversation, Models, Sampling, SearchResult, SearchStep
from inferenceguard.search import Scored, SearchPlan, blockwise_search, last_step, quarter
from inferenceguard.strategies.ledger import Ledger
from inferenceguard.strategies.ranking import Ranking, with_rejected


@dataclass(frozen=True)
class BeamSearch:
    """N proposals per block of m tokens; the K best by the objective of the text so far go on."""

    n_beams: int = 128  # N
    keep: int | None = None  # K; None is N / 4, or the largest divisor of N below it
    block_tokens: int = 32  # m
    max_new_tokens: int = 128  # D
    objective: str = "reward"  # reward, lagrangian, augmented or cost
    multiplier: float = 5.0  # lambda, reward units per cost unit
    penalty: float = 1e6  # n, reward units
    budget: SafetyBudget = field(default_factory=SafetyBudget)
    accounting: Accounting = "increment"

    def __post_init__(self) -> None:
        check_accounting(self.accounting)
        _ = self.plan, self.ranking.function

    @property
    def plan(self) -> SearchPlan:
        """The sizes, checked."""
        keep = quarter(self.n_beams) if self.keep is None else self.keep
        return SearchPlan(self.n_beams, keep, self.block_tokens, self.max_new_tokens)

    @property
    def ranking(self) -> Ranking:
        """The objective with its numbers."""
        return Ranking(self.objective, self.multiplier, self.penalty)

    def generate(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> SearchResult:
        """Searches all prompts in one batch. Every prompt gets its best rows, over budget or not: not gated."""
        return last_step(self.steps(prompts, models, sampling, seeds))

    def steps(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[SearchStep]:
        """The same, block by block."""
        ledger = Ledger.of(
            prompts, models, self.budget, self.accounting, self.max_new_tokens,
            ranks_open=self.objective != "cost",
        )  # fmt: skip

        def score(rows: Beams) -> Scored:
            return self.ranking.score(rows, ledger)

        loop = blockwise_search(prompts, models, sampling, seeds, self.plan, ledger.start, ledger.charge, score)
        return with_rejected(loop)
