"""Blockwise search: the only loop. propose, charge, score, keep (METHOD section 5; the paper's algorithm 1).

All prompts run in one batch, which others may join between blocks. What happens at `charge` and `score` is handed in:
strategies are short functions of these (strategies/).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from inferenceguard.beams import Beams, RowState, join
from inferenceguard.contracts import (
    BlockTrace,
    Conversation,
    Engine,
    MixesDraws,
    MixesSampling,
    Models,
    Sampling,
    SearchResult,
    SearchStep,
)
from inferenceguard.errors import EngineFault, InferenceGuardError, InvalidArgument, PromptTooLong
from inferenceguard.text import stop_end


@dataclass(frozen=True)
class SearchPlan:
    """The sizes of a search: N proposals in blocks of m tokens up to D tokens; K rows kept; M retries of a block."""

    n_beams: int
    keep: int
    block_tokens: int
    max_new_tokens: int
    retries: int = 0
    discourage: float = 0.0  # nats taken off a token that all failed rows of a block used, when it is proposed again
    widths: tuple[int, ...] = ()  # proposals to try with before N, smallest first: see `Scored.calm`

    def __post_init__(self) -> None:
        for name in ("n_beams", "keep", "block_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgument(name, "an integer >= 1", value)
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise InvalidArgument("retries", "an integer >= 0", self.retries)
        if not (math.isfinite(self.discourage) and self.discourage >= 0):
            raise InvalidArgument("discourage", "a number >= 0", self.discourage)
        if self.keep > self.n_beams:
            raise InvalidArgument("keep", f"at most n_beams ({self.n_beams})", self.keep)
        if self.n_beams % self.keep:
            raise InvalidArgument("n_beams", f"a multiple of keep ({self.keep})", self.n_beams)
        steps = (0, *self.widths, self.n_beams)
        if any(isinstance(w, bool) or not isinstance(w, int) for w in steps) or list(steps) != sorted(set(steps)):
            raise InvalidArgument("widths", f"rising integers from 1 to below n_beams ({self.n_beams})", self.widths)

    @property
    def attempts(self) -> int:
        """How often a block is proposed at most: narrow, N wide, and M times again."""
        return len(self.widths) + 1 + self.retries


@dataclass(frozen=True)
class Charged:
    """Rows after their charge: `beams` has the new z and `spent`."""

    beams: Beams
    cost: Tensor  # [B] float64, cost units; NaN where the scorer failed, inf where it was not asked (z is -inf then)
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """How rows rank: feasible ones before all others, then by score, then by `tie`.

    A finished row that is not feasible will never be: it is rejected, and never held.
    """

    score: Tensor  # [B] float64
    feasible: Tensor  # [B] bool
    tie: Tensor  # [B] float64
    usable: Tensor  # [B] bool: False for a row that could not be scored; it is never kept
    p_safe: Tensor  # [B] float64; NaN where the critic was not asked
    faults: tuple[str, ...] = ()
    calm: Tensor | None = None  # [B] bool: feasible and far from the budget, so that no more proposals are needed
    states: Mapping[str, RowState] | None = None  # of the rows once they are scored; None: as they were

    @property
    def settled(self) -> Tensor:
        """[B] bool: `calm`, or where nothing says what is calm, `feasible`."""
        return self.feasible if self.calm is None else self.feasible & self.calm


Charge = Callable[[Beams], Charged]
Score = Callable[[Beams], Scored]
# (open rows [B], tokens at most, number of the draw, bias [B, V] or None)
#     -> (proposals [N], the open row that each continues [N])
Propose = Callable[[Beams, int, int, Tensor | None], tuple[Beams, Tensor]]


@dataclass(frozen=True)
class Terms:
    """One prompt of a search, and what it asks for itself where that differs from its neighbours."""

    prompt: Conversation
    max_new_tokens: int  # D
    limit: float | None = None  # d, cost units; None: the strategy's
    stop: tuple[str, ...] = ()  # a response ends where one of these begins; the text is cut there
    sampling: Sampling | None = None  # None: the search's


def blockwise_search(
    prompts: Sequence[Conversation],
    models: Models,
    sampling: Sampling,
    seeds: Sequence[int],
    plan: SearchPlan,
    start: Callable[[Beams], Beams],
    charge: Charge,
    score: Score,
    propose: Propose | None = None,
) -> Iterator[SearchStep]:
    """A `Search` of these prompts from end to end; the last step carries the result."""
    return run(Search(models.engine, sampling, plan, start, charge, score, propose), prompts, seeds)


def run(search: Search, prompts: Sequence[Conversation], seeds: Sequence[int]) -> Iterator[SearchStep]:
    """Yields the rows alive after each block; the last step carries the result."""
    terms = {index: Terms(prompt, search.plan.max_new_tokens) for index, prompt in enumerate(prompts)}
    search.admit(terms, seeds)
    while search.going:
        search.step()
        if search.going:
            yield SearchStep(search.alive, None)
    result = search.take(list(terms))
    yield SearchStep(result.beams, result)


class Search:
    """The loop. Prompts join it (`admit`) and leave it (`take`) between blocks (`step`), all in one batch.

    `start` sets the first rows' budgets and scorer states. `propose` draws a block; by default N samples of the LLM. A
    prompt without a feasible row proposes its block again, up to M times, with the failed tokens discouraged; then it
    goes on with its best rows all the same: under a cost that can come back they may recover, and what leaves is for
    the gate to decide.

    With `plan.widths` a prompt tries few proposals first and widens where none is calm (METHOD 7.4). One that fails
    behind a narrow block goes back to before that block, and stays N wide.

    What becomes of a prompt depends on its own terms and seed, not on when it joins or who else is there: its draws are
    numbered from its own first block (in float32 on one machine, bit for bit). Not thread-safe.
    """

    def __init__(
        self, engine: Engine, sampling: Sampling, plan: SearchPlan, start: Callable[[Beams], Beams], charge: Charge,
        score: Score, propose: Propose | None = None, terms: dict[int, Terms] | None = None,
    ) -> None:  # fmt: skip
        """`terms` is filled with those of the prompts that join, for `start`, `charge` and `score` to read."""
        self.engine, self.sampling, self.plan = engine, sampling, plan
        self.start, self.charge, self.score, self.propose = start, charge, score, propose
        self.widths = (*plan.widths, *(plan.n_beams,) * (1 + plan.retries))  # proposals per prompt in each attempt
        self.terms: dict[int, Terms] = {} if terms is None else terms
        self._mixes_draws = propose is None and isinstance(engine, MixesDraws)
        self._mixes_sampling = propose is None and isinstance(engine, MixesSampling)
        self._trace: dict[int, list[BlockTrace]] = {}
        self._steps: dict[int, int] = {}  # blocks that each prompt has drawn: its draws are numbered by them
        self._wide: set[int] = set()  # prompts that went back
        self._rows: Beams | None = None  # open rows
        self._held: Beams  # finished rows
        self._rejected: Beams
        self._narrow: Beams  # where prompts can go back to: the rows before their last block, if it was narrow

    def admit(self, terms: Mapping[int, Terms], seeds: Sequence[int]) -> None:
        """Prompts join, under numbers that are in use by no other; each is read once.

        Raises PromptTooLong before a token is drawn, and EngineFault if the engine fails: then none of them has joined.
        Raises InvalidArgument for a sampling of a prompt's own where the strategy proposes in a way of its own.
        """
        for own in terms.values():
            if self.propose is not None and own.sampling not in (None, self.sampling):
                raise InvalidArgument("sampling", f"the search's own, {self.sampling}", own.sampling)
        begun = _begin(self.engine, list(terms.values()), seeds)
        self.terms.update(terms)
        rows = self.start(replace(begun, prompt_index=torch.tensor(list(terms), dtype=torch.int64)))
        self._trace |= {number: [] for number in terms}
        self._steps |= dict.fromkeys(terms, 0)
        if self._rows is None or not len(self._rows):
            self._rows = rows
        else:
            self._rows = join(self._rows, rows)
        if not hasattr(self, "_held"):
            self._narrow = rows.take([])
            self._held = self._rejected = self._narrow.without_states()
        elif not len(self._narrow):
            self._narrow = self._rows.take([])

    @property
    def going(self) -> set[int]:
        """The prompts that have open rows."""
        return set() if self._rows is None else set(self._rows.prompt_index.tolist())

    @property
    def alive(self) -> Beams:
        """All rows that may yet lead to an answer: open ones, those that a prompt may go back to, finished ones."""
        assert self._rows is not None
        return join(join(self._rows.without_states(), self._narrow.without_states()), self._held)

    def trace(self, number: int) -> Sequence[BlockTrace]:
        """The blocks of a prompt so far."""
        return self._trace[number]

    def step(self) -> None:
        """One block of every prompt that is going: propose, charge, score, keep.

        Raises EngineFault if the engine fails.
        """
        assert self._rows is not None
        rows, held, narrow = self._rows, self._held, self._narrow
        proposals = self._propose(rows, held)
        self._rejected = join(self._rejected, _rejected(proposals))
        back = _failed(proposals, held) & set(narrow.prompt_index.tolist())
        going, self._held = self._keep(proposals, held, back)
        self._wide |= back
        returned = narrow.take(_of_prompts(narrow, back))
        self._narrow = rows.take(_of_prompts(rows, self._narrowly(proposals) & set(going.prompt_index.tolist())))
        self._rows = join(going, returned) if back else going
        for prompt in set(rows.prompt_index.tolist()):
            self._steps[prompt] += 1

    def take(self, numbers: Sequence[int]) -> SearchResult:
        """Prompts leave, done or not, and all that is theirs with them. `trace` is in the order of `numbers`."""
        assert self._rows is not None
        leave = set(numbers)
        order = {number: place for place, number in enumerate(numbers)}
        held = self._held.take(_of_prompts(self._held, leave))
        held = held.take(
            sorted(range(len(held)), key=lambda row: (order[int(held.prompt_index[row])], -float(held.score[row])))
        )
        rejected = self._rejected.take(_of_prompts(self._rejected, leave))
        result = SearchResult(
            held, tuple(tuple(self._trace.pop(number)) for number in numbers), _best_rejected(rejected, self.plan.keep)
        )
        self._rows, self._narrow, self._held, self._rejected = (
            _without(rows, leave) for rows in (self._rows, self._narrow, self._held, self._rejected)
        )
        self._wide -= leave
        for number in numbers:
            del self._steps[number], self.terms[number]
        return result

    def _propose(self, rows: Beams, held: Beams) -> _Proposals:
        """N proposals per prompt; prompts with nothing feasible propose again, at most M times.

        With widths, prompts that have not gone back begin with few, and stop at the first that is calm.
        """
        first, prompts, wide = len(self.plan.widths), set(rows.prompt_index.tolist()), self._wide
        waiting = prompts - wide if first else prompts  # who draws in the attempt at hand
        proposals: _Proposals | None = None
        for attempt in range(self.plan.attempts):
            if attempt == first and first:
                waiting |= wide & prompts
            if not waiting:
                if attempt >= first:
                    break
                continue
            chosen = rows if waiting == prompts else rows.take(_of_prompts(rows, waiting))
            bias = None
            if proposals is not None and attempt > first:
                bias = _discourage(proposals, chosen, self.plan.discourage, self.engine.vocabulary)
            drawn = self._attempt(chosen, attempt, bias)
            proposals = drawn if proposals is None else proposals.join(drawn)
            enough = proposals.scored.settled if attempt < first else proposals.scored.feasible
            waiting = waiting - set(proposals.beams.prompt_index[enough].tolist()) - set(held.prompt_index.tolist())
        assert proposals is not None
        return proposals

    def _narrowly(self, proposals: _Proposals) -> set[int]:
        """The prompts whose block was settled by less than N proposals."""
        wide = proposals.beams.prompt_index[proposals.attempt >= len(self.plan.widths)]
        return set(proposals.beams.prompt_index.tolist()) - set(wide.tolist())

    def _attempt(self, rows: Beams, attempt: int, bias: Tensor | None) -> _Proposals:
        """extend -> charge -> score, once for all rows."""
        try:
            after, source = self._draw(rows, attempt, bias)
        except InferenceGuardError:
            raise
        except Exception as error:
            step = max(self._steps[prompt] for prompt in rows.prompt_index.tolist())
            raise EngineFault(f"engine {self.engine.name} failed in step {step}: {error}") from error
        charged = self.charge(self._close_block(after, rows, source))
        scored = self.score(charged.beams)
        states = charged.beams.states if scored.states is None else scored.states
        drawn = [len(new) - len(rows.token_ids[old]) for new, old in zip(after.token_ids, source.tolist(), strict=True)]
        return _Proposals(
            replace(charged.beams, score=scored.score, states=states),
            replace(scored, faults=(), states=None),
            charged.cost,
            torch.full((len(after),), attempt),
            torch.tensor(drawn),
            tuple(dict.fromkeys(charged.faults + scored.faults)),
        )

    def _draw(self, rows: Beams, attempt: int, bias: Tensor | None) -> tuple[Beams, Tensor]:
        """(proposals [N], the row that each continues [N]).

        Rows may draw different numbers of tokens (before their limit, or behind others that did not go back): these
        are drawn apart. Where prompts are at different blocks, so that the numbers of their draws differ, or sample in
        ways of their own, one call draws for all if the engine can (MixesDraws, MixesSampling).
        """
        prompts = rows.prompt_index.tolist()
        room = [self.terms[prompt].max_new_tokens - len(tokens)
                for prompt, tokens in zip(prompts, rows.token_ids, strict=True)]  # fmt: skip
        tokens = [min(self.plan.block_tokens, left) for left in room]
        draws = [self._steps[prompt] * self.plan.attempts + attempt for prompt in prompts]
        samplings = [self.terms[prompt].sampling or self.sampling for prompt in prompts]
        place = {sampling: number for number, sampling in enumerate(dict.fromkeys(samplings))}
        kinds = [
            (count, 0 if self._mixes_draws else draw, 0 if self._mixes_sampling else place[sampling])
            for count, draw, sampling in zip(tokens, draws, samplings, strict=True)
        ]
        parts = []
        for kind in sorted(set(kinds)):
            chosen = [row for row, other in enumerate(kinds) if other == kind]
            some = torch.tensor(chosen)
            part, mine = (rows, bias) if len(chosen) == len(rows) else (
                rows.take(some), None if bias is None else bias[some])  # fmt: skip
            own = [draws[row] for row in chosen], [samplings[row] for row in chosen]
            after, source = self._extend(part, attempt, kind[0], *own, mine)
            parts.append((after, some[source]))
        return functools.reduce(join, (after for after, _ in parts)), torch.cat([source for _, source in parts])

    def _extend(
        self, rows: Beams, attempt: int, tokens: int, draws: list[int], samplings: list[Sampling], bias: Tensor | None
    ) -> tuple[Beams, Tensor]:
        """The strategy's own proposals, or N samples of the frozen LLM per prompt, N / B of each row."""
        if self.propose is not None:
            return self.propose(rows, tokens, draws[0], bias)
        source = _spread(rows, self.widths[attempt])
        engine: Any = self.engine  # which may take a number and a sampling per row
        number = draws[0] if len(set(draws)) == 1 else torch.tensor(draws)[source]
        sampling = samplings[0] if len(set(samplings)) == 1 else [samplings[row] for row in source.tolist()]
        spread = None if bias is None else bias[source]
        return engine.extend(rows.take(source), tokens, sampling, number, spread), source

    def _close_block(self, after: Beams, rows: Beams, source: Tensor) -> Beams:
        """Notes where the block ends, and that rows at their length limit or at a stop text are finished."""
        terms = [self.terms[prompt] for prompt in after.prompt_index.tolist()]
        tokens, stopped = list(after.token_ids), torch.zeros(len(after), dtype=torch.bool)
        for row, (own, parent) in enumerate(zip(terms, source.tolist(), strict=True)):
            end = stop_end(self.engine, tokens[row], own.stop, len(rows.token_ids[parent]))
            if end is not None:
                tokens[row], stopped[row] = tokens[row][:end], True
        lengths = [len(row) for row in tokens]
        full = [length >= own.max_new_tokens for length, own in zip(lengths, terms, strict=True)]
        return replace(
            after,
            token_ids=tuple(tokens),
            finished=after.finished | stopped | torch.tensor(full, dtype=torch.bool),
            blocks=tuple((*blocks, length) for blocks, length in zip(after.blocks, lengths, strict=True)),
        )

    def _keep(self, proposals: _Proposals, held: Beams, back: Set[int] = frozenset()) -> tuple[Beams, Beams]:
        """(open rows, finished rows): the best K of each prompt, proposals and finished rows held so far together.

        Of a prompt that goes `back` nothing is kept.
        """
        count = len(proposals.beams)
        chosen: list[int] = []  # numbers from `count` on are rows of `held`
        for prompt in sorted(set(proposals.beams.prompt_index.tolist())):
            rows = torch.nonzero(proposals.beams.prompt_index == prompt)[:, 0].tolist()
            finished = torch.nonzero(held.prompt_index == prompt)[:, 0].tolist()
            kept = [] if prompt in back else self._best(proposals, rows, held, finished)
            self._trace[prompt].append(_trace(proposals, rows, set(kept)))
            chosen += kept
        settled = set(held.prompt_index.tolist()) - set(proposals.beams.prompt_index.tolist())
        kept_held = [row - count for row in chosen if row >= count]
        kept_held += [row for row, prompt in enumerate(held.prompt_index.tolist()) if prompt in settled]
        kept_new = [row for row in chosen if row < count]
        ended = [row for row in kept_new if bool(proposals.beams.finished[row])]
        going = [row for row in kept_new if not bool(proposals.beams.finished[row])]
        newly_held = proposals.beams.without_states().take(ended)
        return proposals.beams.take(going), join(held.take(kept_held), newly_held)

    def _best(self, proposals: _Proposals, rows: list[int], held: Beams, finished: list[int]) -> list[int]:
        """The K best of one prompt. Infeasible rows are kept only where nothing is feasible."""
        scored, count = proposals.scored, len(proposals.beams)
        usable = scored.usable & (scored.feasible | ~proposals.beams.finished)
        ranks = {row: (float(scored.score[row]), float(scored.tie[row])) for row in rows if bool(usable[row])}
        feasible = {row: rank for row, rank in ranks.items() if bool(scored.feasible[row])}
        feasible |= {count + row: (float(held.score[row]), math.inf) for row in finished}
        pool = feasible or ranks
        return sorted(pool, key=lambda row: (*(-part for part in pool[row]), row))[: self.plan.keep]


def _failed(proposals: _Proposals, held: Beams) -> frozenset[int]:
    """The prompts without a feasible row, open or finished."""
    found = set(proposals.beams.prompt_index[proposals.scored.feasible].tolist()) | set(held.prompt_index.tolist())
    return frozenset(proposals.beams.prompt_index.tolist()) - found


def _of_prompts(rows: Beams, prompts: Set[int]) -> list[int]:
    return [row for row, prompt in enumerate(rows.prompt_index.tolist()) if prompt in prompts]


@runtime_checkable
class Opens(Protocol):
    """A strategy whose search can be joined and left between blocks."""

    def open(self, models: Models, sampling: Sampling) -> Search:
        """The search without prompts. Raises MissingCapability or FingerprintMismatch."""
        ...


def last_step(steps: Iterator[SearchStep]) -> SearchResult:
    """Runs a search to its end."""
    *_, last = steps
    assert last.result is not None
    return last.result


@dataclass(frozen=True)
class _Proposals:
    """The proposals of a block, of all attempts, with how they rank."""

    beams: Beams
    scored: Scored
    cost: Tensor  # [B]
    attempt: Tensor  # [B]: 0, or the number of the retry that proposed the row
    drawn: Tensor  # [B]: tokens that the row gained in this block
    faults: tuple[str, ...]

    def join(self, other: _Proposals) -> _Proposals:
        mine, theirs = self.scored, other.scored
        scored = Scored(
            torch.cat([mine.score, theirs.score]),
            torch.cat([mine.feasible, theirs.feasible]),
            torch.cat([mine.tie, theirs.tie]),
            torch.cat([mine.usable, theirs.usable]),
            torch.cat([mine.p_safe, theirs.p_safe]),
            calm=torch.cat([mine.settled, theirs.settled]),
        )
        return _Proposals(
            join(self.beams, other.beams),
            scored,
            torch.cat([self.cost, other.cost]),
            torch.cat([self.attempt, other.attempt]),
            torch.cat([self.drawn, other.drawn]),
            tuple(dict.fromkeys(self.faults + other.faults)),
        )


def _begin(engine: Engine, terms: Sequence[Terms], seeds: Sequence[int]) -> Beams:
    encoded = [engine.encode(own.prompt) for own in terms]
    for index, (own, tokens) in enumerate(zip(terms, encoded, strict=True)):
        if len(tokens) + own.max_new_tokens > engine.context:
            raise PromptTooLong(index, len(tokens), own.max_new_tokens, engine.context)
    try:
        return engine.begin(encoded, seeds)
    except InferenceGuardError:
        raise
    except Exception as error:
        raise EngineFault(f"engine {engine.name} failed on the prompts: {error}") from error


def _without(rows: Beams, prompts: Set[int]) -> Beams:
    """The rows of the other prompts."""
    kept = [row for row, prompt in enumerate(rows.prompt_index.tolist()) if prompt not in prompts]
    return rows if len(kept) == len(rows) else rows.take(kept)


def _spread(rows: Beams, n_beams: int) -> Tensor:
    """[N per prompt] which row each proposal continues: N over the prompt's rows, the rest to the first ones."""
    source: list[int] = []
    prompts = rows.prompt_index.tolist()
    for prompt in dict.fromkeys(prompts):
        mine = [row for row, owner in enumerate(prompts) if owner == prompt]
        each, rest = divmod(n_beams, len(mine))
        for place, row in enumerate(mine):
            source += [row] * (each + (place < rest))
    return torch.tensor(source, dtype=torch.int64)


def _rejected(proposals: _Proposals) -> Beams:
    """The finished rows that were scored and are not feasible."""
    scored, beams = proposals.scored, proposals.beams.without_states()
    return beams.take(torch.nonzero(beams.finished & scored.usable & ~scored.feasible)[:, 0])


def _best_rejected(rows: Beams, keep: int) -> Beams:
    """The K best of each prompt: by score, then by what is left of the budget."""
    order = sorted(range(len(rows)), key=lambda row: (-float(rows.score[row]), -float(rows.budget[row])))
    of = {prompt: [row for row in order if int(rows.prompt_index[row]) == prompt] for prompt in
          sorted(set(rows.prompt_index.tolist()))}  # fmt: skip
    return rows.take([row for mine in of.values() for row in mine[:keep]])


def quarter(n_beams: int) -> int:
    """The paper's K: N / 4, or the largest divisor of N below it."""
    if isinstance(n_beams, bool) or not isinstance(n_beams, int) or n_beams < 1:
        return 1  # SearchPlan refuses it, by its name
    return next(keep for keep in range(max(1, n_beams // 4), 0, -1) if n_beams % keep == 0)


def _discourage(failed: _Proposals, rows: Beams, weight: float, vocabulary: int) -> Tensor:
    """[B, V] bias for `rows`: minus `weight` times the share of the prompt's failed proposals that used the token."""
    bias = torch.zeros(len(rows), vocabulary)
    for prompt in set(rows.prompt_index.tolist()):
        used = torch.zeros(vocabulary)
        members = torch.nonzero(failed.beams.prompt_index == prompt)[:, 0].tolist()
        for row in members:
            block = failed.beams.token_ids[row][-int(failed.drawn[row]) :]
            used[list(set(block))] += 1
        bias[rows.prompt_index == prompt] = -weight * used / len(members)
    return bias


def _trace(proposals: _Proposals, rows: list[int], kept: set[int]) -> BlockTrace:
    scored, beams = proposals.scored, proposals.beams
    return BlockTrace(
        block=len(beams.blocks[rows[0]]) - 1,
        attempts=int(proposals.attempt[rows].max()) + 1,
        proposed_tokens=int(proposals.drawn[rows].sum()),
        attempt=tuple(int(proposals.attempt[row]) for row in rows),
        tokens=tuple(len(beams.token_ids[row]) for row in rows),
        cost=tuple(_number(proposals.cost[row]) for row in rows),
        budget=tuple(_number(beams.budget[row]) for row in rows),
        score=tuple(_number(scored.score[row]) for row in rows),
        p_safe=tuple(_number(scored.p_safe[row]) for row in rows),
        fate=tuple("kept" if row in kept else _fate(proposals, row) for row in rows),
        faults=proposals.faults,
    )


def _fate(proposals: _Proposals, row: int) -> str:
    scored = proposals.scored
    if bool(scored.feasible[row]) or math.isinf(float(proposals.cost[row])):  # the latter was not asked about
        return "outranked"
    if not math.isfinite(float(proposals.cost[row])):
        return "scorer fault"
    if not float(proposals.beams.budget[row]) >= 0:
        return "over budget"
    return "critic" if bool(scored.usable[row]) and math.isfinite(float(scored.p_safe[row])) else "scorer fault"


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
