"""Speed and memory of the denoise engine, paired in one process on a model in which computing dominates.

    python benchmarks/denoise_speed.py --rounds 5 --out results/denoise_speed.jsonl

The model is a `FluxTransformer2DModel` of 12 blocks and width 512 with random weights, 256 image and 64 text tokens,
in a plain Euler loop of one call per step. Every round runs every variant once, in rotating order; figures are medians
over rounds of the ratio to the uncached run of the same round. The `ideal` rows are what the computed branches allow:
the same loop with the branch modules replaced by ones that return a ready tensor at the steps that are not computed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, TaylorSeerCacheConfig
from torch import Tensor, nn

import elision
from elision.session import storage_bytes

BRANCHES = [r"^transformer_blocks\.\d+\.(attn|ff|ff_context)$", r"^single_transformer_blocks\.\d+\.proj_out$"]
FEEDERS = [r"^single_transformer_blocks\.\d+\.(attn|proj_mlp)$"]


def build(double: int = 4, single: int = 8, heads: int = 8) -> FluxTransformer2DModel:
    """The benchmark model: width 64 * heads."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    return model.eval()


def inputs(image: int = 256, text: int = 64) -> dict[str, Tensor]:
    """Everything but the latent and the time."""
    g = torch.Generator().manual_seed(1)
    side = torch.arange(int(image**0.5)).float()
    return {
        "encoder_hidden_states": torch.randn(1, text, 128, generator=g),
        "pooled_projections": torch.randn(1, 64, generator=g),
        "img_ids": torch.cartesian_prod(torch.zeros(1), side, side),
        "txt_ids": torch.zeros(text, 3),
    }


@torch.no_grad()
def sample(model: nn.Module, given: dict[str, Tensor], steps: int, each: Callable[[int], None] | None = None) -> Tensor:
    """An Euler loop over `steps` steps."""
    x = torch.randn(1, len(given["img_ids"]), 64, generator=torch.Generator().manual_seed(2))
    for n in range(steps):
        if each is not None:
            each(n)
        with model.cache_context("cond"):  # type: ignore[operator]
            v = model(x, timestep=torch.full((1,), 1 - n / steps), return_dict=False, **given)[0]
        x = x - v / steps
    return x


Run = Callable[[], dict[str, Any]]


def timed(model: nn.Module, given: dict[str, Tensor], steps: int, each: Callable[[int], None] | None = None) -> Any:
    """A sample and the seconds it took."""
    started = time.perf_counter()
    out = sample(model, given, steps, each)
    return {"out": out, "seconds": time.perf_counter() - started}


def uncached(model: nn.Module, given: dict[str, Tensor], steps: int) -> Run:
    """The plain loop."""
    return lambda: timed(model, given, steps)


def ours(model: nn.Module, given: dict[str, Tensor], steps: int, name: str, **options: Any) -> Run:
    """One of our methods; the seconds of its own books come with it."""

    def run() -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", elision.ElisionWarning)
            with elision.apply(model, name, steps=steps, **options) as applied:
                out = timed(model, given, steps)
        report = applied.report()
        s = report.seconds
        return out | {
            "bytes": report.bytes_peak,
            "computed": report.steps_computed,
            "deciding_share": s.deciding / s.total,
            "standing_in_share": s.standing_in / s.total,
        }

    return run


def theirs(model: nn.Module, given: dict[str, Tensor], steps: int, interval: int, before: int) -> Run:
    """diffusers' TaylorSeer on the same sites, float32 factors."""
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=before,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=BRANCHES,
        skip_predict_identifiers=FEEDERS,
    )

    def run() -> dict[str, Any]:
        model.enable_cache(config)  # type: ignore[operator]
        try:
            out = timed(model, given, steps)
            kept: list[Tensor] = []
            for module in model.modules():
                registry = getattr(module, "_diffusers_hook", None)
                for hook in () if registry is None else registry.hooks.values():
                    for state in getattr(hook.state_manager, "_state_cache", {}).values():
                        kept += [f for factors in state.taylor_factors.values() for f in factors.values()]
            return out | {"bytes": storage_bytes(kept)}
        finally:
            model.disable_cache()  # type: ignore[operator]

    return run


def cache_dit_run(model: nn.Module, given: dict[str, Tensor], steps: int, full: list[int]) -> Run:
    """cache-dit's DBCache with its Taylor calibrator, computing the same steps as ours (a static mask)."""
    import cache_dit

    mask = [int(n in full) for n in range(steps)]

    def run() -> dict[str, Any]:
        with contextlib.redirect_stdout(sys.stderr):
            cache_dit.enable_cache(
                model,
                cache_config=cache_dit.DBCacheConfig(
                    Fn_compute_blocks=1,
                    Bn_compute_blocks=0,
                    max_warmup_steps=1,
                    num_inference_steps=steps,
                    enable_separate_cfg=False,
                    steps_computation_mask=mask,
                    steps_computation_policy="static",
                ),
                calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
            )
        try:
            return timed(model, given, steps)
        finally:
            with contextlib.redirect_stdout(sys.stderr):
                cache_dit.disable_cache(model)

    return run


class _Ready(nn.Module):
    """Runs a module, or returns what it returned last."""

    def __init__(self, inner: nn.Module, empty: bool) -> None:
        super().__init__()
        self.inner, self.empty, self.on, self.value = inner, empty, True, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.on:
            self.value = self.inner(*args, **kwargs)
            return self.value
        if self.empty:
            x = args[0] if args else kwargs["hidden_states"]
            return x.new_empty((*x.shape[:-1], 0))
        return self.value


@contextlib.contextmanager
def ready_branches(model: nn.Module) -> Iterator[list[_Ready]]:
    """Branch modules replaced by `_Ready` ones: a bound on what any branch-level cache can reach."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    made: list[_Ready] = []
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        single = hasattr(block, "proj_out")
        for name in ("proj_mlp", "attn", "proj_out") if single else ("attn", "ff", "ff_context"):
            inner = getattr(block, name)
            swapped.append((block, name, inner))
            made.append(_Ready(inner, empty=single and name != "proj_out"))
            setattr(block, name, made[-1])
    try:
        yield made
    finally:
        for block, name, inner in swapped:
            setattr(block, name, inner)


def ideal(model: nn.Module, given: dict[str, Tensor], steps: int, full: list[int]) -> Run:
    """The loop that computes the branches at `full` only and pays nothing for the rest."""

    def run() -> dict[str, Any]:
        with ready_branches(model) as made:

            def each(n: int) -> None:
                for module in made:
                    module.on = n in full

            return timed(model, given, steps, each)

    return run


def official_steps(steps: int, interval: int, first: int) -> list[int]:
    """Steps that TaylorSeer's own schedule computes."""
    return [*range(first), *range(first - 1 + interval, steps, interval)]


def diffusers_steps(steps: int, interval: int, before: int) -> list[int]:
    """Steps that diffusers' schedule computes."""
    return [n for n in range(steps) if n < before or (n - before - 1) % interval == 0]


def variants(model: nn.Module, given: dict[str, Tensor], steps: int) -> dict[str, Run]:
    """Every row of the table."""
    taylor = {"interval": 5, "first_enhance": 3, "max_order": 1}
    rows: dict[str, Run] = {
        "uncached": uncached(model, given, steps),
        "model tap, nothing elided (easycache, threshold 0)": ours(model, given, steps, "easycache", threshold=0.0),
        "20 branch sites, nothing elided (uniform, interval 1)": ours(model, given, steps, "uniform", interval=1),
        "taylorseer, nothing elided (interval 1)": ours(model, given, steps, "taylorseer", interval=1),
        "taylorseer N=5": ours(model, given, steps, "taylorseer", **taylor),
        "ideal for its steps": ideal(model, given, steps, official_steps(steps, 5, 3)),
        "taylorseer N=5, diffusers' schedule": ours(
            model, given, steps, "taylorseer", schedule="diffusers", factors_dtype="float32", **taylor
        ),
        "diffusers' TaylorSeer N=5, same sites": theirs(model, given, steps, 5, 3),
        "taylorseer N=5, site stack": ours(model, given, steps, "taylorseer", site="stack", **taylor),
    }
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import cache_dit  # noqa: F401
    except ImportError:
        return rows
    rows["cache-dit DBCache + TaylorSeer, same steps"] = cache_dit_run(model, given, steps, official_steps(steps, 5, 3))
    return rows


def measure(rows: dict[str, Run], rounds: int) -> list[dict[str, Any]]:
    """All rows, interleaved; medians of the paired ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    facts: dict[str, dict[str, Any]] = {}
    names = list(rows)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            facts[name] = rows[name]()
            spent = facts[name].pop("seconds")
            if turn:  # the first round warms up
                seconds[name].append(spent)
    base, out = seconds["uncached"], facts["uncached"].pop("out")
    table = []
    for name in names:
        value = facts[name].pop("out", out)
        ratios = [b / s for b, s in zip(base, seconds[name], strict=True)]
        table.append(
            {
                "row": name,
                "seconds": statistics.median(seconds[name]),
                "speedup": statistics.median(ratios),
                "speedup_low": min(ratios),
                "speedup_high": max(ratios),
                "relative_error": float((value - out).norm() / out.norm()),
                **facts[name],
            }
        )
    return table


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    packages = ("torch", "diffusers", "cache-dit")
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "elision": elision.__version__,
    } | {p: version(p) for p in packages if _installed(p)}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except ImportError:
        return False


def main() -> None:
    """Run, print, and append to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--only", default="", help="rows whose name contains this (and the uncached one)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = build()
    rows = variants(model, inputs(), given.steps)
    rows = {k: v for k, v in rows.items() if given.only in k or k == "uncached"}
    table = measure(rows, given.rounds)
    for row in table:
        print(json.dumps(row))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with given.out.open("a") as file:
            about = {"benchmark": "denoise_speed", "steps": given.steps, "rounds": given.rounds, **environment()}
            file.write(json.dumps({"environment": about, "table": table}) + "\n")


if __name__ == "__main__":
    main()
