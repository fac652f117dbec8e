"""The score of the task `guarded_facts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def score(row: Mapping[str, str], answers: Sequence[str]) -> dict[str, float]:
    """1 where the answer has one of the row's words."""
    return {"named": float(any(word.lower() in answers[0].lower() for word in row["answer"].split("|")))}
