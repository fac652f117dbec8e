"""Small guards, and a live server, for the tests of sessions, of the server and of its page."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import uvicorn

from inferenceguard.budget import SafetyBudget
from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.guard import Guard
from inferenceguard.scorers import FunctionScorer
from inferenceguard.server import create_app
from inferenceguard.server.protocol import TimedProtocol
from inferenceguard.strategies import InferenceGuard
from inferenceguard.testing import ToyCost, ToyEngine, ToyReward
from tiny import tiny_model, tiny_tokenizer


def toy_guard(engine: Any = None, **settings: Any) -> Guard:
    """An exact toy: N 8, K 2, blocks of 2 tokens, 6 tokens, a budget of 0.5."""
    strategy = InferenceGuard(8, 2, 2, 6, budget=SafetyBudget(0.5), **settings)
    return Guard(engine or ToyEngine(seed=4, end_logit=-0.5), ToyReward(1), ToyCost(2), strategy=strategy)


def tiny_guard(**settings: Any) -> Guard:
    """A random Llama of bytes: N 4, K 2, blocks of 2 tokens; the cost is the share of capital letters."""

    def share(text: str) -> float:
        return sum(letter.isupper() for letter in text) / max(1, len(text)) - 0.1

    cost = FunctionScorer("capitals", lambda prompts, responses: [share(text) for text in responses])
    reward = FunctionScorer("length", lambda prompts, responses: [float(len(text)) for text in responses])
    strategy = InferenceGuard(4, 2, 2, 6, budget=SafetyBudget(0.5), **settings)
    return Guard(TransformersEngine(tiny_model("llama"), tiny_tokenizer(), "tiny"), reward, cost, strategy=strategy)


class Live:
    """A server in a thread."""

    def __init__(self, app: Any) -> None:
        self.app, self.service = app, app.state.service
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            log_level="critical",
            http=TimedProtocol,
            ws="none",
            timeout_graceful_shutdown=20,
            timeout_keep_alive=10,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        wait(lambda: self.server.started)

    def client(self, key: str = "none") -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()
        assert not self.thread.is_alive()


def wait(until: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(guard: Guard | None = None, **settings: Any) -> Iterator[Live]:
    live = Live(create_app(guard or toy_guard(), name="toy", **settings))
    try:
        yield live
    finally:
        live.close()
