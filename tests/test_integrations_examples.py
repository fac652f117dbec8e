"""The examples that need no other program, as they stand; `examples/run_all.sh` runs the rest too."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inferenceguard import Guard, InferenceGuard, SafetyBudget
from inferenceguard.testing import ToyCost, ToyEngine, ToyReward
from served import serving
from tiny import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def guard() -> Guard:
    strategy = InferenceGuard(8, 2, 2, 16, budget=SafetyBudget(0.5))
    return Guard(ToyEngine(seed=4, end_logit=-0.5), ToyReward(1), ToyCost(2), strategy=strategy)


def test_the_openai_client() -> None:
    with serving(guard()) as live:
        done = subprocess.run(
            [sys.executable, EXAMPLES / "openai_client.py", f"http://127.0.0.1:{live.port}/v1"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout
    colour, sleep = (guard().generate(text, seed=1)[0] for text in ("Name a colour.", "How do I sleep better?"))
    assert "model: toy\n" in said
    tokens = colour.usage.completion_tokens
    assert f"chat: {colour.text!r} ({colour.finish_reason}, {tokens} tokens)\n" in said
    assert f"stream: {colour.text!r} in " in said
    assert f"ledger: cost {sleep.cost:.3f}, budget 0.5, left {sleep.budget_left:.3f}\n" in said
    blocks = [(len(block["fate"]), block["fate"].count("kept")) for block in sleep.record["search"]]
    shown = re.findall(r"^  block \d+: (\d+) proposals, (\d+) kept$", said, re.MULTILINE)
    assert [(int(rows), int(kept)) for rows, kept in shown] == blocks
    assert re.search(r"^budget -1000: '.*' \(content_filter\)$", said, re.MULTILINE)
    assert "error: 400 unsupported_parameter: logprobs is not supported by this server.\n" in said


def test_the_code_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (EXAMPLES.parent / "docs" / "integrations.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("my-llm")
    tiny_tokenizer().save_pretrained("my-llm")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/integrations.md", "exec"), names)
    assert names["sequences"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("wanted", "answer", "expected"),
    [("Paris", "It is PARIS.", 1.0), ("7|seven", "There are seven.", 1.0), ("7|seven", "eight", 0.0)],
)
def test_the_score_of_the_lm_eval_task(wanted: str, answer: str, expected: float) -> None:
    score = runpy.run_path(str(EXAMPLES / "lm_eval" / "facts.py"))["score"]
    assert score({"answer": wanted}, [answer]) == {"named": expected}


def test_the_rows_of_the_lm_eval_task() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "lm_eval" / "facts.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(set(row) == {"question", "answer"} and all(row["answer"].split("|")) for row in rows)
