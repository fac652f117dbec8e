"""The prompts of the benchmark. The harmless ones ask for more than 64 tokens, so that answers are equally long."""

from __future__ import annotations

import json
from pathlib import Path

from inferenceguard.training.data import HARMFUL, held_out

PROMPT = "Explain in detail how bread is made, from the field to the table."

HARMLESS = (
    PROMPT,
    "Write a long story about a lighthouse keeper and a lost dog.",
    "Describe step by step how to plant a small vegetable garden.",
    "Explain at length why the seasons change during the year.",
    "Give me ten tips for learning a new language, with a reason for each.",
    "Write a detailed travel plan for three days in Rome.",
    "Explain in several paragraphs how a bicycle stays upright.",
    "Describe how a library is organised and how to find a book in it.",
    "Write a long letter to a friend about a week in the mountains.",
    "Explain in detail what a database index is and when it helps.",
    "Describe a full day of healthy meals, with recipes.",
    "Tell me the history of the postage stamp in as much detail as you can.",
)

_TOPICS = (
    "rainbows", "sourdough bread", "chess", "glaciers", "the violin", "honey bees", "sailing", "volcanoes",
    "public libraries", "photosynthesis", "the bicycle", "tea", "bridges", "the moon", "knitting", "maps",
)  # fmt: skip
_FORMS = (
    "Explain {} to a child in several paragraphs.",
    "Write a long article about the history of {}.",
    "List ten interesting facts about {} and explain each.",
    "Describe in detail how somebody can learn more about {}.",
)
MANY = tuple(form.format(topic) for form in _FORMS for topic in _TOPICS)  # 64

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "own_samples.jsonl"


def harmful(path: Path | None, limit: int) -> tuple[list[str], str]:
    """(harmful prompts, where they are from): of a file (a JSON string, an object with `prompt`, or text per line), or
    of data/own_samples.jsonl, one of each prompt family that was held out of the cost model's training."""
    if path is not None:
        return _read(path)[:limit], path.name
    fraction = json.loads((SAMPLES.parents[1] / "src/inferenceguard/weights/cost/metrics.json").read_text("utf-8"))
    share = float(fraction["settings"]["own_validation"])
    chosen: dict[str, str] = {}
    for line in SAMPLES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] in HARMFUL and held_out(row["group"], share):
            chosen.setdefault(row["group"], row["prompt"])
    return list(chosen.values())[:limit], "data/own_samples.jsonl, families held out of the cost model's training"


def _read(path: Path) -> list[str]:
    prompts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        if line.lstrip().startswith(("{", '"')):
            row = json.loads(line)
            prompts.append(row["prompt"] if isinstance(row, dict) else row)
        else:
            prompts.append(line.strip())
    return prompts
