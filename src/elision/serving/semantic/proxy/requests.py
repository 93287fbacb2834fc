"""What a request asks the cache: its question, its partition, its controls, or why it goes past the cache.

Spec: "Bypass: tool calls/results, n > 1, temperature > threshold, logprobs, images, multi-turn unless the whole
    history is in the
key". Every body field that is not the last user message, and every header that may change the answer, is part of the
partition: fields that nobody has thought of yet separate answers instead of mixing them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from urllib.parse import unquote

from elision.errors import OptionError
from elision.serving.semantic.keys import Partition, Query, canonical, digest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
CATEGORY_HEADER = "x-elision-category"
TENANT_HEADER = "x-elision-tenant"
TTL_HEADER = "x-elision-ttl"

# Fields that say how an answer is delivered, not what it says.
_DELIVERY = frozenset({"stream", "stream_options"})
_TOOLS = ("tools", "functions", "tool_choice", "function_call")
_NOT_TEXT = ("audio", "modalities", "prediction", "web_search_options", "echo", "suffix")
_ANSWER_HEADERS = (
    "openai-organization",
    "openai-project",
    "openai-beta",
    "accept-language",
    # Who the caller is, where a gateway says so and no API key does.
    "x-goog-api-key",
    "ocp-apim-subscription-key",
    "x-forwarded-user",
    "x-forwarded-email",
    "x-auth-request-user",
    "x-auth-request-email",
    "x-user-id",
    "remote-user",
)
_MOST_MODEL = 256


@dataclass(frozen=True)
class Rules:
    """What may go through the cache.

    Attributes:
        max_temperature: hotter requests want variety and go past the cache; a request without one counts as 1.
        tools: "bypass" sends every request with tools past the cache; "partition" caches their textual answers per
            tool set.
        multi_turn: `False` sends conversations past the cache instead of keying them on the whole history.
        trust_tenant_header: take the tenant header alone as the tenant. Only behind a gateway that sets it: otherwise
            it merely subdivides the caller's API key, so that nobody can name somebody else's tenant.
        key_headers: names of further headers that say who asks or shape answers; part of the partition.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # a misspelt option in YAML is an error

    max_temperature: float = 1.0
    tools: Literal["bypass", "partition"] = "bypass"
    multi_turn: bool = True
    trust_tenant_header: bool = False
    key_headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that may be answered from the cache.

    Attributes:
        query: the question to the cache.
        chat: chat completion rather than text completion.
        stream: whether the caller wants server-sent events.
        include_usage: whether the stream ends with a chunk of token counts.
        model: the model name the caller asked for.
        only_if_cached: whether the caller wants an error instead of a miss.
        delivery: how the reply is to be delivered, as one text; only callers with the same may share an upstream reply.
    """

    query: Query
    chat: bool
    stream: bool
    include_usage: bool
    model: str
    only_if_cached: bool
    delivery: str


@dataclass(frozen=True, slots=True)
class Bypass:
    """A request that goes past the cache, and why."""

    reason: str


def tenant_of(headers: Mapping[str, str], rules: Rules) -> str:
    """The tenant: a hash of the credentials, subdivided by the tenant header; or that alone where it is trusted."""
    named = headers.get(TENANT_HEADER, "").strip()
    if rules.trust_tenant_header and named:
        return f"name:{named}"
    # All that were sent: which of them the upstream believes is not known here, and clients fill in one by default.
    sent = [name for name in ("authorization", "api-key", "x-api-key") if headers.get(name)]
    # A browser's session; beside a key, cookies are a matter of balancing load and change all the time.
    sent = sent or [name for name in ("cookie",) if headers.get(name)]
    key = headers[sent[0]] if len(sent) == 1 else "\n".join(f"{name}: {headers[name]}" for name in sent)
    owner = "anonymous" if not key else "key:" + hashlib.sha256(key.encode()).hexdigest()[:32]
    return f"{owner}/{named}" if named else owner


def read(path: str, query_string: str, headers: Mapping[str, str], raw: bytes, rules: Rules) -> Asked | Bypass:
    """Reads one request; anything unusual is a `Bypass`, never an error: the upstream is the judge of its own requests.

    Args:
        path: `CHAT` or `COMPLETIONS`.
        query_string: the URL's query; part of the partition.
        headers: with lower-case names.
        raw: the body.
        rules: what may go through the cache.
    """
    try:
        body = json.loads(raw, object_pairs_hook=_once)
        if not isinstance(body, dict):
            return Bypass("malformed")
        reason = bypass_reason(body, chat=path == CHAT, rules=rules)
        if reason is not None:
            return Bypass(reason)
        return _asked(path, query_string, headers, body, rules)
    except (ValueError, OptionError, RecursionError):
        # Not JSON, or JSON with NaN, with a field given twice or with half a character, or nested beyond reason.
        return Bypass("malformed")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; refuses one with a field given twice, of which the upstream may read the other one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is given twice")
    return found


def bypass_reason(body: Mapping[str, Any], *, chat: bool, rules: Rules) -> str | None:
    """Why a request must go past the cache, or `None`."""
    if not isinstance(body.get("model"), str) or not isinstance(body.get("stream", False), bool | None):
        return "malformed"
    if len(body["model"]) > _MOST_MODEL:
        return "malformed"
    if rules.tools == "bypass" and any(body.get(name) for name in _TOOLS):
        return "tools"
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            return name
    temperature = body.get("temperature")
    if temperature is not None and not isinstance(temperature, int | float):
        return "malformed"
    if (1.0 if temperature is None else temperature) > rules.max_temperature:
        return "temperature"
    # A count of 0 still asks for log-probabilities in the completions API.
    if body.get("logprobs") not in (None, False) or body.get("top_logprobs") is not None:
        return "logprobs"
    if body.get("store"):
        return "stored-upstream"
    for name in _NOT_TEXT:
        value = body.get(name)
        if value and not (name == "modalities" and value == ["text"]):
            return name
    return _bypass_messages(body.get("messages"), rules) if chat else _bypass_prompt(body.get("prompt"))


def _bypass_prompt(prompt: object) -> str | None:
    if not isinstance(prompt, str):
        return "prompt-not-text"
    return None if prompt.strip() else "empty"


def _bypass_messages(messages: object, rules: Rules) -> str | None:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        return "malformed"
    for message in messages:
        if message.get("role") in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
            return "tools"
        if message.get("audio") or text_of(message.get("content")) is None:
            return "not-text"
    if messages[-1].get("role") != "user":
        return "last-message-not-user"
    if not (text_of(messages[-1]["content"]) or "").strip():
        return "empty"
    turns = sum(message.get("role") in ("user", "assistant") for message in messages)
    return "multi-turn" if turns > 1 and not rules.multi_turn else None


def text_of(content: object) -> str | None:
    """A message's content as one text; `None` if any part of it is not text (images, audio, files)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts: list[str] = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            return None
        parts.append(part["text"])
    # Joined with a mark that no text can hide: two parts are not one part.
    return "\x1e".join(parts)


def _beside_text(content: object) -> list[dict[str, Any]]:
    """What the parts of a message say beside their text; nothing for a plain text and for a single plain part."""
    if not isinstance(content, list):
        return []
    found = [{name: value for name, value in part.items() if name not in ("type", "text")} for part in content]
    return found if len(found) > 1 or found[0] else []


def _asked(
    path: str, query_string: str, headers: Mapping[str, str], body: dict[str, Any], rules: Rules
) -> Asked | Bypass:
    chat = path == CHAT
    control = cache_control(headers.get("cache-control", ""))
    ttl = control.ttl
    if TTL_HEADER in headers:
        own = number(headers[TTL_HEADER])
        if own is None:
            return Bypass("malformed-ttl")
        ttl = own if ttl is None else min(own, ttl)
    if control.malformed:
        return Bypass("malformed-cache-control")
    rest = {name: value for name, value in body.items() if name not in _DELIVERY}
    if chat:
        *earlier, last = rest.pop("messages")
        text = text_of(last["content"]) or ""
        # The history, and whatever else the last message says of itself, such as the speaker's name.
        rest["history"], rest["last"] = earlier, {name: value for name, value in last.items() if name != "content"}
        rest["parts"] = _beside_text(last["content"])
    else:
        text = rest.pop("prompt")
        # A completion goes on where the prompt ends: there a space or a line end changes it.
        rest["margins"] = [text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]]
    # Half a character (a lone surrogate) cannot be written as UTF-8: not into metrics, not into lists of entries.
    (text + body["model"]).encode()
    shaping = {
        name: headers[name] for name in (*_ANSWER_HEADERS, *map(str.lower, rules.key_headers)) if name in headers
    }
    scope = digest(path, query_string, canonical(rest), canonical(shaping))
    query = Query(
        text=text,
        partition=Partition(tenant_of(headers, rules), body["model"], scope),
        category=unquote(headers[CATEGORY_HEADER]) if CATEGORY_HEADER in headers else None,
        lookup=control.lookup,
        store=control.store and ttl != 0,
        max_age=control.max_age,
        ttl=ttl,
    )
    options = body.get("stream_options")
    usage = isinstance(options, dict) and options.get("include_usage") is True
    delivery = canonical({name: body.get(name) for name in _DELIVERY})
    return Asked(query, chat, bool(body.get("stream")), usage, body["model"], control.only_if_cached, delivery)


@dataclass(frozen=True, slots=True)
class Control:
    """What a `Cache-Control` header asks for."""

    lookup: bool = True
    store: bool = True
    max_age: float | None = None
    ttl: float | None = None
    only_if_cached: bool = False
    malformed: bool = False


def number(text: str) -> float | None:
    """A non-negative number of seconds, or `None`."""
    return float(text) if re.fullmatch(r"\s*\d{1,12}(\.\d+)?\s*", text) else None


def cache_control(header: str) -> Control:
    """Reads `no-cache`, `no-store`, `max-age=S`, `s-maxage=S` (how long this answer may be kept), `only-if-cached`.

    Example:
        >>> cache_control("no-cache, max-age=60").lookup
        False
    """
    lookup, store, max_age, ttl, only, malformed = True, True, None, None, False, False
    for part in header.lower().split(","):
        name, _, value = part.strip().partition("=")
        value = value.strip('"')
        if name == "no-cache":
            lookup = False
        elif name == "no-store":
            store = False
        elif name == "only-if-cached":
            only = True
        elif name in ("max-age", "s-maxage"):
            seconds = number(value)
            malformed = malformed or seconds is None
            if name == "max-age":
                max_age = seconds
            else:
                ttl = seconds
    return Control(lookup, store, max_age, ttl, only, malformed)
