"""Scorers: sequence classifiers, Beaver checkpoints, guard LLMs, functions, combinations, and the wall around them."""

from inferenceguard.scorers.beaver import BeaverScorer
from inferenceguard.scorers.callables import FunctionScorer
from inferenceguard.scorers.classifier import SequenceClassifier
from inferenceguard.scorers.combine import Maximum, WeightedSum
from inferenceguard.scorers.embedded import EmbeddedCost, EmbeddedReward
from inferenceguard.scorers.guard_llm import GuardLLM
from inferenceguard.scorers.load import load_scorer
from inferenceguard.scorers.remote import VLLMClassifier
from inferenceguard.scorers.safe import FailClosed, Outcome, ScoresPrefixes

__all__ = [
    "BeaverScorer",
    "EmbeddedCost",
    "EmbeddedReward",
    "FailClosed",
    "FunctionScorer",
    "GuardLLM",
    "Maximum",
    "Outcome",
    "ScoresPrefixes",
    "SequenceClassifier",
    "VLLMClassifier",
    "WeightedSum",
    "load_scorer",
]
