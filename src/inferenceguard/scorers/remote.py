"""A sequence classifier that a vLLM server runs: the text is made here, the logits come from there."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx2
import torch
from torch import Tensor
from transformers import AutoConfig

from inferenceguard.checkpoints import Tokenizer, checkpoint_directory, first_line, load_tokenizer
from inferenceguard.contracts import Conversation, text_fingerprint
from inferenceguard.engines.remote import Remote
from inferenceguard.errors import CheckpointError, InvalidArgument, UnknownName
from inferenceguard.scorers.classifier import Encoding, SequenceClassifier, logit_reader
from inferenceguard.scorers.common import Row, check_pairs, longest_input


class VLLMClassifier(SequenceClassifier):
    """`SequenceClassifier` behind `vllm serve --runner pooling --convert classify` (deploy/vllm.sh score).

    The same text, the same map from logits to a score, the same limits; scores differ as far as vLLM's arithmetic does.
    A server that fails is a scorer that fails: the guard counts it as overspent.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Tokenizer,
        url: str,
        *,
        name: str = "classifier",
        served: str | None = None,
        labels: Mapping[str, float] | None = None,
        unsafe_label: str | Sequence[str] | None = None,
        encoding: Encoding | None = None,
        max_length: int | None = None,
        seconds: float = 30.0,
        retries: int = 1,
        connections: int = 64,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """`config` and `tokenizer` of the served model; `url` and what follows `encoding` as in `VLLMEngine`.

        Raises UnknownName for `served`, `encoding` or a label, InvalidArgument for a tokenizer with token types (vLLM
        is sent token ids only), EngineFault where the server does not answer.
        """
        if encoding not in (None, "pair", "chat"):
            raise UnknownName("encoding", str(encoding), ["pair", "chat"])
        self.name = name
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "left"
        self.encoding = encoding or ("chat" if getattr(tokenizer, "chat_template", None) else "pair")
        if self.encoding == "pair" and "token_type_ids" in self.tokenizer(["a"], ["b"]):
            raise InvalidArgument("encoding", "chat, for a model with token types cannot be asked by token ids", "pair")
        self._read = logit_reader(config, labels, unsafe_label)
        self._width = len(config.id2label)
        self._server = Remote(url, seconds=seconds, retries=retries, connections=connections, transport=transport)
        try:
            self._model, room = self._server.model(served)
        except BaseException:
            self._server.close()
            raise
        self.max_length = min(longest_input(config, tokenizer, max_length), room)
        rules = (sorted(labels.items()) if labels else labels, unsafe_label, self.encoding, self.max_length)
        self.fingerprint = text_fingerprint("vllm", self._model, config.to_json_string(), *map(str, rules))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_directory: str | Path, *, url: str, served: str | None = None,
        labels: Mapping[str, float] | None = None, unsafe_label: str | Sequence[str] | None = None,
        encoding: Encoding | None = None, max_length: int | None = None, seconds: float = 30.0, retries: int = 1,
        connections: int = 64, transport: httpx2.AsyncBaseTransport | None = None,
    ) -> Self:  # fmt: skip
        """The directory that the server serves: config.json and tokenizer are read here, no weights."""
        directory = checkpoint_directory(name_or_directory)
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # transformers raises anything from OSError to AttributeError here
            raise CheckpointError(f"{directory} has no config.json that can be read: {first_line(error)}") from error
        return cls(
            config, load_tokenizer(directory), url, name=Path(name_or_directory).name, served=served, labels=labels,
            unsafe_label=unsafe_label, encoding=encoding, max_length=max_length, seconds=seconds, retries=retries,
            connections=connections, transport=transport,
        )  # fmt: skip

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        """[B] float64: NaN where a response does not fit the model. Raises EngineFault."""
        check_pairs(prompts, responses)
        encode = self._encode_chat if self.encoding == "chat" else self._encode_pair
        rows = [encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        asked = [row for row in dict.fromkeys(rows) if row is not None]
        scores: dict[Row, float] = {}
        if asked:
            logits = self._server.pool(self._model, [row.ids for row in asked], self._width, use_activation=False)
            scores = dict(zip(asked, self._read(logits.double()).tolist(), strict=True))
        values = [torch.nan if row is None else scores[row] for row in rows]
        return torch.tensor(values, dtype=torch.float64)

    def close(self) -> None:
        """Lets go of the connections."""
        self._server.close()
