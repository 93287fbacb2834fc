"""The face: `apply`, `fit`, `methods`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elision.errors import Conflict, OptionError, UnknownName
from elision.method import FAMILIES, Method, MethodInfo, create, info, registry
from elision.profile import Profile
from elision.session import Applied


def methods(family: str | None = None) -> list[MethodInfo]:
    """Every method, or those of one family, as rows for a table."""
    if family is not None and family not in FAMILIES:
        raise UnknownName.of("family", family, FAMILIES)
    rows = [info(cls) for cls in registry().values()]
    return [row for row in rows if family in (None, row.family)]


def apply(
    target: Any,
    method: str | Method | Sequence[str | Method],
    *,
    steps: int | Sequence[float] | None = None,
    cond: slice | None = None,
    profile: Any = None,
    force: bool = False,
    shadow: bool = False,
    branches: Sequence[str] = (),
    **options: Any,
) -> Applied:
    """Turn a cache on; `remove()` on what it returns, or leaving the `with` block, turns it off exactly.

    Args:
        target: a diffusers pipeline or its denoiser; a transformers decoder or vision-language model; or a
            masked-diffusion language model (`elision.dllm`).
        method: the name of a method (see `methods()`), an option object, or a list of them to act together.
        steps: number of steps, or the timesteps, for bare denoisers; pipelines tell by themselves.
        cond: conditional rows of calls that carry both guidance branches, where the adapter does not know.
        profile: what `fit` made, or its path; with several methods a mapping from method name.
        force: use a profile although it was made for something else.
        shadow: also compute the true value at every stand-in and report the relative error.
        branches: names of the guidance branches in the order of their calls within a step, for pipelines that call the
            denoiser several times a step without `cache_context`, as in `branches=("cond", "uncond")`.
        **options: options of the method, when it is given by name.

    Raises:
        UnknownName: no such method or option.
        OptionError: an option out of its range.
        UnsupportedTarget: the method cannot work on this target.
        Conflict: the target already has a method applied, or the methods cannot act together.
        ProfileError: a profile is missing or does not fit.

    Example:
        with elision.apply(pipe, "easycache", threshold=0.05) as run:
            image = pipe("sneaker").images[0]
        print(run.report())
    """
    several = isinstance(method, Sequence) and not isinstance(method, str)
    items: list[str | Method] = list(method) if several else [method]  # type: ignore[arg-type, list-item]
    if not items:
        raise OptionError("no method given: name at least one, see elision.methods()")
    if options and (several or isinstance(items[0], Method)):
        raise OptionError(
            f"options {', '.join(options)} do not say which method they are for: give option objects that carry them"
        )
    made = [item if isinstance(item, Method) else create(item, **options) for item in items]
    families = {m.family for m in made}
    if len(families) > 1:
        raise Conflict(f"methods of different families ({', '.join(sorted(families))}): apply them one by one")
    settings = {
        "steps": steps,
        "cond": cond,
        "profile": profile,
        "force": force,
        "shadow": shadow,
        "branches": branches,
    }
    return made[0].attach(target, made, **settings)


def fit(target: Any, method: str | Method, *, calls: Sequence[Any], **options: Any) -> Profile:
    """Run the offline part of a method and return what it learned.

    Args:
        target: the pipeline or denoiser that the profile is for.
        method: the name of a method, or an option object.
        calls: what to run it on: prompts for a pipeline, keyword dictionaries for its `__call__`, or functions that
            take the target.
        **options: options of the method, when it is given by name.
    """
    if options and isinstance(method, Method):
        raise OptionError(f"options {', '.join(options)} beside an option object: put them into the object")
    if isinstance(calls, (str, dict)):
        raise OptionError(f"calls={calls!r} is one call: give a list of them")
    made = method if isinstance(method, Method) else create(method, **options)
    if not calls:
        raise OptionError("fit needs at least one call to learn from, got none")
    return made.fit(target, calls)
