"""The proxy: an ASGI application in front of any OpenAI-compatible server.

A request is read (`requests.py`), looked up, and answered from the cache, or flown to the upstream (`flight.py`) and
its whole answer
stored (`answers.py`). The cache never stands between a caller and the upstream: whatever fails in it, the request
passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import string
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from elision.errors import OptionError, StoreUnavailable
from elision.serving.semantic.cache import SemanticCache
from elision.serving.semantic.config import ServeConfig
from elision.serving.semantic.embed import EmbeddingError
from elision.serving.semantic.keys import digest
from elision.serving.semantic.proxy.admin import Admin, Grant, granted
from elision.serving.semantic.proxy.answers import StreamCollector, Unstorable, as_body, as_events, from_body
from elision.serving.semantic.proxy.batching import Batcher
from elision.serving.semantic.proxy.flight import Flight, Flights
from elision.serving.semantic.proxy.loads import Loads
from elision.serving.semantic.proxy.metrics import CONTENT_TYPE, Metrics
from elision.serving.semantic.proxy.relay import (
    CallerGone,
    Relay,
    error_reply,
    from_upstream,
    head_of,
    merged,
    query_of,
    raw_path,
    to_upstream,
    upstream_error,
)
from elision.serving.semantic.proxy.requests import CHAT, COMPLETIONS, Asked, Bypass, cache_control, read, tenant_of
from elision.serving.semantic.sqlite_store import SQLiteStore
from elision.serving.semantic.store import Answer
from elision.serving.semantic.types import Lookup, Question

log = logging.getLogger("elision.serve")
T = TypeVar("T")
SSE = "text/event-stream"
_UPKEEP_EVERY = 0.5
_SWEEP_EVERY = 30.0
_LARGE = 100_000
# A store that hangs must not hold back the end of an answer for longer than this.
_STORE_PATIENCE = 0.25


class TooLarge(Exception):
    """A request body over the limit."""


@dataclass(frozen=True)
class _Job:
    """One request on its way to the upstream."""

    method: str
    url: str
    headers: Mapping[str, str]
    raw: bytes
    asked: Asked | None = None
    found: Lookup | None = None


class Proxy:
    """The application's state and handlers; `app` is the ASGI application.

    Args:
        upstream: base URL of the server, with or without a final "/v1".
        config: everything else.
        transport: an httpx transport for the upstream, for tests.
        cache: a cache of one's own instead of the configured one.
    """

    def __init__(
        self,
        upstream: str,
        config: ServeConfig | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        cache: SemanticCache | None = None,
        grants: Sequence[Grant] = (),
    ) -> None:
        if not upstream.startswith(("http://", "https://")):
            raise OptionError(f"upstream {upstream!r} must start with http:// or https://")
        self.config = config or ServeConfig()
        self.upstream = upstream.rstrip("/").removesuffix("/v1")
        self.loads = Loads(self.config.load.options)
        self.cache = cache if cache is not None else self.config.build_cache(self.loads)
        self.metrics = Metrics(self.cache, self.loads)
        self.grants = [*(Grant(token.digest(), token.tenant) for token in self.config.admin.tokens), *grants]
        self._local = isinstance(self.cache.store.store, SQLiteStore)
        self._flights = Flights(self.config.limits.answer)
        self._batcher = Batcher(self.cache.embedder)
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="elision-cache")
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        self._stores: set[asyncio.Future[None]] = set()
        every = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
        self.app = Starlette(
            routes=[
                Route(CHAT, self._cached, methods=["POST"]),
                Route(COMPLETIONS, self._cached, methods=["POST"]),
                Route("/elision/report", self._report, methods=["POST"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
                Route("/dashboard", self._dashboard, methods=["GET"]),
                *Admin(self.cache, self.metrics, self.grants).routes(),
                Route("/v1/{path:path}", self._passed, methods=every),
            ],
            lifespan=self._lifespan,
        )

    # ------------------------------------------------------------------ life

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        limits = self.config.limits
        timeout = httpx.Timeout(limits.read_timeout, connect=limits.connect_timeout, pool=None)
        pool = httpx.Limits(max_connections=limits.connections, max_keepalive_connections=limits.connections)
        # Tried again only where no connection came about: nothing was sent, so nothing can happen twice.
        transport = self._transport or httpx.AsyncHTTPTransport(limits=pool, retries=2)
        # No jar: a cookie that the upstream set for one caller must not travel with another one's request.
        jar = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        async with httpx.AsyncClient(timeout=timeout, transport=transport, trust_env=False, cookies=jar) as client:
            self._client = client
            upkeep = asyncio.create_task(self._upkeep())
            try:
                yield
            finally:
                upkeep.cancel()
                if self._stores:
                    await asyncio.wait(self._stores, timeout=5.0)
                self._batcher.close()
                self._threads.shutdown(wait=True)
                with contextlib.suppress(StoreUnavailable):  # closing what is already gone
                    self.cache.close()

    async def _upkeep(self) -> None:
        """Loads the store, then takes over others' entries, drops expired ones and reads the upstream's queue."""
        swept, said, building = time.monotonic(), "", False
        while True:
            try:
                if self.cache.problem() is not None or self.config.store.is_shared:
                    await self._thread(self.cache.heal)
                    await self._thread(self.cache.sync)
                building = not await self._thread(self.cache.build)
                if time.monotonic() - swept > _SWEEP_EVERY:
                    swept = time.monotonic()
                    await self._thread(self.cache.sweep)
                if self.config.load.metrics_url is not None:
                    await self._read_queue(self.config.load.metrics_url)
                if said:
                    log.warning("the store works again")
                said = ""
            except StoreUnavailable as error:
                if str(error) != said:
                    log.warning("the cache passes everything through: %s", error)
                said = str(error)
            except Exception:
                self.metrics.errors.inc()
                log.exception("upkeep failed and will be tried again")
            await asyncio.sleep(0.0 if building else _UPKEEP_EVERY)

    async def _read_queue(self, url: str) -> None:
        assert self._client is not None
        try:
            reply = await self._client.get(url, timeout=2.0)
        except httpx.HTTPError as error:
            log.info("no queue length from the upstream: %s", type(error).__name__)
            return
        self.loads.read_vllm(reply.text)

    def _thread(self, action: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, action, *arguments)

    # ------------------------------------------------------------------ cached endpoints

    async def _cached(self, request: Request) -> Response:
        start = time.perf_counter()
        try:
            raw = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except TooLarge:
            return self._too_large()
        headers = merged(request.headers)
        path = request.scope["path"]
        rest = (path, query_of(request), headers, raw, self.config.rules)
        # Megabytes of JSON would hold up everybody else on the event loop.
        asked = await self._thread(read, *rest) if len(raw) > _LARGE else read(*rest)
        job = _Job("POST", self.upstream + path + query_of(request, "?"), to_upstream(headers), raw)
        if isinstance(asked, Bypass):
            if cache_control(headers.get("cache-control", "")).only_if_cached:
                about = {"x-elision-cache": "bypass", "x-elision-reason": asked.reason}
                return error_reply(504, "only_if_cached", "such requests are never cached", about)
            return await self._fly(request, job, {"x-elision-cache": "bypass", "x-elision-reason": asked.reason}, start)
        try:
            found = await self._look_up(asked)
        except Exception:
            # The cache is not allowed to break a request; what broke it is counted and logged in full.
            self.metrics.errors.inc()
            log.exception("a lookup failed; the request passes")
            return await self._fly(
                request, job, {"x-elision-cache": "bypass", "x-elision-reason": "cache-error"}, start
            )
        about = _about(found)
        if found.answer is not None:
            self.metrics.request(path, "hit", 200, time.perf_counter() - start)
            return _hit(asked, found, about)
        if asked.only_if_cached:
            return error_reply(504, "only_if_cached", "no stored answer fits and the caller wants no other", about)
        self.metrics.added(time.perf_counter() - start)
        return await self._fly(request, _Job(job.method, job.url, job.headers, raw, asked, found), about, start)

    async def _look_up(self, asked: Asked) -> Lookup:
        # A read of a local file takes less time than handing it to a thread and back; a network may hang.
        local = self._local and len(asked.query.text) < _LARGE
        found = self.cache.begin(asked.query) if local else await self._thread(self.cache.begin, asked.query)
        if isinstance(found, Lookup):
            return found
        return await self._search(found)

    async def _search(self, question: Question) -> Lookup:
        try:
            vector, seconds = await self._batcher.embed(question.text)
        except EmbeddingError as error:
            log.warning("%s", error)
            return self.cache.give_up(question)
        self.metrics.embedded(seconds)
        if self._local:
            return self.cache.finish(question, vector, seconds)
        return await self._thread(self.cache.finish, question, vector, seconds)

    async def _fly(self, request: Request, job: _Job, about: dict[str, str], start: float) -> Response:
        """Joins or starts the flight of a request and relays it."""
        found, asked = job.found, job.asked
        key = None
        if (
            found is not None
            and asked is not None
            and found.status == "miss"
            and found.admissible
            and asked.query.store
        ):
            # Only those who want the same kept for the same time share a flight: the first one's answer is stored.
            key = digest(found.question.fingerprint, asked.delivery, repr(asked.query.ttl))
        path = request.scope["path"] if request.scope["path"] in (CHAT, COMPLETIONS) else "other"
        reader, joined = self._flights.board(key, lambda flight: self._run(flight, job))
        try:
            head = await head_of(reader, request)
            if joined and 400 <= head[0] < 500:
                # Another caller's key or quota may be to blame: this one asks for itself.
                await reader.close()
                reader, joined = self._flights.board(None, lambda flight: self._run(flight, job))
                head = await head_of(reader, request)
        except CallerGone:
            await reader.close()
            return Response(status_code=499)
        except BaseException as error:
            await reader.close()
            if isinstance(error, asyncio.CancelledError):
                raise
            reply = upstream_error(error, about)
            self.metrics.request(path, about["x-elision-cache"], reply.status_code, time.perf_counter() - start)
            return reply
        if joined:
            # What the upstream told the first caller's browser is not for the others.
            head = head[0], [(name, value) for name, value in head[1] if name != b"set-cookie"]
            about = {**about, "x-elision-reason": "single-flight"}
        self.metrics.request(path, about["x-elision-cache"], head[0], time.perf_counter() - start)
        return Relay(reader, head, about, self.config.limits.client_timeout)

    async def _run(self, flight: Flight, job: _Job) -> None:
        """Reads the upstream's reply into the flight; stores a whole answer before its last bytes are passed on."""
        assert self._client is not None
        meter = self.loads.meter(job.asked.model) if job.asked is not None else None
        start = time.perf_counter()
        if meter is not None:
            meter.started()
        try:
            request = self._client.build_request(job.method, job.url, headers=job.headers, content=job.raw)
            response = await self._client.send(request, stream=True)
            try:
                await flight.began(from_upstream(response))
                plain = response.status_code == 200 and "content-encoding" not in response.headers
                plain = plain and cache_control(response.headers.get("cache-control", "")).store
                if job.asked is None or job.found is None or not job.found.admissible or not plain:
                    async for chunk in response.aiter_raw():
                        await flight.push(chunk)
                elif response.headers.get("content-type", "").startswith(SSE):
                    await self._tee(flight, job, response, start)
                else:
                    await self._whole(flight, job, response, start)
            finally:
                await response.aclose()
        finally:
            if meter is not None:
                meter.finished(time.perf_counter() - start)

    async def _tee(self, flight: Flight, job: _Job, response: httpx.Response, start: float) -> None:
        assert job.asked is not None
        collector = StreamCollector(job.asked.chat, self.config.limits.answer)
        stored = False
        async for chunk in response.aiter_raw():
            collector.feed(chunk)
            if collector.done and not stored:
                # Before [DONE] is passed on: a caller that asks again at once finds its answer.
                stored = True
                await self._store(job, collector.answer, start)
            await flight.push(chunk)

    async def _whole(self, flight: Flight, job: _Job, response: httpx.Response, start: float) -> None:
        assert job.asked is not None
        chat, held, size = job.asked.chat, list[bytes](), 0
        async for chunk in response.aiter_raw():
            size += len(chunk)
            held.append(chunk)
            if size > self.config.limits.answer:
                for piece in held:
                    await flight.push(piece)
                held = []
        if held:
            await self._store(job, lambda: from_body(b"".join(held), chat=chat), start)
            for piece in held:
                await flight.push(piece)

    async def _store(self, job: _Job, answer: Callable[[], Answer], start: float) -> None:
        """Stores an answer if there is one; waits for the store a little, not for long."""
        found = job.found
        assert found is not None
        seconds = time.perf_counter() - start

        def work() -> None:
            try:
                whole = answer()
            except Unstorable as verdict:
                log.debug("not stored: %s", verdict)
                return
            self.cache.insert(found, whole, cost=seconds)

        task = self._thread(work)
        self._stores.add(task)
        task.add_done_callback(self._stored)
        await asyncio.wait({task}, timeout=_STORE_PATIENCE)

    def _stored(self, task: asyncio.Future[None]) -> None:
        self._stores.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.metrics.errors.inc()
            log.error("an answer could not be stored", exc_info=error)

    # ------------------------------------------------------------------ everything else

    async def _passed(self, request: Request) -> Response:
        """Any other endpoint, `/v1/embeddings` and `/v1/models` among them: passed through unchanged."""
        start = time.perf_counter()
        try:
            raw = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except TooLarge:
            return self._too_large()
        path = raw_path(request)
        if path is None:
            return error_reply(400, "bad_path", "the path steps out of /v1")
        url = self.upstream + path + query_of(request, "?")
        job = _Job(request.method, url, to_upstream(merged(request.headers)), raw)
        return await self._fly(request, job, {"x-elision-cache": "bypass", "x-elision-reason": "not-cached"}, start)

    async def _body(self, request: Request) -> bytes:
        most, parts, size = self.config.limits.body, list[bytes](), 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise TooLarge
            parts.append(part)
        return b"".join(parts)

    def _too_large(self) -> Response:
        most = self.config.limits.body
        return error_reply(
            413, "too_large", f"the request is larger than {most} bytes; raise limits.body if it must pass"
        )

    async def _report(self, request: Request) -> Response:
        """A caller reports a false hit by the id in `x-elision-entry`; only an entry of its own."""
        try:
            raw = await self._body(request)
        except (ClientDisconnect, TooLarge):
            return self._too_large()
        id = raw.decode("utf-8", "replace").strip().strip('"')
        tenant = tenant_of(merged(request.headers), self.config.rules)
        try:
            known = await self._thread(lambda: self.cache.report(id, tenant=tenant))
        except StoreUnavailable as error:
            return error_reply(503, "store_unavailable", str(error))
        return Response(status_code=204) if known else error_reply(404, "not_found", "no such entry")

    async def _health(self, request: Request) -> Response:
        problem = self.cache.problem()
        return JSONResponse({"status": "ok" if problem is None else "degraded", "problem": problem})

    async def _metrics(self, request: Request) -> Response:
        if self.config.admin.protect_metrics:
            grant = granted(request.headers.get("authorization", ""), self.grants)
            if grant is None or grant.tenant is not None:
                return error_reply(401, "unauthorized", "a valid admin token is needed", {"www-authenticate": "Bearer"})
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _dashboard(self, request: Request) -> Response:
        """The page; it holds no data: those come from `/admin/stats`, for which it asks for a token."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        page = (Path(__file__).parent / "dashboard.html").read_text()
        return HTMLResponse(page, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})


def _about(found: Lookup) -> dict[str, str]:
    """What the reply's headers say of a lookup."""
    about = {
        "x-elision-cache": {"hit": "hit", "miss": "miss", "skip": "bypass"}[found.status],
        "x-elision-reason": found.reason,
        # A header is Latin-1 without line ends; a category is named as somebody pleased.
        "x-elision-category": quote(found.category, safe=string.punctuation.replace("%", "") + " "),
    }
    if found.score is not None:
        about["x-elision-score"] = f"{found.score:.4f}"
    if found.threshold is not None:
        about["x-elision-threshold"] = f"{found.threshold:.4f}"
    if found.age is not None:
        about["x-elision-age"] = f"{found.age:.1f}"
        about["age"] = str(int(found.age))
    if found.entry is not None:
        about["x-elision-entry"] = found.entry
    return about


def _hit(asked: Asked, found: Lookup, about: dict[str, str]) -> Response:
    assert found.answer is not None
    if not asked.stream:
        return Response(as_body(found.answer, chat=asked.chat, model=asked.model), 200, about, "application/json")
    events = as_events(found.answer, chat=asked.chat, model=asked.model, include_usage=asked.include_usage)
    # All of it is here already: one write instead of one per event.
    return Response(b"".join(events), 200, {**about, "cache-control": "no-cache"}, SSE)
