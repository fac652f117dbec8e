"""Many requests in flight to a model server, with a time limit and bounded retries. Failures are EngineFaults."""

from __future__ import annotations

import asyncio
import base64
import os
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import numpy as np
import torch
from torch import Tensor

from inferenceguard.errors import EngineFault, InvalidArgument, UnknownName

KEY = "VLLM_API_KEY"  # the environment variable that vLLM itself reads its key from
PROBE_SECONDS = 2.0
_AGAIN = frozenset({429, 500, 502, 503, 504})  # a server that restarts, or a balancer in front of one that has died
_POOL_ROWS = 16  # per request: enough to save overhead, few enough to spread over nodes
_PAUSE = 0.25  # seconds before the first retry; doubled for each further one

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One request: POST of a JSON body, or GET without one."""

    path: str
    body: dict[str, Any] | None = None


class Remote:
    """A server at `url`. The requests of one call run at once, on an event loop in a thread of its own.

    A request is sent again, `retries` times at most, where the connection fails or the server says that it is not there
    (429 and 5xx): what is asked for here has no effect, so asking twice does no harm.
    """

    def __init__(
        self, url: str, *, seconds: float = 120.0, retries: int = 3, connections: int = 256,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        """`seconds` bounds a call, retries included. `transport` stands in for the network in tests."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise InvalidArgument("url", "http://host:port or https://host:port", url)
        if not seconds > 0:
            raise InvalidArgument("seconds", "> 0", seconds)
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise InvalidArgument("retries", "an integer >= 0", retries)
        if isinstance(connections, bool) or not isinstance(connections, int) or connections < 1:
            raise InvalidArgument("connections", "an integer >= 1", connections)
        self.url = url.rstrip("/").removesuffix("/v1")
        self.seconds, self.retries = seconds, retries
        key = os.environ.get(KEY)
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(seconds, connect=10.0, pool=None),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            transport=transport,
            trust_env=False,  # a proxy of the environment is not meant for the model servers
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()

    def all(self, calls: Sequence[Call]) -> list[Any]:
        """The answers (parsed JSON), in order. The first that fails ends the others. Raises EngineFault."""
        return self._wait(self._all(calls))

    def one(self, call: Call) -> Any:
        """One answer. Raises EngineFault."""
        return self.all([call])[0]

    def model(self, name: str | None = None) -> tuple[str, int]:
        """(the model's name here, tokens that fit). Raises UnknownName for one that is not served, EngineFault.

        The name may be left out where there is one model only.
        """
        try:
            cards = {str(card["id"]): card for card in self.one(Call("/v1/models"))["data"]}
        except (KeyError, TypeError):
            raise EngineFault(f"{self.url}/v1/models did not answer as vLLM does.") from None
        if name is None and len(cards) == 1:
            name = next(iter(cards))
        if name is None or name not in cards:
            raise UnknownName("served", str(name), cards, hint=f"These are the models of {self.url}.")
        length = cards[name].get("max_model_len")
        return name, int(length) if length else 2**31

    def pool(self, model: str, rows: Sequence[tuple[int, ...]], width: int, **fields: Any) -> Tensor:
        """What the pooling server `model` makes of each row of token ids: [B, width] float32, finite.

        Equal rows are asked for once. `fields` go into the requests. Raises EngineFault.
        """
        distinct = list(dict.fromkeys(rows))
        parts = [distinct[at : at + _POOL_ROWS] for at in range(0, len(distinct), _POOL_ROWS)]
        wanted = {"model": model, "encoding_format": "base64", "embed_dtype": "float32", "endianness": "little"}
        answers = self.all([
            Call("/pooling", {**wanted, **fields, "input": [list(row) for row in part]}) for part in parts
        ])  # fmt: skip
        found = [
            vector
            for part, answer in zip(parts, answers, strict=True)
            for vector in _vectors(answer, len(part), width, f"{self.url}/pooling")
        ]
        place = {row: at for at, row in enumerate(distinct)}
        return torch.from_numpy(np.array([found[place[row]] for row in rows], dtype=np.float32).reshape(-1, width))

    def healthy(self) -> bool:
        """Whether `GET /health` says yes within two seconds."""
        try:
            return self._wait(self._probe())
        except EngineFault:
            return False

    def close(self) -> None:
        """Lets go of connections and thread. Calls after it fail."""
        if not self._loop.is_closed():
            self._wait(self._client.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise EngineFault(f"the connection to {self.url} is closed.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupted caller must not leave the server at work
            raise

    async def _all(self, calls: Sequence[Call]) -> list[Any]:
        tasks = [asyncio.ensure_future(self._ask(call)) for call in calls]
        try:
            async with asyncio.timeout(self.seconds):
                return await asyncio.gather(*tasks)
        except TimeoutError:
            raise EngineFault(f"{self.url} did not answer within {self.seconds:g} s.") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, call: Call) -> Any:
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                answer = await self._client.request("GET" if call.body is None else "POST", call.path, json=call.body)
            except httpx2.ReadTimeout:
                raise TimeoutError from None
            except httpx2.TransportError as error:
                said = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code == 200:
                return _parsed(answer, self.url + call.path)
            said = f"status {answer.status_code}, {answer.text[:300]!r}"
            if answer.status_code not in _AGAIN:
                break
        raise EngineFault(f"{self.url}{call.path} failed: {said}.")

    async def _probe(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                return (await self._client.get("/health")).status_code == 200
        except (TimeoutError, httpx2.HTTPError):
            return False


def _parsed(answer: httpx2.Response, where: str) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise EngineFault(f"{where} answered something that is not JSON: {answer.text[:80]!r}.") from None


def _vectors(answer: Any, rows: int, width: int, where: str) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """The vectors of one answer, checked."""
    try:
        data = sorted(answer["data"], key=lambda each: int(each["index"]))
        vectors = [np.frombuffer(base64.b64decode(each["data"], validate=True), "<f4") for each in data]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineFault(f"{where} did not answer as vLLM does: {type(error).__name__} {error}.") from None
    if len(vectors) != rows or any(vector.shape != (width,) for vector in vectors):
        widths = sorted({len(vector) for vector in vectors})
        raise EngineFault(
            f"{where} gave {len(vectors)} vectors of {widths} numbers instead of {rows} of {width}: is it the same "
            "model, started as a pooling server of its last token?"
        )
    if not all(bool(np.isfinite(vector).all()) for vector in vectors):
        raise EngineFault(f"{where} gave numbers that are not finite.")
    return vectors
