"""A process that runs for weeks must not grow: what the libraries below us keep, bounded and given back.

The allocator keeps freed memory that it cannot hand to the next shape, and oneDNN and PyTorch above it each keep 1,024
compiled products: in bfloat16 every new number of rows or length of prompt adds about 0.6 MB (docs/server.md). Neither
bound changes a number that is computed.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

KERNELS = 256  # products kept; one that is needed again is compiled again, which takes about a millisecond
CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and the one in PyTorch above it


def bound_kernel_caches() -> None:
    """Fewer compiled products are kept, unless the environment says how many. Before torch is imported."""
    for name in CAPACITIES:
        os.environ.setdefault(name, str(KERNELS))


class Trimmer:
    """Gives freed memory back to the system: every `seconds` while blocks are searched, and when there is no more."""

    def __init__(self, seconds: float = 10.0, trim: Callable[[], None] | None = None) -> None:
        self.seconds = seconds
        self._trim = trim or _malloc_trim()
        self._last = time.monotonic()

    def after_block(self, idle: bool) -> None:
        """`idle`: nobody waits for the next block."""
        now = time.monotonic()
        if now - self._last >= (min(1.0, self.seconds) if idle else self.seconds):
            self._trim()
            self._last = now


def _malloc_trim() -> Callable[[], None]:
    """glibc's `malloc_trim(0)`; nothing where there is no glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return lambda: None

    def call() -> None:
        trim(0)

    return call
