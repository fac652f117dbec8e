"""What `make bench` measures: the embedded models on this machine's CPU, each against its alternative, in turn."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from torch import Tensor

from benchmarks.measure import Bar, Ratio, Rounds, Row, Tick, in_turn, judged, machine
from benchmarks.naive import Generates, NaiveGuard
from benchmarks.prompts import HARMLESS, MANY, PROMPT, harmful
from benchmarks.rivals import Vllm, llama_cpp
from benchmarks.shapes import EMBEDDED, TOY, plain_twin, random_critic, random_scorer
from inferenceguard.beams import Beams
from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import Conversation, GuardedResponse, Sampling, Scorer, ScorerLimits, conversation
from inferenceguard.embedded import TEMPERATURE
from inferenceguard.engines.transformers import STATE, TransformersEngine
from inferenceguard.guard import Guard
from inferenceguard.strategies import BaseSampling, InferenceGuard
from inferenceguard.text import visible_text

SAMPLING = Sampling(temperature=TEMPERATURE)
SHORT, MIDDLE, LONG = Rounds(5, 9, 30), Rounds(3, 7, 60), Rounds(2, 3, 150)
STEADY = Rounds(5, 25, 240)  # for ratios near 1
PATIENCE = ScorerLimits(seconds=900)
CRITIC_WIDTH = 256  # of the embedded critic
NEVER = 1e6  # a budget that nothing overspends, where both sides must do the same work


@dataclass
class Lab:
    """The embedded models, loaded when the first entry needs them, and the sizes: `quick` ones are for tests."""

    quick: bool = False
    vllm: str = ""
    prompts: Path | None = None
    tick: Tick = field(default=lambda what: None)

    @functools.cached_property
    def base(self) -> Guard:
        return Guard.from_preset("embedded")

    @property
    def engine(self) -> TransformersEngine:
        engine = self.base.models.engine
        assert isinstance(engine, TransformersEngine)
        return engine

    @functools.cached_property
    def endless(self) -> TransformersEngine:
        """The same engine without an end token: every row draws every token."""
        return without_end(self.engine)

    @functools.cached_property
    def plain(self) -> Generates:
        """transformers' `generate` on the same weights, without an end token."""
        return Generates(plain_twin(self.engine.model), generate_settings(SAMPLING))

    @functools.cached_property
    def causal(self) -> tuple[Scorer, Scorer]:
        """A reward and a cost model of the Beaver format, shaped like the embedded LLM, with random weights."""
        options: dict[str, Any] = {"dtype": self.engine.model.dtype, "device": "cpu"}
        shape = TOY if self.quick else EMBEDDED
        tokenizer = self.engine.tokenizer
        reward = random_scorer("reward", shape, tokenizer, seed=1, **options)
        return reward, random_scorer("cost", shape, tokenizer, seed=2, **options)

    def guard(
        self, strategy: Any, *, critic: bool = True, engine: TransformersEngine | None = None, batch_rows: int = 128
    ) -> Guard:
        """The embedded guard with another search or engine; nothing is read from disk again."""
        base = self.base
        return Guard(
            engine or self.engine, base.reward.scorer, base.cost.scorer, critic=base.models.critic if critic else None,
            gate_cost=base.gate.cost.scorer, strategy=strategy, sampling=SAMPLING, limits=PATIENCE,
            batch_rows=batch_rows,
        )  # fmt: skip

    def rows(self, count: int) -> int:
        return min(count, 4) if self.quick else count

    def tokens(self, count: int) -> int:
        return max(8, count // 16) if self.quick else count

    def rounds(self, rounds: Rounds) -> Rounds:
        return Rounds(1, 1) if self.quick else rounds

    def compare(
        self, name: str, first: tuple[str, Callable[[], object]], second: tuple[str, Callable[[], object]],
        rounds: Rounds, bar: Bar, baseline: str, sizes: Mapping[str, Any], scale: float = 1.0,
    ) -> Row:  # fmt: skip
        """Runs both in turn: the row of first / second."""
        now = self.settings(**sizes)
        ratio = in_turn(first, second, self.rounds(rounds), scale=scale, tick=self.tick)
        return judged(name, ratio, bar, baseline, now, quick=self.quick)

    def settings(self, **sizes: Any) -> dict[str, Any]:
        """What every row records."""
        return {**sizes, "precision": self.engine.precision, "machine": machine()}


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    measure: Callable[[Any], Row]


# --- what is timed ---------------------------------------------------------------------------------------------------


def draw(
    engine: TransformersEngine, prompt: Sequence[int], rows: int, tokens: int, block: int = 0, seed: int = 0
) -> Beams:
    """The tokens alone, unguarded: the prompt is read once, then `tokens` tokens are drawn for every row."""
    beams = engine.begin([prompt], [seed]).take([0] * rows)
    step = block or tokens
    for number, start in enumerate(range(0, tokens, step)):
        beams = engine.extend(beams, min(step, tokens - start), SAMPLING, number, None)
    return beams


def without_end(engine: TransformersEngine) -> TransformersEngine:
    """The same engine with no end token."""
    endless = copy.copy(engine)
    endless.end_tokens = ()
    return endless


def generate_settings(sampling: Sampling) -> dict[str, Any]:
    """The same sampling in transformers' words."""
    return {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}


def held_bytes(state: object) -> int:
    """Bytes of all memory that a state's tensors hold on to, each once."""
    seen: dict[int, int] = {}

    def walk(part: object) -> None:
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            for each in dataclasses.fields(part):
                walk(getattr(part, each.name))
        elif isinstance(part, Mapping):
            walk(list(part.values()))
        elif isinstance(part, tuple | list):
            for each in part:
                walk(each)

    walk(state)
    return sum(seen.values())


def long_prompt(engine: TransformersEngine, tokens: int) -> list[int]:
    """A prompt of exactly `tokens` tokens, the template's own among them."""
    text, ids = "", list[int]()
    while len(ids) < tokens:
        text += " ".join(MANY[:16]) + " "
        ids = engine.encode(conversation(text))
    return [*ids[: tokens - 8], *ids[-8:]]


def _ids(lab: Lab) -> list[int]:
    return lab.engine.encode(conversation(PROMPT))


# --- the entries -----------------------------------------------------------------------------------------------------


def proposals(rows: int, bar: float) -> Entry:
    """Proposal throughput against transformers' `generate`."""
    name = f"propose-{rows}"

    def measure(lab: Lab) -> Row:
        count, tokens, ids = lab.rows(rows), lab.tokens(64), _ids(lab)
        draw(lab.endless, ids, count, 2)
        lab.plain(ids, [()], [0] * count, 2, 0)
        return lab.compare(
            name,
            ("generate", lambda: lab.plain(ids, [()], [0] * count, tokens, 0)),
            ("ours", lambda: draw(lab.endless, ids, count, tokens)),
            SHORT if rows < 128 else MIDDLE, Bar(">=", bar), f"transformers generate(num_return_sequences={count})",
            {"rows": count, "tokens": tokens, "prompt_tokens": len(ids)},
        )  # fmt: skip

    return Entry(name, measure)


def against_llama_cpp(rows: int) -> Entry:
    """The same against llama.cpp on the same GGUF."""
    name = f"llama.cpp-{rows}"

    def measure(lab: Lab) -> Row:
        count, tokens, ids = lab.rows(rows), lab.tokens(64), _ids(lab)
        with llama_cpp(count, len(ids) + tokens + 16, SAMPLING) as rival:
            draw(lab.endless, ids, count, 2)
            came = rival.draw(ids, 2)
            assert came == 2 * count, f"llama.cpp drew {came} tokens instead of {2 * count}"
            return lab.compare(
                name,
                ("llama.cpp", lambda: rival.draw(ids, tokens)),
                ("ours", lambda: draw(lab.endless, ids, count, tokens)),
                SHORT, Bar(">="), "llama.cpp (xllamacpp wheel) on the Q4_1 GGUF",
                {"rows": count, "tokens": tokens, "prompt_tokens": len(ids)},
            )  # fmt: skip

    return Entry(name, measure)


def against_vllm(rows: int) -> Entry:
    """The same against a vLLM server."""
    name = f"vllm-{rows}"

    def measure(lab: Lab) -> Row:
        rival = Vllm(lab.vllm, SAMPLING)
        count, tokens, ids = lab.rows(rows), lab.tokens(64), _ids(lab)
        draw(lab.endless, ids, count, 2)
        rival.draw(ids, count, 2)
        return lab.compare(
            name,
            ("vllm", lambda: rival.draw(ids, count, tokens)),
            ("ours", lambda: draw(lab.endless, ids, count, tokens)),
            SHORT, Bar(">="), f"a vLLM server of {Path(rival.model).name}",
            {"rows": count, "tokens": tokens, "prompt_tokens": len(ids)},
        )  # fmt: skip

    return Entry(name, measure)


def long_prompt_time(lab: Lab) -> Row:
    """A long prompt and N = 32: the prompt read once instead of N times."""
    rows, tokens = lab.rows(32), lab.tokens(64)
    ids = long_prompt(lab.engine, 100 if lab.quick else 1500)
    return lab.compare(
        "long-prompt-time",
        ("generate", lambda: lab.plain(ids, [()], [0] * rows, tokens, 0)),
        ("ours", lambda: draw(lab.endless, ids, rows, tokens)),
        LONG, Bar(">=", 2.0), f"transformers generate(num_return_sequences={rows})",
        {"rows": rows, "tokens": tokens, "prompt_tokens": len(ids)},
    )  # fmt: skip


def long_prompt_memory(lab: Lab) -> Row:
    """Memory that the engine holds, N = 32 with one token drawn, against what transformers holds for one row."""
    rows = lab.rows(32)
    ids = long_prompt(lab.engine, 100 if lab.quick else 1500)
    ours, alone = (held_bytes(draw(lab.endless, ids, count, 1).states[STATE]) for count in (rows, 1))
    one = held_bytes(lab.plain.cache(ids))
    told = {f"{rows} rows": ours, "1 row": alone, "1 row of transformers": one}
    settings = lab.settings(rows=rows, prompt_tokens=len(ids), bytes=told)
    return judged("long-prompt-memory", Ratio.of([ours], [one]), Bar("<=", 1.2), "transformers' cache of one row",
                  settings, quick=lab.quick)  # fmt: skip


def guarded(name: str, critic: bool, bar: float) -> Entry:
    """A guarded answer against drawing as many tokens unguarded, in the same blocks."""

    def measure(lab: Lab) -> Row:
        rows, tokens, ids = lab.rows(32), lab.tokens(64), _ids(lab)
        strategy = InferenceGuard(n_beams=rows, block_tokens=tokens // 4, max_new_tokens=tokens)
        guard, seen = lab.guard(strategy, critic=critic, engine=lab.endless), list[int]()
        seeds = itertools.count()  # other texts in every run: their rewards would be remembered

        def answer() -> None:
            (response,) = guard.generate(PROMPT, seed=next(seeds))
            seen.append(response.usage.proposed_tokens)

        lab.tick("warm-up")
        answer()
        row = lab.compare(
            name,
            ("guarded", answer),
            ("unguarded", lambda: draw(lab.endless, ids, rows, tokens, tokens // 4)),
            STEADY, Bar("<=", bar), "the same engine drawing as many tokens in the same blocks, no guard",
            {"rows": rows, "tokens": tokens, "block": tokens // 4, "critic": critic},
        )  # fmt: skip
        row.settings["proposed_tokens"] = {"guarded": seen[-1], "unguarded": rows * tokens}
        return row

    return Entry(name, measure)


def against_naive(name: str, critic: bool, bar: float | None) -> Entry:
    """A guarded answer against the naive guard's, causal scorers, no end token, nothing over budget."""

    def measure(lab: Lab) -> Row:
        rows, tokens = lab.rows(32), lab.tokens(128)
        sizes: dict[str, Any] = {"n_beams": rows, "keep": max(1, rows // 4), "block_tokens": tokens // 4,
                                 "max_new_tokens": tokens}  # fmt: skip
        # Nothing fails, so that both do the same work: the budget is never spent and every p_safe is enough.
        strategy = InferenceGuard(**sizes, budget=SafetyBudget(NEVER), threshold=0.0)
        reward, cost = lab.causal
        own = random_critic(lab.engine, lab.engine.latent_width, cost, width=CRITIC_WIDTH) if critic else None
        guard = Guard(
            lab.endless, reward, cost, critic=own, strategy=strategy, sampling=SAMPLING, limits=PATIENCE
        )  # fmt: skip
        naive = NaiveGuard(
            lab.endless, lab.plain, reward, cost, **sizes, budget=NEVER, threshold=0.0, critic=own, read=lab.plain.read
        )
        prompt, seen = conversation(PROMPT), dict[str, int]()
        seeds = itertools.count()  # other texts in every run: their rewards would be remembered

        def ours() -> None:
            (response,) = guard.generate(PROMPT, seed=next(seeds))
            seen["ours"] = response.usage.proposed_tokens

        def theirs() -> None:
            seen["naive"] = naive.generate(prompt).proposed_tokens

        row = lab.compare(
            name, ("naive", theirs), ("ours", ours), LONG, Bar(">=", bar),
            "the naive guard: prompt and response read anew for every score and block",
            {**sizes, "critic": critic, "scorers": "Beaver format, random weights, shaped like the embedded LLM"},
        )  # fmt: skip
        row.settings["proposed_tokens"] = seen
        return row

    return Entry(name, measure)


def benign_auto(lab: Lab) -> Row:
    """Harmless prompts under `--n-beams auto` against plain single sampling, one prompt after the other."""
    prompts, tokens = HARMLESS[: 2 if lab.quick else None], lab.tokens(64)
    guard = lab.guard(_auto(tokens))
    seen: dict[str, list[int]] = {"plain": [], "auto": [], "auto_proposed": []}
    runs = {"plain": itertools.count(1), "auto": itertools.count(1)}  # other seeds in every run, the same for both

    def auto() -> None:
        seed = next(runs["auto"])
        for prompt in prompts:
            (response,) = guard.generate(prompt, seed=seed)
            seen["auto"].append(response.usage.completion_tokens)
            seen["auto_proposed"].append(response.usage.proposed_tokens)

    def plain() -> None:
        seed = next(runs["plain"])
        for prompt in prompts:
            beams = draw(lab.engine, lab.engine.encode(conversation(prompt)), 1, tokens, seed=seed)
            visible_text(lab.engine, beams.token_ids[0])
            seen["plain"].append(len(beams.token_ids[0]))

    lab.tick("warm-up")
    guard.generate(prompts[0])
    row = lab.compare(
        "benign-auto", ("auto", auto), ("plain", plain), STEADY, Bar("<=", 1.15),
        "one sample of the same engine, no guard", {"prompts": len(prompts), "tokens": tokens, "widths": [1, 4, 16]},
    )  # fmt: skip
    row.settings["tokens_per_response"] = {name: mean(counts) for name, counts in seen.items()}
    return row


def harmful_auto(lab: Lab) -> Row:
    """Harmful prompts: how many tokens `auto` proposes against N = 16, and what it gives up for that."""
    prompts, source = harmful(lab.prompts, 2 if lab.quick else 48)
    tokens = lab.tokens(64)
    lab.tick("N = 16")
    fixed = lab.guard(_auto(tokens, widths=())).generate(prompts)
    # One answer a prompt says little of a mean reward: with 48 prompts its standard error is 0.2.
    auto, plain = list[list[GuardedResponse]](), list[float]()
    for seed in range(1 if lab.quick else 4):
        lab.tick(f"auto, seed {seed}")
        auto.append(lab.guard(_auto(tokens)).generate(prompts, seed=seed))
    for seed in range(1 if lab.quick else 12):
        lab.tick(f"plain sampling, seed {seed}")
        plain += _plain_rewards(lab, [conversation(prompt) for prompt in prompts], tokens, seed)
    told = {"auto": _mean([_told(answers) for answers in auto]), "fixed": _told(fixed),
            "plain": {"reward": mean(plain)}}  # fmt: skip
    each = [a.usage.proposed_tokens / f.usage.proposed_tokens for a, f in zip(auto[0], fixed, strict=True)]
    ratio = told["auto"]["proposed_tokens"] / told["fixed"]["proposed_tokens"]
    parts = quantiles(each, n=4) if len(each) > 1 else [ratio] * 3
    settings = lab.settings(prompts=len(prompts), source=source, tokens=tokens, n_beams=16, **told,
                            seeds={"auto": len(auto), "fixed": 1, "plain": len(plain) // len(prompts)},
                            spread="quartiles over prompts")  # fmt: skip
    bar = Bar("<=", 0.35)
    row = judged(
        "harmful-auto", Ratio(ratio, (parts[0], parts[2])), bar, "N = 16 throughout", settings, quick=lab.quick
    )
    kept = auto_keeps(told)
    return row if row.holds is None else dataclasses.replace(row, holds=row.holds and kept)


def auto_keeps(told: Mapping[str, Mapping[str, float]]) -> bool:
    """Nothing over budget, no more fallbacks than N = 16, and the mean reward of plain sampling or better."""
    auto, fixed, plain = told["auto"], told["fixed"], told["plain"]
    return (
        auto["over_budget"] == 0 and auto["fallbacks"] <= fixed["fallbacks"] and auto["reward"] >= plain["reward"]
    )  # fmt: skip


def many_prompts(lab: Lab) -> Row:
    """64 prompts in one batch against one after the other."""
    prompts, rows, tokens = list(MANY[: 4 if lab.quick else None]), lab.rows(8), lab.tokens(64)
    strategy = InferenceGuard(n_beams=rows, block_tokens=tokens // 4, max_new_tokens=tokens)
    guard = lab.guard(strategy, batch_rows=len(prompts) * rows)
    lab.tick("warm-up")
    guard.generate(prompts[0])
    seeds = itertools.count(1)  # other texts in every run: their rewards would be remembered

    def singly() -> None:
        seed = next(seeds)
        for prompt in prompts:
            guard.generate([prompt], seed=seed)

    return lab.compare(
        "many-prompts", ("one by one", singly), ("batched", lambda: guard.generate(prompts, seed=next(seeds))),
        LONG, Bar(">=", 3.0),
        "the same guard, one prompt after the other", {"prompts": len(prompts), "rows": rows, "tokens": tokens},
    )  # fmt: skip


def long_response(lab: Lab) -> Row:
    """Seconds per token of a draw of 512 tokens against one of 64 tokens, N = 32, from prompt to end."""
    rows, few, many, ids = lab.rows(32), lab.tokens(64), lab.tokens(512), _ids(lab)
    draw(lab.endless, ids, rows, 2)
    return lab.compare(
        "long-response",
        (f"{many} tokens", lambda: draw(lab.endless, ids, rows, many)),
        (f"{few} tokens", lambda: draw(lab.endless, ids, rows, few)),
        LONG, Bar("<=", 1.3), f"a token of a draw of {few} tokens",
        {"rows": rows, "tokens": [many, few], "prompt_tokens": len(ids)}, scale=few / many,
    )  # fmt: skip


def _auto(tokens: int, widths: tuple[int, ...] = (1, 4)) -> InferenceGuard:
    """The preset's search; with its widths it is `--n-beams auto`."""
    return InferenceGuard(n_beams=16, keep=4, block_tokens=tokens // 4, max_new_tokens=tokens, widths=widths)


def _told(responses: Sequence[GuardedResponse]) -> dict[str, float]:
    rewards = [response.reward for response in responses if response.reward is not None]
    return {
        "proposed_tokens": sum(response.usage.proposed_tokens for response in responses),
        "over_budget": sum(response.budget_left is None or response.budget_left < 0 for response in responses),
        "fallbacks": sum(response.finish_reason == "content_filter" for response in responses),
        "reward": mean(rewards),
    }


def _mean(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: mean(each[name] for each in told) for name in told[0]}


def _plain_rewards(lab: Lab, prompts: Sequence[Conversation], tokens: int, seed: int) -> list[float]:
    """The rewards of one sample per prompt, unguarded, by the reward model that the guard uses."""
    models = lab.base.models
    beams = BaseSampling(max_new_tokens=tokens).generate(prompts, models, SAMPLING, [seed] * len(prompts)).ungated()
    texts = [visible_text(lab.engine, row) for row in beams.token_ids]
    return lab.base.reward.score(prompts, texts).tolist()


ENTRIES = (
    proposals(1, 2.0),
    proposals(8, 1.5),
    proposals(32, 1.6),
    proposals(128, 2.0),
    *(against_llama_cpp(rows) for rows in (1, 8, 32)),
    *(against_vllm(rows) for rows in (1, 8, 32)),
    Entry("long-prompt-time", long_prompt_time),
    Entry("long-prompt-memory", long_prompt_memory),
    guarded("guard-critic", True, 1.10),
    guarded("guard-no-critic", False, 1.35),
    against_naive("naive", False, 3.0),
    against_naive("naive-critic", True, 3.0),
    Entry("benign-auto", benign_auto),
    Entry("harmful-auto", harmful_auto),
    Entry("many-prompts", many_prompts),
    Entry("long-response", long_response),
)
