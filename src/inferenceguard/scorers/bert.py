"""The forward pass of a BERT encoder without its modules' overhead, to score with: nothing here is trained.

transformers' modules under autocast lay every weight out anew in every batch and keep half of their intermediate
tensors in float32. This runs in one precision throughout, with weights laid out once, queries, keys and values made by
one product, and GELU and residual sums made within theirs; or with products of 8-bit integers (docs/performance.md).
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad, scaled_dot_product_attention
from transformers import BertModel

from inferenceguard.product import FusedPass, Product
from inferenceguard.scorers.int8 import ByteFeedForward, ByteProduct, Range, ranges
from inferenceguard.threads import side_by_side

# Tokens of a batch are filled up to a multiple of this for the products: oneDNN prepares a kernel for each new number
# of rows, which takes as long as a short text's products (docs/performance.md).
_TOKENS = 32
_SMALLEST = 1e-30  # sum of exponentials whose parts are exact enough


class FusedBert(FusedPass):
    """ids, types and mask [B, L] -> last hidden states [B, L, H] in `dtype`. Weights are those at construction."""

    def __init__(self, body: BertModel, dtype: torch.dtype) -> None:
        super().__init__(body)
        self.embeddings = body.embeddings
        self.dtype = dtype
        self.heads = int(body.config.num_attention_heads)
        self.layers = [_Layer.of(layer, dtype) for layer in cast(Any, body.encoder).layer]

    @classmethod
    def in_bytes(cls, body: BertModel, read: Callable[[], object]) -> FusedBert:
        """In bfloat16 with products of 8 bits (int8.py). `read` has `body` itself read texts for their ranges."""
        fused = cls(body, torch.bfloat16)
        layers = list(cast(Any, body.encoder).layer)
        with ranges([module for layer in layers for module in _products(layer)]) as seen:
            read()
        fused.layers = [_Layer.of_bytes(layer, seen.__getitem__) for layer in layers]
        return fused

    def __call__(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        self.tell(input_ids=ids, attention_mask=mask)
        hidden = self.embeddings(input_ids=ids, token_type_ids=types).to(self.dtype)
        shape = hidden.shape
        tokens = ids.numel()
        rows = pad(hidden.view(tokens, -1), (0, 0, 0, -tokens % _TOKENS))
        seen = mask.to(self.dtype)
        gathered = torch.zeros_like(rows)
        places = gathered[:tokens].view(*shape[:2], self.heads, -1)
        for layer in self.layers:
            heads = layer.qkv(rows)[:tokens].view(*shape[:2], 3, self.heads, -1)
            self._attend(heads, seen, places)
            rows = layer.rest(gathered, rows)
        last: Tensor = rows[:tokens].view(shape)
        return last

    def in_halves(self, ids: Tensor, types: Tensor) -> Tensor:
        """The same of one text [1, L], half of its tokens on a core each: only attention needs those of the other."""
        self.tell(input_ids=ids, attention_mask=torch.ones_like(ids))
        hidden = self.embeddings(input_ids=ids, token_type_ids=types).to(self.dtype)
        tokens = ids.numel()
        halves = list(pad(hidden[0], (0, 0, 0, -tokens % _TOKENS)).chunk(2))
        size, both = len(halves[0]), threading.Barrier(2)
        # One layer's are written while another's may still be read.
        heads = [hidden.new_empty(2 * size, 3, self.heads, hidden.shape[-1] // self.heads) for _ in range(2)]

        @torch.inference_mode()
        def read(half: int) -> None:
            own, rows = slice(half * size, (half + 1) * size), halves[half]
            try:
                for layer, held in zip(self.layers, itertools.cycle(heads)):
                    held[own] = layer.qkv(rows).view(size, 3, self.heads, -1)
                    both.wait()
                    query, (key, value) = held[own, 0], held[:tokens, 1:].unbind(1)
                    seen = scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in (query, key, value)))
                    rows = layer.rest(seen[0].transpose(0, 1).reshape(size, -1), rows)
                halves[half] = rows
            except threading.BrokenBarrierError:
                return  # the other half has failed, and says why
            except BaseException:
                both.abort()  # or the other would wait for ever
                raise

        side_by_side([functools.partial(read, half) for half in range(2)])
        return torch.cat(halves)[:tokens][None]

    def _attend(self, heads: Tensor, seen: Tensor, places: Tensor) -> None:
        """[B, L, 3, heads, D] -> `places` [B, L, heads, D]. Every row of `seen` [B, L] has a token that is: [CLS]."""
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if self.dtype == torch.float32 or len(query) == 1:
            mask = None if bool(seen.all()) else seen.bool()[:, None, None]
            places.copy_(scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2))
        else:
            attend_many(query, key, value, seen, places)


def attend_many(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, places: Tensor) -> None:
    """[B, heads, L, D] each -> `places` [B, L, heads, D], in bfloat16, whose softmax is the slowest part on CPUs.

    So the exponentials are summed by the product with the values, which have a column of ones, and divided out after
    it: D numbers instead of L. Padding (0 in `seen` [B, L], else 1) has zeros for its value and its one, which is all
    the mask that it needs. Where a sum is beyond what a number can hold (MiniLM's first layer has logits above 88),
    softmax does it after all.
    """
    batch, heads, length, width = query.shape
    queries, keys = (part.reshape(-1, length, width) for part in (query, key))
    ones = seen[:, None, :, None]
    values = torch.cat((value * ones, ones.expand(-1, heads, -1, -1)), -1).view(-1, length, width + 1)
    empty = torch.empty((), dtype=query.dtype)  # beta = 0: not read
    logits = torch.baddbmm(empty, queries, keys.transpose(1, 2), beta=0, alpha=width**-0.5)
    summed = (logits.exp() @ values).view(batch, heads, length, width + 1)
    least, most = summed[..., width].aminmax()
    if least > _SMALLEST and most < torch.inf:
        torch.div(summed[..., :width], summed[..., width:], out=places.transpose(1, 2))
    else:
        unseen = torch.zeros_like(seen).masked_fill_(seen == 0, -torch.inf)[:, None, None]
        weights = (logits.view(batch, heads, length, length) + unseen).softmax(-1)
        places.copy_((weights @ value).transpose(1, 2))


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm, dtype: torch.dtype) -> _Norm:
        return cls(module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)

    def __call__(self, rows: Tensor) -> Tensor:
        return layer_norm(rows, rows.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _FeedForward:
    """x + down(gelu(up(x)))."""

    up: Product  # [inner, H]
    down: Product  # [H, inner]

    def __call__(self, rows: Tensor) -> Tensor:
        return self.down.plus(self.up.gelu(rows), rows)


@dataclass(frozen=True)
class _Layer:
    qkv: Product | ByteProduct  # [3 H, H]
    out: Product | ByteProduct  # [H, H]
    between: _Norm
    feed_forward: _FeedForward | ByteFeedForward
    after: _Norm

    def rest(self, gathered: Tensor, rows: Tensor) -> Tensor:
        """The layer's result from what attention gathered for its input `rows`."""
        return self.after(self.feed_forward(self.between(self.out.plus(gathered, rows))))

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> _Layer:
        attention = layer.attention.self
        return cls(
            qkv=_product(dtype, attention.query, attention.key, attention.value),
            out=_product(dtype, layer.attention.output.dense),
            between=_Norm.of(layer.attention.output.LayerNorm, dtype),
            feed_forward=_FeedForward(_product(dtype, layer.intermediate.dense), _product(dtype, layer.output.dense)),
            after=_Norm.of(layer.output.LayerNorm, dtype),
        )

    @classmethod
    def of_bytes(cls, layer: Any, seen: Callable[[nn.Linear], Range]) -> _Layer:
        """`seen` tells the range of what a product reads."""
        attention = layer.attention.self
        inputs, out, up, down = _products(layer)
        return cls(
            qkv=ByteProduct.of(*_joined(attention.query, attention.key, attention.value), seen(inputs)),
            out=ByteProduct.of(*_joined(out), seen(out)),
            between=_Norm.of(layer.attention.output.LayerNorm, torch.bfloat16),
            feed_forward=ByteFeedForward.of(up, down, seen),
            after=_Norm.of(layer.output.LayerNorm, torch.bfloat16),
        )


def _products(layer: Any) -> list[nn.Linear]:
    """What reads the layer's input, what attention has gathered, the feed-forward layer's input, and its neurons."""
    return [layer.attention.self.query, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense]


def _joined(*parts: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of the parts' products as one, their results beside each other."""
    return torch.cat([part.weight.detach() for part in parts]), torch.cat([part.bias.detach() for part in parts])


def _product(dtype: torch.dtype, *parts: nn.Linear) -> Product:
    weight, bias = _joined(*parts)
    return Product.of(weight.to(dtype), bias.to(dtype), any_bits=True)
