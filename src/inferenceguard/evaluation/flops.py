"""Forward FLOPs by one formula for every method, counted where the models are called.

    FLOPs = sum over all models and tokens read:   2 P  +  4 L A c        (a multiplication and an addition are two)

P: weights of the matrix products that the token passes (embedding tables are looked up, not multiplied); L: layers;
A: width of the attention (heads x head width); c: tokens that the token attends to. What counts as a token:

    LLM        the prompt once, and every token that is drawn or appended; its head once per token that is chosen
    scorers    every token of every text they read (padding left out; equal texts of one call are read once)
    critic     one row per prediction, and per bound
    RE-Control 2 P forward and 2 P back to the hidden state per row and gradient step of the value model

Counting changes nothing of what the models compute. Models without weights count 0; an engine whose weights cannot be
seen (one that runs elsewhere) makes the total unknown.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inferenceguard.beams import Beams
from inferenceguard.contracts import BoundsRows, Conversation, Critic, Engine, Scorer, ValueModel
from inferenceguard.product import FusedPass

PACKAGE = "inferenceguard."
T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """What the formula needs of a transformer."""

    body: int  # P without the head
    head: int  # P of the language model's head; 0 without one
    attention: int  # L A
    causal: bool = True

    def flops(self, tokens: float, context: float, chosen: float = 0) -> float:
        """`tokens` read, which attended to `context` tokens in total, and `chosen` tokens from the head."""
        return 2.0 * self.body * tokens + 4.0 * self.attention * context + 2.0 * self.head * chosen


def transformer_size(model: PreTrainedModel) -> Size:
    """P, L and A of a transformers model."""
    config: Any = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    output = cast(Any, model).get_output_embeddings()
    head = 0 if output is None else int(output.weight.numel())
    causal = any(bool(getattr(module, "is_causal", False)) for module in model.modules())
    return Size(weights(model) - head, head, int(config.num_hidden_layers) * width, causal)


def weights(module: nn.Module) -> int:
    """How many weights of matrix products a module holds: all but embedding tables, norms and biases."""
    return sum(
        int(parameter.numel())
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
        if parameter.dim() > 1
    )


@dataclass
class Count:
    """FLOPs of one batch of prompts."""

    conversations: Sequence[Conversation]
    known: bool
    flops: list[float] = field(default_factory=list)  # per prompt
    drawn: list[float] = field(default_factory=list)  # tokens of the LLM per prompt
    shared: float = 0.0  # of rows whose prompt is not told
    prompt_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flops, self.drawn = [0.0] * len(self.conversations), [0.0] * len(self.conversations)
        self.places: dict[Conversation, list[int]] = {}
        for index, messages in enumerate(self.conversations):
            self.places.setdefault(messages, []).append(index)

    def of(self, index: int) -> float | None:
        """FLOPs of one prompt; what rows of untold prompts took is shared by tokens drawn."""
        if not self.known:
            return None
        total = sum(self.drawn)
        share = self.drawn[index] / total if total else 1 / len(self.conversations)
        return float(round(self.flops[index] + self.shared * share))

    def add_rows(self, rows: Sequence[int], flops: Sequence[float], drawn: Sequence[float] = ()) -> None:
        """FLOPs of rows whose prompts are `rows`."""
        for at, index in enumerate(rows):
            self.flops[index] += flops[at]
            self.drawn[index] += drawn[at] if drawn else 0

    def add_texts(self, prompts: Sequence[Conversation], responses: Sequence[str], flops: float) -> None:
        """FLOPs of one call of a scorer, shared by the lengths of the texts."""
        lengths = [sum(len(turn.content) for turn in p) + len(r) + 1 for p, r in zip(prompts, responses, strict=True)]
        total = sum(lengths)
        for messages, length in zip(prompts, lengths, strict=True):
            places = self.places.get(tuple(messages), ())
            for index in places:
                self.flops[index] += flops * length / total / len(places)
            self.shared += 0.0 if places else flops * length / total


class Meter:
    """Copies of the models that count what they compute, while a batch is counted."""

    def __init__(self) -> None:
        self._count: Count | None = None
        self._known = True

    @contextlib.contextmanager
    def batch(self, conversations: Sequence[Conversation]) -> Iterator[Count]:
        """Counts until it is left."""
        self._count = count = Count(conversations, self._known)
        try:
            yield count
        finally:
            self._count = None

    def engine(self, engine: Engine) -> Engine:
        """The same engine; its prompts, drawn and appended tokens are counted."""
        model = getattr(engine, "model", None)
        self._known = self._known and isinstance(model, PreTrainedModel)
        size = transformer_size(model) if isinstance(model, PreTrainedModel) else Size(0, 0, 0)
        watched = {"extend": True, "append": False}  # whether the head is used too
        wrapped: dict[str, Callable[..., Any]] = {"begin": self._begin(engine.begin, size)}
        wrapped |= {
            name: self._drawing(getattr(engine, name), size, head)
            for name, head in watched.items() if hasattr(engine, name)
        }  # fmt: skip
        wrapped |= {
            name: self._heading(getattr(engine, name), size) for name in ("rank", "logits") if hasattr(engine, name)
        }
        return _with(engine, wrapped)

    def scorer(self, scorer: Scorer) -> Scorer:
        """The same scorer; the tokens that its transformers read are counted."""
        wrapped: dict[str, Callable[..., Any]] = {"score": self._texts(scorer, scorer.score)}
        for name in ("score_partial", "start", "advance"):
            if hasattr(scorer, name):
                method = getattr(scorer, name)
                wrapped[name] = self._texts(scorer, method) if name == "score_partial" else self._states(scorer, method)
        return _with(scorer, wrapped)

    def critic(self, critic: Critic) -> Critic:
        """The same critic; its rows are counted."""
        flops = 2.0 * sum(weights(module) for module in _modules(critic))
        methods = {"predict": self._predictions(critic.predict, flops)}
        if isinstance(critic, BoundsRows):
            methods["at_most"] = self._predictions(critic.at_most, flops)
        return _with(critic, methods)

    def value(self, value: ValueModel) -> ValueModel:
        """The same value model; its rows are counted, and twice where a gradient is taken."""
        flops = 2.0 * sum(weights(module) for module in _modules(value))
        return _with(value, {"outcomes": self._predictions(value.outcomes, flops)})

    def _begin(self, method: Callable[..., Beams], size: Size) -> Callable[..., Beams]:
        def begin(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Beams:
            beams = method(prompts, seeds)
            if self._count is not None:
                self._count.prompt_tokens = lengths = [len(tokens) for tokens in prompts]
                self._count.add_rows(range(len(lengths)), [size.flops(n, n * (n + 1) / 2) for n in lengths])
            return beams

        return begin

    def _drawing(self, method: Callable[..., Beams], size: Size, head: bool) -> Callable[..., Beams]:
        def draw(beams: Beams, *arguments: Any, **options: Any) -> Beams:
            after = method(beams, *arguments, **options)
            count = self._count
            if count is not None:
                rows, flops, drawn = beams.prompt_index.tolist(), [], []
                for prompt, old, new in zip(rows, beams.token_ids, after.token_ids, strict=True):
                    tokens, before = len(new) - len(old), count.prompt_tokens[prompt] + len(old)
                    context = tokens * before + tokens * (tokens + 1) / 2
                    flops.append(size.flops(tokens, context, tokens if head else 0))
                    drawn.append(tokens)
                count.add_rows(rows, flops, drawn)
            return after

        return draw

    def _heading(self, method: Callable[..., Any], size: Size) -> Callable[..., Any]:
        """`rank(beams, ...)` and `logits(latent)`: the head alone."""

        def apply(rows: Beams | Tensor, *arguments: Any, **options: Any) -> Any:
            if self._count is not None and isinstance(rows, Beams):
                self._count.add_rows(rows.prompt_index.tolist(), [size.flops(0, 0, 1)] * len(rows))
            elif self._count is not None:
                self._count.shared += size.flops(0, 0, len(rows))
            return method(rows, *arguments, **options)

        return apply

    def _texts(self, scorer: Scorer, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def score(prompts: Sequence[Conversation], responses: Sequence[str], *others: Any) -> Tensor:
            with _reading(scorer) as flops:
                values = method(prompts, responses, *others)
            if self._count is not None:
                self._count.add_texts(prompts, responses, sum(flops))
            return values

        return score

    def _states(self, scorer: Scorer, method: Callable[..., Any]) -> Callable[..., Any]:
        """`start` and `advance` of a scorer that reads incrementally."""

        def run(*arguments: Any) -> Any:
            with _reading(scorer) as flops:
                result = method(*arguments)
            if self._count is not None:
                self._count.shared += sum(flops)
            return result

        return run

    def _predictions(self, method: Callable[..., Any], flops: float) -> Callable[..., Any]:
        def predict(latent: Tensor, *others: Any) -> Any:
            if self._count is not None:
                back = 2 if latent.requires_grad else 1
                self._count.shared += flops * back * len(latent)
            return method(latent, *others)

        return predict


@contextlib.contextmanager
def _reading(scorer: object) -> Iterator[list[float]]:
    """The FLOPs of each forward pass of the scorer's transformers."""
    flops: list[float] = []
    with contextlib.ExitStack() as stack:
        for model in _transformers(scorer):
            size = transformer_size(model)

            def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], size: Size = size) -> None:
                flops.append(_pass(size, given, named))

            stack.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
        for fused in _held(scorer, FusedPass):
            size = transformer_size(fused.body)

            def watch(inputs: dict[str, Any], size: Size = size) -> None:
                flops.append(_pass(size, (), inputs))

            fused.watchers.append(watch)
            stack.callback(fused.watchers.remove, watch)
        yield flops


def _pass(size: Size, given: tuple[Any, ...], named: Mapping[str, Any]) -> float:
    ids = named.get("input_ids", given[0] if given else None)
    if not isinstance(ids, Tensor):
        return 0.0
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        lengths = mask.sum(1).double()
    elif isinstance(positions, Tensor) and size.causal:  # a cached read: a token attends to all before it
        return size.flops(ids.numel(), float((positions.double() + 1).expand(ids.shape).sum()), ids.shape[0])
    else:
        lengths = torch.full((ids.shape[0],), float(ids.shape[1]), dtype=torch.float64)
    context = (lengths * (lengths + 1) / 2 if size.causal else lengths**2).sum()
    return size.flops(float(lengths.sum()), float(context), len(lengths))


def _transformers(owner: object) -> list[PreTrainedModel]:
    """The transformers that an object holds, outermost ones, each once."""
    found: dict[int, PreTrainedModel] = {}
    for module in _modules(owner):
        inner = [module] if isinstance(module, PreTrainedModel) else _outermost(module)
        found |= {id(model): model for model in inner}
    return list(found.values())


def _outermost(module: nn.Module) -> list[PreTrainedModel]:
    found = []
    for child in module.children():
        found += [child] if isinstance(child, PreTrainedModel) else _outermost(child)
    return found


def _modules(owner: object) -> list[nn.Module]:
    return _held(owner, nn.Module)


def _held(owner: object, kind: type[T], depth: int = 3) -> list[T]:
    """What of this kind is among an object's attributes and those of its parts (a sum's scorers, a cache's model)."""
    found: list[T] = []
    for value in vars(owner).values() if hasattr(owner, "__dict__") else ():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, kind):
                found.append(part)
            elif isinstance(part, nn.Module):
                continue
            elif depth and (type(part).__module__.startswith(PACKAGE) or hasattr(part, "score")):
                found += _held(part, kind, depth - 1)
    return found


def _with(model: T, methods: Mapping[str, Callable[..., Any]]) -> T:
    """A shallow copy whose methods are these: what it is (its Protocols, its fields) stays as it was."""
    twin = copy.copy(model)
    for name, method in methods.items():
        object.__setattr__(twin, name, method)  # frozen dataclasses too
    return twin
