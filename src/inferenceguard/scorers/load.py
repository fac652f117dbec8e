"""Names and directories to scorers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from inferenceguard.checkpoints import checkpoint_directory, read_config
from inferenceguard.contracts import Scorer
from inferenceguard.errors import CheckpointError, InvalidArgument, UnknownName
from inferenceguard.scorers import beaver
from inferenceguard.scorers.beaver import BeaverScorer
from inferenceguard.scorers.classifier import SequenceClassifier
from inferenceguard.scorers.embedded import EmbeddedCost, EmbeddedReward
from inferenceguard.scorers.guard_llm import GuardLLM
from inferenceguard.scorers.remote import VLLMClassifier

Purpose = Literal["reward", "cost"]
EMBEDDED = "embedded"
EMBEDDED_FORMAT = "inferenceguard-pair-encoder"  # `format` in the config.json of a trained MiniLM pair encoder
EMBEDDED_FIELDS = {"kind", "scale", "offset", "limits"}  # what else tells it


def load_scorer(name_or_directory: str | Path, *, purpose: Purpose, **options: Any) -> Scorer:
    """The scorer that a name or a checkpoint stands for.

    "embedded"                               the shipped MiniLM pair encoder
    a directory or an `owner/name`, by its config.json:
        format inferenceguard-pair-encoder   EmbeddedCost, EmbeddedReward
        LlamaForScore, LlamaModelForScore    BeaverScorer
        ...ForSequenceClassification         SequenceClassifier; with the option `url`, VLLMClassifier
        ...ForCausalLM, as a cost            GuardLLM

    `options` go to that class's `from_pretrained` (`labels`, `unsafe_label`, `prefix`, `dtype`, `device`, ...). Raises
    UnknownName for an unknown name or option, CheckpointError for a checkpoint of no known kind, and for pickles.
    """
    if purpose not in ("reward", "cost"):
        raise UnknownName("purpose", str(purpose), ["reward", "cost"])
    embedded: type[EmbeddedCost] | type[EmbeddedReward] = EmbeddedCost if purpose == "cost" else EmbeddedReward
    if str(name_or_directory) == EMBEDDED:
        return _with_options(embedded.load, "embedded", options)
    directory = checkpoint_directory(name_or_directory)
    config = read_config(directory)
    if config.get("format") == EMBEDDED_FORMAT or config.keys() >= EMBEDDED_FIELDS:
        return _with_options(embedded.load, "embedded", options, directory)
    kind = _kind(directory, config, purpose, options)
    if kind is BeaverScorer:
        options = {"purpose": purpose, **options}
    return _with_options(kind.from_pretrained, kind.__name__, options, name_or_directory)


def _kind(directory: Path, config: dict[str, Any], purpose: Purpose, options: dict[str, Any]) -> Any:
    architectures = [str(name) for name in config.get("architectures") or ()]
    for architecture in architectures:
        if architecture in beaver.ARCHITECTURES:
            return BeaverScorer
        if architecture.endswith("ForSequenceClassification"):
            return VLLMClassifier if "url" in options else SequenceClassifier
        if architecture.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) and purpose == "cost":
            return GuardLLM
    raise CheckpointError(
        f"{directory} is no {purpose} model that is known: architectures {architectures}.",
        hint="Known: LlamaForScore, ...ForSequenceClassification, and as a cost ...ForCausalLM.",
    )


def _with_options(load: Any, kind: str, options: dict[str, Any], *arguments: Any) -> Scorer:
    known = [name for name, p in inspect.signature(load).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if not known:
            raise InvalidArgument(f"options of the {kind} scorer", "none", name)
        if name not in known:
            raise UnknownName(f"option of {kind}", name, known)
    scorer: Scorer = load(*arguments, **options)
    return scorer
