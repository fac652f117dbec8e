"""Independent pieces of work side by side, a core each, instead of one after the other on all cores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from threadpoolctl import ThreadpoolController


def side_by_side(jobs: Sequence[Callable[[], None]]) -> None:
    """Runs all jobs at once, the first of them in this thread, and raises what the first that failed raised.

    A single job has one core too. In a thread that has just begun, as a scorer's has, operations on several cores wait
    for each other longer than a short one takes: OpenMP has more threads then than there are cores, and lets them sleep
    (docs/performance.md).
    """
    with ThreadPoolExecutor(max(1, len(jobs) - 1), "side-by-side") as pool:
        others = [pool.submit(_on_one_core, job) for job in jobs[1:]]
        _on_one_core(jobs[0])
        for other in others:
            other.result()


def _on_one_core(job: Callable[[], None]) -> None:
    torch.get_num_threads()  # torch sets a new thread's number when it is first asked, and would undo the limit
    with _libraries().limit(limits=1, user_api="openmp"):
        job()


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
