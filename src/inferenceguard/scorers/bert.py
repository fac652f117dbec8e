"""The forward pass of a BERT encoder without its modules' overhead, to score with: nothing here is trained.

transformers' modules under autocast lay every weight out anew in every batch and keep half of their intermediate
tensors in float32. This runs in one precision throughout, with weights laid out once, queries, keys and values made by
one product, and GELU and residual sums made within theirs (docs/performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad, scaled_dot_product_attention
from transformers import BertModel

from inferenceguard.product import FusedPass, Product

# Tokens of a batch are filled up to a multiple of this for the products: oneDNN prepares a kernel for each new number
# of rows, which takes as long as a short text's products (docs/performance.md).
_TOKENS = 64


class FusedBert(FusedPass):
    """ids, types and mask [B, L] -> last hidden states [B, L, H] in `dtype`. Weights are those at construction."""

    def __init__(self, body: BertModel, dtype: torch.dtype) -> None:
        super().__init__(body)
        self.embeddings = body.embeddings
        self.dtype = dtype
        self.heads = int(body.config.num_attention_heads)
        self.layers = [_Layer.of(layer, dtype) for layer in cast(Any, body.encoder).layer]

    def __call__(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        self.tell(input_ids=ids, attention_mask=mask)
        hidden = self.embeddings(input_ids=ids, token_type_ids=types).to(self.dtype)
        shape = hidden.shape
        tokens = ids.numel()
        rows = pad(hidden.view(tokens, -1), (0, 0, 0, -tokens % _TOKENS))
        unseen = None if bool(mask.all()) else _unseen(mask, self.dtype)
        for layer in self.layers:
            seen = torch.zeros_like(rows)
            heads = layer.qkv(rows)[:tokens].view(*shape[:2], 3, self.heads, -1)
            seen[:tokens] = self._attention(heads, unseen).view(tokens, -1)
            rows = layer.between(layer.out.plus(seen, rows))
            rows = layer.after(layer.down.plus(layer.up.gelu(rows), rows))
        last: Tensor = rows[:tokens].view(shape)
        return last

    def _attention(self, heads: Tensor, unseen: Tensor | None) -> Tensor:
        """[B, L, 3, heads, D] -> [B, L, heads, D]. `unseen` [B, 1, 1, L] is added to the logits."""
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if self.dtype == torch.float32 or len(query) == 1:
            seen: Tensor = scaled_dot_product_attention(query, key, value, attn_mask=unseen)
            return seen.transpose(1, 2).contiguous()
        # Of many texts torch's fused attention is the slower one in bfloat16 on CPUs; of one, this prepares kernels.
        batch, count, length, width = query.shape
        query, key, value = (part.reshape(-1, length, width) for part in (query, key, value))
        empty = torch.empty((), dtype=self.dtype)  # beta = 0: not read
        logits = torch.baddbmm(empty, query, key.transpose(1, 2), beta=0, alpha=width**-0.5)
        if unseen is not None:
            logits.view(batch, count, length, length).add_(unseen)
        seen = (logits.softmax(-1) @ value).view(batch, count, length, width)
        return seen.transpose(1, 2).contiguous()


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
class _Layer:
    qkv: Product  # [3 H, H]
    out: Product  # [H, H]
    between: _Norm
    up: Product  # [inner, H]
    down: Product  # [H, inner]
    after: _Norm

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> _Layer:
        attention = layer.attention.self
        return cls(
            qkv=_product(dtype, attention.query, attention.key, attention.value),
            out=_product(dtype, layer.attention.output.dense),
            between=_Norm.of(layer.attention.output.LayerNorm, dtype),
            up=_product(dtype, layer.intermediate.dense),
            down=_product(dtype, layer.output.dense),
            after=_Norm.of(layer.output.LayerNorm, dtype),
        )


def _product(dtype: torch.dtype, *parts: nn.Linear) -> Product:
    """The parts' products as one, their results beside each other."""
    weight = torch.cat([part.weight.detach() for part in parts]).to(dtype)
    return Product.of(weight, torch.cat([part.bias.detach() for part in parts]).to(dtype), any_bits=True)


def _unseen(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token may be seen, -inf where it is padding: [B, 1, 1, L]. Every row has a token to see: [CLS]."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask == 0, -torch.inf)[:, None, None]
