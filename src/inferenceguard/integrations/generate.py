"""`model.generate(**inputs, custom_generate=guarded_generate(...))`: the guard in the place of transformers' own loop.

The prompt comes as token ids, so its template is the caller's: user text cannot be told from control tokens here. Chat
front ends should use `Guard`, which encodes messages itself.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitNormalization
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from inferenceguard.beams import Beams
from inferenceguard.budget import SafetyBudget
from inferenceguard.chat import encode_text
from inferenceguard.checkpoints import Tokenizer
from inferenceguard.config import read_critic, read_scorer
from inferenceguard.contracts import (
    Conversation,
    Critic,
    GuardedResponse,
    Message,
    Prompt,
    Sampling,
    Scorer,
    ScorerLimits,
    Strategy,
    conversation,
)
from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.errors import EngineFault, InvalidArgument, PromptTooLong, UnsupportedModel
from inferenceguard.guard import FALLBACKS, Asked, Desk, Guard
from inferenceguard.kv import ATTENTION
from inferenceguard.strategies import InferenceGuard
from inferenceguard.text import visible_text

# Settings that ask for another decoding loop or for what the guard does not keep -> the values that ask for nothing.
UNSERVED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "use_mtp": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "dola_layers": (None,),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
# Arguments of `generate` that it does not hand on to a callable (transformers 5.23), though they ask for something.
NOT_HANDED_ON = ("streamer", "assistant_model", "synced_gpus")
WITHOUT_EFFECT = {"use_cache", "logits_to_keep"}  # how `generate` would compute, not what
# What shapes a distribution as Sampling does, in its order, and the attribute that says how.
WARPERS: Mapping[Any, str] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
}
USUAL = (("filter_value", -torch.inf), ("min_tokens_to_keep", 1))  # of their other attributes


def guarded_generate(
    tokenizer: Tokenizer,
    *,
    cost: Scorer | str | Path,
    reward: Scorer | str | Path,
    budget: float | None = None,
    strategy: Strategy | None = None,
    critic: Critic | str | Path | None = None,
    gate_cost: Scorer | None = None,
    fallbacks: Sequence[str] = FALLBACKS,
    limits: ScorerLimits | None = None,
    batch_rows: int = 128,
) -> GuardedGenerate:
    """A callable for `custom_generate` of transformers 5. `tokenizer` is the model's own.

    `cost`, `reward` and `critic` are objects, names or directories, as for `Guard.from_pretrained`. `budget` is d, in
    cost units; None is the strategy's. The strategy is by default InferenceGuard with N 16, K 4, blocks of 16 tokens.
    The rest is `Guard`'s. Raises UnknownName, CheckpointError or InvalidArgument.
    """
    chosen: Any = InferenceGuard(n_beams=16, keep=4, block_tokens=16) if strategy is None else strategy
    if budget is not None:
        chosen = dataclasses.replace(chosen, budget=SafetyBudget(float(budget), chosen.budget.discount))
    for text in fallbacks:
        if _decode(tokenizer, encode_text(tokenizer, text)) != text:
            raise InvalidArgument("fallbacks", "texts that the tokenizer gives back as they are", text)
    settings = {
        "reward": read_scorer(reward, "reward"),
        "cost": read_scorer(cost, "cost"),
        "critic": read_critic(critic, None),
        "gate_cost": gate_cost,
        "strategy": chosen,
        "fallbacks": fallbacks,
        "limits": limits,
        "batch_rows": batch_rows,
    }
    return GuardedGenerate(tokenizer, settings)


@dataclass
class GuardedGenerateOutput(GenerateDecoderOnlyOutput):
    """With `return_dict_in_generate`: `sequences`, and the guard's responses with cost and record."""

    responses: tuple[GuardedResponse, ...] | None = None


class GuardedGenerate:
    """What `generate` calls in the place of its own loop. Keeps the engine of the last model that it was called for.

    The model stays frozen: parameters stop asking for gradients, and some share memory from then on (llama.py).
    """

    def __init__(self, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
        """`settings` are those of `Guard`, scorers read; `guarded_generate` makes them."""
        self.tokenizer = tokenizer
        self.settings = dict(settings)
        self._loaded: _Loaded | None = None
        self._lock = threading.Lock()  # an engine takes one call at a time

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        /,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        prompts: Sequence[Prompt] | None = None,
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> GuardedGenerateOutput | Tensor:
        """The ids of prompts and guarded responses [B, T], padded as `generate` pads them: left, then right.

        input_ids [B, L] with `num_return_sequences` rows per prompt. Two arguments of `generate` are our own:
        `prompts`, for each prompt the text or messages that the scorers read (by default its ids, decoded), and `seed`:
        row i of a prompt draws with seed + i. Without it one is drawn from torch's generator (`torch.manual_seed`).

        A fallback leaves whole, even where it has more than max_new_tokens. Raises InvalidArgument, which names a
        setting that the guard cannot honour, PromptTooLong or UnsupportedModel before a token is drawn; EngineFault.
        """
        caller = inspect.currentframe()
        _refuse_model(model)
        _refuse_settings(generation_config, caller.f_back.f_locals if caller and caller.f_back else {})
        del caller
        sampling = _sampling(logits_processor, generation_config)
        longest, ends = _ends(stopping_criteria)
        ids = _prompt_ids(input_ids, model_kwargs)
        copies = generation_config.num_return_sequences or 1
        if seed is None:
            seed = int(torch.randint(2**62, (1,)))
        with self._lock, _own_attention(model, fresh=not self._knows(model)):
            guard = self._guard(model, ends)
            answers = _answer(
                guard, _conversations(self.tokenizer, ids, prompts, copies), _seeds(seed, len(ids), copies),
                longest - input_ids.shape[1], sampling,
            )  # fmt: skip
        pad = generation_config.pad_token_id
        pad = guard.models.engine.end_tokens[0] if pad is None else pad  # as `generate` itself does
        sequences = _padded(input_ids, [tokens for _, tokens in answers], pad)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GuardedGenerateOutput(sequences=sequences, responses=tuple(answer for answer, _ in answers))  # type: ignore[arg-type]

    def _knows(self, model: PreTrainedModel) -> bool:
        """Whether the engine at hand reads this model, with the weights that it has now."""
        return self._loaded is not None and self._loaded.model is model and self._loaded.stamp == _stamp(model)

    def _guard(self, model: PreTrainedModel, ends: tuple[int, ...]) -> Guard:
        """The guard of this model as it is now, whose rows end at `ends` (or where those are none, at its own ends)."""
        if not self._knows(model):
            engine = _GivenIds(model, self.tokenizer)
            self._loaded = _Loaded(model, engine, _stamp(model))  # the engine replaces weights: stamped behind it
        loaded = self._loaded
        assert loaded is not None
        if ends not in loaded.guards:
            engine = copy.copy(loaded.engine)
            engine.end_tokens = ends or engine.end_tokens
            loaded.guards[ends] = Guard(engine, **self.settings)
        return loaded.guards[ends]


class _GivenPrompt(tuple[Message, ...]):
    """A conversation for the scorers, with the token ids that the LLM reads."""

    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, messages: Conversation, token_ids: Sequence[int]) -> _GivenPrompt:
        prompt = cls(messages)
        prompt.token_ids = tuple(token_ids)
        return prompt


class _GivenIds(TransformersEngine):
    """Reads the ids that came with a prompt."""

    def encode(self, messages: Conversation) -> list[int]:
        return list(messages.token_ids) if isinstance(messages, _GivenPrompt) else super().encode(messages)


@dataclass
class _Loaded:
    model: PreTrainedModel
    engine: _GivenIds
    stamp: tuple[tuple[int, int], ...]
    guards: dict[tuple[int, ...], Guard] = field(default_factory=dict)  # by end tokens


# --- what was asked for ----------------------------------------------------------------------------------------------


def _refuse_settings(config: GenerationConfig, arguments: Mapping[str, Any]) -> None:
    """Raises InvalidArgument for what the guard cannot honour. `arguments` are the local names of `generate`."""
    for name in NOT_HANDED_ON:
        if "custom_generate" in arguments and arguments.get(name):
            raise InvalidArgument(name, "left out with guarded_generate", arguments[name])
    for name, harmless in UNSERVED.items():
        value = getattr(config, name, None)
        if not any(value is other or value == other for other in harmless):
            raise InvalidArgument(
                name, f"{harmless[-1]} with guarded_generate", value, hint="The guard searches in its own way."
            )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InvalidArgument("generation mode", "greedy_search or sample with guarded_generate", mode.value)


def _sampling(processors: LogitsProcessorList, config: GenerationConfig) -> Sampling:
    """Temperature, top-k and top-p of the prepared list; greedy without do_sample. Raises InvalidArgument for more."""
    found: dict[str, Any] = {}
    place = -1
    for processor in processors:
        kind: Any = type(processor)
        if kind is LogitNormalization:
            continue  # changes no probability
        changed = any(getattr(processor, name, usual) != usual for name, usual in USUAL)
        if kind not in WARPERS or list(WARPERS).index(kind) <= place or changed:
            raise InvalidArgument(
                "logits_processor", "temperature, top_k and top_p alone (in this order) with guarded_generate",
                kind.__name__, hint="The setting that makes this processor cannot be used with the guard.",
            )  # fmt: skip
        place = list(WARPERS).index(kind)
        found[WARPERS[kind]] = getattr(processor, WARPERS[kind])
    if not config.do_sample:
        return Sampling(temperature=0.0)
    return Sampling(float(found.get("temperature", 1.0)), float(found.get("top_p", 1.0)), int(found.get("top_k", 0)))


def _ends(criteria: StoppingCriteriaList) -> tuple[int, tuple[int, ...]]:
    """(tokens of prompt and response at most, the tokens that end a response). Raises InvalidArgument for more."""
    lengths: list[int] = []
    ends: set[int] = set()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(int(criterion.max_length))
        elif type(criterion) is EosTokenCriteria:
            ends |= {int(token) for token in criterion.eos_token_id.flatten().tolist()}
        else:
            raise InvalidArgument(
                "stopping_criteria", "a length and end tokens alone with guarded_generate", type(criterion).__name__,
                hint="Leave out max_time, stop_strings and criteria of your own.",
            )  # fmt: skip
    if not lengths:
        raise InvalidArgument("max_new_tokens", "given", None)
    return min(lengths), tuple(sorted(ends))


def _prompt_ids(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """Each row's ids without its left padding. Raises InvalidArgument for inputs that the engine would not read."""
    given = {name: value for name, value in model_kwargs.items() if value is not None and name not in WITHOUT_EFFECT}
    cache, mask, positions = (given.pop(name, None) for name in ("past_key_values", "attention_mask", "position_ids"))
    if getattr(cache, "_is_user_defined", False) or (cache is not None and cache.get_seq_length()):
        raise InvalidArgument("past_key_values", "left out with guarded_generate", type(cache).__name__)
    for name, value in given.items():
        raise InvalidArgument(name, "left out with guarded_generate", value, hint="The prompt is read from input_ids.")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
    read = mask != 0
    if mask.shape != input_ids.shape or not bool(read.any(-1).all()) or bool((read[:, :-1] & ~read[:, 1:]).any()):
        raise InvalidArgument(
            "attention_mask", "zeros and then ones in each row", mask.tolist(), hint="Pad prompts on the left."
        )
    expected = (read.long().cumsum(-1) - 1).clamp(min=0)
    if positions is not None:
        positions = positions.to(input_ids.device)
        if positions.dim() != 2 or not bool((positions == expected[: len(positions)]).all()):
            raise InvalidArgument("position_ids", "left out with guarded_generate", positions.tolist())
    return [row[kept].tolist() for row, kept in zip(input_ids, read, strict=True)]


def _conversations(
    tokenizer: Tokenizer, ids: Sequence[Sequence[int]], prompts: Sequence[Prompt] | None, copies: int
) -> list[_GivenPrompt]:
    """What the scorers read as the prompt of each row: what was given, else the row's ids as text."""
    if prompts is not None and (isinstance(prompts, str) or len(prompts) * copies != len(ids)):
        raise InvalidArgument("prompts", f"a list with one for each of the {len(ids) // copies} prompts", prompts)
    found = []
    for index, tokens in enumerate(ids):
        if prompts is not None:
            messages = conversation(prompts[index // copies], name=f"prompt {index // copies}")
        else:
            text = _decode(tokenizer, tokens)
            if not text.strip():
                hint = "Or give the scorers a text: prompts=[...]."
                raise InvalidArgument(f"input_ids of row {index}", "ids of a text", text, hint=hint)
            messages = conversation(text)
        found.append(_GivenPrompt.of(messages, tokens))
    return found


def _seeds(seed: int, rows: int, copies: int) -> list[int]:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63 - copies:
        raise InvalidArgument("seed", "an integer in [0, 2^63)", seed)
    return [seed + row % copies for row in range(rows)]


def _refuse_model(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder; the guard reads causal LMs.")
    if model.training:
        raise InvalidArgument("model", "in evaluation mode", "a model in training", hint="Call model.eval().")


@contextlib.contextmanager
def _own_attention(model: Any, fresh: bool) -> Iterator[None]:
    """The engine's attention in the model's layers for as long as it reads; then the model's own again."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if fresh else ATTENTION)  # an engine that is made installs it itself
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _stamp(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Changes when a weight is written to in place or replaced: what the engine laid out is old then."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())


# --- what is answered ------------------------------------------------------------------------------------------------


def _answer(
    guard: Guard, prompts: Sequence[_GivenPrompt], seeds: Sequence[int], max_new_tokens: int, sampling: Sampling
) -> list[tuple[GuardedResponse, list[int]]]:
    """As `Guard.generate`, with each response's token ids, its end token included."""
    own: Any = guard.strategy
    strategy: Strategy = dataclasses.replace(own, max_new_tokens=max_new_tokens)
    engine = guard.models.engine
    for index, prompt in enumerate(prompts):
        if len(prompt.token_ids) + max_new_tokens > engine.context:
            raise PromptTooLong(index, len(prompt.token_ids), max_new_tokens, engine.context)
    answers: list[tuple[GuardedResponse, list[int]]] = []
    size = max(1, guard.batch_rows // strategy.n_beams)
    for start in range(0, len(prompts), size):
        batch, draws = prompts[start : start + size], seeds[start : start + size]
        desk = Desk(guard)
        desk.asked |= {
            index: Asked(prompt, seed, strategy, sampling)
            for index, (prompt, seed) in enumerate(zip(batch, draws, strict=True))
        }
        result = strategy.generate(batch, guard.models, sampling, draws)
        responses = desk.settle(result.beams, dict(enumerate(result.trace)))
        answers += [(response, _response_ids(guard, response, result.beams, i)) for i, response in responses.items()]
    return answers


def _response_ids(guard: Guard, response: GuardedResponse, beams: Beams, prompt: int) -> list[int]:
    """Ids whose text is the released one to the letter: those that were drawn, where they are.

    Control tokens and a last character's incomplete bytes, which the gate did not see as text, are left out. Raises
    EngineFault where no ids have the text: nothing leaves then.
    """
    engine: Any = guard.models.engine
    tokenizer, ends, text = engine.tokenizer, engine.end_tokens, response.text
    end = [] if response.finish_reason == "length" else [ends[0]]
    if response.finish_reason != "content_filter":
        controls = _control_ids(tokenizer) | set(ends)
        for row in (beams.prompt_index == prompt).nonzero()[:, 0].tolist():
            tokens = beams.token_ids[row]
            if visible_text(engine, tokens) != text or (text and len(tokens) != response.usage.completion_tokens):
                continue
            end = [token for token in tokens[-1:] if token in ends]
            body = [token for token in tokens if token not in controls]
            while body and len(engine.decode(body)) > len(text):
                body.pop()  # bytes of an incomplete character, which the reader of the text does not see
            if engine.decode(body) == text:
                return body + end
    body = encode_text(tokenizer, text)
    if engine.decode(body) != text:
        raise EngineFault("the tokenizer has no ids for the released text, so that nothing was released.")
    return body + end


def _control_ids(tokenizer: Tokenizer) -> set[int]:
    added = {int(token) for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | {int(token) for token in tokenizer.all_special_ids}


def _padded(input_ids: Tensor, responses: Sequence[Sequence[int]], pad: int) -> Tensor:
    """[B, L + longest response] on the device of input_ids."""
    longest = max(len(tokens) for tokens in responses)
    filled = [[*tokens, *[pad] * (longest - len(tokens))] for tokens in responses]
    return torch.cat([input_ids, torch.tensor(filled, dtype=input_ids.dtype, device=input_ids.device)], 1)


def _decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """As the engine decodes a response."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
