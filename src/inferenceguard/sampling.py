"""Draws next tokens from logits with one uniform number per row, so that a row's draw depends on nothing around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inferenceguard.contracts import Sampling

_CHUNK = 256  # two-level search of the cumulative distribution: V / 256 chunk sums, then one chunk
# On CPU, rows are drawn a few at a time: 8 rows of 49,152 floats stay in the second-level cache and in memory that
# malloc already holds. All 128 at once took six times as long (docs/performance.md).
_CELLS = 8 * 49152
_NUCLEUS = 1024  # tokens that are ranked before all are


def draw_tokens(
    logits: Tensor, uniform: Tensor, sampling: Sampling | Sequence[Sampling], logit_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Samples one token per row by inverse CDF. (token [B] int64, its log-probability under `logits` [B] float64, nats)

    logits [B, V] are the model's own, in any precision; temperature, top-k, top-p and `logit_bias` [B, V] shape what is
    drawn but not the log-probability. uniform [B] float64 in [0, 1). Temperature 0 takes the largest logit. `sampling`
    is one for all rows, or B of them.
    """
    if not isinstance(sampling, Sampling):
        return _draw_each(logits, uniform, sampling, logit_bias)
    step = max(1, _CELLS // logits.shape[1] if logits.device.type == "cpu" else len(logits))
    parts = [
        _draw(logits[at : at + step], uniform[at : at + step], sampling, None if logit_bias is None else
              logit_bias[at : at + step])
        for at in range(0, len(logits), step)
    ]  # fmt: skip
    tokens, log_prob = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(log_prob)


def _draw_each(
    logits: Tensor, uniform: Tensor, samplings: Sequence[Sampling], logit_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of equal sampling together: what a row draws does not depend on the rows beside it."""
    token, log_prob = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits), dtype=torch.float64)
    token, log_prob = token.to(logits.device), log_prob.to(logits.device)
    for sampling in dict.fromkeys(samplings):
        rows = torch.tensor([row for row, own in enumerate(samplings) if own == sampling])
        bias = None if logit_bias is None else logit_bias[rows]
        token[rows], log_prob[rows] = draw_tokens(logits[rows], uniform[rows], sampling, bias)
    return token, log_prob


def _draw(logits: Tensor, uniform: Tensor, sampling: Sampling, logit_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    shaped = logits if logit_bias is None else logits + logit_bias
    if sampling.temperature == 0:
        token = shaped.argmax(-1)
    elif sampling.top_k or sampling.top_p < 1:
        token = _draw_truncated(shaped / sampling.temperature, uniform, sampling)
    else:
        token = _draw_full(shaped / sampling.temperature, uniform)
    return token, _log_prob(logits, token)


def uniforms(seed: int, draw: int, rows: int, tokens: int) -> Tensor:
    """[rows, tokens] float64 in [0, 1): row j of a prompt in draw k is a function of (seed, k, j) alone.

    A counter-based generator (Philox, Salmon et al. 2011) keyed by seed and draw; a row's numbers do not depend on how
    many rows there are.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, draw & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random((rows, tokens)))


def _draw_full(logits: Tensor, uniform: Tensor) -> Tensor:
    _, weights, sums = _weights(logits)
    sums = sums.cumsum(-1)
    target = uniform.to(sums.device) * sums[:, -1]
    chunk = torch.searchsorted(sums, target[:, None], right=True)[:, 0].clamp(max=sums.shape[1] - 1)
    before = torch.where(chunk > 0, sums.gather(1, (chunk - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = weights[torch.arange(len(logits), device=logits.device), chunk].double()
    within = torch.searchsorted(inside.cumsum(-1), (target - before)[:, None], right=True)[:, 0]
    # Rounding can put the target past a chunk's end, on a token of weight 0: take the last one that has any.
    last = _CHUNK - 1 - (inside > 0).flip(-1).int().argmax(-1)
    return chunk * _CHUNK + torch.minimum(within, last)


def _log_prob(logits: Tensor, token: Tensor) -> Tensor:
    largest, _, sums = _weights(logits)
    return logits.gather(1, token[:, None])[:, 0].double() - largest[:, 0].double() - sums.sum(-1).log()


def _weights(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(largest logit [B, 1], exp(logit - largest) in chunks [B, V / 256, 256], sum of each chunk [B, V / 256] float64).

    Summed in two levels, because one sum over V is split between threads in a way that depends on B: a row's bits
    would depend on the batch around it. A chunk's 256 terms are summed in float32, the chunks in float64.
    """
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp_()
    if missing := -logits.shape[1] % _CHUNK:
        weights = torch.nn.functional.pad(weights, (0, missing))
    chunks = weights.view(len(logits), -1, _CHUNK)
    return largest, chunks, chunks.sum(-1).double()


def _draw_truncated(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Top-k first, then the smallest set of the most likely tokens whose probability reaches top_p."""
    size = logits.shape[1]
    if sampling.top_k and sampling.top_k < size:
        values, tokens = logits.topk(sampling.top_k, dim=-1)
        return _draw_ranked(torch.softmax(values.double(), -1), tokens, uniform, sampling.top_p)
    # The nucleus seldom has more than a thousand tokens; sorting all 49,152 took 25 times as long as finding those.
    largest, _, sums = _weights(logits)
    total = sums.sum(-1, keepdim=True)
    values, tokens = logits.topk(min(_NUCLEUS, size), dim=-1)
    weights = torch.exp(values.double() - largest) / total
    drawn = _draw_ranked(weights, tokens, uniform, sampling.top_p)
    wide = (weights.sum(-1) < sampling.top_p).nonzero()[:, 0]
    if len(wide) and size > _NUCLEUS:
        values, tokens = torch.sort(logits[wide], stable=True, dim=-1, descending=True)
        weights = torch.softmax(values.double(), -1)
        drawn[wide] = _draw_ranked(weights, tokens, uniform[wide.to(uniform.device)], sampling.top_p)
    return drawn


def _draw_ranked(weights: Tensor, tokens: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Draws from `tokens` [B, n], the most likely first, among those whose predecessors' weights are below top_p."""
    cumulative = weights.cumsum(-1)
    weights = torch.where(cumulative - weights < top_p, weights, 0.0)
    cumulative = weights.cumsum(-1)
    target = (uniform.to(cumulative.device) * cumulative[:, -1])[:, None]
    rank = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return tokens.gather(1, torch.minimum(rank, last)[:, None])[:, 0]


def is_finite_or_banned(logit_bias: Tensor) -> bool:
    """Whether a bias is usable: numbers or -inf (a banned token), never NaN or +inf."""
    return not bool((torch.isnan(logit_bias) | (logit_bias == math.inf)).any())
