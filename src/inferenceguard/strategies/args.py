"""ARGS: token by token, by the LLM's logit and an objective of the extended text (METHOD section 6).

Khanov, Burapacheep, Li: ARGS: Alignment as Reward-Guided Search (arXiv 2402.01694), the greedy variant.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from inferenceguard.beams import Beams, join
from inferenceguard.budget import Accounting, SafetyBudget, check_accounting
from inferenceguard.contracts import Conversation, Models, RanksTokens, Sampling, SearchResult, SearchStep
from inferenceguard.errors import InvalidArgument, MissingCapability
from inferenceguard.search import Charge, Charged, Propose, Score, Scored, SearchPlan, blockwise_search, last_step
from inferenceguard.strategies.ledger import COST_STATE, REWARD_STATE, Ledger
from inferenceguard.strategies.ranking import Ranking

STATE = "args"  # owner's name in Beams.states
OWN_STATES = (COST_STATE, REWARD_STATE)  # states that move with a candidate; all others are the engine's


@dataclass(frozen=True)
class ARGS:
    """Each token is the best of the LLM's k likeliest by logit + w * objective(text with it). Stops at an end token.

    Greedy: `sampling` and the seeds change nothing. The caches are kept: each step reads one token per prompt, the one
    that was chosen. Under `reward` the cost model reads that one alone, too.
    """

    candidates: int = 10  # k
    weight: float = 2.5  # w, nats per unit of the objective
    max_new_tokens: int = 128  # D
    objective: str = "reward"  # reward, lagrangian, augmented or cost
    multiplier: float = 5.0  # lambda, reward units per cost unit
    penalty: float = 1e6  # n, reward units
    budget: SafetyBudget = field(default_factory=SafetyBudget)
    accounting: Accounting = "increment"

    def __post_init__(self) -> None:
        check_accounting(self.accounting)
        if isinstance(self.candidates, bool) or not isinstance(self.candidates, int) or self.candidates < 1:
            raise InvalidArgument("candidates", "an integer >= 1", self.candidates)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InvalidArgument("weight", "a finite number >= 0", self.weight)
        _ = self.plan, self.ranking.function

    @property
    def n_beams(self) -> int:
        """k: rows scored per prompt and token."""
        return self.candidates

    @property
    def plan(self) -> SearchPlan:
        """The sizes, checked."""
        return SearchPlan(self.candidates, 1, 1, self.max_new_tokens)

    @property
    def ranking(self) -> Ranking:
        """The objective with its numbers."""
        return Ranking(self.objective, self.multiplier, self.penalty)

    def generate(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> SearchResult:
        """Decodes all prompts in one batch; one row each, over budget or not: not gated."""
        return last_step(self.steps(prompts, models, sampling, seeds))

    def steps(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[SearchStep]:
        """The same, token by token. Raises MissingCapability before a token is drawn."""
        if not isinstance(models.engine, RanksTokens):
            raise MissingCapability(models.engine.name, "ARGS", "the ranks of next tokens (RanksTokens)")
        ledger = Ledger.of(
            prompts, models, self.budget, self.accounting, self.max_new_tokens,
            ranks_open=self.objective != "cost",
        )  # fmt: skip

        charge: Charge = ledger.charge
        score: Score = functools.partial(self._score, ledger)
        if self.objective == "reward":
            rewarded = _Rewarded(score, charge)
            charge, score = rewarded.charge, rewarded.score
        draw = _likeliest(models.engine, self.candidates)
        return blockwise_search(prompts, models, sampling, seeds, self.plan, ledger.start, charge, score, draw)

    def _score(self, ledger: Ledger, rows: Beams) -> Scored:
        """logit + w * objective. -n is a score like any other: what is over budget is outranked, not refused."""
        scored = self.ranking.score(rows, ledger)
        score = cast(_Candidates, rows.states[STATE]).logit + self.weight * scored.score
        return replace(scored, score=score, feasible=scored.usable, tie=torch.zeros_like(score))


def _likeliest(engine: RanksTokens, count: int) -> Propose:
    """Proposes each row's `count` likeliest next tokens, without reading them: only the chosen one will be read."""

    def propose(rows: Beams, tokens: int, draw: int, bias: Tensor | None) -> tuple[Beams, Tensor]:
        if STATE in rows.states:
            rows = cast(_Candidates, rows.states[STATE]).read(engine, rows)
        ids, logits, log_prob = (part.cpu() for part in engine.rank(rows, count))
        source, place = torch.nonzero(torch.isfinite(logits), as_tuple=True)
        candidates = _Candidates(rows, source, logits[source, place].double())
        own = {name: rows.states[name] for name in OWN_STATES if name in rows.states}
        extended = replace(rows, states=own).take(source)
        chosen = ids[source, place].tolist()
        return replace(
            extended,
            token_ids=tuple((*before, token) for before, token in zip(extended.token_ids, chosen, strict=True)),
            log_prob=extended.log_prob + log_prob[source, place],
            finished=torch.tensor([token in engine.end_tokens for token in chosen]),
            states={**extended.states, STATE: candidates},
        ), source

    return propose


class _Rewarded:
    """Where no cost is needed to choose: charges each prompt's choice alone, so the cost model reads one text, not k.

    A choice that cannot be charged is not replaced by the next best: its prompt has no candidate then.
    """

    def __init__(self, score: Score, charge: Charge) -> None:
        self._score, self._charge = score, charge
        self._scored: Scored  # of the rows that were charged last

    def charge(self, rows: Beams) -> Charged:
        """The other candidates' cost is 0: they have not been charged."""
        self._scored = self._score(rows)
        best: dict[int, int] = {}
        for row in torch.nonzero(self._scored.usable)[:, 0].tolist():
            prompt = int(rows.prompt_index[row])
            if prompt not in best or self._scored.score[row] > self._scored.score[best[prompt]]:
                best[prompt] = row
        chosen = sorted(best.values())
        if not chosen:
            return Charged(rows, torch.zeros(len(rows), dtype=torch.float64))
        others = [row for row in range(len(rows)) if row not in set(chosen)]
        charged = self._charge(rows.take(chosen))
        merged = join(charged.beams, rows.take(others)).take(torch.tensor(chosen + others).argsort())
        cost = torch.zeros(len(rows), dtype=torch.float64).index_put((torch.tensor(chosen),), charged.cost)
        failed = charged.beams.prompt_index[~torch.isfinite(charged.beams.budget)]
        lost = torch.isin(rows.prompt_index, failed)
        budget = torch.where(lost, -torch.inf, merged.budget)
        return Charged(replace(merged, budget=budget), torch.where(lost, torch.nan, cost), charged.faults)

    def score(self, rows: Beams) -> Scored:
        """As scored when they were charged."""
        usable = self._scored.usable & torch.isfinite(rows.budget)
        read = self._scored.states or {}
        states = {name: read.get(name) if name == REWARD_STATE else state for name, state in rows.states.items()}
        kept = {name: state for name, state in states.items() if state is not None}
        return replace(self._scored, usable=usable, feasible=usable, states=kept)


@dataclass(frozen=True)
class _Candidates:
    """What ARGS keeps per row: its logit, and the row that it extends, whose caches are copied once it is chosen."""

    extended: Beams
    row: Tensor  # [B] of `extended`
    logit: Tensor  # [B] float64

    def take(self, rows: Tensor) -> _Candidates:
        return replace(self, row=self.row[rows], logit=self.logit[rows])

    def join(self, other: _Candidates) -> _Candidates:
        row = torch.cat([self.row, other.row + len(self.extended)])
        return _Candidates(join(self.extended, other.extended), row, torch.cat([self.logit, other.logit]))

    def read(self, engine: RanksTokens, rows: Beams) -> Beams:
        """`rows` [B], these candidates, with their last tokens in the engine's caches."""
        states = {name: state for name, state in self.extended.states.items() if name not in (STATE, *OWN_STATES)}
        before = replace(self.extended, states=states).take(self.row)
        after = engine.append(before, torch.tensor([tokens[-1] for tokens in rows.token_ids]))
        kept = {name: rows.states[name] for name in OWN_STATES if name in rows.states}
        return replace(rows, latent=after.latent, states={**after.states, **kept})
