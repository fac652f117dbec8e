"""What requests may say. Fields that are known and not served are refused by name; unknown ones too."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from inferenceguard.contracts import Conversation, conversation
from inferenceguard.server.errors import ApiError

# Sent by clients and of no effect here.
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
# Not served: field -> the values that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
}


def _whole(value: Any) -> Any:
    """In JSON 1.0 is an integer, too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Text = Annotated[str, Field(strict=True)]
_Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
_Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole)]
# For the description; what is checked by hand below has better messages.
_Stop = {"type": "string", "minLength": 1, "maxLength": 256}
_STOPS = {"anyOf": [_Stop, {"type": "array", "items": _Stop, "maxItems": 4}, {"type": "null"}], "default": None}
_SAYS = {"type": "string", "pattern": r"\S"}  # conversation() strips it


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class TextPart(_Part):
    """A piece of a message. Only text is read."""

    type: Literal["text"]
    text: str


class ChatMessage(_Part):
    """One turn. `developer` is another name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # ignored
    refusal: str | None = None  # ignored: an answer of ours that is sent back has it

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class GuardOptions(_Part):
    """Our own part of a request. It can make the guard stricter or its search wider, and nothing else."""

    budget: float | None = Field(default=None, allow_inf_nan=False, description="d, at most the server's own")
    n_beams: _Count | None = Field(default=None, description="N, at least the server's own and at most its limit")
    ledger: bool = Field(default=False, description="send the record of the search with the answer")


class StreamOptions(_Part):
    """OpenAI's."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # ignored


class _Completion(_Part):
    """What both endpoints share."""

    model: str | None = None
    n: _Count | None = None
    seed: _Seed | None = None
    stop: Annotated[str | list[str] | None, WithJsonSchema(_STOPS)] = None
    max_tokens: _Count | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    inferenceguard: GuardOptions = Field(default_factory=GuardOptions)

    @property
    def stops(self) -> tuple[str, ...]:
        """At most 4 texts that are not empty."""
        given = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(given) > 4 or not all(0 < len(text) <= 256 for text in given):
            raise ApiError(400, "stop must be at most 4 texts of 1 to 256 characters.", param="stop")
        return given

    @property
    def most_tokens(self) -> int | None:
        """Tokens of an answer at most, as asked."""
        return self.max_tokens


class ChatRequest(_Completion):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(
        min_length=1, max_length=1024, examples=[[{"role": "user", "content": "What is the capital of France?"}]]
    )
    max_completion_tokens: _Count | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def prompts(self) -> list[Conversation]:
        """The conversation that is answered."""
        turns = [
            {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text}
            for turn in self.messages
        ]
        return [conversation(turns, name="messages")]


_Said = Annotated[_Text, WithJsonSchema(_SAYS)]


class TextRequest(_Completion):
    """POST /v1/completions. Each prompt is answered as one user's turn: the guard serves a chat."""

    prompt: _Said | Annotated[list[_Said], Field(min_length=1, max_length=64)]

    @property
    def prompts(self) -> list[Conversation]:
        """The conversations that are answered."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [conversation(text, name="prompt") for text in given]


class UnguardedRequest(_Part):
    """POST /v1/unguarded, where the operator allows it."""

    message: str = Field(min_length=1)
    seed: _Seed = 0
    max_tokens: _Count | None = None


Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], body: bytes) -> Request:
    """A request from its bytes. Raises ApiError 400 that names the first field that is wrong."""
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits, and of deep nesting
        raise ApiError(400, "The body is not valid JSON in UTF-8.", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    for name, harmless in UNSERVED.items():
        if name in fields and not any(_same(fields[name], value) for value in harmless):
            raise ApiError(400, f"{name} is not supported by this server.", param=name, code="unsupported_parameter")
    known = {name: value for name, value in fields.items() if name not in IGNORED and name not in UNSERVED}
    try:
        return kind.model_validate(known)
    except (ValidationError, RecursionError) as error:
        raise _mapped(error) from error


def _same(given: Any, value: Any) -> bool:
    """Equal as JSON: in Python 0 is False."""
    return isinstance(given, bool) == isinstance(value, bool) and bool(given == value)


def _mapped(error: Exception) -> ApiError:
    if not isinstance(error, ValidationError):
        return ApiError(400, "The request is nested too deeply.")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument: {place}.", param=place, code="unknown_parameter")
    return ApiError(400, f"{place}: {first['msg']}.", param=place, code="invalid_value")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
