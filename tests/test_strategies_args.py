"""ARGS against a plain loop without caches: transformers' own forward pass on tiny models, and the toy engine."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from inferenceguard.beams import Beams
from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import Engine, Models, RanksTokens, Sampling, conversation
from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.errors import MissingCapability
from inferenceguard.guard import Guard
from inferenceguard.kv import CachedTransformer
from inferenceguard.objectives import OBJECTIVES
from inferenceguard.scorers import FunctionScorer
from inferenceguard.strategies import ARGS
from inferenceguard.testing import FaultyEngine, ToyEngine, toy_models
from tiny import END, tiny_model, tiny_tokenizer

PROMPTS = [conversation(text) for text in ("be kind", "hi", "What is the capital of France?")]
PENALTY = 40.0


def hashed(seed: int, scale: float) -> Any:
    """A score that every text has by its own: multiples of 1/64, so that sums are exact."""

    def score(prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        numbers = [zlib.crc32(f"{seed}\0{p}\0{t}".encode("utf-8", "replace")) % 128 - 64
                   for p, t in zip(prompts, texts, strict=True)]  # fmt: skip
        return [scale * number / 64 for number in numbers]

    return score


REWARD, COST = hashed(1, 2.0), hashed(2, 1.0)


def formula(objective: str, reward: float, cost: float, limit: float) -> float:
    if objective == "augmented":
        return reward if limit - cost >= 0 else -PENALTY
    return {"reward": reward, "lagrangian": reward - 5 * cost, "cost": -cost}[objective]


def plain_args(engine: TransformersEngine, prompt: Any, plan: ARGS) -> tuple[list[int], float]:
    """The paper's loop: the whole text goes through the model at every step. (tokens, log-probability)"""
    model = tiny_model(engine.name)
    model.set_attn_implementation("eager")
    ids, text_of = engine.encode(prompt), prompt[0].content
    response: list[int] = []
    total = 0.0
    while len(response) < plan.max_new_tokens and END not in response:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + response]), use_cache=False).logits[0, -1]
        best: tuple[float, int] | None = None
        for token in logits.argsort(descending=True)[: plan.candidates].tolist():
            text = engine.decode([*response, token]).rstrip("\ufffd")
            reward, cost = REWARD([text_of], [text])[0], COST([text_of], [text])[0]
            score = float(logits[token]) + plan.weight * formula(plan.objective, reward, cost, plan.budget.limit)
            if best is None or score > best[0]:
                best = (score, token)
        assert best is not None
        total += float(torch.log_softmax(logits.double(), -1)[best[1]])
        response.append(best[1])
    return response, total


@pytest.fixture(params=["llama", "gpt2", "gemma3"], scope="module")
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    return TransformersEngine(tiny_model(request.param), tiny_tokenizer(), request.param)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_args_is_the_plain_loop(engine: TransformersEngine, objective: str) -> None:
    models = Models(engine, FunctionScorer("reward", REWARD), FunctionScorer("cost", COST))
    # The tiny models' logits are far apart: the weight must be large for the objective to have a say.
    plan = ARGS(10, 30.0, 12, objective, penalty=PENALTY, budget=SafetyBudget(0.25))
    found = plan.generate(PROMPTS, models, Sampling(), [0, 1, 2])
    assert found.beams.prompt_index.tolist() == [0, 1, 2]
    greedy = ARGS(1, 0.0, 12).generate(PROMPTS, models, Sampling(), [0, 1, 2])
    assert found.beams.token_ids != greedy.beams.token_ids
    for row, prompt in enumerate(PROMPTS):
        tokens, log_prob = plain_args(engine, prompt, plan)
        assert list(found.beams.token_ids[row]) == tokens
        assert float(found.beams.log_prob[row]) == pytest.approx(log_prob, abs=1e-3)


def test_one_candidate_is_greedy_decoding(engine: TransformersEngine) -> None:
    models = Models(engine, FunctionScorer("reward", REWARD), FunctionScorer("cost", COST))
    found = ARGS(1, 2.5, 10).generate(PROMPTS, models, Sampling(), [0, 1, 2])
    start = engine.begin([engine.encode(prompt) for prompt in PROMPTS], [0, 1, 2])
    greedy = engine.extend(start, 10, Sampling(temperature=0), 0, None)
    assert found.beams.token_ids == greedy.token_ids
    assert found.beams.log_prob.tolist() == pytest.approx(greedy.log_prob.tolist(), abs=1e-3)


def test_it_stops_at_an_end_token(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of its response is made an end token: the same response, up to there."""
    models = Models(engine, FunctionScorer("reward", REWARD), FunctionScorer("cost", COST))
    plan = ARGS(10, 0.0, 12)  # what ends is decoded without the end token, which a reward would see
    whole = plan.generate(PROMPTS[:2], models, Sampling(), [0, 1]).beams.token_ids
    end = [token for at, token in enumerate(whole[0][:-1]) if token not in whole[0][:at]][-1]
    monkeypatch.setattr(engine, "end_tokens", (end,))
    found = plan.generate(PROMPTS[:2], models, Sampling(), [0, 1])
    for before, after in zip(whole, found.beams.token_ids, strict=True):
        assert after == (before[: before.index(end) + 1] if end in before else before)
    assert len(found.trace[0]) == len(found.beams.token_ids[0]) < 12


def test_the_caches_are_kept(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token per prompt and step goes through the model: the chosen one, once; and each prompt, once."""
    read: list[int] = []
    prefilled: list[int] = []
    own_read, own_prefill = CachedTransformer.read, CachedTransformer.prefill

    def reading(self: CachedTransformer, cache: Any, tokens: Tensor, capacity: int = 0) -> Any:
        read.append(tokens.numel())
        return own_read(self, cache, tokens, capacity)

    def prefilling(self: CachedTransformer, prompts: Any) -> Any:
        prefilled.append(len(prompts))
        return own_prefill(self, prompts)

    monkeypatch.setattr(CachedTransformer, "read", reading)
    monkeypatch.setattr(CachedTransformer, "prefill", prefilling)
    models = Models(engine, FunctionScorer("reward", REWARD), FunctionScorer("cost", COST))
    found = ARGS(10, 0.01, 9).generate(PROMPTS, models, Sampling(), [0, 1, 2])
    assert prefilled == [3]
    assert sum(read) == sum(len(tokens) - 1 for tokens in found.beams.token_ids)
    assert sum(block.proposed_tokens for block in found.trace[0]) == 10 * len(found.beams.token_ids[0])


def test_a_prompt_does_not_depend_on_the_others(engine: TransformersEngine) -> None:
    models = Models(engine, FunctionScorer("reward", REWARD), FunctionScorer("cost", COST))
    plan = ARGS(5, 20.0, 8, "lagrangian")
    together = plan.generate(PROMPTS, models, Sampling(), [0, 1, 2])
    for row, prompt in enumerate(PROMPTS):
        alone = plan.generate([prompt], models, Sampling(temperature=0.3), [99])  # greedy: no seed, no temperature
        assert alone.beams.token_ids[0] == together.beams.token_ids[row]
        assert alone.trace[0] == together.trace[row]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_args_is_the_plain_loop_on_the_toy_engine(objective: str) -> None:
    models = toy_models(3, cost_mean=0.5)
    engine = models.engine
    assert isinstance(engine, ToyEngine)
    plan = ARGS(3, 0.75, 7, objective, penalty=PENALTY, budget=SafetyBudget(0.25))
    for prompt in PROMPTS:
        ids, response, left = engine.encode(prompt), (), 0.25  # type: list[int], tuple[int, ...], float
        while len(response) < 7 and 0 not in response:
            exact = [engine.log_prob(ids, (*response, token)) - engine.log_prob(ids, response) for token in range(5)]
            ranked = sorted(range(5), key=lambda token: -exact[token])[:3]
            scores = {}
            for token in ranked:
                text = engine.decode((*response, token))
                reward, cost = (float(scorer.score([prompt], [text])[0]) for scorer in (models.reward, models.cost))
                scores[token] = exact[token] + 0.75 * formula(objective, reward, cost, 0.25)
                left = 0.25 - cost
            response = (*response, max(ranked, key=lambda token: scores[token]))
        found = plan.generate([prompt], models, Sampling(), [0])
        assert found.beams.token_ids == (response,)
        assert isinstance(left, float)


class Mute:
    """An engine without RanksTokens; it must not be asked to draw."""

    name, fingerprint, context, vocabulary, end_tokens = "mute", "0", 99, 9, (0,)

    def __init__(self) -> None:
        self.encode, self.decode = ToyEngine(0).encode, ToyEngine(0).decode

    def begin(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Beams:
        raise AssertionError("drawn from")

    def extend(self, beams: Beams, tokens: int, sampling: Sampling, draw: int, logit_bias: Tensor | None) -> Beams:
        raise AssertionError("drawn from")


def test_an_engine_that_cannot_rank_is_refused_before_a_token_is_drawn() -> None:
    zero = FunctionScorer("zero", lambda prompts, _: [0.0] * len(prompts))
    mute: Engine = Mute()
    assert not isinstance(mute, RanksTokens)
    for refused in (mute, FaultyEngine(ToyEngine(0))):
        with pytest.raises(MissingCapability, match=f"ARGS needs the ranks of next tokens .*engine {refused.name}"):
            ARGS(3, 1.0, 4).generate(PROMPTS, Models(refused, zero, zero), Sampling(), [0, 1, 2])


def test_args_behind_the_gate() -> None:
    models = toy_models(1, cost_mean=0.5)
    guard = Guard(models.engine, models.reward, models.cost, strategy=ARGS(3, 1.0, 6, "reward"))
    reasons = set()
    for answer in guard.generate([f"prompt {index}" for index in range(12)]):
        assert answer.cost is None or answer.cost <= 0
        reasons.add(answer.finish_reason)
    assert "content_filter" in reasons
    assert reasons & {"stop", "length"}


def test_under_reward_the_cost_model_reads_what_is_chosen() -> None:
    models = toy_models(1)
    texts: list[str] = []

    def cost(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts.extend(responses)
        return COST(prompts, responses)

    watched = Models(models.engine, models.reward, FunctionScorer("cost", cost))
    plain = ARGS(4, 2.0, 6, "lagrangian", multiplier=0.0)  # the same choice, every candidate charged
    found, whole = (plan.generate(PROMPTS[:1], watched, Sampling(), [0]) for plan in (ARGS(4, 2.0, 6), plain))
    tokens = found.beams.token_ids[0]
    assert tokens == whole.beams.token_ids[0]
    assert texts[: len(tokens)] == [models.engine.decode(tokens[: end + 1]) for end in range(len(tokens))]
    assert len(texts) > 2 * len(tokens)
    assert float(found.beams.budget[0]) == float(whole.beams.budget[0])
    assert found.beams.blocks == whole.beams.blocks
