"""Other ways to draw the same tokens, where they are installed: llama.cpp (the `xllamacpp` wheel) and a vLLM server."""

from __future__ import annotations

import contextlib
import importlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.measure import Skipped
from inferenceguard.contracts import Sampling
from inferenceguard.embedded import find_gguf


class LlamaCpp:
    """The embedded LLM's own GGUF in llama.cpp's server, in this process, with as many slots as rows."""

    def __init__(self, rows: int, context: int, sampling: Sampling) -> None:
        """Raises Skipped where the wheel is not installed."""
        try:
            library: Any = importlib.import_module("xllamacpp")
        except ImportError as error:
            raise Skipped(f"xllamacpp is not installed ({error}).") from error
        params = library.CommonParams()
        params.model.path = str(find_gguf())
        params.n_parallel, params.n_ctx = rows, rows * context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.verbosity = -1
        self.rows, self.sampling = rows, sampling
        self._server = library.Server(params)

    def draw(self, prompt: Sequence[int], tokens: int) -> int:
        """Draws `tokens` tokens for every row: how many came."""
        request = {
            "prompt": list(prompt), "n_predict": tokens, "ignore_eos": True, "samplers": ["temperature"],
            "temperature": self.sampling.temperature, "cache_prompt": True,
        }  # fmt: skip
        with ThreadPoolExecutor(self.rows) as pool:
            answers = pool.map(lambda row: self._server.handle_completions({**request, "seed": row}), range(self.rows))
            return sum(_completed(answer) for answer in answers)


def _completed(answer: Any) -> int:
    if not isinstance(answer, dict) or "usage" not in answer:
        raise RuntimeError(f"llama.cpp answered {str(answer)[:200]}")
    return int(answer["usage"]["completion_tokens"])


@contextlib.contextmanager
def llama_cpp(rows: int, context: int, sampling: Sampling) -> Iterator[LlamaCpp]:
    """The server for as long as it is needed: its threads would wait beside the next entry."""
    rival = LlamaCpp(rows, context, sampling)
    try:
        yield rival
    finally:
        del rival._server


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
