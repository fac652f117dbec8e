"""FailClosed: no behaviour of a scorer raises, blocks for long, or looks like a safe score."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inferenceguard.contracts import Conversation, ScorerLimits, conversation
from inferenceguard.errors import InvalidArgument
from inferenceguard.scorers import FunctionScorer
from inferenceguard.scorers.safe import FailClosed

PROMPT = conversation("hello")


class Scripted:
    """A scorer that does what it is told, call by call."""

    name = "scripted"
    fingerprint = "0"

    def __init__(self, *acts: Callable[[Sequence[str]], Any]) -> None:
        self.acts: Iterator[Callable[[Sequence[str]], Any]] = iter(acts)

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        return next(self.acts)(responses)


def returns(value: Any) -> Callable[[Sequence[str]], Any]:
    return lambda responses: value


def raises(error: BaseException) -> Callable[[Sequence[str]], Any]:
    def act(responses: Sequence[str]) -> Any:
        raise error

    return act


def lengths(responses: Sequence[str]) -> Tensor:
    return torch.tensor([float(len(response)) for response in responses])


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (raises(ValueError("bad\nnews")), "ValueError: bad news"),
        (raises(SystemExit(3)), "SystemExit: 3"),
        (raises(KeyboardInterrupt()), "KeyboardInterrupt"),
        (raises(Unreadable()), "cannot be read"),
        (returns(None), "Error"),
        (returns("12"), "Error"),
        (returns(torch.tensor(1.0)), "shape [2]"),
        (returns(torch.zeros(2, 1)), "shape [2], got [2, 1]"),
        (returns(torch.zeros(3)), "shape [2], got [3]"),
        (returns(torch.zeros(2, dtype=torch.complex64)), "real numbers"),
        (returns(torch.tensor([True, False])), "real numbers"),
        (returns(torch.zeros(2, device="meta")), "Error"),
    ],
)
def test_a_call_that_fails_gives_nan_for_all_rows(act: Any, said: str) -> None:
    guarded = FailClosed(Scripted(act, lengths))
    outcome = guarded.outcome([PROMPT] * 2, ["a", "bc"])
    assert outcome.values.dtype == torch.float64
    assert outcome.values.isnan().tolist() == [True, True]
    assert len(outcome.faults) == 1
    assert said in outcome.faults[0]
    assert guarded.outcome([PROMPT] * 2, ["a", "bc"]).values.tolist() == [1.0, 2.0]  # and it goes on


def test_rows_that_are_not_finite_are_named_and_the_others_stand() -> None:
    values = torch.tensor([1.0, math.nan, -math.inf, 4.0])
    outcome = FailClosed(Scripted(returns(values))).outcome([PROMPT] * 4, ["a"] * 4)
    assert outcome.values.isnan().tolist() == [False, True, True, False]
    assert outcome.values[[0, 3]].tolist() == [1.0, 4.0]
    assert outcome.faults == ("scripted: 2 of 4 scores are not finite: rows 1 (nan), 2 (-inf)",)


def test_integers_lists_and_gradients_are_numbers() -> None:
    needs_grad = torch.tensor([1.0, 2.0], requires_grad=True)
    guarded = FailClosed(Scripted(returns(torch.tensor([1, 2])), returns([1.0, 2.0]), returns(needs_grad)))
    for _ in range(3):
        assert guarded.outcome([PROMPT] * 2, ["a", "b"]).values.tolist() == [1.0, 2.0]


def test_batches_of_limited_rows() -> None:
    seen: list[int] = []

    def act(responses: Sequence[str]) -> Tensor:
        seen.append(len(responses))
        return lengths(responses)

    guarded = FailClosed(Scripted(act, raises(ValueError("x")), act), ScorerLimits(rows=2))
    outcome = guarded.outcome([PROMPT] * 5, ["a", "bb", "c", "d", "eeee"])
    assert seen == [2, 1]
    assert [None if math.isnan(v) else v for v in outcome.values.tolist()] == [1.0, 2.0, None, None, 4.0]
    assert len(guarded.outcome([], []).values) == 0
    with pytest.raises(InvalidArgument):
        guarded.outcome([PROMPT], [])


def test_a_scorer_cannot_change_the_callers_lists() -> None:
    responses = ["a", "b"]
    FailClosed(Scripted(lambda given: given.clear())).outcome([PROMPT] * 2, responses)  # type: ignore[attr-defined]
    assert responses == ["a", "b"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.lists(st.floats(width=32), min_size=3, max_size=3),
            st.lists(st.floats(width=32), max_size=5),
            st.sampled_from([ValueError("x"), SystemExit(), KeyboardInterrupt(), GeneratorExit(), MemoryError(), None]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_row_is_finite_or_nan_with_a_reason(acts: list[Any]) -> None:
    scorer = Scripted(*(raises(a) if isinstance(a, BaseException) else returns(a) for a in acts))
    guarded = FailClosed(scorer, ScorerLimits(seconds=30))
    for act in acts:
        outcome = guarded.outcome([PROMPT] * 3, ["a", "b", "c"])
        whole = isinstance(act, list) and len(act) == 3
        expected = [v if whole and math.isfinite(v) else None for v in (act if whole else [0.0] * 3)]
        assert [None if math.isnan(v) else v for v in outcome.values.tolist()] == expected
        assert bool(outcome.faults) == (None in expected)


class Stuck:
    """Hangs until it is let go."""

    name = "stuck"
    fingerprint = "0"

    def __init__(self) -> None:
        self.go = threading.Event()
        self.calls = 0

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        self.calls += 1
        self.go.wait(60)
        return torch.ones(len(responses))


def test_a_hung_scorer_fails_in_time_then_at_once_then_recovers() -> None:
    scorer, before = Stuck(), set(threading.enumerate())
    guarded = FailClosed(scorer, ScorerLimits(seconds=0.1, rows=1))
    began = time.monotonic()
    outcome = guarded.outcome([PROMPT] * 3, ["a", "b", "c"])  # the first batch times out, the others fail at once
    assert time.monotonic() - began < 5
    assert outcome.values.isnan().all()
    assert outcome.faults == ("stuck: no answer within 0.1 s", "stuck: an earlier call still hangs")
    for _ in range(5):
        assert guarded.outcome([PROMPT], ["a"]).faults == ("stuck: an earlier call still hangs",)
    assert scorer.calls == 1
    assert len(set(threading.enumerate()) - before) == 1
    scorer.go.set()
    deadline = time.monotonic() + 30
    while guarded.outcome([PROMPT], ["a"]).faults and time.monotonic() < deadline:
        time.sleep(0.01)
    assert guarded.outcome([PROMPT], ["a"]).values.tolist() == [1.0]
    assert len(set(threading.enumerate()) - before) == 0, "none stays to keep OpenMP threads of its own"


def test_calls_of_several_threads_wait_for_each_other() -> None:
    def slow(responses: Sequence[str]) -> Tensor:
        time.sleep(0.05)
        return lengths(responses)

    guarded, results = FailClosed(Scripted(*[slow] * 4), ScorerLimits(seconds=30)), []
    threads = [
        threading.Thread(target=lambda n=n: results.append(guarded.outcome([PROMPT], ["a" * n]).values.item()))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0.0, 1.0, 2.0, 3.0]


def test_no_thread_to_be_had_is_a_fault_and_the_next_call_works(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = FailClosed(FunctionScorer("one", lambda prompts, texts: [1.0] * len(texts)), ScorerLimits())

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        outcome = guarded.outcome([PROMPT], ["a"])
    assert outcome.values.isnan().all()
    assert outcome.faults == ("one: RuntimeError: can't start new thread",)
    assert guarded.outcome([PROMPT], ["a"]).values.tolist() == [1.0]


def test_the_thread_ends_with_its_owner() -> None:
    guarded = FailClosed(Scripted(lengths))
    guarded.outcome([PROMPT], ["a"])
    thread = guarded._worker._thread
    assert thread is not None
    del guarded
    thread.join(30)
    assert not thread.is_alive()


def test_the_interpreter_exits_while_a_scorer_hangs() -> None:
    code = """
import time, torch
from inferenceguard.contracts import ScorerLimits, conversation
from inferenceguard.scorers import FunctionScorer
from inferenceguard.scorers.safe import FailClosed
class Hung:
    name = fingerprint = "hung"
    def score(self, prompts, responses):
        time.sleep(600)
print(FailClosed(Hung(), ScorerLimits(seconds=0.05)).outcome([conversation("a")], ["b"]).faults)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "no answer within 0.05 s" in done.stdout
    assert done.stderr == ""


class Incremental(Scripted):
    """An incremental scorer: the score is the number of tokens read."""

    def shares_tokens(self, engine: Any) -> bool:
        return next(self.acts)([])

    def start(self, prompts: Sequence[Conversation]) -> Any:
        return next(self.acts)([""] * len(prompts))

    def advance(self, state: Any, new_tokens: Sequence[Sequence[int]], finished: Tensor) -> Any:
        return next(self.acts)([""] * len(new_tokens))


class State:
    def take(self, rows: Tensor) -> State:
        return self

    def join(self, other: Any) -> State:
        return self


def test_incremental_scoring_behind_the_wall() -> None:
    engine: Any = object()
    good = returns((State(), torch.tensor([1.0, math.nan])))
    guarded = FailClosed(
        Incremental(returns(True), raises(ValueError("x")), returns(State()), good, returns((State(), torch.ones(1))))
    )
    assert guarded.shares_tokens(engine)
    assert not guarded.shares_tokens(engine)
    state, faults = guarded.start([PROMPT] * 2)
    assert isinstance(state, State)
    assert faults == ()
    state, outcome = guarded.advance(state, [[1], [2]], torch.tensor([False, True]))
    assert isinstance(state, State)
    assert outcome.values[0] == 1.0
    assert outcome.values[1].isnan()
    state, outcome = guarded.advance(state, [[1], [2]], torch.tensor([False, True]))  # too few scores
    assert state is None
    assert outcome.values.isnan().all()
    state, outcome = guarded.advance(state, [[1], [2]], torch.tensor([False, True]))
    assert state is None
    assert outcome.faults == ("scripted: its incremental state was lost",)
    assert not FailClosed(Scripted()).shares_tokens(engine)
    state, faults = FailClosed(Incremental(returns(7))).start([PROMPT])
    assert state is None
    assert "take and join" in faults[0]


def test_a_scorer_that_distinguishes_prefixes_is_told_which_are_finished() -> None:
    class Ends(Scripted):
        def score_partial(self, prompts: Any, responses: Any, finished: Sequence[bool]) -> Tensor:
            return torch.tensor([float(end) for end in finished])

    guarded = FailClosed(Ends(lengths), ScorerLimits(rows=2))
    assert guarded.outcome([PROMPT] * 3, ["a"] * 3, torch.tensor([True, False, True])).values.tolist() == [
        1.0,
        0.0,
        1.0,
    ]
    assert guarded.outcome([PROMPT], ["abc"]).values.tolist() == [3.0]
    assert FailClosed(Scripted(lengths)).outcome([PROMPT], ["abc"], [False]).values.tolist() == [3.0]


def test_a_wall_that_remembers_asks_once_for_a_text_and_only_for_the_others_of_a_call() -> None:
    asked: list[list[str]] = []

    def counted(responses: Sequence[str]) -> Tensor:
        asked.append(list(responses))
        return lengths(responses)

    wall = FailClosed(Scripted(*[counted] * 9), remembers=3)
    other = conversation("another")
    assert wall.outcome([PROMPT, PROMPT], ["a", "bb"], [True, False]).values.tolist() == [1, 2]
    assert wall.outcome([PROMPT] * 3, ["a", "ccc", "bb"]).values.tolist() == [1, 3, 2]
    assert asked == [["a", "bb"], ["ccc"]]
    assert wall.outcome([other, PROMPT], ["a", "ccc"], [False, True]).values.tolist() == [1, 3]
    assert asked[2:] == [["a"]], "another prompt's"
    wall.outcome([PROMPT] * 3, ["a", "bb", "new"])
    assert asked[3:] == [["a", "new"]], "only so many are kept, and the oldest go"


def test_a_wall_that_remembers_tells_a_part_from_a_whole_where_its_scorer_does() -> None:
    asked: list[list[tuple[str, bool]]] = []

    class Ends(Scripted):
        def score_partial(self, prompts: Any, responses: Any, finished: Sequence[bool]) -> Tensor:
            asked.append(list(zip(responses, finished, strict=True)))
            return torch.tensor([float(end) for end in finished])

    wall = FailClosed(Ends(), remembers=9)
    assert wall.outcome([PROMPT] * 2, ["a", "b"], [True, False]).values.tolist() == [1, 0]
    assert wall.outcome([PROMPT] * 3, ["a", "a", "b"], [False, True, True]).values.tolist() == [0, 1, 1]
    assert asked[1:] == [[("a", False), ("b", True)]]
    assert wall.outcome([PROMPT] * 3, ["a", "a", "b"], [False, True, False]).values.tolist() == [0, 1, 0]
    assert len(asked) == 2


def test_a_fault_names_rows_of_the_call_though_others_were_known() -> None:
    wall = FailClosed(Scripted(lengths, returns([1.0, math.nan])), ScorerLimits(rows=2), remembers=9)
    wall.outcome([PROMPT], ["a"])
    outcome = wall.outcome([PROMPT] * 3, ["b", "a", "c"])
    assert outcome.values[:2].tolist() == [1, 1]
    assert math.isnan(outcome.values[2])
    assert "rows 2 (nan)" in outcome.faults[0]


def test_a_wall_does_not_remember_faults_and_by_default_nothing() -> None:
    wall = FailClosed(Scripted(raises(ValueError("no")), returns([math.nan]), lengths), remembers=3)
    assert math.isnan(wall.score([PROMPT], ["abc"])[0])
    assert math.isnan(wall.score([PROMPT], ["abc"])[0])
    assert wall.score([PROMPT], ["abc"]).tolist() == [3]
    forgetful = FailClosed(Scripted(lengths, raises(ValueError("asked again"))))
    assert forgetful.score([PROMPT], ["abc"]).tolist() == [3]
    assert math.isnan(forgetful.score([PROMPT], ["abc"])[0])
