"""Faults injected into engine and scorers under load: an answer within budget, a fixed text, or an error."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from inferenceguard.contracts import ScorerLimits
from inferenceguard.guard import FALLBACKS, Guard
from inferenceguard.server import Limits
from inferenceguard.testing import FaultyScorer, ToyCost, ToyEngine, ToyReward
from served import Live, serving, toy_guard, wait

CLIENTS, REQUESTS = 12, 400
BUDGET = 0.5
EXACT = ToyCost(2)  # the cost model itself, without its faults


class FailingEngine(ToyEngine):
    """Its blocks fail by their number. Calls with a number in `dead` all fail, those that read prompts too."""

    def __init__(
        self, *, period: int = 0, dead: range = range(0), hangs: range = range(0), seconds: float = 0.0
    ) -> None:
        super().__init__(seed=4, end_logit=-0.5)
        self.period, self.dead, self.hangs, self.seconds = period, dead, hangs, seconds
        self.injected: Counter[str] = Counter()
        self.well = False
        self._calls, self._blocks = itertools.count(), itertools.count()

    def begin(self, prompts: Any, seeds: Any) -> Any:
        if next(self._calls) in self.dead and not self.well:
            self._dies()
        return super().begin(prompts, seeds)

    def extend(self, beams: Any, *others: Any) -> Any:
        number = next(self._calls)
        if self.well:
            return super().extend(beams, *others)
        if number in self.dead:
            self._dies()
        block = next(self._blocks)
        if block in self.hangs:
            self.injected["hangs"] += 1
            time.sleep(self.seconds)
        grown = super().extend(beams, *others)
        kinds = {3: "raises", 8: "a row less", 13: "tokens of none", 18: "NaN", 23: "no tokens"}
        fault = kinds.get(block % self.period) if self.period else None
        if fault is None:
            return grown
        self.injected[fault] += 1
        return self._broken(grown, fault, beams)

    def _dies(self) -> None:
        self.injected["dead"] += 1
        raise ConnectionError("the engine's process is gone: be kind")

    def _broken(self, grown: Any, fault: str, before: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("this engine fails on purpose: be kind")
        if fault == "a row less":
            return grown.take(torch.arange(len(grown) - 1))
        if fault == "tokens of none":
            return replace(grown, token_ids=tuple((*ids[:-1], 10**6) for ids in grown.token_ids))
        if fault == "no tokens":
            return replace(grown, token_ids=before.token_ids)
        return replace(grown, log_prob=grown.log_prob * math.nan, latent=grown.latent * math.nan)


def guarded_by(engine: ToyEngine, cost: Any, reward: Any, seconds: float) -> Guard:
    return Guard(engine, reward, cost, strategy=toy_guard().strategy, limits=ScorerLimits(seconds=seconds))


def load(live: Live, requests: int) -> list[dict[str, Any]]:
    """What came back for each request: status, text, every streamed prefix, how it ended."""
    numbers, found = itertools.count(), []

    def client() -> None:
        while (number := next(numbers)) < requests:
            found.append(ask(live, number))

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def ask(live: Live, number: int) -> dict[str, Any]:
    prompt, stream = f"be kind {number}", number % 2 == 0
    body = {"messages": [{"role": "user", "content": prompt}], "seed": number, "stream": stream}
    status, _, answer = live.request("POST", "/v1/chat/completions", body)
    found: dict[str, Any] = {"prompt": prompt, "status": status, "shown": [""], "ended": None, "raw": answer.decode()}
    if status != 200 or not stream:
        choice = json.loads(answer)["choices"][0] if status == 200 else {}
        return found | ({"shown": [choice["message"]["content"]], "ended": choice["finish_reason"]} if choice else {})
    for line in answer.decode().splitlines():
        if not line or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return found | {
                "status": {"engine_fault": 500, "timeout": 504}.get(event["error"]["code"], 500),
                "cut": True,
            }
        delta = event["choices"][0]["delta"].get("content", "")
        found["shown"].append(found["shown"][-1] + delta)
        found["ended"] = event["choices"][0]["finish_reason"] or found["ended"]
    return found


def within_budget(live: Live, found: dict[str, Any]) -> bool:
    """Of all that was shown, also of a stream that an error ended."""
    prompt = live.service.guard.check([found["prompt"]])[0][0]
    texts = [text for text in found["shown"] if text and text not in FALLBACKS]
    return all(EXACT.exact(prompt, text) <= BUDGET for text in texts)


def counts(answers: list[dict[str, Any]]) -> Counter[str]:
    return Counter(
        f"{answer['status']} {answer['ended'] or ('stream cut' if 'cut' in answer else 'refused')}"
        for answer in answers
    )


def check(live: Live, answers: list[dict[str, Any]], statuses: set[int]) -> None:
    assert len(answers) == REQUESTS
    over = [answer for answer in answers if not within_budget(live, answer)]
    assert not over, over[:3]
    assert {answer["status"] for answer in answers} <= statuses, counts(answers)
    others = [answer for answer in answers if "on purpose" in answer["raw"] or "be kind" in answer["raw"]]
    assert not others, "an error says what stood in its batch"


def recovers(live: Live) -> None:
    """Afterwards the server answers as the guard does alone, and holds nothing."""
    wait(lambda: live.service.scheduler.running == live.service.scheduler.waiting == 0)
    assert live.request("GET", "/readyz")[0] == 200
    assert live.service.scheduler._session.rows == 0
    alone = Guard(ToyEngine(seed=4, end_logit=-0.5), ToyReward(1), ToyCost(2), strategy=toy_guard().strategy)
    for number in range(0, 6):
        found = ask(live, number)
        expected = alone.generate(found["prompt"], seed=number)[0]
        assert (found["shown"][-1], found["ended"]) == (expected.text, expected.finish_reason)


def test_engine_faults_under_load() -> None:
    engine = FailingEngine(period=29, dead=range(200, 260))
    with serving(guarded_by(engine, ToyCost(2), ToyReward(1), 60), limits=Limits(rows=64)) as live:
        answers = load(live, REQUESTS)
        check(live, answers, {200, 500})
        found = counts(answers)
        print(json.dumps({"answers": found, "injected": engine.injected}))
        assert min(engine.injected[kind] for kind in ("raises", "a row less", "tokens of none", "NaN", "no tokens")) > 0
        assert engine.injected["dead"] > 0
        assert found["200 stop"] > 0
        assert found["500 refused"] > 0
        assert found["500 stream cut"] > 0, "an engine that dies in the middle of a stream ends it with an error"
        engine.well = True
        recovers(live)


def test_an_engine_that_hangs_costs_its_requests_their_time_and_nobody_an_unguarded_answer() -> None:
    engine = FailingEngine(hangs=range(20, 21), seconds=4.0)
    limits = Limits(rows=64, request_seconds=2.0, queue=REQUESTS)
    with serving(guarded_by(engine, ToyCost(2), ToyReward(1), 60), limits=limits) as live:
        answers: list[dict[str, Any]] = []
        loading = threading.Thread(target=lambda: answers.extend(load(live, REQUESTS)))
        loading.start()
        wait(lambda: engine.injected["hangs"] == 1)
        wait(lambda: live.request("GET", "/readyz")[0] == 503, 6)
        assert live.request("GET", "/healthz")[0] == 200
        loading.join()
        check(live, answers, {200, 504})
        found = counts(answers)
        print(json.dumps({"answers": found, "injected": engine.injected}))
        assert found["504 refused"] + found["504 stream cut"] > 0
        engine.well = True
        recovers(live)


@pytest.mark.parametrize("where", ["cost", "reward"])
def test_scorer_faults_under_load(where: str) -> None:
    rates = {"raises": 0.04, "hangs": 0.01, "nans": 0.04, "infs": 0.04, "shapes": 0.04, "seconds": 0.9}
    faulty = FaultyScorer(ToyCost(2) if where == "cost" else ToyReward(1), 5, **rates)
    parts = (faulty, ToyReward(1)) if where == "cost" else (ToyCost(2), faulty)
    engine = ToyEngine(seed=4, end_logit=-0.5)
    with serving(guarded_by(engine, *parts, 0.3), limits=Limits(rows=64)) as live:
        answers = load(live, REQUESTS)
        check(live, answers, {200})
        found = counts(answers)
        print(json.dumps({where: found, "injected": faulty.injected}))
        assert set(faulty.injected) == {"raises", "hangs", "nans", "infs", "shapes"}
        assert found["200 stop"] > 0
        if where == "cost":
            assert found["200 content_filter"] > 0
        faulty.rates = dict.fromkeys(faulty.rates, 0.0)
        time.sleep(rates["seconds"])  # a call that hangs comes back
        recovers(live)
