"""A transformer that reads rows of many prompts together, with every prompt's keys and values held once.

The cache of a row is its prompt's (shared by all rows of the prompt) and its own suffix. Rows that have read equally
many tokens lie in one slab: their suffixes are attended to in one batched product, each prompt's keys in one product
for all rows of that prompt, and the two parts are merged by log-sum-exp. There is no padding and no mask, so a row's
numbers depend on the rows of its own prompt and on nothing else in the batch; reordering rows moves suffixes only.

Llama-like models are read by `llama.py`, which fuses projections; every other architecture that passes keyword
arguments to its attention (Gemma 3, GPT-2, ...) through transformers' attention interface. `CachedTransformer` compares
itself with the model's plain forward pass when it is built, and refuses a model on which the two disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from inferenceguard.errors import UnsupportedModel
from inferenceguard.llama import AttentionOptions, FusedLlama

ATTENTION = "inferenceguard"
STACKED = 512  # tokens of a prompt whose keys may be copied to lie beside other prompts'
_ALIKE = 32  # tokens by which the lengths of prompts in one stack may differ
# In float32 on CPU, MKL multiplies a row differently in very small batches; in multiples of 4 rows, a row's result was
# the same bit pattern in every batch (docs/log.md). So float32 batches are padded to multiples of this.
ROW_MULTIPLE = 4


@dataclass(frozen=True)
class Prefix:
    """A prompt's keys and values, per layer: [kv heads, prompt tokens, head width]. Never moved, never copied."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Prompt tokens."""
        return int(self.keys[0].shape[1])


@dataclass(frozen=True)
class Stack:
    """Prompts of about equal lengths and numbers of rows, read in one product: a product each is mostly overhead.

    Not in float32, where a row's bits must not depend on other prompts.
    """

    keys: tuple[Tensor, ...]  # per layer [P, kv heads, longest prompt's tokens, head width]
    values: tuple[Tensor, ...]
    unread: Tensor | None  # [P, 1, 1, tokens] bool: what only fills a shorter prompt up
    rows: Tensor  # [P * r] the slab's rows, prompt by prompt, the last repeated for a prompt with fewer

    @classmethod
    def of(cls, prefixes: Sequence[Prefix], rows: Sequence[range]) -> Stack:
        """Copies nothing for one prompt."""
        most = max(len(own) for own in rows)
        picked = torch.tensor([own[min(place, len(own) - 1)] for own in rows for place in range(most)])
        device = prefixes[0].keys[0].device
        if len(prefixes) == 1:
            keys, values = (tuple(part[None] for part in parts) for parts in (prefixes[0].keys, prefixes[0].values))
            return cls(keys, values, None, picked.to(device))
        lengths = torch.tensor([prefix.length for prefix in prefixes], device=device)
        longest = int(lengths.max())
        unread = None if bool((lengths == longest).all()) else torch.arange(longest, device=device) >= lengths[:, None]
        return cls(
            _side_by_side([prefix.keys for prefix in prefixes], longest),
            _side_by_side([prefix.values for prefix in prefixes], longest),
            None if unread is None else unread[:, None, None],
            picked.to(device),
        )


@dataclass(frozen=True)
class Whole:
    """All rows' keys and values, prompt and suffix together, so that attention is one call for all of them.

    Each row's last token lies in the same column, and a shorter row's first columns are unread. For few rows a prompt,
    each of which gets a copy of its keys. Not in float32, where a row's bits must not depend on other prompts.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]  # per layer keys and values, each [R, kv heads, columns, head width]
    filled: int  # columns read
    unread: Tensor | None  # [R, 1, 1, columns] in the model's precision: -inf before a row's first token

    @classmethod
    def of(cls, rows: Sequence[tuple[Prefix, int]], room: int) -> tuple[Whole, Tensor]:
        """Of the rows' prompts and lengths of suffixes, with `room` for more: (itself, its buffer [layers, 2, R, ...]).

        The suffixes are for the caller to fill in: they end at `filled`.
        """
        first = rows[0][0].keys[0]
        filled = max(prefix.length + suffix for prefix, suffix in rows)
        shape = (len(rows[0][0].keys), 2, len(rows), first.shape[0], filled + room, first.shape[2])
        held = first.new_zeros(shape)  # zeros, because unread room may be multiplied by weights of zero
        for row, (prefix, suffix) in enumerate(rows):
            start = filled - suffix - prefix.length
            for layer, parts in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                for kind, part in enumerate(parts):
                    held[layer, kind, row, :, start : start + prefix.length] = part
        starts = torch.tensor([filled - suffix - prefix.length for prefix, suffix in rows], device=first.device)
        unread = None
        if bool(starts.any()):
            before = torch.arange(filled + room, device=first.device) < starts[:, None]
            unread = first.new_zeros(before.shape).masked_fill_(before, -math.inf)[:, None, None]
        return cls(_by_layer(held), filled, unread), held

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """One token a row. query [R, heads, 1, D], key and value [R, kv heads, 1, D] -> [R, heads, 1, D]."""
        end = self.filled + 1
        keys, values = self.layers[layer]
        keys.narrow(2, self.filled, 1).copy_(key)
        values.narrow(2, self.filled, 1).copy_(value)
        # A kv head's queries as rows of one head: faster than the kernel's own grouping.
        grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        mask = None if self.unread is None else self.unread.narrow(3, 0, end)
        keys, values = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        seen = nn.functional.scaled_dot_product_attention(grouped, keys, values, mask, scale=options.scaling)
        return seen.view(query.shape)


@dataclass(frozen=True)
class Slab:
    """R rows that have read equally many tokens. Rows of one prompt stand together."""

    prefixes: tuple[Prefix, ...]
    counts: tuple[int, ...]  # how many rows each prefix has; their sum is R
    suffix: Tensor  # [layers, 2 (keys, values), stored rows, kv heads, capacity, head width]
    length: int  # suffix tokens read; capacity may be larger
    rows: Tensor | None = None  # [R] which stored row each row has; None: as stored. Copied when it is next read.
    views: tuple[tuple[Tensor, Tensor], ...] = ()  # per layer (keys, values) of `suffix`: made once, not in every step
    stacks: tuple[Stack, ...] = ()  # all prompts, where there are several; their rows one after the other are ...
    unstacked: Tensor | None = None  # [R] ... where each row is among them

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def capacity(self) -> int:
        return int(self.suffix.shape[4])

    def has_room(self, count: int) -> bool:
        """Whether `count` tokens can be read in place."""
        return self.rows is None and self.capacity - self.length >= count

    @property
    def owners(self) -> list[int]:
        """[R] which prefix each row has."""
        return [owner for owner, count in enumerate(self.counts) for _ in range(count)]

    def take(self, chosen: Sequence[int]) -> tuple[Slab, list[int]]:
        """(a slab of the rows `chosen`, sorted by prompt; where in it each of them is). Copies nothing yet."""
        owners = self.owners
        order = sorted(range(len(chosen)), key=lambda place: owners[chosen[place]])
        counts = [0] * len(self.prefixes)
        for row in chosen:
            counts[owners[row]] += 1
        kept = [owner for owner, count in enumerate(counts) if count]
        rows = torch.tensor([chosen[place] for place in order], device=self.suffix.device)
        stored = rows if self.rows is None else self.rows[rows]
        places = [0] * len(chosen)
        for new, place in enumerate(order):
            places[place] = new
        prefixes = tuple(self.prefixes[owner] for owner in kept)
        return Slab(prefixes, tuple(counts[owner] for owner in kept), self.suffix, self.length, stored), places

    def positions(self, count: int) -> Tensor:
        """[R, count] the positions of each row's next `count` tokens, prompt included."""
        first = torch.tensor([prefix.length for prefix in self.prefixes]).repeat_interleave(torch.tensor(self.counts))
        return first[:, None] + self.length + torch.arange(count)


@dataclass(frozen=True)
class KeyValues:
    """The caches of B rows. Immutable: reading returns new ones."""

    slabs: tuple[Slab, ...]
    where: tuple[tuple[int, int] | None, ...]  # B: (slab, row in it); None for a row that ended and needs no cache
    whole: Whole | None = None  # of all slabs' rows, in their order; the suffixes are views of it

    def __len__(self) -> int:
        return len(self.where)

    def take(self, rows: Tensor) -> KeyValues:
        """The caches of `rows` in that order; rows may repeat. Only suffixes are copied, when they are next read."""
        picked: dict[int, list[int]] = {}  # old slab -> its rows
        asked: list[tuple[int, int] | None] = []  # (old slab, place among its picked rows)
        for place in (self.where[row] for row in rows.tolist()):
            if place is None:
                asked.append(None)
                continue
            chosen = picked.setdefault(place[0], [])
            asked.append((place[0], len(chosen)))
            chosen.append(place[1])
        taken = {old: self.slabs[old].take(chosen) for old, chosen in picked.items()}
        numbers = {old: new for new, old in enumerate(taken)}
        where = [None if place is None else (numbers[place[0]], taken[place[0]][1][place[1]]) for place in asked]
        return KeyValues(tuple(slab for slab, _ in taken.values()), tuple(where))

    def join(self, other: KeyValues) -> KeyValues:
        """The rows of both, self's first."""
        shift = len(self.slabs)
        moved = tuple(None if place is None else (place[0] + shift, place[1]) for place in other.where)
        return KeyValues(self.slabs + other.slabs, self.where + moved)

    def spread(self, rows: Tensor, total: int) -> KeyValues:
        """`total` rows, of which rows[i] has the cache of row i here and all others have ended."""
        where: list[tuple[int, int] | None] = [None] * total
        for row, place in zip(rows.tolist(), self.where, strict=True):
            where[row] = place
        return KeyValues(self.slabs, tuple(where))

    def sealed(self) -> KeyValues:
        """The same caches without reserved room: the next read copies, so they can be read any number of times."""
        slabs = (Slab(s.prefixes, s.counts, s.suffix[:, :, :, :, : s.length], s.length, s.rows) for s in self.slabs)
        return KeyValues(tuple(slabs), self.where)

    def positions(self) -> list[int]:
        """[B] tokens that each row has read, prompt included; 0 for a row that has ended."""
        read = [slab.positions(1)[:, 0].tolist() for slab in self.slabs]
        return [0 if place is None else read[place[0]][place[1]] for place in self.where]

    def layout(self) -> Tensor:
        """[B] the rows in the order in which the slabs hold them. Raises ValueError if a row has ended."""
        starts = [0]
        for slab in self.slabs:
            starts.append(starts[-1] + len(slab))
        slots = [-1] * starts[-1]
        for row, place in enumerate(self.where):
            if place is None:
                raise ValueError(f"row {row} has ended and has no cache")
            slots[starts[place[0]] + place[1]] = row
        return torch.tensor(slots, dtype=torch.int64)

    def ready(self, count: int, capacity: int) -> KeyValues:
        """The same caches with room for `count` tokens now and `capacity` in all; slabs of equal length become one."""
        members: dict[int, list[int]] = {}  # length -> slabs
        for index, slab in enumerate(self.slabs):
            members.setdefault(slab.length, []).append(index)
        if len(members) == len(self.slabs) and all(slab.has_room(count) for slab in self.slabs):
            return self
        place_of: dict[int, tuple[int, int]] = {}  # old slab -> (new one, its first row there)
        for new, indices in enumerate(members.values()):
            start = 0
            for index in indices:
                place_of[index] = (new, start)
                start += len(self.slabs[index])
        where = tuple(None if at is None else (place_of[at[0]][0], place_of[at[0]][1] + at[1]) for at in self.where)
        slabs, whole = _with_room([[self.slabs[index] for index in part] for part in members.values()],
                                  max(count, capacity))  # fmt: skip
        return KeyValues(slabs, where, whole)


def _with_room(groups: Sequence[Sequence[Slab]], room: int) -> tuple[tuple[Slab, ...], Whole | None]:
    """A slab of each group of slabs of equal length, copied, with room for more tokens."""
    rows = [(prefix, slab.length) for group in groups for slab in group for prefix, n in zip(
        slab.prefixes, slab.counts, strict=True) for _ in range(n)]  # fmt: skip
    first = groups[0][0]
    whole, held = Whole.of(rows, room) if _go_together(rows) else (None, None)
    slabs, start = [], 0
    for group in groups:
        size, length = sum(len(slab) for slab in group), group[0].length
        if whole is None or held is None:
            layers, kinds, _, kv_heads, _, width = first.suffix.shape
            # zeros, because unread room is multiplied by weights of zero
            suffix = first.suffix.new_zeros(layers, kinds, size, kv_heads, length + room, width)
        else:
            suffix = held[:, :, start : start + size, :, whole.filled - length :]
        start += size
        slab = _copied(group, suffix)
        apart = whole is None and len(slab.prefixes) > 1 and suffix.dtype != torch.float32
        slabs.append(_stacked(slab) if apart else slab)
    return tuple(slabs), whole


def _go_together(rows: Sequence[tuple[Prefix, int]]) -> bool:
    """Whether every row may have its prompt's keys to itself: where that copies little more than the prompts."""
    prompts = {id(prefix): prefix for prefix, _ in rows}
    if rows[0][0].keys[0].dtype == torch.float32 or len(rows) > 2 * len(prompts):
        return False
    if len(rows) == 1:
        return True
    lengths = [prefix.length + suffix for prefix, suffix in rows]
    return max(p.length for p in prompts.values()) <= STACKED and max(lengths) * len(rows) <= 2 * sum(lengths)


def _copied(slabs: Sequence[Slab], suffix: Tensor) -> Slab:
    """One slab of all rows of slabs of equal length, in `suffix`."""
    start = 0
    for slab in slabs:
        read = slab.suffix[:, :, :, :, : slab.length]
        part = suffix[:, :, start : start + len(slab), :, : slab.length]
        part.copy_(read if slab.rows is None else read.index_select(2, slab.rows))
        start += len(slab)
    prefixes = tuple(prefix for slab in slabs for prefix in slab.prefixes)
    counts = tuple(count for slab in slabs for count in slab.counts)
    return Slab(prefixes, counts, suffix, slabs[0].length, views=_by_layer(suffix))


def _by_layer(held: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """(keys, values) of each layer: views of `held` [layers, 2, ...]."""
    return tuple((part[0], part[1]) for part in held.unbind())


def _stacked(slab: Slab) -> Slab:
    """The same slab with its prompts in stacks."""
    alike: dict[tuple[int, ...], list[tuple[Prefix, range]]] = {}
    start = 0
    for place, (prefix, count) in enumerate(zip(slab.prefixes, slab.counts, strict=True)):
        kind = (-(-prefix.length // _ALIKE), count.bit_length()) if prefix.length <= STACKED else (-1, place)
        alike.setdefault(kind, []).append((prefix, range(start, start + count)))
        start += count
    stacks = tuple(Stack.of(*zip(*members, strict=True)) for members in alike.values())
    rows = torch.cat([stack.rows for stack in stacks])
    places = torch.empty(start, dtype=torch.int64, device=rows.device)
    places[rows] = torch.arange(len(rows), device=rows.device)  # of a repeated row any place will do
    return replace(slab, stacks=stacks, unstacked=places)


def _side_by_side(prompts: Sequence[tuple[Tensor, ...]], longest: int) -> tuple[Tensor, ...]:
    """Per layer [P, kv heads, longest, head width], from [kv heads, tokens, head width] of each prompt."""
    kv_heads, _, width = prompts[0][0].shape
    whole = prompts[0][0].new_zeros(len(prompts[0]), len(prompts), kv_heads, longest, width)
    for place, layers in enumerate(prompts):
        for layer, part in enumerate(layers):
            whole[layer, place, :, : part.shape[1]] = part
    return whole.unbind()


class CachedTransformer:
    """Reads tokens into `KeyValues` and returns hidden states. Wraps a frozen causal transformer body.

    `body` is the model without its head (`model.base_model`). Raises UnsupportedModel if its outputs cannot be
    reproduced. Not thread-safe; one call at a time.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        config = body.config.get_text_config()
        self.body = body
        self.layers = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.fused = FusedLlama.of(body)
        self._verify()

    @property
    def device(self) -> torch.device:
        return self.body.device

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[KeyValues, Tensor]:
        """Reads each prompt once, alone: (one row per prompt, post-norm hidden state of its last token [P, H])."""
        slabs, latents = [], []
        for prompt in prompts:
            call = _Prefill()
            hidden = self._forward(torch.tensor([list(prompt)], device=self.device), None, call)
            keys = tuple(call.keys[layer] for layer in range(self.layers))
            values = tuple(call.values[layer] for layer in range(self.layers))
            shape = (self.layers, 2, 1, keys[0].shape[0], 0, keys[0].shape[2])
            slabs.append(Slab((Prefix(keys, values),), (1,), keys[0].new_empty(shape), 0))
            latents.append(hidden[0, -1])
        return KeyValues(tuple(slabs), tuple((index, 0) for index in range(len(slabs)))), torch.stack(latents)

    @torch.inference_mode()
    def read(self, cache: KeyValues, tokens: Tensor, capacity: int = 0) -> tuple[KeyValues, Tensor]:
        """Every row reads `tokens` [B, T]: (new caches, post-norm hidden states [B, T, H]).

        Room for `capacity` tokens is reserved, so that a loop of reads does not copy the cache each time. Reserved room
        is written in place: hand out `sealed()` caches only.
        """
        count = tokens.shape[1]
        cache = cache.ready(count, capacity)
        layout = cache.layout()
        positions = torch.cat([slab.positions(count) for slab in cache.slabs]).to(self.device)
        tokens = tokens[layout].to(self.device)
        if self.body.dtype == torch.float32:
            tokens, positions = pad_rows(tokens), pad_rows(positions)
        hidden = self._forward(tokens, positions, _Read(cache))
        states = torch.empty_like(hidden[: len(cache)])
        states[layout.to(self.device)] = hidden[: len(cache)]
        grown = tuple(replace(slab, length=slab.length + count) for slab in cache.slabs)
        whole = cache.whole and replace(cache.whole, filled=cache.whole.filled + count)
        return KeyValues(grown, cache.where, whole), states

    def _forward(self, tokens: Tensor, positions: Tensor | None, call: _Prefill | _Read) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=self.device)[None]
        if self.fused is not None:
            return self.fused(tokens, positions, call.attend)
        return self.body(  # type: ignore[no-any-return]
            input_ids=tokens, position_ids=positions, use_cache=False, inferenceguard_call=call
        ).last_hidden_state

    @torch.inference_mode()
    def _verify(self) -> None:
        """Compares cached reading with the model's own forward pass on a few tokens; leaves our attention installed."""
        vocabulary = int(self.body.config.get_text_config().vocab_size)
        probe = [(7 * i + 3) % vocabulary for i in range(24)]
        self.body.set_attn_implementation("eager")
        plain = self.body(input_ids=torch.tensor([probe], device=self.device), use_cache=False).last_hidden_state[0]
        self.body.set_attn_implementation(ATTENTION)
        if self.fused is not None and self._disagreement(probe, plain):
            self.fused = None  # not as Llama-like as it looks: read it through its own modules
        if problem := self._disagreement(probe, plain):
            raise UnsupportedModel(
                f"{type(self.body).__name__}: {problem}",
                hint="This architecture is not supported by the transformers engine.",
            )

    def _disagreement(self, probe: Sequence[int], plain: Tensor) -> str:
        """What is wrong with cached reading of `probe`, whose hidden states should be `plain` [T, H]; or nothing."""
        try:
            cache, first = self.prefill([probe[:9], probe[:14]])
            cache = cache.take(torch.tensor([0, 0, 1]))
            _, hidden = self.read(cache, torch.tensor([probe[9:19], probe[9:19], probe[14:24]]))
        except Exception as error:  # any architecture's code may fail on an attention that it does not expect
            return f"it cannot be read with a shared cache: {error}"
        tolerance = (1e-4 if plain.dtype == torch.float32 else 6e-2) * max(float(plain.abs().max()), 1.0)
        ours = torch.cat([first, hidden[0], hidden[1], hidden[2]])
        theirs = torch.cat([plain[[8, 13]], plain[9:19], plain[9:19], plain[14:24]])
        difference = float((ours - theirs).abs().max())
        if difference <= tolerance:
            return ""
        return (
            f"hidden states with a shared cache differ from the model's own by {difference:.2g} "
            f"(at most {tolerance:.2g} is accepted)."
        )


class _Prefill:
    """One prompt, causal within itself; collects its keys and values."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        # Copies: what came is a view, which would keep the queries and all else that was projected with it.
        keys, values = (part[0].clone(memory_format=torch.contiguous_format) for part in (key, value))
        self.keys[layer], self.values[layer] = keys, values
        heads, kv_heads, length = query.shape[1], key.shape[1], query.shape[2]
        if options.softcap is None and options.window is None:
            # enable_gqa leaves keys unrepeated where the kernel can
            return nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=options.scaling, enable_gqa=heads != kv_heads
            )
        grouped = query.view(1, kv_heads, heads // kv_heads, length, -1)
        scores = _scores(grouped, key[:, :, None], options)
        scores = scores.masked_fill(~_visible(length, 0, length, options.window, query.device), -math.inf)
        return (scores.softmax(-1).to(value.dtype) @ value[:, :, None]).view_as(query)


class _Read:
    """New tokens of slabs' rows: each row sees its prompt, its suffix so far, and its own new tokens causally."""

    def __init__(self, cache: KeyValues) -> None:
        self.slabs, self.whole = cache.slabs, cache.whole

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        if self.whole is not None and query.shape[2] == 1 and options.window is None and options.softcap is None:
            return self.whole.attend(layer, query, key, value, options)
        if len(self.slabs) == 1 and len(query) == len(self.slabs[0]):
            return _attend_slab(self.slabs[0], layer, query, key, value, options)
        output, start = torch.empty_like(query), 0
        for slab in self.slabs:
            rows = slice(start, start + len(slab))
            output[rows] = _attend_slab(slab, layer, query[rows], key[rows], value[rows], options)
            start += len(slab)
        output[start:] = 0  # the rows that pad the batch
        return output


def _attend_slab(
    slab: Slab, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Tensor:
    """Attention of one slab. query [R, heads, T, D], key and value [R, kv heads, T, D] -> [R, heads, T, D]."""
    rows, heads, count, width = query.shape
    kv_heads, end = key.shape[1], slab.length + count
    keys, values = slab.views[layer]
    keys.narrow(2, slab.length, count).copy_(key)
    values.narrow(2, slab.length, count).copy_(value)
    grouped = query.reshape(rows, kv_heads, -1, width)  # [R, kv, (heads / kv) * T, D]
    if query.dtype == torch.float32:  # in lower precisions the kernel would copy a slice: it reads unread room too
        keys, values = keys[:, :, :end], values[:, :, :end]
    scores = _scores(grouped, keys, options)
    hidden = None
    if count > 1 or options.window is not None:
        hidden = ~_visible(count, slab.length, scores.shape[-1], options.window, query.device)
    elif scores.shape[-1] > end:
        hidden = torch.arange(scores.shape[-1], device=query.device)[None] >= end
    if hidden is not None:
        scores.masked_fill_(hidden.repeat(heads // kv_heads, 1), -math.inf)
    on_suffix = _weighted(scores, values)
    if slab.unstacked is not None and count == 1 and options.window is None:
        on_prompt = _on_stacks(slab, layer, grouped, options)
        return _merged(on_prompt, on_suffix, query.dtype).reshape(rows, heads, count, width)
    parts = torch.split(grouped.transpose(0, 1), list(slab.counts), dim=1)  # per prompt [kv, r, (heads / kv) * T, D]
    prompts = [
        _on_prompt(prefix, layer, part, slab.length, count, options)
        for prefix, part in zip(slab.prefixes, parts, strict=True)
    ]
    on_prompt = prompts[0] if len(prompts) == 1 else _Part(*(torch.cat(each) for each in zip(*prompts, strict=True)))
    return _merged(on_prompt, on_suffix, query.dtype).reshape(rows, heads, count, width)


class _Part(NamedTuple):
    """Attention over some of the keys, not normalised: sums of exp(score - largest) * value, and of the weights."""

    out: Tensor  # [R, kv, Q, D] float32
    largest: Tensor  # [R, kv, Q, 1]
    total: Tensor  # [R, kv, Q, 1]


def _on_stacks(slab: Slab, layer: int, query: Tensor, options: AttentionOptions) -> _Part:
    """All rows, each on its prompt's keys. query [R, kv, Q, D]."""
    _, kv_heads, queries, width = query.shape
    found = []
    for stack in slab.stacks:
        prompts = len(stack.keys[layer])
        shared = query[stack.rows].view(prompts, -1, kv_heads, queries, width).transpose(1, 2)  # [P, kv, r, Q, D]
        scores = _scores(shared.reshape(prompts, kv_heads, -1, width), stack.keys[layer], options)
        if stack.unread is not None:
            scores.masked_fill_(stack.unread, -math.inf)
        part = _weighted(scores, stack.values[layer])  # [P, kv, r * Q, .]
        shaped = (each.view(prompts, kv_heads, -1, queries, each.shape[-1]).transpose(1, 2) for each in part)
        found.append([each.reshape(-1, kv_heads, queries, each.shape[-1]) for each in shaped])
    return _Part(*(torch.cat(each)[slab.unstacked] for each in zip(*found, strict=True)))


def _on_prompt(prefix: Prefix, layer: int, query: Tensor, suffix: int, count: int, options: AttentionOptions) -> _Part:
    """The rows of one prompt on its keys, as one matrix. query [kv, r, Q, D]; the rows have read `suffix` tokens."""
    kv_heads, rows, queries, width = query.shape
    shared = query.reshape(kv_heads, -1, width)
    scores = _scores(shared, prefix.keys[layer], options)
    if options.window is not None:
        total = prefix.length + suffix + count
        visible = _visible(count, prefix.length + suffix, total, options.window, query.device)[:, : prefix.length]
        scores.masked_fill_(~visible.repeat(rows * queries // count, 1), -math.inf)
    part = _weighted(scores, prefix.values[layer])
    shaped = (each.view(kv_heads, rows, queries, -1).transpose(0, 1) for each in part)
    return _Part(*shaped)


def _weighted(scores: Tensor, values: Tensor) -> _Part:
    """scores [..., Q, L] float32, consumed; values [..., L, D]."""
    largest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)  # all may be out of the window
    weights = scores.sub_(largest).exp_()
    return _Part((weights.to(values.dtype) @ values).float(), largest, weights.sum(-1, keepdim=True))


def _merged(first: _Part, second: _Part, dtype: torch.dtype) -> Tensor:
    """Both parts under one softmax: [R, kv, Q, D]."""
    largest = torch.maximum(first.largest, second.largest)
    one, two = torch.exp(first.largest - largest), torch.exp(second.largest - largest)
    total = first.total * one + second.total * two
    return torch.addcmul(first.out * (one / total), second.out, two / total).to(dtype)


def _scores(query: Tensor, key: Tensor, options: AttentionOptions) -> Tensor:
    scores = (query @ key.transpose(-1, -2)).float() * options.scaling
    return scores if options.softcap is None else torch.tanh(scores / options.softcap) * options.softcap


def _visible(count: int, first: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `total` positions each of `count` tokens at positions first.. sees. bool [count, total]"""
    position = torch.arange(first, first + count, device=device)[:, None]
    other = torch.arange(total, device=device)[None]
    visible = other <= position
    return visible if window is None else visible & (other > position - window)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    inferenceguard_call: _Prefill | _Read | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls for each layer (its AttentionInterface). query [B, heads, T, D]."""
    if inferenceguard_call is None:
        raise UnsupportedModel(f"{type(module).__name__} does not hand keyword arguments to its attention.")
    if other.get("s_aux") is not None or other.get("position_bias") is not None:
        raise UnsupportedModel(f"{type(module).__name__} uses attention sinks or position biases.")
    options = AttentionOptions(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    output = inferenceguard_call.attend(int(module.layer_idx), query, key, value, options)  # type: ignore[arg-type]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


def pad_rows(rows: Tensor) -> Tensor:
    """[B, ...] with the last row repeated up to a multiple of ROW_MULTIPLE rows."""
    missing = -rows.shape[0] % ROW_MULTIPLE
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
