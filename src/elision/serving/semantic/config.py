"""The configuration of `elision serve`: one YAML file, checked as a whole before anything starts.

Example:
    default: {threshold: 0.85, ttl: 1h}
    categories:
      code: {threshold: 0.92, ttl: 30d, quota: 0.5}
      markets: {threshold: 0.9, ttl: 5m, quota: 0.1, safety_critical: true}
      legal: {enabled: false}
    classifier:
      examples:
        code: ["How do I sort a list in Python?", "Why does my regex not match?"]
        markets: ["What is the price of gold now?"]
    store: {url: "sqlite:cache.db"}
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from elision.errors import OptionError
from elision.serving.semantic.cache import SemanticCache
from elision.serving.semantic.classify import PrototypeClassifier
from elision.serving.semantic.economics import ControllerOptions, Economics
from elision.serving.semantic.embed import Embedder, EndpointEncoder, HashEncoder, SentenceEncoder
from elision.serving.semantic.index import IndexOptions
from elision.serving.semantic.load import LoadOptions
from elision.serving.semantic.policies import Policies, checked
from elision.serving.semantic.proxy.loads import Loads
from elision.serving.semantic.proxy.requests import Rules
from elision.serving.semantic.redis_store import RedisStore
from elision.serving.semantic.sqlite_store import SQLiteStore
from elision.serving.semantic.store import Store
from elision.serving.semantic.types import CacheOptions
from elision.serving.semantic.verify import RULES, LexicalVerifier

_REDIS = ("redis://", "rediss://", "unix://")


class _Loader(yaml.SafeLoader):
    """YAML in which a name given twice in one place is an error instead of a silent last word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderConfig(_Section):
    """Which encoder.

    Attributes:
        kind: "minilm" (packaged), "hash" (no model), "model" (any Hugging Face id or path), "endpoint" (OpenAI-style).
        model: the id, the path, or the endpoint's model name.
        url: of the endpoint, such as "http://localhost:8000/v1".
        dim: length of the endpoint's or the hash encoder's vectors.
        api_key_env: environment variable that holds the endpoint's key.
        device: such as "cpu" or "cuda".
        threads: torch threads of this process. One is as fast as several for a short question, and does not collapse
            when other work wants the cores; `None` leaves torch alone.
    """

    kind: Literal["minilm", "hash", "model", "endpoint"] = "minilm"
    model: str | None = None
    url: str | None = None
    dim: int | None = Field(default=None, ge=8)
    api_key_env: str | None = None
    device: str = "cpu"
    threads: int | None = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _complete(self) -> EncoderConfig:
        if self.kind == "model" and self.model is None:
            raise ValueError("kind 'model' needs model: a hub id or a path")
        if self.kind == "endpoint" and None in (self.model, self.url, self.dim):
            raise ValueError("kind 'endpoint' needs url, model and dim")
        return self

    def build(self) -> Embedder:
        """The encoder."""
        if self.kind == "hash":
            return HashEncoder(self.dim or 256)
        if self.kind == "endpoint":
            key = os.environ.get(self.api_key_env) if self.api_key_env else None
            return EndpointEncoder(self.url or "", self.model or "", self.dim or 0, api_key=key)
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return SentenceEncoder(self.model if self.kind == "model" else None, device=self.device)


class StoreConfig(_Section):
    """Where documents are: "sqlite:PATH", ":memory:", or a redis://, rediss:// or unix:// URL."""

    url: str = "sqlite:elision-cache.db"
    prefix: str = "elision"
    synchronous: Literal["NORMAL", "FULL"] = "NORMAL"
    timeout: float = Field(default=2.0, gt=0)
    shared: bool | None = None
    retry: float = Field(default=5.0, ge=0)

    @field_validator("url")
    @classmethod
    def _known_kind(cls, url: str) -> str:
        if url != ":memory:" and not url.startswith(("sqlite:", *_REDIS)):
            raise ValueError("write sqlite:PATH, :memory:, or a redis:// URL")
        return url

    @property
    def is_shared(self) -> bool:
        """Whether other processes' entries are taken over; by default with Redis only."""
        return self.url.startswith(_REDIS) if self.shared is None else self.shared

    def build(self) -> Store:
        """The store.

        Raises:
            StoreUnavailable: if the SQLite file cannot be opened. Redis is only contacted when it is used.
        """
        if self.url == ":memory:":
            return SQLiteStore(":memory:")
        if self.url.startswith("sqlite:"):
            path = self.url.removeprefix("sqlite:")
            return SQLiteStore(path, synchronous=self.synchronous, timeout=self.timeout)
        return RedisStore(self.url, prefix=self.prefix, timeout=self.timeout)


class ClassifierConfig(_Section):
    """Example questions by category; without any, questions without a category header take the default policy."""

    examples: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)
    margin: float = Field(default=0.05, ge=0, le=1)
    least: float = Field(default=0.15, ge=-1, le=1)


class VerifierConfig(_Section):
    """The lexical verifier: on by default."""

    enabled: bool = True
    rules: list[str] = Field(default_factory=lambda: list(RULES))
    band: float = Field(default=1.0, ge=0, le=1)


class Token(_Section):
    """An admin token, given as the name of an environment variable or as a SHA-256 digest.

    Attributes:
        env: environment variable that holds the token.
        sha256: hex digest of the token.
        tenant: confine the token to this tenant's entries; `None` administers everything.
    """

    env: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    tenant: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Token:
        if (self.env is None) == (self.sha256 is None):
            raise ValueError("give either env or sha256")
        return self

    def digest(self) -> bytes:
        """SHA-256 of the token.

        Raises:
            OptionError: if the environment variable is missing or its value too short to be a secret.
        """
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        value = os.environ.get(self.env or "", "")
        if len(value) < 16:
            raise OptionError(f"admin token: environment variable {self.env!r} holds {len(value)} characters; need 16")
        return hashlib.sha256(value.encode()).digest()


class AdminConfig(_Section):
    """Tokens of the admin API; without any it is closed."""

    tokens: list[Token] = Field(default_factory=list)
    protect_metrics: bool = False


class Limits(_Section):
    """Sizes in bytes and times in seconds."""

    body: int = Field(default=32_000_000, ge=1000)
    answer: int = Field(default=4_000_000, ge=1000)
    connect_timeout: float = Field(default=10.0, gt=0)
    read_timeout: float = Field(default=600.0, gt=0)
    client_timeout: float = Field(default=120.0, gt=0)
    connections: int = Field(default=2000, ge=1)


class CacheConfig(_Section):
    """Sizes of the cache."""

    capacity: int = Field(default=100_000, ge=1)
    tenant_quota: float = Field(default=1.0, gt=0, le=1)
    index: IndexOptions = Field(default_factory=IndexOptions)


class LoadConfig(_Section):
    """The load signal: see `LoadOptions`; `metrics_url` also reads the queue from a vLLM server's /metrics."""

    options: LoadOptions = Field(default_factory=LoadOptions)
    metrics_url: str | None = None


class ServeConfig(_Section):
    """Everything `elision serve` needs to know."""

    policies: Policies = Field(default_factory=Policies)
    classifier: ClassifierConfig = Field(default_factory=ClassifierConfig)
    verifier: VerifierConfig = Field(default_factory=VerifierConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    rules: Rules = Field(default_factory=Rules)
    load: LoadConfig = Field(default_factory=LoadConfig)
    economics: ControllerOptions = Field(default_factory=ControllerOptions)
    admin: AdminConfig = Field(default_factory=AdminConfig)
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: Any) -> Any:
        """`default`, `categories` and `revision` may stand at the top, as in the example."""
        if not isinstance(data, Mapping):
            return data
        flat = {name: data[name] for name in ("default", "categories", "revision") if name in data}
        if not flat:
            return data
        if "policies" in data:
            raise ValueError(f"{', '.join(flat)} stand at the top and under 'policies': use one place")
        return {**{name: value for name, value in data.items() if name not in flat}, "policies": flat}

    @model_validator(mode="after")
    def _known_categories(self) -> ServeConfig:
        unknown = sorted(set(self.classifier.examples) - set(self.policies.categories))
        if unknown:
            raise ValueError(f"classifier.examples has {', '.join(unknown)}, which is no category: add a policy for it")
        return self

    @classmethod
    def read(cls, path: str | Path) -> ServeConfig:
        """The configuration in a YAML file.

        Raises:
            OptionError: for a missing or malformed file, and one line per wrong field.
        """
        try:
            data = yaml.load(Path(path).read_text("utf-8"), _Loader) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"cannot read {path}: {error}") from error
        except yaml.YAMLError as error:
            raise OptionError(f"{path} is no YAML: {error}") from error
        return checked(cls, data, str(path))

    def build_cache(self, loads: Loads) -> SemanticCache:
        """The cache, not yet loaded: until `load()` every lookup is a miss ("warming")."""
        embedder = self.encoder.build()
        c = self.classifier
        classifier = None
        if c.examples:
            classifier = PrototypeClassifier(embedder, c.examples, margin=c.margin, least=c.least)
        verifier = LexicalVerifier(self.verifier.rules, self.verifier.band) if self.verifier.enabled else None
        sizes = CacheOptions(self.cache.capacity, self.cache.tenant_quota, self.cache.index, self.store.retry)
        return SemanticCache(
            embedder,
            policies=self.policies,
            store=self.store.build(),
            classifier=classifier,
            verifier=verifier,
            options=sizes,
            load=loads.value,
            economics=Economics(self.economics),
            load_now=False,
        )
