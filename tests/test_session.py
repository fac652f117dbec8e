"""Prompts that join and leave a search between blocks get the answers that they get alone, bit for bit."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import GuardedResponse, Sampling, conversation
from inferenceguard.errors import EngineFault, InvalidArgument, PromptTooLong
from inferenceguard.guard import Guard
from inferenceguard.record import replay
from inferenceguard.session import Question, Session
from inferenceguard.strategies import BaseSampling
from inferenceguard.testing import FaultyEngine, ToyCost, ToyEngine, ToyReward, check_engine
from served import tiny_guard, toy_guard

WORDS = ("be kind", "be plain", "rude", "kind rude plain", "a kind one", "plain words, please", "r", "say it")


def questions(guard: Guard, count: int, seed: int) -> list[Question]:
    """Different prompts, seeds, budgets, lengths and stop texts, with few kinds of sampling."""
    dice = random.Random(seed)
    made = []
    for index in range(count):
        strategy: Any = replace(
            guard.strategy,  # type: ignore[type-var]
            budget=SafetyBudget(dice.choice([-1.0, 0.0, 0.5, 2.0])),
            max_new_tokens=dice.choice([2, 5, 6]),
        )
        sampling = dice.choice([guard.sampling, guard.sampling, Sampling(0.5)])
        stop = dice.choice([(), (), ("plain",), ("rude", "dr")])
        made.append(Question(conversation(WORDS[index % len(WORDS)]), index, strategy, sampling, stop))
    return made


def together(guard: Guard, asked: list[Question], seed: int, cancel: float = 0.0) -> dict[int, GuardedResponse]:
    """The answers of prompts that join at random blocks, and of which some leave again. Checks what is streamed."""
    session, dice, waiting = Session(guard), random.Random(seed), dict(enumerate(asked))
    numbers: dict[int, int] = {}
    found: dict[int, GuardedResponse] = {}
    text: dict[int, str] = defaultdict(str)
    while waiting or numbers:
        for index in list(waiting)[: dice.choice([0, 1, 2])]:
            numbers[session.submit(waiting.pop(index))] = index
        if numbers and dice.random() < cancel:
            gone = dice.choice(list(numbers))
            session.cancel(gone)
            session.cancel(gone)  # twice is once
            del numbers[gone]
        for event in session.step():
            index = numbers[event.number]
            text[index] += event.text
            assert event.error is None
            if event.response is not None:
                found[index] = event.response
                assert text[index] == event.response.text
                del numbers[event.number]
    assert session.rows == 0
    assert not session._searches, "a search without prompts must let go of its caches"
    return found


def alone(guard: Guard, question: Question) -> GuardedResponse:
    session = Session(guard)
    session.submit(question)
    while True:
        for event in session.step():
            if event.response is not None:
                return event.response


def same(one: GuardedResponse, two: GuardedResponse) -> None:
    assert (one.text, one.finish_reason, one.usage) == (two.text, two.finish_reason, two.usage)
    assert (one.cost, one.reward, one.budget_left) == (two.cost, two.reward, two.budget_left)
    assert one.record == two.record, "the search of a prompt depends on nothing around it"


@pytest.mark.parametrize("widths", [(), (1, 4)])
@pytest.mark.parametrize("seed", [1, 2])
def test_who_else_is_there_changes_nothing(seed: int, widths: tuple[int, ...]) -> None:
    guard = toy_guard(widths=widths)
    asked = questions(guard, 20, seed)
    for index, response in together(guard, asked, seed, cancel=0.1).items():
        same(response, alone(guard, asked[index]))
        assert response.budget_left is None or response.budget_left >= 0
        if not response.record["unscored"]:
            assert replay(response.record, guard.gate.cost).holds
        for stop in asked[index].stop:
            assert stop not in response.text or response.finish_reason == "content_filter"


def test_a_transformer_draws_the_same_bits() -> None:
    guard = tiny_guard()
    asked = questions(guard, 8, 3)
    found = together(guard, asked, 4)
    assert len(found) == 8
    for index, response in found.items():
        same(response, alone(guard, asked[index]))


def test_other_temperatures_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = tiny_guard()
    session, drawn = Session(guard), []
    extend = type(guard.models.engine).extend

    def counted(self: Any, beams: Any, *others: Any) -> Any:
        drawn.append(beams.prompt_index.tolist())
        return extend(self, beams, *others)

    monkeypatch.setattr(type(guard.models.engine), "extend", counted)
    for number, sampling in enumerate((guard.sampling, Sampling(0.5), Sampling(0.0))):
        session.submit(Question(conversation(WORDS[number]), number, guard.strategy, sampling))
    session.step()
    assert set(drawn[0]) == {0, 1, 2}
    rows = guard.models.engine.begin([[5, 6], [7]], [1, 2])
    engine: Any = guard.models.engine
    with pytest.raises(InvalidArgument, match="2 of them"):
        engine.extend(rows, 2, [Sampling()], 0, None)


def test_a_session_answers_as_generate_does() -> None:
    guard = toy_guard()
    asked = [Question(conversation(word), 7, guard.strategy, guard.sampling) for word in WORDS]
    found = together(guard, asked, 5)
    for index, direct in enumerate(guard.generate(list(WORDS), seed=7)):
        same(found[index], direct)


def test_an_engine_that_cannot_mix_draws_gives_the_same_answers() -> None:
    guard = toy_guard()
    asked = questions(guard, 10, 6)
    engine: Any = FaultyEngine(guard.models.engine)  # a wrapper without `mixes_draws`
    apart = Guard(engine, ToyReward(1), ToyCost(2), strategy=guard.strategy)
    assert not hasattr(engine, "mixes_draws")
    one, two = together(guard, asked, 7), together(apart, asked, 7)
    assert {index: answer.text for index, answer in one.items()} == {i: answer.text for i, answer in two.items()}


def test_draw_numbers_per_row_are_part_of_the_contract() -> None:
    class Careless(ToyEngine):
        def extend(self, beams: Any, tokens: int, sampling: Any, draw: Any, logit_bias: Any) -> Any:
            number = draw if isinstance(draw, int) else torch.full_like(draw, int(draw[0]))
            return super().extend(beams, tokens, sampling, number, logit_bias)

    check_engine(ToyEngine(seed=3))
    with pytest.raises(AssertionError, match="one number per row"):
        check_engine(Careless(seed=3))


def test_plain_sampling_can_be_joined_too() -> None:
    guard = Guard(ToyEngine(seed=4, end_logit=-0.5), ToyReward(1), ToyCost(2), strategy=BaseSampling(6))
    asked = questions(guard, 12, 8)
    for index, response in together(guard, asked, 9).items():
        same(response, alone(guard, asked[index]))


def test_an_engine_that_fails_ends_its_prompts_and_no_others() -> None:
    guard = toy_guard()
    broken: Any = FaultyEngine(guard.models.engine, raises=1.0)
    session = Session(Guard(broken, ToyReward(1), ToyCost(2), strategy=guard.strategy))
    numbers = [session.submit(question) for question in questions(guard, 4, 1)]
    events = session.step()
    assert sorted(event.number for event in events) == numbers
    assert all(isinstance(event.error, EngineFault) and not event.text for event in events)
    assert session.rows == 0
    broken.raises = 0.0  # it is back
    again = session.submit(questions(guard, 1, 1)[0])
    assert [event.number for event in session.step()] == [again]


def test_a_prompt_that_does_not_fit_leaves_the_others_alone() -> None:
    guard = toy_guard()
    session = Session(guard)
    question = questions(guard, 1, 1)[0]
    session.submit(question)
    with pytest.raises(PromptTooLong):
        session.submit(replace(question, prompt=conversation("x" * 5000)))
    assert [event.number for event in session.step()] == [0]
