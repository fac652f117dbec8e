"""Four questions of our own as an Inspect task, for a guarded server.

inferenceguard serve --preset embedded --port 8000
export INFERENCEGUARD_BASE_URL=http://127.0.0.1:8000/v1 INFERENCEGUARD_API_KEY=none
inspect eval examples/inspect_ai/facts.py --model openai-api/inferenceguard/embedded
"""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

ROWS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What do bees make?", "honey"),
)


@task
def facts() -> Task:
    """Does the guarded answer name the word?"""
    return Task(
        dataset=[Sample(input=question, target=answer) for question, answer in ROWS],
        solver=generate(),
        scorer=includes(),
        config=GenerateConfig(max_tokens=32, temperature=0.8, seed=1),
    )
