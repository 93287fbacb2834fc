"""Scaled dot product attention as it happens: what a module hands to it can be seen, and changed, call by call.

Every attention module of diffusers that uses torch's own kernels ends in `scaled_dot_product_attention`, with queries
and keys after their norms and rotation. A `TorchFunctionMode` around one call of one module sees exactly those; nothing
is patched. Other backends (flash-attn, sage, xformers) bypass it, which whoever listens must notice by counting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
Change = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]


class AttentionCalls(TorchFunctionMode):
    """While entered, every scaled dot product attention is shown to a function.

    Args:
        change: is given the arguments by name and returns those to go on with, or None to leave them as they are.
    """

    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Change the call if it is one."""
        if func is scaled_dot_product_attention:
            given = dict(zip(_NAMES, args, strict=False)) | (kwargs or {})
            changed = self._change(given)
            if changed is not None:
                return func(**changed)
        return func(*args, **(kwargs or {}))
