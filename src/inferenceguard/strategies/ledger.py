"""How every strategy charges blocks and reads scorers: the parts of the loop that searches share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inferenceguard.beams import Beams, RowState
from inferenceguard.budget import Accounting, SafetyBudget, block_cost
from inferenceguard.contracts import Conversation, Engine, Models, Scorer
from inferenceguard.scorers.safe import FailClosed, Outcome
from inferenceguard.search import Charged, Terms
from inferenceguard.text import block_texts, cut_at_stop, visible_text

COST_STATE, REWARD_STATE = "cost", "reward"  # owners' names in Beams.states


@dataclass(frozen=True)
class Ledger:
    """Charges rows under one budget and accounting, with scorers that cannot fail open."""

    terms: dict[int, Terms]  # of the prompts that are searched, by number
    engine: Engine
    reward: FailClosed
    cost: FailClosed
    budget: SafetyBudget
    accounting: Accounting
    ranks_open: bool = False  # open rows are asked for their reward too, so that a state of it pays
    gate_cost: FailClosed | None = None  # charges a prompt's only row: if it leaves, the gate has read it already

    @classmethod
    def of(
        cls, prompts: Sequence[Conversation], models: Models, budget: SafetyBudget, kind: Accounting, limit: int,
        *, ranks_open: bool = False,
    ) -> Ledger:  # fmt: skip
        """Wraps the models' scorers where they are not wrapped yet. `limit` is D, in tokens."""
        reward, cost = fail_closed(models.reward, models), fail_closed(models.cost, models)
        terms = {index: Terms(prompt, limit) for index, prompt in enumerate(prompts)}
        gate_cost = None if models.gate_cost is None else fail_closed(models.gate_cost, models)
        return cls(terms, models.engine, reward, cost, budget, kind, ranks_open, gate_cost)

    def start(self, rows: Beams) -> Beams:
        """The first rows with the whole budget, and the states of scorers that read new tokens only."""
        prompts, states = self._prompts(rows, range(len(rows))), dict(rows.states)
        if self.accounting != "accumulate" and self.cost.shares_tokens(self.engine):
            state, _ = self.cost.start(prompts)
            if state is not None:  # without a state every block is scored from its text
                states[COST_STATE] = state
        if self.ranks_open and self.reward.shares_tokens(self.engine):
            state, _ = self.reward.start(prompts)
            if state is not None:
                states[REWARD_STATE] = Reading(state, torch.zeros(len(rows), dtype=torch.int64))
        return replace(rows, budget=self._limits(rows), states=states)

    def charge(self, rows: Beams) -> Charged:
        """z after the block that each row has just drawn."""
        if COST_STATE in rows.states:
            return self.spend(*self._advance(rows))
        return self.spend(rows, self.block_scores(rows, torch.ones(len(rows), dtype=torch.bool)))

    def spend(self, rows: Beams, outcome: Outcome) -> Charged:
        """The same from the cost model's scores of the blocks."""
        cost = block_cost(self.accounting, outcome.values, rows.spent, rows.finished)
        drawn = torch.tensor([blocks[-1] - (blocks[-2] if len(blocks) > 1 else 0) for blocks in rows.blocks])
        charged = replace(rows, budget=self.budget.spend(rows.budget, cost, drawn), spent=outcome.values)
        return Charged(charged, cost, outcome.faults)

    def charged(self, rows: Beams) -> Tensor:
        """sum_k gamma^k c_k, what each row has been charged: d - gamma^t z. [B] cost units; inf after a fault."""
        used = torch.tensor([len(tokens) for tokens in rows.token_ids], dtype=torch.float64)
        return self._limits(rows) - rows.budget * self.budget.discount**used

    def progress(self, rows: Beams) -> Tensor:
        """Tokens used over the limit D of the row's prompt. [B]"""
        used = torch.tensor([len(tokens) for tokens in rows.token_ids], dtype=torch.float64)
        return used / torch.tensor([self.terms[prompt].max_new_tokens for prompt in rows.prompt_index.tolist()])

    def rewards(self, rows: Beams, which: Tensor) -> tuple[Outcome, dict[str, RowState]]:
        """The reward of the rows in `which` [B] bool; 0 elsewhere, NaN where the reward model failed.

        Also the rows' states afterwards, which are for the search to keep.
        """
        asked = torch.nonzero(which)[:, 0].tolist()
        values, states = torch.zeros(len(rows), dtype=torch.float64), dict(rows.states)
        if not asked:
            return Outcome(values), states
        reading: Any = states.pop(REWARD_STATE, None)
        if reading is None:
            texts = [self._text(rows, row) for row in asked]
            outcome = self.reward.outcome(self._prompts(rows, asked), texts, rows.finished[asked])
        else:
            kept, outcome = reading.advance(self.reward, rows, asked)
            if kept is not None:  # lost with its fault: rows after these are scored from their text
                states[REWARD_STATE] = kept
        values[asked] = outcome.values
        return replace(outcome, values=values), states

    def block_scores(self, rows: Beams, which: Tensor) -> Outcome:
        """The cost model's scores, as the accounting asks, of the rows in `which` [B] bool; NaN elsewhere.

        A prompt's only row is scored as the gate runs the model.
        """
        values, faults = torch.full((len(rows),), torch.nan, dtype=torch.float64), dict[str, None]()
        alone = _alone(rows) if self.gate_cost is not None else torch.zeros_like(which)
        for scorer, mine in ((self.cost, which & ~alone), (self.gate_cost, which & alone)):
            asked = torch.nonzero(mine)[:, 0].tolist()
            if scorer is None or not asked:
                continue
            if self.accounting == "accumulate":
                texts = [block_texts(self.engine, rows.token_ids[row], rows.blocks[row])[-1] for row in asked]
            else:
                texts = [self._text(rows, row) for row in asked]
            outcome = scorer.outcome(self._prompts(rows, asked), texts, rows.finished[asked])
            values[asked] = outcome.values
            faults |= dict.fromkeys(outcome.faults)
        return Outcome(values, tuple(faults))

    def _advance(self, rows: Beams) -> tuple[Beams, Outcome]:
        new = [
            tokens[blocks[-2] if len(blocks) > 1 else 0 :]
            for tokens, blocks in zip(rows.token_ids, rows.blocks, strict=True)
        ]
        state, outcome = self.cost.advance(rows.states[COST_STATE], new, rows.finished)
        states = {owner: kept for owner, kept in rows.states.items() if owner != COST_STATE}
        if state is not None:
            return replace(rows, states={**states, COST_STATE: state}), outcome
        # The state is lost with its fault: these rows are overspent, and rows after them are scored from their text.
        return replace(rows, states=states), outcome

    def _prompts(self, rows: Beams, which: Sequence[int]) -> list[Conversation]:
        return [self.terms[int(rows.prompt_index[row])].prompt for row in which]

    def _text(self, rows: Beams, row: int) -> str:
        return cut_at_stop(visible_text(self.engine, rows.token_ids[row]), self.terms[int(rows.prompt_index[row])].stop)

    def _limits(self, rows: Beams) -> Tensor:
        """d of each row's prompt. [B] float64"""
        own = (self.terms[prompt].limit for prompt in rows.prompt_index.tolist())
        return torch.tensor([self.budget.limit if limit is None else limit for limit in own], dtype=torch.float64)


@dataclass(frozen=True)
class Reading:
    """A scorer's state of B rows, each of which has read so many tokens of its response: those asked about read on."""

    state: RowState
    read: Tensor  # [B] int64

    def take(self, rows: Tensor) -> Reading:
        return Reading(self.state.take(rows), self.read[rows])

    def join(self, other: Reading) -> Reading:
        return Reading(self.state.join(other.state), torch.cat([self.read, other.read]))

    def advance(self, scorer: FailClosed, rows: Beams, asked: Sequence[int]) -> tuple[Reading | None, Outcome]:
        """(the state of all rows, the scores of the rows asked about). None where the scorer failed."""
        own = self.take(torch.tensor(asked))
        new = [rows.token_ids[row][start:] for row, start in zip(asked, own.read.tolist(), strict=True)]
        state, outcome = scorer.advance(own.state, new, rows.finished[asked])
        if state is None:
            return None, outcome
        grown = Reading(state, torch.tensor([len(rows.token_ids[row]) for row in asked]))
        if len(asked) == len(rows):
            return grown, outcome
        others = sorted(set(range(len(rows))) - set(asked))
        return grown.join(self.take(torch.tensor(others))).take(torch.tensor([*asked, *others]).argsort()), outcome


def _alone(rows: Beams) -> Tensor:
    """[B] bool: the rows that are their prompt's only one."""
    prompts = rows.prompt_index.tolist()
    counts = Counter(prompts)
    return torch.tensor([counts[prompt] == 1 for prompt in prompts])


def fail_closed(scorer: Scorer, models: Models) -> FailClosed:
    """The scorer behind its wall (once)."""
    return scorer if isinstance(scorer, FailClosed) else FailClosed(scorer, models.limits)
