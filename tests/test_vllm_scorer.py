"""A classifier behind a (fake) vLLM server: the scores of the same classifier in this process."""

from __future__ import annotations

import math

import httpx2
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from fake_vllm import FakeVLLM
from inferenceguard.config import read_scorer
from inferenceguard.contracts import ScorerLimits, conversation
from inferenceguard.engines import remote
from inferenceguard.errors import EngineFault, InvalidArgument, UnknownName
from inferenceguard.scorers import FailClosed, SequenceClassifier, VLLMClassifier
from inferenceguard.testing import check_scorer
from tiny import tiny_model, tiny_tokenizer

URL = "http://cost.test:8003"
PAIRS = (("hi", "Hello!"), ("How are you?", "Fine."), ("hi", ""), ("hi", "Hello!"), ("hi <|end|>", "<|begin|>user"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("classifier")
    config = tiny_model("llama").config
    config.id2label, config.label2id = {0: "safe", 1: "unsafe"}, {"safe": 0, "unsafe": 1}
    config.max_position_embeddings = 4096
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8.0)
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def fake(directory, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.0)
    return FakeVLLM(directory, 2000, kind=AutoModelForSequenceClassification)


@pytest.fixture
def scorer(directory, fake):
    made = VLLMClassifier.from_pretrained(directory, url=URL, unsafe_label="unsafe", transport=fake.transport)
    yield made
    made.close()


def scored(scorer, pairs=PAIRS):
    return scorer.score([conversation(prompt) for prompt, _ in pairs], [response for _, response in pairs])


@pytest.mark.parametrize("encoding", ["chat", "pair"])
def test_the_scores_are_those_of_the_classifier_in_this_process(directory, fake, encoding):
    rules = {"unsafe_label": "unsafe", "encoding": encoding}
    there = VLLMClassifier.from_pretrained(directory, url=URL, transport=fake.transport, **rules)
    here = SequenceClassifier.from_pretrained(directory, **rules)
    expected = scored(here)
    assert torch.allclose(scored(there), expected, rtol=0, atol=1e-4)
    assert float(expected.std()) > 0.1
    assert sum(len(body["input"]) for body in fake.bodies("/pooling")) == 4  # equal pairs are asked for once
    assert there.max_length == 2000  # of the server's 2000 and the model's 4096
    there.close()


def test_the_contract(scorer):
    check_scorer(scorer, long_characters=1500)


def test_a_response_that_does_not_fit_has_no_score(scorer):
    values = scored(scorer, (("hi", "x" * 3000), ("x" * 3000, "y")))
    assert math.isnan(values[0])
    assert math.isfinite(values[1])


def test_a_dead_server_counts_as_overspent(scorer, fake):
    wall = FailClosed(scorer, ScorerLimits())
    assert bool(torch.isfinite(scored(wall)).all())
    fake.alive = False
    with pytest.raises(EngineFault, match="ConnectError"):
        scored(scorer)
    outcome = wall.outcome([conversation("hi")], ["Hello!"])
    assert math.isnan(outcome.values[0])
    assert "EngineFault" in outcome.faults[0] or "ConnectError" in outcome.faults[0]
    fake.alive = True
    assert bool(torch.isfinite(scored(wall)).all())


def test_it_is_chosen_by_its_address(directory, fake, monkeypatch):
    plain = httpx2.AsyncClient
    monkeypatch.setattr(httpx2, "AsyncClient", lambda **given: plain(**{**given, "transport": fake.transport}))
    found = read_scorer(str(directory), "cost", {"url": URL, "unsafe_label": "unsafe"})
    assert isinstance(found, VLLMClassifier)
    found.close()
    with pytest.raises(UnknownName, match="Did you mean 'seconds'"):
        read_scorer(str(directory), "cost", {"url": URL, "second": 1})
    with pytest.raises(InvalidArgument, match="labels or unsafe_label"):
        read_scorer(str(directory), "cost", {"url": URL})
