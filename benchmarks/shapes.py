"""Llama-like models with random weights: their speed is that of trained ones of the same shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaModel

from inferenceguard.contracts import Engine, Scorer
from inferenceguard.critic.network import CriticNetwork, Provenance, SafetyCritic
from inferenceguard.scorers.beaver import BeaverScorer, ScoreHead


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama. The vocabulary is that of the embedded LLM's tokenizer, which all of them share."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    positions: int = 4096
    vocabulary: int = 49152

    def config(self, tokenizer: Any) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.positions, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip


TOY = Shape(hidden=32, inner=48, layers=2, heads=4, kv_heads=2)
EMBEDDED = Shape(hidden=576, inner=1536, layers=30, heads=9, kv_heads=3)  # as SmolLM2-135M
SEVEN_B = Shape(hidden=4096, inner=11008, layers=32, heads=32, kv_heads=32)  # as Llama-7B but for the vocabulary


def random_llm(shape: Shape, tokenizer: Any, *, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """A causal LM, filled where it will stay."""
    with _made_on(device, dtype, seed):
        model = LlamaForCausalLM(shape.config(tokenizer))
    return _settled(model, device)


def random_scorer(
    purpose: Literal["reward", "cost"], shape: Shape, tokenizer: Any, *, dtype: torch.dtype, device: str, seed: int
) -> BeaverScorer:
    """A reward or cost model of the Beaver format."""
    with _made_on(device, dtype, seed):
        model = LlamaModel(shape.config(tokenizer))
        weight = torch.randn(shape.hidden, dtype=torch.float32)
    return BeaverScorer(
        _settled(model, device), ScoreHead(weight, purpose=purpose), tokenizer, name=f"random {purpose}"
    )


def random_critic(
    engine: Engine, latent_width: int, cost: Scorer, *, width: int, device: str = "cpu", seed: int = 0
) -> SafetyCritic:
    """A critic for this engine and cost model that has learned nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = CriticNetwork(latent_width, width=width)
    provenance = Provenance(
        engine_name=engine.name, engine_fingerprint=engine.fingerprint, cost_name=cost.name,
        cost_fingerprint=cost.fingerprint, reward_name="", reward_fingerprint="", accounting="increment", discount=1.0,
        budgets=(), budget_range=(0.0, 0.0), max_new_tokens=128, temperature=1.0, top_p=1.0, top_k=0, prompts=0,
        name="random critic",
    )  # fmt: skip
    return SafetyCritic(network.to(device), provenance)


def plain_twin(model: Any) -> Any:
    """The same weights, held once, in a model with transformers' own attention, which never ends by itself.

    The engine installs its attention in the model that it is given.
    """
    config = LlamaConfig.from_dict(model.config.to_dict())
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.generation_config = cast(Any, GenerationConfig)()
    return _settled(twin, model.device)


def _settled(model: Any, device: Any) -> Any:
    """Frozen, with rotary frequencies in float32 as `from_pretrained` leaves them."""
    body = model.base_model
    body.rotary_emb = type(body.rotary_emb)(config=body.config).to(device)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _made_on(device: str, dtype: torch.dtype, seed: int) -> Iterator[None]:
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                yield
        finally:
            torch.set_default_dtype(before)
