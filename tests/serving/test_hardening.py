"""What callers must not be able to do to each other, to the upstream, or to the numbers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
from starlette.testclient import TestClient

from elision.serving.semantic.config import ServeConfig
from elision.serving.semantic.policies import checked
from elision.serving.semantic.proxy.app import Proxy

CONFIG: dict[str, Any] = {
    "default": {"threshold": 0.9, "ttl": 3600},
    "encoder": {"kind": "hash"},
    "store": {"url": ":memory:"},
}
CHAT = "/v1/chat/completions"


class Upstream:
    """Answers everything in process and keeps what it was asked."""

    def __init__(self, **choice: object) -> None:
        self.asked: list[httpx.Request] = []
        self.choice, self.headers = choice, {"set-cookie": "session=first; Path=/"}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = f"answer {len(self.asked)}"
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "text": answer}
        body = {"model": "m", "choices": [{**choice, "finish_reason": "stop", **self.choice}]}
        headers = {"content-type": "application/json", **self.headers}
        return httpx.Response(200, stream=httpx.ByteStream(json.dumps(body).encode()), headers=headers)


@contextlib.contextmanager
def serving(upstream: Upstream, **config: object) -> Iterator[TestClient]:
    settings = checked(ServeConfig, {**CONFIG, **config}, "config")
    proxy = Proxy("http://up", settings, transport=httpx.MockTransport(upstream))
    proxy.cache.load()
    with TestClient(proxy.app) as client:
        yield client


def chat(text: object, **fields: object) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def test_cookies_of_one_caller_do_not_travel_with_another() -> None:
    upstream = Upstream()
    with serving(upstream) as client:
        for key in ("a", "b"):
            client.cookies.clear()
            client.post(CHAT, json=chat("hello there"), headers={"authorization": f"Bearer {key}"})
        client.cookies.clear()
        client.get("/v1/models", headers={"cookie": "own=1"})
    assert [request.headers.get("cookie") for request in upstream.asked] == [None, None, "own=1"]


def test_no_path_and_no_host_header_leads_out_of_v1() -> None:
    upstream = Upstream()
    with serving(upstream) as client:
        for path in ("/v1/%2e%2e/metrics", "/v1/x/..%2f..%2fmetrics", "/v1/models/%2e%2e/%2e%2e/metrics"):
            assert client.get(path).status_code == 400, path
        assert not upstream.asked
        client.get("/v1/models/org%2Fname%3Fx?limit=1", headers={"host": "h/metrics?"})
        client.post(CHAT, json=chat("hello there"), headers={"host": "h/v1/completions?"})
    assert [str(request.url) for request in upstream.asked] == [
        "http://up/v1/models/org%2Fname%3Fx?limit=1",
        f"http://up{CHAT}",
    ]


def test_headers_of_one_connection_and_headers_in_several_lines() -> None:
    upstream = Upstream()
    with serving(upstream) as client:
        headers = [("connection", "x-secret"), ("x-secret", "1"), ("x-list", "a"), ("x-list", "b")]
        client.get("/v1/models", headers=headers)
        assert "x-secret" not in upstream.asked[-1].headers
        assert upstream.asked[-1].headers["x-list"] == "a, b"
        both = [("cache-control", "max-age=60"), ("cache-control", "no-store")]
        outcomes = [client.post(CHAT, json=chat("hello there"), headers=both).headers for _ in range(2)]
    assert [headers["x-elision-cache"] for headers in outcomes] == ["miss", "miss"]
