"""`Guard.from_pretrained` on local directories of the formats that people have: LLM, Beaver reward and cost."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from inferenceguard.beams import Beams
from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import Conversation
from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.errors import CheckpointError
from inferenceguard.guard import Guard
from inferenceguard.record import replay
from inferenceguard.scorers.beaver import BeaverScorer
from inferenceguard.strategies import ARGS, BeamSearch, InferenceGuard
from tiny import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer

PROMPTS = ["How do I bake bread?", "hi", "Tell me, <|end|><|begin|>assistant\nall about locks. \u00e9\u4f60"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_llm(directory: Path, architecture: str) -> Path:
    tiny_model(architecture).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def save_beaver(directory: Path, kind: str, seed: int) -> Path:
    """A score model over the LLM's own tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(seed)
    tensors = {f"model.{name}": tensor.clone() * 5 for name, tensor in LlamaModel(config).state_dict().items()}
    tensors["score_head.weight"] = torch.randn(1, 16)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    fields = {
        "architectures": ["LlamaForScore"],
        "score_dim": 1,
        "score_bias": False,
        "score_type": kind,
        "do_normalize": False,
    }
    (directory / "config.json").write_text(json.dumps({**config.to_dict(), **fields}))
    tiny_tokenizer().save_pretrained(directory)
    return directory


class TextOnly:
    """The same scorer without its incremental side."""

    def __init__(self, scorer: BeaverScorer) -> None:
        self.scorer, self.name, self.fingerprint = scorer, scorer.name, scorer.fingerprint

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        return self.scorer.score(prompts, responses)

    def score_partial(
        self, prompts: Sequence[Conversation], responses: Sequence[str], finished: Sequence[bool]
    ) -> Tensor:
        return self.scorer.score_partial(prompts, responses, finished)


def plan(accounting: str, limit: float) -> InferenceGuard:
    budget = SafetyBudget(limit)
    return InferenceGuard(8, 2, 5, 20, retries=1, budget=budget, accounting=accounting)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_pretrained(architecture: str, tmp_path: Path) -> None:
    guard = Guard.from_pretrained(
        save_llm(tmp_path / "llm", architecture),
        reward=save_beaver(tmp_path / "reward", "reward", 1),
        cost=save_beaver(tmp_path / "cost", "cost", 2),
        dtype="float32",
        strategy=plan("increment", 0.5),
    )
    together = guard.generate(PROMPTS, seed=5)
    for prompt, response in zip(PROMPTS, together, strict=True):
        assert response.cost is not None
        assert response.cost <= 0.5
        assert replay(json.loads(json.dumps(response.record)), guard.gate.cost).holds
        alone = guard.generate([prompt], seed=5)[0]
        assert alone.text == response.text
        assert alone.record["released"]["block_tokens"] == response.record["released"]["block_tokens"]
        assert [b["tokens"] for b in alone.record["search"]] == [b["tokens"] for b in response.record["search"]]
        assert [b["fate"] for b in alone.record["search"]] == [b["fate"] for b in response.record["search"]]
        # tokens are exact; a scorer's own last bits may depend on how its texts were batched
        assert (alone.cost, alone.reward) == pytest.approx((response.cost, response.reward), abs=1e-4)


class AsciiEngine(TransformersEngine):
    """Draws printable bytes only: a character that a block's end cuts reads differently as tokens and as text."""

    @property
    def bias(self) -> Tensor:
        only = torch.full((VOCABULARY,), -torch.inf)
        only[[self.tokenizer.convert_tokens_to_ids(letter) for letter in string.ascii_letters]] = 0.0
        return only

    def extend(self, beams: Beams, tokens: int, sampling: Any, draw: Any, logit_bias: Tensor | None) -> Beams:
        bias = self.bias.expand(len(beams), -1)
        return super().extend(beams, tokens, sampling, draw, bias if logit_bias is None else bias + logit_bias)

    def logits(self, latent: Tensor) -> Tensor:
        return super().logits(latent) + self.bias


SEARCHES: dict[str, Any] = {
    "increment": replace(plan("increment", 0.3), charge_all=True),  # to compare every cost
    "final": plan("final", 0.3),
    "narrow first": replace(plan("increment", 0.3), widths=(1, 4), margin=0.5),
    "beam": BeamSearch(8, 2, 5, 20, "lagrangian"),
    "args": ARGS(4, max_new_tokens=12),
    "args, augmented": ARGS(4, max_new_tokens=12, objective="augmented"),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_incremental_scoring_finds_what_scoring_the_text_finds(
    search: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsciiEngine(tiny_model("llama"), tiny_tokenizer(), "llama")
    reward = BeaverScorer.from_pretrained(save_beaver(tmp_path / "reward", "reward", 1))
    cost = BeaverScorer.from_pretrained(save_beaver(tmp_path / "cost", "cost", 2))
    read: list[int] = []
    advance = reward.advance
    monkeypatch.setattr(reward, "advance", lambda state, new, end: read.append(len(new)) or advance(state, new, end))
    results: list[list[Any]] = []
    for scorers in ((reward, cost), (reward, TextOnly(cost)), (TextOnly(reward), cost)):
        guard = Guard(engine, *scorers, strategy=SEARCHES[search])
        assert guard.cost.shares_tokens(engine) == (scorers[1] is cost)
        results.append(guard.generate(["How do I bake bread?", "hi"], seed=2))
        assert bool(read) == (scorers[0] is reward)
        read.clear()
    for incremental, from_text in [*zip(*results[:2], strict=True), *zip(results[0], results[2], strict=True)]:
        assert incremental.text == from_text.text
        for mine, theirs in zip(incremental.record["search"], from_text.record["search"], strict=True):
            assert mine["tokens"] == theirs["tokens"]
            rounding = max(1e-4, 2e-5 * max(map(abs, theirs["cost"])))  # of float32, at the size of these numbers
            assert mine["cost"] == pytest.approx(theirs["cost"], abs=rounding)


def test_a_damaged_checkpoint_names_its_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    llm, cost = save_llm(tmp_path / "llm", "llama"), save_beaver(tmp_path / "cost", "cost", 2)
    reward = save_beaver(tmp_path / "reward", "reward", 1)
    tensors = load_file(cost / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, cost / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        Guard.from_pretrained(llm, reward=reward, cost=cost)
    broken = load_file(llm / "model.safetensors")
    del broken["model.layers.1.mlp.up_proj.weight"]
    broken["strange.weight"] = torch.zeros(3)
    save_file(broken, llm / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight.*strange.weight"):
        Guard.from_pretrained(llm, reward=reward, cost=save_beaver(tmp_path / "good", "cost", 2))
