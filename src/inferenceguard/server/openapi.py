"""The OpenAPI description: what the routes take, with this server's own bounds, and what they answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from inferenceguard.server.schema import IGNORED, UNSERVED, ChatRequest, TextRequest
from inferenceguard.strategies import InferenceGuard

if TYPE_CHECKING:
    from inferenceguard.server.app import Service

STREAM: dict[str, Any] = {
    "schema": {
        "type": "object",
        "properties": {"data": {"type": "string"}},
        "required": ["data"],
        "description": "where `stream` is asked for: the fields of one server-sent event; `data` is a chunk, or [DONE]",
    }
}


def request_body(kind: type[ChatRequest | TextRequest], service: Service) -> dict[str, Any]:
    """`openapi_extra` of a route: the fields of a request, and this server's bounds on them.

    Not in the schema: the last turn is the user's, and prompt and answer fit the model's context.
    """
    schema = kind.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs"))
    fields = schema["properties"]
    fields["model"] = {"enum": [service.name, None]}
    fields["n"]["maximum"] = service.limits.choices
    for name in ("max_tokens", "max_completion_tokens"):
        if name in fields:
            fields[name]["maximum"] = service.most_tokens
    for choice in fields.get("prompt", {}).get("anyOf", ()):
        if choice["type"] == "array":
            choice["maxItems"] = service.limits.choices
    strategy: Any = service.guard.strategy
    own = fields["inferenceguard"]["properties"]
    own["budget"]["maximum"] = strategy.budget.limit
    widest = service.most_beams if isinstance(strategy, InferenceGuard) else strategy.n_beams
    own["n_beams"] |= {"minimum": strategy.n_beams, "maximum": widest}
    fields |= {name: {"description": "ignored"} for name in sorted(IGNORED)}
    fields |= {name: {"enum": list(same), "description": "not served"} for name, same in UNSERVED.items()}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(node: Any, parts: dict[str, Any]) -> Any:
    """The schema without references: FastAPI fills the components, and these are not its own."""
    if isinstance(node, list):
        return [_inlined(each, parts) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        part = parts[node["$ref"].rsplit("/", 1)[1]]
        return _inlined({**part, **{key: value for key, value in node.items() if key != "$ref"}}, parts)
    return {key: _inlined(value, parts) for key, value in node.items()}


# --- what is answered: descriptions alone, the answers are written by app.Shape -------------------------------------


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What was wrong."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """As OpenAI's clients read it."""

    error: ErrorDetail


class GuardReport(_Answer):
    """The field `inferenceguard` of a choice. Costs are in the cost model's units."""

    cost: float | None
    budget: float
    budget_left: float | None
    reward: float | None
    seed: int
    proposed_tokens: int
    seconds: float
    record: dict[str, Any] | None = None


class AnswerMessage(_Answer):
    """The answer's text."""

    role: Literal["assistant"]
    content: str
    refusal: None


class _Choice(_Answer):
    index: int
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: None
    inferenceguard: GuardReport


class ChatChoice(_Choice):
    """One answer."""

    message: AnswerMessage


class TextChoice(_Choice):
    """One answer."""

    text: str


class Usage(_Answer):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(_Answer):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextAnswer(_Answer):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(_Answer):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Answer):
    """All models."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(_Answer):
    """How the server is."""

    status: str
