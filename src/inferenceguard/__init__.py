"""InferenceGuard: guards a frozen LLM at inference time, so that no response over the safety budget leaves it.

Almost surely, and with respect to the given cost model. Based on arXiv 2502.01208.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferenceguard.budget import SafetyBudget
    from inferenceguard.contracts import GuardedResponse, Message, Sampling, ScorerLimits
    from inferenceguard.errors import InferenceGuardError
    from inferenceguard.guard import Guard, StreamEvent
    from inferenceguard.strategies import BaseSampling, InferenceGuard

# Loaded when they are asked for: torch takes a second, and `inferenceguard --help` should not.
_HOMES = {
    "BaseSampling": "strategies",
    "Guard": "guard",
    "GuardedResponse": "contracts",
    "InferenceGuard": "strategies",
    "InferenceGuardError": "errors",
    "Message": "contracts",
    "SafetyBudget": "budget",
    "Sampling": "contracts",
    "ScorerLimits": "contracts",
    "StreamEvent": "guard",
}

__all__ = [
    "BaseSampling",
    "Guard",
    "GuardedResponse",
    "InferenceGuard",
    "InferenceGuardError",
    "Message",
    "SafetyBudget",
    "Sampling",
    "ScorerLimits",
    "StreamEvent",
]


# A thread of GNU's OpenMP, which torch has on Linux, watches for more work before it sleeps: by default for 3 to 5 ms,
# in which a scorer's thread waits for its core. Here for 0.1 ms (docs/performance.md), which torch reads at its import.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
