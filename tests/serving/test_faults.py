"""What goes wrong upstream, downstream and in between: nothing partial is stored, and the proxy keeps serving."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
import pytest

from elision.errors import StoreUnavailable
from elision.serving.bench.upstream import ScriptedUpstream, truth
from elision.serving.semantic import EmbeddingError
from elision.serving.semantic.config import ServeConfig
from elision.serving.semantic.policies import checked
from elision.serving.semantic.proxy.answers import StreamCollector, Unstorable, from_body
from elision.serving.semantic.proxy.app import Proxy
from elision.serving.semantic.proxy.requests import CHAT
from elision.serving.semantic.proxy.server import running

from .test_proxy import CONFIG, Service, service  # noqa: F401  (a fixture)


def still_serves(service: Service) -> None:  # noqa: F811
    assert service.chat("are you still there").status_code == 200
    assert service.chat("are you still there").headers["x-elision-cache"] == "hit"


@pytest.mark.parametrize("fault", ["500", "429", "garbage", "length"])
def test_bad_replies_pass_and_are_not_stored(service: Service, fault: str) -> None:  # noqa: F811
    replies = [service.chat(f"please [{fault}]") for _ in range(2)]
    assert [r.headers["x-elision-cache"] for r in replies] == ["miss", "miss"]
    if fault.isdecimal():
        assert {r.status_code for r in replies} == {int(fault)}
        assert replies[0].json()["error"]["message"] == "scripted"
    assert service.upstream.calls[f"please [{fault}]"] == 2
    assert len(service.proxy.cache) == 0
    still_serves(service)


@pytest.mark.parametrize("fault", ["broken", "no-done", "length", "error-event"])
def test_bad_streams_pass_and_are_not_stored(service: Service, fault: str) -> None:  # noqa: F811
    def read() -> bytes:
        got = b""
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": f"please [{fault}]"}]}
        with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=20) as r:
            for chunk in r.iter_raw():
                got += chunk
        return got

    for _ in range(2):
        if fault == "broken":
            # The caller must see that the stream broke: it is not closed as if it were whole.
            with pytest.raises(httpx.RemoteProtocolError):
                read()
        else:
            assert b"data: " in read()
    assert service.upstream.calls[f"please [{fault}]"] == 2
    assert len(service.proxy.cache) == 0
    still_serves(service)


def test_upstream_down_and_slow(service: Service) -> None:  # noqa: F811
    config = checked(ServeConfig, {**CONFIG, "limits": {"connect_timeout": 0.3, "read_timeout": 0.3}}, "c")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{s.getsockname()[1]}"
    with running(Proxy(dead, config).app) as url:
        reply = httpx.post(
            f"{url}/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "x"}]}
        )
        assert reply.status_code == 502
        assert reply.json()["error"]["type"] == "upstream_unreachable"
    upstream = ScriptedUpstream()
    with running(upstream.app) as up:
        proxy = Proxy(up, config)
        with running(proxy.app) as url:
            body = {"model": "m", "messages": [{"role": "user", "content": "[slow]"}]}
            reply = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert reply.status_code == 504
            assert reply.json()["error"]["type"] == "upstream_timeout"
            body["messages"][0]["content"] = "fast"
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
            assert len(proxy.cache) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": 1}',
        b'{"model": "m"}',
        b'{"model": "m", "messages": "x"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "m", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    ],
    ids=range(10),
)
def test_malformed_requests_reach_the_upstream_unchanged(service: Service, raw: bytes) -> None:  # noqa: F811
    reply = httpx.post(f"{service.url}/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert reply.headers["x-elision-cache"] == "bypass"
    assert reply.headers["x-elision-reason"] == "malformed"
    assert len(service.proxy.cache) == 0
    still_serves(service)


def test_10_mb_prompts(service: Service) -> None:  # noqa: F811
    text = "word " * 2_000_000
    first, second = service.chat(text), service.chat(text)
    assert first.status_code == second.status_code == 200
    assert second.headers["x-elision-cache"] == "hit"
    over = service.chat("x" * 33_000_000)
    assert over.status_code == 413
    assert "limits.body" in over.json()["error"]["message"]
    still_serves(service)


def test_callers_that_leave_end_the_upstream_request(service: Service) -> None:  # noqa: F811
    service.upstream.pause = 0.05

    async def leave_early() -> None:
        async with httpx.AsyncClient(timeout=20) as client:
            body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "a long story"}]}
            async with client.stream("POST", f"{service.url}/v1/chat/completions", json=body) as r:
                async for _ in r.aiter_raw():
                    break

    asyncio.run(leave_early())
    for _ in range(100):
        if service.upstream.cancelled:
            break
        time.sleep(0.02)
    assert service.upstream.cancelled == 1
    assert len(service.proxy.cache) == 0
    assert len(service.proxy._flights) == 0
    service.upstream.pause = 0.0
    still_serves(service)


def test_one_leaves_the_others_stay(service: Service) -> None:  # noqa: F811
    service.upstream.delay, service.upstream.pause = 0.2, 0.02
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "for all of us"}]}

    async def read(client: httpx.AsyncClient, leave: bool) -> str:
        got = b""
        async with client.stream("POST", f"{service.url}/v1/chat/completions", json=body) as r:
            async for chunk in r.aiter_raw():
                got += chunk
                if leave:
                    break
        return got.decode()

    async def all_of_them() -> list[str]:
        async with httpx.AsyncClient(timeout=20) as client:
            return await asyncio.gather(read(client, True), *(read(client, False) for _ in range(3)))

    _, *rest = asyncio.run(all_of_them())
    assert service.upstream.calls["for all of us"] == 1
    assert all("[DONE]" in text for text in rest)
    assert service.chat("for all of us", key="other").status_code == 200


def test_slow_caller_delays_nobody(service: Service) -> None:  # noqa: F811
    """A caller that reads nothing holds its own reply only; one that stalls for longer than the limit is dropped."""
    host, port = service.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "slow reader"}], "stream": True})
    with socket.create_connection((host, int(port))) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        s.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        time.sleep(0.3)
        start = time.perf_counter()
        for _ in range(10):
            assert service.chat("fast reader").status_code == 200
        assert time.perf_counter() - start < 5
    # A caller that never finishes sending its request holds nothing either.
    with socket.create_connection((host, int(port))) as s:
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        still_serves(service)
    still_serves(service)


def test_stalled_caller_is_dropped() -> None:
    config = checked(ServeConfig, {**CONFIG, "limits": {"client_timeout": 0.3, "answer": 100_000}}, "c")

    async def endless(scope, receive, send):
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(4000):
            await send({"type": "http.response.body", "body": b": " + b"x" * 9998 + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    with running(endless) as up:
        proxy = Proxy(up, config)
        with running(proxy.app) as url:
            host, port = url.removeprefix("http://").split(":")
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "never reads"}], "stream": True})
            with socket.create_connection((host, int(port))) as s:
                s.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
                time.sleep(0.2)
                assert len(proxy._flights) == 1
                (flight,) = proxy._flights._flights.values()
                for _ in range(100):
                    if not len(proxy._flights):
                        break
                    time.sleep(0.05)
                assert len(proxy._flights) == 0
                # 40 MB were offered; what was held stayed near the limit.
                assert flight._size <= 200_000


def test_store_down_is_pass_through(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    store = service.proxy.cache.store.store

    def down(*_: object) -> None:
        raise StoreUnavailable("scripted: the store is down")

    service.chat("before")
    for name in ("get", "put", "delete", "ping"):
        monkeypatch.setattr(store, name, down)
    reply = service.chat("before")
    assert reply.status_code == 200
    assert (reply.headers["x-elision-cache"], reply.headers["x-elision-reason"]) == ("miss", "store-unavailable")
    assert reply.json()["choices"][0]["message"]["content"] == truth("before")
    assert httpx.get(f"{service.url}/health").json()["status"] == "degraded"
    assert "elision_degraded 1.0" in httpx.get(f"{service.url}/metrics").text
    monkeypatch.undo()
    service.proxy.cache.store._retry = 0.0
    for _ in range(100):
        if httpx.get(f"{service.url}/health").json()["status"] == "ok":
            break
        time.sleep(0.05)
    assert service.chat("before").headers["x-elision-cache"] == "hit"


def test_encoder_down_is_pass_through(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def down(texts: list[str]) -> None:
        raise EmbeddingError("scripted: no encoder")

    monkeypatch.setattr(service.proxy._batcher, "_embedder", down)
    reply = service.chat("anything")
    assert (reply.status_code, reply.headers["x-elision-reason"]) == (200, "embedding-failed")
    assert len(service.proxy.cache) == 0
    monkeypatch.undo()
    still_serves(service)


def test_a_bug_in_the_cache_breaks_no_request(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(service.proxy.cache, "begin", lambda query: 1 / 0)
    reply = service.chat("anything")
    assert (reply.status_code, reply.headers["x-elision-reason"]) == (200, "cache-error")
    assert "elision_cache_errors_total 1.0" in httpx.get(f"{service.url}/metrics").text


STREAM = (
    b'data: {"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    b': comment\r\n\r\ndata: {"model":"m","choices":[{"index":0,"delta":{"content":"Hel"}}]}\r\n\r\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"lo \xe7\x8b\x90"},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"total_tokens":3}}\n\ndata: [DONE]\n\n'
)


def test_streams_cut_anywhere_collect_the_same() -> None:
    for size in range(1, len(STREAM)):
        collector = StreamCollector(chat=True)
        for at in range(0, len(STREAM), size):
            collector.feed(STREAM[at : at + size])
        answer = collector.answer()
        assert (answer.text, answer.model, answer.usage) == ("Hello 狐", "m", {"total_tokens": 3})


def test_no_proper_prefix_of_a_stream_is_an_answer() -> None:
    for end in range(len(STREAM) - 1):
        collector = StreamCollector(chat=True)
        collector.feed(STREAM[:end])
        with pytest.raises(Unstorable):
            collector.answer()


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]}', "field:tool_calls"),
        (b'{"choices":[{"index":1,"delta":{"content":"x"}}]}', "several-choices"),
        (b'{"choices":[{"index":0,"delta":{"refusal":"no"}}]}', "field:refusal"),
        (b'{"choices":[{"index":0,"delta":{"content":"x"},"logprobs":{"content":[]}}]}', "unknown-form"),
        (b'{"citations":["u"],"choices":[]}', "unknown-field:citations"),
        (b'{"error":{"message":"x"},"choices":[]}', "upstream-error"),
        (b"{", "malformed-stream"),
        (b"[1]", "malformed-stream"),
    ],
)
def test_unusual_events_are_never_stored(event: bytes, why: str) -> None:
    collector = StreamCollector(chat=True)
    collector.feed(b"data: " + event + b"\n\n" + STREAM)
    with pytest.raises(Unstorable, match=why):
        collector.answer()


def test_bodies() -> None:
    good = {
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
    }
    assert from_body(json.dumps(good).encode(), chat=True).text == "x"
    for change in (
        {"finish_reason": "length"},
        {"message": {"content": ""}},
        {"message": {"content": None}},
        {"message": None},
    ):
        bad = {**good, "choices": [{**good["choices"][0], **change}]}
        with pytest.raises(Unstorable):
            from_body(json.dumps(bad).encode(), chat=True)
    for raw in (
        b"",
        b"{}",
        b"[]",
        b'{"choices": []}',
        b'{"choices": 1}',
        json.dumps({**good, "choices": good["choices"] * 2}).encode(),
    ):
        with pytest.raises(Unstorable):
            from_body(raw, chat=True)
    collector = StreamCollector(chat=True, limit=50)
    collector.feed(STREAM)
    with pytest.raises(Unstorable, match="too-large"):
        collector.answer()
