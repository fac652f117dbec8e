"""HTTP/1.1 as uvicorn speaks it, with the two time limits that it lacks."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0  # for a request's line and headers to arrive
READ_SECONDS = 30.0  # for a client to take something of what it is sent


class TimedProtocol(H11Protocol):
    """Closes a connection whose client does not finish its headers, or does not read its answer.

    Otherwise whoever opens as many connections as the server allows, and says nothing, keeps everybody else out.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._head: asyncio.TimerHandle | None = None
        self._read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """asyncio."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio."""
        _stop(self._head)
        _stop(self._read)
        self._head = self._read = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """asyncio: the client reads slower than we write."""
        super().pause_writing()
        if self._read is None:
            self._read = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """asyncio: it has read."""
        _stop(self._read)
        self._read = None
        super().resume_writing()

    def _watch_head(self) -> None:
        """The time runs while a request's head is awaited; between requests uvicorn's own limit on idleness does."""
        if self.conn.their_state is not h11.IDLE or self.timeout_keep_alive_task is not None:
            _stop(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
