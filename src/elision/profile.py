"""Profiles: what an offline part learned, in one safetensors file with a fingerprint. Never pickle."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elision.errors import ProfileError, ProfileMismatch

FORMAT = "elision-profile-1"
UNKNOWN = "unknown"
_PASSING = ("transformers_version", "dtype", "torch_dtype")
_BINDING = ("method", "model", "config", "weights", "scheduler", "scheduler_config", "steps")


def config_hash(config: Any) -> str:
    """A short hash of a configuration's public entries (of diffusers, of transformers, a dict, or None).

    Versions and dtypes are left out: the same model in another precision is the same model.
    """
    found = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    entries = {str(k): repr(v) for k, v in found.items() if not str(k).startswith("_") and k not in _PASSING}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def weight_digest(model: nn.Module, per_tensor: int = 64) -> str:
    """A hash of `per_tensor` evenly spaced entries of every parameter, with its name, shape and dtype."""
    if any(p.device.type == "meta" for p in model.parameters()):
        return UNKNOWN  # offloaded: the weights are elsewhere
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        if p.numel():
            flat = p.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // per_tensor)][:per_tensor]
            digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint(method: str, model: nn.Module, scheduler: Any = None, steps: int | None = None) -> dict[str, Any]:
    """What a profile is bound to: model class, config, weights, scheduler and steps (also versions and the date)."""
    versions: dict[str, str] = {}
    for package in ("elision", "torch", "diffusers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "method": method,
        "model": type(model).__name__,
        "config": config_hash(getattr(model, "config", None)),
        "weights": weight_digest(model),
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "scheduler_config": None if scheduler is None else config_hash(getattr(scheduler, "config", None)),
        "steps": steps,
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class Profile:
    """Tensors and facts that an offline part produced, with the fingerprint of what it was made for."""

    fingerprint: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write one `.safetensors` file and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"fingerprint": dict(self.fingerprint), "facts": dict(self.facts)}
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.tensors.items()
        }
        save_file(tensors, path, metadata={"format": FORMAT, "header": json.dumps(header)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a file that `save` wrote."""
        path = Path(path)
        if not path.exists():
            raise ProfileError(f"no profile at {path}: make one with elision.fit(...).save(path)")
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise ProfileError(f"{path} is not a safetensors file: {error}") from error
        if meta.get("format") != FORMAT:
            raise ProfileError(
                f"{path} has format {meta.get('format')!r}, not {FORMAT!r}: make it anew with elision.fit"
            )
        try:
            header = json.loads(meta["header"])
            return cls(header["fingerprint"], tensors, header["facts"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"the header of {path} is broken ({error!r}): make it anew with elision.fit") from error

    def check(self, current: Mapping[str, Any], force: bool = False) -> list[str]:
        """Compare with the fingerprint of what it is about to be used on.

        Returns the differing fields as sentences; raises `ProfileMismatch` with them unless `force`. Versions and date
        never differ by this rule. Steps and weights are only compared where both sides have them: a target may not know
        its steps yet, and offloaded weights cannot be read.
        """
        differing = [
            f"{key}: profile {self.fingerprint.get(key)!r}, here {current.get(key)!r}"
            for key in _BINDING
            if self.fingerprint.get(key) != current.get(key)
            and not (key == "steps" and None in (self.fingerprint.get(key), current.get(key)))
            and not (key == "weights" and UNKNOWN in (self.fingerprint.get(key), current.get(key)))
        ]
        if differing and not force:
            raise ProfileMismatch(
                f"this profile was made for something else ({'; '.join(differing)}): "
                "fit a new one, or pass force=True to use it all the same"
            )
        return differing
