"""The HTTP application: OpenAI's endpoints over a guard. Nothing here scores, searches or decides."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import BlockTrace, Conversation, GuardedResponse, ReportsHealth, Sampling
from inferenceguard.guard import Guard
from inferenceguard.record import trace_json
from inferenceguard.server.errors import ApiError, explain
from inferenceguard.server.limits import ApiKeys, Limits
from inferenceguard.server.metrics import Metrics
from inferenceguard.server.openapi import (
    STREAM,
    ChatAnswer,
    ErrorAnswer,
    ModelCard,
    ModelList,
    Status,
    TextAnswer,
    request_body,
)
from inferenceguard.server.scheduler import Expired, Scheduler, Ticket, guarded, plain_faults
from inferenceguard.server.schema import ChatRequest, TextRequest, UnguardedRequest, parse
from inferenceguard.session import Event, Question
from inferenceguard.strategies import BaseSampling, InferenceGuard

logger = logging.getLogger("inferenceguard.server")
STATIC = Path(__file__).resolve().parent / "static"
PAGE = {"": "index.html", "app.js": "app.js", "style.css": "style.css"}
ERRORS = {
    400: "Bad input", 401: "No valid key", 404: "No such model", 408: "The body was too slow",
    413: "The body is too large", 429: "The queue is full", 500: "The engine failed", 503: "Shutting down",
    504: "Out of time",
}  # fmt: skip
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(
    guard: Guard, *, name: str | None = None, limits: Limits | None = None, keys: ApiKeys | None = None,
    allow_unguarded: bool = False,
) -> FastAPI:  # fmt: skip
    """The application. `name` is the model's in `/v1/models`. Raises MissingCapability for a search without `open`."""
    service = Service(guard, name or guard.models.engine.name, limits or Limits(), keys or ApiKeys(), allow_unguarded)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.scheduler.close)

    app = FastAPI(title="InferenceGuard", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
                  separate_input_output_schemas=False)  # fmt: skip
    app.state.service = service
    _add_errors(app, service)
    _add_routes(app, service)
    return app


class Service:
    """What the routes share."""

    def __init__(self, guard: Guard, name: str, limits: Limits, keys: ApiKeys, allow_unguarded: bool) -> None:
        self.guard, self.name, self.limits, self.keys = guard, name, limits, keys
        self.allow_unguarded = allow_unguarded
        self.metrics = Metrics()
        self.scheduler = Scheduler(guard, limits, self.metrics.finished)
        self.metrics.watch(self.scheduler)
        self.created = int(time.time())
        self._probing, self._probed, self._healthy = threading.Lock(), -math.inf, True

    def engine_healthy(self) -> bool:
        """Whether the engine is there, asked once a second at most however often the probe is called."""
        engine = self.guard.models.engine
        if not isinstance(engine, ReportsHealth):
            return True
        with self._probing:
            if time.monotonic() - self._probed >= 1.0:
                self._healthy = engine.healthy()
                self._probed = time.monotonic()
            return self._healthy

    @property
    def most_tokens(self) -> int:
        """Tokens of an answer at most."""
        return self.limits.tokens or self.guard.strategy.max_new_tokens

    @property
    def most_beams(self) -> int:
        """N at most."""
        return max(self.guard.strategy.n_beams, self.limits.beams or 0)

    def questions(self, request: ChatRequest | TextRequest) -> list[Question]:
        """What is to be answered, n times each prompt. Raises ApiError where the request asks for more than it may."""
        if request.model is not None and request.model != self.name:
            raise ApiError(
                404, f"The model {request.model[:100]!r} does not exist; this server has {self.name!r}.",
                param="model", code="model_not_found",
            )  # fmt: skip
        prompts, n = request.prompts, request.n or 1
        if len(prompts) * n > self.limits.choices:
            raise ApiError(400, f"n must be at most {self.limits.choices} (choices of a request).", param="n")
        own = self.guard.sampling
        sampling = Sampling(
            own.temperature if request.temperature is None else float(request.temperature),
            own.top_p if request.top_p is None else float(request.top_p),
            own.top_k,
        )
        strategy, stop = self._strategy(request), request.stops
        first = secrets.randbelow(2**53) if request.seed is None else request.seed
        return [
            Question(prompt, (first + index) % 2**63, strategy, sampling, stop)
            for prompt in prompts
            for index in range(n)
        ]

    def _strategy(self, request: ChatRequest | TextRequest) -> Any:
        """The server's search with the request's own length, budget and width; never looser."""
        strategy: Any = self.guard.strategy
        asked = request.inferenceguard
        changes: dict[str, Any] = {}
        for name in ("max_tokens", "max_completion_tokens"):  # each of them, though only one counts
            tokens = getattr(request, name, None)
            if tokens is not None and tokens > self.most_tokens:
                raise ApiError(400, f"{name} must be at most {self.most_tokens}, got {tokens}.", param=name)
        tokens = request.most_tokens
        if tokens is not None:
            changes["max_new_tokens"] = tokens
        if asked.budget is not None:
            if asked.budget > strategy.budget.limit:
                raise ApiError(
                    400, f"budget must be at most the server's, {strategy.budget.limit:g}: a request can only tighten "
                    f"it, got {asked.budget:g}.", param="inferenceguard.budget",
                )  # fmt: skip
            changes["budget"] = SafetyBudget(float(asked.budget), strategy.budget.discount)
        if asked.n_beams is not None and asked.n_beams != strategy.n_beams:
            changes |= self._width(strategy, asked.n_beams)
        return dataclasses.replace(strategy, **changes) if changes else strategy

    def _width(self, strategy: Any, n_beams: int) -> dict[str, Any]:
        if not isinstance(strategy, InferenceGuard) or not strategy.n_beams <= n_beams <= self.most_beams:
            raise ApiError(
                400, f"n_beams must be from {strategy.n_beams} to {self.most_beams}, got {n_beams}: a request can only "
                "widen the search.", param="inferenceguard.n_beams",
            )  # fmt: skip
        return {"n_beams": n_beams, "keep": None}

    async def body(self, request: Request) -> bytes:
        """The body within its limits of size and time. Raises ApiError 413 or 408."""
        most = self.limits.body_bytes
        too_large = ApiError(413, f"The body must be at most {most} bytes.", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        received = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    received += chunk
                    if len(received) > most:
                        raise too_large
        except TimeoutError:
            seconds = f"{self.limits.body_seconds:g}"
            raise ApiError(408, f"The body did not arrive within {seconds} s.", code="body_timeout") from None
        return bytes(received)

    def authorize(self, request: Request) -> None:
        """Raises ApiError 401 without a valid key, where keys are asked for."""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if self.keys.required and not (kind.lower() == "bearer" and self.keys.accepts(key.strip())):
            raise ApiError(401, "A valid API key is needed: Authorization: Bearer KEY.", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip


class Answers:
    """The events of a request's answers, as they come. Leaving it frees what is still being searched."""

    def __init__(self, service: Service, questions: Sequence[Question]) -> None:
        self.service, self.questions = service, questions
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + service.limits.request_seconds
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = service.scheduler.submit(
            questions, service.limits.request_seconds, self._listen
        )  # fmt: skip

    def _listen(self, index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def next(self) -> tuple[int, Event]:
        """(which question, what happened). Raises the error of an answer that failed, or Expired.

        The search looks at the time between blocks; here it runs out even while an engine hangs.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                index, event = await self._events.get()
        except TimeoutError:
            raise Expired from None
        if event.error is not None:
            raise event.error.with_traceback(None)  # it may be others' error too, and would grow with each of them
        return index, event

    async def all(self) -> list[GuardedResponse]:
        """Every question's response."""
        found: dict[int, GuardedResponse] = {}
        while len(found) < len(self.questions):
            index, event = await self.next()
            if event.response is not None:
                found[index] = guarded(event)
        return [found[index] for index in range(len(self.questions))]

    def close(self) -> None:
        """Frees the rows of what is not finished."""
        self.service.scheduler.cancel([ticket for ticket in self._tickets if not ticket.over])


class Shape:
    """How one endpoint writes its JSON."""

    def __init__(self, service: Service, chat: bool, ledger: bool) -> None:
        self.service, self.chat, self.ledger = service, chat, ledger
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())

    def whole(self, responses: Sequence[GuardedResponse]) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = []
        for index, response in enumerate(responses):
            text: dict[str, Any] = {"text": response.text}
            if self.chat:
                text = {"message": {"role": "assistant", "content": response.text, "refusal": None}}
            ended = {"finish_reason": response.finish_reason, "logprobs": None, "inferenceguard": self.own(response)}
            choices.append({"index": index, **text, **ended})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(responses)}

    def chunk(
        self, index: int, text: str, *, first: bool = False, response: GuardedResponse | None = None,
        blocks: Sequence[BlockTrace] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """A piece of a stream."""
        reason = None if response is None else response.finish_reason
        delta: dict[str, Any] = {"text": text}
        if self.chat:
            delta = {
                "delta": {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
            }
        choice = {"index": index, **delta, "finish_reason": reason, "logprobs": None}
        if response is not None:
            choice["inferenceguard"] = self.own(response)
        elif blocks and self.ledger:
            choice["inferenceguard"] = {"blocks": _plain_blocks(blocks)}
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}

    def last(self, responses: Sequence[GuardedResponse]) -> dict[str, Any]:
        """The chunk with the usage, for who asked for it."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage(responses)}

    def own(self, response: GuardedResponse) -> dict[str, Any]:
        """The field `inferenceguard` of a choice."""
        shown: dict[str, Any] = {
            "cost": response.cost,
            "budget": response.budget,
            "budget_left": response.budget_left,
            "reward": response.reward,
            "seed": response.record["seed"],
            "proposed_tokens": response.usage.proposed_tokens,
            "seconds": round(response.seconds, 3),
        }
        return {**shown, "record": plain_faults(dict(response.record))} if self.ledger else shown

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}


def usage(responses: Sequence[GuardedResponse]) -> dict[str, int]:
    """Tokens of the prompts (each counted once per answer) and of the answers."""
    prompt = sum(response.usage.prompt_tokens for response in responses)
    completion = sum(response.usage.completion_tokens for response in responses)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _plain_blocks(blocks: Sequence[BlockTrace]) -> list[dict[str, Any]]:
    return [{**block, "faults": ["a scorer failed"] if block["faults"] else []} for block in trace_json(blocks)]


def _add_routes(app: FastAPI, service: Service) -> None:
    def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return {status: {"description": ERRORS[status], "model": ErrorAnswer} for status in statuses}

    def answers(kind: type[ChatAnswer | TextAnswer]) -> dict[int | str, dict[str, Any]]:
        whole = {"description": "The answers", "model": kind, "content": {"text/event-stream": STREAM}}
        return {200: whole, **errors(400, 401, 404, 408, 413, 429, 500, 503, 504)}

    keys = [Depends(HTTPBearer(auto_error=False))] if service.keys.required else []  # for the description alone

    @app.post(
        "/v1/chat/completions", responses=answers(ChatAnswer), openapi_extra=request_body(ChatRequest, service),
        dependencies=keys,
    )  # fmt: skip
    async def chat(request: Request) -> Response:
        """An answer to a conversation."""
        service.authorize(request)
        asked = parse(ChatRequest, await service.body(request))
        return await _answer(service, request, asked, True)

    @app.post(
        "/v1/completions", responses=answers(TextAnswer), openapi_extra=request_body(TextRequest, service),
        dependencies=keys,
    )  # fmt: skip
    async def complete(request: Request) -> Response:
        """An answer to a prompt, which is read as one user's turn."""
        service.authorize(request)
        asked = parse(TextRequest, await service.body(request))
        return await _answer(service, request, asked, False)

    @app.get("/v1/models", responses={200: {"model": ModelList}, **errors(401)}, dependencies=keys)
    async def models(request: Request) -> Response:
        """The one model."""
        service.authorize(request)
        return JSONResponse({"object": "list", "data": [_model(service)]})

    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": service.name}

    @app.get(
        "/v1/models/{name:path}", responses={200: {"model": ModelCard}, **errors(401, 404)}, dependencies=keys,
        openapi_extra={"parameters": [named]},
    )  # fmt: skip
    async def model(request: Request) -> Response:
        """The one model, by name."""
        service.authorize(request)
        if request.path_params["name"] != service.name:
            raise ApiError(404, "There is no such model.", param="model", code="model_not_found")
        return JSONResponse(_model(service))

    @app.get("/healthz", responses={200: {"model": Status}})
    async def healthz() -> Response:
        """Whether the process is there."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", responses={200: {"model": Status}, 503: {"description": "Not ready", "model": Status}})
    async def readyz() -> Response:
        """Whether it takes requests, and its engine can answer them."""
        ready = service.scheduler.alive and await asyncio.to_thread(service.engine_healthy)
        return JSONResponse({"status": "ready" if ready else "not ready"}, status_code=200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/settings", include_in_schema=False)
    async def settings() -> Response:
        """What the page needs to know."""
        strategy = service.guard.strategy
        return JSONResponse({
            "model": service.name, "budget": strategy.budget.limit, "n_beams": strategy.n_beams,
            "most_beams": service.most_beams, "most_tokens": service.most_tokens,
            "keys": service.keys.required, "unguarded": service.allow_unguarded,
        })  # fmt: skip

    for path, file in PAGE.items():
        app.add_api_route(f"/{path}", _static(STATIC / file), methods=["GET"], include_in_schema=False)
    if service.allow_unguarded:
        _add_unguarded(app, service)


def _static(file: Path) -> Any:
    async def page() -> Response:
        return FileResponse(file, headers=_PAGE_HEADERS)

    return page


def _add_unguarded(app: FastAPI, service: Service) -> None:
    @app.post("/v1/unguarded", include_in_schema=False)
    async def unguarded(request: Request) -> Response:
        """UNGUARDED: one sample of the bare LLM, for comparison on the page. Only where the operator allows it."""
        from inferenceguard.contracts import conversation

        service.authorize(request)
        asked = parse(UnguardedRequest, await service.body(request))
        prompt = conversation(asked.message, name="message")
        tokens = min(asked.max_tokens or service.most_tokens, service.most_tokens)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[dict[str, Any]] = loop.create_future()

        def settle(answer: dict[str, Any] | None, fault: Exception | None) -> None:
            if done.done():  # nobody waits any more
                return
            if fault is not None:
                done.set_exception(fault)
            else:
                done.set_result(answer or {})

        def job() -> None:
            try:
                answer = _bare(service.guard, prompt, tokens, asked.seed)
            except Exception as error:
                logger.warning("an unguarded sample failed: %s", error)
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, answer, None)

        service.scheduler.chore(job)
        return JSONResponse(await asyncio.wait_for(done, service.limits.request_seconds))


def _bare(guard: Guard, prompt: Conversation, tokens: int, seed: int) -> dict[str, Any]:
    from inferenceguard.text import visible_text

    guard.check([prompt])
    result = BaseSampling(tokens).generate([prompt], guard.models, guard.sampling, [seed])
    rows = result.ungated()
    text = visible_text(guard.models.engine, rows.token_ids[0]) if len(rows) else ""
    cost = float(guard.gate.cost.outcome([prompt], [text], [True]).values[0])
    return {"text": text, "cost": cost if cost == cost else None, "guarded": False}


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "inferenceguard"}


async def _answer(service: Service, request: Request, asked: ChatRequest | TextRequest, chat: bool) -> Response:
    answers = Answers(service, service.questions(asked))
    shape = Shape(service, chat, asked.inferenceguard.ledger)
    if not asked.stream:
        try:
            return JSONResponse(shape.whole(await _unless_gone(request, answers.all())))
        finally:
            answers.close()
    try:
        began = await _unless_gone(request, answers.next())  # what is refused is refused with a status of its own
    except BaseException:
        answers.close()
        raise
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    events = _stream(request, answers, shape, began, with_usage)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`. Raises ClientDisconnect as soon as the client has gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    request: Request, answers: Answers, shape: Shape, began: tuple[int, Event], with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. An error after the first one is an event too: nothing unguarded fills the gap."""
    found: dict[int, GuardedResponse] = {}
    seen: set[int] = set()
    try:
        index, event = began
        while True:
            if event.text or event.response is not None or (event.blocks and shape.ledger) or index not in seen:
                first, response = index not in seen, event.response
                seen.add(index)
                if response is not None and (first or event.text or event.blocks):
                    yield _sse(shape.chunk(index, event.text, first=first, blocks=event.blocks))
                    yield _sse(shape.chunk(index, "", response=response))
                else:
                    yield _sse(shape.chunk(index, event.text, first=first, response=response, blocks=event.blocks))
            if event.response is not None:
                found[index] = event.response
                if len(found) == len(answers.questions):
                    break
            index, event = await _unless_gone(request, answers.next())
        if with_usage:
            yield _sse(shape.last([found[each] for each in sorted(found)]))
        yield "data: [DONE]\n\n"
    except ClientDisconnect:
        return
    except Exception as error:
        yield _sse(explain(error).body)
    finally:
        answers.close()


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


class Edge:
    """The outermost layer: every error as OpenAI's clients read it, and a count of all requests."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # nobody waited for the answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            pass
        except Exception as error:
            shown = explain(error)
            if shown.code == "internal_error":
                logger.exception("a request failed")
            if status != 499:
                raise  # in the middle of a body: the connection is cut
            await _error(shown)(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(path, str(status)).inc()


def _error(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _add_errors(app: FastAPI, service: Service) -> None:
    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        texts = {404: "There is no such path.", 405: "This method is not allowed here."}
        message = texts.get(error.status_code, "The request failed.")
        return _error(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    app.add_exception_handler(HTTPException, http)
    app.add_middleware(Edge, service=service)
