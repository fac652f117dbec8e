"""Methods on prompts: many prompts per batch, JSON Lines as it goes, resumable after a kill.

    DIR/run.json        settings (a run with others is refused), software, machine, fingerprints, seeds
    DIR/results.jsonl   a row per method and prompt, methods in order; no times, so that equal runs are equal files
    DIR/timings.jsonl   a row per batch: wall seconds (the last row of a batch counts)

Rows are appended batch by batch and are on the disk before the next batch starts. The next run cuts off a torn line
and computes the batch that was interrupted as a whole, because in bfloat16 an answer may depend on what is computed
beside it. Methods may be added at the end of the list of a finished run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

from inferenceguard.cli.files import RowFile, json_line, read_rows, whole_file
from inferenceguard.config import Method
from inferenceguard.contracts import Conversation, Critic, Scorer, SearchResult, ValueModel, conversation
from inferenceguard.errors import CheckpointError, InvalidArgument, MissingCapability, UnknownName, UnsupportedModel
from inferenceguard.evaluation.flops import Count, Meter
from inferenceguard.evaluation.measure import Measures, Released
from inferenceguard.evaluation.prompts import EvaluationPrompt, digest
from inferenceguard.guard import Guard
from inferenceguard.memory import Trimmer
from inferenceguard.record import software

VERSION = 1
GATED = "+gate"
RESULTS, TIMINGS, RUN = "results.jsonl", "timings.jsonl", "run.json"
OF_THE_METHOD = (
    MissingCapability,
    CheckpointError,
    UnknownName,
    UnsupportedModel,
)  # not of one prompt: they stop a run
ANOTHER = "Choose another directory, or the settings that it was made with."


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method, with the gate off (as in the paper) or on."""

    name: str
    method: Method
    gate: bool = False

    def settings(self, guard: Guard) -> dict[str, Any]:
        """What it is, as plain data, with the models that it alone uses."""
        strategy = self.method.strategy
        return {
            "name": self.name,
            "search": type(strategy).__name__,
            **dataclasses.asdict(strategy),
            "critic": _identity(guard.models.critic if self.method.critic else None),
            "value": _identity(guard.models.value if self.method.value else None),
            "gate": self.gate,
        }


@dataclass(frozen=True)
class Evaluation:
    """What is run. `guard` brings the models, the sampling, the fallbacks and the limits; its strategy is not used."""

    guard: Guard
    entries: Sequence[Entry]
    prompts: Sequence[EvaluationPrompt]
    seed: int = 0
    judge: Scorer | None = None  # a second cost model that no search sees
    block_tokens: int = 16  # m: with the gate off z is measured every m tokens, whatever the method's own blocks
    sources: Sequence[str] = ()  # what the prompts were read from, for the record

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if not names:
            raise InvalidArgument("methods", "one or more", names)
        if len(set(names)) < len(names):
            raise InvalidArgument(
                "methods", "different names", names, hint="In a YAML file an entry can have a `name`."
            )
        if not self.prompts:
            raise InvalidArgument("prompts", "one or more", list(self.prompts))
        if self.block_tokens < 1:
            raise InvalidArgument("block_tokens", ">= 1", self.block_tokens)


@dataclass(frozen=True)
class Progress:
    """How far a run is; weights are rows of the LLM, so that the time left is more than a count of prompts."""

    method: str
    done: int  # prompts of this method
    prompts: int
    errors: int  # so far, of all methods
    weight: int  # done so far, of all methods
    total: int


def run(
    evaluation: Evaluation,
    out: Path,
    report: Callable[[Progress], None] = lambda progress: None,
    *,
    retry_failed: bool = False,
) -> int:
    """Computes what is missing in `out`; returns how many rows say that their prompt failed.

    `retry_failed`: those are then tried once more, each alone. Raises InvalidArgument for a directory of other
    settings, and what is wrong with a method before a token is drawn.
    """
    measures = Measures(evaluation.guard, evaluation.judge, evaluation.block_tokens)
    methods = [_Runner(evaluation, entry, measures) for entry in evaluation.entries]
    _start_run(evaluation, out)
    state, trimmer = _State(evaluation, report), Trimmer()
    expected = [(entry.name, prompt.key) for entry in evaluation.entries for prompt in evaluation.prompts]

    def check(place: int, row: dict[str, Any]) -> None:
        if place >= len(expected) or (row.get("method"), row.get("key")) != expected[place]:
            raise InvalidArgument(
                "out", f"a directory of the same run (row {place + 1})", str(out / RESULTS), hint=ANOTHER
            )
        state.errors += row.get("error") is not None

    def any_row(place: int, row: dict[str, Any]) -> None:
        """Times are advice: nothing hangs on them."""

    with RowFile(out / RESULTS, check) as results, RowFile(out / TIMINGS, any_row) as timings:
        before = results.rows
        for number, method in enumerate(methods):
            done = min(max(before - number * len(evaluation.prompts), 0), len(evaluation.prompts))
            state.advance(method, 0, done)
            for start, stop in method.batches(done):
                begun = time.monotonic()
                rows = method.answer(start, stop)
                seconds = method.seconds if method.seconds else time.monotonic() - begun
                timings.append(
                    [{"method": method.entry.name, "start": start, "prompts": stop - start, "seconds": seconds}]
                )
                results.append(rows[max(0, done - start) :])
                state.errors += sum(row["error"] is not None for row in rows[max(0, done - start) :])
                state.advance(method, max(start, done), stop)
                trimmer.after_block(idle=False)
        if retry_failed and state.errors:
            return _retry(out / RESULTS, methods)
    return state.errors


def _retry(path: Path, methods: Sequence[_Runner]) -> int:
    """Answers the prompts of rows with an error again; the file is replaced as a whole, method by method."""
    rows = list(read_rows(path, ("method", "error")))
    count = len(methods[0].conversations)
    for number, method in enumerate(methods):
        failed = [at for at in range(number * count, (number + 1) * count) if rows[at]["error"] is not None]
        for at in failed:
            (rows[at],) = method.answer(at % count, at % count + 1)
        if failed:
            with whole_file(path) as write:
                for row in rows:
                    write(json_line(row))
    return sum(row["error"] is not None for row in rows)


@dataclass
class _State:
    """What the progress is told from."""

    evaluation: Evaluation
    report: Callable[[Progress], None]
    errors: int = 0
    weight: int = 0

    def advance(self, method: _Runner, start: int, stop: int) -> None:
        self.weight += (stop - start) * method.weight
        prompts = len(self.evaluation.prompts)
        total = sum(_weight(entry) for entry in self.evaluation.entries) * prompts
        self.report(Progress(method.entry.name, stop, prompts, self.errors, self.weight, total))


class _Runner:
    """One method on all prompts, batch by batch."""

    def __init__(self, evaluation: Evaluation, entry: Entry, measures: Measures) -> None:
        self.evaluation, self.entry, self.measures = evaluation, entry, measures
        self.meter = Meter()
        self.guard = _guard(evaluation, entry, self.meter)
        self.weight = _weight(entry)
        self.seconds = 0.0  # of the last batch
        self.conversations = [conversation(prompt.prompt) for prompt in evaluation.prompts]
        self.seeds = [_seed(evaluation.seed, prompt) for prompt in evaluation.prompts]

    def batches(self, done: int) -> list[tuple[int, int]]:
        """The batches that are not whole; those of an unbroken run."""
        size = max(1, self.guard.batch_rows // self.guard.strategy.n_beams)
        count = len(self.conversations)
        if done >= count:
            return []
        return [(start, min(start + size, count)) for start in range(done - done % size, count, size)]

    def answer(self, start: int, stop: int) -> list[dict[str, Any]]:
        """The rows of prompts start .. stop. A prompt that fails costs no other."""
        self.seconds = 0.0
        fits, faults = self._fitting(range(start, stop))
        try:
            rows = self._answer(fits)
        except OF_THE_METHOD:
            raise
        except Exception as error:  # engines, scorers and strategies may be anybody's code
            rows = {}
            for index in fits:
                try:
                    rows |= self._answer([index]) if len(fits) > 1 else {index: self._failed(index, error)}
                except OF_THE_METHOD:
                    raise
                except Exception as own:
                    rows[index] = self._failed(index, own)
        rows |= {index: self._failed(index, error) for index, error in faults.items()}
        return [rows[index] for index in range(start, stop)]

    def _fitting(self, indices: Sequence[int]) -> tuple[list[int], dict[int, Exception]]:
        """Prompts that the model can read, and why it cannot read the others."""
        fits, faults = [], {}
        for index in indices:
            try:
                self.guard.check([self.conversations[index]], seed=self.seeds[index])
                fits.append(index)
            except Exception as error:
                faults[index] = error
        return fits, faults

    def _answer(self, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
        if not indices:
            return {}
        conversations = [self.conversations[index] for index in indices]
        seeds = [self.seeds[index] for index in indices]
        begun = time.monotonic()
        with self.meter.batch(conversations) as count:
            released = self._gated(conversations, seeds) if self.entry.gate else self._ungated(conversations, seeds)
        self.seconds += time.monotonic() - begun
        measured = self.measures.measure(conversations, released)
        return {
            index: self._row(index, released[at], measured[at], count, at) for at, index in enumerate(indices)
        }  # fmt: skip

    def _ungated(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[Released]:
        """The search's best row of each prompt, whatever it costs."""
        guard = self.guard
        result = guard.strategy.generate(conversations, guard.models, guard.sampling, seeds)
        return Released.of_rows(guard, result)

    def _gated(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[Released]:
        """What leaves the guard."""
        results: list[SearchResult] = []
        guard = self.guard
        search = guard.strategy.generate

        def watched(*arguments: Any) -> SearchResult:
            results.append(search(*arguments))
            return results[-1]

        object.__setattr__(guard.strategy, "generate", watched)
        try:
            responses = guard.generate(conversations, seeds=seeds)
        finally:
            object.__delattr__(guard.strategy, "generate")
        return [Released.of_response(guard, response, results[0], at) for at, response in enumerate(responses)]

    def _row(
        self, index: int, released: Released, measured: Mapping[str, Any], count: Count, at: int
    ) -> dict[str, Any]:  # fmt: skip
        if released.error:
            return self._failed(index, released.error, released, count.of(at))
        return {**self._head(index), **released.as_row(), **measured, "flops": count.of(at), "error": None}

    def _failed(
        self, index: int, error: Exception | str, released: Released | None = None, flops: float | None = None
    ) -> dict[str, Any]:
        """The row of a prompt that has no answer: the fault, and what was spent on it."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        spent = {} if released is None else {"proposed_tokens": released.proposed_tokens, "flops": flops}
        return {**self._head(index), **spent, "error": " ".join(text.split())[:500]}

    def _head(self, index: int) -> dict[str, Any]:
        prompt = self.evaluation.prompts[index]
        return {
            "method": self.entry.name,
            "key": prompt.key,
            "source": prompt.source,
            "kind": prompt.kind,
            "prompt": prompt.prompt,
            "seed": self.seeds[index],
        }


def _guard(evaluation: Evaluation, entry: Entry, meter: Meter) -> Guard:
    """A guard with this method's strategy around counted copies of the models."""
    given = evaluation.guard
    cost = meter.scorer(given.cost.scorer)
    gate = cost if given.gate.cost is given.cost else meter.scorer(given.gate.cost.scorer)
    critic = given.models.critic if entry.method.critic else None
    value = given.models.value if entry.method.value else None
    for name, wanted, model in (("critic", entry.method.critic, critic), ("value model", entry.method.value, value)):
        if wanted and model is None:
            hint = "Name one, or leave the method out (inferenceguard:no-critic goes without)."
            raise InvalidArgument(
                "methods", f"some that go without a {name} where there is none", entry.name, hint=hint
            )
    return Guard(
        meter.engine(given.models.engine),
        meter.scorer(given.reward.scorer),
        cost,
        critic=None if critic is None else meter.critic(critic),
        value=None if value is None else meter.value(value),
        gate_cost=None if gate is cost else gate,
        strategy=entry.method.strategy,
        sampling=given.sampling,
        fallbacks=given.fallbacks,
        limits=given.models.limits,
        batch_rows=given.batch_rows,
    )


def _seed(seed: int, prompt: EvaluationPrompt) -> int:
    """A prompt's own seed, the same for all methods: prompts are independent draws, methods are compared on them."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt.key}".encode()).digest()[:6], "big")


def _weight(entry: Entry) -> int:
    return int(entry.method.strategy.n_beams)


# --- run.json --------------------------------------------------------------------------------------------------------


def _start_run(evaluation: Evaluation, out: Path) -> None:
    """Writes run.json, or checks that it is of this run, and notes that it was gone on with."""
    settings = json.loads(json_line(_settings(evaluation)))
    started = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": _software(),
        "machine": machine(),
    }
    path = out / RUN
    try:
        out.mkdir(parents=True, exist_ok=True)
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            "out", f"a directory with a {RUN} that can be read", str(out), hint=f"{error}."
        ) from error
    if recorded is None and (out / RESULTS).exists():
        raise InvalidArgument("out", f"a directory whose results have their {RUN}", str(out), hint=ANOTHER)
    if recorded is not None:
        _check_settings(recorded.get("settings", {}), settings, out)
    runs = [*(recorded or {}).get("runs", []), started]
    with whole_file(path) as write:
        write(json.dumps({"version": VERSION, "settings": settings, "runs": runs}, indent=2, ensure_ascii=False))


def _check_settings(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    """Raises InvalidArgument that names what is different. Methods may be added at the end; how long a scorer may take
    may change, for no answer depends on it."""
    different = [name for name in new if name not in ("methods", "limits") and old.get(name) != new[name]]
    if new["methods"][: len(old.get("methods", []))] != old.get("methods"):
        different.append("methods")
    if different:
        raise InvalidArgument(
            "out", f"a directory of a run with the same {' and '.join(different)}", str(out), hint=ANOTHER
        )


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    """All that decides the results. No paths: models stand by name and fingerprint."""
    description = evaluation.guard.description
    models = {name: model for name, model in description["models"].items() if name not in ("critic", "value")}
    kinds: dict[str, int] = {}
    for prompt in evaluation.prompts:
        kinds[prompt.kind] = kinds.get(prompt.kind, 0) + 1
    return {
        "version": VERSION,
        "seed": evaluation.seed,
        "prompts": {
            "sources": [_without_path(source) for source in evaluation.sources],
            "count": len(evaluation.prompts),
            "kinds": dict(sorted(kinds.items())),
            "digest": digest(evaluation.prompts),
        },
        "models": {
            **{name: {**model, "name": _without_path(model["name"])} for name, model in models.items()},
            "judge": _identity(evaluation.judge),
        },
        "sampling": description["sampling"],
        "fallbacks": description["fallbacks"],
        "limits": description["limits"],
        "batch_rows": description["batch_rows"],
        "block_tokens": evaluation.block_tokens,
        "methods": [entry.settings(evaluation.guard) for entry in evaluation.entries],
    }


def _identity(model: Scorer | Critic | ValueModel | None) -> dict[str, str] | None:
    return None if model is None else {"name": _without_path(model.name), "fingerprint": model.fingerprint}


def _without_path(name: str) -> str:
    """The name without the directory that it stood in on this machine; `owner/name` of the hub stays."""
    label, separator, path = name.rpartition("=")
    rooted = os.path.isabs(path) or path.startswith((".", "~")) or Path(path).exists()
    return f"{label}{separator}{Path(path).name if rooted else path}"


def _software() -> dict[str, str]:
    return {**software(), "numpy": numpy.__version__, "scipy": scipy.__version__}


def machine() -> dict[str, Any]:
    """What the times depend on: the processor, its cores, the accelerator. No names of machines."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
