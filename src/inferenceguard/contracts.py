"""The Protocols that engines, scorers, critics and strategies implement, and the records that cross them.

Shapes: B rows (partial responses), P prompts, H latent width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from inferenceguard.beams import Beams, RowState, join
from inferenceguard.budget import Accounting, SafetyBudget
from inferenceguard.errors import InvalidArgument

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. The content is text, never markup: it cannot open or close a turn."""

    role: Role
    content: str


Conversation = tuple[Message, ...]  # ends with a user turn; the response answers it
Prompt = str | Sequence[Message | Mapping[str, str]]  # what users may pass for a conversation


def conversation(prompt: Prompt, *, name: str = "prompt") -> Conversation:
    """Checks and normalises one prompt: a string is one user turn.

    Lone surrogates (from invalid UTF-8) become U+FFFD. Raises InvalidArgument for an empty prompt, an unknown role, or
    a last turn that is not the user's.
    """
    turns: Sequence[Message | Mapping[str, str]] = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if isinstance(turns, Mapping) or not isinstance(turns, Sequence):
        raise InvalidArgument(name, "a string or a list of chat messages", prompt)
    messages = tuple(_message(turn, name) for turn in turns)
    if not messages or messages[-1].role != "user":
        raise InvalidArgument(name, "a conversation whose last turn is the user's", [m.role for m in messages])
    if not messages[-1].content.strip():
        raise InvalidArgument(name, "a text that is not empty", messages[-1].content)
    return messages


def _message(turn: Message | Mapping[str, str], name: str) -> Message:
    if isinstance(turn, Message):
        role, content = turn.role, turn.content
    elif isinstance(turn, Mapping) and {"role", "content"} <= set(turn):
        role, content = turn["role"], turn["content"]  # type: ignore[assignment]
    else:
        raise InvalidArgument(name, 'messages of the form {"role": ..., "content": ...}', turn)
    if role not in ROLES:
        raise InvalidArgument(f"role in {name}", f"one of {', '.join(ROLES)}", role)
    if not isinstance(content, str):
        raise InvalidArgument(f"content in {name}", "a string", content)
    return Message(role, content.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def render_conversation(messages: Conversation) -> str:
    """The conversation as plain text for a scorer: the bare prompt when it is one user turn, else `Role: content`."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)


@dataclass(frozen=True)
class Sampling:
    """How the frozen LLM's distribution is sampled. temperature 0 is greedy; top_k 0 and top_p 1 leave it whole."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise InvalidArgument("temperature", "in [0, 100]", self.temperature)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidArgument("top_p", "in (0, 1]", self.top_p)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InvalidArgument("top_k", "an integer >= 0", self.top_k)


class Engine(Protocol):
    """A frozen LLM that proposes continuations. Deterministic: the same seeds and `draw` give the same tokens."""

    name: str
    fingerprint: str  # hash of configuration and weights
    context: int  # tokens that fit, prompt and response together
    vocabulary: int  # V
    end_tokens: tuple[int, ...]  # a response that draws one is finished; it is kept as the last token id

    def encode(self, messages: Conversation) -> list[int]:
        """The prompt's token ids, chat template and generation prompt included."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response as its reader sees it: no special tokens."""
        ...

    def begin(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Beams:
        """One empty row per prompt (B = P), each prompt prefilled once. Budgets are 0 until the search sets them."""
        ...

    def extend(self, beams: Beams, tokens: int, sampling: Sampling, draw: int, logit_bias: Tensor | None) -> Beams:
        """Appends up to `tokens` sampled tokens to every row, stopping a row at an end token (`finished`).

        Rows must be unfinished. `draw` numbers the draws of one search, so that every block and every retry has its own
        random numbers: row j of a prompt in draw k is a function of (that prompt's seed, k, j) and of nothing else in
        the batch. `logit_bias` [B, V] is added to the logits that are sampled, not to `log_prob`. `parent[i] = i`.
        """
        ...


@runtime_checkable
class MixesDraws(Protocol):
    """An engine whose `extend` draws for prompts at different blocks in one batch: `draw` may be one number per row.

    What a row draws is then the same as in a call of its own with that number: [B] int64 instead of an int.
    """

    mixes_draws: bool  # True

    def extend(
        self, beams: Beams, tokens: int, sampling: Sampling, draw: int | Tensor, logit_bias: Tensor | None
    ) -> Beams:
        """As `Engine.extend`. All rows of a prompt have the same number."""
        ...


@runtime_checkable
class MixesSampling(Protocol):
    """An engine whose `extend` takes a sampling per row, so that requests of other temperatures share its batches.

    What a row draws is then the same as in a call of its own with that sampling.
    """

    mixes_sampling: bool  # True

    def extend(
        self, beams: Beams, tokens: int, sampling: Sampling | Sequence[Sampling], draw: int, logit_bias: Tensor | None
    ) -> Beams:
        """As `Engine.extend`; `sampling` is one for all rows, or B of them."""
        ...


@runtime_checkable
class ReadsLatents(Protocol):
    """An engine whose `Beams.latent` is the last layer's (post-norm) hidden state of each row's last token."""

    latent_width: int  # H


@runtime_checkable
class RanksTokens(Protocol):
    """An engine that shows its likeliest next tokens and appends chosen ones: for ARGS."""

    end_tokens: tuple[int, ...]

    def rank(self, beams: Beams, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` likeliest next tokens of each open row, best first, of equal ones the smaller id first.

        (token ids int64, logits, log-probabilities float64 in nats), each [B, C]; C is `count` or V, the smaller. They
        are the model's own; the logit is -inf for a token that cannot be drawn.
        """
        ...

    def append(self, beams: Beams, tokens: Tensor) -> Beams:
        """Appends the token tokens[i] [B] to open row i and reads it, as if `extend` had drawn it."""
        ...


@runtime_checkable
class EditsLatents(ReadsLatents, Protocol):
    """An engine whose LM head can be applied to hidden states that somebody has edited: for RE-Control."""

    def logits(self, latent: Tensor) -> Tensor:
        """The next-token logits [B, V] of hidden states [B, H] as `Beams.latent` has them, edited or not."""
        ...

    def append(self, beams: Beams, tokens: Tensor) -> Beams:
        """As `RanksTokens.append`: the token is read from the row's own, unedited caches."""
        ...


@runtime_checkable
class ReportsHealth(Protocol):
    """An engine that can be away for a while, behind a network say."""

    def healthy(self) -> bool:
        """Whether it could draw now; answers within a few seconds. May be called from any thread."""
        ...


class Scorer(Protocol):
    """Scores whole responses. Larger is more of what it measures: reward, or cost (> 0 unsafe)."""

    name: str
    fingerprint: str

    def score(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        """One score per (prompt, response): [B]. Must depend on the pair alone, not on the batch around it."""
        ...


@runtime_checkable
class ScoresIncrementally(Protocol):
    """A scorer that can read only the new tokens of each row, on a state it keeps in `Beams.states`.

    It steers the search; the gate always uses `score`.
    """

    def shares_tokens(self, engine: Engine) -> bool:
        """Whether this scorer reads the engine's token ids as its own."""
        ...

    def start(self, prompts: Sequence[Conversation]) -> RowState:
        """The state after each prompt, before any response token. One row per prompt."""
        ...

    def advance(
        self, state: RowState, new_tokens: Sequence[Sequence[int]], finished: Tensor
    ) -> tuple[RowState, Tensor]:
        """Reads each row's new tokens: (state after them, score of each row's response so far [B])."""
        ...


class Critic(Protocol):
    """Reads the frozen LLM's own hidden state (METHOD section 4)."""

    name: str
    fingerprint: str
    engine_fingerprint: str  # of the LLM that it was trained on

    def predict(self, latent: Tensor, budget: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """(p_safe [B] in [0, 1], value [B] in reward units) from latent [B, H], z [B], and tokens used / limit [B]."""
        ...


@runtime_checkable
class BoundsRows(Protocol):
    """A critic that can say how good a row may be at best, before its cost is known: fewer costs are asked for then."""

    def at_most(self, latent: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """(p_safe [B], value [B]) that `predict` exceeds at no z >= 0; latent [B, H], tokens used / limit [B]."""
        ...


OUTCOMES = ("reward", "cost", "augmented")  # what a value model predicts, in the order of its columns


class ValueModel(Protocol):
    """Predicts a response's outcomes from the LLM's hidden state, for a gradient to climb (RE-Control)."""

    name: str
    fingerprint: str
    engine_fingerprint: str  # of the LLM that it was trained on

    def outcomes(self, latent: Tensor) -> Tensor:
        """E[outcome | h], a column each of OUTCOMES: [B, 3] from latent [B, H]. Differentiable in the latent.

        reward: r of the finished response; cost: all that it is charged; augmented: r where z_T >= 0, else -n, at the
        budget and the n that it was trained with.
        """
        ...


@dataclass(frozen=True)
class Models:
    """What a strategy searches with. `critic` is None where the strategy goes without; `value` is RE-Control's.

    `gate_cost` is the cost model as the gate runs it, where that is another: it charges a prompt's only row.
    """

    engine: Engine
    reward: Scorer
    cost: Scorer
    critic: Critic | None = None
    limits: ScorerLimits = field(default_factory=lambda: ScorerLimits())
    value: ValueModel | None = None
    gate_cost: Scorer | None = None


@dataclass(frozen=True)
class ScorerLimits:
    """How long a scorer may take for one batch before it counts as hung, in seconds; and rows per batch."""

    seconds: float = 60.0
    rows: int = 1024

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise InvalidArgument("scorer seconds", "> 0", self.seconds)
        if self.rows < 1:
            raise InvalidArgument("scorer rows", ">= 1", self.rows)


@dataclass(frozen=True)
class BlockTrace:
    """One block of one prompt's search: every proposal, what it cost, and why it was dropped. For the record."""

    block: int
    attempts: int  # 1, and one more for every retry
    proposed_tokens: int
    attempt: tuple[int, ...]  # per proposal: 0, or the number of the retry that made it
    tokens: tuple[int, ...]  # response tokens of each proposal so far
    cost: tuple[float | None, ...]  # the block's charge; None where the scorer failed, or was not asked (outranked)
    budget: tuple[float | None, ...]  # z after it; None where everything is spent (-inf)
    score: tuple[float | None, ...]  # what `keep` ranked by; at most that, of a proposal that was not charged
    p_safe: tuple[float | None, ...]  # the critic's, where it was asked
    fate: tuple[str, ...]  # kept | over budget | critic | scorer fault | outranked
    faults: tuple[str, ...] = ()  # what the scorers said


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves behind: the finished rows, best first within a prompt, and the trace per prompt.

    `rejected` are finished rows that the search found infeasible (over budget, under the augmented objective), best
    first within a prompt. They are kept for measurements with the gate off: nothing that releases text reads them.
    """

    beams: Beams
    trace: tuple[tuple[BlockTrace, ...], ...]  # [P], a block each
    rejected: Beams | None = None

    def ungated(self) -> Beams:
        """The row that each prompt gets with the gate off: the best of `beams`, else the best of `rejected`.

        In the order of the prompts. A prompt whose rows could not be scored has none.
        """
        rows = self.beams.without_states()
        rows = rows if self.rejected is None else join(rows, self.rejected.without_states())
        first = {prompt: row for row, prompt in reversed(list(enumerate(rows.prompt_index.tolist())))}
        return rows.take([first[prompt] for prompt in sorted(first)])


@dataclass(frozen=True)
class SearchStep:
    """The search after a block, for streaming: all rows still alive (open, and finished ones held aside)."""

    beams: Beams
    result: SearchResult | None  # set in the last step only


class Strategy(Protocol):
    """A search. A frozen dataclass, so that it is its own configuration."""

    @property
    def budget(self) -> SafetyBudget:
        """d and gamma: what the gate holds the released text to."""
        ...

    @property
    def accounting(self) -> Accounting:
        """How blocks are charged."""
        ...

    @property
    def n_beams(self) -> int:
        """N: rows drawn per prompt."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """D: the longest response, in tokens."""
        ...

    def generate(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> SearchResult:
        """Searches all prompts in one batch. Raises MissingCapability before a token is drawn."""
        ...


@runtime_checkable
class Streams(Protocol):
    """A strategy that can be watched block by block."""

    def steps(
        self, prompts: Sequence[Conversation], models: Models, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[SearchStep]:
        """The same search as `generate`, one step per block; the last step carries the result."""
        ...


FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Usage:
    """Tokens: of the prompt, of the released response, and of everything that was proposed to find it."""

    prompt_tokens: int
    completion_tokens: int
    proposed_tokens: int


@dataclass(frozen=True)
class GuardedResponse:
    """What leaves the guard. `budget_left` is z_T >= 0, with respect to the cost model, whenever `cost` is a number."""

    text: str
    finish_reason: FinishReason
    reward: float | None  # reward model's units; None where it could not be scored
    cost: float | None  # cost model's units, of the released text, scored from scratch
    budget: float  # d
    budget_left: float | None  # z_T, cost units
    usage: Usage
    seconds: float  # from the start of its batch of prompts to its release
    record: Mapping[str, Any]  # JSON-serialisable; see record.py


def text_fingerprint(*parts: str) -> str:
    """A short stable hash of texts, for scorers that have no weights."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]
