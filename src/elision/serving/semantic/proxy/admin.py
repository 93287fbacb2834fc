"""The admin API: list, inspect and delete entries, purge a tenant, change a policy live.

A token either administers everything or is confined to one tenant. A confined token never touches other tenants'
tables: a foreign id and one that does not exist take the same path, so neither replies nor durations tell them apart.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from elision.errors import OptionError, StoreUnavailable
from elision.serving.semantic.cache import SemanticCache
from elision.serving.semantic.catalog import Meta
from elision.serving.semantic.policies import DEFAULT_CATEGORY, Policy
from elision.serving.semantic.proxy.metrics import Metrics
from elision.serving.semantic.proxy.relay import error_reply

MOST_PER_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Grant:
    """A token's SHA-256 digest and the tenant it is confined to, if any."""

    digest: bytes
    tenant: str | None


def granted(header: str, grants: Sequence[Grant]) -> Grant | None:
    """The grant for an `Authorization` header; compared in constant time, against all tokens whichever fits."""
    token = header.removeprefix("Bearer ") if header.startswith("Bearer ") else ""
    given = hashlib.sha256(token.encode()).digest()
    found: Grant | None = None
    for grant in grants:
        if hmac.compare_digest(given, grant.digest):
            found = grant
    return found


Handler = Callable[["Admin", Request, Grant], Awaitable[Response]]


def _guarded(handler: Handler, *, everything: bool = False) -> Callable[[Admin, Request], Awaitable[Response]]:
    """Lets a handler run for a good token only; `everything` asks for one that is not confined to a tenant."""

    @functools.wraps(handler)
    async def guarded(self: Admin, request: Request) -> Response:
        if not self.grants:
            return error_reply(403, "admin_closed", "the admin API is closed: configure admin.tokens")
        grant = granted(request.headers.get("authorization", ""), self.grants)
        if grant is None:
            return error_reply(401, "unauthorized", "a valid admin token is needed", {"www-authenticate": "Bearer"})
        if everything and grant.tenant is not None:
            return error_reply(403, "forbidden", "this token is confined to one tenant")
        try:
            return await handler(self, request, grant)
        except OptionError as error:
            return error_reply(422, "invalid", str(error))
        except StoreUnavailable as error:
            return error_reply(503, "store_unavailable", str(error))

    return guarded


class Admin:
    """Handlers of `/admin`.

    Args:
        cache: what is administered.
        metrics: where the numbers come from.
        grants: the tokens; without any the API is closed.
    """

    def __init__(self, cache: SemanticCache, metrics: Metrics, grants: Sequence[Grant]) -> None:
        self.cache, self.metrics, self.grants = cache, metrics, tuple(grants)
        self._changing = asyncio.Lock()

    def routes(self) -> list[Route]:
        """The routes to mount."""

        def guard(handler: Handler, *, everything: bool = False) -> Callable[[Request], Awaitable[Response]]:
            return functools.partial(_guarded(handler, everything=everything), self)

        return [
            Route("/admin/entries", guard(Admin._list), methods=["GET"]),
            Route("/admin/entries/{id}", guard(Admin._inspect), methods=["GET"]),
            Route("/admin/entries/{id}", guard(Admin._delete), methods=["DELETE"]),
            Route("/admin/entries/{id}/report", guard(Admin._report), methods=["POST"]),
            Route("/admin/tenants", guard(Admin._tenants, everything=True), methods=["GET"]),
            Route("/admin/tenants/{tenant:path}", guard(Admin._purge), methods=["DELETE"]),
            Route("/admin/policies", guard(Admin._policies, everything=True), methods=["GET"]),
            Route("/admin/policies/{category}", guard(Admin._change, everything=True), methods=["PATCH"]),
            Route("/admin/stats", guard(Admin._stats, everything=True), methods=["GET"]),
        ]

    async def _list(self, request: Request, grant: Grant) -> Response:
        """A page of entries: `?tenant=&category=&limit=&after=`."""
        ask = request.query_params
        text = ask.get("limit", "100")
        if not text.isdecimal() or not 1 <= int(text) <= MOST_PER_PAGE:
            raise OptionError(f"limit {text!r} must lie in 1 ... {MOST_PER_PAGE}")
        # A confined token lists its own tenant whatever it asks for.
        tenant = grant.tenant if grant.tenant is not None else ask.get("tenant")
        found = await asyncio.to_thread(
            self.cache.entries, tenant=tenant, category=ask.get("category"), limit=int(text), after=ask.get("after")
        )
        return JSONResponse({"entries": [_row(meta) for meta in found], "next": found[-1].id if found else None})

    async def _inspect(self, request: Request, grant: Grant) -> Response:
        id = request.path_params["id"]
        meta = self.cache.entry(id, tenant=grant.tenant)
        if meta is None:
            return _absent()
        answer = await asyncio.to_thread(self.cache.answer, id, tenant=grant.tenant)
        if answer is None:
            return _absent()
        # In ASCII: a model may have said half a character.
        body = json.dumps({**_row(meta), "answer": answer.text, "usage": answer.usage})
        return Response(body, media_type="application/json")

    async def _delete(self, request: Request, grant: Grant) -> Response:
        gone = await asyncio.to_thread(self.cache.delete, request.path_params["id"], tenant=grant.tenant)
        return Response(status_code=204) if gone else _absent()

    async def _report(self, request: Request, grant: Grant) -> Response:
        id = request.path_params["id"]
        meta = self.cache.entry(id, tenant=grant.tenant)
        if meta is None or not await asyncio.to_thread(self.cache.report, id, tenant=meta.tenant):
            return _absent()
        return Response(status_code=204)

    async def _tenants(self, request: Request, grant: Grant) -> Response:
        return JSONResponse({"tenants": self.cache.tenants()})

    async def _purge(self, request: Request, grant: Grant) -> Response:
        tenant = request.path_params["tenant"]
        if grant.tenant is not None and grant.tenant != tenant:
            return error_reply(403, "forbidden", "this token is confined to one tenant")
        return JSONResponse({"deleted": await asyncio.to_thread(self.cache.purge, tenant)})

    async def _policies(self, request: Request, grant: Grant) -> Response:
        policies = self.cache.policies
        rows = {name: _policy(policies.of(name)) for name in policies.names()}
        return JSONResponse({"policies": rows, "revision": policies.revision})

    async def _change(self, request: Request, grant: Grant) -> Response:
        """Changes fields of one category's policy; the others stay."""
        try:
            changes = json.loads(await request.body())
        except ValueError as error:
            raise OptionError(f"the body is no JSON: {error}") from error
        category = request.path_params["category"]
        if not isinstance(changes, dict):
            raise OptionError(f"the body must be an object of policy fields, not {type(changes).__name__}")
        async with self._changing:  # of two changes at once, neither may undo the other
            policies = self.cache.policies
            if category not in policies.names():
                raise OptionError(f"category {category!r} is unknown; known: {', '.join(policies.names())}")
            await asyncio.to_thread(self.cache.set_policies, policies.changed(category, changes))
        return JSONResponse(_policy(self.cache.policies.of(category)))

    async def _stats(self, request: Request, grant: Grant) -> Response:
        return JSONResponse(self.metrics.dashboard())


def _absent() -> Response:
    return error_reply(404, "not_found", "no such entry")


def _policy(policy: Policy) -> dict[str, Any]:
    return policy.model_dump()


def _row(meta: Meta) -> dict[str, Any]:
    """An entry as JSON, without its answer."""
    return {
        "id": meta.id,
        "tenant": meta.tenant,
        "model": meta.model,
        "category": meta.category or DEFAULT_CATEGORY,
        "question": meta.text,
        "age_s": round(max(0.0, time.time() - meta.created_at), 3),
        "hits": meta.hits,
        "model_s": meta.cost,
        "searchable": meta.slot is not None,
    }
