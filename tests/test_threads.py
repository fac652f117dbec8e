"""Work side by side: each piece on one core, errors told, the caller's own number of threads left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from inferenceguard.threads import side_by_side

ROOT = Path(__file__).parent.parent


def test_jobs_run_at_once_each_on_one_core() -> None:
    before, seen = torch.get_num_threads(), dict[int, int]()
    meeting = threading.Barrier(3, timeout=30)  # breaks unless all three are there together

    def job() -> None:
        meeting.wait()
        seen[threading.get_ident()] = torch.get_num_threads()

    side_by_side([job, job, job])
    assert list(seen.values()) == [1, 1, 1]
    assert torch.get_num_threads() == before
    after: list[int] = []
    thread = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert after == [before], "threads that come later have all cores"


def test_a_single_job_runs_where_it_is_asked_for() -> None:
    before, seen = torch.get_num_threads(), list[tuple[int, int]]()
    side_by_side([lambda: seen.append((threading.get_ident(), torch.get_num_threads()))])
    assert seen == [(threading.get_ident(), 1)]
    assert torch.get_num_threads() == before


def test_the_first_error_is_raised_and_the_other_jobs_end() -> None:
    done: list[int] = []

    def fails() -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        side_by_side([lambda: done.append(1), fails, lambda: done.append(2)])
    assert sorted(done) == [1, 2]


def spins(imports: str, **own: str) -> str:
    """What OpenMP itself says of GOMP_SPINCOUNT when torch loads it in a fresh process."""
    clean = {name: text for name, text in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ended = subprocess.run(
        [sys.executable, "-c", f"import {imports}"], env={**clean, **own, "OMP_DISPLAY_ENV": "verbose"},
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = re.search(r"GOMP_SPINCOUNT = '(\w+)'", ended.stderr)
    return told[1] if told else pytest.skip("torch has another OpenMP here")


@pytest.mark.parametrize("imports", ["inferenceguard, torch", "inferenceguard.cli, torch", "benchmarks.bench"])
def test_openmp_threads_watch_for_work_for_a_tenth_of_a_millisecond(imports: str) -> None:
    assert spins(imports) == "10000"


def test_the_environment_says_how_long_openmp_threads_watch() -> None:
    assert spins("inferenceguard, torch", GOMP_SPINCOUNT="77") == "77"
    default, active = spins("torch", OMP_WAIT_POLICY="active"), spins("inferenceguard, torch", OMP_WAIT_POLICY="active")
    assert default == active != "10000"
