"""Embeddings for many requests at once: while one batch is being encoded, the next one gathers."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from elision.serving.semantic.embed import Embedder
from elision.serving.semantic.index import Vector


class Batcher:
    """Encodes in a thread of its own, at most `most` texts at once. For one event loop.

    Args:
        embedder: the encoder.
        most: texts per batch.
    """

    def __init__(self, embedder: Embedder, most: int = 32) -> None:
        self._embedder, self._most = embedder, most
        self._waiting: list[tuple[str, asyncio.Future[tuple[Vector, float]]]] = []
        self._running: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="elision-embed")

    async def embed(self, text: str) -> tuple[Vector, float]:
        """The unit vector [dim] of a text, and its share of the seconds the batch took.

        Raises:
            EmbeddingError: if the encoder failed.
        """
        future: asyncio.Future[tuple[Vector, float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            start = time.perf_counter()
            try:
                texts = [text for text, _ in batch]
                vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._embedder, texts)
            except Exception as error:
                # Everybody in the batch gets it raised from `embed`.
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            share = (time.perf_counter() - start) / len(batch)
            for (_, future), vector in zip(batch, vectors, strict=True):
                if not future.done():
                    future.set_result((vector, share))

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
