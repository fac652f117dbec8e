"""The search against a plain-loop reimplementation, and its steps on hand-made engines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from inferenceguard.beams import Beams
from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import Conversation, Models, Sampling, conversation
from inferenceguard.errors import FingerprintMismatch, InvalidArgument, MissingCapability, PromptTooLong
from inferenceguard.guard import Guard
from inferenceguard.record import replay
from inferenceguard.scorers import FunctionScorer
from inferenceguard.scorers.safe import FailClosed
from inferenceguard.strategies import BaseSampling, InferenceGuard
from inferenceguard.testing import ToyCost, ToyCritic, ToyEngine, ToyReward, check_strategy

PROMPT = conversation("be kind")
PENALTY = 1e6


def toy(critic: bool, budget: SafetyBudget, tokens: int) -> Models:
    engine, reward, cost = ToyEngine(seed=4, end_logit=-0.5, horizon=tokens), ToyReward(1), ToyCost(2)
    exact = ToyCritic(engine, [PROMPT], reward, cost, tokens, discount=budget.discount) if critic else None
    return Models(engine, reward, cost, exact)


def plain_search(models: Models, plan: InferenceGuard, seed: int) -> list[tuple[tuple[int, ...], float, float]]:
    """METHOD section 5 in plain loops for one prompt: (tokens, z, score) of the kept finished rows, best first."""
    engine, d, gamma = models.engine, plan.budget.limit, plan.budget.discount
    kept_rows: list[dict[str, Any]] = [{"tokens": (), "z": d, "spent": 0.0, "beam": 0}]
    beams = replace(engine.begin([engine.encode(PROMPT)], [seed]))
    done: list[dict[str, Any]] = []
    block = 0
    while kept_rows:
        candidates: list[dict[str, Any]] = []
        for attempt in range(plan.retries + 1):
            bias = None
            if attempt:
                if any(row["score"] > -PENALTY for row in candidates) or done:
                    break
                bias = torch.zeros(engine.vocabulary)
                for row in candidates:
                    for token in set(row["new"]):
                        bias[token] -= plan.discourage / len(candidates)
            share, rest = divmod(plan.n_beams, len(kept_rows))
            parents = [row for place, row in enumerate(kept_rows) for _ in range(share + (place < rest))]
            source = beams.take([row["beam"] for row in parents])
            count = min(plan.block_tokens, plan.max_new_tokens - len(parents[0]["tokens"]))
            drawn = engine.extend(
                source, count, Sampling(), block * (plan.retries + 1) + attempt,
                None if bias is None else bias.expand(len(parents), -1),
            )  # fmt: skip
            for place, parent in enumerate(parents):
                tokens = drawn.token_ids[place]
                new = tokens[len(parent["tokens"]) :]
                text = engine.decode([token for token in tokens if token != 0]).rstrip("\ufffd")
                score = float(models.cost.score([PROMPT], [text])[0])
                z = parent["z"] / gamma ** len(new) - (score - parent["spent"]) / gamma
                finished = tokens[-1] == 0 or len(tokens) == plan.max_new_tokens
                candidates.append({"tokens": tokens, "new": new, "z": z, "spent": score, "finished": finished,
                                   "drawn": drawn, "place": place})  # fmt: skip
                rank(candidates[-1], text, models, plan)
        feasible = [row for row in candidates if row["score"] > -PENALTY]
        pool = [(row["score"], row["tie"], -place, row) for place, row in enumerate(feasible)]
        pool += [(row["score"], torch.inf, -place, row) for place, row in enumerate(done)]
        if not pool:
            going = [row for row in candidates if row["z"] >= 0 or not row["finished"]]
            pool = [(-PENALTY, row["tie"], -place, row) for place, row in enumerate(going)]
        best = [entry[-1] for entry in sorted(pool, key=lambda entry: entry[:3], reverse=True)[: plan.plan.keep]]
        done = [row for row in best if row["finished"]]
        kept_rows = [row for row in best if not row["finished"]]
        if kept_rows:
            from inferenceguard.beams import join

            beams = kept_rows[0]["drawn"].take([kept_rows[0]["place"]])
            for row in kept_rows[1:]:
                beams = join(beams, row["drawn"].take([row["place"]]))
            for place, row in enumerate(kept_rows):
                row["beam"] = place
        block += 1
    return [(row["tokens"], row["z"], row["score"]) for row in sorted(done, key=lambda row: -row["score"])]


def rank(row: dict[str, Any], text: str, models: Models, plan: InferenceGuard) -> None:
    row["score"], row["tie"] = -PENALTY, float(torch.tanh(torch.tensor(row["z"], dtype=torch.float64)))
    if row["z"] < 0:
        return
    if row["finished"] or models.critic is None:
        row["score"] = float(models.reward.score([PROMPT], [text])[0])
        return
    latent = row["drawn"].latent[row["place"]][None]
    progress = torch.tensor([len(row["tokens"]) / plan.max_new_tokens], dtype=torch.float64)
    p_safe, value = models.critic.predict(latent, torch.tensor([row["z"]], dtype=torch.float64), progress)
    row["tie"] = 1.0 + float(p_safe)
    if float(p_safe) > plan.threshold:
        row["score"] = float(value)


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("limit", [-1.5, 0.0, 1.0])
@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("margin", [0.0, 100.0])  # rows charged in turn, and all at once
def test_the_search_is_the_papers_algorithm(critic: bool, limit: float, discount: float, margin: float) -> None:
    budget = SafetyBudget(limit, discount)
    plan = InferenceGuard(12, 4, 2, 6, retries=1, budget=budget, discourage=3.0, threshold=0.8, margin=margin)
    models = toy(critic, budget, 6)
    met = set()
    for seed in range(25):
        found = plan.generate([PROMPT], models, Sampling(), [seed])
        expected = plain_search(models, plan, seed)
        assert list(found.beams.token_ids) == [tokens for tokens, _, _ in expected]
        assert found.beams.budget.tolist() == pytest.approx([z for _, z, _ in expected])
        assert found.beams.score.tolist() == pytest.approx([score for _, _, score in expected])
        met |= {fate for block in found.trace[0] for fate in block.fate}
        met |= {"retry" for block in found.trace[0] if block.attempts > 1}
    assert {"kept", "outranked"} <= met
    if limit < 0:
        assert {"over budget", "retry"} <= met
    if critic and limit == 0:
        assert "critic" in met


def test_the_strategies_keep_the_contract() -> None:
    check_strategy(InferenceGuard(8, 2, 2, 6, budget=SafetyBudget(0.5)))
    check_strategy(InferenceGuard(4, 4, 3, 6, accounting="accumulate"))
    check_strategy(BaseSampling(6))


class Scripted(ToyEngine):
    """Remembers how it was asked."""

    def __init__(self) -> None:
        super().__init__(seed=1, end_logit=-9.0)
        self.calls: list[tuple[int, int, bool]] = []  # (rows, tokens, biased)

    def extend(self, beams: Beams, tokens: int, sampling: Sampling, draw: int, logit_bias: Tensor | None) -> Beams:
        self.calls.append((len(beams), tokens, logit_bias is not None))
        return super().extend(beams, tokens, sampling, draw, logit_bias)


def always(value: float) -> FunctionScorer:
    return FunctionScorer(f"always {value}", lambda prompts, responses: [value] * len(prompts))


def test_n_proposals_per_block_and_the_last_block_is_what_is_left() -> None:
    engine = Scripted()
    InferenceGuard(6, 3, 4, 10).generate([PROMPT, PROMPT], Models(engine, always(0.0), always(0.0)), Sampling(), [0, 1])
    assert engine.calls == [(12, 4, False), (12, 4, False), (12, 2, False)]


def test_a_block_with_nothing_feasible_is_proposed_again_m_times() -> None:
    engine = Scripted()
    models = Models(engine, always(0.0), always(1.0))
    found = InferenceGuard(4, 2, 3, 6, retries=2).generate([PROMPT], models, Sampling(), [0])
    assert engine.calls == [(4, 3, False), (4, 3, True), (4, 3, True)] * 2
    assert [block.attempts for block in found.trace[0]] == [3, 3]
    assert sum(block.proposed_tokens for block in found.trace[0]) == 72
    assert len(found.beams) == 0  # all finished over budget


def test_rows_over_budget_may_recover_but_not_leave() -> None:
    """Cost 1 until the text has two words: no prefix is feasible, the whole response is."""
    cost = FunctionScorer("late", lambda prompts, responses: [0.0 if len(r.split()) > 3 else 1.0 for r in responses])
    engine = ToyEngine(seed=1, end_logit=-9.0, pieces=(" a", " b"))
    guard = Guard(engine, always(0.0), cost, strategy=InferenceGuard(4, 2, 2, 4, retries=0))
    response = guard.generate("hello")[0]
    assert response.finish_reason == "length"
    assert response.cost == 0
    assert response.record["released"]["block_scores"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_beams": 0}, "n_beams must be an integer >= 1, got 0"),
        ({"n_beams": 4, "keep": 8}, r"keep must be at most n_beams \(4\), got 8"),
        ({"n_beams": 10, "keep": 4}, r"n_beams must be a multiple of keep \(4\), got 10"),
        ({"n_beams": 2.5}, "n_beams must be an integer"),
        ({"n_beams": True}, "n_beams must be an integer"),
        ({"block_tokens": 0}, "block_tokens must be an integer >= 1"),
        ({"retries": -1}, "retries must be an integer >= 0"),
        ({"threshold": 1.0}, r"threshold must be in \[0, 1\), got 1.0"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"penalty": float("inf")}, "penalty must be a finite number > 0"),
        ({"discourage": float("nan")}, "discourage must be"),
        ({"accounting": "increments"}, "Did you mean 'increment'"),
    ],
)
def test_bad_settings_are_refused_with_bound_and_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        InferenceGuard(**settings)


def test_bad_prompts_are_refused_before_a_token_is_drawn() -> None:
    engine = Scripted()
    guard = Guard(engine, always(0.0), always(0.0), strategy=InferenceGuard(2, 1, 2, 4))
    bad: list[tuple[Sequence[Any], str]] = [
        (["fine", "   "], "prompt 1 must be a text that is not empty"),
        (["fine", []], "prompt 1 must be a conversation whose last turn is the user's"),
        ([[{"role": "tool", "content": "x"}]], "role in prompt 0 must be one of"),
        ([[{"role": "user"}]], "messages of the form"),
        ([[{"role": "user", "content": None}]], "content in prompt 0 must be a string"),
        ([3], "a string or a list of chat messages"),
    ]
    for prompts, message in bad:
        with pytest.raises(InvalidArgument, match=message):
            guard.generate(prompts)
    with pytest.raises(PromptTooLong, match="prompt 1 must be at most"):
        guard.generate(["fine", "x" * 5000])
    with pytest.raises(InvalidArgument, match="seed must be"):
        guard.generate(["fine"], seed=-1)
    with pytest.raises(InvalidArgument, match="seeds must be one per prompt"):
        guard.generate(["fine"], seeds=[1, 2])
    assert engine.calls == []


def test_a_critic_that_does_not_fit_is_refused() -> None:
    models = toy(True, SafetyBudget(), 6)
    other = ToyEngine(seed=5)
    with pytest.raises(FingerprintMismatch, match="was trained on model"):
        Guard(other, models.reward, models.cost, critic=models.critic)
    blind = ToyEngine(seed=4, end_logit=-0.5, horizon=6, latents=False)
    with pytest.raises(MissingCapability, match="needs latents"):
        Guard(blind, models.reward, models.cost, critic=models.critic)


def guarded(**settings: Any) -> Guard:
    engine, reward, cost = ToyEngine(seed=4, end_logit=-0.5), ToyReward(1), ToyCost(2)
    return Guard(engine, reward, cost, strategy=InferenceGuard(8, 2, 2, 6, budget=SafetyBudget(0.5), **settings))


@pytest.mark.parametrize("accounting", ["increment", "accumulate", "final"])
def test_records_replay_and_tampered_ones_do_not(accounting: str) -> None:
    guard = guarded(accounting=accounting)
    for seed in range(10):
        response = guard.generate("be kind", seed=seed)[0]
        record = json.loads(json.dumps(response.record))  # as it comes back from a file
        held = replay(record, guard.gate.cost)
        assert held.holds, held.reasons
        assert held.budget_left == pytest.approx(response.budget_left)
        worse = json.loads(json.dumps(record))
        worse["released"]["text"] = (response.text + " rude")[: len(response.text)].replace("kind", "rude")
        if worse["released"]["text"] != response.text:
            assert not replay(worse, guard.gate.cost).holds
        longer = json.loads(json.dumps(record))
        longer["released"]["text"] += "!"
        assert "the blocks do not cover the text" in replay(longer, guard.gate.cost).reasons
        richer = json.loads(json.dumps(record))
        richer["budget"]["limit"] += 1
        assert not replay(richer, guard.gate.cost).holds
        assert "cost model" in replay(record, FailClosed(always(0.0))).reasons[0]
    with pytest.raises(InvalidArgument, match="record version"):
        replay({"version": 99}, guard.gate.cost)
    with pytest.raises(InvalidArgument, match="a record of this program"):
        replay({"version": 1}, guard.gate.cost)


@pytest.mark.parametrize(
    ("field", "value"),
    [("text", 3), ("block_ends", "12"), ("block_tokens", ["1"]), ("budget_path", None), ("accounting", "none")],
)
def test_malformed_records_are_bad_input(field: str, value: object) -> None:
    guard = guarded()
    record = json.loads(json.dumps(guard.generate("be kind")[0].record))
    record["released"][field] = value
    with pytest.raises(InvalidArgument):
        replay(record, guard.gate.cost)
    del record["released"][field]
    with pytest.raises(InvalidArgument):
        replay(record, guard.gate.cost)


def test_every_fallback_over_budget_releases_nothing() -> None:
    guard = Guard(ToyEngine(seed=1), always(0.0), always(1.0), strategy=InferenceGuard(2, 1, 2, 4))
    response = guard.generate("hello")[0]
    assert (response.text, response.finish_reason, response.cost) == ("", "content_filter", None)
    assert "every fallback is over the budget" in response.record["why"]


def test_the_first_fallback_within_budget_leaves() -> None:
    cost = FunctionScorer("only no", lambda prompts, responses: [-1.0 if r == "No." else 1.0 for r in responses])
    guard = Guard(
        ToyEngine(seed=1), always(0.0), cost, strategy=InferenceGuard(2, 1, 2, 4), fallbacks=("Never!", "No.")
    )
    response = guard.generate("hello")[0]
    assert (response.text, response.finish_reason, response.cost) == ("No.", "content_filter", -1.0)
    assert response.budget_left == 1.0
    assert replay(response.record, guard.gate.cost).holds


def test_conversations_reach_the_scorers_whole() -> None:
    seen: list[Conversation] = []

    class Watching:
        name, fingerprint = "watching", "0"

        def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
            seen.extend(prompts)
            return torch.zeros(len(prompts))

    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "How are you?"},
    ]
    guard = Guard(ToyEngine(seed=1), always(0.0), Watching(), strategy=InferenceGuard(2, 1, 2, 4))
    guard.generate([turns])
    assert {tuple((m.role, m.content) for m in prompt) for prompt in seen} == {
        tuple((turn["role"], turn["content"]) for turn in turns)
    }


def test_batches_do_not_change_answers() -> None:
    prompts = [f"be {word}" for word in ("kind", "plain", "rude", "kind plain", "rude rude")]
    whole, small = guarded(), guarded()
    small.batch_rows = 8
    texts = [response.text for response in whole.generate(prompts, seed=3)]
    assert texts == [response.text for response in small.generate(prompts, seed=3)]
    assert texts == [whole.generate(prompt, seed=3)[0].text for prompt in prompts]
