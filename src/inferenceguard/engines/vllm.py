"""A running vLLM server as an engine: proposals over its HTTP interface, token ids in and out, no state but the tokens.

What the server is made of (one GPU, tensor-parallel, many nodes behind one address) is vLLM's business. The hidden
states that a critic reads come from a second server of the same model (docs/deploy.md).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import httpx2
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from inferenceguard.beams import Beams, empty_beams
from inferenceguard.chat import encode_chat
from inferenceguard.checkpoints import checkpoint_directory, first_line, load_model, load_tokenizer
from inferenceguard.contracts import Conversation, Sampling
from inferenceguard.engines.remote import Call, Remote
from inferenceguard.engines.transformers import fingerprint
from inferenceguard.errors import CheckpointError, EngineFault, InvalidArgument, UnsupportedModel
from inferenceguard.sampling import is_finite_or_banned

STATE = "engine"  # the owner's name of the prompts in Beams.states
COOLEST, HOTTEST = 0.01, 2.0  # temperatures that vLLM samples at; it rounds lower ones up
LARGEST_BIAS = 100.0  # vLLM cuts larger ones down
LATENTS_HINT = (
    "Start a second server of the same model with `--runner pooling --convert embed` and give its address as "
    "latents_url (docs/deploy.md), or search without the critic (--no-critic)."
)


class VLLMEngine:
    """Implements `Engine` and `MixesDraws` over a vLLM server, and `ReadsLatents` where there is a second for latents.

    Row j of a prompt in draw k is sampled with a seed of its own, a function of (the prompt's seed, k, j). The same
    seeds give the same random numbers, and the same tokens as far as the server's logits are the same: vLLM computes
    them in batches whose make-up changes their last bits, which may decide between two tokens that are about equally
    likely. That is rare in float32 and usual in bfloat16, where two runs soon part. `log_prob` is the model's own,
    as the server's default `--logprobs-mode raw_logprobs` gives it.
    """

    mixes_draws = True
    latents_hint = LATENTS_HINT

    def __init__(
        self,
        directory: str | Path,
        url: str,
        *,
        latents_url: str | None = None,
        served: str | None = None,
        seconds: float = 120.0,
        retries: int = 3,
        connections: int = 256,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """`directory`: config.json and tokenizer of the served model; with its weights too, the fingerprint is that of
        `TransformersEngine`, so that its critics fit. `served` is the model's name at the server where it has several.
        `seconds`, `retries`, `connections`: of one block's requests (`Remote`).

        Raises CheckpointError for the directory, EngineFault where a server does not answer, UnknownName for `served`.
        """
        place = checkpoint_directory(directory)
        self.tokenizer = load_tokenizer(place)
        config = read_text_config(place)
        self.vocabulary = int(config.vocab_size)
        self.end_tokens = _end_tokens(place, self.tokenizer)
        settings: Any = {"seconds": seconds, "retries": retries, "connections": connections, "transport": transport}
        self._server = Remote(url, **settings)
        self._latents = None if latents_url is None else Remote(latents_url, **settings)
        try:
            self.name, room = self._server.model(served)
            self._probe()
            if self._latents is not None:
                self._latents_name, latents_room = self._latents.model(served)
                room = min(room, latents_room)
                self.latent_width = int(config.hidden_size)
                self._hidden([(self.end_tokens[0],)])
        except BaseException:
            self.close()
            raise
        self.context = min(room, int(getattr(config, "max_position_embeddings", 0) or room))
        self.fingerprint = directory_fingerprint(place, self.name)

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu", url: str,
        latents_url: str | None = None, served: str | None = None, seconds: float = 120.0, retries: int = 3,
        connections: int = 256,
    ) -> VLLMEngine:  # fmt: skip
        """As the constructor. `dtype` and `device` are the server's affair and must be left out."""
        for name, given, default in (("dtype", dtype, "auto"), ("device", device, "cpu")):
            if given != default:
                raise InvalidArgument(name, "left out with the engine vllm: the server decides", given)
        return cls(
            model, url, latents_url=latents_url, served=served, seconds=seconds, retries=retries,
            connections=connections,
        )  # fmt: skip

    def encode(self, messages: Conversation) -> list[int]:
        """The prompt's token ids in the checkpoint's chat template; contents cannot open a turn."""
        return encode_chat(self.tokenizer, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The response's text, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def begin(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Beams:
        """One empty row per prompt. Nothing is sent but for latents: the server's prefix cache reads a prompt once."""
        own = tuple(tuple(prompt) for prompt in prompts)
        latent = torch.zeros(len(own), 0) if self._latents is None else self._hidden(own)
        return empty_beams(len(own), seeds, latent, {STATE: Prompts(own)})

    def extend(
        self, beams: Beams, tokens: int, sampling: Sampling, draw: int | Tensor, logit_bias: Tensor | None
    ) -> Beams:
        """Draws up to `tokens` tokens for every row: one request for neighbours that continue the same tokens.

        Raises EngineFault where a server fails or answers nonsense, InvalidArgument for a temperature or a bias that
        vLLM cannot take.
        """
        if bool(beams.finished.any()):
            raise InvalidArgument("beams", "unfinished rows only", beams.finished.tolist())
        _check_sampling(sampling)
        prompts = _prompts(beams)
        common = {
            "model": self.name,
            "max_tokens": tokens,
            "stop_token_ids": list(self.end_tokens),
            "return_token_ids": True,
            "logprobs": 0,  # of the drawn token alone
            "skip_special_tokens": False,
            # What the server's generation_config.json may say otherwise:
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        calls, runs = [], list(_runs(beams, draw, logit_bias, alone=sampling.temperature == 0))
        for run in runs:
            ids = [*prompts[run.first], *beams.token_ids[run.first]]
            bias = {} if logit_bias is None else _bias(logit_bias[run.first])
            body = {**common, "prompt": ids, "n": run.rows, "seed": run.seed, **bias}
            calls.append(Call("/v1/completions", body))
        drawn: list[_Drawn] = []
        for run, answer in zip(runs, self._server.all(calls), strict=True):
            drawn += self._read(answer, run.rows, tokens)
        after = replace(
            beams,
            token_ids=tuple(old + new.token_ids for old, new in zip(beams.token_ids, drawn, strict=True)),
            log_prob=beams.log_prob + torch.tensor([new.log_prob for new in drawn], dtype=torch.float64),
            finished=torch.tensor([new.token_ids[-1] in self.end_tokens for new in drawn], dtype=torch.bool),
            parent=torch.arange(len(beams)),
        )
        if self._latents is None:
            return after
        # As in every engine, an end token is not read: the latent stays that of the token before it.
        ends = after.finished.tolist()
        read = [new[:-1] if end else new for new, end in zip(after.token_ids, ends, strict=True)]
        return replace(after, latent=self._hidden([(*own, *new) for own, new in zip(prompts, read, strict=True)]))

    def healthy(self) -> bool:
        """Whether the servers answer now."""
        return self._server.healthy() and (self._latents is None or self._latents.healthy())

    def close(self) -> None:
        """Lets go of the connections."""
        self._server.close()
        if self._latents is not None:
            self._latents.close()

    def _read(self, answer: Any, rows: int, tokens: int) -> list[_Drawn]:
        """The rows of one answer, checked: nothing that is not a continuation gets into the search."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            found = [_Drawn(tuple(choice["token_ids"]), math.fsum(choice["logprobs"]["token_logprobs"]))
                     for choice in choices]  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise EngineFault(
                f"{self._server.url} did not answer as vLLM does ({type(error).__name__} {error}): choices with "
                "token_ids and logprobs are needed."
            ) from None
        if len(found) != rows:
            raise EngineFault(f"{self._server.url} drew {len(found)} rows instead of {rows}.")
        for new in found:
            ends = [token in self.end_tokens for token in new.token_ids]
            inside = all(isinstance(token, int) and 0 <= token < self.vocabulary for token in new.token_ids)
            whole = len(ends) == tokens or (bool(ends) and ends[-1])
            if not inside or not whole or len(ends) > tokens or any(ends[:-1]) or not math.isfinite(new.log_prob):
                raise EngineFault(
                    f"{self._server.url} drew tokens that are no continuation of at most {tokens}: {new.token_ids}, "
                    f"log-probability {new.log_prob}."
                )
        return found

    def _hidden(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """The hidden state of each row's last token [B, H] float32, from the second server."""
        assert self._latents is not None
        return self._latents.pool(self._latents_name, rows, self.latent_width)

    def _probe(self) -> None:
        """One token, so that a server which does not tell token ids is refused here and not in the first answer."""
        body = {"model": self.name, "prompt": [self.end_tokens[0]], "max_tokens": 1, "temperature": 0, "n": 1,
                "logprobs": 0, "return_token_ids": True}  # fmt: skip
        answer = self._server.one(Call("/v1/completions", body))
        try:
            self._read(answer, 1, 1)
        except EngineFault as fault:
            raise UnsupportedModel(
                f"the server cannot propose tokens: {fault}", hint="vLLM 0.32 is known to work."
            ) from fault


@dataclass(frozen=True)
class Prompts:
    """The prompt of each row: all that this engine keeps."""

    ids: tuple[tuple[int, ...], ...]

    def take(self, rows: Tensor) -> Prompts:
        """The prompts of `rows`."""
        return Prompts(tuple(self.ids[row] for row in rows.tolist()))

    def join(self, other: Prompts) -> Prompts:
        """The rows of both."""
        return Prompts(self.ids + other.ids)


@dataclass(frozen=True)
class _Drawn:
    token_ids: tuple[int, ...]
    log_prob: float


@dataclass(frozen=True)
class _Run:
    """Rows first .. first + rows - 1 in one request: the same prompt and tokens, seeds that follow on one another."""

    first: int
    rows: int
    seed: int


def _runs(beams: Beams, draw: int | Tensor, logit_bias: Tensor | None, *, alone: bool) -> Iterator[_Run]:
    """Neighbours with equal tokens (and bias) together. vLLM gives copy i of a request the seed `seed + i`.

    `alone`: a request each; of greedy draws vLLM takes no more.
    """
    draws = [draw] * len(beams) if isinstance(draw, int) else draw.tolist()
    owners, counts = beams.prompt_index.tolist(), dict[int, int]()
    run: _Run | None = None
    for row, (owner, number) in enumerate(zip(owners, draws, strict=True)):
        place = counts.get(owner, 0)  # j
        counts[owner] = place + 1
        if run is not None and not alone and owner == owners[run.first] and _alike(beams, run.first, row, logit_bias):
            run = replace(run, rows=run.rows + 1)
            continue
        if run is not None:
            yield run
        run = _Run(row, 1, row_seed(int(beams.seed[row]), number, place))
    if run is not None:
        yield run


def _alike(beams: Beams, first: int, row: int, logit_bias: Tensor | None) -> bool:
    same = beams.token_ids[first] == beams.token_ids[row]
    return same and (logit_bias is None or torch.equal(logit_bias[first], logit_bias[row]))


def row_seed(seed: int, draw: int, place: int) -> int:
    """What vLLM seeds row `place` of a prompt's draw with: a hash of (seed, draw) in [0, 2^62), plus the place."""
    digest = hashlib.sha256(f"{seed},{draw}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 2) + place


def _bias(bias: Tensor) -> dict[str, Any]:
    """A row's bias [V] as fields of a request. Numbers are added to the logits; -inf leaves the token out."""
    if not is_finite_or_banned(bias):
        raise InvalidArgument("logit_bias", "numbers or -inf", "NaN or +inf")
    banned = torch.isneginf(bias)
    moved = torch.nonzero((bias != 0) & ~banned)[:, 0].tolist()
    if any(abs(float(bias[token])) > LARGEST_BIAS for token in moved):
        largest = float(bias[moved].abs().max())
        raise InvalidArgument("logit_bias with the engine vllm", f"at most {LARGEST_BIAS:g} nats or -inf", largest)
    fields: dict[str, Any] = {}
    if moved:
        fields["logit_bias"] = {str(token): float(bias[token]) for token in moved}
    if bool(banned.any()):
        allowed = torch.nonzero(~banned)[:, 0].tolist()
        if not allowed:
            raise InvalidArgument("logit_bias", "one that leaves a token", "-inf for all")
        fields["allowed_token_ids"] = allowed
    return fields


def _check_sampling(sampling: Sampling) -> None:
    if sampling.temperature and not COOLEST <= sampling.temperature <= HOTTEST:
        bound = f"0 or in [{COOLEST:g}, {HOTTEST:g}]"
        raise InvalidArgument("temperature with the engine vllm", bound, sampling.temperature)


def _prompts(beams: Beams) -> tuple[tuple[int, ...], ...]:
    state: Any = beams.states.get(STATE)
    if not isinstance(state, Prompts):
        raise InvalidArgument("beams", "rows that this engine began, with their prompts", sorted(beams.states))
    return state.ids


# --- the directory ---------------------------------------------------------------------------------------------------


def read_text_config(directory: Path) -> Any:
    """transformers' configuration of the language model. Raises CheckpointError."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()
    except Exception as error:  # transformers raises anything from OSError to AttributeError here
        raise CheckpointError(f"{directory} has no config.json that can be read: {first_line(error)}") from error


def directory_fingerprint(directory: Path, served: str) -> str:
    """`TransformersEngine`'s fingerprint where the directory has the weights (read in part, never loaded whole where
    the names allow it), else a hash of config.json, the tokenizer and the model's name at the server.
    """
    if list(directory.glob("*.safetensors")):
        return _sampled_fingerprint(directory)
    digest = hashlib.sha256(f"served without weights: {served}".encode())
    for file in sorted(directory.glob("*.json")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _sampled_fingerprint(directory: Path) -> str:
    """The same as `fingerprint` of the loaded model: a model without storage tells names, shapes and ties."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        shell = cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=False)
    tensors = shell.state_dict(keep_vars=True)
    files = {name: file for file in sorted(directory.glob("*.safetensors")) for name in _names(file)}
    shared: dict[int, str] = {}  # a tied weight stands in the files under one of its names
    for name, tensor in tensors.items():
        if name in files:
            shared.setdefault(id(tensor), name)
    if any(name not in files and id(tensor) not in shared for name, tensor in tensors.items()):
        return fingerprint(load_model(AutoModelForCausalLM, directory, dtype="auto"))  # stored under other names
    for name, tensor in tensors.items():
        stored = name if name in files else shared[id(tensor)]
        with safe_open(files[stored], framework="pt") as file:
            weight = file.get_tensor(stored)
        if weight.shape != tensor.shape:
            raise CheckpointError(f"{name} in {directory} is {list(weight.shape)}, not {list(tensor.shape)}.")
        tensors[name] = weight
    return fingerprint(_Weights(config, tensors))  # type: ignore[arg-type]


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


@dataclass(frozen=True)
class _Weights:
    """What `fingerprint` reads of a model."""

    config: Any
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


def _end_tokens(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """As `TransformersEngine` has them: of generation_config.json (else config.json) and of the tokenizer."""
    if (directory / "generation_config.json").is_file():
        settings = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        configured: Any = GenerationConfig.from_dict(settings).eos_token_id
    else:
        configured = getattr(read_text_config(directory), "eos_token_id", None)
    tokens = set(configured if isinstance(configured, (list, tuple)) else [configured]) | {tokenizer.eos_token_id}
    tokens.discard(None)
    if not tokens:
        raise UnsupportedModel("the model has no end token.", hint="Set eos_token_id in its generation_config.json.")
    return tuple(sorted(int(token) for token in tokens))
