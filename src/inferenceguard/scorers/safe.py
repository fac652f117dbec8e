"""Scorers behind a wall: whatever one does, each row gets one number, NaN where the scorer failed (METHOD 7.1).

A NaN spends the whole budget (budget.py), so a scorer that raises, hangs or returns nonsense can stop a response but
never let one through. What cannot be contained in a thread: a scorer that ends the process, or one that hangs inside C
code which never releases Python's interpreter lock.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from inferenceguard.beams import RowState
from inferenceguard.contracts import Conversation, Engine, Scorer, ScorerLimits, ScoresIncrementally
from inferenceguard.errors import InvalidArgument


@runtime_checkable
class ScoresPrefixes(Protocol):
    """A scorer whose text format marks the end of an answer, so that it must know which responses are finished."""

    def score_partial(
        self, prompts: Sequence[Conversation], responses: Sequence[str], finished: Sequence[bool]
    ) -> Tensor:
        """As `Scorer.score`, with the end mark where the response is finished: [B]."""
        ...


_Text = tuple[Conversation, str, bool]  # a prompt, a response, and whether that is finished (where it matters)


@dataclass(frozen=True)
class Outcome:
    """What came out of one call. Every fault leaves NaN in the rows that it concerns."""

    values: Tensor  # [B] float64, on the CPU: finite, or NaN where the scorer failed
    faults: tuple[str, ...] = ()  # what went wrong, in words, with row numbers where only some rows are concerned


class FailClosed:
    """Calls a scorer in one daemon thread, with a time limit per batch, and turns all that can go wrong into NaN.

    Never raises on what the scorer does. A call that hangs fails after `limits.seconds`; while it still hangs, further
    calls fail at once (so there is never more than one stuck thread per scorer); when it comes back after all, its
    late result is dropped and the next call runs again. Calls of several threads wait for each other.
    """

    def __init__(self, scorer: Scorer, limits: ScorerLimits | None = None, *, remembers: int = 0) -> None:
        """`remembers`: of how many texts the last scores are kept, for whoever asks again: what the scorer itself said
        of the very text and prompt, and never what it made of a state.
        """
        self.scorer = scorer
        self.limits = limits or ScorerLimits()
        self.name = str(scorer.name)
        self.fingerprint = str(scorer.fingerprint)
        self.precision: str | None = getattr(scorer, "precision", None)
        self._marks_ends = isinstance(scorer, ScoresPrefixes)
        self._worker = _Worker()
        self._remembers = remembers
        self._known: dict[_Text, float] = {}
        self._lock = threading.Lock()

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        """As `Scorer.score`, NaN where the scorer failed: a wall can stand wherever a scorer can."""
        return self.outcome(prompts, responses).values

    def outcome(
        self, prompts: Sequence[Conversation], responses: Sequence[str], finished: Sequence[bool] | Tensor | None = None
    ) -> Outcome:
        """Scores B pairs in batches of `limits.rows`. `finished` [B] tells a scorer that distinguishes prefixes."""
        if len(prompts) != len(responses) or (finished is not None and len(finished) != len(responses)):
            raise InvalidArgument("responses", f"as many as the {len(prompts)} prompts", len(responses))
        tells = self._marks_ends and finished is not None
        ends = [bool(end) for end in finished] if tells and finished is not None else [True] * len(responses)
        texts = list(zip(prompts, responses, ends, strict=True))
        values = self._remembered(texts)
        asked = torch.nonzero(torch.isnan(values))[:, 0].tolist()
        faults: dict[str, None] = {}
        for start in range(0, len(asked), self.limits.rows):
            rows = asked[start : start + self.limits.rows]
            outcome = self._score_batch([texts[row] for row in rows], tells, rows)
            values[rows] = outcome.values
            faults |= dict.fromkeys(outcome.faults)
        self._remember([texts[row] for row in asked], values[asked])
        return Outcome(values, tuple(faults))

    def _remembered(self, texts: Sequence[_Text]) -> Tensor:
        """[B] float64, NaN where nothing is known."""
        if not self._known:
            return torch.full((len(texts),), math.nan, dtype=torch.float64)
        with self._lock:
            return torch.tensor([self._known.get(text, math.nan) for text in texts], dtype=torch.float64)

    def _remember(self, texts: Sequence[_Text], values: Tensor) -> None:
        if not self._remembers:
            return
        new = {text: value for text, value in zip(texts, values.tolist(), strict=True) if math.isfinite(value)}
        with self._lock:
            for text in new:
                self._known.pop(text, None)  # so that the oldest stand first
            self._known |= new
            for text in list(self._known)[: max(0, len(self._known) - self._remembers)]:
                del self._known[text]

    def shares_tokens(self, engine: Engine) -> bool:
        """Whether `start` and `advance` can be used with this engine; False where asking fails."""
        scorer = self.scorer
        answer, _ = self._call(lambda: isinstance(scorer, ScoresIncrementally) and bool(scorer.shares_tokens(engine)))
        return answer is True

    def start(self, prompts: Sequence[Conversation]) -> tuple[RowState | None, tuple[str, ...]]:
        """(state after each prompt, faults). The state is None where the scorer failed: then use `score`."""
        scorer, copy = self.scorer, list(prompts)
        state, fault = self._call(lambda: _state(scorer.start(copy)))  # type: ignore[attr-defined]
        return (None, (fault,)) if fault else (state, ())

    def advance(
        self, state: RowState | None, new_tokens: Sequence[Sequence[int]], finished: Tensor
    ) -> tuple[RowState | None, Outcome]:
        """(state after the new tokens, scores so far). The state is None, and all rows NaN, where the scorer failed."""
        count = len(new_tokens)
        if state is None:
            return None, _failed(count, f"{self.name}: its incremental state was lost")
        scorer, tokens, ended = self.scorer, [list(row) for row in new_tokens], finished.clone()

        def job() -> tuple[RowState, list[float]]:
            grown, values = scorer.advance(state, tokens, ended)  # type: ignore[attr-defined]
            return _state(grown), _numbers(values, count)

        result, fault = self._call(job)
        if fault:
            return None, _failed(count, fault)
        return result[0], self._outcome(result[1], range(count))

    def _score_batch(self, texts: Sequence[_Text], tells: bool, rows: Sequence[int]) -> Outcome:
        """`tells`: whether the ends are known; `rows` are the texts' numbers, to name them by."""
        prompts, responses, finished = (list(part) for part in zip(*texts, strict=True))
        scorer, count = self.scorer, len(responses)

        def job() -> list[float]:
            if tells:
                return _numbers(scorer.score_partial(prompts, responses, finished), count)  # type: ignore[attr-defined]
            return _numbers(scorer.score(prompts, responses), count)

        values, fault = self._call(job)
        return _failed(count, fault) if fault else self._outcome(values, rows)

    def _call(self, job: Callable[[], Any]) -> tuple[Any, str]:
        """(what the job returned, "") or (None, what went wrong)."""
        result, fault = self._worker.call(job, self.limits.seconds)
        return (None, f"{self.name}: {fault}") if fault else (result, "")

    def _outcome(self, values: list[float], rows: Sequence[int]) -> Outcome:
        """Values that are no finite number become NaN, and their rows are named."""
        bad = [place for place, value in enumerate(values) if not math.isfinite(value)]
        tensor = torch.tensor(values, dtype=torch.float64)
        if not bad:
            return Outcome(tensor)
        tensor[bad] = math.nan
        named = ", ".join(f"{rows[place]} ({values[place]})" for place in bad[:8]) + ", ..." * (len(bad) > 8)
        return Outcome(tensor, (f"{self.name}: {len(bad)} of {len(values)} scores are not finite: rows {named}",))


@dataclass
class _Job:
    run: Callable[[], Any]
    done: threading.Event
    result: Any = None
    fault: str = ""


class _Worker:
    """Runs one job at a time, each in a daemon thread of its own.

    A thread that stayed would keep a pool of OpenMP threads of its own. With more of those than cores OpenMP's threads
    sleep between operations, and decoding, which has many small ones, took twice as long (docs/performance.md).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._last: _Job | None = None

    def call(self, run: Callable[[], Any], seconds: float) -> tuple[Any, str]:
        """(result, "") or (None, fault). At most `seconds` after the worker is free; at once while it hangs."""
        with self._lock:
            if self._last is not None and not self._last.done.is_set() and self._alive():
                return None, "an earlier call still hangs"
            self._last = job = _Job(run, threading.Event())
            self._thread = threading.Thread(target=_work, args=(job,), name="scorer", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # no more threads to be had: a fault of this call, not the end of the caller
                self._last = self._thread = None
                return None, _describe(error)
            if not job.done.wait(min(seconds, threading.TIMEOUT_MAX)):
                return None, f"no answer within {seconds:g} s"
            self._last = None
            self._thread.join(1.0)  # its pool ends with it
        return (None, job.fault) if job.fault else (job.result, "")

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()


def _work(job: _Job) -> None:
    try:
        job.result = job.run()
    except BaseException as exc:  # a scorer's SystemExit is a fault like any other
        job.fault = _describe(exc)
    finally:
        job.done.set()


def _describe(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except BaseException:  # even its text may raise
        text = "(its message cannot be read)"
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _numbers(values: Any, count: int) -> list[float]:
    """`count` floats, copied out of whatever holds them. Raises TypeError or ValueError otherwise."""
    tensor = torch.as_tensor(values).detach()
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"scores must be real numbers, got {tensor.dtype}")
    if tuple(tensor.shape) != (count,):
        raise ValueError(f"scores must have shape [{count}], got {list(tensor.shape)}")
    return [float(value) for value in tensor.to("cpu", torch.float64).tolist()]


def _state(state: Any) -> Any:
    if not (callable(getattr(state, "take", None)) and callable(getattr(state, "join", None))):
        raise TypeError(f"an incremental state must have take and join, got {type(state).__name__}")
    return state


def _failed(count: int, fault: str) -> Outcome:
    return Outcome(torch.full((count,), math.nan, dtype=torch.float64), (fault,))
