"""What a long-running process gives back."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from inferenceguard import memory
from inferenceguard.memory import CAPACITIES, Trimmer, bound_kernel_caches


def test_it_trims_every_so_many_seconds_and_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, trims = [100.0], []
    monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
    trimmer = Trimmer(10.0, lambda: trims.append(clock[0]))
    for second in range(1, 26):
        clock[0] = 100.0 + second
        trimmer.after_block(idle=False)
    assert trims == [110.0, 120.0]
    trimmer.after_block(idle=True)
    trimmer.after_block(idle=True)
    assert trims == [110.0, 120.0, 125.0], "when it is idle too, but not after every block"
    clock[0] += 1.0
    trimmer.after_block(idle=True)
    assert trims == [110.0, 120.0, 125.0, 126.0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_memory_goes_back_to_the_system() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    blocks = [b"x" * 100_000 for _ in range(3000)]  # below the size from which each block is the system's own
    kept = blocks[::100]  # and these hold the heap up
    del blocks
    Trimmer(0.0).after_block(idle=False)
    assert len(kept) == 30
    assert process.memory_info().rss - before < 60e6, "of 300 MB that were used"


def test_the_caches_are_bounded_before_torch_reads_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {CAPACITIES[0]: "7"}
    with monkeypatch.context() as patched:
        patched.setattr(memory.os, "environ", own)
        bound_kernel_caches()
    assert own == {CAPACITIES[0]: "7", CAPACITIES[1]: "256"}, "what the user says counts"
    code = (
        "import sys\n"
        "from inferenceguard import memory\n"
        "from inferenceguard.cli import main\n"
        "memory.bound_kernel_caches = lambda: sys.exit('torch' in sys.modules)\n"
        "main(['serve', '--port', '1'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr or "torch was there before"
