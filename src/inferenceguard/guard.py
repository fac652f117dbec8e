"""The front door: `Guard.generate` and `Guard.stream`. The gate and the fallback live here.

What leaves the guard has z_T >= 0 with respect to the given cost model, scored from scratch on the very text that
leaves; otherwise the fallback text leaves instead (METHOD 7.1).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from inferenceguard.beams import Beams
from inferenceguard.contracts import (
    BlockTrace,
    Conversation,
    Critic,
    Engine,
    FinishReason,
    GuardedResponse,
    Models,
    Prompt,
    Sampling,
    Scorer,
    ScorerLimits,
    SearchResult,
    SearchStep,
    Strategy,
    Streams,
    Usage,
    ValueModel,
    conversation,
)
from inferenceguard.errors import InvalidArgument, PromptTooLong
from inferenceguard.record import VERSION, Gate, Verdict, finite, released, software, trace_json
from inferenceguard.scorers.safe import FailClosed
from inferenceguard.strategies.inference_guard import InferenceGuard, check_critic
from inferenceguard.text import cut_at_stop, first_stop, visible_text

logger = logging.getLogger("inferenceguard")

FALLBACKS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request.",
    "Sorry, no.",
)
NOTHING = "nothing was released"
# Scores: the search knew the reward of what is released, and where it had one row, the gate's scores of it.
_REMEMBERED = 1024


@dataclass(frozen=True)
class StreamEvent:
    """`text` is new text of prompt `index` that will not be taken back; `response` comes once, with its last event."""

    index: int
    text: str
    response: GuardedResponse | None = None


class Guard:
    """A frozen LLM with a reward model, a cost model and a search, behind a gate."""

    def __init__(
        self,
        engine: Engine,
        reward: Scorer,
        cost: Scorer,
        *,
        critic: Critic | None = None,
        value: ValueModel | None = None,
        gate_cost: Scorer | None = None,
        strategy: Strategy | None = None,
        sampling: Sampling | None = None,
        fallbacks: Sequence[str] = FALLBACKS,
        limits: ScorerLimits | None = None,
        batch_rows: int = 128,
    ) -> None:
        """`gate_cost` is the cost model as the gate runs it (full precision, say); by default `cost` itself.
        `value` is what RE-Control steers by; the other strategies go without.

        `fallbacks` are tried in order until one is within the budget for the prompt at hand. `batch_rows` bounds how
        many rows are drawn at once; answers do not depend on it. Raises MissingCapability or FingerprintMismatch for a
        critic that does not fit.
        """
        limits = limits or ScorerLimits()
        if batch_rows < 1:
            raise InvalidArgument("batch_rows", ">= 1", batch_rows)
        if not fallbacks or not all(isinstance(text, str) and text for text in fallbacks):
            raise InvalidArgument("fallbacks", "one text or more, none empty", fallbacks)
        self.reward = FailClosed(reward, limits, remembers=_REMEMBERED)
        self.cost = FailClosed(cost, limits)
        gate_scorer = None if gate_cost is None else FailClosed(gate_cost, limits, remembers=_REMEMBERED)
        self.models = Models(engine, self.reward, self.cost, critic, limits, value, gate_scorer)
        self.strategy: Strategy = InferenceGuard() if strategy is None else strategy
        self.sampling = sampling or Sampling()
        self.fallbacks = tuple(fallbacks)
        self.batch_rows = batch_rows
        self.gate = Gate(gate_scorer or self.cost, self.strategy.budget, self.strategy.accounting)
        if critic is not None:
            check_critic(critic, self.models)
            trained = getattr(getattr(critic, "provenance", None), "cost_fingerprint", cost.fingerprint)
            if trained != cost.fingerprint:
                logger.warning(
                    "critic %s was trained with another cost model (%s) than %s: it steers less well, and the gate "
                    "decides all the same", critic.name, trained, cost.fingerprint,
                )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, reward: Scorer | str | Path, cost: Scorer | str | Path,
        critic: Critic | str | Path | None = None, **settings: Any,
    ) -> Guard:  # fmt: skip
        """Hub names or local directories (safetensors only). `settings` are those of `Guard`, and `dtype`, `device`."""
        from inferenceguard.config import build_guard

        return build_guard(model, reward=reward, cost=cost, critic=critic, **settings)

    @classmethod
    def from_preset(cls, preset: str = "embedded", **settings: Any) -> Guard:
        """A named set of models, e.g. `embedded`: SmolLM2-135M-Instruct with its own reward, cost model and critic."""
        from inferenceguard.config import preset_guard

        return preset_guard(preset, **settings)

    def generate(
        self, prompts: str | Sequence[Prompt], *, seed: int = 0, seeds: Sequence[int] | None = None
    ) -> list[GuardedResponse]:
        """One guarded response per prompt, in order. A prompt is a string or a list of chat messages.

        The same seed gives the same answer whatever else is in the batch (bit for bit in float32 on one machine). Bad
        input is refused before a token is drawn: InvalidArgument, PromptTooLong. EngineFault if the engine fails.
        """
        conversations, own_seeds = self.check(prompts, seed=seed, seeds=seeds)
        responses: list[GuardedResponse] = []
        for start, stop in self._batches(len(conversations)):
            batch = _Batch(self, conversations[start:stop], own_seeds[start:stop])
            responses += batch.settle(batch.search())
        return responses

    def stream(
        self, prompts: str | Sequence[Prompt], *, seed: int = 0, seeds: Sequence[int] | None = None
    ) -> Iterator[StreamEvent]:
        """Text as soon as it can no longer be taken back: what all kept beams share, each prefix within the budget.

        Where the search fails after text was released, the released text stands as the response (it is within the
        budget) with finish_reason `content_filter`.
        """
        conversations, own_seeds = self.check(prompts, seed=seed, seeds=seeds)
        if not isinstance(self.strategy, Streams):
            raise InvalidArgument("strategy", "one that has `steps`, for streaming", type(self.strategy).__name__)
        return self._stream(conversations, own_seeds)

    def check(
        self, prompts: str | Sequence[Prompt], *, seed: int = 0, seeds: Sequence[int] | None = None
    ) -> tuple[list[Conversation], list[int]]:
        """Refuses bad input without drawing a token; (conversations, a seed for each)."""
        listed: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        conversations = [conversation(prompt, name=f"prompt {index}") for index, prompt in enumerate(listed)]
        own_seeds = [seed] * len(conversations) if seeds is None else list(seeds)
        if len(own_seeds) != len(conversations):
            raise InvalidArgument("seeds", f"one per prompt ({len(conversations)})", len(own_seeds))
        for value in own_seeds:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
                raise InvalidArgument("seed", "an integer in [0, 2^63)", value)
        engine, limit = self.models.engine, self.strategy.max_new_tokens
        for index, messages in enumerate(conversations):
            tokens = len(engine.encode(messages))
            if tokens + limit > engine.context:
                raise PromptTooLong(index, tokens, limit, engine.context)
        return conversations, own_seeds

    @property
    def description(self) -> dict[str, Any]:
        """What made the answers: models with fingerprints, search, sampling. Plain JSON, for the record."""
        return self.describe(self.strategy, self.sampling)

    def describe(self, strategy: Strategy, sampling: Sampling) -> dict[str, Any]:
        """The same of answers that were searched or sampled otherwise."""
        models: dict[str, Engine | Scorer | Critic | ValueModel | None] = {
            "engine": self.models.engine,
            "reward": self.reward,
            "cost": self.cost,
            "gate": self.gate.cost,
            "critic": self.models.critic,
        }
        if self.models.value is not None:
            models["value"] = self.models.value
        return {
            "models": {part: None if model is None else _identity(model) for part, model in models.items()},
            "strategy": {"name": type(strategy).__name__, **dataclasses.asdict(cast(Any, strategy))},
            "sampling": dataclasses.asdict(sampling),
            "fallbacks": list(self.fallbacks),
            "limits": dataclasses.asdict(self.models.limits),
            "batch_rows": self.batch_rows,
            "software": software(),
        }

    def _batches(self, prompts: int) -> Iterator[tuple[int, int]]:
        size = max(1, self.batch_rows // self.strategy.n_beams)
        return ((start, min(start + size, prompts)) for start in range(0, prompts, size))

    def _stream(self, conversations: list[Conversation], seeds: list[int]) -> Iterator[StreamEvent]:
        for start, stop in self._batches(len(conversations)):
            batch = _Batch(self, conversations[start:stop], seeds[start:stop])
            for event in batch.stream():
                yield dataclasses.replace(event, index=event.index + start)


@dataclass
class Asked:
    """One prompt at the gate: what it asked for, and what has been released of its answer."""

    prompt: Conversation
    seed: int
    strategy: Strategy  # with the prompt's own budget and length
    sampling: Sampling
    stop: tuple[str, ...] = ()
    begun: float = field(default_factory=time.monotonic)
    streamed: Verdict | None = None  # what was released while the search ran

    @property
    def streamed_text(self) -> str:
        return "" if self.streamed is None else self.streamed.text


class Desk:
    """The gate's decisions on the prompts in `asked`, by number: what of a search's rows may leave, and when."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.engine, self.gate = guard, guard.models.engine, guard.gate
        self.asked: dict[int, Asked] = {}

    def settle(self, beams: Beams, traces: Mapping[int, Sequence[BlockTrace]]) -> dict[int, GuardedResponse]:
        """For each prompt in `traces` the best row that passes, else what was streamed of it, else a fallback."""
        faults: dict[int, list[str]] = {index: _faults(trace) for index, trace in traces.items()}
        choices = self._pass_rows(beams, faults)
        for index in traces:
            if (verdict := self.asked[index].streamed) is not None:
                why = "the search failed after this much was streamed"
                choices.setdefault(index, _Choice(verdict, "content_filter", why))
        choices |= self._fallbacks([index for index in traces if index not in choices], faults)
        prompts = [self.asked[index].prompt for index in traces]
        rewards = self.guard.reward.outcome(prompts, [choices[index].verdict.text for index in traces]).values.tolist()
        return {
            index: self._response(self.asked[index], choices[index], trace, reward, faults[index])
            for (index, trace), reward in zip(traces.items(), rewards, strict=True)
        }

    def release_shared(self, beams: Beams) -> Iterator[StreamEvent]:
        """What all living rows of a prompt share is final; it is released if the gate passes it as it stands."""
        shared: list[tuple[int, int | None]] = []  # (a row of the prompt, tokens shared)
        for prompt in sorted(set(beams.prompt_index.tolist())):
            rows = (beams.prompt_index == prompt).nonzero()[:, 0].tolist()
            count = _shared_prefix([beams.token_ids[row] for row in rows])
            text = self._text(self.asked[prompt], beams.token_ids[rows[0]][:count], whole=False)
            if len(text) > len(self.asked[prompt].streamed_text):
                shared.append((rows[0], count))
        for (row, _), verdict in zip(shared, self._judge(shared, beams), strict=True):
            prompt = int(beams.prompt_index[row])
            before = self.asked[prompt].streamed_text
            if verdict.passes and verdict.text.startswith(before):
                self.asked[prompt].streamed = verdict
                yield StreamEvent(prompt, verdict.text[len(before) :])

    def _text(self, asked: Asked, token_ids: Sequence[int], *, whole: bool) -> str:
        """The text as its reader will see it; of a part, without what may become a stop text."""
        return cut_at_stop(visible_text(self.engine, token_ids), asked.stop, whole=whole)

    def _pass_rows(self, beams: Beams, faults: Mapping[int, list[str]]) -> dict[int, _Choice]:
        """For each prompt the best finished row whose text passes the gate."""
        waiting = {index: _candidates(beams, index) for index in faults}
        passed: dict[int, _Choice] = {}
        while waiting := {index: rows for index, rows in waiting.items() if rows and index not in passed}:
            tried = [(index, rows.pop(0)) for index, rows in waiting.items()]
            for (index, row), verdict in zip(tried, self._judge([(row, None) for _, row in tried], beams), strict=True):
                faults[index].extend(verdict.faults)
                if verdict.passes and verdict.text.startswith(self.asked[index].streamed_text):
                    reason = _finish_reason(self.engine, beams.token_ids[row], self.asked[index].stop)
                    passed[index] = _Choice(verdict, reason)
        return passed

    def _judge(self, rows: Sequence[tuple[int, int | None]], beams: Beams) -> list[Verdict]:
        """The gate's verdicts on rows, each (row, how many of its first tokens; None for all)."""
        prompts, texts, ends, lengths, budgets = [], [], [], [], []
        for row, count in rows:
            asked = self.asked[int(beams.prompt_index[row])]
            tokens = beams.token_ids[row][:count]
            blocks = [*(end for end in beams.blocks[row] if end < len(tokens)), len(tokens)]
            text = self._text(asked, tokens, whole=count is None)
            cuts = [len(visible_text(self.engine, tokens[:end])) for end in blocks[:-1]]
            prompts.append(asked.prompt)
            texts.append(text)
            ends.append([*(min(cut, len(text)) for cut in cuts), len(text)])
            lengths.append(blocks)
            budgets.append(asked.strategy.budget)
        return self.gate.judge(prompts, texts, ends, lengths, budgets)

    def _fallbacks(self, failed: Sequence[int], faults: Mapping[int, list[str]]) -> dict[int, _Choice]:
        """For each prompt the first fallback within its budget, or nothing at all where none is.

        Where the cost model fails on it and no other passes, the first fallback leaves unscored and the record says
        so: it is the operator's own fixed text, and none of the model's.
        """
        chosen: dict[int, _Choice] = {}
        unscored: dict[int, _Choice] = {}
        why = "no candidate passed the gate"
        for text in self.guard.fallbacks:
            waiting = [index for index in failed if index not in chosen]
            words = [[max(1, len(text.split()))]] * len(waiting)  # not drawn by the model: a word counts as a token
            prompts = [self.asked[index].prompt for index in waiting]
            budgets = [self.asked[index].strategy.budget for index in waiting]
            verdicts = self.gate.judge(prompts, [text] * len(waiting), [[len(text)]] * len(waiting), words, budgets)
            for index, verdict in zip(waiting, verdicts, strict=True):
                faults[index].extend(verdict.faults)
                if verdict.passes:
                    chosen[index] = _Choice(verdict, "content_filter", why)
                elif verdict.faults:
                    unscored.setdefault(index, _Choice(verdict, "content_filter", why, unscored=verdict.faults[0]))
        chosen = unscored | chosen
        nothing = Verdict("", (0,), (1,), (math.nan,), (math.nan,))
        why += ", and every fallback is over the budget"
        for index in failed:
            chosen.setdefault(index, _Choice(nothing, "content_filter", why, unscored=NOTHING))
        return chosen

    def _response(
        self, asked: Asked, choice: _Choice, trace: Sequence[BlockTrace], reward: float, faults: Sequence[str]
    ) -> GuardedResponse:
        verdict, budget = choice.verdict, asked.strategy.budget
        usage = Usage(
            prompt_tokens=len(self.engine.encode(asked.prompt)),
            completion_tokens=verdict.lengths[-1] if verdict.text else 0,
            proposed_tokens=sum(block.proposed_tokens for block in trace),
        )
        record = {
            "version": VERSION,
            "prompt": [dataclasses.asdict(message) for message in asked.prompt],
            "seed": asked.seed,
            **self.guard.describe(asked.strategy, asked.sampling),
            **({"stop": list(asked.stop)} if asked.stop else {}),
            "budget": dataclasses.asdict(budget),
            "released": released(verdict, self.gate.accounting),
            "finish_reason": choice.reason,
            "why": choice.why,
            "unscored": choice.unscored,
            "faults": list(dict.fromkeys(faults)),
            "search": trace_json(trace),
        }
        return GuardedResponse(
            text=verdict.text,
            finish_reason=choice.reason,
            reward=finite(reward),
            cost=None if choice.unscored else finite(verdict.cost(self.gate.accounting)),
            budget=budget.limit,
            budget_left=None if choice.unscored else finite(verdict.budget_left),
            usage=usage,
            seconds=time.monotonic() - asked.begun,
            record=record,
        )


class _Batch:
    """The prompts that are searched together, from their first token to their release."""

    def __init__(self, guard: Guard, prompts: Sequence[Conversation], seeds: Sequence[int]) -> None:
        self.guard, self.prompts, self.seeds, self.desk = guard, prompts, seeds, Desk(guard)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            self.desk.asked[index] = Asked(prompt, seed, guard.strategy, guard.sampling)

    def search(self) -> SearchResult:
        return self.guard.strategy.generate(self.prompts, self.guard.models, self.guard.sampling, self.seeds)

    def stream(self) -> Iterator[StreamEvent]:
        steps: Iterator[SearchStep] = cast(Streams, self.guard.strategy).steps(
            self.prompts, self.guard.models, self.guard.sampling, self.seeds
        )
        for step in steps:
            if step.result is None:
                yield from self.desk.release_shared(step.beams)
                continue
            for index, response in enumerate(self.settle(step.result)):
                yield StreamEvent(index, response.text[len(self.desk.asked[index].streamed_text) :], response)

    def settle(self, result: SearchResult) -> list[GuardedResponse]:
        return list(self.desk.settle(result.beams, dict(enumerate(result.trace))).values())


@dataclass(frozen=True)
class _Choice:
    """What is released for a prompt, and why."""

    verdict: Verdict
    reason: FinishReason
    why: str = ""  # of a content_filter
    unscored: str = ""  # why a fallback leaves without a score


def _identity(model: Engine | Scorer | Critic | ValueModel) -> dict[str, Any]:
    """Name and fingerprint, and the precision that it computes in where it says so: answers can differ with that."""
    precision = {"precision": model.precision} if getattr(model, "precision", None) else {}  # type: ignore[union-attr]
    return {"name": model.name, "fingerprint": model.fingerprint, **precision}


def _candidates(beams: Beams, prompt: int) -> list[int]:
    """The prompt's finished rows within budget by the search's own account, best first."""
    rows = (beams.prompt_index == prompt).nonzero()[:, 0].tolist()
    return [row for row in rows if bool(beams.finished[row]) and float(beams.budget[row]) >= 0]


def _finish_reason(engine: Engine, token_ids: Sequence[int], stop: Sequence[str]) -> FinishReason:
    ended = bool(token_ids) and token_ids[-1] in engine.end_tokens
    return "stop" if ended or first_stop(visible_text(engine, token_ids), stop) is not None else "length"


def _faults(trace: Sequence[BlockTrace]) -> list[str]:
    return [fault for block in trace for fault in block.faults]


def _shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows share."""
    shortest = min(len(row) for row in rows)
    first = rows[0]
    return next((at for at in range(shortest) if any(row[at] != first[at] for row in rows)), shortest)
