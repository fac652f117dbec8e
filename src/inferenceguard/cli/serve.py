"""`inferenceguard serve`: the guard behind OpenAI's HTTP interface."""

from __future__ import annotations

import ipaddress
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferenceguard.errors import InvalidArgument

if TYPE_CHECKING:
    from fastapi import FastAPI

KEYS = "INFERENCEGUARD_API_KEYS"


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    preset: Annotated[str | None, typer.Option(help="A set of models.", show_default="embedded")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Models and settings as YAML.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients.", show_default="the preset's or the LLM's")
    ] = None,
    n_beams: Annotated[str | None, typer.Option(metavar="N|auto", help="N: proposals per block.")] = None,
    budget: Annotated[float | None, typer.Option(help="d: cost that an answer may have.", show_default="0")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most.", show_default="64")] = None,
    max_beams: Annotated[int | None, typer.Option(help="N that a request may ask for.", show_default="N")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Rows drawn at once.", show_default="batch_rows")] = None,
    max_queue: Annotated[int, typer.Option(help="Answers that may wait; then 429.")] = 64,
    max_choices: Annotated[int, typer.Option(help="n of a request at most.")] = 8,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body.")] = 262_144,
    max_connections: Annotated[int, typer.Option(help="Open connections; then 503.")] = 512,
    seconds: Annotated[float, typer.Option(help="For one request, queue included.")] = 300.0,
    grace: Annotated[float, typer.Option(help="Seconds to finish what is in flight on SIGTERM.")] = 60.0,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"One key a line; or {KEYS}, with commas between.")
    ] = None,
    allow_unguarded: Annotated[
        bool, typer.Option("--allow-unguarded", help="Let the page show the bare LLM's UNGUARDED answer beside.")
    ] = False,
) -> None:
    """Serve the guard with OpenAI's HTTP interface, and a page to watch it at /."""
    if not 0 <= port < 65536:
        raise InvalidArgument("--port", "from 0 to 65535", port)
    from inferenceguard.config import load_config, parse_config
    from inferenceguard.server import ApiKeys, Limits, create_app

    fields: dict[str, Any] = {} if config is None else load_config(config).model_dump(exclude_unset=True)
    if preset is not None:
        fields["preset"] = preset
    for part, given in (
        ("search", {"n_beams": _width(n_beams), "max_new_tokens": max_new_tokens}),
        ("budget", {"limit": budget}),
    ):
        own = {key: value for key, value in given.items() if value is not None}
        if own:
            fields[part] = {**fields.get(part, {}), **own}
    settings = parse_config(fields)
    settings.settings()  # what is wrong without a model is said before one is read
    keys = ApiKeys.read(api_keys, os.environ.get(KEYS))
    limits = Limits(
        queue=max_queue, rows=max_rows or settings.batch_rows, beams=max_beams, choices=max_choices,
        body_bytes=max_body, request_seconds=seconds, grace_seconds=grace,
    )  # fmt: skip
    called = name or (settings.preset or "embedded" if settings.model is None else None)
    with ThreadPoolExecutor(1) as loader:  # ends with its OpenMP pool, so that the search's is the only one
        guard = loader.submit(settings.guard).result()
    app = create_app(guard, name=called, limits=limits, keys=keys, allow_unguarded=allow_unguarded)
    if not keys.required and not _is_loopback(host):
        typer.echo(f"no API keys: everybody who reaches {host}:{port} can use this server (--api-keys)", err=True)
    run(app, host, port, max_connections, grace)


def run(app: FastAPI, host: str, port: int, connections: int, grace: float) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is in flight."""
    import uvicorn

    from inferenceguard.server.protocol import TimedProtocol

    uvicorn.run(
        app, host=host, port=port, log_level="info", access_log=False, server_header=False, http=TimedProtocol,
        ws="none", limit_concurrency=connections, timeout_keep_alive=10, timeout_graceful_shutdown=int(grace) or None,
    )  # fmt: skip


def _width(text: str | None) -> int | str | None:
    try:
        return text if text is None or text == "auto" else int(text)
    except ValueError:
        raise InvalidArgument("n_beams", "an integer >= 1, or auto", text) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
