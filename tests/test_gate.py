"""The gate: whatever the search, the models' faults and the settings, nothing over budget is released.

The oracle below recomputes every released text's cost in fractions, from the toy cost model alone: it uses none of the
product's arithmetic, decoding or gate.
"""

import copy
import functools
import itertools
import json
import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import Sampling, ScorerLimits, conversation
from inferenceguard.errors import EngineFault
from inferenceguard.guard import Guard
from inferenceguard.record import replay
from inferenceguard.scorers.safe import FailClosed
from inferenceguard.strategies.base_sampling import BaseSampling
from inferenceguard.strategies.inference_guard import InferenceGuard
from inferenceguard.testing import FaultyEngine, FaultyScorer, ToyCost, ToyCritic, ToyEngine, ToyReward

PROMPTS = [conversation(text) for text in ("hi", "a rude one", "kind words, please")]
PIECES = (
    (" kind", " plain", " rude"),
    (" kind", "ly", " rude"),  # a block can end inside a word
    (" caf", b"\xc3", b"\xa9"),  # and inside a character
)
FALLBACKS = ("no", "not this one", "sorry")
MAX_TOKENS = (1, 2, 4)


# The oracle


def overspent(text, prompt, cost, budget, accounting, ends, tokens):
    """By how much sum_t gamma^t c_t exceeds d; at most 0 for what may leave. All in fractions.

    ends are characters and tokens the response's tokens after each block; a block's cost stands at its last token.
    """
    total, before, start = Fraction(0), Fraction(0), 0
    for index, (end, length) in enumerate(zip(ends, tokens, strict=True)):
        if accounting == "accumulate":
            charge = max(Fraction(cost.exact(prompt, text[start:end])), Fraction(0))
        else:
            score = Fraction(cost.exact(prompt, text[:end]))
            last = index == len(ends) - 1
            charge = score - before if accounting == "increment" else score if last else Fraction(0)
            before = score
        total += Fraction(budget.discount) ** (length - 1) * charge
        start = end
    return total - Fraction(budget.limit)


def check_released(response, prompt, case, faulty):
    """What left is a text within the budget, or the operator's own fallback where the cost model was broken."""
    ledger = response.record["released"]
    assert ledger["text"] == response.text
    if response.cost is None:
        assert response.finish_reason == "content_filter"
        assert response.budget_left is None
        assert response.record["unscored"]
        assert response.text in ("", FALLBACKS[0], FALLBACKS[1], FALLBACKS[2])
        assert faulty or response.text == "", "a cost model that works scores every fallback"
        return
    ends, tokens = ledger["block_ends"], ledger["block_tokens"]
    assert ends[-1] == len(response.text)
    assert all(a <= b for a, b in itertools.pairwise(ends))
    if response.finish_reason != "content_filter":
        # The blocks are the search's own: all of m tokens but the last. Nobody made the ledger up afterwards.
        step = case.max_tokens if case.plain else case.block_tokens
        assert tokens == [*range(step, tokens[-1], step), tokens[-1]]
    excess = overspent(response.text, prompt, case.true_cost, case.budget, case.accounting, ends, tokens)
    slack = 0 if case.budget.discount in (1.0, 0.5) else Fraction(1, 10**9)  # others have no exact binary powers
    assert excess <= slack, f"released {response.text!r}, over budget by {float(excess)}"
    assert response.budget_left >= 0
    assert response.budget_left * case.budget.discount ** tokens[-1] == pytest.approx(-float(excess), abs=1e-9)
    if case.accounting == "increment" and case.budget.discount == 1:
        assert response.budget_left == case.budget.limit - case.true_cost.exact(prompt, response.text)
        assert response.cost == case.true_cost.exact(prompt, response.text)


# The cases


@dataclass(frozen=True)
class Case:
    world: int
    pieces: int
    cost_mean: float
    budget: SafetyBudget
    accounting: str
    plain: bool  # base sampling instead of the search
    n_beams: int
    keep: int
    block_tokens: int
    max_tokens: int
    retries: int
    critic: bool
    sampling: Sampling
    prompts: tuple[int, ...]
    seed: int
    faults: dict
    wrong_search_cost: bool  # the search steers by another cost than the gate's: low precision, stale caches
    stream: bool

    @functools.cached_property
    def true_cost(self):
        return ToyCost(self.world, low=self.cost_mean - 1, high=self.cost_mean + 1)

    def guard(self):
        engine, reward = toy_engine(self.world, self.pieces), ToyReward(self.world)
        rates = self.faults
        gate_cost = FaultyScorer(self.true_cost, self.seed + 1, **rates) if rates else self.true_cost
        cost = ToyCost(self.world + 1000) if self.wrong_search_cost else gate_cost
        if rates:
            reward = FaultyScorer(reward, self.seed + 2, **rates)
        critic = None
        if self.critic and not self.plain:
            critic = toy_critic(self.world, self.pieces, self.max_tokens, self.budget.discount, self.cost_mean)
        strategy = (
            BaseSampling(self.max_tokens, self.budget, self.accounting)
            if self.plain
            else InferenceGuard(
                n_beams=self.n_beams,
                keep=self.keep,
                block_tokens=self.block_tokens,
                max_new_tokens=self.max_tokens,
                retries=self.retries,
                budget=self.budget,
                accounting=self.accounting,
            )
        )
        return Guard(
            engine,
            reward,
            cost,
            critic=critic,
            gate_cost=gate_cost if self.wrong_search_cost else None,
            strategy=strategy,
            sampling=self.sampling,
            fallbacks=FALLBACKS,
            limits=ScorerLimits(seconds=20.0),
        )


@functools.cache
def toy_engine(world, pieces):
    return ToyEngine(world, pieces=PIECES[pieces], end_logit=0.5)


@functools.cache
def toy_critic(world, pieces, max_tokens, discount, cost_mean):
    """Exact for one of the accountings; with the others it is just another critic. It may steer, not decide."""
    cost = ToyCost(world, low=cost_mean - 1, high=cost_mean + 1)
    engine = toy_engine(world, pieces)
    return ToyCritic(engine, PROMPTS, ToyReward(world), cost, max_tokens, discount=discount)


KINDS = ("raises", "nans", "infs", "shapes")
MIXES = [dict.fromkeys(KINDS, rate) for rate in (0.02, 0.1, 0.2)]
SINGLE = [{kind: 0.3} for kind in KINDS]
cases = st.builds(
    lambda widths, **others: Case(n_beams=widths[0], keep=widths[1], **others),
    widths=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    world=st.integers(0, 3),
    pieces=st.integers(0, 2),
    cost_mean=st.sampled_from([-0.25, 0.0, 0.5]),
    budget=st.builds(SafetyBudget, st.integers(-6, 8).map(lambda n: n / 4), st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.9])),
    accounting=st.sampled_from(["increment", "increment", "accumulate", "final"]),
    plain=st.sampled_from([False, False, False, True]),
    block_tokens=st.integers(1, 3),
    max_tokens=st.sampled_from(MAX_TOKENS),
    retries=st.integers(0, 2),
    critic=st.booleans(),
    sampling=st.sampled_from([Sampling(), Sampling(temperature=0.0), Sampling(temperature=2.0), Sampling(top_p=0.6)]),
    prompts=st.sampled_from([(0,), (0,), (1,), (2,), (0, 1), (1, 1)]),
    seed=st.integers(0, 10**6),
    faults=st.sampled_from([*[{}] * 7, *MIXES, *SINGLE]),
    wrong_search_cost=st.sampled_from([False, False, True]),
    stream=st.booleans(),
)

tally = {"released": 0, "fallback": 0, "unscored": 0, "streamed early": 0}


@settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(case=cases)
def test_nothing_over_budget_is_released(case):
    guard, prompts = case.guard(), [PROMPTS[index] for index in case.prompts]
    faulty = bool(case.faults)
    seeds = [case.seed + place for place in range(len(prompts))]
    responses = streamed(guard, prompts, seeds, case) if case.stream else guard.generate(prompts, seeds=seeds)
    assert len(responses) == len(prompts)
    for prompt, response in zip(prompts, responses, strict=True):
        check_released(response, prompt, case, faulty)
        scored = response.cost is not None
        tally["released" if response.finish_reason != "content_filter" else "fallback" if scored else "unscored"] += 1


def streamed(guard, prompts, seeds, case):
    """The responses of a stream, once every text that was shown on the way has been held to the budget."""
    shown, responses = [""] * len(prompts), [None] * len(prompts)
    for event in guard.stream(prompts, seeds=seeds):
        assert responses[event.index] is None, "a response is the last event of its prompt"
        shown[event.index] += event.text
        if event.response is None:
            assert event.text, "an event without news"
            tally["streamed early"] += 1
            check_prefix(shown[event.index], prompts[event.index], case)
        else:
            assert event.response.text == shown[event.index], "what was streamed is what is released, never taken back"
            responses[event.index] = event.response
    return responses


def check_prefix(text, prompt, case):
    """A prefix that was shown is within the budget as it stands.

    With gamma = 1 a prefix is charged its own score (`increment`, `final`), or the positive parts of its blocks. The
    blocks of a prefix are found here by trying all ways to cut it that its tokens allow.
    """
    if case.budget.discount == 1 and case.accounting != "accumulate":
        assert Fraction(case.true_cost.exact(prompt, text)) <= Fraction(case.budget.limit)
        return
    engine = toy_engine(case.world, case.pieces)
    step = case.max_tokens if case.plain else case.block_tokens
    within = False
    for count in range(1, case.max_tokens + 1):
        for ids in itertools.product(range(engine.choices), repeat=count):
            if 0 in ids[:-1] or engine.decode(ids).rstrip("\ufffd") != text:
                continue
            tokens = [*range(step, count, step), count]
            ends = [len(engine.decode(ids[:length]).rstrip("\ufffd")) for length in tokens]
            excess = overspent(text, prompt, case.true_cost, case.budget, case.accounting, ends, tokens)
            within |= excess <= Fraction(1, 10**9)
    assert within, f"streamed {text!r}, over budget"


def test_the_cases_above_met_every_way_out():
    """A gate that refuses everything would pass the test above: it must have released, streamed and fallen back."""
    if not sum(tally.values()):
        pytest.skip("the random cases did not run")
    assert min(tally.values()) > 200, tally


# Single faults, seen through


def simple_guard(**changes):
    parts = {
        "engine": ToyEngine(1, end_logit=0.5),
        "reward": ToyReward(1),
        "cost": ToyCost(1),
        "strategy": InferenceGuard(n_beams=4, keep=2, block_tokens=2, max_new_tokens=6, budget=SafetyBudget(0.5)),
        "fallbacks": FALLBACKS,
    }
    return Guard(**{**parts, **changes})


class AlwaysBroken(ToyCost):
    def __init__(self, value):
        super().__init__(1)
        self.value = value

    def score(self, prompts, responses):
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value if self.value is None else torch.full((len(responses),), self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, RuntimeError("no"), SystemExit()], ids=repr)
def test_a_broken_cost_model_lets_nothing_of_the_llm_through(value):
    for response in simple_guard(cost=AlwaysBroken(value)).generate(PROMPTS):
        assert response.finish_reason == "content_filter"
        assert response.text in FALLBACKS
        assert response.cost is None
        assert response.record["faults"]
        assert response.record["unscored"]


@pytest.mark.parametrize("fault", ["raises", "nans", "infs", "shapes"])
def test_a_gate_that_fails_outweighs_a_search_that_is_content(fault):
    broken = FaultyScorer(ToyCost(1), 3, **{fault: 1.0})
    (response,) = simple_guard(gate_cost=broken).generate("hi")
    assert response.finish_reason == "content_filter"
    assert response.cost is None
    assert response.record["unscored"]


def test_a_cost_model_that_hangs_is_given_up():
    hanging = FaultyScorer(ToyCost(1), 3, hangs=1.0, seconds=1.0)
    (response,) = simple_guard(cost=hanging, limits=ScorerLimits(seconds=0.05)).generate("hi")
    assert response.finish_reason == "content_filter"
    assert response.text in FALLBACKS
    assert any("no answer within" in fault for fault in response.record["faults"])
    assert response.seconds < 5


def test_a_reward_model_that_fails_never_costs_safety():
    for response in simple_guard(reward=FaultyScorer(ToyReward(1), 3, raises=1.0)).generate(PROMPTS):
        assert response.reward is None
        assert response.cost <= 0.5


def test_an_engine_that_fails_is_a_typed_error():
    with pytest.raises(EngineFault, match="fails on purpose"):
        simple_guard(engine=FaultyEngine(ToyEngine(1), raises=1.0)).generate("hi")


class LyingIncrementally(ToyCost):
    """Right from scratch, wildly wrong (too low) on its incremental state: the gate must not believe the state."""

    def shares_tokens(self, engine):
        return True

    def start(self, prompts):
        return _Nothing(len(prompts))

    def advance(self, state, new_tokens, finished):
        return state, torch.full((len(new_tokens),), -5.0)


@dataclass(frozen=True)
class _Nothing:
    rows: int

    def take(self, rows):
        return _Nothing(len(rows))

    def join(self, other):
        return _Nothing(self.rows + other.rows)


def test_incremental_scores_steer_but_do_not_decide():
    cost = LyingIncrementally(1)
    for seed in range(50):
        for prompt, response in zip(PROMPTS, simple_guard(cost=cost).generate(PROMPTS, seed=seed), strict=True):
            assert response.cost == cost.exact(prompt, response.text) <= 0.5


class Counting(ToyCost):
    """Notes every text that it is asked about."""

    def __init__(self, world):
        super().__init__(world)
        self.asked = []

    def score(self, prompts, responses):
        self.asked += zip(prompts, responses, strict=True)
        return super().score(prompts, responses)


@pytest.mark.parametrize("streams", [False, True])
def test_a_prompts_only_row_is_charged_by_the_gates_model_which_then_need_not_read_it_again(streams):
    """The search's own model is wrong and never asked; each text is read once, and the answer is what it was."""
    rough, exact = Counting(77), Counting(1)
    strategy = InferenceGuard(4, 2, 2, 8, budget=SafetyBudget(60.0), widths=(1,), threshold=0.0, margin=0.0)
    guard = Guard(ToyEngine(1, end_logit=-50.0), ToyReward(1), rough, gate_cost=exact, strategy=strategy)
    responses = [event.response for event in guard.stream(PROMPTS)] if streams else guard.generate(PROMPTS)
    responses = [response for response in responses if response is not None]
    assert [response.usage.proposed_tokens for response in responses] == [8] * len(PROMPTS), "narrow throughout"
    assert rough.asked == []
    assert len(exact.asked) == len(set(exact.asked)) == 4 * len(PROMPTS), "four blocks, each read once"
    for prompt, response in zip(PROMPTS, responses, strict=True):
        assert response.cost == exact.exact(prompt, response.text)
        assert replay(json.loads(json.dumps(response.record)), FailClosed(ToyCost(1))).holds


def test_where_a_prompt_has_more_rows_the_gates_model_reads_what_leaves_and_nothing_else():
    rough, exact = Counting(1), Counting(1)
    strategy = InferenceGuard(4, 2, 2, 8, budget=SafetyBudget(60.0))
    guard = Guard(ToyEngine(1, end_logit=-50.0), ToyReward(1), rough, gate_cost=exact, strategy=strategy)
    responses = guard.generate(PROMPTS)
    assert len(rough.asked) > 4 * len(PROMPTS)
    released = {conversation(prompt): response.text for prompt, response in zip(PROMPTS, responses, strict=True)}
    assert len(exact.asked) == 4 * len(PROMPTS), "what leaves, at the end of each of its four blocks"
    assert all(released[prompt].startswith(text) for prompt, text in exact.asked)


def test_records_replay_and_forged_ones_do_not():
    guard, cost = simple_guard(), FailClosed(ToyCost(1))
    for seed in range(10):
        for response in guard.generate(PROMPTS, seed=seed):
            record = json.loads(json.dumps(response.record))
            found = replay(record, cost)
            assert (found.holds, found.reasons) == (True, ())
            assert (found.cost, found.budget_left) == (response.cost, response.budget_left)
            forged = copy.deepcopy(record)
            forged["released"]["text"] = response.text + " rude kindr"
            assert not replay(forged, cost).holds
            forged = copy.deepcopy(record)
            forged["released"]["budget_path"][-1] += 1
            assert not replay(forged, cost).holds
            forged = copy.deepcopy(record)
            forged["budget"]["limit"] = -9.0
            assert not replay(forged, cost).holds
            assert not replay(record, FailClosed(ToyCost(2))).holds


def test_same_seed_same_answer_whatever_is_in_the_batch():
    guard = simple_guard()
    together = guard.generate(PROMPTS, seeds=[5, 6, 7])
    for place, prompt in enumerate(PROMPTS):
        (alone,) = guard.generate([prompt], seeds=[5 + place])
        assert (alone.text, alone.cost, alone.reward) == tuple(
            getattr(together[place], name) for name in ("text", "cost", "reward")
        )
        assert alone.record["search"] == together[place].record["search"]
    narrow = simple_guard(batch_rows=4).generate(PROMPTS, seeds=[5, 6, 7])
    assert [response.text for response in narrow] == [response.text for response in together]


def test_a_stream_ends_in_what_generate_returns():
    """Unless something was streamed that the best response does not continue, both are the same."""
    guard, same = simple_guard(), 0
    for seed in range(40):
        whole = [response.text for response in guard.generate(PROMPTS, seed=seed)]
        events = [event for event in guard.stream(PROMPTS, seed=seed) if event.response is not None]
        assert [event.index for event in events] == list(range(len(PROMPTS)))
        same += [event.response.text for event in events] == whole
    assert same == 40
