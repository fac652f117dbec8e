"""Schemathesis over our OpenAPI description: what it makes up, right or wrong, gets an answer that is described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from inferenceguard.server import ApiKeys, Limits, create_app
from served import Live, serving, toy_guard

LIMITS = Limits(beams=16)
CONFIG = {"generation": {"deterministic": True, "database": "none"}, "warnings": False}
# What a schema cannot say: the last turn is the user's and not empty; prompt and answer fit the context; n prompts. And
# 2^63, which whoever reads JSON's numbers as floats rounds.
BEYOND = (
    "last turn is the user's",
    "a text that is not empty",
    "at most 8 (choices of a request)",
    "Shorten the prompt",
    "less than 9223372036854775808",
)

schema = schemathesis.openapi.from_dict(
    create_app(toy_guard(), name="toy", limits=LIMITS).openapi(), config=schemathesis.Config.from_dict(CONFIG)
)
statuses: Counter[tuple[str, int]] = Counter()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(limits=LIMITS) as server:
        yield server
        assert statuses["/v1/chat/completions", 200] > 0, statuses
        assert statuses["/v1/completions", 200] > 0, statuses
        assert server.service.scheduler.alive


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_server_error_and_no_answer_beyond_the_description(case: Any, live: Live) -> None:
    base = f"http://127.0.0.1:{live.port}"
    answer = case.call_and_validate(base_url=base, excluded_checks=[positive_data_acceptance], timeout=60)
    statuses[case.path, answer.status_code] += 1
    if case.meta is not None and case.meta.generation.mode.is_positive and answer.status_code == 400:
        message = answer.json()["error"]["message"]
        assert any(text in message for text in BEYOND), f"refused, though the description allows it: {message}"


def test_the_description_asks_for_keys_where_the_server_does() -> None:
    described = create_app(toy_guard(), name="toy", keys=ApiKeys(["a-secret-key"])).openapi()
    asks = {path: any("security" in each for each in methods.values()) for path, methods in described["paths"].items()}
    assert [path for path, asked in asks.items() if asked] == [path for path in asks if path.startswith("/v1/")]
    assert "security" not in str(schema.raw_schema["paths"])
