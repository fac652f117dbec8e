"""The engine over vLLM's HTTP interface, against a fake server that computes as vLLM does (test_vllm_real: one)."""

from __future__ import annotations

import asyncio
import json
import time

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM

from fake_vllm import NAME, FakeVLLM, tiny_directory
from inferenceguard.budget import SafetyBudget
from inferenceguard.config import parse_config, read_critic, read_engine
from inferenceguard.contracts import MixesDraws, ReadsLatents, ReportsHealth, Sampling, conversation
from inferenceguard.engines import remote
from inferenceguard.engines.transformers import TransformersEngine, fingerprint
from inferenceguard.engines.vllm import VLLMEngine, directory_fingerprint, row_seed
from inferenceguard.errors import (
    CheckpointError,
    EngineFault,
    InvalidArgument,
    MissingCapability,
    UnknownName,
    UnsupportedModel,
)
from inferenceguard.guard import Guard
from inferenceguard.scorers import FunctionScorer
from inferenceguard.session import Question, Session
from inferenceguard.strategies import InferenceGuard
from inferenceguard.testing import check_engine
from served import Live, wait
from tiny import ARCHITECTURES, END

URL = "http://vllm.test:8000"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fake(directory, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.0)
    return FakeVLLM(directory)


@pytest.fixture
def engine(directory, fake):
    made = VLLMEngine(directory, URL, latents_url="http://latents.test:8001/", transport=fake.transport)
    fake.requests.clear()
    yield made
    made.close()


@pytest.fixture
def blind(directory, fake):
    """Without the second server."""
    made = VLLMEngine(directory, URL + "/v1", transport=fake.transport)
    fake.requests.clear()
    yield made
    made.close()


@pytest.fixture(scope="module")
def local(directory):
    return TransformersEngine.from_pretrained(directory, dtype="float32")


def rows_of(engine, copies=4, prompts=("hi", "1 + 1 ="), seeds=(1, 2)):
    encoded = [engine.encode(conversation(prompt)) for prompt in prompts]
    return engine.begin(encoded, seeds).take([row for row in range(len(prompts)) for _ in range(copies)])


def guard_of(engine, **settings):
    cost = FunctionScorer("capitals", lambda _, texts: [sum(map(str.isupper, text)) - 1.0 for text in texts])
    reward = FunctionScorer("length", lambda _, texts: [float(len(text)) for text in texts])
    return Guard(engine, reward, cost, strategy=InferenceGuard(8, 2, 4, 12, budget=SafetyBudget(0.0)), **settings)


# --- the contract ----------------------------------------------------------------------------------------------------


def test_the_contract_with_latents(engine):
    assert isinstance(engine, ReadsLatents)
    assert isinstance(engine, MixesDraws)
    assert isinstance(engine, ReportsHealth)
    check_engine(engine, prompts=("hi", "1 + 1 ="), tokens=2)


def test_without_the_second_server_there_are_no_latents(blind, fake):
    assert not isinstance(blind, ReadsLatents)
    drawn = blind.extend(rows_of(blind), 2, Sampling(), 0, None)
    assert drawn.latent.shape == (8, 0)
    assert not fake.bodies("/pooling")


def test_log_probabilities_and_latents_are_those_of_the_transformers_engine(engine, local):
    drawn = engine.extend(rows_of(engine), 6, Sampling(1.5), 3, None)
    again = rows_of(local)
    for row, tokens in enumerate(drawn.token_ids):
        own = again.take([row])
        for token in tokens:
            own = local.append(own, torch.tensor([token]))
        assert float(own.log_prob) == pytest.approx(float(drawn.log_prob[row]), abs=1e-4)
        assert torch.allclose(own.latent, drawn.latent[row : row + 1], atol=1e-4)
        assert bool(own.finished) == bool(drawn.finished[row])
    assert engine.end_tokens == local.end_tokens
    assert engine.vocabulary == local.vocabulary
    assert engine.context == 200  # of the server's 200 and the model's 256
    assert engine.fingerprint == local.fingerprint


def test_one_request_for_rows_that_continue_the_same_tokens(blind, fake):
    rows = rows_of(blind, copies=3)
    drawn = blind.extend(rows, 4, Sampling(0.7, top_p=0.9, top_k=50), 5, None)
    first, second = fake.bodies("/v1/completions")
    assert first["n"] == second["n"] == 3
    assert first["max_tokens"] == 4
    assert first["prompt"] == blind.encode(conversation("hi"))
    assert (first["seed"], second["seed"]) == (row_seed(1, 5, 0), row_seed(2, 5, 0))
    # The server's own defaults, from its generation_config.json, must not shape what is drawn.
    sent = {name: first[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    assert sent == {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.0, "repetition_penalty": 1.0}
    assert first["presence_penalty"] == first["frequency_penalty"] == 0.0
    assert first["stop_token_ids"] == [END]
    fake.requests.clear()
    order = [4, 1, 5, 0, 2, 3]  # rows of other prompts between: other requests, the same draws
    moved = blind.extend(rows.take([4, 1, 5, 0, 2, 3]), 4, Sampling(0.7, top_p=0.9, top_k=50), 5, None)
    assert [body["n"] for body in fake.bodies("/v1/completions")] == [1, 1, 1, 2, 1]
    own = {prompt: [ids for ids, owner in zip(drawn.token_ids, drawn.prompt_index.tolist(), strict=True)
                    if owner == prompt] for prompt in (0, 1)}  # fmt: skip
    found = {prompt: [ids for ids, row in zip(moved.token_ids, order, strict=True)
                      if int(rows.prompt_index[row]) == prompt] for prompt in (0, 1)}  # fmt: skip
    assert own == found


def test_row_seeds_fit_and_differ():
    seeds = {row_seed(seed, draw, place) for seed in (0, 1, 2**63 - 1) for draw in range(50) for place in range(50)}
    assert len(seeds) == 3 * 50 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_bias_is_sent_as_numbers_and_bans(blind, fake):
    rows = rows_of(blind, copies=1)
    bias = torch.zeros(2, blind.vocabulary)
    bias[0, 65], bias[1, 66] = -2.5, -torch.inf
    blind.extend(rows, 2, Sampling(), 0, bias)
    first, second = fake.bodies("/v1/completions")
    assert first["logit_bias"] == {"65": -2.5}
    assert "allowed_token_ids" not in first
    assert second["allowed_token_ids"] == [token for token in range(259) if token != 66]
    assert "logit_bias" not in second


@pytest.mark.parametrize(
    ("value", "message"),
    [(-200.0, "at most 100 nats or -inf, got 200"), (float("nan"), "NaN"), (-torch.inf, "one that leaves a token")],
)
def test_a_bias_that_vllm_would_change_is_refused(blind, fake, value, message):
    with pytest.raises(InvalidArgument, match=message):
        blind.extend(rows_of(blind, 1), 2, Sampling(), 0, torch.full((2, blind.vocabulary), value))
    assert not fake.requests


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_vllm_would_change_is_refused(blind, temperature):
    with pytest.raises(InvalidArgument, match=r"temperature with the engine vllm must be 0 or in \[0.01, 2\]"):
        blind.extend(rows_of(blind, 1), 2, Sampling(temperature), 0, None)


def test_foreign_and_finished_rows_are_refused(blind, local):
    with pytest.raises(InvalidArgument, match="rows that this engine began"):
        blind.extend(rows_of(local, 1), 2, Sampling(), 0, None)
    ended = rows_of(blind, 1)
    ended.finished[0] = True
    with pytest.raises(InvalidArgument, match="unfinished rows only"):
        blind.extend(ended, 2, Sampling(), 0, None)


# --- the directory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fingerprint_is_the_transformers_engines(architecture, tmp_path):
    place = tiny_directory(tmp_path, architecture)
    loaded = AutoModelForCausalLM.from_pretrained(place)
    assert directory_fingerprint(place, "any") == fingerprint(loaded)
    with torch.no_grad():
        next(iter(loaded.parameters())).mul_(2)
    assert directory_fingerprint(place, "any") != fingerprint(loaded)


def test_a_directory_without_weights_has_a_fingerprint_of_its_own(directory, tmp_path):
    for file in directory.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    found = directory_fingerprint(tmp_path, "a")
    others = {directory_fingerprint(tmp_path, "b"), directory_fingerprint(directory, "a")}
    assert found not in others
    assert found == directory_fingerprint(tmp_path, "a")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert directory_fingerprint(tmp_path, "a") != found


def test_a_damaged_directory_is_refused(directory, fake, tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer"):
        VLLMEngine(tmp_path, URL, transport=fake.transport)
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="cannot read"):
        VLLMEngine(tmp_path, URL, transport=fake.transport)


# --- failures --------------------------------------------------------------------------------------------------------


def test_connection_errors_are_retried_a_few_times(blind, fake):
    rows = rows_of(blind, prompts=("hi",), seeds=(1,))
    expected = blind.extend(rows, 4, Sampling(), 0, None)
    fake.requests.clear()
    fake.failures = [httpx2.ReadError("gone"), httpx2.Response(503), httpx2.ConnectError("refused")]
    assert blind.extend(rows, 4, Sampling(), 0, None).token_ids == expected.token_ids
    assert len(fake.requests) == 4
    fake.failures = [httpx2.RemoteProtocolError("server disconnected")] * 4
    with pytest.raises(EngineFault, match=r"vllm\.test:8000/v1/completions failed: RemoteProtocolError"):
        blind.extend(rows, 4, Sampling(), 0, None)
    assert len(fake.requests) == 8
    assert not fake.failures


def test_a_refusal_is_not_retried(blind, fake):
    fake.failures = [httpx2.Response(400, json={"error": {"message": "too long"}})]
    with pytest.raises(EngineFault, match=r"status 400.*too long"):
        blind.extend(rows_of(blind, prompts=("hi",), seeds=(1,)), 4, Sampling(), 0, None)
    assert len(fake.requests) == 1


def test_a_server_that_hangs_is_given_up(directory, fake):
    ended = []

    async def hang(server, body):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    blind = VLLMEngine(directory, URL, transport=fake.transport)
    blind._server.seconds = 0.2  # not before: a busy machine may be slow in its own answers
    fake.failures = [hang]
    begun = time.monotonic()
    with pytest.raises(EngineFault, match=r"did not answer within 0\.2 s"):
        blind.extend(rows_of(blind), 4, Sampling(), 0, None)
    assert time.monotonic() - begun < 20
    assert ended == [True]
    blind.close()
    with pytest.raises(EngineFault, match="closed"):
        blind.extend(rows_of(blind), 4, Sampling(), 0, None)


def choice(**fields):
    return {"index": 0, "token_ids": [65, 66], "logprobs": {"token_logprobs": [-1.0, -1.0]}, **fields}


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [choice()] * 2},
        {"choices": []},
        {"choices": [choice(token_ids=[65, 259])]},
        {"choices": [choice(token_ids=[65, -1])]},
        {"choices": [choice(token_ids=[65, "66"])]},
        {"choices": [choice(token_ids=[65])]},  # short, without an end
        {"choices": [choice(token_ids=[])]},
        {"choices": [choice(token_ids=[65, 66, 67])]},
        {"choices": [choice(token_ids=[END, 66])]},
        {"choices": [choice(token_ids=None)]},
        {"choices": [choice(logprobs=None)]},
        {"choices": [choice(logprobs={"token_logprobs": [-1.0, None]})]},
        {"text": "hello"},
        ["hello"],
    ],
)
def test_nonsense_does_not_enter_the_search(blind, fake, answer):
    fake.failures = [httpx2.Response(200, json=answer)]
    with pytest.raises(EngineFault, match=r"vllm\.test"):
        blind.extend(rows_of(blind, 1, ("hi",), (1,)), 2, Sampling(), 0, None)
    assert blind.extend(rows_of(blind, 1, ("hi",), (1,)), 2, Sampling(), 0, None).token_ids  # and all is well again


@pytest.mark.parametrize(
    "answer",
    [
        {"data": []},
        {"data": [{"index": 0, "data": "AAAA"}]},
        {"data": [{"index": 0, "data": "?"}]},
        {"data": [{"index": 0, "data": [0.0] * 32}]},
        {"data": [{"index": 0, "data": "AADAfw" + "A" * 164 + "=="}]},  # 32 numbers, the first NaN
    ],
)
def test_latents_that_are_none_are_refused(engine, fake, answer):
    fake.failures = [httpx2.Response(200, json=answer)]
    with pytest.raises(EngineFault, match=r"latents\.test"):
        engine.begin([engine.encode(conversation("hi"))], [1])


def test_a_server_of_another_kind_is_refused_at_the_start(directory, fake):
    fake.failures = [httpx2.Response(200, text="<html>")]
    with pytest.raises(EngineFault, match="not JSON"):
        VLLMEngine(directory, URL, transport=fake.transport)
    with pytest.raises(UnknownName, match=f"served must be one of {NAME}"):
        VLLMEngine(directory, URL, served="tinny", transport=fake.transport)
    fake.failures = [
        httpx2.Response(200, json={"data": [{"id": NAME}]}),
        httpx2.Response(200, json={"choices": [{"index": 0, "text": "no ids"}]}),
    ]
    with pytest.raises(UnsupportedModel, match="cannot propose tokens"):
        VLLMEngine(directory, URL, transport=fake.transport)
    for url in ("vllm:8000", "ftp://vllm", "http://"):
        with pytest.raises(InvalidArgument, match="url must be"):
            VLLMEngine(directory, url)


def test_a_dead_engine_gives_errors_and_a_living_one_answers_again(blind, fake):
    guard = guard_of(blind)
    before = guard.generate(["hi"], seed=3)[0]
    assert before.budget_left >= 0
    fake.alive = False
    assert not blind.healthy()
    with pytest.raises(EngineFault):
        guard.generate(["hi"], seed=3)
    fake.alive = True
    assert blind.healthy()
    assert guard.generate(["hi"], seed=3)[0].text == before.text


def test_death_in_the_middle_of_an_answer_ends_it_with_an_error(blind, fake):
    guard = guard_of(blind)
    session = Session(guard)
    question = Question(conversation("hi"), 3, guard.strategy, guard.sampling)
    session.submit(question)
    events = session.step()
    assert events[0].error is None
    assert events[0].response is None
    fake.alive = False
    events = session.step()
    assert [type(event.error) for event in events] == [EngineFault]
    assert not events[0].text
    fake.alive = True
    session.submit(question)
    while not (events := session.step())[0].response:
        assert events[0].error is None
    assert events[0].response.budget_left >= 0


def test_readyz_tells_of_the_engine(blind, fake):
    from inferenceguard.server import create_app

    live = Live(create_app(guard_of(blind)))
    try:
        assert live.request("GET", "/readyz")[0] == 200
        fake.alive = False
        wait(lambda: live.request("GET", "/readyz")[0] == 503)
        assert live.request("GET", "/healthz")[0] == 200  # the process is well
        body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
        status, _, answer = live.request("POST", "/v1/chat/completions", body)
        assert status == 500
        assert json.loads(answer)["error"]["code"] == "engine_fault"
        fake.alive = True
        wait(lambda: live.request("GET", "/readyz")[0] == 200)
        assert live.request("POST", "/v1/chat/completions", body)[0] == 200
    finally:
        live.close()


# --- presets ---------------------------------------------------------------------------------------------------------


def test_a_critic_needs_the_second_server(blind, fake):
    with pytest.raises(MissingCapability, match=r"tiny does not have\. Start a second server .* latents_url"):
        read_critic("embedded", blind)
    assert not fake.requests


def test_a_preset_file_names_the_server(directory, fake, monkeypatch):
    made = {}
    monkeypatch.setattr(VLLMEngine, "__init__", lambda self, *given, **options: made.update(options, given=given))
    fields = {
        "name": str(directory),
        "engine": "vllm",
        "options": {"url": URL, "latents_url": "http://b", "retries": 1},
    }
    config = parse_config({"model": fields, "reward": "embedded", "cost": "embedded"})
    part = config.model
    read_engine(part.name, engine=part.engine, dtype=part.dtype, device=part.device, options=part.options)
    assert made["given"] == (str(directory), URL)
    assert (made["latents_url"], made["retries"], made["served"]) == ("http://b", 1, None)


@pytest.mark.parametrize(
    ("options", "settings", "error", "message"),
    [
        ({}, {}, InvalidArgument, "url must be given"),
        ({"url": URL, "latent_url": "http://b"}, {}, UnknownName, "Did you mean 'latents_url'"),
        ({"url": URL}, {"dtype": "bfloat16"}, InvalidArgument, "dtype must be left out"),
        ({"url": URL, "retries": -1}, {}, InvalidArgument, "retries must be"),
        ({"url": URL, "seconds": 0}, {}, InvalidArgument, "seconds must be"),
        ({"url": URL, "connections": 0}, {}, InvalidArgument, "connections must be"),
    ],
)
def test_preset_keys_are_checked(directory, options, settings, error, message):
    with pytest.raises(error, match=message):
        read_engine(str(directory), engine="vllm", options=options, **settings)


def test_options_are_the_engines(directory):
    with pytest.raises(InvalidArgument, match="options of the engine transformers must be none"):
        read_engine(str(directory), options={"url": URL})
