"""Weights that a 4-bit checkpoint left in bfloat16, read as 4 bits again where reading them is what takes the time.

A GGUF of type Q4_0 or Q4_1 holds a matrix in groups of 32 weights of a row, each one of 16 values in equal steps.
Loaded in bfloat16 they take 16 bits each, though their steps can still be told. For a few rows a product takes as long
as its weights take to arrive from memory: these take 5 bits each, scale and offset of the group included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP = 32
_LEVELS = 16
_ZERO = 8  # torch's kernel has weight = (level - 8) * scale + offset
_OUTPUTS = 16  # it takes a multiple of these
# Of a group's largest weight: how far one may be off. bfloat16 itself is off by 2^-9 of a weight, and scale and offset
# are held in it once more. Weights on no grid are off by up to half a step, 2^-4 of it where they have both signs.
_TOLERANCE = 2.0**-7
_AT_ONCE = 2**21  # weights that are fitted at a time: these stay in the cache


@dataclass(frozen=True)
class FourBits:
    """x W^T for rows x of bfloat16, every weight within 2^-7 of the largest of its group of 32 (on average, 2^-9)."""

    packed: Tensor
    steps: Tensor  # [in / 32, out, 2] bfloat16: scale and offset of every group

    @classmethod
    def of(cls, weight: Tensor) -> FourBits | None:
        """None for weights [out, in] that lie on no grid, or where this torch has no such product."""
        outputs, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or inputs % _GROUP or outputs % _OUTPUTS:
            return None
        fitted = []
        for rows in (weight[:1], *torch.split(weight, max(1, _AT_ONCE // inputs))):  # one row tells most matrices
            if (part := _fitted(rows)) is None:
                return None
            fitted.append(part)
        levels, steps = (torch.cat(parts) for parts in zip(*fitted[1:], strict=True))
        try:  # what torch's own quantisation uses; not public, hence the fallback
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.view(outputs, inputs), 1)
            made = cls(packed, steps.transpose(0, 1).contiguous())
            made(weight.new_zeros(1, inputs))
        except (AttributeError, RuntimeError):
            return None
        return made

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [..., in] -> [..., out]"""
        flat = rows.reshape(-1, rows.shape[-1])
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, _GROUP, self.steps)
        return out.view(*rows.shape[:-1], -1)


def _fitted(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """(levels [out, groups, 32] int32, scale and offset [out, groups, 2] bfloat16), or None: a group is on no grid."""
    groups = weight.float().view(len(weight), -1, _GROUP)
    levels, steps, fits = _fit(groups, _LEVELS - 1)
    for used in range(_LEVELS - 2, 0, -1):  # a group need not use all levels
        if bool(fits.all()):
            break
        left = ~fits
        levels[left], steps[left], fits[left] = _fit(groups[left], used)
    return (levels.int(), steps) if bool(fits.all()) else None


def _fit(groups: Tensor, used: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [..., 32] on a grid of `used` steps from their smallest weight to their largest.

    (levels [..., 32], scale and offset [..., 2] bfloat16 by least squares, whether they fit [...])
    """
    low, high = groups.aminmax(dim=-1, keepdim=True)
    levels = ((groups - low) * (used / (high - low).clamp(min=1e-30))).round_()
    mean, middle = groups.mean(-1, keepdim=True), levels.mean(-1, keepdim=True)
    spread = levels - middle
    scale = ((groups - mean) * spread).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True).clamp(min=1e-30)
    scale = scale.bfloat16().float()
    offset = (mean + (_ZERO - middle) * scale).bfloat16().float()
    error = torch.addcmul(offset - groups, levels - _ZERO, scale).abs_().amax(-1)
    fits = error <= _TOLERANCE * torch.maximum(low.abs(), high.abs())[..., 0]
    return levels, torch.cat((scale, offset), -1).bfloat16(), fits
