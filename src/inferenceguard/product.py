"""What the fused forward passes share: products with fixed weights, and a way to watch what is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear
from transformers import PreTrainedModel

from inferenceguard.four_bits import FourBits

PACKED_LIMIT = 2**26  # weights of a matrix that is held twice for speed; larger ones are slow for other reasons
FEW = 4  # rows at most that are multiplied with weights of 4 bits: more wait for arithmetic


@dataclass(frozen=True)
class Product:
    """x W^T + b, with the weights laid out beforehand as oneDNN reads them where that pays: bfloat16 on CPU.

    At one to eight rows oneDNN otherwise spends half of its time on laying them out anew, and at one to four most of
    the rest on reading them, so weights that can be told in 4 bits are read as such (docs/performance.md).
    """

    weight: Tensor  # [out, in]
    bias: Tensor | None = None
    packed: Tensor | None = None
    four_bits: FourBits | None = None  # the same weights, for few rows

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None, *, any_bits: bool = False) -> Product:
        """A copy is laid out where torch has the means; it takes as much memory as the weight again, and a third of
        that where the weights are told in 4 bits too.

        In float32 too with `any_bits`: twice as fast as MKL here, but a row's last bits may depend on the batch.
        """
        fits = weight.dtype == torch.bfloat16 or (any_bits and weight.dtype == torch.float32)
        small = weight.numel() <= PACKED_LIMIT and weight.device.type == "cpu" and fits
        try:
            # what torch's own compiler uses; not public, hence the fallback
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 4) if small else None
        except (AttributeError, RuntimeError):
            packed = None
        return cls(weight, bias, packed, FourBits.of(weight) if bias is None and not any_bits else None)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.four_bits is not None and self._few(rows):
            return self.four_bits(rows)
        if self.packed is None:
            return linear(rows, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return out

    def gelu(self, rows: Tensor) -> Tensor:
        """gelu(x W^T + b), the exact one, in one pass over the result."""
        if self.packed is None:
            return gelu(self(rows))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "gelu", [], "none")
        return out

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """x W^T + b + other, in one pass over the result."""
        if self.packed is None or (self.four_bits is not None and self._few(rows)):
            return self(rows) + other
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, other, self.packed, self.bias, "add")
        return out

    def _few(self, rows: Tensor) -> bool:
        return rows.numel() <= FEW * rows.shape[-1]


class FusedPass:
    """A forward pass in place of a transformer's own, whose hooks therefore see nothing: these do."""

    def __init__(self, body: PreTrainedModel) -> None:
        self.body = body
        self.watchers: list[Callable[[dict[str, Tensor]], None]] = []

    def tell(self, **inputs: Tensor) -> None:
        """Hands the inputs, named as transformers does, to all that watch."""
        for watcher in self.watchers:
            watcher(inputs)
