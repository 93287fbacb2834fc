"""One load meter per downstream model, and the queue length that a vLLM server reports."""

from __future__ import annotations

import re
import threading
import time

from elision.serving.semantic.load import Clock, LoadMeter, LoadOptions

MOST_MODELS = 1000
_WAITING = re.compile(r'^vllm:num_requests_waiting\{[^}]*?model_name="([^"]*)"[^}]*\}\s+([0-9.eE+]+)', re.MULTILINE)


class Loads:
    """Meters by model name; thread-safe."""

    def __init__(self, options: LoadOptions | None = None, clock: Clock = time.monotonic) -> None:
        self._options, self._clock = options or LoadOptions(), clock
        self._lock = threading.Lock()
        self._meters: dict[str, LoadMeter] = {}

    def meter(self, model: str) -> LoadMeter:
        """The model's meter. Callers choose the names: past `MOST_MODELS` of them an idle one makes room."""
        with self._lock:
            if model not in self._meters and len(self._meters) >= MOST_MODELS:
                idle = next((name for name, meter in self._meters.items() if meter.idle), None)
                if idle is None:
                    model = ""  # all are busy: the newcomers share one
                else:
                    del self._meters[idle]
            return self._meters.setdefault(model, LoadMeter(self._options, self._clock))

    def value(self, model: str) -> float:
        """s in [0, 1] of a model; 0 for one that nobody has called."""
        with self._lock:
            meter = self._meters.get(model)
        return 0.0 if meter is None else meter.value

    def values(self) -> dict[str, float]:
        """s of every model."""
        with self._lock:
            meters = dict(self._meters)
        return {model: meter.value for model, meter in meters.items()}

    def read_vllm(self, text: str) -> None:
        """Takes the waiting requests per model from a vLLM server's /metrics text."""
        waiting: dict[str, float] = {}
        for model, count in _WAITING.findall(text):
            waiting[model] = waiting.get(model, 0.0) + float(count)
        for model, total in waiting.items():
            self.meter(model).queued(int(total))
