"""One thread runs the search; requests wait for it in a bounded queue and join at block boundaries."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from inferenceguard.contracts import GuardedResponse
from inferenceguard.guard import Guard
from inferenceguard.memory import Trimmer
from inferenceguard.server.limits import Limits
from inferenceguard.session import Event, Question, Session

logger = logging.getLogger("inferenceguard.server")


class QueueFull(Exception):
    """No room for another answer; try again after `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"queue full, retry after {retry_after} s")
        self.retry_after = retry_after


class Expired(Exception):
    """The deadline passed."""


class Closing(Exception):
    """The server takes no more."""


@dataclass(eq=False)
class Ticket:
    """One answer that somebody waits for. `listen` is called from the search's thread and must not block."""

    question: Question
    deadline: float  # time.monotonic()
    listen: Callable[[Event], None]
    number: int | None = None  # in the session, once it has joined
    cancelled: bool = False
    over: bool = False  # had its last event
    arrived: float = field(default_factory=time.monotonic)


class Scheduler:
    """`submit` and `cancel` from any thread. `close` finishes what is in flight."""

    def __init__(
        self, guard: Guard, limits: Limits, finished: Callable[[Ticket, Event], None] = lambda ticket, event: None
    ) -> None:
        """`finished` sees every ticket's last event."""
        self.guard, self.limits, self._finished = guard, limits, finished
        self._session = Session(guard)
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._chores: deque[Callable[[], None]] = deque()
        self._closing = False
        self._seconds = 1.0  # of a recent answer, smoothed
        self._trimmer = Trimmer()
        self._busy_since: float | None = None  # time.monotonic() when the work at hand began
        self._thread = threading.Thread(target=self._run, name="search", daemon=True)

    def start(self) -> None:
        """Begins to search."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether answers are being made and taken on: not so when one block takes longer than a request may."""
        since = self._busy_since
        stuck = since is not None and time.monotonic() - since > self.limits.request_seconds
        return self._thread.is_alive() and not self._closing and not stuck

    @property
    def waiting(self) -> int:
        """Answers in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers in the batch."""
        return len(self._running)

    def submit(
        self, questions: Sequence[Question], seconds: float, listen: Callable[[int, Event], None]
    ) -> list[Ticket]:
        """All of them or none join the queue. `listen(index, event)`. Raises QueueFull or Closing."""
        deadline = time.monotonic() + seconds
        tickets = [
            Ticket(question, deadline, lambda event, at=index: listen(at, event))  # type: ignore[misc]
            for index, question in enumerate(questions)
        ]
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise Closing
            if len(self._waiting) + len(tickets) > self.limits.queue:
                raise QueueFull(self._retry_after())
            self._waiting += tickets
            self._changed.notify_all()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Whoever waited has gone: the rows are freed before the next block. Nothing is listened to any more."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self._changed.notify_all()

    def chore(self, job: Callable[[], None]) -> None:
        """Runs a job between two blocks, where it has the models to itself. Raises QueueFull or Closing."""
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise Closing
            if len(self._chores) >= 4:
                raise QueueFull(self._retry_after())
            self._chores.append(job)
            self._changed.notify_all()

    def close(self, grace: float | None = None) -> None:
        """Takes no more, finishes what it has within `grace` seconds, and ends the rest with Closing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(self.limits.grace_seconds if grace is None else grace)
        if self._thread.is_alive():
            with self._changed:
                left = [*self._waiting, *self._running.values()]
            for ticket in left:
                self._end(ticket, Event(-1, error=Closing()))

    # --- the search's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._chores or self._closing):
                    self._changed.wait()
                if self._closing and not (self._waiting or self._running or self._chores):
                    return
                chores = [self._chores.popleft() for _ in range(len(self._chores))]
            self._busy_since = time.monotonic()
            try:
                for job in chores:
                    job()
                self._drop()
                self._admit()
                self._step()
            except Exception as error:  # a bug: nobody gets an answer of this session, and a new one begins
                self._fail(error)
            self._busy_since = None
            self._trimmer.after_block(idle=not (self._waiting or self._running))

    def _fail(self, error: Exception) -> None:
        logger.exception("the search failed")
        self._session = Session(self.guard)
        tickets = list(self._running.values())
        self._running.clear()
        for ticket in tickets:
            self._end(ticket, Event(-1, error=error))

    def _drop(self) -> None:
        """Lets go of who was cancelled and of whose time is over."""
        now = time.monotonic()
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.cancelled or ticket.deadline < now]
            for ticket in gone:
                self._waiting.remove(ticket)
        for number, ticket in list(self._running.items()):
            if ticket.cancelled or ticket.deadline < now:
                self._session.cancel(number)
                del self._running[number]
                gone.append(ticket)
        for ticket in gone:
            self._end(ticket, Event(-1, error=Expired()))

    def _admit(self) -> None:
        """Takes from the queue, in order, what has room in the batch; one answer always has."""
        while True:
            with self._changed:
                if not self._waiting:
                    return
                wanted = self._waiting[0].question.strategy.n_beams
                if self._running and self._session.rows + wanted > self.limits.rows:
                    return
                ticket = self._waiting.popleft()
            try:
                ticket.number = self._session.submit(ticket.question)
            except Exception as error:
                self._end(ticket, Event(-1, error=error))
                continue
            self._running[ticket.number] = ticket
            if not ticket.cancelled:
                ticket.listen(Event(ticket.number))

    def _step(self) -> None:
        if not self._running:
            return
        for event in self._session.step():
            ticket = self._running[event.number]
            if event.response is not None or event.error is not None:
                del self._running[event.number]
                self._seconds += 0.2 * (time.monotonic() - ticket.arrived - self._seconds)
                self._end(ticket, event)
            elif not ticket.cancelled:
                ticket.listen(event)

    def _end(self, ticket: Ticket, event: Event) -> None:
        if ticket.over:
            return
        ticket.over = True
        if event.error is not None and not isinstance(event.error, Expired | Closing):
            logger.warning("an answer failed: %s: %s", type(event.error).__name__, event.error)
        try:
            self._finished(ticket, event)
            if not ticket.cancelled:
                ticket.listen(event)
        except Exception:  # a listener must not stop the search
            logger.exception("a listener failed")

    def _retry_after(self) -> int:
        """Seconds until a place in the queue is likely to be free."""
        width = max(1, self.limits.rows // max(1, self.guard.strategy.n_beams))
        return min(300, max(1, math.ceil(self._seconds / width)))


def guarded(event: Event) -> GuardedResponse:
    """The last event's response. Raises its error."""
    if event.error is not None:
        raise event.error
    assert event.response is not None
    return event.response


def plain_faults(record: dict[str, Any]) -> dict[str, Any]:
    """A record for its client: a scorer's message may quote what stood beside in its batch, so it is not shown."""
    hidden = "a scorer failed (see the server's log)"
    blocks = [{**block, "faults": [hidden] if block["faults"] else []} for block in record["search"]]
    unscored = record["unscored"] and (
        "nothing was released" if record["unscored"] == "nothing was released" else hidden
    )
    return {**record, "faults": [hidden] if record["faults"] else [], "unscored": unscored, "search": blocks}
