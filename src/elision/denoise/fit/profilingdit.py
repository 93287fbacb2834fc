"""ProfilingDiT's offline part: how much of the foreground each block's attention finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from elision.denoise.adapters import adapter_for
from elision.denoise.fit._attention import AttentionWatch
from elision.denoise.fit._record import record, run_call
from elision.denoise.policy import Host
from elision.denoise.sites import Call, Site, common
from elision.denoise.steps import Step
from elision.errors import OptionError, UnsupportedTarget
from elision.hooks.diffusers import inspect_target, unwrap
from elision.profile import Profile, fingerprint

if TYPE_CHECKING:
    from elision.denoise.methods.profilingdit import ProfilingDiT

Segmentation = Literal["kmeans", "otsu"]


@dataclass(frozen=True)
class Masked:
    """A call of `fit` whose foreground is known.

    Attributes:
        call: what `fit` takes as a call.
        foreground: boolean, on the token grid: [frames, tokens] for all samples, or [B, frames, tokens].
    """

    call: Any
    foreground: Tensor

    def __call__(self, target: Any) -> Any:
        """Run the call."""
        return run_call(target, self.call)


def foreground_ratio(attention: Tensor, foreground: Tensor, threshold: float) -> Tensor:
    """R: the part of the foreground that receives more attention than `threshold`, averaged over frames.

    Args:
        attention: received by every token, [..., N].
        foreground: boolean [..., F, N / F].
        threshold: absolute.

    Returns:
        [...]; frames without foreground do not count, and without any the result is NaN.
    """
    mask = foreground.bool()
    high = attention.reshape(*attention.shape[:-1], *mask.shape[-2:]) > threshold
    return ((high & mask).sum(-1) / mask.sum(-1)).nanmean(-1)


def principal_components(prediction: Tensor, count: int = 3) -> Tensor:
    """The first principal components over channels, of all frames of a sample together.

    Args:
        prediction: [B, F, H, W, C].
        count: components, at most C.

    Returns:
        [B, F, H, W, count], in order of falling variance.
    """
    rows = prediction.flatten(1, 3).double()
    rows = rows - rows.mean(1, keepdim=True)
    _, axes = torch.linalg.eigh(rows.transpose(1, 2) @ rows)
    components: Tensor = rows @ axes[..., -min(count, rows.shape[-1]) :].flip(-1)
    return components.reshape(*prediction.shape[:4], -1)


def segment(components: Tensor, how: Segmentation, rounds: int = 20) -> Tensor:
    """Foreground of one frame: two clusters; the one that holds less of the frame's border is the foreground.

    Args:
        components: [H, W, c], principal components.
        how: "kmeans" on all components, started from the extremes of the first; "otsu" on the first alone.
        rounds: of k-means.

    Returns:
        boolean [H, W].
    """
    x = components.flatten(0, 1)
    first = x[:, 0]
    if how == "otsu":
        inside = first > otsu(first)
    else:
        centres = torch.stack([x[first.argmin()], x[first.argmax()]])
        for _ in range(rounds):
            inside = torch.cdist(x, centres).argmin(1).bool()
            if inside.all() or not inside.any():
                break
            centres = torch.stack([x[~inside].mean(0), x[inside].mean(0)])
    h, w = components.shape[:2]
    mask = inside.reshape(h, w)
    border = torch.ones(h, w, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return ~mask if mask[border].float().mean() > 0.5 else mask


def otsu(values: Tensor) -> Tensor:
    """The threshold that maximises the variance between the two sides; `values` [n]."""
    x = values.sort().values
    below = torch.arange(1, len(x), device=x.device)
    sums = x.cumsum(0)
    means_below, means_above = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(x) - below)
    best = (below * (len(x) - below) * (means_above - means_below).square()).argmax()
    return (x[best] + x[best + 1]) / 2


def frames_of(prediction: Tensor) -> Tensor:
    """A prediction as [B, F, H, W, C]: videos, images, or tokens, which are taken for a square if they can be one."""
    if prediction.ndim == 5:
        return prediction.movedim(1, -1)
    if prediction.ndim == 4:
        return prediction.movedim(1, -1)[:, None]
    side = isqrt(prediction.shape[1])
    shape = (side, side) if side * side == prediction.shape[1] else (1, prediction.shape[1])
    return prediction.reshape(len(prediction), 1, *shape, -1)


def foreground_of(prediction: Tensor, tokens: int, how: Segmentation) -> Tensor:
    """The foreground of a noise prediction on the token grid, boolean [B, F, tokens / F], without any supervision."""
    components = principal_components(frames_of(prediction))
    masks = torch.stack([torch.stack([segment(frame, how) for frame in sample]) for sample in components.cpu()])
    b, f, h, w = masks.shape
    patch = isqrt(f * h * w // tokens)
    if patch == 0 or f * h * w != tokens * patch * patch or h % patch or w % patch:
        raise UnsupportedTarget(
            f"profilingdit: a prediction of {f}x{h}x{w} does not lie on {tokens} square patches: give the masks, "
            "as in calls=[Masked(call, foreground)] of elision.denoise.fit.profilingdit"
        )
    blocks = masks.float().reshape(b, f, h // patch, patch, w // patch, patch).mean(dim=(3, 5))
    return (blocks >= 0.5).flatten(2)


class _Ratios:
    """R of every block at every step of the leading guidance branch, over samples and calls."""

    def __init__(self, method: ProfilingDiT, watch: AttentionWatch, paths: Sequence[str]) -> None:
        self.method = method
        self.watch = watch
        self.paths = paths
        self.known: Tensor | None = None
        self.rows: dict[int, list[Tensor]] = {}

    def seen(self, host: Host, step: Step, site: Site, call: Call, out: Tensor) -> None:
        maps = self.watch.take()
        if not step.leads or step.n < self.method.warmup_steps:
            return
        lost = [path for path in self.paths if path not in maps]
        if lost:
            raise UnsupportedTarget(
                f"profilingdit: no scaled_dot_product_attention was seen in {lost[0]}: set the attention backend to "
                "'native'"
            )
        rows = slice(None) if step.cond is None else step.cond
        prediction, n = common(call.x, out)[1][rows].detach(), maps[self.paths[0]].shape[-1]
        masks = self.known if self.known is not None else foreground_of(prediction, n, self.method.segmentation)
        if masks.shape[-1] * masks.shape[-2] != n or (masks.ndim == 3 and len(masks) != len(prediction)):
            raise OptionError(
                f"profilingdit: a foreground of {tuple(masks.shape)} does not fit {len(prediction)} samples of {n} "
                "tokens; it must be [frames, tokens per frame], with or without a batch in front"
            )
        threshold = self.method.attention_threshold / n
        both = [foreground_ratio(maps[path][rows].cpu(), masks.cpu(), threshold) for path in self.paths]
        self.rows.setdefault(step.n, []).extend(torch.stack(both, dim=1))

    def table(self) -> tuple[list[int], Tensor]:
        """Steps, and R as [steps, blocks]."""
        steps = sorted(self.rows)
        if not steps:
            raise OptionError(
                f"profilingdit: no step from warmup_steps={self.method.warmup_steps} on was seen: give longer calls"
            )
        table = torch.stack([torch.stack(self.rows[n]).nanmean(0) for n in steps]).float()
        if table.nanmean(0).isnan().any():
            raise OptionError("profilingdit: no foreground was found in any call: give masks, or other calls")
        return steps, table


def measure(method: ProfilingDiT, target: Any, calls: Sequence[Any], *, branches: Sequence[str] = ()) -> Profile:
    """Run `calls` uncached and make the profile; a call may be `Masked`."""
    found = inspect_target(target)
    if len(found.denoisers) > 1:
        raise OptionError(f"profilingdit: {found.name} has {len(found.denoisers)} denoisers: fit and apply each alone")
    model = unwrap(found.denoisers[0])
    host = Host(model, adapter_for(model), found.scheduler)
    if not host.adapter.lists:
        host.site("run", "profilingdit")  # raises, naming the classes that have blocks
    if host.adapter.others or any(spec.joined for spec in host.adapter.blocks.values()):
        raise UnsupportedTarget(
            f"profilingdit: the attention of {type(model).__name__} is not that of its image tokens alone, or of them "
            "and text apart, so no block can be called background: give blocks= and apply without a profile"
        )
    blocks = host.adapter.attention(model)
    watch = AttentionWatch(model, blocks, host.adapter.image, host.adapter.joint == "text first")
    ratios = _Ratios(method, watch, list(blocks))
    try:
        for call in calls:
            ratios.known = call.foreground if isinstance(call, Masked) else None
            record(target, "model", [call], ratios.seen, branches=branches)
    finally:
        watch.remove()
    steps, table = ratios.table()
    facts = {"steps": steps, "blocks": list(blocks), "samples": len(next(iter(ratios.rows.values())))}
    return Profile(fingerprint("profilingdit", model, found.scheduler, None), {"ratio": table}, facts)
