"""Other ways to draw the same tokens, where they are installed: llama.cpp (the `xllamacpp` wheel) and a vLLM server."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.measure import Skipped
from inferenceguard.contracts import Sampling
from inferenceguard.embedded import find_gguf


class LlamaCpp:
    """The embedded LLM's own GGUF in llama.cpp's server, with as many slots as rows, in a process of its own.

    In ours its threads would stay beside ours, of which OpenMP then has more than there are cores: decoding took twice
    as long. They wait for work as llama.cpp's do by default.
    """

    def __init__(self, pool: ProcessPoolExecutor, rows: int) -> None:
        self._pool, self.rows = pool, rows

    def draw(self, prompt: Sequence[int], tokens: int) -> int:
        """Draws `tokens` tokens for every row: how many came."""
        return self._pool.submit(_draw, list(prompt), tokens, self.rows).result()


@contextlib.contextmanager
def llama_cpp(rows: int, context: int, sampling: Sampling) -> Iterator[LlamaCpp]:
    """The server for as long as it is needed. Raises Skipped where the wheel is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise Skipped("xllamacpp is not installed.")
    settings = rows, context, sampling.temperature, torch.get_num_threads()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _serve, settings) as pool:
        yield LlamaCpp(pool, rows)


_served: dict[str, Any] = {}  # in llama.cpp's own process: its server, and the temperature


def _serve(rows: int, context: int, temperature: float, threads: int) -> None:
    """Loads the model in this process."""
    os.environ.pop("GOMP_SPINCOUNT", None)  # ours; read when the library is loaded
    library: Any = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path = str(find_gguf())
    params.n_parallel, params.n_ctx = rows, rows * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    _served.update(server=library.Server(params), temperature=temperature)


def _draw(prompt: list[int], tokens: int, rows: int) -> int:
    request = {
        "prompt": prompt, "n_predict": tokens, "ignore_eos": True, "samplers": ["temperature"],
        "temperature": _served["temperature"], "cache_prompt": True,
    }  # fmt: skip
    with ThreadPoolExecutor(rows) as pool:
        answers = pool.map(lambda row: _served["server"].handle_completions({**request, "seed": row}), range(rows))
        return sum(_completed(answer) for answer in answers)


def _completed(answer: Any) -> int:
    if not isinstance(answer, dict) or "usage" not in answer:
        raise RuntimeError(f"llama.cpp answered {str(answer)[:200]}")
    return int(answer["usage"]["completion_tokens"])


class Vllm:
    """A running `vllm serve` of the same model."""

    def __init__(self, url: str, sampling: Sampling) -> None:
        """Raises Skipped where no URL is given or nothing answers there."""
        if not url:
            raise Skipped("no vLLM server was named (--vllm URL).")
        self.url, self.sampling = url.rstrip("/").removesuffix("/v1"), sampling
        try:
            self.model = str(self._ask("/v1/models")["data"][0]["id"])
        except (OSError, urllib.error.URLError, KeyError, ValueError) as error:
            raise Skipped(f"no vLLM server answers at {url} ({error}).") from error

    def draw(self, prompt: Sequence[int], rows: int, tokens: int) -> int:
        """Draws `tokens` tokens for every row: how many came."""
        answer = self._ask("/v1/completions", {
            "model": self.model, "prompt": list(prompt), "n": rows, "max_tokens": tokens, "ignore_eos": True,
            "temperature": self.sampling.temperature,
        })  # fmt: skip
        return int(answer["usage"]["completion_tokens"])

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
