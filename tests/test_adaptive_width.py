"""Adaptive width (METHOD 7.4): few proposals where the risk is small, N where it is not, back where a path fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferenceguard import config
from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import Sampling, conversation
from inferenceguard.errors import InvalidArgument
from inferenceguard.guard import FALLBACKS, Guard
from inferenceguard.record import replay
from inferenceguard.scorers import FunctionScorer
from inferenceguard.search import SearchPlan
from inferenceguard.session import Question
from inferenceguard.strategies import InferenceGuard
from inferenceguard.testing import ToyCost, ToyCritic, ToyEngine, ToyReward, check_strategy
from test_session import alone, same, together

PROMPT = "be kind"
NO_END = -50.0  # an end logit: the toy never ends before the length limit


def guard(cost: Callable[[str], float], *, tokens: int = 6, end: float = NO_END, **more: Any) -> Guard:
    """N 8, blocks of 2 tokens, 1 and 4 proposals first; cost by the response's text."""
    scorer = FunctionScorer("by text", lambda prompts, responses: [cost(text) for text in responses])
    strategy = InferenceGuard(8, 2, 2, tokens, widths=(1, 4), **more)
    return Guard(ToyEngine(seed=4, end_logit=end), ToyReward(1), scorer, strategy=strategy)


def widths_of(response: Any) -> list[list[int]]:
    """Proposals per attempt, for each block of the record's search."""
    return [
        [block["attempt"].count(attempt) for attempt in range(block["attempts"])] for block in response.record["search"]
    ]


def test_where_nothing_is_risky_a_prompt_costs_one_row() -> None:
    answer = guard(lambda text: -5.0).generate(PROMPT)[0]
    assert widths_of(answer) == [[1], [1], [1]]
    assert answer.usage.proposed_tokens == answer.usage.completion_tokens == 6


def test_near_the_budget_it_widens_to_n() -> None:
    answer = guard(lambda text: -0.5).generate(PROMPT)[0]  # within the budget, closer to it than the margin
    assert widths_of(answer) == [[1, 4, 8]] * 3
    assert answer.finish_reason != "content_filter"
    assert widths_of(guard(lambda text: -0.5, margin=0.5).generate(PROMPT)[0]) == [[1]] * 3


def test_it_widens_only_for_the_block_that_needs_it() -> None:
    answer = guard(lambda text: -0.5 if len(text.split()) in (3, 4) else -5.0, tokens=6).generate(PROMPT)[0]
    counts = widths_of(answer)
    assert [1] in counts
    assert [1, 4, 8] in counts


def first_draw(engine: ToyEngine, tokens: int) -> str:
    """What the first row of the first attempt says."""
    beams = engine.begin([engine.encode(conversation(PROMPT))], [0])
    return engine.decode(engine.extend(beams, tokens, Sampling(), 0, None).token_ids[0])


def test_behind_a_narrow_path_that_fails_it_goes_back_and_stays_wide() -> None:
    trap = first_draw(ToyEngine(seed=4, end_logit=NO_END), 2)

    def cost(text: str) -> float:  # the narrow path looks well for a block, and has no way on
        return 5.0 if text.startswith(trap) and len(text) > len(trap) else -5.0

    answer = guard(cost).generate(PROMPT)[0]
    assert not answer.text.startswith(trap)
    assert answer.finish_reason == "length"
    assert answer.cost == -5.0
    assert [block["block"] for block in answer.record["search"]] == [0, 1, 0, 1, 2]
    assert widths_of(answer) == [[1], [1, 4, 8, 8, 8], [0, 0, 8], [0, 0, 8], [0, 0, 8]]
    assert set(answer.record["search"][1]["fate"]) == {"over budget"}
    assert replay(json.loads(json.dumps(answer.record)), guard(cost).gate.cost).holds


def test_what_is_streamed_is_never_taken_back() -> None:
    trap = first_draw(ToyEngine(seed=4, end_logit=NO_END), 2)

    def cost(text: str) -> float:
        return 5.0 if text.startswith(trap) and len(text) > len(trap) else -5.0

    for risk in (cost, lambda text: -5.0, lambda text: -0.5):
        events = list(guard(risk, tokens=7).stream(PROMPT))
        answer = events[-1].response
        assert answer is not None
        assert "".join(event.text for event in events) == answer.text
        assert answer.finish_reason == "length"
    assert len([event for event in events if event.text]) >= 1
    calm = [event.text for event in guard(lambda text: -5.0, tokens=8).stream(PROMPT)]
    assert sum(bool(text) for text in calm) >= 2  # it does stream, one block behind


def test_a_row_that_went_back_may_be_shorter_than_the_others() -> None:
    trap = first_draw(ToyEngine(seed=4, end_logit=NO_END), 2)

    def cost(text: str) -> float:
        return 5.0 if text.startswith(trap) and len(text) > len(trap) else -5.0

    prompts = [PROMPT, "be plain", "be rude", "kind rude"]
    both = guard(cost, tokens=5)  # the last block is shorter: rows of different lengths have different room
    answers = both.generate(prompts, seed=0)
    assert [answer.usage.completion_tokens for answer in answers] == [5] * 4
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = both.generate(prompt, seed=0)[0]
        assert (alone.text, alone.usage) == (answer.text, answer.usage)


@given(seed=st.integers(0, 10_000), limit=st.floats(-1.5, 1.5), critic=st.booleans(), margin=st.floats(0, 2))
@settings(max_examples=150, deadline=None)
def test_nothing_over_budget_leaves_whatever_the_width(seed: int, limit: float, critic: bool, margin: float) -> None:
    budget, engine = SafetyBudget(limit), ToyEngine(seed=4, end_logit=-0.5, horizon=6)
    reward, cost = ToyReward(1), ToyCost(2)
    exact = ToyCritic(engine, [conversation(PROMPT)], reward, cost, 6) if critic else None
    strategy = InferenceGuard(8, 2, 2, 6, widths=(1, 4), margin=margin, budget=budget)
    answer = Guard(engine, reward, cost, critic=exact, strategy=strategy).generate(PROMPT, seed=seed)[0]
    if answer.text in FALLBACKS or not answer.text:
        return
    assert answer.budget_left is not None
    assert answer.budget_left >= 0
    assert float(cost.score([conversation(PROMPT)], [answer.text])[0]) <= limit


def test_the_strategy_keeps_its_contract() -> None:
    check_strategy(InferenceGuard(8, 2, 2, 6, widths=(1, 4)))


@pytest.mark.parametrize("widths", [(4, 1), (0, 2), (1, 8), (1, 1), (1.5,), (True, 3)])
def test_bad_widths_are_refused(widths: Any) -> None:
    with pytest.raises(InvalidArgument, match="widths must be rising integers"):
        SearchPlan(8, 2, 2, 6, widths=widths)


def test_auto_by_name() -> None:
    strategy = config.parse_config({"search": {"n_beams": "auto"}}).strategy()
    assert (strategy.n_beams, strategy.widths) == (config.PRESET_BEAMS, (1, 4))
    with pytest.raises(InvalidArgument, match="n_beams"):
        config.parse_config({"search": {"n_beams": "most"}}).strategy()


@pytest.mark.parametrize("seed", range(6))
def test_who_joins_or_leaves_changes_no_other_answer(seed: int) -> None:
    strategy = InferenceGuard(8, 2, 2, 6, widths=(1, 4), retries=1)
    guard = Guard(ToyEngine(seed=4, end_logit=-0.5), ToyReward(1), ToyCost(2, low=-1.25), strategy=strategy)
    asked = [Question(conversation(text), seed, strategy, Sampling()) for text in ("be kind", "be rude", "be plain")]
    for index, response in together(guard, asked * 3, seed, cancel=0.3).items():
        same(response, alone(guard, (asked * 3)[index]))
