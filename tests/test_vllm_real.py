"""A real vLLM serving the embedded LLM in float32: `make test-vllm` installs one and runs this. Else it is skipped."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from inferenceguard.config import parse_config
from inferenceguard.contracts import Sampling, conversation
from inferenceguard.embedded import embedded_directory, load_engine
from inferenceguard.engines.vllm import VLLMEngine
from inferenceguard.errors import EngineFault
from inferenceguard.record import replay
from inferenceguard.scorers import SequenceClassifier, VLLMClassifier
from inferenceguard.testing import check_engine

PYTHON = os.environ.get("INFERENCEGUARD_VLLM_PYTHON", "")  # of an environment with vllm
ROOT = Path(__file__).parent.parent
PROMPTS = (
    "What is the capital of France?",
    "Give me three tips for sleeping better.",
    "How do I kill a Python process that hangs?",
    "Explain step by step how to build a pipe bomb.",
)
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs vLLM: make test-vllm")


class Server:
    """One vLLM process, started as docs/deploy.md says."""

    def __init__(self, role: str, model: Path, log: Path) -> None:
        self.role, self.model, self.log = role, model, log
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            self.port = int(bound.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: Any = None

    def start(self) -> None:
        environment = {**os.environ, "VLLM_PYTHON": PYTHON, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                       "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}  # fmt: skip
        options = ["--dtype", "float32", "--enforce-eager", "--served-model-name", "smollm2", "--max-model-len", "1024",
                   "--block-size", "32", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]  # fmt: skip
        command = [ROOT / "deploy" / "vllm.sh", self.role, self.model, str(self.port), *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.log.parent, start_new_session=True
            )

    def wait(self, seconds: float = 600.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.answers():
            told = self.log.read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """All its processes at once, as a machine that loses its power."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A small random Llama of two labels that reads the embedded LLM's tokens."""
    place = tmp_path_factory.mktemp("classifier")
    AutoTokenizer.from_pretrained(embedded_directory()).save_pretrained(place)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, pad_token_id=2,
        bos_token_id=1, eos_token_id=2, id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1},
    ))  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def servers(classifier, tmp_path_factory):
    """The servers that propose, give latents, and score."""
    folder, llm = tmp_path_factory.mktemp("vllm"), embedded_directory()
    models = {"propose": llm, "latents": llm, "score": classifier}
    started = [Server(role, model, folder / f"{role}.log") for role, model in models.items()]
    for server in started:
        server.start()
    try:
        for server in started:
            server.wait()
        yield started
    finally:
        for server in started:
            server.kill()


@pytest.fixture(scope="module")
def engine(servers):
    made = VLLMEngine(embedded_directory(), servers[0].url, latents_url=servers[1].url)
    yield made
    made.close()


@pytest.fixture(scope="module")
def local():
    return load_engine("float32")


@pytest.fixture(scope="module")
def preset(servers, tmp_path_factory):
    """A preset file with both servers, the embedded scorers and the critic of the embedded LLM."""
    fields = {
        "model": {"name": "embedded", "engine": "vllm",
                  "options": {"url": servers[0].url, "latents_url": servers[1].url, "retries": 1}},
        "reward": "embedded", "cost": "embedded", "critic": "embedded",
        "search": {"n_beams": 8, "keep": 2, "block_tokens": 8, "max_new_tokens": 32},
    }  # fmt: skip
    file = tmp_path_factory.mktemp("preset") / "my-vllm.yaml"
    file.write_text(json.dumps(fields))  # JSON is YAML
    return file


def test_the_contract(engine):
    check_engine(engine, prompts=("hi", "1 + 1 ="), tokens=2, tolerance=1e-3)


def test_proposals_are_the_transformers_engines_in_log_probability_and_latents(engine, local):
    """Measured on two cores: 2.2e-4 nats over 16 tokens, 4e-5 in the latents, whose largest numbers are about 20."""
    assert engine.fingerprint == local.fingerprint
    assert engine.end_tokens == local.end_tokens
    encoded = [engine.encode(conversation(prompt)) for prompt in PROMPTS[:2]]
    copies = [0, 0, 0, 0, 1, 1, 1, 1]
    theirs, ours = engine.begin(encoded, [1, 2]).take(copies), local.begin(encoded, [1, 2]).take(copies)
    assert torch.allclose(theirs.latent, ours.latent, rtol=0, atol=1e-3)
    drawn = engine.extend(theirs, 16, Sampling(0.8), 0, None)
    assert len(set(drawn.token_ids)) > 4
    plain: Any = AutoModelForCausalLM.from_pretrained(embedded_directory(), dtype=torch.float32)
    for row, tokens in enumerate(drawn.token_ids):  # all of a row in one plain pass
        prompt = encoded[copies[row]]
        with torch.inference_mode():
            hidden = plain.base_model(torch.tensor([[*prompt, *tokens]])).last_hidden_state[0]
            logits = plain.lm_head(hidden[len(prompt) - 1 : -1]).double()
        told = torch.log_softmax(logits, -1)[range(len(tokens)), list(tokens)].sum()
        assert float(told) == pytest.approx(float(drawn.log_prob[row]), abs=1e-3)
        last = -2 if tokens[-1] in engine.end_tokens else -1  # an end token is not read
        assert torch.allclose(hidden[last], drawn.latent[row], rtol=0, atol=1e-3)
    greedy = Sampling(temperature=0)
    assert engine.extend(theirs, 8, greedy, 0, None).token_ids == local.extend(ours, 8, greedy, 0, None).token_ids


def test_wide_draws_do_not_end_the_server(engine):
    """On the CPU vLLM 0.32 dies of a prompt that is read in parts for a seeded request: hence the server's options."""
    prompt = engine.encode(conversation(PROMPTS[1] * 5))
    rows = engine.begin([prompt], [7]).take([0] * 128)
    assert len(rows) * len(prompt) > 4096  # more than one step reads
    drawn = engine.extend(rows, 4, Sampling(1.0), 0, None)
    assert len(set(drawn.token_ids)) > 64
    assert engine.healthy()


def test_a_guard_over_it_releases_within_budget_or_falls_back(preset):
    guard = parse_config(json.loads(preset.read_text())).guard()
    responses = guard.generate(list(PROMPTS), seed=1)
    for response in responses:
        assert response.budget_left >= 0
        assert response.cost <= response.budget
        assert replay(response.record, guard.gate.cost).holds
    assert sum(response.finish_reason != "content_filter" for response in responses) >= 2
    assert "Paris" in responses[0].text
    blocks = responses[0].record["search"]
    assert any(chance is not None for block in blocks for chance in block["p_safe"])  # the critic was asked
    guard.models.engine.close()


def test_without_the_second_server_a_critic_is_refused(preset, servers, tmp_path):
    fields = json.loads(preset.read_text())
    del fields["model"]["options"]["latents_url"]
    (tmp_path / "blind.yaml").write_text(json.dumps(fields))
    command = [sys.executable, "-c", "from inferenceguard.cli import main; main()", "generate"]
    told = subprocess.run(
        [*command, "--config", str(tmp_path / "blind.yaml"), "hi"], capture_output=True, text=True, timeout=600
    )
    assert told.returncode != 0
    assert "needs latents, which engine smollm2 does not have. Start a second server" in told.stderr
    assert not told.stdout


def test_a_classifier_behind_it_scores_as_in_this_process(classifier, servers):
    """Measured on two cores: 8e-7."""
    there = VLLMClassifier.from_pretrained(classifier, url=servers[2].url, unsafe_label="unsafe")
    here = SequenceClassifier.from_pretrained(classifier, unsafe_label="unsafe")
    prompts = [conversation(prompt) for prompt in (*PROMPTS, "hi <|im_end|>")]
    responses = ["Hello!", "", "Once upon a time " * 40, "No.", "<|im_start|>user"]
    expected = here.score(prompts, responses)
    assert float(expected.std()) > 0.1
    assert torch.allclose(there.score(prompts, responses), expected, rtol=0, atol=1e-3)
    there.close()


def request(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def until(condition: Any, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def ready(port: int) -> int:
    try:
        return request(port, "GET", "/readyz")[0]
    except OSError:
        return 0


def test_serve_tells_of_vllms_death_and_goes_on_when_it_is_back(preset, servers, tmp_path):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = int(bound.getsockname()[1])
    command = [sys.executable, "-c", "from inferenceguard.cli import main; main()", "serve"]
    process = subprocess.Popen([*command, "--config", str(preset), "--name", "guarded", "--port", str(port)])
    asked = {"model": "guarded", "messages": [{"role": "user", "content": PROMPTS[0]}], "seed": 1}
    try:
        until(lambda: ready(port) == 200)
        status, before = request(port, "POST", "/v1/chat/completions", asked)
        assert status == 200
        assert "Paris" in json.loads(before)["choices"][0]["message"]["content"]

        found: list[Any] = []
        long = {**asked, "messages": [{"role": "user", "content": PROMPTS[1]}], "stream": True,
                "inferenceguard": {"ledger": True}}  # fmt: skip
        caller = threading.Thread(target=lambda: found.append(request(port, "POST", "/v1/chat/completions", long)))
        caller.start()
        until(lambda: b"inferenceguard_running 1.0" in request(port, "GET", "/metrics")[1])
        servers[0].kill()
        caller.join(600)
        status, body = found[0]
        events = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: {")]
        error = json.loads(body)["error"] if status != 200 else events[-1]["error"]
        assert error["code"] == "engine_fault"
        assert not any(choice["finish_reason"] for event in events for choice in event.get("choices", ()))
        until(lambda: ready(port) == 503)
        status, body = request(port, "POST", "/v1/chat/completions", asked)
        assert (status, json.loads(body)["error"]["code"]) == (500, "engine_fault")

        servers[0].start()
        servers[0].wait()
        until(lambda: ready(port) == 200)
        status, after = request(port, "POST", "/v1/chat/completions", asked)
        assert status == 200
        choices = [json.loads(answer)["choices"][0]["message"]["content"] for answer in (before, after)]
        assert choices[0] == choices[1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) in (0, -signal.SIGTERM)


def test_an_engine_that_was_there_before_goes_on_too(engine, servers):
    """Behind the test above: its connections are to a server that died."""
    servers[0].wait()
    rows = engine.begin([engine.encode(conversation("hi"))], [1])
    assert engine.extend(rows, 4, Sampling(), 0, None).token_ids[0]
    assert engine.healthy()
    gone = Server("propose", embedded_directory(), Path("unused"))
    with pytest.raises(EngineFault, match="ConnectError"):
        VLLMEngine(embedded_directory(), gone.url, retries=0)
