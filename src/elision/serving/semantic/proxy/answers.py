"""Answers taken from upstream replies and turned into replies again.

Only an answer that is complete (finish reason "stop"), successful and plain text becomes an `Answer`. Spec: "tee the
stream, insert
after [DONE] with finish_reason stop; on HIT synthesise a valid response or SSE chunk sequence with the caller's
id/model and usage".
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

from elision.serving.semantic.store import Answer

# Fields around an answer that say nothing the caller asked for: OpenAI's, then llama.cpp's, routers' and Azure's.
_ENVELOPE = frozenset(
    (
        "id",
        "object",
        "created",
        "model",
        "system_fingerprint",
        "choices",
        "usage",
        "service_tier",
        "obfuscation",
        "timings",
        "provider",
        "prompt_filter_results",
    )
)
# The same around a choice; a stop reason only where it is a token: a text is the caller's own stop, told on request.
_CHOICE = frozenset(
    ("index", "message", "delta", "text", "finish_reason", "logprobs", "content_filter_results", "native_finish_reason")
)
_STOPPED = frozenset(("stop_reason", "matched_stop"))
_PIECE = re.compile(r"\S+\s*|\s+")


class Unstorable(Exception):
    """A reply that must not be stored; the message says why."""


def from_body(raw: bytes, *, chat: bool) -> Answer:
    """The answer in a complete JSON reply.

    Raises:
        Unstorable: for anything that is not one complete plain-text answer.
    """
    try:
        body = json.loads(raw)
        choices = body["choices"]
        choice = choices[0]
    except (ValueError, LookupError, TypeError) as error:
        raise Unstorable("malformed-reply") from error
    if len(choices) != 1 or not isinstance(choice, dict):
        raise Unstorable("several-choices")
    collected = Collected(chat)
    collected.envelope(body)
    collected.choice(choice, "message" if chat else "")
    return collected.answer()


class Collected:
    """One answer put together from its parts."""

    def __init__(self, chat: bool) -> None:
        self._chat = chat
        self._parts: list[str] = []
        self._extra: dict[str, list[str]] = {}
        self._model, self._finish = "", ""
        self._usage: dict[str, Any] | None = None

    def envelope(self, body: dict[str, Any]) -> None:
        """Takes model and usage of a reply or chunk."""
        if body.get("error"):
            raise Unstorable("upstream-error")
        unknown = [name for name, value in body.items() if name not in _ENVELOPE and value]
        if unknown:
            # vLLM adds null fields of its own; a field that says something might not be true the next time.
            raise Unstorable(f"unknown-field:{unknown[0]}"[:64])
        self._model = body["model"] if isinstance(body.get("model"), str) else self._model
        self._usage = body["usage"] if isinstance(body.get("usage"), dict) else self._usage

    def choice(self, choice: dict[str, Any], holder: str) -> None:
        """Takes text and finish reason of a choice whose message is under `holder`."""
        if choice.get("index", 0) != 0:
            raise Unstorable("several-choices")
        message = choice.get(holder) if holder else {"content": choice.get("text")}
        if choice.get("logprobs") or not isinstance(message, dict):
            raise Unstorable("unknown-form")
        for name, value in choice.items():
            if value and name not in _CHOICE and not (name in _STOPPED and isinstance(value, int)):
                raise Unstorable(f"field:{name}"[:64])
        for name, value in message.items():
            if name == "role" or value is None or value == []:
                continue
            if not isinstance(value, str) or name == "refusal":
                # Tool calls, audio, annotations, refusals: not an answer to be repeated.
                raise Unstorable(f"field:{name}"[:64])
            (self._parts if name == "content" else self._extra.setdefault(name, [])).append(value)
        if choice.get("finish_reason"):
            self._finish = str(choice["finish_reason"])

    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            Unstorable: if it did not finish with "stop" or is empty.
        """
        if self._finish != "stop":
            raise Unstorable(f"finish:{self._finish or 'none'}"[:64])
        text = "".join(self._parts)
        if not text:
            raise Unstorable("empty")
        return Answer(text, self._model, self._usage, {name: "".join(parts) for name, parts in self._extra.items()})


class StreamCollector:
    """Puts the answer together from a stream of server-sent events, whatever the bytes are cut into.

    Args:
        chat: chat or text completion chunks.
        limit: most bytes of an event or of the whole answer; a longer one is not stored.
    """

    def __init__(self, chat: bool, limit: int = 4_000_000) -> None:
        self._chat, self._limit = chat, limit
        self._collected = Collected(chat)
        self._pending, self._data, self._size = b"", [], 0  # type: tuple[bytes, list[bytes], int]
        self._done = False
        self._why: str | None = None

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes; never raises, an unusable stream is remembered as such."""
        if self._why is not None:
            return
        self._size += len(chunk)
        if self._size > self._limit:
            self._give_up("too-large")
            return
        self._pending += chunk
        # A lone \r at the end may be half of \r\n: it stays pending.
        *lines, self._pending = re.split(rb"\r\n|\n|\r(?!$)", self._pending)
        try:
            for line in lines:
                self._line(line)
        except Unstorable as verdict:
            self._give_up(str(verdict))
        except (ValueError, LookupError, TypeError, AttributeError):
            self._give_up("malformed-stream")

    @property
    def done(self) -> bool:
        """Whether `[DONE]` was seen and nothing spoke against the answer."""
        return self._done and self._why is None

    def answer(self) -> Answer:
        """The whole answer, once the stream has ended.

        Raises:
            Unstorable: if `[DONE]` was missing or the answer is not a complete plain text.
        """
        if self._why is not None:
            raise Unstorable(self._why)
        if not self._done:
            raise Unstorable("no-done")
        return self._collected.answer()

    def _give_up(self, why: str) -> None:
        self._why, self._pending, self._data = why, b"", []

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif line.startswith(b"event:") and line[6:].strip() == b"error":
            raise Unstorable("upstream-error")
        elif not line and self._data:
            event, self._data = b"\n".join(self._data), []
            self._event(event)

    def _event(self, event: bytes) -> None:
        if self._done:
            raise Unstorable("data-after-done")
        if event.strip() == b"[DONE]":
            self._done = True
            return
        body = json.loads(event)
        self._collected.envelope(body)
        choices = body.get("choices") or []
        if len(choices) > 1:
            raise Unstorable("several-choices")
        for choice in choices:
            self._collected.choice(choice, "delta" if self._chat else "")


def _head(answer: Answer, *, chat: bool, model: str, streamed: bool) -> dict[str, Any]:
    kind = ("chat.completion" if chat else "text_completion") + (".chunk" if chat and streamed else "")
    prefix = "chatcmpl" if chat else "cmpl"
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model or answer.model,
    }


def as_body(answer: Answer, *, chat: bool, model: str) -> bytes:
    """A complete JSON reply with a fresh id and the caller's model name."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "stop"}
    if chat:
        choice["message"] = {"role": "assistant", "content": answer.text, **answer.extra}
    else:
        choice["text"] = answer.text
    reply = {**_head(answer, chat=chat, model=model, streamed=False), "choices": [choice]}
    if answer.usage is not None:
        reply["usage"] = answer.usage
    return json.dumps(reply).encode()


def pieces(text: str, size: int = 24) -> Iterator[str]:
    """A text in pieces of at least `size` characters, cut at white space; they join to exactly the text."""
    held = ""
    for match in _PIECE.finditer(text):
        held += match.group()
        if len(held) >= size:
            yield held
            held = ""
    if held:
        yield held


def as_events(answer: Answer, *, chat: bool, model: str, include_usage: bool) -> Iterator[bytes]:
    """The same answer as server-sent events, ending with `[DONE]`; the pieces concatenate to the stored text."""
    head = _head(answer, chat=chat, model=model, streamed=True)
    no_usage = {"usage": None} if include_usage else {}

    def event(choice: dict[str, Any] | None, **more: Any) -> bytes:
        choices = [] if choice is None else [{"index": 0, **choice, "logprobs": None}]
        return b"data: " + json.dumps({**head, "choices": choices, **no_usage, **more}).encode() + b"\n\n"

    def part(field: str, text: str) -> bytes:
        body = {"delta": {field: text}} if chat else {"text": text}
        return event({**body, "finish_reason": None})

    if chat:
        yield event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        for name, value in answer.extra.items():
            yield from (part(name, piece) for piece in pieces(value))
    yield from (part("content", piece) for piece in pieces(answer.text))
    yield event({**({"delta": {}} if chat else {"text": ""}), "finish_reason": "stop"})
    if include_usage and answer.usage is not None:
        yield event(None, usage=answer.usage)
    yield b"data: [DONE]\n\n"
