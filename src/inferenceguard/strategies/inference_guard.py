"""InferenceGuard: blockwise search under the augmented objective, with or without the critic (METHOD section 5)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from inferenceguard.budget import Accounting, SafetyBudget, check_accounting
from inferenceguard.contracts import (
    Conversation,
    Critic,
    Models,
    ReadsLatents,
    Sampling,
    SearchResult,
    SearchStep,
)
from inferenceguard.errors import FingerprintMismatch, InvalidArgument, MissingCapability
from inferenceguard.search import Score, Search, SearchPlan, last_step, quarter, run
from inferenceguard.strategies.in_turn import InTurn
from inferenceguard.strategies.ledger import Ledger
from inferenceguard.strategies.ranking import Calm, Ranking


@dataclass(frozen=True)
class InferenceGuard:
    """The paper's search. Defaults of the paper: N 128, K N / 4, m 32, D 128, M 2, p_safe threshold 0.5.

    finished:   r(x, y)        if z >= 0 else -n
    unfinished: value(h, z)    if z >= 0 and p_safe > threshold else -n   (with critic)
                r(x, y so far) if z >= 0 else -n                          (without)

    That is the `augmented` objective. Under the others the same r and value stand in their formula.
    """

    n_beams: int = 128  # N
    keep: int | None = None  # K; None is N / 4, or the largest divisor of N below it
    block_tokens: int = 32  # m
    max_new_tokens: int = 128  # D
    retries: int = 2  # M
    budget: SafetyBudget = field(default_factory=SafetyBudget)
    accounting: Accounting = "increment"
    threshold: float = 0.5  # p_safe must be above it
    penalty: float = 1e6  # n, reward units
    discourage: float = 2.0  # nats; see SearchPlan
    objective: str = "augmented"  # the paper's; or reward, lagrangian, cost, under which nothing is infeasible
    multiplier: float = 5.0  # lambda of `lagrangian`, reward units per cost unit
    widths: tuple[int, ...] = ()  # proposals to try with first (METHOD 7.4); (1, 4) is `--n-beams auto`
    calm: float = 0.95  # with widths: more proposals where no p_safe reaches this,
    margin: float = 1.0  # or where z is below this, in cost units
    charge_all: bool = False  # the cost of every proposal, for the record: also of those that K better ones outrank

    def __post_init__(self) -> None:
        check_accounting(self.accounting)
        object.__setattr__(self, "widths", tuple(self.widths))  # a YAML file has lists
        if not 0.0 <= self.calm <= 1.0:
            raise InvalidArgument("calm", "in [0, 1]", self.calm)
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise InvalidArgument("margin", "a finite number >= 0", self.margin)
        if not 0.0 <= self.threshold < 1.0:
            raise InvalidArgument("threshold", "in [0, 1)", self.threshold)
        _ = self.plan, self.ranking.function

    @property
    def plan(self) -> SearchPlan:
        """The sizes, checked."""
        keep = quarter(self.n_beams) if self.keep is None else self.keep
        return SearchPlan(
            self.n_beams, keep, self.block_tokens, self.max_new_tokens, self.retries, self.discourage, self.widths
        )

    @property
    def ranking(self) -> Ranking:
        """The objective with its numbers."""
        calm = Calm(self.calm, self.margin) if self.widths else None
        return Ranking(self.objective, self.multiplier, self.penalty, self.threshold, calm)

    def generate(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> SearchResult:
        """Searches all prompts in one batch."""
        return last_step(self.steps(prompts, models, sampling, seeds))

    def steps(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[SearchStep]:
        """The same, block by block. Raises MissingCapability or FingerprintMismatch before a token is drawn."""
        return run(self.open(models, sampling), prompts, seeds)

    def open(self, models: Models, sampling: Sampling) -> Search:
        """The same search without prompts: they join and leave it between blocks."""
        if models.critic is not None:
            check_critic(models.critic, models)
        ledger = Ledger.of(
            (), models, self.budget, self.accounting, self.max_new_tokens,
            ranks_open=models.critic is None and self.objective != "cost",
        )  # fmt: skip

        if self.charge_all:
            score: Score = functools.partial(self.ranking.score, ledger=ledger, critic=models.critic)
            return Search(models.engine, sampling, self.plan, ledger.start, ledger.charge, score, terms=ledger.terms)
        turns = InTurn(ledger, self.ranking, models.critic, self.plan.keep, self.margin)
        return Search(models.engine, sampling, self.plan, ledger.start, turns.charge, turns.score, terms=ledger.terms)


def check_critic(critic: Critic, models: Models) -> None:
    """Raises MissingCapability or FingerprintMismatch unless the critic can read this engine's latents."""
    engine = models.engine
    if not isinstance(engine, ReadsLatents):
        raise MissingCapability(
            engine.name, "InferenceGuard with a critic", "latents", hint="Search without the critic (--no-critic)."
        )
    if critic.engine_fingerprint != engine.fingerprint:
        raise FingerprintMismatch(
            f"critic {critic.name} was trained on model {critic.engine_fingerprint}, not on {engine.fingerprint} "
            f"({engine.name}).",
            hint="Train one for this model with `inferenceguard train critic`, or search without (--no-critic).",
        )
