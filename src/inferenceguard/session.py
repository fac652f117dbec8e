"""Prompts that come and go while others are searched: what a server needs of the guard, in one thread.

All prompts of one search (its sizes) share its decode batches; prompts join between blocks. Each has its own sampling,
budget, length, seed and stop texts, and its answer does not depend on the others (search.py). What leaves passes
the same gate as in `Guard.generate`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import BlockTrace, Conversation, GuardedResponse, Sampling, Strategy
from inferenceguard.errors import InferenceGuardError, MissingCapability, PromptTooLong
from inferenceguard.guard import Asked, Desk, Guard
from inferenceguard.search import Opens, Search, Terms


@dataclass(frozen=True)
class Question:
    """One prompt with all that its answer depends on. `strategy` has the prompt's own budget and length."""

    prompt: Conversation
    seed: int
    strategy: Strategy
    sampling: Sampling
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """What a step did for one prompt. The last event has the response or the error."""

    number: int
    text: str = ""  # new text that will not be taken back
    blocks: tuple[BlockTrace, ...] = ()  # searched since the last event
    response: GuardedResponse | None = None
    error: Exception | None = None


class Session:
    """`submit` and `cancel` between steps; `step` advances every prompt by one block. Not thread-safe."""

    def __init__(self, guard: Guard) -> None:
        """Raises MissingCapability for a strategy whose search cannot be joined."""
        if not isinstance(guard.strategy, Opens):
            name = type(guard.strategy).__name__
            raise MissingCapability(guard.models.engine.name, "serving", f"a search that can be joined, which {name}")
        self.guard = guard
        self._numbers = itertools.count()
        self._desk = Desk(guard)
        self._searches: dict[Any, Search] = {}
        self._kinds: dict[int, Any] = {}  # number -> which search the prompt is in
        self._shown: dict[int, int] = {}  # number -> blocks that were told of

    @property
    def rows(self) -> int:
        """Rows that the prompts in hand may draw at once."""
        return sum(self._desk.asked[number].strategy.n_beams for number in self._kinds)

    def check(self, question: Question) -> int:
        """The prompt's tokens. Raises PromptTooLong where prompt and answer do not fit the model's context."""
        engine, limit = self.guard.models.engine, question.strategy.max_new_tokens
        tokens = len(engine.encode(question.prompt))
        if tokens + limit > engine.context:
            raise PromptTooLong(0, tokens, limit, engine.context)
        return tokens

    def submit(self, question: Question) -> int:
        """The prompt joins at the next block: its number. Raises PromptTooLong, or EngineFault."""
        strategy = question.strategy
        kind = _kind(strategy)
        search = self._searches.get(kind)
        if search is None:
            assert isinstance(strategy, Opens)
            search = strategy.open(self.guard.models, self.guard.sampling)
        number = next(self._numbers)
        terms = Terms(question.prompt, strategy.max_new_tokens, strategy.budget.limit, question.stop, question.sampling)
        search.admit({number: terms}, [question.seed])
        self._searches[kind], self._kinds[number], self._shown[number] = search, kind, 0
        self._desk.asked[number] = Asked(question.prompt, question.seed, strategy, question.sampling, question.stop)
        return number

    def cancel(self, number: int) -> None:
        """The prompt leaves, and its rows are free. Nothing happens if it has left already."""
        if number in self._kinds:
            kind = self._kinds[number]
            self._searches[kind].take([number])
            self._forget(number)
            self._close(kind)

    def step(self) -> list[Event]:
        """One block of every prompt. A search whose engine fails ends all its prompts with that error."""
        events: list[Event] = []
        for kind, search in list(self._searches.items()):
            numbers = [number for number, other in self._kinds.items() if other == kind]
            try:
                search.step()
                events += self._released(search, numbers)
            except Exception as error:  # nothing leaves of a search that failed, whatever it was
                fault = error if isinstance(error, InferenceGuardError) else RuntimeError(f"{type(error).__name__}")
                if fault is not error:
                    fault.__cause__ = error
                events += [Event(number, error=fault) for number in numbers if number in self._kinds]
                del self._searches[kind]
                for number in numbers:
                    self._forget(number)
        return events

    def _released(self, search: Search, numbers: Sequence[int]) -> Iterator[Event]:
        done = [number for number in numbers if number not in search.going]
        if len(done) < len(numbers):
            alive = search.alive
            left = set(done)
            open_rows = [row for row, number in enumerate(alive.prompt_index.tolist()) if number not in left]
            new = {event.index: event.text for event in self._desk.release_shared(alive.take(open_rows))}
            for number in numbers:
                if number not in left:
                    yield Event(number, new.get(number, ""), self._blocks(search, number))
        if not done:
            return
        told = {number: self._blocks(search, number) for number in done}
        kind = self._kinds[done[0]]
        result = search.take(done)
        for number, response in self._desk.settle(result.beams, dict(zip(done, result.trace, strict=True))).items():
            text = response.text[len(self._desk.asked[number].streamed_text) :]
            self._forget(number)
            yield Event(number, text, told[number], response)
        self._close(kind)

    def _blocks(self, search: Search, number: int) -> tuple[BlockTrace, ...]:
        blocks = tuple(search.trace(number)[self._shown[number] :])
        self._shown[number] += len(blocks)
        return blocks

    def _forget(self, number: int) -> None:
        self._kinds.pop(number, None)
        self._shown.pop(number, None)
        self._desk.asked.pop(number, None)

    def _close(self, kind: Any) -> None:
        """A search without prompts lets go of its caches."""
        if kind in self._searches and not any(other == kind for other in self._kinds.values()):
            del self._searches[kind]


def _kind(strategy: Strategy) -> Any:
    """Prompts share a search where these are equal: all but what `Terms` has."""
    fields = dataclasses.asdict(strategy)  # type: ignore[call-overload]
    budget: SafetyBudget = strategy.budget
    plan = getattr(strategy, "plan", None)
    own = {"budget": budget.discount, "max_new_tokens": getattr(plan, "block_tokens", strategy.max_new_tokens)}
    return type(strategy), repr(sorted({**fields, **own}.items()))
