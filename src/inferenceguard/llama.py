"""The forward pass of Llama-like bodies (Llama, Mistral, Qwen 2 and 3) without their modules' overhead.

One product makes queries, keys and values, one makes gate and up; rotation is applied to queries and keys at once. At
few rows a step is mostly the overhead of many small calls, and this makes about half as many (docs/performance.md).
The fused weights replace the modules' own, which become views of them, so no memory is used twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from inferenceguard.product import FusedPass, Product

BODIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")

# (layer, query [B, heads, T, D], key and value [B, kv heads, T, D], options) -> [B, heads, T, D]
Attend = Callable[[int, Tensor, Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer's attention is scaled by and may see."""

    scaling: float
    window: int | None  # sliding window: how many tokens a token sees, itself included
    softcap: float | None = None


@dataclass(frozen=True)
class _Norm:
    """x / rms(x) * weight, computed in float32."""

    weight: Tensor
    eps: float

    def __call__(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class _Layer:
    before: _Norm  # input_layernorm
    qkv: Product  # [(heads + 2 kv heads) * D, H]
    query_norm: _Norm | None  # Qwen 3
    key_norm: _Norm | None
    out: Product  # [H, heads * D]
    between: _Norm  # post_attention_layernorm
    gate_up: Product  # [2 * inner, H]
    down: Product  # [H, inner]
    activation: Callable[[Tensor], Tensor]
    options: AttentionOptions


class FusedLlama(FusedPass):
    """tokens [B, T] and positions [B or 1, T] -> post-norm hidden states [B, T, H]; attention is handed in."""

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__(body)
        parts, config = cast(Any, body), body.config
        self.embed: Any = parts.embed_tokens
        self.rotary: Any = parts.rotary_emb
        self.norm = _norm(parts.norm)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_width = int(parts.layers[0].self_attn.head_dim)
        self.layers = [_fused(layer, config) for layer in parts.layers[: config.num_hidden_layers]]

    @classmethod
    def of(cls, body: PreTrainedModel) -> FusedLlama | None:
        """None for a body of another kind. What this makes of it must still be compared with the body's own."""
        if type(body).__name__ not in BODIES:
            return None
        try:
            return cls(body)
        except (
            AttributeError,
            TypeError,
            ValueError,
            RuntimeError,
        ):  # parts that a Llama does not have: quantised, say
            return None

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        self.tell(input_ids=tokens, position_ids=positions)
        hidden = self.embed(tokens)
        cos, sin = self.rotary(hidden, position_ids=positions)
        half = sin.shape[-1] // 2
        # rotate_half(x) * sin = roll(x) * signed, where rolling by half of the width exchanges the halves
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)[:, :, None]
        cos = cos[:, :, None]  # [B, T, 1, D]
        for number, layer in enumerate(self.layers):
            seen = self._attention(number, layer, layer.before(hidden), cos, signed, attend)
            hidden = layer.out.plus(seen, hidden)
            gate, up = layer.gate_up(layer.between(hidden)).chunk(2, -1)
            hidden = layer.down.plus(layer.activation(gate) * up, hidden)
        return self.norm(hidden)

    def _attention(
        self, number: int, layer: _Layer, hidden: Tensor, cos: Tensor, signed: Tensor, attend: Attend
    ) -> Tensor:
        batch, count, _ = hidden.shape
        heads = layer.qkv(hidden).view(batch, count, -1, self.head_width)
        turned, value = heads.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = turned.split_with_sizes([self.heads, self.kv_heads], dim=2)
            turned = torch.cat((layer.query_norm(query), layer.key_norm(key)), 2)
        turned = torch.addcmul(turned * cos, turned.roll(self.head_width // 2, -1), signed)
        query, key = turned.split_with_sizes([self.heads, self.kv_heads], dim=2)
        seen = attend(number, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), layer.options)
        return seen.transpose(1, 2).reshape(batch, count, -1)


def _fused(layer: Any, config: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    if any(part.bias is not None for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise ValueError("biases in the MLP")
    biases = [part.bias for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    named = type(attention).__name__ == "MistralAttention"  # which reads its window from the configuration
    window = getattr(config, "sliding_window", None) if named else getattr(attention, "sliding_window", None)
    return _Layer(
        before=_norm(layer.input_layernorm),
        qkv=Product.of(
            _joined(attention.q_proj, attention.k_proj, attention.v_proj),
            None if biases[0] is None else torch.cat(biases).detach(),
        ),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        out=Product.of(_weight(attention.o_proj), attention.o_proj.bias),
        between=_norm(layer.post_attention_layernorm),
        gate_up=Product.of(_joined(mlp.gate_proj, mlp.up_proj)),
        down=Product.of(_weight(mlp.down_proj)),
        activation=mlp.act_fn,
        options=AttentionOptions(float(attention.scaling), window),
    )


def _joined(*parts: nn.Module) -> Tensor:
    """The parts' weights below each other as one tensor; the parts keep views of it."""
    weights = [_weight(part) for part in parts]
    whole = torch.cat(weights)
    start = 0
    for part, weight in zip(parts, weights, strict=True):
        part.weight = nn.Parameter(whole[start : start + len(weight)], requires_grad=False)
        start += len(weight)
    return whole


def _weight(part: Any) -> Tensor:
    if type(part) is not nn.Linear:
        raise TypeError(f"{type(part).__name__} is not a plain linear map")
    weight: Tensor = part.weight.detach()
    return weight


def _norm(module: Any) -> _Norm:
    if not type(module).__name__.endswith("RMSNorm"):
        raise TypeError(f"{type(module).__name__} is not an RMS norm")
    return _Norm(module.weight.detach(), float(module.variance_epsilon))
