"""A vLLM server without the network: the answers of its HTTP interface, computed by plain passes, row by row."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import AutoModelForCausalLM

from tiny import tiny_model, tiny_tokenizer

NAME = "tiny"


def tiny_directory(directory: Path, architecture: str = "llama") -> Path:
    """A checkpoint of the tiny model as transformers saves it."""
    tiny_model(architecture).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


class FakeVLLM:
    """`transport` answers /v1/models, /v1/completions, /pooling and /health as vLLM 0.32 does."""

    def __init__(self, directory: Path, context: int = 200, kind: Any = AutoModelForCausalLM) -> None:
        self.model: Any = kind.from_pretrained(directory)
        self.context = context
        self.requests: list[tuple[str, Any]] = []
        self.failures: list[Any] = []  # exceptions or responses for the next requests but those to /health
        self.alive = True
        self._read: dict[tuple[int, ...], torch.Tensor] = {}
        self.transport = httpx2.MockTransport(self.handle)

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for where, body in self.requests if where == path]

    async def handle(self, request: httpx2.Request) -> httpx2.Response:
        path, body = request.url.path, json.loads(request.content) if request.content else None
        if not self.alive:
            raise httpx2.ConnectError("refused", request=request)
        if path == "/health":
            return httpx2.Response(200)
        self.requests.append((path, body))
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, httpx2.Response):
                return failure
            if callable(failure):
                return await failure(self, body)
            raise failure
        if path == "/v1/models":
            return httpx2.Response(200, json={"data": [{"id": NAME, "max_model_len": self.context}]})
        if path == "/v1/completions":
            return httpx2.Response(200, json=self.complete(body))
        if path == "/pooling":
            return httpx2.Response(200, json=self.pool(body))
        return httpx2.Response(404, json={"error": {"message": "no such path"}})

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["temperature"] > 2 or (body["temperature"] == 0 and body["n"] > 1):
            raise ValueError("vLLM refuses this")
        choices = []
        for index in range(body["n"]):  # copy i has the seed seed + i, as in vllm/v1/engine/parallel_sampling.py
            generator = torch.Generator().manual_seed(body["seed"] + index) if "seed" in body else None
            ids, log_probs = self.draw(body, generator)
            choices.append({"index": index, "token_ids": ids, "logprobs": {"token_logprobs": log_probs}, "text": ""})
        return {"choices": choices[::-1]}  # an answer names the index of each: their order is nobody's business

    @torch.inference_mode()
    def draw(self, body: dict[str, Any], generator: Any) -> tuple[list[int], list[float]]:
        ids, log_probs, prompt = [], [], list(body["prompt"])
        assert len(prompt) + body["max_tokens"] <= self.context
        for _ in range(body["max_tokens"]):
            logits = self.model.lm_head(self.hidden(prompt + ids)).double()
            raw = torch.log_softmax(logits, -1)
            for token, bias in body.get("logit_bias", {}).items():
                logits[int(token)] += min(100.0, max(-100.0, bias))
            if "allowed_token_ids" in body:
                banned = torch.ones(len(logits), dtype=torch.bool)
                banned[body["allowed_token_ids"]] = False
                logits[banned] = -torch.inf
            token = int(self.choose(logits, body, generator))
            ids.append(token)
            log_probs.append(float(raw[token]))
            if token in body.get("stop_token_ids", ()) or token == self.model.config.eos_token_id:
                break
        return ids, log_probs

    def hidden(self, ids: list[int]) -> torch.Tensor:
        """Of the last token, [H]. Each text is read once: the tests ask for the same ones again and again."""
        if tuple(ids) not in self._read:
            self._read[tuple(ids)] = self.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        return self._read[tuple(ids)]

    def choose(self, logits: torch.Tensor, body: dict[str, Any], generator: Any) -> torch.Tensor:
        if body["temperature"] == 0:
            return logits.argmax()
        logits = logits / body["temperature"]
        if body["top_k"]:
            logits = logits.masked_fill(logits < logits.topk(body["top_k"]).values[-1], -torch.inf)
        if body["top_p"] < 1:
            ranked, order = logits.softmax(-1).sort(descending=True)
            logits[order[(ranked.cumsum(-1) - ranked) >= body["top_p"]]] = -torch.inf
        noise = torch.empty_like(logits).exponential_(generator=generator)
        return (logits.softmax(-1) / noise).argmax()

    @torch.inference_mode()
    def pool(self, body: dict[str, Any]) -> dict[str, Any]:
        data = []
        for index, ids in enumerate(body["input"]):
            hidden = self.hidden(ids).float()
            if hasattr(self.model, "score"):  # a classifier
                assert body["use_activation"] is False
                hidden = self.model.score(hidden)
            data.append({"index": index, "data": base64.b64encode(hidden.numpy().astype("<f4").tobytes()).decode()})
        return {"data": data}
