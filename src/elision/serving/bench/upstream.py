"""A scripted OpenAI-compatible server: answers in a known time, streams, and fails in every way on request.

A prompt that contains one of `FAULTS` in brackets, such as "[500]", makes the server fail in that way. Used by tests
and benchmarks; it computes nothing, so that what is measured is the proxy.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FAULTS = ("500", "429", "slow", "broken", "garbage", "no-done", "length", "error-event", "hang")


def truth(prompt: str) -> str:
    """The answer to a prompt: any two prompts have different ones."""
    return f"Answer {hashlib.sha256(prompt.encode()).hexdigest()[:12]} to: {prompt[:60]}"


class ScriptedUpstream:
    """The server's state.

    Args:
        delay: seconds before the first byte.
        pause: seconds between chunks of a stream.
    """

    def __init__(self, delay: float = 0.0, pause: float = 0.0) -> None:
        self.delay, self.pause = delay, pause
        self.calls: Counter[str] = Counter()
        self.cancelled = 0
        self.headers: list[dict[str, str]] = []
        post = ["POST"]
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._answer, methods=post),
                Route("/v1/completions", self._answer, methods=post),
                Route("/v1/embeddings", self._embed, methods=post),
                Route("/v1/models", self._models, methods=["GET"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        self.calls["models"] += 1
        return JSONResponse({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    async def _embed(self, request: Request) -> Response:
        self.calls["embeddings"] += 1
        body = json.loads(await request.body())
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        rows = [{"object": "embedding", "index": i, "embedding": [float(len(t)), 1.0]} for i, t in enumerate(texts)]
        return JSONResponse({"object": "list", "data": rows, "model": body["model"], "usage": {"total_tokens": 1}})

    async def _answer(self, request: Request) -> Response:
        raw = await request.body()
        self.headers.append(dict(request.headers))
        try:
            body = json.loads(raw)
        except ValueError:
            self.calls["malformed"] += 1
            return JSONResponse({"error": {"message": "malformed", "type": "invalid_request_error"}}, 400)
        chat = request.url.path.endswith("/chat/completions")
        prompt = _prompt(body, chat)
        self.calls[prompt[:200]] += 1
        fault = next((name for name in FAULTS if f"[{name}]" in prompt), None)
        await asyncio.sleep(60 if fault == "hang" else self.delay + (1.0 if fault == "slow" else 0.0))
        if fault in ("500", "429"):
            return JSONResponse({"error": {"message": "scripted", "type": "server_error"}}, int(fault))
        if fault == "garbage":
            return Response(b'{"choices": [{"index": 0, "mess', media_type="application/json")
        if body.get("stream"):
            events = self._events(body, chat, prompt, fault)
            return StreamingResponse(events, media_type="text/event-stream")
        finish = "length" if fault == "length" else "stop"
        text = truth(prompt)
        choice = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return JSONResponse({**_head(body, chat, False), "choices": [choice], "usage": _usage(prompt, text)})

    async def _events(self, body: dict[str, Any], chat: bool, prompt: str, fault: str | None) -> AsyncIterator[bytes]:
        head, text = _head(body, chat, True), truth(prompt)

        def event(**fields: Any) -> bytes:
            return b"data: " + json.dumps({**head, **fields}).encode() + b"\n\n"

        try:
            if chat:
                yield event(
                    choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
                )
            for at in range(0, len(text), 7):
                if fault == "broken" and at > 20:
                    raise ConnectionResetError("scripted break")
                if fault == "error-event" and at > 20:
                    yield b'data: {"error": {"message": "scripted", "type": "server_error"}}\n\n'
                    return
                piece = {"delta": {"content": text[at : at + 7]}} if chat else {"text": text[at : at + 7]}
                yield event(choices=[{"index": 0, **piece, "finish_reason": None}])
                await asyncio.sleep(self.pause)
            finish = "length" if fault == "length" else "stop"
            last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            yield event(choices=[{"index": 0, **last, "finish_reason": finish}])
            if (body.get("stream_options") or {}).get("include_usage"):
                yield event(choices=[], usage=_usage(prompt, text))
            if fault != "no-done":
                yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


def _prompt(body: dict[str, Any], chat: bool) -> str:
    last = body["messages"][-1]["content"] if chat else body.get("prompt", "")
    return last if isinstance(last, str) else json.dumps(last)


def _head(body: dict[str, Any], chat: bool, stream: bool) -> dict[str, Any]:
    kind = "chat.completion" if chat else "text_completion"
    return {"id": "up-1", "object": kind + (".chunk" if stream and chat else ""), "created": 1, "model": body["model"]}


def _usage(prompt: str, text: str) -> dict[str, int]:
    a, b = len(prompt.split()), len(text.split())
    return {"prompt_tokens": a, "completion_tokens": b, "total_tokens": a + b}
