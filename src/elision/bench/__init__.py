"""Comparisons and claims: every method beside its baselines and controls, in one process, with confidence intervals.

Example:
    from elision.bench import compare_denoise

    result = compare_denoise("garments-flux", ["easycache:threshold=0.1,warmup_steps=4", "taylorseer:interval=3"])
    print(result.table())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elision.bench.claims import Claim, Finding
    from elision.bench.compare import Comparison, compare_denoise
    from elision.bench.dllm.compare import compare_dllm
    from elision.bench.policy.comparing import compare_policy
    from elision.bench.reproduce import run_claims

__all__ = ["Claim", "Comparison", "Finding", "compare_denoise", "compare_dllm", "compare_policy", "run_claims"]

_WHERE = {
    "Claim": "claims",
    "Comparison": "compare",
    "Finding": "claims",
    "compare_denoise": "compare",
    "compare_dllm": "dllm.compare",
    "compare_policy": "policy.comparing",
    "run_claims": "reproduce",
}


def __getattr__(name: str) -> Any:
    """Load the public names on first use: scipy and scikit-image are heavy."""
    if name not in _WHERE:
        raise AttributeError(f"module 'elision.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"elision.bench.{_WHERE[name]}"), name)
