"""Analytic FLOPs of a denoiser, by module, from the shapes of a call: counted on the meta device, so nothing runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode


def to_meta(tree: Any) -> Any:
    """The same arguments with every tensor replaced by an empty one of its shape and dtype on the meta device."""
    return tree_map(lambda leaf: leaf.detach().to("meta") if isinstance(leaf, Tensor) else leaf, tree)


def count(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int] | None:
    """FLOPs of one call by module path ("" is the whole), or None where the model cannot run on the meta device.

    Args:
        model: the denoiser; taps must be passive while this runs.
        args: positional and
        kwargs: keyword arguments, as `to_meta` made them.
    """
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter, torch.device("meta"):
            torch.func.functional_call(model, meta, args, dict(kwargs))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None  # data-dependent models; the report then says that FLOPs are unknown
    root = type(model).__name__
    counts = {name: sum(per.values()) for name, per in counter.get_flop_counts().items()}
    total = counter.get_total_flops()
    return {"": total} | {k.removeprefix(root + "."): v for k, v in counts.items() if k.startswith(root + ".")}


def of_modules(counts: Mapping[str, int], paths: Iterable[str]) -> int:
    """FLOPs of the modules at `paths`; modules that compute nothing are absent from the counts."""
    return sum(counts.get(path, 0) for path in paths)
