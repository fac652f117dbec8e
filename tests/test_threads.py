"""Work side by side: each piece on one core, errors told, the caller's own number of threads left alone."""

from __future__ import annotations

import threading

import pytest
import torch

from inferenceguard.threads import side_by_side


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
