"""Replies to callers: a stored answer, or the bytes of a flight as they come."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elision.serving.semantic.proxy.flight import Head, Reader

log = logging.getLogger("elision.serve")

# Headers that belong to one connection (RFC 9110), and those that this proxy sets by itself.
_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
_NOT_SENT = _HOP | {"host", "content-length", "accept-encoding", "expect"}
_NOT_RETURNED = _HOP | {"date", "server"}


class CallerGone(Exception):
    """The caller closed the connection before the reply began."""


def merged(headers: Headers) -> dict[str, str]:
    """Headers by lower-case name; those that came in several lines are joined, so that none of them is overlooked."""
    lines: dict[str, list[str]] = {}
    for name, value in headers.items():
        lines.setdefault(name.lower(), []).append(value)
    return {name: ("; " if name == "cookie" else ", ").join(values) for name, values in lines.items()}


def query_of(request: Request, mark: str = "") -> str:
    """The query as the caller wrote it, after a mark if there is one. (`request.url` believes the Host header.)"""
    query = request.scope["query_string"].decode("latin-1")
    return mark + query if query else ""


def raw_path(request: Request) -> str | None:
    """The path with its escapes as the caller wrote them; `None` for one that steps upwards, even when decoded."""
    if {".", ".."} & set(re.split(r"[/\\]", request.scope["path"])):
        return None
    raw: bytes = request.scope.get("raw_path") or quote(request.scope["path"]).encode()
    return raw.split(b"?")[0].decode("latin-1")


def _of_connection(header: str) -> frozenset[str]:
    """The names that a Connection header declares to be of this connection only."""
    return frozenset(name.strip().lower() for name in header.split(","))


def to_upstream(headers: Mapping[str, str]) -> dict[str, str]:
    """The caller's headers for the upstream; identity encoding, so that the proxy can read the reply."""
    not_sent = _NOT_SENT | _of_connection(headers.get("connection", ""))
    kept = {
        name: value for name, value in headers.items() if name not in not_sent and not name.startswith("x-elision-")
    }
    return {**kept, "accept-encoding": "identity"}


def from_upstream(response: httpx.Response) -> Head:
    """Status and headers of an upstream reply for the caller."""
    raw = [(name.lower(), value) for name, value in response.headers.raw]
    not_returned = _NOT_RETURNED | _of_connection(response.headers.get("connection", ""))
    kept = [(name, value) for name, value in raw if name.decode("latin-1") not in not_returned]
    # What these headers say is the proxy's word alone.
    return response.status_code, [(name, value) for name, value in kept if not name.startswith(b"x-elision-")]


def error_reply(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the form of OpenAI's API."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": kind}}
    return Response(json.dumps(body), status, dict(headers or {}), "application/json")


def upstream_error(error: BaseException, headers: Mapping[str, str]) -> Response:
    """The reply for an upstream that could not be asked: 504 for a time-out, else 502.

    Raises:
        BaseException: any error that is not the upstream's.
    """
    if isinstance(error, httpx.TimeoutException):
        return error_reply(504, "upstream_timeout", f"no answer in time ({type(error).__name__})", headers)
    if isinstance(error, httpx.HTTPError | ConnectionError):
        return error_reply(502, "upstream_unreachable", f"the upstream failed ({type(error).__name__})", headers)
    raise error


async def _gone(receive: Receive) -> None:
    """Returns when the caller has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def head_of(reader: Reader, request: Request) -> Head:
    """The head of a flight, unless the caller leaves first.

    Raises:
        CallerGone: if the caller left.
        BaseException: whatever ended the flight.
    """
    head, gone = asyncio.ensure_future(reader.head()), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({head, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not head.done():
            raise CallerGone
        return head.result()
    finally:
        head.cancel()
        gone.cancel()


class Relay(Response):
    """Sends a flight's bytes to one caller; leaves the flight when done, or when the caller has left or stalled.

    Args:
        reader: this caller's reader.
        head: status and headers.
        extra: headers to add.
        timeout: seconds a caller may take to accept a chunk.
    """

    def __init__(self, reader: Reader, head: Head, extra: Mapping[str, str], timeout: float) -> None:
        super().__init__(status_code=head[0])
        self._reader, self._timeout = reader, timeout
        own = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in extra.items()]
        self.raw_headers = [*head[1], *own]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI reply."""
        pump, gone = asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        except TimeoutError:
            log.warning("a caller accepted nothing for %.0f s: connection closed", self._timeout)
        except OSError:
            log.info("a caller left during the reply")
        except (httpx.HTTPError, asyncio.CancelledError) as error:
            # The head is sent already. Ending without a last chunk makes the server close the connection, which tells
            # the caller that the reply is broken; anything else would pass for a whole one.
            log.warning("the upstream broke off during a reply (%s)", type(error).__name__)
            if isinstance(error, asyncio.CancelledError) and not pump.done():
                raise
        finally:
            pump.cancel()
            gone.cancel()
            await self._reader.close()

    async def _pump(self, send: Send) -> None:
        async def put(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self._timeout)

        await put({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._reader.chunks():
            await put({"type": "http.response.body", "body": chunk, "more_body": True})
        await put({"type": "http.response.body", "body": b"", "more_body": False})
