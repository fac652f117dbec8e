"""What `make bench-gpu` measures: N = 128, 128 tokens, an LLM and both scorers of the 7B shape with random weights.

It has not been run on a GPU. The tests run this very code with toy shapes on the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.entries import NEVER, SAMPLING, Entry, draw, generate_settings, without_end
from benchmarks.measure import Bar, Rounds, Row, Skipped, Tick, in_turn, judged, machine
from benchmarks.naive import Generates, NaiveGuard
from benchmarks.prompts import PROMPT
from benchmarks.shapes import SEVEN_B, Shape, plain_twin, random_critic, random_llm, random_scorer
from inferenceguard import embedded
from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import ScorerLimits, conversation
from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.guard import Guard
from inferenceguard.scorers.beaver import BeaverScorer
from inferenceguard.strategies import InferenceGuard

NO_GPU = "make bench-gpu needs a GPU that torch can use; none is here. Nothing was measured."
ROUNDS = Rounds(3, 5, 120)


@dataclass(frozen=True)
class Sizes:
    """N, tokens, block, and the smaller N that the naive guard can be run at."""

    rows: int = 128
    tokens: int = 128
    block: int = 32
    naive_rows: int = 32
    critic_width: int = 4096


@dataclass
class Rig:
    """The models, made on the device when the first entry needs them."""

    device: str = "cuda"
    shape: Shape = SEVEN_B
    sizes: Sizes = Sizes()
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    tick: Tick = field(default=lambda what: None)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(embedded.converted(embedded.find_gguf(), embedded._cache_directory()))

    @functools.cached_property
    def engine(self) -> TransformersEngine:
        """The LLM, without an end token: every row draws every token."""
        self.tick("making the models")
        model = random_llm(self.shape, self.tokenizer, dtype=self.dtype, device=self.device)
        return without_end(TransformersEngine(model, self.tokenizer, name="random LLM"))

    @functools.cached_property
    def plain(self) -> Generates:
        return Generates(plain_twin(self.engine.model), generate_settings(SAMPLING))

    @functools.cached_property
    def scorers(self) -> tuple[BeaverScorer, BeaverScorer]:
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        reward = random_scorer("reward", self.shape, self.tokenizer, seed=1, **options)
        return reward, random_scorer("cost", self.shape, self.tokenizer, seed=2, **options)

    def search(self, rows: int) -> dict[str, Any]:
        sizes = self.sizes
        return {"n_beams": rows, "keep": max(1, rows // 4), "block_tokens": sizes.block, "max_new_tokens": sizes.tokens}

    def guard(self, rows: int, *, critic: bool = True) -> Guard:
        """Nothing is over budget and every p_safe is enough: the search draws exactly N * tokens."""
        own = random_critic(
            self.engine, self.engine.latent_width, self.scorers[1], width=self.sizes.critic_width, device=self.device
        ) if critic else None  # fmt: skip
        strategy = InferenceGuard(**self.search(rows), budget=SafetyBudget(NEVER), threshold=0.0)
        return Guard(self.engine, *self.scorers, critic=own, strategy=strategy, sampling=SAMPLING,
                     limits=ScorerLimits(seconds=900), batch_rows=rows)  # fmt: skip

    def settled(self, work: Callable[[], object]) -> Callable[[], None]:
        """The work until the device has done all of it."""

        def run() -> None:
            work()
            if self.device.startswith("cuda"):
                torch.cuda.synchronize(self.device)

        return run

    def compare(
        self, name: str, first: tuple[str, Callable[[], object]], second: tuple[str, Callable[[], object]], bar: Bar,
        baseline: str, sizes: Mapping[str, Any],
    ) -> Row:  # fmt: skip
        """Runs both once without timing, then in turn: the row of first / second, with the peak memory of each."""
        works: dict[str, Callable[[], None]] = {}
        peaks: dict[str, int] = {}
        for kind, work in (first, second):
            works[kind] = self.settled(work)
            self.tick(f"{kind}, warm-up")
            self.reset_peak()
            works[kind]()
            peaks[kind] = self.peak()
        rounds = Rounds(1, 1) if self.quick else ROUNDS
        ratio = in_turn((first[0], works[first[0]]), (second[0], works[second[0]]), rounds, tick=self.tick)
        settings = {**self.settings(), **sizes, "peak_bytes": peaks}
        return judged(name, ratio, bar, baseline, settings, quick=self.quick)

    def settings(self) -> dict[str, Any]:
        return {
            "shape": dataclasses.asdict(self.shape), "precision": str(self.dtype).removeprefix("torch."),
            "peak_of": "the device" if self.device.startswith("cuda") else "the process",
            "machine": machine(self.device),
        }  # fmt: skip

    def reset_peak(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require_gpu() -> None:
    """Raises Skipped where torch sees no GPU."""
    if not torch.cuda.is_available():
        raise Skipped(NO_GPU)


def _prompt_ids(rig: Rig) -> list[int]:
    return rig.engine.encode(conversation(PROMPT))


def seconds(rig: Rig) -> Row:
    """Seconds of one guarded response with the critic: the one row that is no ratio."""
    row = _against_drawing(rig, "gpu-seconds", critic=True, bar=Bar("<=", 5.0))
    taken = row.settings["seconds"]["guarded"]
    holds = None if rig.quick else Bar("<=", 5.0).holds(taken)
    told = {**row.settings, "unit": "seconds per response"}
    return dataclasses.replace(row, ratio=taken, holds=holds, spread=None, baseline="none: seconds", settings=told)


def _against_drawing(rig: Rig, name: str, *, critic: bool, bar: Bar) -> Row:
    """A guarded response against drawing its tokens alone."""
    sizes, ids = rig.sizes, _prompt_ids(rig)
    guard = rig.guard(sizes.rows, critic=critic)
    return rig.compare(
        name, ("guarded", lambda: guard.generate(PROMPT)),
        ("unguarded", lambda: draw(rig.engine, ids, sizes.rows, sizes.tokens, sizes.block)), bar,
        "the same engine drawing as many tokens in the same blocks, no guard",
        {"rows": sizes.rows, "tokens": sizes.tokens, "block": sizes.block, "critic": critic},
    )  # fmt: skip


def against_generate(rig: Rig) -> Row:
    """Drawing alone, against transformers' `generate`."""
    sizes, ids = rig.sizes, _prompt_ids(rig)
    rows, tokens = sizes.rows, sizes.tokens
    return rig.compare(
        "gpu-propose", ("generate", lambda: rig.plain(ids, [()], [0] * rows, tokens, 0)),
        ("ours", lambda: draw(rig.engine, ids, rows, tokens)), Bar(">="),
        f"transformers generate(num_return_sequences={rows})", {"rows": rows, "tokens": tokens},
    )  # fmt: skip


def against_naive(rig: Rig) -> Row:
    """A guarded response against the naive guard's, at an N that it can be run at."""
    rows, (reward, cost) = rig.sizes.naive_rows, rig.scorers
    guard = rig.guard(rows)
    naive = NaiveGuard(rig.engine, rig.plain, reward, cost, **rig.search(rows), budget=NEVER, threshold=0.0,
                       critic=guard.models.critic, read=rig.plain.read)  # fmt: skip
    prompt = conversation(PROMPT)
    return rig.compare(
        "gpu-naive", ("naive", lambda: naive.generate(prompt)), ("ours", lambda: guard.generate(PROMPT)), Bar(">="),
        "the naive guard: prompt and response read anew for every score and block",
        {"rows": rows, "tokens": rig.sizes.tokens, "critic": True},
    )  # fmt: skip


GPU_ENTRIES = (
    Entry("gpu-seconds", seconds),
    Entry("gpu-guard-critic", lambda rig: _against_drawing(rig, "gpu-guard-critic", critic=True, bar=Bar("<=", 1.25))),
    Entry("gpu-guard-no-critic", lambda rig: _against_drawing(rig, "gpu-guard-no-critic", critic=False, bar=Bar("<="))),
    Entry("gpu-propose", against_generate),
    Entry("gpu-naive", against_naive),
)
