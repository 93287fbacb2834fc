"""Caches of other libraries as rows of a comparison: `diffusers:pab,range=2`, `cache_dit:dbcache,calibrator=foca`.

They run through their own public interface, put on before a run and taken off after it, so that the pipeline is left
as it was found. What they compute is counted from below: a tap inside every module that computes, under their hooks.
They are no methods of this library: `elision.apply` refuses them, and `elision.methods()` does not list them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from elision.bench.peers._base import Peer, Stage
from elision.bench.peers._run import as_found, run_peer
from elision.errors import UnknownName

__all__ = ["LIBRARIES", "Peer", "Stage", "as_found", "find", "peers", "run_peer"]

LIBRARIES = ("diffusers", "cache_dit")


def peers(library: str) -> Mapping[str, type[Peer]]:
    """The caches of a library by their short names."""
    found: Mapping[str, type[Peer]] = importlib.import_module(f"{__name__}.{library}").PEERS
    return found


def find(library: str, name: str) -> type[Peer]:
    """A cache by library and short name."""
    known = peers(library)
    key = name.replace("-", "_")
    if key not in known:
        raise UnknownName.of(f"cache of {library}", name, known)
    return known[key]
