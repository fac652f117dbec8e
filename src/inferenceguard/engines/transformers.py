"""Any Hugging Face causal LM as an engine: prompts read once, rows of all prompts in one batch, caches kept (kv.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from inferenceguard.beams import Beams, empty_beams
from inferenceguard.chat import encode_chat
from inferenceguard.checkpoints import Tokenizer, checkpoint_directory, load_model, load_tokenizer
from inferenceguard.contracts import Conversation, Sampling
from inferenceguard.errors import InvalidArgument, UnsupportedModel
from inferenceguard.kv import CachedTransformer, KeyValues, pad_rows
from inferenceguard.product import Product
from inferenceguard.sampling import draw_tokens, is_finite_or_banned, uniforms

STATE = "engine"  # the owner's name of the caches in Beams.states
ROOM = 64  # tokens that a cache makes room for at a time: in bfloat16 attention on CPU reads unread room too
LOOK = 8  # tokens between looks at which rows have ended, off the CPU: to look is to wait for all that was asked for
_NOTHING = -1  # in place of a token: the row had ended


class TransformersEngine:
    """`Engine`, `MixesDraws`, `MixesSampling`, `RanksTokens` and `EditsLatents` over a `transformers` model."""

    mixes_draws = mixes_sampling = True

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, name: str = "") -> None:
        """Raises UnsupportedModel if the model cannot be read exactly with a shared cache (checked on a few tokens)."""
        self.model = cast(Any, model)  # transformers' annotations are too loose to help
        self.model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        self.name = name or str(model.config._name_or_path)
        self.fingerprint = fingerprint(model)
        self.precision = str(model.dtype).removeprefix("torch.")
        self.context = int(getattr(config, "max_position_embeddings", 0) or 2**31)
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        self.latent_width = int(config.hidden_size)
        self.end_tokens = _end_tokens(model, tokenizer)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        head = self.model.get_output_embeddings()
        self._head = Product.of(head.weight, head.bias) if type(head) is torch.nn.Linear else head
        self.look = 1 if self.model.device.type == "cpu" else LOOK
        self._verify_head()
        self.transformer = CachedTransformer(self.model.base_model)

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu"
    ) -> TransformersEngine:
        """Loads a hub name or a local directory. Raises CheckpointError for pickles, missing or extra tensors."""
        directory = checkpoint_directory(model)
        loaded = load_model(AutoModelForCausalLM, directory, dtype=dtype, device=device)
        return cls(loaded, load_tokenizer(directory), name=str(model))

    def encode(self, messages: Conversation) -> list[int]:
        """The prompt's token ids in the checkpoint's chat template; contents cannot open a turn."""
        return encode_chat(self.tokenizer, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The response's text, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def begin(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Beams:
        """One empty row per prompt, each prompt prefilled once."""
        cache, latent = self.transformer.prefill(prompts)
        return empty_beams(len(prompts), seeds, latent.float(), {STATE: cache})

    @torch.inference_mode()
    def extend(
        self, beams: Beams, tokens: int, sampling: Sampling | Sequence[Sampling], draw: int | Tensor,
        logit_bias: Tensor | None,
    ) -> Beams:  # fmt: skip
        """Draws up to `tokens` tokens for every row; nothing is drawn for a row that has ended."""
        if bool(beams.finished.any()):
            raise InvalidArgument("beams", "unfinished rows only", beams.finished.tolist())
        if not isinstance(sampling, Sampling) and len(sampling) != len(beams):
            raise InvalidArgument("sampling", f"one for all rows, or {len(beams)} of them", len(sampling))
        if logit_bias is not None and not is_finite_or_banned(logit_bias):
            raise InvalidArgument("logit_bias", "numbers or -inf", "NaN or +inf")
        device = self.model.device
        noise, end = _row_uniforms(beams, draw, tokens).to(device), torch.tensor(self.end_tokens, device=device)
        drawn = torch.full((len(beams), tokens), _NOTHING, device=device)
        log_prob = torch.zeros(len(beams), dtype=torch.float64, device=device)
        ended = torch.zeros(len(beams), dtype=torch.bool, device=device)
        latent = beams.latent.to(device, self.model.dtype, copy=True)

        rows = torch.arange(len(beams))  # the rows that `cache` and `hidden` hold: ended ones leave it now and then
        going = rows  # places in `rows` of those that had not ended when last looked at
        cache, hidden, token = _cache(beams), latent, torch.zeros(len(beams), dtype=torch.int64, device=device)
        for step in range(tokens):
            active, places = rows[going].to(device), going.to(device)
            bias = None if logit_bias is None else logit_bias[rows[going]].to(device)
            shaped = sampling if isinstance(sampling, Sampling) else [sampling[row] for row in rows[going].tolist()]
            chosen, gained = draw_tokens(self._logits(hidden[places]), noise[active, step], shaped, bias)
            over = ended[active]
            token[places] = chosen
            drawn[active, step] = chosen.masked_fill(over, _NOTHING)
            log_prob[active] += gained.masked_fill(over, 0.0)
            ended[active] = over | torch.isin(chosen, end)
            if (step + 1) % self.look == 0:
                finished = ended.cpu()
                kept = _worth_reading(beams.prompt_index[rows], finished[rows])
                if not len(kept):
                    break  # nothing left to read
                if len(kept) < len(rows):
                    rows, token, cache = rows[kept], token[kept.to(device)], cache.take(kept)
                going = torch.nonzero(~finished[rows])[:, 0]
            cache, states = self.transformer.read(cache, token[:, None], capacity=min(tokens - step, ROOM))
            hidden, held = states[:, 0], rows.to(device)
            # An ended row's latent stays that of its last token read.
            latent[held] = torch.where(ended[held][:, None], latent[held], hidden)
        finished = ended.cpu()
        open_rows = torch.nonzero(~finished[rows])[:, 0]
        cache = cache.take(open_rows).sealed().spread(rows[open_rows], len(beams))
        new = [tuple(token for token in row if token != _NOTHING) for row in drawn.tolist()]
        return replace(
            beams,
            token_ids=tuple(old + own for old, own in zip(beams.token_ids, new, strict=True)),
            log_prob=beams.log_prob + log_prob.cpu(),
            latent=latent.float(),
            finished=finished,
            parent=torch.arange(len(beams)),
            states={**beams.states, STATE: cache},
        )

    @torch.inference_mode()
    def rank(self, beams: Beams, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest next tokens: (ids, logits, log-probabilities), each [B, C], best first."""
        logits = self.logits(beams.latent)
        ids = torch.stack([_largest(row, min(count, self.vocabulary)) for row in logits])
        chosen = logits.gather(1, ids)
        return ids, chosen, chosen.double() - logits.double().logsumexp(-1, keepdim=True)

    @torch.inference_mode()
    def append(self, beams: Beams, tokens: Tensor) -> Beams:
        """Appends a given token [B] to each row and reads it, but for an end token: that finishes the row."""
        if bool(beams.finished.any()):
            raise InvalidArgument("beams", "unfinished rows only", beams.finished.tolist())
        tokens = tokens.cpu()
        logits = self.logits(beams.latent).double()
        gained = logits.gather(1, tokens[:, None].to(logits.device))[:, 0] - logits.logsumexp(-1)
        finished = torch.isin(tokens, torch.tensor(self.end_tokens))
        going = torch.nonzero(~finished)[:, 0]
        cache, latent = _cache(beams).take(going), beams.latent.clone()
        if len(going):
            cache, states = self.transformer.read(cache, tokens[going][:, None])
            latent[going.to(latent.device)] = states[:, 0].float()
        return replace(
            beams,
            token_ids=tuple((*old, new) for old, new in zip(beams.token_ids, tokens.tolist(), strict=True)),
            log_prob=beams.log_prob + gained.cpu(),
            latent=latent,
            finished=finished,
            parent=torch.arange(len(beams)),
            states={**beams.states, STATE: cache.sealed().spread(going, len(beams))},
        )

    @torch.inference_mode()
    def logits(self, latent: Tensor) -> Tensor:
        """The LM head on hidden states [B, H], edited or not: [B, V] float32."""
        return self._logits(latent.to(self.model.device, self.model.dtype)).float()

    def _logits(self, hidden: Tensor) -> Tensor:
        padded = pad_rows(hidden) if hidden.dtype == torch.float32 else hidden
        logits = self._head(padded)[: len(hidden)]
        return logits if self._softcap is None else torch.tanh(logits.float() / self._softcap) * self._softcap

    def _verify_head(self) -> None:
        """Refuses a model whose logits are not its head applied to the last hidden state (but scaled, say)."""
        tokens = torch.arange(8, device=self.model.device)[None] % self.vocabulary
        with torch.inference_mode():
            theirs = self.model(input_ids=tokens, use_cache=False).logits[0].float()
            hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
            ours = self._logits(hidden).float()
        tolerance = (1e-3 if self.model.dtype == torch.float32 else 0.1) * max(1.0, float(theirs.abs().max()))
        if not float((ours - theirs).abs().max()) <= tolerance:
            raise UnsupportedModel(
                f"the logits of {type(self.model).__name__} are not a linear map of its hidden state."
            )


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the architecture and of a sample of every weight, the same whatever precision it is loaded in."""
    digest = hashlib.sha256()
    config = model.config.get_text_config()
    shape = {
        key: getattr(config, key, None) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    }
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """End tokens of the generation config and the tokenizer. Raises UnsupportedModel if there are none."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    tokens = set(configured if isinstance(configured, (list, tuple)) else [configured]) | {tokenizer.eos_token_id}
    tokens.discard(None)
    if not tokens:
        raise UnsupportedModel("the model has no end token.", hint="Set eos_token_id in its generation_config.json.")
    return tuple(sorted(int(token) for token in tokens))


def _largest(logits: Tensor, count: int) -> Tensor:
    """The ids [count] of the largest of `logits` [V]; of equal ones the smaller first, as `topk` may not do."""
    ids = torch.nonzero(logits >= logits.topk(count).values[-1])[:, 0]
    return ids[logits[ids].sort(descending=True, stable=True).indices[:count]]


def _worth_reading(prompt_index: Tensor, finished: Tensor) -> Tensor:
    """The rows to go on with: all open ones, and ended ones until enough have ended to be worth moving the caches.

    A prompt drops its ended rows when they are half of its rows, which no other prompt has a say in: a row's bits may
    depend on the rows of its own prompt. Prompts without an open row go when they are a quarter of all rows.
    """
    _, owner = torch.unique(prompt_index, return_inverse=True)
    size, ended = owner.bincount(), owner[finished].bincount(minlength=int(owner.max()) + 1)
    over = size == ended
    drop = 2 * ended >= size
    if bool(over.any()) and 4 * int(size[over].sum()) < len(owner):
        drop &= ~over
    return torch.nonzero(~(finished & drop[owner]))[:, 0]


def _cache(beams: Beams) -> KeyValues:
    state: Any = beams.states.get(STATE)
    if not isinstance(state, KeyValues):
        raise InvalidArgument("beams", "rows that this engine began, with their caches", sorted(beams.states))
    return state


def _row_uniforms(beams: Beams, draw: int | Tensor, tokens: int) -> Tensor:
    """[B, tokens]: row j of each prompt gets the j-th row of that prompt's own random numbers."""
    counts: dict[int, int] = {}
    numbers = []
    for prompt in beams.prompt_index.tolist():
        numbers.append(counts.get(prompt, 0))
        counts[prompt] = numbers[-1] + 1
    seeds: Mapping[int, int] = dict(zip(beams.prompt_index.tolist(), beams.seed.tolist(), strict=True))
    numbered = [draw] * len(beams) if isinstance(draw, int) else draw.tolist()
    draws: Mapping[int, int] = dict(zip(beams.prompt_index.tolist(), numbered, strict=True))
    noise = {prompt: uniforms(seeds[prompt], draws[prompt], count, tokens) for prompt, count in counts.items()}
    return torch.stack([noise[p][j] for p, j in zip(beams.prompt_index.tolist(), numbers, strict=True)])
