"""A BERT layer's products in 8 bits, to steer a search with: twice as fast as bfloat16 on a CPU with VNNI.

Some channels of MiniLM's hidden states, and some neurons of its feed-forward layers, have ten times the range of the
others, which one scale for all of them would leave without resolution. So every channel is shifted to the middle of its
range, most of the difference in range is moved into the weights (SmoothQuant, arXiv 2211.10438; the shift: Outlier
Suppression+, arXiv 2304.09145), and the few neurons of largest range stay in bfloat16. Ranges are those of texts that
the encoder reads once; what is beyond them is cut off (docs/log.md has the errors).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inferenceguard.product import Product

_MOVED = 0.8  # the part of a channel's range (as a power) that the weights take over
_MARGIN = 1.5  # of a range: other texts may go beyond it
_RARE = 16  # neurons of a feed-forward layer that stay in bfloat16
_GELU_LOWEST = 0.17  # below zero
_ROWS = 512  # that oneDNN lays weights out for; others work too


@functools.cache
def multiplies_bytes() -> bool:
    """Whether this CPU and this torch multiply 8-bit integers fast: tried, for the means are not public in torch."""
    try:
        if not torch.cpu._is_vnni_supported():
            return False
        weights, ones, rows = ByteWeights.of(torch.eye(4)), torch.ones(4), torch.full((1, 4), 3, dtype=torch.uint8)
        sums = weights.times(rows, 1.0, ones, weights.gelu(rows, ones, 1.0, 0).bfloat16())
        return bool((sums.round() == 8).all())  # 3 + 1, and gelu(3 + 1)
    except (AttributeError, RuntimeError, TypeError):
        return False


@dataclass
class Range:
    """What a product has read: the smallest and the largest value of every channel, [in] each."""

    low: Tensor
    high: Tensor

    def see(self, rows: Tensor) -> None:
        """Widens the range by rows [..., in]."""
        rows = rows.detach().flatten(0, -2).float()
        self.low, self.high = torch.minimum(self.low, rows.amin(0)), torch.maximum(self.high, rows.amax(0))


@contextlib.contextmanager
def ranges(modules: list[nn.Linear]) -> Iterator[dict[nn.Linear, Range]]:
    """The range of each module's inputs while this lasts."""
    seen: dict[nn.Linear, Range] = {}

    def look(module: Any, inputs: tuple[Tensor, ...]) -> None:
        unknown = torch.full((module.in_features,), torch.inf)
        seen.setdefault(module, Range(unknown, -unknown)).see(inputs[0])

    hooks = [module.register_forward_pre_hook(look) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class ByteWeights:
    """W [out, in] as 8-bit integers with a scale for each output, laid out for oneDNN."""

    packed: Tensor
    scale: Tensor  # [out]
    zero: Tensor  # [out], all 0
    sums: Tensor  # [out], of W as it is held: what a shift of all inputs by 1 adds

    @classmethod
    def of(cls, weight: Tensor) -> ByteWeights:
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        rounded = (weight / scale[:, None]).round()
        packed = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), [_ROWS, weight.shape[1]])
        return cls(packed, scale, torch.zeros(len(weight), dtype=torch.int64), rounded.sum(1) * scale)

    def times(self, rows: Tensor, step: float, bias: Tensor, other: Tensor | None = None) -> Tensor:
        """step * rows W^T + bias (+ other) in bfloat16; rows [n, in] uint8."""
        fixed = rows, step, 0, self.packed, self.scale, self.zero
        product = torch.ops.onednn.qlinear_pointwise
        if other is None:
            out: Tensor = product(*fixed, bias, 1.0, 0, torch.bfloat16, "none", [], "")
        else:
            out = product.binary(
                *fixed, other, bias, 1.0, 0, torch.bfloat16, 1.0, 0, "add", 1.0, "none", [], ""
            )  # fmt: skip
        return out

    def gelu(self, rows: Tensor, bias: Tensor, step: float, zero: int) -> Tensor:
        """gelu(rows W^T + bias) as bytes: (a result - zero) * step is the value."""
        fixed = rows, 1.0, 0, self.packed, self.scale, self.zero
        out: Tensor = torch.ops.onednn.qlinear_pointwise(*fixed, bias, step, zero, torch.uint8, "gelu", [], "none")
        return out


@dataclass(frozen=True)
class ByteProduct:
    """x W^T + b for bfloat16 rows x, whose channel c is read as centre_c + step_c (q_c - 128), q_c in 0 ... 255."""

    weights: ByteWeights
    bias: Tensor  # [out]
    factor: Tensor  # [in]: 1 / step
    offset: Tensor  # [in]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, seen: Range) -> ByteProduct:
        centre, reach = (seen.low + seen.high) / 2, ((seen.high - seen.low) / 2 * _MARGIN).clamp(min=1e-3)
        step = reach**_MOVED / weight.abs().amax(0).clamp(min=1e-6) ** (1 - _MOVED)
        step = step * (reach / step).max() / 127
        weights = ByteWeights.of(weight * step)
        bias = bias + weight @ centre - 128 * weights.sums
        return cls(weights, bias, 1 / step, 128.5 - centre / step)  # the half: conversion to bytes cuts off

    def bytes(self, rows: Tensor) -> Tensor:
        """[n, in] bfloat16 -> uint8, by way of int16: a third of the time of torch's own conversion."""
        return torch.addcmul(self.offset, rows, self.factor).clamp_(0, 255).to(torch.int16).to(torch.uint8)

    def __call__(self, rows: Tensor) -> Tensor:
        return self.weights.times(self.bytes(rows), 1.0, self.bias)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """x W^T + b + other."""
        return self.weights.times(self.bytes(rows), 1.0, self.bias, other)


@dataclass(frozen=True)
class ByteFeedForward:
    """x + down(gelu(up(x))): most neurons in 8 bits from end to end, the `_RARE` of largest range in bfloat16."""

    up: ByteProduct
    down: ByteWeights
    bias: Tensor  # [H], of down
    step: float  # of a neuron's byte
    zero: int
    rare_up: Product
    rare_down: Product

    @classmethod
    def of(cls, up: nn.Linear, down: nn.Linear, seen: Callable[[nn.Linear], Range]) -> ByteFeedForward:
        order = seen(down).high.argsort(descending=True)
        rare, common = order[:_RARE], order[_RARE:]
        step = (float(seen(down).high[common].amax().clamp(min=0.1)) * _MARGIN + _GELU_LOWEST) / 255
        zero = round(_GELU_LOWEST / step)
        weights = ByteWeights.of(down.weight.detach()[:, common])
        half = torch.bfloat16
        return cls(
            ByteProduct.of(up.weight.detach()[common], up.bias.detach()[common], seen(up)),
            weights, down.bias.detach() - step * zero * weights.sums, step, zero,
            Product.of(up.weight.detach()[rare].to(half), up.bias.detach()[rare].to(half)),
            Product.of(down.weight.detach()[:, rare].to(half).contiguous()),
        )  # fmt: skip

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, H] bfloat16 -> the same."""
        others = self.rare_down.plus(self.rare_up.gelu(rows), rows)
        neurons = self.up.weights.gelu(self.up.bytes(rows), self.up.bias, self.step, self.zero)
        return self.down.times(neurons, self.step, self.bias, others)
