"""Which methods can act together: a pure function on what each of them decides and holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from elision.denoise.policy import Claims
from elision.denoise.sites import Site
from elision.errors import Conflict


def conflict(a: Claims, b: Claims) -> str | None:
    """Why two methods cannot act together, None if they can.

    They cannot when both replace the same value; when one leaves out a part of what the other keeps the difference over
    (runs of blocks that overlap), or the block by whose input the other decides; when one replaces a value outside the
    other, which then misses steps, unless the inner one tolerates gaps; when both hold the same control of the sampler;
    or when one has the denoiser called with some of its tokens and the other keeps something inside it, where it would
    find another number of them.
    """
    same = a.decides & b.decides
    if same:
        return f"both decide {_some({site.key for site in same})}"
    torn = next(((x, y) for x in a.decides for y in b.decides if _torn(x, y)), None)
    if torn is not None:
        return f"{' and '.join(sorted(site.key for site in torn))} overlap, and neither lies inside the other"
    blind = {y.entry for one, other in ((a, b), (b, a)) for x in one.decides for y in other.decides if x.blinds(y)}
    if blind:
        return f"one skips {_some(blind)} at some steps, and the other decides by what goes into it"
    for outer, inner in ((a, b), (b, a)):
        hidden = {i.key for o in outer.decides for i in inner.decides if o.contains(i)}
        if hidden and inner.needs_every_step:
            return f"one skips {_some(hidden)} at some steps, and the other must see every step"
        if hidden and not inner.tolerates_gaps:
            return f"one skips {_some(hidden)} at some steps, and the other does not tolerate gaps"
    for one, other in ((a, b), (b, a)):
        inside = {site.key for site in other.decides if site.level not in ("guided", "model")}
        if "tokens" in one.controls and inside:
            return f"one has the denoiser called with some of its tokens, and the other keeps {_some(inside)} of all"
    held = a.controls & b.controls
    if held:
        return f"both hold {', '.join(sorted(held))}"
    return None


def _torn(x: Site, y: Site) -> bool:
    """Whether two sites share modules and neither lies inside the other."""
    return not (x.contains(y) or y.contains(x)) and (x.overlaps(y) or y.overlaps(x))


def check(claims: Sequence[tuple[str, Claims]]) -> None:
    """Raise `Conflict` for the first pair of named claims that cannot act together."""
    for (name_a, a), (name_b, b) in combinations(claims, 2):
        reason = conflict(a, b)
        if name_a == name_b:
            reason = "it is given twice, and reports go by its name" + (f"; {reason}" if reason else "")
        if reason:
            raise Conflict(f"{name_a} and {name_b} cannot be applied together: {reason}")


def _some(keys: set[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
