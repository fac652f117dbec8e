"""What third parties test their own engines, scorers and strategies with.

An exact toy world: `ToyEngine` is a small token MDP whose responses can be enumerated, with `ToyReward`, `ToyCost` and
an exact `ToyCritic`; `FaultyScorer` and `FaultyEngine` break on purpose. And the contracts as code: `check_engine`,
`check_scorer` and `check_strategy` raise AssertionError with what is wrong. Needs no test framework.
"""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inferenceguard.beams import Beams, empty_beams, join
from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import (
    OUTCOMES,
    Conversation,
    EditsLatents,
    Engine,
    Message,
    MixesDraws,
    MixesSampling,
    Models,
    RanksTokens,
    ReadsLatents,
    Sampling,
    Scorer,
    ScoresIncrementally,
    SearchResult,
    Strategy,
    conversation,
    render_conversation,
    text_fingerprint,
)
from inferenceguard.errors import EngineFault, InvalidArgument
from inferenceguard.objectives import augmented

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# The toy world ------------------------------------------------------------------------------------------------------

_TURNS = ("system", "user", "assistant")
_CODE_BITS = 24


class ToyEngine:
    """An exact token MDP: a fixed random next-token distribution whose responses can be enumerated.

        p(token | prompt, y) = softmax(table[h(prompt, y)]),   h a hash of all tokens so far into `contexts` states

    Token 0 ends a response, tokens 1 .. W are the `pieces`, three open turns, sixteen spell other text (two a
    byte); responses draw only ends and pieces. A piece that starts with a space starts a word; one that does not goes
    on with the word, and one of bytes may be a part of a character: a block can end inside either, as with a real LLM.

    `Beams.latent` [B, 24 + 1 + horizon * (W + 1)] encodes the state exactly: the prompt's hash in bits, the length over
    `horizon`, and the tokens one-hot by position. The engine's own state repeats the tokens, so that a search which
    moves rows without their states is caught. `latents=False` makes an engine without latents.
    """

    name = "toy"
    end_tokens: tuple[int, ...] = (0,)
    mixes_draws = True

    def __init__(
        self,
        seed: int = 0,
        *,
        pieces: Sequence[str | bytes] = (" kind", " plain", " rude", "r"),
        contexts: int = 32,
        end_logit: float = 0.0,
        spread: float = 1.0,
        context: int = 4096,
        horizon: int = 8,
        latents: bool = True,
    ) -> None:
        """`end_logit` is added to the end token's logit; `spread` is the standard deviation of the logits, nats."""
        self.pieces = tuple(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
        if not self.pieces or not all(self.pieces) or len(set(self.pieces)) < len(self.pieces):
            raise InvalidArgument("pieces", "different texts that are not empty", pieces)
        self.seed, self.contexts, self.context, self.horizon = seed, contexts, context, horizon
        self.choices = 1 + len(self.pieces)
        self.vocabulary = self.choices + len(_TURNS) + 16
        self.special_texts = ("<end>", *(f"<{role}>" for role in _TURNS))
        self.fingerprint = text_fingerprint("toy", repr((seed, self.pieces, contexts, end_logit, spread)))
        if latents:
            self.latent_width = _CODE_BITS + 1 + horizon * self.choices
        logits = np.random.Generator(np.random.Philox(key=seed)).normal(0.0, spread, (contexts, self.choices))
        logits[:, 0] += end_logit
        width = _CODE_BITS + 1 + horizon * self.choices
        self.edit_weight: Floats = np.random.Generator(np.random.Philox(key=seed + 1)).normal(
            0.0, 1.0, (width, self.choices)
        )
        self._log_prob: Floats = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        self._longest_first = sorted(range(len(self.pieces)), key=lambda i: -len(self.pieces[i]))

    def encode(self, messages: Conversation) -> list[int]:
        """[turn, content, end] per message, then the turn of the assistant."""
        ids: list[int] = []
        for message in messages:
            ids += [self._turn(message.role), *self.spell(message.content), 0]
        return [*ids, self._turn("assistant")]

    def spell(self, text: str) -> list[int]:
        """The token ids of a text: pieces where they fit (longest first), else two tokens a byte."""
        data, ids, at = b" " + text.encode("utf-8", "replace"), [], 0
        nibble = self.choices + len(_TURNS)
        while at < len(data):
            piece = next((i for i in self._longest_first if data.startswith(self.pieces[i], at)), None)
            if piece is None:
                ids += [nibble + data[at] // 16, nibble + data[at] % 16]
                at += 1
            else:
                ids.append(1 + piece)
                at += len(self.pieces[piece])
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        data, high = bytearray(), None
        nibble = self.choices + len(_TURNS)
        for token in token_ids:
            if 0 < token < self.choices:
                data += self.pieces[token - 1]
            elif token >= nibble and high is None:
                high = token - nibble
            elif token >= nibble and high is not None:
                data.append(16 * high + token - nibble)
                high = None
        if high is not None:
            data += b"\xff"  # half a byte is read as a broken character
        return data.removeprefix(b" ").decode("utf-8", "replace")

    def begin(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Beams:
        if not prompts or len(prompts) != len(seeds):
            raise InvalidArgument("seeds", "one per prompt, of at least one prompt", (len(prompts), len(seeds)))
        for prompt in prompts:
            if not 0 < len(prompt) < self.context:
                raise InvalidArgument("prompt", f"of 1 to {self.context - 1} tokens", len(prompt))
        codes = np.array([_prompt_code(prompt) for prompt in prompts], dtype=np.int64)
        state = _ToyState(((),) * len(prompts), codes, codes % self.contexts)
        return empty_beams(len(prompts), seeds, self._latent(state), {self.name: state})

    def extend(
        self, beams: Beams, tokens: int, sampling: Sampling, draw: int | Tensor, logit_bias: Tensor | None
    ) -> Beams:
        state = self._state(beams)
        if tokens < 1 or bool(beams.finished.any()):
            raise InvalidArgument("extend", "asked for >= 1 token of open rows", (tokens, beams.finished.tolist()))
        if logit_bias is not None and tuple(logit_bias.shape) != (len(beams), self.vocabulary):
            raise InvalidArgument("logit_bias", f"[{len(beams)}, {self.vocabulary}]", tuple(logit_bias.shape))
        bias = None if logit_bias is None else logit_bias[:, : self.choices].to(torch.float64).numpy()
        row = _rows_within_prompt(beams.prompt_index.numpy())
        uniform = _uniform(beams.seed.numpy(), draw if isinstance(draw, int) else draw.numpy(), row, tokens)
        context, log_prob = state.context.copy(), np.zeros(len(beams))
        grown, going = [list(ids) for ids in beams.token_ids], np.arange(len(beams))
        for step in range(tokens):
            at = context[going]
            chances = self._chances(at, sampling, None if bias is None else bias[going])
            token = _inverse_cdf(chances, uniform[going, step])
            log_prob[going] += self._log_prob[at, token]
            context[going] = self._next(at, token)
            for index, drawn in zip(going.tolist(), token.tolist(), strict=True):
                grown[index].append(drawn)
            going = going[token != 0]
            if not len(going):
                break
        token_ids = tuple(tuple(ids) for ids in grown)
        state = _ToyState(token_ids, state.codes, context)
        return self._grown(beams, state, log_prob)

    def rank(self, beams: Beams, count: int) -> tuple[Tensor, Tensor, Tensor]:
        context, count = self._state(beams).context, min(count, self.vocabulary)
        logits = np.full((len(beams), self.vocabulary), -math.inf)
        logits[:, : self.choices] = self._log_prob[context]
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        chosen = torch.from_numpy(np.take_along_axis(logits, ids, axis=1))
        return torch.from_numpy(ids), chosen, chosen.clone()

    def append(self, beams: Beams, tokens: Tensor) -> Beams:
        state, token = self._state(beams), tokens.cpu().numpy()
        if bool(beams.finished.any()) or not ((token >= 0) & (token < self.choices)).all():
            raise InvalidArgument("tokens", "ends or pieces, for open rows", tokens.tolist())
        grown = tuple((*ids, new) for ids, new in zip(beams.token_ids, token.tolist(), strict=True))
        after = _ToyState(grown, state.codes, self._next(state.context, token))
        return self._grown(beams, after, self._log_prob[state.context, token])

    def logits(self, latent: Tensor) -> Tensor:
        """Exact where the latent is; an edit e adds e @ `edit_weight` [H, choices], as a linear head would."""
        states = [self.read_latent(row) for row in latent]
        codes = np.array([code for code, _ in states], dtype=np.int64)
        context = codes % self.contexts
        for row, (_, tokens) in enumerate(states):
            for token in tokens:
                context[row : row + 1] = self._next(context[row : row + 1], np.array([token]))
        exact = self._latent(_ToyState(tuple(tokens for _, tokens in states), codes, context)).double()
        logits = torch.full((len(latent), self.vocabulary), -math.inf, dtype=torch.float64)
        moved = (latent.double() - exact) @ torch.from_numpy(self.edit_weight)
        logits[:, : self.choices] = torch.from_numpy(self._log_prob[context]) + moved
        return logits

    def _grown(self, beams: Beams, state: _ToyState, log_prob: Floats) -> Beams:
        return replace(
            beams,
            token_ids=state.tokens,
            log_prob=beams.log_prob + torch.from_numpy(log_prob),
            latent=self._latent(state),
            finished=torch.tensor([ids[-1] == 0 for ids in state.tokens], dtype=torch.bool),
            parent=torch.arange(len(beams)),
            states={**beams.states, self.name: state},
        )

    def enumerate(
        self, prompt: Sequence[int], max_tokens: int, *, after: Sequence[int] = (), sampling: Sampling | None = None
    ) -> list[tuple[tuple[int, ...], float]]:
        """All responses that can follow `after`, each with its log-probability given `after`: they sum to one.

        A response ends at an end token or at `max_tokens` (of the whole response). `sampling` None is the base model.
        """
        context = _prompt_code(prompt) % self.contexts
        for token in after:
            context = int(self._next(np.array([context]), np.array([token]))[0])
        found: list[tuple[tuple[int, ...], float]] = []
        waiting = [(tuple(after), context, 0.0)]
        while waiting:
            ids, context, log_prob = waiting.pop()
            if len(ids) >= max_tokens or (ids and ids[-1] == 0):
                found.append((ids, log_prob))
                continue
            chances = self._chances(np.array([context]), sampling or Sampling(), None)[0]
            for token in np.flatnonzero(chances > 0)[::-1].tolist():
                following = int(self._next(np.array([context]), np.array([token]))[0])
                waiting.append(((*ids, token), following, log_prob + math.log(chances[token])))
        return found

    def log_prob(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """The exact log-probability of a (partial) response under the base model, nats."""
        context, total = np.array([_prompt_code(prompt) % self.contexts]), 0.0
        for token in response:
            total += float(self._log_prob[context[0], token])
            context = self._next(context, np.array([token]))
        return total

    def read_latent(self, latent: Tensor) -> tuple[int, tuple[int, ...]]:
        """The hash of the prompt and the response's tokens, from one row's latent [H]."""
        bits = (latent[:_CODE_BITS] > 0.5).tolist()  # so that a latent which was edited a little is still read
        length = float(latent[_CODE_BITS]) * self.horizon
        if length > self.horizon + 0.75:
            raise InvalidArgument("horizon", f">= the {round(length)} tokens of the response", self.horizon)
        slots = latent[_CODE_BITS + 1 :].reshape(self.horizon, self.choices)
        used = int((slots.amax(dim=1) > 0.5).sum())
        return sum(1 << i for i, bit in enumerate(bits) if bit), tuple(slots[:used].argmax(dim=1).tolist())

    def _turn(self, role: str) -> int:
        return self.choices + _TURNS.index(role)

    def _next(self, context: Integers, token: Integers) -> Integers:
        following: Integers = (context * 5 + token * 7 + 1) % self.contexts
        return following

    def _chances(self, context: Integers, sampling: Sampling, bias: Floats | None) -> Floats:
        """The sampled distribution [B, choices]: bias, then temperature, then top-k, then top-p."""
        logits = self._log_prob[context] if bias is None else self._log_prob[context] + bias
        if np.isnan(logits).any() or not (logits.max(axis=1) > -math.inf).all():
            raise EngineFault("the logit bias leaves no token to draw.")
        rows = np.arange(len(logits))[:, None]
        if sampling.temperature == 0:
            chances: Floats = np.zeros_like(logits)
            chances[rows[:, 0], logits.argmax(axis=1)] = 1.0
            return chances
        logits = logits - logits.max(axis=1, keepdims=True)
        chances = np.exp(logits / sampling.temperature)
        chances /= chances.sum(axis=1, keepdims=True)
        if 0 < sampling.top_k < self.choices or sampling.top_p < 1:
            order = np.argsort(-chances, axis=1, kind="stable")
            ranked = chances[rows, order]
            if sampling.top_k:
                ranked[:, sampling.top_k :] = 0
            ranked /= ranked.sum(axis=1, keepdims=True)
            ranked[np.cumsum(ranked, axis=1) - ranked >= sampling.top_p] = 0  # the first that reaches top_p stays
            chances[rows, order] = ranked / ranked.sum(axis=1, keepdims=True)
        return chances

    def _latent(self, state: _ToyState) -> Tensor:
        if not isinstance(self, ReadsLatents):
            return torch.zeros(len(state.tokens), 0)
        latent = np.zeros((len(state.tokens), self.latent_width), dtype=np.float32)
        latent[:, :_CODE_BITS] = state.codes[:, None] >> np.arange(_CODE_BITS) & 1
        for row, ids in enumerate(state.tokens):
            latent[row, _CODE_BITS] = len(ids) / self.horizon
            for slot, token in enumerate(ids[-self.horizon :]):
                latent[row, _CODE_BITS + 1 + slot * self.choices + token] = 1
        return torch.from_numpy(latent)

    def _state(self, beams: Beams) -> _ToyState:
        state = beams.states.get(self.name)
        _require(isinstance(state, _ToyState), "the rows came to the engine without the engine's own state")
        assert isinstance(state, _ToyState)
        _require(
            state.tokens == beams.token_ids,
            "the engine's state does not belong to these rows: use Beams.take, the one method that moves both",
        )
        codes: dict[int, int] = {}
        for prompt, code in zip(beams.prompt_index.tolist(), state.codes.tolist(), strict=True):
            _require(codes.setdefault(prompt, code) == code, f"rows of different prompts share prompt_index {prompt}")
        return state


@dataclass(frozen=True)
class _ToyState:
    """What the toy engine keeps per row: a stand-in for the KV cache that knows which row it belongs to."""

    tokens: tuple[tuple[int, ...], ...]  # B ragged
    codes: Integers  # [B] hash of the prompt
    context: Integers  # [B] row of the table of distributions

    def take(self, rows: Tensor) -> _ToyState:
        index = rows.numpy()
        return _ToyState(tuple(self.tokens[i] for i in index.tolist()), self.codes[index], self.context[index])

    def join(self, other: _ToyState) -> _ToyState:
        codes, context = (self.codes, other.codes), (self.context, other.context)
        return _ToyState(self.tokens + other.tokens, np.concatenate(codes), np.concatenate(context))


class _ToyScorer:
    """The sum of the words' scores, each a multiple of 1/4 and so exact in binary; the empty response scores 0.

    A word's score is that of `table`, else a hash of (seed, prompt, word) in [low, high]; `of_prompt=False` leaves the
    prompt out. Reads whole words: a response that ends inside a word scores otherwise than its completion.
    """

    kind = "toy"

    def __init__(
        self,
        seed: int = 0,
        *,
        table: Mapping[str, float] | None = None,
        low: float = -1.0,
        high: float = 1.0,
        of_prompt: bool = True,
    ) -> None:
        self.name = f"toy-{self.kind}"
        self.seed, self.table, self.low, self.high, self.of_prompt = seed, dict(table or {}), low, high, of_prompt
        self.fingerprint = text_fingerprint(self.name, repr((seed, sorted(self.table.items()), low, high, of_prompt)))
        self._word = lru_cache(maxsize=4096)(self._hashed)

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        pairs = zip(prompts, responses, strict=True)
        return torch.tensor([self.exact(prompt, response) for prompt, response in pairs], dtype=torch.float64)

    def exact(self, prompt: Conversation, response: str) -> float:
        """The score of one response; a plain Python number."""
        key = render_conversation(prompt) if self.of_prompt else ""
        return sum(self.table[word] if word in self.table else self._word(key, word) for word in response.split())

    def _hashed(self, prompt: str, word: str) -> float:
        steps = int(4 * (self.high - self.low)) + 1
        digest = zlib.crc32(f"{self.kind}\0{self.seed}\0{prompt}\0{word}".encode("utf-8", "replace"))
        return self.low + (digest % steps) / 4


class ToyReward(_ToyScorer):
    """An exact reward."""

    kind = "reward"


class ToyCost(_ToyScorer):
    """An exact safety cost: positive is unsafe."""

    kind = "cost"


@dataclass(frozen=True)
class _Continuation:
    """One way in which a partial response can end."""

    chance: float  # given the partial response
    charges: tuple[tuple[float, int], ...]  # (cost, tokens) of each block to come, increment accounting
    reward: float  # of the finished response

    def left(self, budget: float, discount: float) -> float:
        """z_T from z, in plain arithmetic: z -> z / gamma^m - c / gamma."""
        for cost, tokens in self.charges:
            budget = budget / discount**tokens - cost / discount
        return budget

    def needs(self, discount: float) -> float:
        """The least z from which it is safe."""
        return -self.left(0.0, discount) * discount ** sum(tokens for _, tokens in self.charges)


def exact_p_safe(
    engine: ToyEngine,
    prompt: Conversation,
    cost: Scorer,
    budget: SafetyBudget,
    max_tokens: int,
    *,
    after: Sequence[int] = (),
    left: float | None = None,
    block_tokens: int = 1,
) -> float:
    """P(z_T >= 0) by enumeration of what can follow `after`, with `left` (z; default d) in hand.

    Increment accounting, charged every `block_tokens` tokens; with discount 1 the blocks make no difference.
    """
    ways = _continuations(engine, prompt, cost, cost, max_tokens, tuple(after), block_tokens)
    return _p_safe_and_value(ways, budget.limit if left is None else left, budget.discount)[0]


def exact_value(
    engine: ToyEngine,
    prompt: Conversation,
    reward: Scorer,
    cost: Scorer,
    budget: SafetyBudget,
    max_tokens: int,
    *,
    after: Sequence[int] = (),
    left: float | None = None,
    block_tokens: int = 1,
) -> float:
    """E[r | safe] by enumeration, as `exact_p_safe`; 0 where nothing safe can follow."""
    ways = _continuations(engine, prompt, reward, cost, max_tokens, tuple(after), block_tokens)
    return _p_safe_and_value(ways, budget.limit if left is None else left, budget.discount)[1]


def _continuations(
    engine: ToyEngine,
    prompt: Conversation,
    reward: Scorer,
    cost: Scorer,
    max_tokens: int,
    after: tuple[int, ...],
    block_tokens: int,
) -> tuple[_Continuation, ...]:
    if after and after[-1] in engine.end_tokens:
        ways = [(after, 0.0)]
    else:
        ways = engine.enumerate(engine.encode(prompt), max_tokens, after=after)
    ends = [sorted({*range(len(after) + block_tokens, len(ids), block_tokens), len(ids)}) for ids, _ in ways]
    texts = {after: engine.decode(after)}
    for (ids, _), stops in zip(ways, ends, strict=True):
        texts |= {ids[:stop]: engine.decode(ids[:stop]) for stop in stops}
    costs = dict(zip(texts, cost.score([prompt] * len(texts), list(texts.values())).tolist(), strict=True))
    rewards = reward.score([prompt] * len(ways), [texts[ids] for ids, _ in ways]).tolist()
    found = []
    for (ids, log_prob), stops, worth in zip(ways, ends, rewards, strict=True):
        starts = [len(after), *stops[:-1]]
        charges = [(costs[ids[:b]] - costs[ids[:a]], b - a) for a, b in zip(starts, stops, strict=True) if b > a]
        found.append(_Continuation(math.exp(log_prob), tuple(charges), worth))
    return tuple(found)


def _p_safe_and_value(ways: Iterable[_Continuation], left: float, discount: float) -> tuple[float, float]:
    safe = [(way.chance, way.reward) for way in ways if way.left(left, discount) >= 0]
    p_safe = math.fsum(chance for chance, _ in safe)
    return min(1.0, p_safe), math.fsum(chance * worth for chance, worth in safe) / p_safe if p_safe > 0 else 0.0


class ToyCritic:
    """The exact critic of a ToyEngine: enumerates what can still happen, under increment accounting.

    Knows only the `prompts` that it was given. Responses must fit the engine's `horizon`.
    """

    name = "toy-critic"

    def __init__(
        self,
        engine: ToyEngine,
        prompts: Sequence[Conversation],
        reward: Scorer,
        cost: Scorer,
        max_tokens: int,
        *,
        discount: float = 1.0,
        block_tokens: int = 1,
    ) -> None:
        self.engine, self.reward, self.cost = engine, reward, cost
        self.max_tokens, self.discount, self.block_tokens = max_tokens, discount, block_tokens
        self.engine_fingerprint = engine.fingerprint
        self.fingerprint = text_fingerprint(
            self.name, engine.fingerprint, reward.fingerprint, cost.fingerprint, repr((max_tokens, discount))
        )
        self._prompts = {_prompt_code(engine.encode(prompt)): prompt for prompt in prompts}
        self._ways: dict[tuple[int, tuple[int, ...]], tuple[_Continuation, ...]] = {}

    def predict(self, latent: Tensor, budget: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for row, left, used in zip(latent, budget.tolist(), progress.tolist(), strict=True):
            code, tokens = self.engine.read_latent(row)
            _require(
                abs(used * self.max_tokens - len(tokens)) < 1e-3,
                f"progress {used} is not {len(tokens)} tokens of {self.max_tokens}: the critic reads another row's",
            )
            found.append(_p_safe_and_value(self._following(code, tokens), left, self.discount))
        pairs = torch.tensor(found, dtype=torch.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def at_most(self, latent: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """1, and the largest value of what is safe at some z: more budget makes more continuations safe, in order."""
        found = []
        for row in latent:
            following = self._following(*self.engine.read_latent(row))
            ways = sorted(following, key=lambda way: way.needs(self.discount))
            chances = itertools.accumulate(way.chance for way in ways)
            worth = itertools.accumulate(way.chance * way.reward for way in ways)
            means = (total / chance for total, chance in zip(worth, chances, strict=True) if chance > 0)
            found.append(max(means, default=0.0))
        value = torch.tensor(found, dtype=torch.float64)
        return torch.ones_like(value), value.clamp(min=0) + 1e-9

    def _following(self, code: int, tokens: tuple[int, ...]) -> tuple[_Continuation, ...]:
        if code not in self._prompts:
            raise InvalidArgument("prompts", "all that are searched", f"a prompt with hash {code}")
        if (code, tokens) not in self._ways:
            self._ways[code, tokens] = _continuations(
                self.engine,
                self._prompts[code],
                self.reward,
                self.cost,
                self.max_tokens,
                tokens,
                self.block_tokens,
            )
        return self._ways[code, tokens]


class ToyValue:
    """A value model that is linear in a toy engine's latent: E[outcome k | h] = h @ weight[:, k]; weight [H, 3]."""

    name = "toy-value"

    def __init__(self, engine: ToyEngine, seed: int = 0, *, scale: float = 0.01) -> None:
        drawn = np.random.Generator(np.random.Philox(key=seed)).normal(0.0, scale, (engine.latent_width, len(OUTCOMES)))
        self.weight = torch.from_numpy(drawn)
        self.engine_fingerprint = engine.fingerprint
        self.fingerprint = text_fingerprint(self.name, engine.fingerprint, repr((seed, scale)))

    def outcomes(self, latent: Tensor) -> Tensor:
        return latent.double() @ self.weight


class FaultyScorer:
    """A scorer that fails at random: call number i fails, and how, by a hash of (seed, i).

    Rates in [0, 1] of calls that raise, hang for `seconds`, hold a NaN, hold an infinity of either sign, or return
    something of the wrong shape or type. `injected` counts what it did.
    """

    def __init__(
        self,
        scorer: Scorer,
        seed: int = 0,
        *,
        raises: float = 0.0,
        hangs: float = 0.0,
        nans: float = 0.0,
        infs: float = 0.0,
        shapes: float = 0.0,
        seconds: float = 5.0,
    ) -> None:
        rates = {"raises": raises, "hangs": hangs, "nans": nans, "infs": infs, "shapes": shapes}
        if min(rates.values()) < 0 or sum(rates.values()) > 1:
            raise InvalidArgument("rates", ">= 0 and at most 1 together", rates)
        self.name, self.fingerprint = f"faulty-{scorer.name}", text_fingerprint("faulty", scorer.fingerprint)
        self.scorer, self.seed, self.rates, self.seconds = scorer, seed, rates, seconds
        self.injected: Counter[str] = Counter()
        self._calls = itertools.count()

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        chance, where, how = _uniform(np.array([self.seed]), next(self._calls), np.array([0]), 3)[0].tolist()
        fault = _pick(self.rates, chance)
        scores = self.scorer.score(prompts, responses)
        if fault is None or not len(scores):
            return scores
        self.injected[fault] += 1
        if fault == "raises":
            raise RuntimeError("this scorer fails on purpose")
        if fault == "hangs":
            time.sleep(self.seconds)
            return scores
        scores = scores.clone()
        if fault == "shapes":
            wrong: list[Any] = [scores[1:], torch.cat([scores, scores]), scores[:, None], None, "0.0"]
            return wrong[int(how * len(wrong))]  # type: ignore[no-any-return]
        scores[int(where * len(scores))] = math.nan if fault == "nans" else math.inf if how < 0.5 else -math.inf
        return scores


class FaultyEngine:
    """An engine whose draw number i raises by a hash of (seed, i), at the rate `raises`. Else it is `engine`."""

    def __init__(self, engine: Engine, seed: int = 0, *, raises: float = 0.0) -> None:
        self.name, self.fingerprint = engine.name, engine.fingerprint
        self.context, self.vocabulary, self.end_tokens = engine.context, engine.vocabulary, engine.end_tokens
        self.encode, self.decode, self.begin = engine.encode, engine.decode, engine.begin
        if isinstance(engine, ReadsLatents):
            self.latent_width = engine.latent_width
        self.engine, self.seed, self.raises = engine, seed, raises
        self.injected = 0
        self._calls = itertools.count()

    def extend(self, beams: Beams, tokens: int, sampling: Sampling, draw: int, logit_bias: Tensor | None) -> Beams:
        if float(_uniform(np.array([self.seed]), next(self._calls), np.array([0]), 1)[0, 0]) < self.raises:
            self.injected += 1
            raise RuntimeError("this engine fails on purpose")
        return self.engine.extend(beams, tokens, sampling, draw, logit_bias)


def _prompt_code(prompt: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(prompt, dtype=np.int64).tobytes()) & ((1 << _CODE_BITS) - 1)


def _rows_within_prompt(prompt_index: Integers) -> Integers:
    """j of each row: how many rows of the same prompt stand before it."""
    seen: Counter[int] = Counter()
    rows = np.empty(len(prompt_index), dtype=np.int64)
    for index, prompt in enumerate(prompt_index.tolist()):
        rows[index] = seen[prompt]
        seen[prompt] += 1
    return rows


def _uniform(seeds: Integers, draw: int | Integers, rows: Integers, count: int) -> Floats:
    """[B, count] numbers in [0, 1): number t of row j is a function of (seed, draw, j, t) and of nothing else.

    A chain of SplitMix64's finaliser (Steele, Lea, Flood 2014): one vectorised pass instead of a generator per row.
    """
    with np.errstate(over="ignore"):
        words = _mixed(seeds.astype(np.uint64))
        words = _mixed(words + np.asarray(draw).astype(np.uint64))
        words = _mixed(words + rows.astype(np.uint64))
        grid = _mixed(words[:, None] + np.arange(1, count + 1, dtype=np.uint64)[None, :])
    uniform: Floats = (grid >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _inverse_cdf(chances: Floats, uniform: Floats) -> Integers:
    """The first token whose cumulative probability exceeds u: never one of probability 0."""
    cumulative = np.cumsum(chances, axis=1)
    token: Integers = (cumulative > (uniform * cumulative[:, -1])[:, None]).argmax(axis=1)
    return token


def _pick(rates: Mapping[str, float], chance: float) -> str | None:
    for name, rate in rates.items():
        if chance < rate:
            return name
        chance -= rate
    return None


def _require(condition: bool, message: str) -> None:
    """`assert` that python -O does not remove: these checks are the product here."""
    if not condition:
        raise AssertionError(message)


# The contracts as code ----------------------------------------------------------------------------------------------

CONTROL_TEXTS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<|user|>", "<|assistant|>", "<|end|>"),
)
_GREEDY = Sampling(temperature=0.0)
_PROMPTS = ("hi", "Tell me a story about two rivers, please.", "Wie geht's? 你好", "1 + 1 =")


def check_engine(
    engine: Engine,
    *,
    prompts: Sequence[str] = _PROMPTS,
    tokens: int = 4,
    control_texts: Iterable[str] = (),
    tolerance: float = 1e-4,
) -> None:
    """Whether an engine keeps the contract of `Engine`, and of the capabilities that it has (`ReadsLatents`,
    `RanksTokens`, `EditsLatents`). Raises AssertionError if not.

    Draws some dozens of blocks of `tokens` tokens. `control_texts` are texts that stand for control tokens; the usual
    ones, and those of `engine.special_texts` and `engine.tokenizer`, are tried anyway. `tolerance` in nats, and in the
    latents' own units.
    """
    conversations = [conversation(prompt) for prompt in prompts]
    _check_engine_attributes(engine)
    _check_encoding(engine, conversations)
    _check_no_injection(engine, control_texts)
    encoded = [engine.encode(messages) for messages in conversations]
    _check_begin(engine, encoded)
    _check_extend(engine, encoded, tokens)
    _check_seeds(engine, encoded, tokens)
    _check_logit_bias(engine, encoded, tokens, tolerance)
    _check_batch_independence(engine, encoded, tokens, tolerance)
    _check_rows_move(engine, encoded, tokens, tolerance)
    _check_blocks_agree(engine, encoded, tokens, tolerance)
    _check_sampling(engine, encoded, tokens, tolerance)
    if isinstance(engine, RanksTokens):
        _check_ranks(engine, encoded, tokens, tolerance)
    if isinstance(engine, EditsLatents):
        _check_head(engine, encoded, tokens, tolerance)


def _check_engine_attributes(engine: Engine) -> None:
    _require(isinstance(engine.name, str) and bool(engine.name), "name must be a text that is not empty")
    _require(isinstance(engine.fingerprint, str) and bool(engine.fingerprint), "fingerprint must be a text")
    for name, value in (("context", engine.context), ("vocabulary", engine.vocabulary)):
        _require(isinstance(value, int) and value > 0, f"{name} must be an integer > 0, got {value!r}")
    _require(isinstance(engine.end_tokens, tuple), "end_tokens must be a tuple")
    _require(
        all(0 <= token < engine.vocabulary for token in engine.end_tokens),
        f"end_tokens must be in [0, {engine.vocabulary}), got {engine.end_tokens}",
    )
    if isinstance(engine, ReadsLatents):
        width = engine.latent_width
        _require(isinstance(width, int) and width > 0, f"latent_width must be an integer > 0, got {width!r}")


def _check_encoding(engine: Engine, conversations: Sequence[Conversation]) -> None:
    chat = (Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "yes?"), Message("user", "go"))
    changed = [
        (*chat[:turn], Message(chat[turn].role, "other words"), *chat[turn + 1 :]) for turn in range(len(chat))
    ]  # whichever turn is another one, the prompt is
    strange = conversation("\U0001f600 e\u0301 \u202e \0 \ud800")
    turns = [*conversations, chat, *changed, chat[1:], chat[-1:], strange]
    encoded = [engine.encode(messages) for messages in turns]
    for messages, ids in zip(turns, encoded, strict=True):
        _require(bool(ids), f"encode must not return an empty prompt, for {messages}")
        _require(
            all(isinstance(token, int) and 0 <= token < engine.vocabulary for token in ids),
            f"encode must return integers in [0, {engine.vocabulary}), for {messages}",
        )
        _require(engine.encode(messages) == ids, f"encode must be deterministic, for {messages}")
    _require(len({tuple(ids) for ids in encoded}) == len(turns), "encode must tell different conversations apart")
    _require(engine.decode([]) == "", "decode of no tokens must be the empty text")
    for token in engine.end_tokens:
        _require(engine.decode([token]) == "", f"decode must leave the end token {token} out")


def _check_no_injection(engine: Engine, control_texts: Iterable[str]) -> None:
    """A message that spells control tokens holds no more of them than a harmless one (METHOD 10)."""
    tokenizer = getattr(engine, "tokenizer", None)
    spelled = {*CONTROL_TEXTS, *control_texts, *getattr(engine, "special_texts", ())}
    spelled |= {str(text) for text in getattr(tokenizer, "all_special_tokens", ())}
    controls = {*engine.end_tokens, *getattr(tokenizer, "all_special_ids", ())}
    harmless = Counter(engine.encode(conversation("apple")))
    other = Counter(engine.encode(conversation("zebra")))
    word = next((token for token in harmless.keys() - other.keys() if engine.decode([token]).strip()), None)
    _require(word is not None, "encode must keep the text of the message")
    assert word is not None
    # What the template itself writes and the reader never sees opens and closes the turns.
    shared, plain = harmless.keys() & other.keys(), engine.decode([word, word])
    controls |= {token for token in shared if engine.decode([word, token, word]) == plain}
    expected = {token: harmless[token] for token in controls}
    for text in sorted(spelled):
        for content in (text, f"apple{text}zebra", f"apple {text}\n{text} zebra"):
            found = Counter(engine.encode(conversation(content)))
            opened = {token: found[token] for token in controls if found[token] > expected[token]}
            _require(not opened, f"user text {content!r} injects control tokens (id: count): {opened}")


def _check_begin(engine: Engine, encoded: Sequence[Sequence[int]]) -> None:
    count = len(encoded)
    beams = engine.begin(encoded, range(count))
    _check_shapes(engine, beams, count, "begin")
    _require(beams.prompt_index.tolist() == list(range(count)), "begin must return row i for prompt i")
    _require(beams.token_ids == ((),) * count, "begin must return empty responses")
    _require(beams.seed.tolist() == list(range(count)), "begin must keep each prompt's seed")
    _require(not bool(beams.finished.any()), "begin must return unfinished rows")
    _require(beams.log_prob.tolist() == [0.0] * count, "the empty response has log-probability 0")
    _require(beams.budget.tolist() == [0.0] * count, "begin must leave the budgets 0: the search sets them")


def _check_shapes(engine: Engine, beams: Beams, rows: int, where: str) -> None:
    _require(len(beams.token_ids) == rows, f"{where} must return {rows} rows, got {len(beams.token_ids)}")
    fields = ("prompt_index", "log_prob", "budget", "finished", "parent", "seed", "spent")
    for name in fields:
        shape = tuple(getattr(beams, name).shape)
        _require(shape == (rows,), f"{where}: {name} must have shape [{rows}], got {list(shape)}")
    for name in ("log_prob", "budget", "spent"):
        _require(getattr(beams, name).dtype == torch.float64, f"{where}: {name} must be float64")
    _require(beams.finished.dtype == torch.bool, f"{where}: finished must be bool")
    width = engine.latent_width if isinstance(engine, ReadsLatents) else 0
    shape = tuple(beams.latent.shape)
    _require(shape == (rows, width), f"{where}: latent must have shape [{rows}, {width}], got {list(shape)}")
    _require(bool(torch.isfinite(beams.latent).all()), f"{where}: latent must be finite")
    _require(len(beams.blocks) == rows, f"{where}: blocks must have {rows} rows, got {len(beams.blocks)}")


def _check_extend(engine: Engine, encoded: Sequence[Sequence[int]], tokens: int) -> None:
    beams = _rows(engine, encoded, range(len(encoded)), 4)
    beams = replace(beams, budget=torch.arange(len(beams)).double(), spent=-torch.arange(len(beams)).double())
    for draw in range(3):
        before = (beams.token_ids, beams.log_prob.clone(), beams.latent.clone(), beams.finished.clone())
        grown = engine.extend(beams, tokens, Sampling(), draw, None)
        _check_shapes(engine, grown, len(beams), "extend")
        _require(
            beams.token_ids == before[0] and all(map(torch.equal, (beams.log_prob, beams.latent), before[1:3])),
            "extend must not change the beams that it was given",
        )
        _require(grown.parent.tolist() == list(range(len(beams))), "extend must set parent[i] = i")
        for name in ("prompt_index", "seed", "budget", "spent"):
            _require(torch.equal(getattr(grown, name), getattr(beams, name)), f"extend must leave {name} as it is")
        for row, (old, new, finished) in enumerate(
            zip(beams.token_ids, grown.token_ids, grown.finished.tolist(), strict=True)
        ):
            added = new[len(old) :]
            _require(new[: len(old)] == old, f"extend must keep the tokens that row {row} had")
            _require(1 <= len(added) <= tokens, f"extend must add 1 to {tokens} tokens, row {row} got {len(added)}")
            _require(all(0 <= token < engine.vocabulary for token in added), f"row {row} left the vocabulary: {added}")
            ends = [token in engine.end_tokens for token in added]
            _require(not any(ends[:-1]), f"row {row} goes on after an end token: {added}")
            _require(finished == ends[-1], f"row {row} must be finished exactly if it ends in an end token: {added}")
            _require(finished or len(added) == tokens, f"row {row} stopped early without an end token: {added}")
        change = grown.log_prob - beams.log_prob
        _require(bool((torch.isfinite(change) & (change <= 1e-9)).all()), f"log_prob must not rise: {change.tolist()}")
        beams = grown.take([i for i, done in enumerate(grown.finished.tolist()) if not done])
        if not len(beams):
            break


def _check_seeds(engine: Engine, encoded: Sequence[Sequence[int]], tokens: int) -> None:
    beams = _rows(engine, encoded, range(len(encoded)), 4)
    first = engine.extend(beams, tokens, Sampling(), 0, None)
    again = engine.extend(beams, tokens, Sampling(), 0, None)
    _require(
        first.token_ids == again.token_ids, "the same rows extended twice in the same draw must get the same tokens"
    )
    fresh = engine.extend(_rows(engine, encoded, range(len(encoded)), 4), tokens, Sampling(), 0, None)
    _require(first.token_ids == fresh.token_ids, "the same seeds and draw must give the same tokens after a new begin")
    _require(torch.equal(first.log_prob, fresh.log_prob), "the same seeds and draw must give the same log_prob")
    if float(first.log_prob.exp().max()) > 0.9:
        return  # an engine that is nearly deterministic cannot show its random numbers
    draws = {engine.extend(beams, tokens, Sampling(), draw, None).token_ids for draw in range(4)}
    _require(len(draws) > 1, "different draws must have different random numbers")
    others = {
        engine.extend(_rows(engine, encoded, [seed] * len(encoded), 4), tokens, Sampling(), 0, None).token_ids
        for seed in (1, 2, 3, 2**40)
    }
    _require(len(others) > 1, "different seeds must have different random numbers")
    alike = all(len(set(first.token_ids[at : at + 4])) == 1 for at in range(0, len(first), 4))
    _require(not alike, "the rows of one prompt must have different random numbers")


def _check_batch_independence(engine: Engine, encoded: Sequence[Sequence[int]], tokens: int, tolerance: float) -> None:
    """Batched = alone: with other prompts around, with more rows behind, and after the others have left."""
    seeds = [11 * (index + 1) for index in range(len(encoded))]
    together = _open(engine.extend(_rows(engine, encoded, seeds, 3), tokens, Sampling(), 0, None))
    after = engine.extend(together, tokens, Sampling(), 1, None) if len(together) else together
    for index, prompt in enumerate(encoded):
        alone = _open(engine.extend(_rows(engine, [prompt], [seeds[index]], 3), tokens, Sampling(), 0, None))
        alone = engine.extend(alone, tokens, Sampling(), 1, None) if len(alone) else alone
        mine = [row for row, prompt in enumerate(after.prompt_index.tolist()) if prompt == index]
        _agree(alone, after.take(mine), tolerance, "a prompt alone and the same prompt in a batch")
    if isinstance(engine, MixesDraws):
        numbers = 5 + together.prompt_index
        mixed = engine.extend(together, tokens, Sampling(), numbers, None) if len(together) else together
        for index in range(len(encoded)):
            mine = [row for row, prompt in enumerate(together.prompt_index.tolist()) if prompt == index]
            if mine:
                own = engine.extend(together.take(mine), tokens, Sampling(), 5 + index, None)
                _agree(own, mixed.take(mine), tolerance, "a draw's number for all rows and one number per row")
    if isinstance(engine, MixesSampling) and len(together):
        kinds = (Sampling(), Sampling(temperature=0.5), Sampling(top_k=3))
        owners = [kinds[prompt % len(kinds)] for prompt in together.prompt_index.tolist()]
        mixed = engine.extend(together, tokens, owners, 5, None)
        for kind in dict.fromkeys(owners):
            mine = [row for row, own in enumerate(owners) if own == kind]
            own = engine.extend(together.take(mine), tokens, kind, 5, None)
            _agree(own, mixed.take(mine), tolerance, "one sampling for all rows and one per row")
    wide = engine.extend(_rows(engine, encoded[:1], seeds[:1], 6), tokens, Sampling(), 0, None)
    narrow = engine.extend(_rows(engine, encoded[:1], seeds[:1], 2), tokens, Sampling(), 0, None)
    _agree(narrow, wide.take([0, 1]), tolerance, "row j of a prompt with fewer and with more rows behind it")
    for index in range(len(encoded)):  # all but one prompt leave the batch after the first block
        mine = [row for row, prompt in enumerate(together.prompt_index.tolist()) if prompt == index]
        if mine:
            left = engine.extend(together.take(mine), tokens, Sampling(), 1, None)
            _agree(left, after.take(mine), tolerance, "a prompt before and after the others left the batch")


def _check_rows_move(engine: Engine, encoded: Sequence[Sequence[int]], tokens: int, tolerance: float) -> None:
    """What a row draws greedily depends on its own tokens only, wherever `take` and `join` put it."""
    rows = _open(engine.extend(_rows(engine, encoded, range(len(encoded)), 3), tokens, Sampling(), 0, None))
    if not len(rows):
        return
    straight = _extend_greedily(engine, rows, tokens, 1)
    order = [*reversed(range(len(rows))), 0, 0, len(rows) // 2]
    moved = _extend_greedily(engine, rows.take(order), tokens, 1)
    _agree(straight.take(order), moved, tolerance, "rows extended before and after Beams.take (order and repetition)")
    half = (len(rows) + 1) // 2
    if half < len(rows):
        parts = (rows.take(range(half)), rows.take(range(half, len(rows))))
        joined = _extend_greedily(engine, join(*parts), tokens, 1)
        _agree(straight, joined, tolerance, "rows extended before and after being parted and joined")
    again = _extend_greedily(engine, rows, tokens, 1)
    _agree(straight, again, tolerance, "rows extended before and after their copies were")


def _check_blocks_agree(engine: Engine, encoded: Sequence[Sequence[int]], tokens: int, tolerance: float) -> None:
    """One block of 2m tokens = two blocks of m: the cache that is carried over holds what a single pass computes."""
    rows = _open(engine.extend(_rows(engine, encoded, range(len(encoded)), 2), 1, Sampling(), 0, None))
    if not len(rows):
        return
    whole = _extend_greedily(engine, rows, 2 * tokens, 1)
    resumed = _extend_greedily(engine, _extend_greedily(engine, rows, tokens, 1), tokens, 2)
    _agree(whole, resumed, tolerance, "one block of 2m tokens and two blocks of m")


def _check_sampling(engine: Engine, encoded: Sequence[Sequence[int]], tokens: int, tolerance: float) -> None:
    rows = _rows(engine, encoded, range(len(encoded)), 2)
    greedy = engine.extend(rows, tokens, _GREEDY, 0, None)
    for name, sampling, draw in (
        ("temperature 0 in another draw", _GREEDY, 7),
        ("top_k 1", Sampling(top_k=1), 0),
        ("a tiny top_p", Sampling(top_p=1e-9), 0),
    ):
        _agree(greedy, engine.extend(rows, tokens, sampling, draw, None), tolerance, f"greedy decoding and {name}")
    hot = engine.extend(rows, 1, Sampling(temperature=2.0), 0, None)  # the hottest that vLLM samples at
    cold = engine.extend(rows, 1, Sampling(temperature=0.3), 0, None)
    plain = engine.extend(rows, 1, Sampling(), 0, None)
    for other in (hot, cold, greedy if tokens == 1 else plain):
        for row, (a, b) in enumerate(zip(plain.token_ids, other.token_ids, strict=True)):
            gap = abs(float(plain.log_prob[row] - other.log_prob[row]))
            _require(a != b or gap <= tolerance, f"log_prob must be the base model's at any temperature (off by {gap})")


def _check_ranks(engine: Engine, encoded: Sequence[Sequence[int]], tokens: int, tolerance: float) -> None:
    """The best ranked token is the greedy one, and an appended token is read as a drawn one is."""
    assert isinstance(engine, RanksTokens)
    rows = _open(engine.extend(_rows(engine, encoded, range(len(encoded)), 2), 1, Sampling(), 0, None))
    if not len(rows):
        return
    ids, logits, log_prob = engine.rank(rows, 3)
    shape = (len(rows), min(3, engine.vocabulary))
    for name, part in (("ids", ids), ("logits", logits), ("log-probabilities", log_prob)):
        _require(tuple(part.shape) == shape, f"rank: the {name} must have shape {list(shape)}, got {list(part.shape)}")
    _require(bool((logits[:, :-1] >= logits[:, 1:]).all()), f"rank must put the best first, got {logits.tolist()}")
    _require(all(len(set(row)) == len(row) for row in ids.tolist()), f"rank must not repeat a token: {ids.tolist()}")
    gaps = (logits[:, :1] - logits) - (log_prob[:, :1] - log_prob)
    far = float(gaps[torch.isfinite(gaps)].abs().max())
    _require(far <= tolerance, f"rank: logits and log-probabilities differ by more than a constant per row ({far:.3g})")
    # The likeliest token that is no end, drawn and appended: the same tokens, log_prob and latents.
    greedy = _extend_greedily(engine, rows, tokens, 1)
    order = list(range(len(rows)))[::-1]
    turned = rows.take(order)
    for _ in range(tokens):
        ids, _, log_prob = engine.rank(turned, 1 + len(engine.end_tokens))
        place = torch.tensor([[token in engine.end_tokens for token in row].index(False) for row in ids.tolist()])
        chosen, gained = ids.cpu()[range(len(ids)), place], log_prob.cpu()[range(len(ids)), place]
        grown = engine.append(turned, chosen)
        _check_shapes(engine, grown, len(turned), "append")
        _require(grown.parent.tolist() == list(range(len(turned))), "append must set parent[i] = i")
        far = float((grown.log_prob - turned.log_prob - gained.double()).abs().max())
        _require(far <= tolerance, f"append must add the log-probability that rank gives (off by {far:.3g})")
        turned = grown
    _agree(greedy.take(order), turned, tolerance, "rows drawn and rows appended")
    after = _extend_greedily(engine, greedy.take(order), tokens, 2)
    _agree(after, _extend_greedily(engine, turned, tokens, 2), tolerance, "draws after rows drawn and rows appended")
    some = torch.tensor([chosen[0], *[engine.end_tokens[0]] * (len(turned) - 1)])
    ends = [token in engine.end_tokens for token in some.tolist()]
    ended = engine.append(turned, some)
    _require(ended.finished.tolist() == ends, "append must finish the rows that get an end token, and no others")
    still = _open(ended)
    alone = _extend_greedily(engine, engine.append(turned.take([0]), some[:1]), tokens, 3)
    _agree(alone, _extend_greedily(engine, still, tokens, 3), tolerance, "a row appended alone and beside others")


def _check_head(engine: Engine, encoded: Sequence[Sequence[int]], tokens: int, tolerance: float) -> None:
    """Unedited latents give the logits that the engine itself draws from."""
    assert isinstance(engine, EditsLatents)
    rows = _open(engine.extend(_rows(engine, encoded, range(len(encoded)), 2), tokens, Sampling(), 0, None))
    if not len(rows):
        return
    logits = engine.logits(rows.latent)
    shape = (len(rows), engine.vocabulary)
    _require(tuple(logits.shape) == shape, f"logits must have shape {list(shape)}, got {list(logits.shape)}")
    drawn = engine.extend(rows, 1, Sampling(), 1, None)
    token = torch.tensor([ids[-1] for ids in drawn.token_ids])
    told = torch.log_softmax(logits.double().cpu(), -1).gather(1, token[:, None])[:, 0]
    gap = float((told - (drawn.log_prob - rows.log_prob)).abs().max())
    _require(gap <= tolerance, f"logits(latent) are not what is drawn from: log-probabilities differ by {gap:.3g}")
    turned = engine.logits(rows.latent.flip(0)).flip(0)
    same = torch.where(torch.isfinite(logits), (turned - logits).abs(), torch.zeros_like(logits))
    _require(float(same.max()) <= tolerance, "logits must treat every row by itself, in whatever order they stand")


def _check_logit_bias(engine: Engine, encoded: Sequence[Sequence[int]], tokens: int, tolerance: float) -> None:
    rows = _rows(engine, encoded, range(len(encoded)), 2)
    plain = engine.extend(rows, tokens, Sampling(), 0, None)
    nothing = torch.zeros(len(rows), engine.vocabulary)
    unbiased = engine.extend(rows, tokens, Sampling(), 0, nothing)
    _agree(plain, unbiased, tolerance, "no logit_bias and a logit_bias of zeros")
    first = engine.extend(rows, 1, _GREEDY, 0, None)
    banned = [ids[0] for ids in first.token_ids]
    bias = nothing.clone()
    bias[range(len(rows)), banned] = -math.inf
    for sampling in (_GREEDY, Sampling()):
        for row, ids in enumerate(engine.extend(rows, tokens, sampling, 0, bias).token_ids):
            _require(banned[row] not in ids, f"logit_bias -inf must ban token {banned[row]} from row {row}, got {ids}")
    bias = torch.full_like(nothing, -math.inf)
    bias[range(len(rows)), banned] = 0.0
    forced = engine.extend(rows, 1, Sampling(), 0, bias)
    _agree(first, forced, tolerance, "a token drawn freely and the same token as the only one allowed")


def _rows(engine: Engine, encoded: Sequence[Sequence[int]], seeds: Sequence[int], copies: int) -> Beams:
    beams = engine.begin(encoded, seeds)
    return beams.take([row for row in range(len(encoded)) for _ in range(copies)])


def _extend_greedily(engine: Engine, beams: Beams, tokens: int, draw: int) -> Beams:
    """Without ends, so that every row has something to compare."""
    bias = torch.zeros(len(beams), engine.vocabulary)
    bias[:, list(engine.end_tokens)] = -math.inf
    return engine.extend(beams, tokens, _GREEDY, draw, bias)


def _open(beams: Beams) -> Beams:
    return beams.take([row for row, done in enumerate(beams.finished.tolist()) if not done])


def _agree(expected: Beams, found: Beams, tolerance: float, what: str) -> None:
    """Tokens identical, log-probabilities and latents within `tolerance`."""
    rows = len(expected), len(found)
    _require(rows[0] == rows[1], f"{what} differ in how many rows are still open: {rows[0]} and {rows[1]}")
    for row, (a, b) in enumerate(zip(expected.token_ids, found.token_ids, strict=True)):
        _require(a == b, f"{what} differ in the tokens of row {row}: {a} and {b}")
    _require(torch.equal(expected.finished, found.finished), f"{what} differ in `finished`")
    for name in ("log_prob", "latent"):
        a, b = getattr(expected, name), getattr(found, name)
        gap = float((a - b).abs().max()) if a.numel() else 0.0
        _require(gap <= tolerance, f"{what} differ in {name} by {gap:.3g}, more than {tolerance}")


_PAIRS = (
    ("hi", "Hello! How can I help you?"),
    (
        "Tell me a story about two rivers, please.",
        "Once upon a time there were two rivers. They met, and went on as one.",
    ),
    ("Wie geht's? 你好", "Danke, gut. \U0001f600 很好, e\u0301\u202e \0"),
    ("hi", ""),
    ("1 + 1 =", " 2"),
    ("1 + 1 =", "two " * 300),
    ("Tell me a story about two rivers, please.", "Once upon a ti"),
)


def check_scorer(
    scorer: Scorer,
    *,
    pairs: Sequence[tuple[str, str]] = _PAIRS,
    engine: Engine | None = None,
    long_characters: int = 20_000,
    tolerance: float = 1e-4,
) -> None:
    """Whether a scorer keeps the contract of `Scorer`. Raises AssertionError if not.

    `pairs` are (prompt, response); one with an empty response, one that is not ASCII and a long one are tried anyway.
    With an `engine` whose token ids the scorer shares, its incremental reading is checked too.
    """
    for name in ("name", "fingerprint"):
        value = getattr(scorer, name)
        _require(isinstance(value, str) and bool(value), f"{name} must be a text that is not empty")
    prompts = [conversation(prompt) for prompt, _ in pairs]
    responses = [response for _, response in pairs]
    prompts.append(
        (Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "?"), Message("user", "go"))
    )
    responses.append("Going.")
    scores = _scores(scorer, prompts, responses)
    again = _scores(scorer, prompts, responses)
    _require(torch.equal(scores, again), f"scores must be deterministic: {scores.tolist()} and then {again.tolist()}")
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone = _scores(scorer, [prompt], [response])
        _close(alone, scores[row : row + 1], tolerance, f"pair {row} alone and in a batch")
    order = list(range(len(prompts)))[::-1]
    turned = _scores(scorer, [prompts[i] for i in order], [responses[i] for i in order])
    _close(turned, scores[order], tolerance, "the pairs in another order")
    copies = _scores(scorer, [prompts[0]] * 3, [responses[0]] * 3)
    _close(copies, scores[[0, 0, 0]], tolerance, "copies of a pair and the pair")
    for what, text in (
        ("an empty response", ""),
        ("a response that is not ASCII", "你好 Ж \U0001f469\u200d\U0001f680 \u202e\0\n"),
        ("white space", " \n\t "),
        ("control tokens", " ".join(CONTROL_TEXTS)),
        ("a long response", "far too long " * (long_characters // 13)),
        ("a long word", "x" * long_characters),
    ):
        mixed = _scores(scorer, [prompts[0], prompts[1]], [text, responses[1]], what)
        _close(mixed[1:], scores[1:2], tolerance, f"a pair alone and next to {what}")
    _scores(scorer, [conversation("far too long " * (long_characters // 13))], ["no"], "a long prompt")
    if engine is not None and isinstance(scorer, ScoresIncrementally) and scorer.shares_tokens(engine):
        _check_incremental(scorer, engine, tolerance)


def _check_incremental(scorer: ScoresIncrementally, engine: Engine, tolerance: float) -> None:
    """Read in one piece or in two, and whatever rows stand around: the same scores."""
    prompts = [conversation(prompt) for prompt in _PROMPTS[:2]]
    rows = _rows(engine, [engine.encode(prompt) for prompt in prompts], [1, 2], 2)
    rows = engine.extend(rows, 6, Sampling(), 0, None)
    start = scorer.start(prompts).take(rows.prompt_index)
    _, whole = scorer.advance(start, rows.token_ids, rows.finished)
    _require(tuple(whole.shape) == (len(rows),), f"advance must return [{len(rows)}] scores, got {list(whole.shape)}")
    going = [row for row, ids in enumerate(rows.token_ids) if len(ids) > 2]
    parts = [rows.token_ids[row] for row in going]
    not_yet = torch.zeros(len(going), dtype=torch.bool)
    middle, _ = scorer.advance(start.take(torch.tensor(going)), [ids[:2] for ids in parts], not_yet)
    order = torch.arange(len(going)).flip(0)
    rest = [parts[i][2:] for i in order.tolist()]
    _, split = scorer.advance(middle.take(order), rest, rows.finished[going][order])
    _close(split, whole[going][order], tolerance, "tokens read in two pieces, rows turned, and in one")


def _scores(
    scorer: Scorer, prompts: Sequence[Conversation], responses: Sequence[str], what: str = "the pairs"
) -> Tensor:
    scores = scorer.score(prompts, responses)
    _require(isinstance(scores, Tensor), f"score must return a tensor, got {type(scores).__name__}")
    shape = tuple(scores.shape)
    _require(shape == (len(prompts),), f"score must return [{len(prompts)}] numbers, got the shape {list(shape)}")
    _require(scores.is_floating_point(), f"scores must be floating point, got {scores.dtype}")
    _require(bool(torch.isfinite(scores).all()), f"scores must be finite, for {what}: {scores.tolist()}")
    return scores.detach().double().cpu()


def _close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    gap = float((found - expected).abs().max())
    _require(
        gap <= tolerance, f"{what} differ by {gap:.3g}, more than {tolerance}: {found.tolist()}, {expected.tolist()}"
    )


def toy_models(seed: int = 0, *, cost_mean: float = 0.0) -> Models:
    """A toy engine with a reward and a cost to search with. A larger `cost_mean` makes safe responses rarer."""
    cost = ToyCost(seed, low=cost_mean - 1.0, high=cost_mean + 1.0)
    return Models(ToyEngine(seed, end_logit=1.0), ToyReward(seed), cost)


def check_strategy(
    strategy: Strategy,
    *,
    models: Models | None = None,
    prompts: Sequence[str] = _PROMPTS,
    sampling: Sampling | None = None,
    tolerance: float = 1e-6,
) -> None:
    """Whether a strategy keeps the contract of `Strategy`. Raises AssertionError if not.

    Searches on toy models, some where safe responses are common and some where they are rare, or on `models` alone.
    A strategy with the fields `budget` (SafetyBudget) and `accounting` has its budgets recomputed ("increment" where it
    has no `accounting`). `tolerance` in cost units and nats.
    """
    worlds = [models] if models is not None else [toy_models(seed, cost_mean=seed / 2) for seed in range(3)]
    for world in worlds:
        _check_search(strategy, world, [conversation(prompt) for prompt in prompts], sampling or Sampling(), tolerance)


def _check_search(
    strategy: Strategy, models: Models, prompts: Sequence[Conversation], sampling: Sampling, tolerance: float
) -> None:
    seeds = [17 * index + 5 for index in range(len(prompts))]
    watched = _WatchedEngine(models.engine)
    before = repr(strategy)
    found = strategy.generate(prompts, replace(models, engine=watched), sampling, seeds)
    _require(repr(strategy) == before, "generate must not change the strategy: it is its own configuration")
    _check_result(found, models.engine, prompts, seeds, tolerance)
    _check_trace(found, watched, len(prompts))
    _check_budgets(found, strategy, models, prompts, tolerance)
    _check_order(found, strategy, models, prompts, tolerance)
    again = strategy.generate(prompts, models, sampling, seeds)
    _same_search(found, again, range(len(prompts)), "the same search run twice")
    for index, prompt in enumerate(prompts):
        alone = strategy.generate([prompt], models, sampling, [seeds[index]])
        _same_search(alone, found, [index], f"prompt {index} alone and among the others")
    turned = strategy.generate(prompts[::-1], models, sampling, seeds[::-1])
    _same_search(turned, found, range(len(prompts))[::-1], "the prompts in another order")
    twins = strategy.generate([prompts[0]] * 2, models, sampling, [seeds[0]] * 2)
    _same_search(twins, found, [0, 0], "the same prompt twice with the same seed")


def _check_result(
    found: SearchResult, engine: Engine, prompts: Sequence[Conversation], seeds: Sequence[int], tolerance: float
) -> None:
    beams = found.beams
    _check_shapes(engine, beams, len(beams), "generate")
    _require(bool(beams.finished.all()), "generate must return finished rows only")
    index = beams.prompt_index.tolist()
    _require(all(0 <= prompt < len(prompts) for prompt in index), f"prompt_index out of range: {index}")
    _require(len(found.trace) == len(prompts), f"trace must have one entry per prompt, got {len(found.trace)}")
    _require(
        beams.seed.tolist() == [seeds[prompt] for prompt in index], "each row must carry the seed of its own prompt"
    )
    encoded = [engine.encode(prompt) for prompt in prompts]
    for row, ids in enumerate(beams.token_ids):
        _require(bool(ids), f"row {row} is empty: a response has at least one token")
        _require(not set(ids[:-1]) & set(engine.end_tokens), f"row {row} goes on after an end token: {ids}")
        ends = beams.blocks[row]
        ascending = all(a < b for a, b in zip((0, *ends), ends, strict=False))
        _require(
            ascending and ends[-1:] == (len(ids),),
            f"row {row}: blocks must rise to its {len(ids)} tokens, got {ends}",
        )
        if isinstance(engine, ToyEngine):
            exact = engine.log_prob(encoded[index[row]], ids)
            gap = abs(exact - float(beams.log_prob[row]))
            _require(gap <= tolerance, f"row {row} does not answer its prompt: its log_prob is off by {gap:.3g}")


def _check_trace(found: SearchResult, watched: _WatchedEngine, prompts: int) -> None:
    """Every row and every token that the engine drew is in the trace, and a prompt without a row has a reason."""
    present = set(found.beams.prompt_index.tolist())
    for prompt in range(prompts):
        blocks, where = found.trace[prompt], f"the trace of prompt {prompt}"
        for block in blocks:
            columns = (block.attempt, block.tokens, block.cost, block.budget, block.score, block.p_safe, block.fate)
            sizes = [len(column) for column in columns]
            _require(len(set(sizes)) == 1, f"{where} has columns of different length in block {block.block}: {sizes}")
            _require(all(block.fate), f"{where} leaves a fate out in block {block.block}")
            tried = sorted(set(block.attempt))
            _require(
                tried == list(range(block.attempts)), f"{where} tells of {block.attempts} attempts, but of {tried}"
            )
        order = [block.block for block in blocks]
        _require(order == sorted(set(order)), f"{where} must count blocks upwards, got {order}")
        rows = sum(len(block.tokens) for block in blocks)
        drawn = watched.rows[prompt], watched.tokens[prompt]
        kept = bool(blocks) and "kept" in blocks[-1].fate
        _require(prompt in present or not kept, f"{where} ends with a row that was kept, but no row was returned")
        told = rows, sum(block.proposed_tokens for block in blocks)
        _require(told == drawn, f"{where} tells of (rows, tokens) {told}, but {drawn} were drawn")


def _check_budgets(
    found: SearchResult, strategy: Strategy, models: Models, prompts: Sequence[Conversation], tolerance: float
) -> None:
    """z of every row that is returned, recomputed in plain arithmetic from the texts at its block ends.

    A block's own text is cut from the decoded whole: decoded by itself it would read otherwise (METHOD 10).
    """
    budget, accounting = getattr(strategy, "budget", None), getattr(strategy, "accounting", "increment")
    if not isinstance(budget, SafetyBudget):
        return
    beams, engine = found.beams, models.engine
    for row, ids in enumerate(beams.token_ids):
        prompt, z = prompts[int(beams.prompt_index[row])], budget.limit
        starts = (0, *beams.blocks[row][:-1])
        so_far = 0.0
        for start, end in zip(starts, beams.blocks[row], strict=True):
            text = engine.decode(ids[:end]).rstrip("\ufffd")
            if accounting == "accumulate":
                text = text[len(engine.decode(ids[:start]).rstrip("\ufffd")) :]
            score = float(models.cost.score([prompt], [text]))
            if accounting == "increment":
                cost, so_far = score - so_far, score
            elif accounting == "accumulate":
                cost = max(score, 0.0)
            else:
                cost = score if end == len(ids) else 0.0
            z = z / budget.discount ** (end - start) - cost / budget.discount
        gap = abs(z - float(beams.budget[row]))
        _require(gap <= tolerance, f"row {row}: budget is {float(beams.budget[row])}, recomputed it is {z}")


def _check_order(
    found: SearchResult, strategy: Strategy, models: Models, prompts: Sequence[Conversation], tolerance: float
) -> None:
    """Best first within each prompt: rows with z >= 0 by their reward, then the others."""
    if not isinstance(getattr(strategy, "budget", None), SafetyBudget):
        return
    if getattr(strategy, "objective", augmented) not in ("augmented", augmented):
        return
    beams = found.beams
    index = beams.prompt_index.tolist()
    texts = [models.engine.decode(ids) for ids in beams.token_ids]
    reward = models.reward.score([prompts[prompt] for prompt in index], texts).double()
    score = augmented(reward, torch.zeros(len(beams)), beams.budget)
    for prompt in set(index):
        ranked = [float(score[row]) for row, mine in enumerate(index) if mine == prompt]
        falls = all(a >= b - tolerance for a, b in itertools.pairwise(ranked))
        _require(falls, f"the rows of prompt {prompt} must stand best first, got the scores {ranked}")


def _same_search(found: SearchResult, expected: SearchResult, prompts: Sequence[int], what: str) -> None:
    """Prompt i of `found` is prompt `prompts[i]` of `expected`: rows, budgets and trace."""
    for mine, theirs in enumerate(prompts):
        rows = [_rows_of(result.beams, prompt) for result, prompt in ((found, mine), (expected, theirs))]
        _require(rows[0] == rows[1], f"{what} give different rows (tokens, z): {rows[0]} and {rows[1]}")
        _require(found.trace[mine] == expected.trace[theirs], f"{what} give different traces")


def _rows_of(beams: Beams, prompt: int) -> list[tuple[tuple[int, ...], float]]:
    rows = [row for row, index in enumerate(beams.prompt_index.tolist()) if index == prompt]
    return [(beams.token_ids[row], float(beams.budget[row])) for row in rows]


class _WatchedEngine:
    """The engine, counting the rows and tokens that it draws for each prompt.

    A candidate that was ranked counts as drawn, whether or not it is read; one that is appended unranked counts as a
    token, and as a row where it is the response's first.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Any = engine
        self.rows: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self._ranked: set[int] = set()
        # Set on the object, so that it has the engine's capabilities and no others, whichever way they are looked for.
        for name in ("latent_width", "logits"):
            if hasattr(engine, name):
                setattr(self, name, getattr(engine, name))
        for name, watched in (("rank", self._rank), ("append", self._append)):
            if hasattr(engine, name):
                setattr(self, name, watched)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def extend(self, beams: Beams, tokens: int, sampling: Sampling, draw: int, logit_bias: Tensor | None) -> Beams:
        grown: Beams = self._engine.extend(beams, tokens, sampling, draw, logit_bias)
        for prompt, old, new in zip(beams.prompt_index.tolist(), beams.token_ids, grown.token_ids, strict=True):
            self.rows[prompt] += 1
            self.tokens[prompt] += len(new) - len(old)
        return grown

    def _rank(self, beams: Beams, count: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, logits, log_prob = self._engine.rank(beams, count)
        for prompt, found in zip(beams.prompt_index.tolist(), torch.isfinite(logits).sum(1).tolist(), strict=True):
            self._ranked.add(prompt)
            self.rows[prompt] += found
            self.tokens[prompt] += found
        return ids, logits, log_prob

    def _append(self, beams: Beams, tokens: Tensor) -> Beams:
        for prompt, before in zip(beams.prompt_index.tolist(), beams.token_ids, strict=True):
            if prompt not in self._ranked:
                self.rows[prompt] += not before
                self.tokens[prompt] += 1
        grown: Beams = self._engine.append(beams, tokens)
        return grown
