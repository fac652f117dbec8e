"""Names, directories and YAML to a guard; what is wrong is said by field, bound and value, before a model is read."""

from __future__ import annotations

import importlib.metadata
import re
import textwrap

import pytest
import torch

from inferenceguard import config
from inferenceguard.contracts import Sampling
from inferenceguard.critic.network import CriticNetwork, Provenance, SafetyCritic
from inferenceguard.errors import CheckpointError, FingerprintMismatch, InvalidArgument, UnknownName
from inferenceguard.guard import Guard
from inferenceguard.scorers import FunctionScorer
from inferenceguard.scorers.int8 import multiplies_bytes
from inferenceguard.strategies import BaseSampling, InferenceGuard
from tiny import tiny_model, tiny_tokenizer

SMALL = InferenceGuard(n_beams=4, keep=2, block_tokens=4, max_new_tokens=8)


def short(prompts, responses):
    return [-float(len(text)) for text in responses]


def harmless(prompts, responses):
    return [-1.0] * len(responses)


REWARD, COST = FunctionScorer("short", short), FunctionScorer("harmless", harmless)


class MyScorer:
    """A plugin's class."""

    fingerprint = "mine"

    def __init__(self, level=0.0):
        self.name = f"mine {level}"
        self.level = level

    def score(self, prompts, responses):
        return torch.full((len(responses),), self.level)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llm")
    tiny_model("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def critic_for(fingerprint, width=32):
    provenance = Provenance(
        engine_name="some LLM",
        engine_fingerprint=fingerprint,
        cost_name="",
        cost_fingerprint="",
        reward_name="",
        reward_fingerprint="",
        accounting="increment",
        discount=1.0,
        budgets=(0.0,),
        budget_range=(-1.0, 1.0),
        max_new_tokens=8,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        prompts=1,
    )
    return SafetyCritic(CriticNetwork(width, width=4, layers=1), provenance)


# --- own models ------------------------------------------------------------------------------------------------------


def test_a_directory_and_objects(llm):
    guard = Guard.from_pretrained(llm, reward=REWARD, cost=COST, strategy=SMALL, sampling=Sampling(0.7))
    [response] = guard.generate("Hello")
    assert response.budget_left == pytest.approx(1.0)
    assert response.reward == -len(response.text)
    assert guard.models.critic is None


def test_a_critic_by_directory_and_as_an_object(llm, tmp_path):
    engine = config.read_engine(llm)
    own = critic_for(engine.fingerprint)
    own.save(tmp_path / "critic.safetensors")
    for critic in (own, tmp_path, str(tmp_path / "critic.safetensors")):
        guard = Guard.from_pretrained(engine, reward=REWARD, cost=COST, critic=critic, strategy=SMALL)
        assert guard.models.critic.fingerprint == own.fingerprint


def test_a_critic_of_another_model(llm, tmp_path):
    critic_for("another").save(tmp_path / "critic.safetensors")
    with pytest.raises(FingerprintMismatch, match="trained on some LLM"):
        Guard.from_pretrained(llm, reward=REWARD, cost=COST, critic=tmp_path)
    with pytest.raises(FingerprintMismatch, match="trained on model another"):
        Guard.from_pretrained(llm, reward=REWARD, cost=COST, critic=critic_for("another"))


def test_unknown_settings_name_the_nearest(llm):
    with pytest.raises(UnknownName, match="Did you mean 'fallbacks'"):
        Guard.from_pretrained(llm, reward=REWARD, cost=COST, fallback=["No."])
    with pytest.raises(UnknownName, match="Did you mean 'strategy'"):
        Guard.from_preset(stratgy=SMALL)
    with pytest.raises(UnknownName, match="Did you mean 'embedded'"):
        Guard.from_preset("embeded")
    with pytest.raises(UnknownName, match="Did you mean 'embedded'"):
        Guard.from_pretrained(llm, reward=REWARD, cost="embeded")
    with pytest.raises(UnknownName, match="Did you mean 'float32'"):
        Guard.from_pretrained(llm, reward=REWARD, cost=COST, dtype="float31")
    with pytest.raises(InvalidArgument, match="device must be one that torch can use here, got 'gpu'"):
        Guard.from_pretrained(llm, reward=REWARD, cost=COST, device="gpu")


def test_a_pickle_is_never_opened(llm, tmp_path):
    (tmp_path / "config.json").write_text((llm / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle"):
        Guard.from_pretrained(tmp_path, reward=REWARD, cost=COST)
    with pytest.raises(CheckpointError, match="pickle"):
        Guard.from_pretrained(llm, reward=REWARD, cost=tmp_path)
    (tmp_path / "critic.safetensors").write_bytes(b"\x80\x04abc")
    with pytest.raises(CheckpointError, match="pickle"):
        Guard.from_pretrained(llm, reward=REWARD, cost=COST, critic=tmp_path)


# --- the preset ------------------------------------------------------------------------------------------------------


def test_the_preset_steers_in_low_precision_and_decides_in_float32():
    guard = Guard.from_preset(critic=False, reward=REWARD, dtype="bfloat16")
    assert guard.models.engine.model.dtype == torch.bfloat16
    assert guard.cost.scorer.precision == ("int8" if multiplies_bytes() else "bfloat16")
    assert guard.gate.cost.scorer.precision == "float32"
    assert guard.cost.fingerprint == guard.gate.cost.fingerprint
    assert guard.sampling.temperature == config.TEMPERATURE
    assert (guard.strategy.n_beams, guard.strategy.keep, guard.strategy.max_new_tokens) == (16, 4, 64)


def test_one_s_own_scorers_in_the_preset():
    guard = Guard.from_preset(critic=None, reward=REWARD, cost=COST, dtype="float32", strategy=SMALL)
    [response] = guard.generate("Hello")
    assert response.cost == -1.0
    assert guard.gate.cost.name == "harmless"


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CRITIC_WEIGHTS", tmp_path / "critic")
    with pytest.raises(CheckpointError, match=r"embedded critic model is not in this installation.*--no-critic"):
        Guard.from_preset(reward=REWARD, cost=COST)
    with pytest.raises(CheckpointError, match="embedded cost model is not in this installation"):
        Guard.from_preset(critic=False, reward=REWARD)


# --- entry points ----------------------------------------------------------------------------------------------------


def test_built_in_names_and_module_class():
    assert config.load_entry_point("inferenceguard.strategies", "inference_guard") is InferenceGuard
    assert config.load_entry_point("inferenceguard.scorers", f"{__name__}:MyScorer") is MyScorer


def test_published_entry_points(monkeypatch):
    point = importlib.metadata.EntryPoint("mine", f"{__name__}:MyScorer", "inferenceguard.scorers")
    monkeypatch.setattr(config, "entry_points", lambda group: [point] if group == point.group else [])
    assert config.load_entry_point("inferenceguard.scorers", "mine") is MyScorer
    assert config.read_scorer("mine", "cost", {"level": 2.0}).level == 2.0
    with pytest.raises(UnknownName, match="Did you mean 'mine'"):
        config.read_scorer("mime", "cost")
    with pytest.raises(InvalidArgument, match="options of cost must be those of its class"):
        config.read_scorer("mine", "cost", {"levle": 2.0})


@pytest.mark.parametrize(
    ("group", "name", "error", "message"),
    [
        ("inferenceguard.strategies", "inference_gard", UnknownName, "Did you mean 'inference_guard'"),
        ("inferenceguard.engines", "transformer", UnknownName, "Did you mean 'transformers'"),
        ("inferenceguard.scorer", "x", UnknownName, "Did you mean 'inferenceguard.scorers'"),
        ("inferenceguard.scorers", "no.such.module:X", CheckpointError, "ModuleNotFoundError"),
        ("inferenceguard.scorers", "json:Nothing", CheckpointError, "AttributeError"),
    ],
)
def test_names_that_nothing_stands_for(group, name, error, message):
    with pytest.raises(error, match=message):
        config.load_entry_point(group, name)


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_documented_file_is_valid():
    text = config.__doc__.partition("\n\n")[2].partition("\n\n")[0]
    text = textwrap.dedent(text).replace("preset: embedded  ", "# preset", 1)
    parsed = config.parse_config(config.yaml.safe_load(text))
    settings = parsed.settings()
    assert settings["strategy"] == InferenceGuard(16, 4, 16, 64, 2)
    assert settings["sampling"] == Sampling(0.8)
    assert settings["fallbacks"] == ["I'm sorry, but I can't help with that."]
    assert parsed.cost.budgets == [0, 0]


def test_a_file_makes_a_guard(llm, tmp_path):
    file = tmp_path / "guard.yaml"
    file.write_text(
        f"""
        model: {{name: {llm}, dtype: float32}}
        reward: {__name__}:MyScorer
        cost:
          max:
            - {{name: "{__name__}:MyScorer", options: {{level: -1}}}}
            - sum: ["{__name__}:MyScorer", {{name: "{__name__}:MyScorer", options: {{level: 3}}}}]
              weights: [1, 0.5]
          budgets: [0, 2]
        search: {{n_beams: 4, keep: 2, block_tokens: 4, max_new_tokens: 8}}
        budget: {{limit: 0.5, discount: 0.999, accounting: final}}
        sampling: {{temperature: 0.7, top_k: 20}}
        fallbacks: ["No."]
        limits: {{seconds: 5}}
        seed: 7
        """
    )
    parsed = config.load_config(file)
    guard = parsed.guard()
    assert guard.strategy.budget.limit == 0.5
    assert guard.strategy.accounting == "final"
    assert guard.fallbacks == ("No.",)
    assert guard.models.limits.seconds == 5
    assert parsed.seed == 7
    [response] = guard.generate("Hello")
    assert response.cost == pytest.approx(-0.5)  # max(-1 - 0, 0 + 1.5 - 2)


def test_base_sampling_by_name():
    strategy = config.parse_config({"search": {"strategy": "base_sampling", "max_new_tokens": 5}}).strategy()
    assert strategy == BaseSampling(max_new_tokens=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modle": "x"}, "config field must be one of .* got 'modle'. Did you mean 'model'?"),
        ({"search": {"n_beam": 3}}, "got 'n_beam'. Did you mean 'n_beams'?"),
        ({"search": {"budget": 3}}, "search.budget must be given as a field of budget"),
        ({"search": {"strategy": "inferenceguard"}}, "Did you mean 'inference_guard'?"),
        ({"search": {"n_beams": 10, "keep": 3}}, "n_beams must be a multiple of keep (3), got 10."),
        ({"search": {"n_beams": 2.5}}, "n_beams must be an integer >= 1, got 2.5."),
        ({"search": {"threshold": float("nan")}}, "threshold must be in [0, 1), got nan."),
        ({"budget": {"limti": 1}}, "got 'budget.limti'. Did you mean 'budget.limit'?"),
        ({"budget": {"limit": "much"}}, "budget.limit must be a valid number"),
        ({"budget": {"limit": float("inf")}}, "budget must be a finite number, got inf."),
        ({"budget": {"discount": 1.1}}, "discount must be in (0, 1], got 1.1."),
        ({"budget": {"accounting": "incremental"}}, "Did you mean 'increment'?"),
        ({"sampling": {"temperature": float("nan")}}, "temperature must be in [0, 100], got nan."),
        ({"sampling": {"top_k": 1.5}}, "sampling.top_k must be a valid integer, got 1.5."),
        ({"limits": {"seconds": 0}}, "scorer seconds must be > 0, got 0"),
        ({"model": {"name": "x", "dtyp": "y"}}, "got 'model.dtyp'. Did you mean 'model.dtype'?"),
        ({"model": {}}, "model.name must be given"),
        ({"model": "x", "cost": "embedded"}, "reward must be named where a model is named"),
        ({"model": "x", "preset": "embedded"}, "preset must be left out where a model is named, got 'embedded'."),
        ({"cost": {"max": []}}, "cost.max must be a list that is not empty, got []."),
        ({"cost": {"max": ["a", {"nam": "b"}]}}, "Did you mean 'cost.max.1.name'?"),
        ({"cost": "embeded"}, "cost must be one of embedded, got 'embeded'. Did you mean 'embedded'?"),
        ({"preset": "embed"}, "Did you mean 'embedded'?"),
        ({"critic": 3}, "critic must be a valid boolean, got 3."),
        ({"fallbacks": "No."}, "fallbacks must be a valid list, got 'No.'."),
        ([], "config must be a mapping of fields, got []."),
    ],
)
def test_bad_files(fields, message, monkeypatch):
    monkeypatch.setattr(config, "load_engine", lambda *_: pytest.fail("a model was read"))
    with pytest.raises(InvalidArgument) as caught:
        config.parse_config(fields).guard()
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), str(caught.value)), caught.value


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InvalidArgument, match="config must be a file that can be read"):
        config.load_config(tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("search: {n_beams: 4")
    with pytest.raises(InvalidArgument, match="YAML"):
        config.load_config(tmp_path / "bad.yaml")
    (tmp_path / "code.yaml").write_text("search: !!python/object/apply:os.system ['true']")
    with pytest.raises(InvalidArgument, match="YAML"):
        config.load_config(tmp_path / "code.yaml")
