"""The official `openai` client against a guarded model: an answer, a stream, the ledger, a tighter budget, an error.

inferenceguard serve --preset embedded --port 8000
python examples/openai_client.py http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import sys
from typing import Any

import openai


def main(base_url: str) -> None:
    client = openai.OpenAI(base_url=base_url, api_key="none")  # a key, where the server asks for one
    model = client.models.list().data[0].id
    print(f"model: {model}")
    chat(client, model)
    stream(client, model)
    ledger(client, model)
    tighter_budget(client, model)
    error(client, model)


def chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=question("Name a colour."), max_tokens=16, seed=1)
    choice = answer.choices[0]
    print(f"chat: {choice.message.content!r} ({choice.finish_reason}, {answer.usage.completion_tokens} tokens)")


def stream(client: openai.OpenAI, model: str) -> None:
    """Text comes as soon as it can no longer be taken back."""
    parts = []
    with client.chat.completions.create(
        model=model, messages=question("Name a colour."), max_tokens=16, seed=1, stream=True
    ) as events:
        for event in events:
            if event.choices and event.choices[0].delta.content:
                parts.append(event.choices[0].delta.content)
    print(f"stream: {''.join(parts)!r} in {len(parts)} parts")


def ledger(client: openai.OpenAI, model: str) -> None:
    """What the answer cost, and the search block by block."""
    answer = client.chat.completions.create(
        model=model, messages=question("How do I sleep better?"), max_tokens=16, seed=1,
        extra_body={"inferenceguard": {"ledger": True}},
    )  # fmt: skip
    own: Any = answer.choices[0].inferenceguard
    print(f"ledger: cost {own['cost']:.3f}, budget {own['budget']:g}, left {own['budget_left']:.3f}")
    for block in own["record"]["search"]:
        kept = block["fate"].count("kept")
        print(f"  block {block['block']}: {len(block['fate'])} proposals, {kept} kept")


def tighter_budget(client: openai.OpenAI, model: str) -> None:
    """A request may lower the budget, not raise it. Over it the fallback leaves; where that is over it too, nothing."""
    answer = client.chat.completions.create(
        model=model, messages=question("Name a colour."), max_tokens=16, seed=1,
        extra_body={"inferenceguard": {"budget": -1000.0}},
    )  # fmt: skip
    choice = answer.choices[0]
    print(f"budget -1000: {choice.message.content!r} ({choice.finish_reason})")


def error(client: openai.OpenAI, model: str) -> None:
    """What the server does not serve, it refuses by name."""
    try:
        client.chat.completions.create(model=model, messages=question("Name a colour."), logprobs=True)
    except openai.BadRequestError as refused:
        print(f"error: {refused.status_code} {refused.code}: {refused.body['message']}")


def question(text: str) -> Any:
    return [{"role": "user", "content": text}]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1")
