"""The proxy over real sockets with the `openai` client: hits, streams, bypass, controls, single flight."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai
import pytest

from elision.serving.bench.upstream import ScriptedUpstream, truth
from elision.serving.semantic.config import ServeConfig
from elision.serving.semantic.policies import checked
from elision.serving.semantic.proxy.app import Proxy
from elision.serving.semantic.proxy.server import running

CONFIG = {
    "default": {"threshold": 0.75, "ttl": 3600},
    "categories": {"code": {"threshold": 0.95}, "legal": {"enabled": False}},
    "encoder": {"kind": "hash"},
    "store": {"url": ":memory:"},
}


@dataclass
class Service:
    upstream: ScriptedUpstream
    proxy: Proxy
    url: str

    def client(self, key: str = "key-a") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def chat(self, text: str, key: str = "key-a", headers: dict[str, str] | None = None, **fields) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
        headers = {"authorization": f"Bearer {key}", **(headers or {})}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=20)

    def ready(self) -> None:
        for _ in range(200):
            if httpx.get(f"{self.url}/health").json()["status"] == "ok":
                return
            time.sleep(0.02)
        raise AssertionError("the proxy did not become ready")


@pytest.fixture
def service() -> Iterator[Service]:
    upstream = ScriptedUpstream()
    with running(upstream.app) as up:
        proxy = Proxy(up, checked(ServeConfig, CONFIG, "config"))
        with running(proxy.app) as url:
            it = Service(upstream, proxy, url)
            it.ready()
            yield it


def test_same_question_three_ways(service: Service) -> None:
    ask = service.client().chat.completions.with_raw_response.create
    first = ask(model="m", messages=[{"role": "user", "content": "What is the capital of France?"}])
    second = ask(model="m", messages=[{"role": "user", "content": "What is the capital of France?"}])
    third = ask(model="m", messages=[{"role": "user", "content": "what is the capital of france"}])
    outcomes = [(r.headers["x-elision-cache"], r.headers["x-elision-reason"]) for r in (first, second, third)]
    assert outcomes == [("miss", "no-entry"), ("hit", "exact"), ("hit", "semantic")]
    texts = {r.parse().choices[0].message.content for r in (first, second, third)}
    assert texts == {truth("What is the capital of France?")}
    assert third.headers["x-elision-category"] == "default"
    assert 0.75 <= float(third.headers["x-elision-score"]) <= 1
    assert float(third.headers["x-elision-age"]) >= 0
    assert second.parse().usage.total_tokens == first.parse().usage.total_tokens
    assert second.parse().id != first.parse().id


@pytest.mark.parametrize("first_streams", [True, False])
def test_9_streamed_hit_concatenates_to_the_stored_text(service: Service, first_streams: bool) -> None:
    client = service.client()
    asked = {"model": "m", "messages": [{"role": "user", "content": "Tell me   about\nfoxes, déjà vu, 狐"}]}
    first = client.chat.completions.with_raw_response.create(**asked, stream=first_streams)
    if first_streams:
        text = "".join(c.choices[0].delta.content or "" for c in first.parse())
    else:
        text = first.parse().choices[0].message.content
    raw = client.chat.completions.with_raw_response.create(**asked, stream=True, stream_options={"include_usage": True})
    assert raw.headers["x-elision-cache"] == "hit"
    assert raw.headers["content-type"].startswith("text/event-stream")
    chunks = list(raw.parse())
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == text
        == truth(asked["messages"][0]["content"])
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({c.id for c in chunks}) == 1
    # A stream without usage stores none, and none is made up.
    assert (chunks[-1].usage is None) == first_streams


def test_9_text_completions_too(service: Service) -> None:
    client = service.client()
    first = client.completions.create(model="m", prompt="Once upon a time")
    stream = client.completions.with_raw_response.create(model="m", prompt="Once upon a time", stream=True)
    assert stream.headers["x-elision-cache"] == "hit"
    assert "".join(c.choices[0].text for c in stream.parse()) == first.choices[0].text


BYPASSES = [
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
    ({"n": 2}, "n"),
    ({"temperature": 1.5}, "temperature"),
    ({"logprobs": True}, "logprobs"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"store": True}, "stored-upstream"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}, "not-text"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}, {"role": "user", "content": "x"}]}, "tools"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "last-message-not-user"),
]


@pytest.mark.parametrize(("fields", "reason"), BYPASSES, ids=[reason for _, reason in BYPASSES])
def test_bypass(service: Service, fields: dict[str, object], reason: str) -> None:
    for _ in range(2):
        reply = service.chat("hello", **fields)
        assert (reply.headers["x-elision-cache"], reply.headers["x-elision-reason"]) == ("bypass", reason)
    assert sum(service.upstream.calls.values()) == 2
    assert len(service.proxy.cache) == 0


def test_whatever_shapes_the_answer_separates_it(service: Service) -> None:
    user = {"role": "user", "content": "hello there"}
    variants = [
        {"messages": [user]},
        {"messages": [{"role": "system", "content": "be brief"}, user]},
        {"messages": [{"role": "system", "content": "be long"}, user]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}, user]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b"}, user]},
        {"messages": [{**user, "name": "eve"}]},
        {"messages": [user], "model": "other"},
        {"messages": [user], "temperature": 0.3},
        {"messages": [user], "seed": 1},
        {"messages": [user], "user": "u1"},
        {"messages": [user], "response_format": {"type": "json_object"}},
        {"messages": [user], "some_future_field": {"a": [1]}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo there"}]}
            ]
        },
    ]
    for fields in variants:
        assert service.chat("-", **fields).headers["x-elision-cache"] == "miss", fields
    for fields in variants:
        assert service.chat("-", **fields).headers["x-elision-cache"] == "hit", fields
    for headers in ({"x-elision-tenant": "b"}, {"openai-organization": "o"}):
        assert service.chat("hello there", headers=headers).headers["x-elision-cache"] == "miss"
    assert service.chat("hello there", key="key-b").headers["x-elision-cache"] == "miss"


def test_a_tenant_header_cannot_name_somebody_elses_tenant(service: Service) -> None:
    service.chat("secret question", key="victim")
    victim = next(iter(service.proxy.cache.tenants()))
    for headers in ({"x-elision-tenant": victim}, {"x-elision-tenant": ""}, {"x-elision-tenant": victim.split(":")[1]}):
        assert service.chat("secret question", key="thief", headers=headers).headers["x-elision-cache"] == "miss"


def test_request_controls(service: Service) -> None:
    def outcome(control: str, text: str = "q") -> tuple[int, str, str]:
        r = service.chat(text, headers={"cache-control": control})
        return r.status_code, r.headers["x-elision-cache"], r.headers["x-elision-reason"]

    assert outcome("only-if-cached") == (504, "miss", "no-entry")
    assert outcome("no-store") == (200, "miss", "no-entry")
    assert len(service.proxy.cache) == 0
    assert outcome("") == (200, "miss", "no-entry")
    assert outcome("only-if-cached") == (200, "hit", "exact")
    assert outcome("no-store") == (200, "hit", "exact")
    old = next(iter(service.proxy.cache.entries()))
    assert outcome("no-cache") == (200, "bypass", "no-cache")
    (new,) = service.proxy.cache.entries()
    assert new.id != old.id
    time.sleep(0.05)
    assert outcome("max-age=0")[1] == "miss"
    assert outcome("max-age=100")[1] == "hit"
    assert outcome("max-age=x") == (200, "bypass", "malformed-cache-control")


def test_category_header_and_its_policy(service: Service) -> None:
    assert service.chat("x y z", headers={"x-elision-category": "legal"}).headers["x-elision-reason"] == "category-off"
    assert service.chat("x y z", headers={"x-elision-category": "code"}).headers["x-elision-category"] == "code"
    assert service.chat("x y z", headers={"x-elision-category": "nonsense"}).headers["x-elision-category"] == "default"


def test_callers_own_ttl_shortens(service: Service) -> None:
    service.chat("short lived", headers={"x-elision-ttl": "0.05"})
    time.sleep(0.1)
    assert service.chat("short lived").headers["x-elision-cache"] == "miss"


def test_pass_through_is_unchanged(service: Service) -> None:
    client = service.client()
    made = client.embeddings.with_raw_response.create(model="e", input=["abc", "de"], encoding_format="float")
    assert made.headers["x-elision-reason"] == "not-cached"
    assert [row.embedding for row in made.parse().data] == [[3.0, 1.0], [2.0, 1.0]]
    assert [m.id for m in client.models.list()] == ["scripted"]
    reply = service.chat("hello", headers={"x-custom": "1", "x-elision-category": "code"})
    assert reply.status_code == 200
    sent = service.upstream.headers[-1]
    assert sent["x-custom"] == "1"
    assert sent["authorization"] == "Bearer key-a"
    assert not [name for name in sent if name.startswith("x-elision")]


@pytest.mark.parametrize("stream", [True, False])
def test_single_flight(service: Service, stream: bool) -> None:
    service.upstream.delay, service.upstream.pause = 0.2, 0.01

    async def many() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=20) as client:
            body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": "everyone asks"}]}
            url, headers = f"{service.url}/v1/chat/completions", {"authorization": "Bearer a"}
            return await asyncio.gather(*(client.post(url, json=body, headers=headers) for _ in range(20)))

    replies = asyncio.run(many())
    assert service.upstream.calls["everyone asks"] == 1
    assert len({r.content for r in replies}) == 1
    assert sorted(r.headers["x-elision-reason"] for r in replies) == ["no-entry"] + ["single-flight"] * 19
    assert service.chat("everyone asks", key="a").headers["x-elision-cache"] == "hit"


def test_single_flight_never_crosses_tenants(service: Service) -> None:
    service.upstream.delay = 0.2

    async def many() -> None:
        async with httpx.AsyncClient(timeout=20) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "shared words"}]}
            url = f"{service.url}/v1/chat/completions"
            await asyncio.gather(
                *(client.post(url, json=body, headers={"authorization": f"Bearer {k}"}) for k in "abcabc")
            )

    asyncio.run(many())
    assert service.upstream.calls["shared words"] == 3


def test_false_hit_report(service: Service) -> None:
    service.chat("what is up", key="owner")
    hit = service.chat("what is up", key="owner")
    entry = hit.headers["x-elision-entry"]

    def report(key: str) -> int:
        return httpx.post(
            f"{service.url}/elision/report", content=entry, headers={"authorization": f"Bearer {key}"}
        ).status_code

    assert report("thief") == 404
    assert report("owner") == 204
    assert report("owner") == 404
    assert service.chat("what is up", key="owner").headers["x-elision-cache"] == "miss"
    assert service.proxy.cache.stats.table()["default"]["reported"] == 1


def test_metrics_and_health(service: Service) -> None:
    service.chat("a b c")
    service.chat("a b c")
    text = httpx.get(f"{service.url}/metrics").text
    assert 'elision_cache_events_total{category="default",event="exact"} 1.0' in text
    assert 'elision_requests_total{outcome="hit",path="/v1/chat/completions",status="200"} 1.0' in text
    assert "a b c" not in text
    assert "key-a" not in text
    assert httpx.get(f"{service.url}/health").json() == {"status": "ok", "problem": None}


def test_replies_parse_as_sse_line_by_line(service: Service) -> None:
    service.chat("line by line")
    raw = service.chat("line by line", stream=True).content
    events = raw.decode().split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    for event in events[:-2]:
        assert event.startswith("data: ")
        body = json.loads(event[6:])
        assert body["object"] == "chat.completion.chunk"
        assert body["model"] == "m"
