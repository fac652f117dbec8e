"""A transformer that reads rows of many prompts together, with every prompt's keys and values held once.

The cache of a row is its prompt's (shared by all rows of the prompt) and its own suffix. Rows that have read equally
many tokens lie in one slab: their suffixes are attended to in one batched product, each prompt's keys in one product
for all rows of that prompt, under one softmax. In float32 nothing is padded, so a row's numbers depend on the rows of
its own prompt and on nothing else in the batch; reordering rows moves suffixes only.

Llama-like models are read by `llama.py`, which fuses projections; every other architecture that passes keyword
arguments to its attention (Gemma 3, GPT-2, ...) through transformers' attention interface. `CachedTransformer` compares
itself with the model's plain forward pass when it is built, and refuses a model on which the two disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from inferenceguard.errors import UnsupportedModel
from inferenceguard.llama import AttentionOptions, FusedLlama

ATTENTION = "inferenceguard"
STACKED = 512  # tokens of a prompt whose keys may be copied to lie beside other prompts'
_FEW = 4  # rows in all whose prompts may be copied for each, though they be of one prompt
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

    One prompt alone in float32, where a row's bits must not depend on other prompts.
    """

    keys: tuple[Tensor, ...]  # per layer [P, kv heads, longest prompt's tokens, head width]; of one prompt without P
    values: tuple[Tensor, ...]
    lengths: Tensor  # [P] the prompts' tokens
    unread: Tensor | None  # [P, 1, 1, tokens] bool: what only fills a shorter prompt up
    rows: Tensor | None  # [P * r] the slab's rows by prompt, a prompt's last one repeated; None: all, as they stand

    @classmethod
    def of(cls, prefixes: Sequence[Prefix], rows: Sequence[range], *, alone: bool) -> Stack:
        """Copies nothing for one prompt. `alone`: the slab has no other stack."""
        device = prefixes[0].keys[0].device
        lengths = torch.tensor([prefix.length for prefix in prefixes], device=device)
        most = max(len(own) for own in rows)
        as_they_stand = alone and all(len(own) == most for own in rows)
        picked = None if as_they_stand else torch.tensor(
            [own[min(place, len(own) - 1)] for own in rows for place in range(most)], device=device)  # fmt: skip
        if len(prefixes) == 1:
            return cls(prefixes[0].keys, prefixes[0].values, lengths, None, picked)
        longest = int(lengths.max())
        unread = None if bool((lengths == longest).all()) else torch.arange(longest, device=device) >= lengths[:, None]
        return cls(
            _side_by_side([prefix.keys for prefix in prefixes], longest),
            _side_by_side([prefix.values for prefix in prefixes], longest),
            lengths,
            None if unread is None else unread[:, None, None],
            picked,
        )

    def attend(self, layer: int, query: Tensor, own: Tensor, reach: _Reach) -> tuple[Tensor, Tensor]:
        """The stack's rows on their prompts, under one softmax with what they score on their own suffixes.

        query [R, kv, Q, D] and own [R, kv, Q, L] of the slab's rows -> (weights on the suffixes [P * r, kv, Q, L], what
        is seen of the prompts [P * r, kv, Q, D]).
        """
        if self.rows is not None:
            query, own = query[self.rows], own[self.rows]
        prompts, longest = len(self.lengths), self.keys[layer].shape[-2]
        scores = reach.scores(_by_prompt(query, prompts) @ self.keys[layer].transpose(-1, -2))
        if (hidden := self._hidden(reach, scores.shape[2])) is not None:
            scores.masked_fill_(hidden, -math.inf)
        weights = torch.cat((own, _by_row(scores, query.shape[2])), -1).softmax(-1)
        on_suffix, on_prompt = weights.split_with_sizes([own.shape[-1], longest], -1)
        return on_suffix, _by_row(_by_prompt(on_prompt, prompts) @ self.values[layer], query.shape[2])

    def _hidden(self, reach: _Reach, queries: int) -> Tensor | None:
        """What the prompts' `queries` rows of the product do not see, [P, 1, 1 or queries, tokens] bool."""
        if reach.options.window is None:
            return self.unread
        device = self.lengths.device
        positions = self.lengths[:, None] + reach.positions.to(device)
        seen = _visible(positions, torch.arange(self.keys[0].shape[-2], device=device), reach.options.window)
        hidden = ~seen.repeat(1, queries // reach.count, 1)[:, None]  # of [P, T, tokens]
        return hidden if self.unread is None else hidden | self.unread


@dataclass(frozen=True)
class _Reach:
    """T new tokens of rows that have read `first` tokens of their suffixes: what they see, and how it is scored."""

    options: AttentionOptions
    first: int
    count: int  # T

    @property
    def positions(self) -> Tensor:
        """[T] in the suffix."""
        return torch.arange(self.first, self.first + self.count)

    def scores(self, products: Tensor) -> Tensor:
        """Of products of keys and scaled queries."""
        cap = self.options.softcap
        return products if cap is None else torch.tanh(products / cap) * cap

    def hide(self, own: Tensor) -> Tensor:
        """own [R, kv, Q, L] on the suffix and the room behind it, with -inf where a token does not see: in place."""
        if self.count == 1 and self.options.window is None:
            if own.shape[-1] > self.first + 1:
                own[..., self.first + 1 :] = -math.inf
            return own
        seen = _visible(self.positions, torch.arange(own.shape[-1]), self.options.window).to(own.device)
        return own.masked_fill_(~seen.repeat(own.shape[2] // self.count, 1), -math.inf)


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
    stacks: tuple[Stack, ...] = ()  # all prompts; their rows one after the other are ...
    unstacked: Tensor | None = None  # [R] ... where each row is among them; None: in the slab's order

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
            suffix = first.suffix.new_empty(layers, kinds, size, kv_heads, length + room, width)
            suffix[..., length:, :] = 0  # because unread room is multiplied by weights of zero
        else:
            suffix = held[:, :, start : start + size, :, whole.filled - length :]
        start += size
        slabs.append(_stacked(_copied(group, suffix), together=whole is None and suffix.dtype != torch.float32))
    return tuple(slabs), whole


def _go_together(rows: Sequence[tuple[Prefix, int]]) -> bool:
    """Whether every row may have its prompt's keys to itself: where that copies little more than the prompts."""
    prompts = {id(prefix): prefix for prefix, _ in rows}
    if rows[0][0].keys[0].dtype == torch.float32 or len(rows) > max(2 * len(prompts), _FEW):
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


def _stacked(slab: Slab, *, together: bool) -> Slab:
    """The same slab with its prompts in stacks: `together` where they are alike, else each alone."""
    alike: dict[tuple[int, ...], list[tuple[Prefix, range]]] = {}
    start = 0
    for place, (prefix, count) in enumerate(zip(slab.prefixes, slab.counts, strict=True)):
        stackable = together and prefix.length <= STACKED
        kind = (-(-prefix.length // _ALIKE), count.bit_length()) if stackable else (-1, place)
        alike.setdefault(kind, []).append((prefix, range(start, start + count)))
        start += count
    stacks = tuple(
        Stack.of([prefix for prefix, _ in members], [rows for _, rows in members], alone=len(alike) == 1)
        for members in alike.values()
    )
    picked = [stack.rows for stack in stacks if stack.rows is not None]
    if not picked:
        return replace(slab, stacks=stacks)
    rows = torch.cat(picked)
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
        grouped, reach = query.view(1, kv_heads, heads // kv_heads, length, -1), _Reach(options, 0, length)
        scores = reach.scores((grouped @ key[:, :, None].transpose(-1, -2)).float() * options.scaling)
        positions = reach.positions.to(query.device)
        scores = scores.masked_fill(~_visible(positions, positions, options.window), -math.inf)
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
    rows, _, count, width = query.shape
    reach = _Reach(options, slab.length, count)
    keys, values = slab.views[layer]
    keys.narrow(2, slab.length, count).copy_(key)
    values.narrow(2, slab.length, count).copy_(value)
    if query.dtype == torch.float32:  # in lower precisions the product would copy a slice: it reads unread room too
        keys, values = (part.narrow(2, 0, slab.length + count) for part in (keys, values))
    grouped = (query * options.scaling).reshape(rows, key.shape[1], -1, width)  # [R, kv, Q = (heads / kv) * T, D]
    # Keys on the left, where oneDNN reads them as they lie; on the right it would lay them out anew.
    own = reach.hide(reach.scores((keys @ grouped.transpose(-1, -2)).transpose(-1, -2)))
    parts = [stack.attend(layer, grouped, own, reach) for stack in slab.stacks]
    weights, on_prompt = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
    if slab.unstacked is not None:
        weights, on_prompt = weights[slab.unstacked], on_prompt[slab.unstacked]
    return (weights @ values).add_(on_prompt).view(query.shape)


def _by_prompt(rows: Tensor, prompts: int) -> Tensor:
    """[P * r, kv, Q, X] -> [P, kv, r * Q, X]: all rows of a prompt as one matrix."""
    _, kv_heads, queries, width = rows.shape
    apart = rows.reshape(prompts, -1, kv_heads, queries, width).transpose(1, 2)
    return apart.reshape(prompts, kv_heads, -1, width)


def _by_row(matrices: Tensor, queries: int) -> Tensor:
    """[P, kv, r * Q, X] -> [P * r, kv, Q, X]"""
    prompts, kv_heads, _, width = matrices.shape
    apart = matrices.view(prompts, kv_heads, -1, queries, width).transpose(1, 2)
    return apart.reshape(-1, kv_heads, queries, width)


def _visible(positions: Tensor, others: Tensor, window: int | None) -> Tensor:
    """Which of the positions `others` [N] the tokens at `positions` [..., T] see. bool [..., T, N]"""
    visible = others <= positions[..., None]
    return visible if window is None else visible & (others > positions[..., None] - window)


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
