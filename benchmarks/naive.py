"""The naive guard, a baseline: the same search as InferenceGuard (METHOD 5), with nothing kept from block to block.

Proposals come from transformers' `generate` on the whole text; cost model, reward model and critic read prompt and
response from their first token for every score; the gate reads them once more. No retries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inferenceguard.contracts import Conversation, Critic, Engine, Scorer
from inferenceguard.scorers.safe import ScoresPrefixes
from inferenceguard.text import visible_text

Tokens = tuple[int, ...]
# (prompt's ids, the rows' tokens, which row each proposal continues, tokens at most, number of the block)
#     -> the new tokens of each proposal
Propose = Callable[[Sequence[int], Sequence[Tokens], Sequence[int], int, int], list[Tokens]]


@dataclass(frozen=True)
class Answer:
    """What the naive guard found: "" where nothing passed."""

    text: str
    proposed_tokens: int


@dataclass(frozen=True)
class _Candidate:
    tokens: Tokens
    finished: bool
    score: float
    tie: float
    feasible: bool
    usable: bool


@dataclass(frozen=True)
class NaiveGuard:
    """One prompt at a time. The accounting is `increment` without discount: z = budget - score of the text so far."""

    engine: Engine  # for its chat template, its text and its end tokens; it reads nothing
    propose: Propose
    reward: Scorer
    cost: Scorer
    n_beams: int
    keep: int
    block_tokens: int
    max_new_tokens: int
    budget: float = 0.0  # d, cost units
    critic: Critic | None = None
    read: Callable[[Sequence[Sequence[int]]], Tensor] | None = None  # whole texts' ids -> last hidden states [B, H]
    threshold: float = 0.5
    penalty: float = 1e6

    def generate(self, prompt: Conversation) -> Answer:
        """propose -> charge -> score -> keep, until no row is open; then the gate."""
        ids = self.engine.encode(prompt)
        rows: list[Tokens] = [()]
        held: list[_Candidate] = []
        proposed = block = 0
        while rows:
            room = self.max_new_tokens - len(rows[0])  # open rows have read equally many tokens
            source = spread(len(rows), self.n_beams)
            new = self.propose(ids, rows, source, min(self.block_tokens, room), block)
            proposed += sum(len(tokens) for tokens in new)
            grown = [rows[parent] + tokens for parent, tokens in zip(source, new, strict=True)]
            kept = self._best([*self._scored(prompt, ids, grown), *held])
            held = [row for row in kept if row.finished]
            rows = [row.tokens for row in kept if not row.finished]
            block += 1
        return Answer(self._gate(prompt, held), proposed)

    def _scored(self, prompt: Conversation, ids: Sequence[int], rows: Sequence[Tokens]) -> list[_Candidate]:
        """Every row read from scratch: by the cost model, then by the reward model or the critic."""
        texts = [visible_text(self.engine, tokens) for tokens in rows]
        finished = [len(tokens) >= self.max_new_tokens or tokens[-1] in self.engine.end_tokens for tokens in rows]
        left = [self.budget - cost for cost in _scores(self.cost, prompt, texts, finished)]
        asked = [row for row in range(len(rows)) if left[row] >= 0]
        value, p_safe = [0.0] * len(rows), [math.nan] * len(rows)
        if self.critic is not None and self.read is not None:
            open_rows = [row for row in asked if not finished[row]]
            asked = [row for row in asked if finished[row]]
            if open_rows:
                latent = self.read([(*ids, *rows[row]) for row in open_rows])
                z = torch.tensor([left[row] for row in open_rows], dtype=torch.float64)
                used = torch.tensor([len(rows[row]) for row in open_rows], dtype=torch.float64) / self.max_new_tokens
                safe, expected = self.critic.predict(latent, z, used)
                for place, row in enumerate(open_rows):
                    p_safe[row], value[row] = float(safe[place]), float(expected[place])
        told = [texts[row] for row in asked], [finished[row] for row in asked]
        for row, reward in zip(asked, _scores(self.reward, prompt, *told), strict=True):
            value[row] = reward
        believed = [end or self.critic is None or p > self.threshold for end, p in zip(finished, p_safe, strict=True)]
        feasible = [left[row] >= 0 and believed[row] and math.isfinite(value[row]) for row in range(len(rows))]
        return [
            _Candidate(
                tokens, finished[row], value[row] if feasible[row] else -self.penalty,
                1 + p_safe[row] if math.isfinite(p_safe[row]) else math.tanh(left[row]),
                feasible[row], math.isfinite(left[row]) and math.isfinite(value[row]),
            )
            for row, tokens in enumerate(rows)
        ]  # fmt: skip

    def _best(self, rows: Sequence[_Candidate]) -> list[_Candidate]:
        """The K best feasible rows; open ones that are not feasible only where nothing is."""
        pool = [row for row in rows if row.feasible] or [row for row in rows if row.usable and not row.finished]
        return sorted(pool, key=lambda row: (-row.score, -row.tie))[: self.keep]

    def _gate(self, prompt: Conversation, held: Sequence[_Candidate]) -> str:
        """The text of the best finished row that is within the budget, read once more."""
        for row in sorted(held, key=lambda row: -row.score):
            text = visible_text(self.engine, row.tokens)
            if self.budget - _scores(self.cost, prompt, [text], [True])[0] >= 0:
                return text
        return ""


def _scores(
    scorer: Scorer, prompt: Conversation, texts: Sequence[str], finished: Sequence[bool] | None = None
) -> list[float]:
    if not texts:
        return []
    prompts = [prompt] * len(texts)
    if finished is not None and isinstance(scorer, ScoresPrefixes):
        return scorer.score_partial(prompts, texts, finished).tolist()
    return scorer.score(prompts, texts).tolist()


def spread(rows: int, n_beams: int) -> list[int]:
    """Which row each of N proposals continues: N over the rows, the rest to the first ones."""
    each, rest = divmod(n_beams, rows)
    return [row for row in range(rows) for _ in range(each + (row < rest))]


@dataclass(frozen=True)
class Generates:
    """Proposals by transformers' `generate`, which reads prompt and response anew in every block."""

    model: Any  # a causal LM of transformers with its own attention
    settings: dict[str, Any] = field(default_factory=dict)  # of `generate`: how it samples
    end_tokens: tuple[int, ...] = ()

    @torch.inference_mode()
    def __call__(
        self, prompt: Sequence[int], rows: Sequence[Tokens], source: Sequence[int], tokens: int, block: int
    ) -> list[Tokens]:
        each, rest = divmod(len(source), len(rows))
        together = not rest and self.settings.get("do_sample", False)  # `num_return_sequences` is for samples only
        texts = [[*prompt, *rows[row]] for row in (range(len(rows)) if together else source)]
        ids = torch.tensor(texts, device=self.model.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=0,
            num_return_sequences=each if together else 1, eos_token_id=list(self.end_tokens) or None, **self.settings,
        )  # fmt: skip
        return [self._ended(new) for new in out[:, ids.shape[1] :].tolist()]

    def _ended(self, tokens: Sequence[int]) -> Tokens:
        """Up to its end token: `generate` pads behind it."""
        ends = (at + 1 for at, token in enumerate(tokens) if token in self.end_tokens)
        return tuple(tokens[: next(ends, len(tokens))])

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states [B, H] float32 of texts of equal length, read from their first token."""
        ids = torch.tensor([list(text) for text in texts], device=self.model.device)
        hidden: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[:, -1].float()

    @torch.inference_mode()
    def cache(self, text: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of one text, per layer, as transformers keeps them."""
        ids = torch.tensor([list(text)], device=self.model.device)
        layers = self.model.base_model(input_ids=ids, use_cache=True).past_key_values.layers
        return [(layer.keys, layer.values) for layer in layers]
