"""Ratios of alternatives that are measured in turn (A B A B ...), and the file that they are kept in.

A row of the file: `name`; `ratio`, a median over pairs; `bar`, what the ratio is held to (null: told, not judged), with
its sense in `settings.sense`; `holds`; `spread`, the least and the largest ratio of a pair; `baseline`, what the ratio
is against; `settings`, the sizes, the seconds and the machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

Sense = Literal[">=", "<="]
PACKAGES = ("inferenceguard", "torch", "transformers", "numpy", "xllamacpp")


class Skipped(Exception):
    """An alternative that this machine does not have; says which and why."""


@dataclass(frozen=True)
class Bar:
    """What a ratio is held to. A bound of None judges nothing."""

    sense: Sense
    bound: float | None = None

    def holds(self, ratio: float) -> bool | None:
        if self.bound is None:
            return None
        return ratio >= self.bound if self.sense == ">=" else ratio <= self.bound


@dataclass(frozen=True)
class Ratio:
    """The ratio of two alternatives over pairs of runs: its median, its least and its largest."""

    value: float
    spread: tuple[float, float]
    seconds: dict[str, float] = field(default_factory=dict)  # median of each alternative
    pairs: int = 1

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float], scale: float = 1.0) -> Ratio:
        """scale * first / second, pair by pair."""
        pairs = [scale * one / other for one, other in zip(first, second, strict=True)]
        return cls(median(pairs), (min(pairs), max(pairs)), {}, len(pairs))


@dataclass(frozen=True)
class Rounds:
    """How many pairs are run: `least`, and more while the entry has taken less than `seconds`, up to `most`."""

    least: int = 3
    most: int = 7
    seconds: float = 60.0

    def wanted(self, done: int, used: float) -> bool:
        return done < self.least or (done < self.most and used + used / max(done, 1) <= self.seconds)


@dataclass(frozen=True)
class Row:
    """One row of the file and of the table."""

    name: str
    ratio: float | None  # None: it was not measured, and settings["skipped"] or settings["failed"] says why
    bar: float | None
    holds: bool | None
    spread: tuple[float, float] | None
    baseline: str
    settings: dict[str, Any]


Tick = Callable[[str], None]  # told what runs next, for the progress bar


def in_turn(
    first: tuple[str, Callable[[], object]], second: tuple[str, Callable[[], object]], rounds: Rounds,
    *, scale: float = 1.0, clock: Callable[[], float] = time.perf_counter, tick: Tick = lambda what: None,
) -> Ratio:  # fmt: skip
    """Runs both alternatives in turn and times each run: scale * seconds of `first` / seconds of `second`.

    `scale` turns seconds into seconds per token where the alternatives draw different numbers of tokens.
    """
    taken: dict[str, list[float]] = {first[0]: [], second[0]: []}
    begun, done = clock(), 0
    while rounds.wanted(done, clock() - begun):
        done += 1
        for name, work in (first, second):
            tick(f"{name}, run {done}")
            start = clock()
            work()
            taken[name].append(clock() - start)
    ratio = Ratio.of(taken[first[0]], taken[second[0]], scale)
    return Ratio(ratio.value, ratio.spread, {name: median(times) for name, times in taken.items()}, done)


def judged(name: str, ratio: Ratio, bar: Bar, baseline: str, settings: Mapping[str, Any], *, quick: bool) -> Row:
    """The row of a measured ratio. What was measured `quick` is too short to be held to a bar."""
    sizes = {"sense": bar.sense, "pairs": ratio.pairs, "seconds": ratio.seconds, **settings, "quick": quick}
    holds = None if quick else bar.holds(ratio.value)
    return Row(name, ratio.value, bar.bound, holds, ratio.spread, baseline, sizes)


def unmeasured(name: str, how: Literal["skipped", "failed"], why: str) -> Row:
    """The row of an alternative that is not here, or that failed."""
    return Row(name, None, None, None, None, "", {how: why})


# --- the file --------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run; none where there is no file. Raises ValueError for a file of another kind."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise ValueError(f"{path} is no file of this benchmark: a list of rows with names is expected.")
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The whole file at once, so that an interrupted run leaves the rows that it has finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def updated(rows: Sequence[Mapping[str, Any]], row: Row, order: Iterable[str]) -> list[dict[str, Any]]:
    """The rows with `row` in the place of its name, in `order`; rows that `order` does not name are dropped."""
    by_name = {str(old["name"]): dict(old) for old in rows} | {row.name: json.loads(json.dumps(asdict(row)))}
    return [by_name[name] for name in order if name in by_name]


# --- the machine -----------------------------------------------------------------------------------------------------


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on, as it is now: processor, threads, load and versions."""
    told = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # of the last minute
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: number for name in PACKAGES if (number := _version(name))},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    if device.startswith("cuda"):
        told["device"] = torch.cuda.get_device_name(device)
    return told


def _commit() -> str:
    """What was measured: the commit of this checkout, `-dirty` where its code was changed since; "" where unknown."""
    root = Path(__file__).resolve().parents[1]
    commands = ["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "--", "src", "benchmarks"]
    try:
        commit, changed = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}-dirty" if changed else commit


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
