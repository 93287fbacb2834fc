"""`elision doctor`: what is installed, and whether upstream still behaves as the taps expect."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from elision.cli._common import JsonFlag, out, print_json

_PACKAGES = {
    "core": ("torch", "numpy", "safetensors", "typer", "rich"),
    "diffusers": ("diffusers", "accelerate"),
    "transformers": ("transformers",),
    "bench": ("scipy", "scikit-image", "matplotlib", "jinja2", "lpips"),
    "serve": ("starlette", "uvicorn", "httpx", "usearch", "sentence-transformers"),
}


def _tap_contract() -> str:
    """`nn.Module.__call__` must prefer the instance attribute `_compiled_call_impl`."""
    import torch

    module = torch.nn.Linear(2, 2)
    module.__dict__["_compiled_call_impl"] = lambda *args, **kwargs: "tapped"
    if module(torch.zeros(1, 2)) != "tapped":
        raise AssertionError("nn.Module.__call__ no longer looks at _compiled_call_impl: taps would never be reached")
    return "nn.Module.__call__ prefers the instance's _compiled_call_impl"


def _cache_context() -> str:
    """Diffusers' denoisers must name their guidance branches by `cache_context(name, ...)`."""
    import dataclasses
    import inspect

    from diffusers import FluxTransformer2DModel
    from diffusers.hooks import hooks

    parameters = list(inspect.signature(FluxTransformer2DModel.cache_context).parameters)
    if parameters[1:2] != ["name"]:
        raise AssertionError(f"cache_context takes {parameters}, expected a name: branches could not be told apart")
    context: Any = getattr(hooks, "CacheContext", None)
    if context is None:
        return "cache_context tells the branch by name only"
    fields = {field.name for field in dataclasses.fields(context)}
    known = {"name", "step_index", "num_inference_steps", "timestep", "sigma"}
    if not known <= fields:
        raise AssertionError(f"CacheContext lacks {', '.join(sorted(known - fields))}")
    return f"CacheContext has {', '.join(sorted(known))}"


def _scheduler() -> str:
    """Schedulers must have the attributes that the clock reads."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    lacking: list[str] = []
    for cls in (FlowMatchEulerDiscreteScheduler, DDIMScheduler):
        scheduler = cls()
        scheduler.set_timesteps(4)
        if len(scheduler.timesteps) != 4:
            lacking.append(f"{cls.__name__}.timesteps")
        lacking += [f"{cls.__name__}.{name}" for name in ("set_timesteps", "step") if not hasattr(scheduler, name)]
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    lacking += [f"FlowMatchEuler.{name}" for name in ("sigmas", "begin_index") if not hasattr(flow, name)]
    if lacking:
        raise AssertionError(f"missing: {', '.join(lacking)}; the clock could not tell the step")
    return "schedulers have timesteps, sigmas, begin_index, set_timesteps, step"


def _end_to_end() -> str:
    """A tiny denoiser must be tapped, told apart, and put back exactly."""
    import torch

    import elision

    class Toy(torch.nn.Module):
        """A denoiser of one line."""

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return x * timestep

    toy = Toy()
    before = dict(toy.__dict__)
    with elision.apply(toy, "uniform", interval=2, site="model", steps=4) as run:
        for t in (4.0, 3.0, 2.0, 1.0):
            toy(torch.ones(1, 4, 4), torch.tensor(t))
    if run.report().to_dict()["steps_reused"] != 2:
        raise AssertionError(f"uniform reuse at every second of 4 steps reported {run.report()}")
    if toy.__dict__ != before:
        raise AssertionError("remove() did not put the denoiser back")
    return "a toy denoiser was tapped, half its steps reused, and put back exactly"


_CHECKS: dict[str, Callable[[], str]] = {
    "tap": _tap_contract,
    "cache context": _cache_context,
    "scheduler": _scheduler,
    "end to end": _end_to_end,
}


def _installed() -> dict[str, dict[str, str | None]]:
    found: dict[str, dict[str, str | None]] = {}
    for extra, packages in _PACKAGES.items():
        found[extra] = {}
        for package in packages:
            try:
                found[extra][package] = version(package)
            except PackageNotFoundError:
                found[extra][package] = None
    return found


def _run(check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"ok": True, "detail": check()}
    except ImportError as error:
        return {"ok": None, "detail": f"not checked: {error.name} is not installed"}
    except Exception as error:  # whatever upstream does, the doctor reports it
        return {"ok": False, "detail": f"{type(error).__name__}: {error}"}


def doctor(as_json: JsonFlag = False) -> None:
    """Print versions and check the upstream behaviour that the library builds on; exit code 1 if a check fails."""
    import elision

    checks = {name: _run(check) for name, check in _CHECKS.items()}
    facts = {
        "elision": elision.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "chromium": shutil.which("chromium") is not None,
        "accelerator": _accelerator(),
        "packages": _installed(),
        "checks": checks,
    }
    if as_json:
        print_json(facts)
    else:
        _print(facts)
    if any(row["ok"] is False for row in checks.values()):
        raise typer.Exit(1)


def _accelerator() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _print(facts: dict[str, Any]) -> None:
    from rich.markup import escape

    out.print(f"elision {facts['elision']}, Python {facts['python']}, {facts['accelerator'] or 'CPU only'}")
    for extra, packages in facts["packages"].items():
        parts = [f"{name} {number}" if number else f"[yellow]{name} –[/]" for name, number in packages.items()]
        out.print(f"  {extra:<15}{', '.join(parts)}", highlight=False)
    marks = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[yellow]skipped[/]"}
    for name, row in facts["checks"].items():
        out.print(f"  {name:<15}{marks[row['ok']]}  {escape(row['detail'])}", highlight=False)
