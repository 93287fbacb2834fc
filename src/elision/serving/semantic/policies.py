"""Category policies: how near, how long and how much, per kind of question.

Spec: `papers/category-semantic-cache.md`, "Thresholds, TTL, quota: direction" and "Adaptive load policy". Thresholds,
    TTLs and
quotas per category are the paper's; how load moves them (`floor`, `delta`, `kappa`, `ttl_max`) is marked (inferred)
in the spec.

Example:
    >>> code = {"threshold": 0.9, "ttl": "30d"}
    >>> policies = Policies.parse({"default": {"threshold": 0.8}, "categories": {"code": code}})
    >>> policies.of("code").ttl
    2592000.0
    >>> policies.of("never heard of").threshold
    0.8
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from elision.errors import OptionError

M = TypeVar("M", bound=BaseModel)

DEFAULT_CATEGORY = "default"
"""The category of questions that no named category takes."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw]?)\s*", re.IGNORECASE)
# A floor or a longest TTL belongs to one category's threshold and TTL: inheriting it would contradict a category's
# own values.
_NOT_INHERITED = {"floor", "ttl_max"}


def seconds(value: object) -> object:
    """A duration as seconds: numbers stay, "90s", "10m", "2h", "30d", "4w" are converted.

    Raises:
        ValueError: for text that is no duration (pydantic turns it into a field error).
    """
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r} is no duration: write seconds, or a number with s, m, h, d or w, such as '10m'")
    return float(match[1]) * _UNITS[match[2].lower() or "s"]


class Policy(BaseModel):
    """What may be served from the cache for one category.

    Attributes:
        enabled: `False` turns the category off: no embedding, no search, nothing stored.
        allow_caching: the compliance switch; like `enabled`, but never changed by the economics controller.
        threshold: τ, the least cosine similarity of a hit, in (0, 1]. Dense or critical categories want a *higher* one.
        ttl: seconds an answer stays true; 0 means never cached. An entry keeps its creation time, so a change applies
            to old entries.
        quota: largest share of the cache's capacity, in (0, 1].
        floor: τ_floor, the least threshold that load may reach (inferred); `None` means `threshold`, so load changes
            nothing.
        delta: δ, how far full load lowers the threshold (inferred).
        kappa: κ, by what share full load lengthens the TTL (inferred).
        ttl_max: longest TTL that load may reach (inferred); `None` means `ttl`.
        safety_critical: ignore load altogether: δ = κ = 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    allow_caching: bool = True
    threshold: float = Field(default=0.80, gt=0, le=1)
    ttl: float = Field(default=3600.0, ge=0, allow_inf_nan=False)
    quota: float = Field(default=1.0, gt=0, le=1)
    floor: float | None = Field(default=None, gt=0, le=1)
    delta: float = Field(default=0.0, ge=0, le=1)
    kappa: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    ttl_max: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    safety_critical: bool = False

    _seconds = field_validator("ttl", "ttl_max", mode="before")(seconds)

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        if self.floor is not None and self.floor > self.threshold:
            raise ValueError(f"floor {self.floor} is above threshold {self.threshold}: lower the floor or leave it out")
        if self.ttl_max is not None and self.ttl_max < self.ttl:
            raise ValueError(f"ttl_max {self.ttl_max} s is below ttl {self.ttl} s: raise ttl_max or leave it out")
        return self

    @property
    def caches(self) -> bool:
        """Whether anything of this category is looked up or stored at all."""
        return self.enabled and self.allow_caching and self.ttl > 0

    @property
    def longest_ttl(self) -> float:
        """The TTL in seconds at full load: nothing older can ever be served."""
        return effective_ttl(self, 1.0)

    def strictness(self) -> tuple[bool, float, float]:
        """A sort key, larger for the stricter policy: off, then the higher threshold, then the shorter TTL."""
        return (not self.caches, self.threshold, -self.ttl)


def effective_threshold(policy: Policy, load: float) -> float:
    """τ_eff = max(τ_floor, τ − δ·s) for a load s in [0, 1]; s = 0 gives τ exactly. (inferred)"""
    if policy.safety_critical:
        return policy.threshold
    floor = policy.threshold if policy.floor is None else policy.floor
    return max(floor, policy.threshold - policy.delta * load)


def effective_ttl(policy: Policy, load: float) -> float:
    """ttl_eff = min(ttl_max, ttl·(1 + κ·s)) seconds for a load s in [0, 1]; s = 0 gives the TTL exactly. (inferred)"""
    if policy.safety_critical:
        return policy.ttl
    longest = policy.ttl if policy.ttl_max is None else policy.ttl_max
    return min(longest, policy.ttl * (1.0 + policy.kappa * load))


def limit(policy: Policy, capacity: int) -> int:
    """quota·capacity as a number of entries; at least one, so that a small share is not silently nothing."""
    return max(1, math.floor(policy.quota * capacity + 1e-9))


class Policies(BaseModel):
    """A default policy and the named categories.

    Attributes:
        default: for questions of no named category; categories inherit its values except `floor` and `ttl_max`.
        categories: policy by category name.
        revision: an epoch: entries are only served under the revision they were stored under.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: Policy = Policy()
    categories: dict[str, Policy] = Field(default_factory=dict)
    revision: str = ""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        default, named = data.get("default", {}), data.get("categories", {})
        if DEFAULT_CATEGORY in (named or {}):
            raise ValueError(f"{DEFAULT_CATEGORY!r} is no name for a category: set its policy under the key 'default'")
        if not isinstance(default, Mapping) or not isinstance(named, Mapping):
            return data
        base = {name: value for name, value in default.items() if name not in _NOT_INHERITED}
        merged = {name: {**base, **own} if isinstance(own, Mapping) else own for name, own in named.items()}
        return {**data, "categories": merged}

    @classmethod
    def parse(cls, data: object) -> Policies:
        """Policies from plain data, such as parsed YAML.

        Raises:
            OptionError: naming each wrong field, its value and its limit.
        """
        return checked(cls, data, "policies")

    def name(self, category: str | None) -> str:
        """The category's own name, or `DEFAULT_CATEGORY` for an unknown one: callers cannot invent categories."""
        return category if category in self.categories else DEFAULT_CATEGORY

    def of(self, category: str | None) -> Policy:
        """The policy of a category; the default policy for an unknown one."""
        return self.categories.get(category or "", self.default)

    def names(self) -> list[str]:
        """All category names, the default one first."""
        return [DEFAULT_CATEGORY, *sorted(self.categories)]

    def changed(self, category: str, changes: Mapping[str, object]) -> Policies:
        """A copy in which one category's fields are changed; a new name makes a new category out of the default policy.

        Raises:
            OptionError: for an unknown field or a value out of range.
        """
        known = self.of(category).model_dump()
        if category != DEFAULT_CATEGORY and category not in self.categories:
            known = {name: value for name, value in known.items() if name not in _NOT_INHERITED}
        policy = checked(Policy, {**known, **changes}, f"policy of {category!r}")
        if category == DEFAULT_CATEGORY:
            return self.model_copy(update={"default": policy})
        return self.model_copy(update={"categories": {**self.categories, category: policy}})


def checked(model: type[M], data: object, what: str) -> M:
    """`data` as a pydantic model.

    Raises:
        OptionError: one line per wrong field with its path, value and limit.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            where = ".".join(str(part) for part in item["loc"]) or "(top level)"
            known = ""
            if item["type"] == "extra_forbidden":
                known = f"; known fields here: {', '.join(_fields(model, item['loc'][:-1]))}"
            lines.append(f"{where} = {item['input']!r}: {item['msg']}{known}")
        raise OptionError(f"{what}: " + "; ".join(lines)) from error


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields at a path of an error, for messages about unknown fields."""
    here: type[BaseModel] = model
    for part in path:
        field = here.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        here = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), here)
    return sorted(here.model_fields)
