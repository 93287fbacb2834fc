"""What callers must not be able to do to each other, to the upstream, or to the numbers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from elision.errors import OptionError, StoreUnavailable
from elision.serving.semantic import Answer, Partition, Policies, Query, SemanticCache, SQLiteStore
from elision.serving.semantic.config import ServeConfig
from elision.serving.semantic.embed import EndpointEncoder, HashEncoder
from elision.serving.semantic.index import IndexOptions, VectorIndex
from elision.serving.semantic.policies import checked
from elision.serving.semantic.proxy.admin import Grant
from elision.serving.semantic.proxy.app import Proxy

from .conftest import FakeClock

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
        self.choice, self.headers = choice, dict[str, str]()

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
    upstream.headers["set-cookie"] = "session=first; Path=/"
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


def asked(client: TestClient, body: dict[str, Any], path: str = CHAT, **headers: str) -> str:
    reply = client.post(
        path, content=json.dumps(body), headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    assert reply.status_code == 200, reply.text
    return f"{reply.headers['x-elision-cache']} {reply.headers['x-elision-reason']}"


def test_every_credential_separates_tenants() -> None:
    same = {"authorization": "Bearer dummy"}
    variants = [{}, {"api_key": "a"}, {"api_key": "b"}, {"x_api_key": "a"}, {"api_key": "a", "x_api_key": "a"}]
    variants += [{"x_forwarded_user": "ann"}, {"x_employee": "7"}]
    with serving(Upstream(), rules={"key_headers": ["X-Employee"]}) as client:
        first = [asked(client, chat("hello there"), **same, **more) for more in variants]
        again = [asked(client, chat("hello there"), **same, **more) for more in variants]
        sessions = [asked(client, chat("hello there"), cookie=f"s={n}") for n in (1, 2, 1)]
        with_key = asked(client, chat("hello there"), **same, cookie="balancer=3")
    assert first == ["miss no-entry"] * len(variants)
    assert again == ["hit exact"] * len(variants)
    assert sessions == ["miss no-entry", "miss no-entry", "hit exact"]
    assert with_key == "hit exact"


def test_white_space_at_the_end_of_a_completion_prompt_separates() -> None:
    with serving(Upstream()) as client:
        prompts = ["def f(x):", "def f(x):\n    ", "def f(x):\n", " def f(x):"]
        for expected in ("miss no-entry", "hit exact"):
            for prompt in prompts:
                assert asked(client, {"model": "m", "prompt": prompt}, "/v1/completions") == expected, repr(prompt)


def test_what_stands_beside_a_part_of_text_separates() -> None:
    part = {"type": "text", "text": "hello there"}
    with serving(Upstream()) as client:
        assert asked(client, chat("hello there")) == "miss no-entry"
        assert asked(client, chat([part])) == "hit exact"
        assert asked(client, chat([{**part, "document": "annex 1"}])) == "miss no-entry"
        assert asked(client, chat([{**part, "document": "annex 2"}])) == "miss no-entry"


def test_ambiguous_and_unprintable_requests_pass_and_break_no_list() -> None:
    with serving(Upstream(), admin={"tokens": [{"sha256": sha256(b"t" * 16).hexdigest()}]}) as client:
        assert asked(client, chat("hello there")) == "miss no-entry"
        twice = json.dumps(chat("hello there"))[:-1] + ', "messages": [{"role": "user", "content": "other"}]}'
        reply = client.post(CHAT, content=twice)
        assert (reply.headers["x-elision-cache"], reply.headers["x-elision-reason"]) == ("bypass", "malformed")
        assert asked(client, chat("half \ud800 a character")) == "bypass malformed"
        assert asked(client, {**chat("hello"), "model": "m\ud800"}) == "bypass malformed"
        assert asked(client, {**chat("hello"), "model": "m" * 300}) == "bypass malformed"
        admin = {"authorization": "Bearer " + "t" * 16}
        for path in ("/metrics", "/admin/stats", "/admin/entries"):
            assert client.get(path, headers=admin).status_code == 200, path


def test_an_answer_that_may_live_for_no_time_is_not_stored() -> None:
    with serving(Upstream()) as client:
        for headers in ({"x_elision_ttl": "0"}, {"cache_control": "s-maxage=0"}):
            assert asked(client, chat("hello there"), **headers) == "miss no-entry"
        assert asked(client, chat("hello there")) == "miss no-entry"


def test_a_category_may_be_named_in_any_script() -> None:
    name = "\u6599\u7406, 100 %\n"
    with serving(Upstream(), categories={name: {}}) as client:
        reply = client.post(CHAT, json=chat("hello there"), headers={"x-elision-category": quote(name)})
        assert unquote(reply.headers["x-elision-category"]) == name
        assert asked(client, chat("hello there"), x_elision_category=quote(name)) == "hit exact"
        assert asked(client, chat("hello there")) == "miss no-entry"


def test_only_if_cached_never_asks_the_upstream() -> None:
    upstream = Upstream()
    with serving(upstream) as client:
        for body in (chat("hello there"), chat("hello there", n=2)):
            assert client.post(CHAT, json=body, headers={"cache-control": "only-if-cached"}).status_code == 504
    assert not upstream.asked


def test_a_choice_that_says_more_is_not_stored() -> None:
    for more, stored in ({"token_ids": [1]}, False), ({"stop_reason": "END"}, False), ({"stop_reason": 2}, True):
        with serving(Upstream(**more)) as client:
            asked(client, chat("hello there"))
            assert asked(client, chat("hello there")) == ("hit exact" if stored else "miss no-entry"), more


def test_encoders_read_the_beginning_of_a_long_text_only() -> None:
    sent: list[str] = []

    def endpoint(request: httpx.Request) -> httpx.Response:
        sent.extend(json.loads(request.content)["input"])
        return httpx.Response(200, json={"data": [{"index": 0, "embedding": [1.0] * 8}]})

    EndpointEncoder("http://e", "m", 8, max_chars=50, transport=httpx.MockTransport(endpoint))(["x" * 99])
    assert sent == ["x" * 50]
    encode = HashEncoder()
    long = "word " * 2000
    assert (encode([long])[0] == encode([long + "other " * 9])[0]).all()


def test_an_entry_from_the_future_is_no_hit_and_stays() -> None:
    clock = FakeClock()
    cache = SemanticCache(HashEncoder(), policies=Policies.parse({"default": {"ttl": 60}}), clock=clock)
    query = Query("hello there", Partition("t", "m"))
    assert cache.insert(query, Answer("x")).stored
    for back, reason in ((30, "exact"), (1000, "clock-skew")):
        clock.tick(-back)
        assert cache.lookup(query).reason == reason
        clock.tick(back)
    assert cache.lookup(query).reason == "exact"


def test_an_insertion_does_not_wait_for_a_background_build() -> None:
    index = VectorIndex(8, IndexOptions(promote=4))
    vectors = np.eye(8, dtype=np.float32)
    with index._build_lock:
        for slot in range(8):
            thread = threading.Thread(target=index.add, args=(slot, vectors[slot]), daemon=True)
            thread.start()
            thread.join(5)
            assert not thread.is_alive()
    assert index.build()
    assert [index.search(vectors[slot], 1)[0][0] for slot in range(8)] == list(range(8))


def test_the_file_of_answers_is_for_its_owner_only(tmp_path: Path) -> None:
    SQLiteStore(tmp_path / "new" / "cache.db").close()
    assert (tmp_path / "new" / "cache.db").stat().st_mode & 0o077 == 0
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot open"):
        SQLiteStore(tmp_path / "file" / "cache.db")


def test_an_upstream_may_forbid_storing() -> None:
    upstream = Upstream()
    upstream.headers["cache-control"] = "private, no-store"
    with serving(upstream) as client:
        assert [asked(client, chat("hello there")) for _ in range(2)] == ["miss no-entry"] * 2
        del upstream.headers["cache-control"]
        assert [asked(client, chat("hello there")) for _ in range(2)] == ["miss no-entry", "hit exact"]


def test_idle_models_add_no_rows_and_half_a_character_can_be_inspected() -> None:
    upstream = Upstream(message={"role": "assistant", "content": "half \ud800"})
    with serving(upstream, admin={"tokens": [{"sha256": sha256(b"t" * 16).hexdigest()}]}) as client:
        for n in range(3):
            asked(client, {**chat("hello there"), "model": f"made-up-{n}"})
        assert 'elision_threshold{category="default",model="made-up' not in client.get("/metrics").text
        id = client.post(CHAT, json=chat("hello there", model="made-up-0")).headers["x-elision-entry"]
        reply = client.get(f"/admin/entries/{id}", headers={"authorization": "Bearer " + "t" * 16})
        assert (reply.status_code, reply.json()["answer"]) == (200, "half \ud800")


def test_two_policy_changes_at_once_both_stay() -> None:
    settings = checked(ServeConfig, {**CONFIG, "categories": {"a": {}, "b": {}}}, "config")
    proxy = Proxy("http://up", settings, grants=[Grant(sha256(b"t").digest(), None)])
    plain = proxy.cache.set_policies

    def slowly(policies: Policies) -> None:
        time.sleep(0.05)
        plain(policies)

    proxy.cache.set_policies = slowly  # type: ignore[method-assign]

    async def both() -> None:
        transport = httpx.ASGITransport(app=proxy.app)
        headers = {"authorization": "Bearer t"}
        async with httpx.AsyncClient(transport=transport, base_url="http://p", headers=headers) as client:
            changes = (client.patch(f"/admin/policies/{name}", json={"threshold": 0.95}) for name in "ab")
            assert [reply.status_code for reply in await asyncio.gather(*changes)] == [200, 200]

    asyncio.run(both())
    assert [proxy.cache.policies.of(name).threshold for name in "ab"] == [0.95, 0.95]


def test_the_check_finds_what_the_start_would(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for text, complaint in (
        ("categories:\n  code: {ttl: 1h}\n  code: {ttl: 2h}\n", "'code' is given twice.*\n.*line 3"),
        ('store: {url: "foo:x"}', "store.url = 'foo:x'.*sqlite:PATH"),
        ("classifier: {examples: {code: []}}\ncategories: {code: {}}", "classifier.examples.code"),
    ):
        path.write_text(text)
        with pytest.raises(OptionError, match=complaint):
            ServeConfig.read(path)


def test_a_damaged_row_does_not_keep_out_the_others(tmp_path: Path) -> None:
    query = Query("hello there", Partition("t", "m"))
    with contextlib.closing(SemanticCache(HashEncoder(), store=SQLiteStore(tmp_path / "c.db"))) as cache:
        assert cache.insert(query, Answer("x")).stored
    with contextlib.closing(sqlite3.connect(tmp_path / "c.db")) as db, db:
        db.execute("INSERT INTO entries VALUES ('old', '[1, 2]', x'00', '{}')")
    with contextlib.closing(SemanticCache(HashEncoder(), store=SQLiteStore(tmp_path / "c.db"))) as cache:
        assert (len(cache), cache.lookup(query).reason) == (1, "exact")
        with contextlib.closing(sqlite3.connect(tmp_path / "c.db")) as db, db:
            db.execute("UPDATE entries SET answer = '{'")
        assert cache.lookup(query).status == "miss"
