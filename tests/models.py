"""Tiny, random, deterministic denoisers of the real diffusers classes, and a sampling loop around them.

Weights are drawn anew so that gates, modulations and final layers are not zero, as they are in a fresh model: a cache
that stands in for the wrong thing then changes the output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

Inputs = dict[str, Any]
Namer = Callable[[str], AbstractContextManager[Any]]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew: matrices scaled by fan-in, tables and biases small, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "scale_shift_table" in name:
                p.copy_(0.3 * noise)
            elif p.ndim >= 2:
                p.copy_(noise / p[0].numel() ** 0.5)
            elif name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise)
    return model.eval().requires_grad_(False)


def draw(*shape: int, seed: int) -> Tensor:
    """Normal numbers that depend on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 4),
    )


def _flux_guided() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def _flux_inputs(batch: int, size: int, seed: int) -> Inputs:
    side = torch.arange(size).float()
    return {
        "encoder_hidden_states": draw(1, 3, 8, seed=seed + 1).repeat(batch, 1, 1),
        "pooled_projections": draw(1, 8, seed=seed + 2).repeat(batch, 1),
        "txt_ids": torch.zeros(3, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), side, side),
    }


def _kontext_inputs(batch: int, size: int, seed: int) -> Inputs:
    """Positions of the image that is drawn (first coordinate 0), then of the picture that is edited (1)."""
    side = torch.arange(size).float()
    return {**_flux_inputs(batch, size, seed), "img_ids": torch.cartesian_prod(torch.arange(2).float(), side, side)}


def _qwen() -> nn.Module:
    return QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {
        "encoder_hidden_states": draw(1, 3, 8, seed=seed + 1).repeat(batch, 1, 1),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, seed % 20 == 0]]).repeat(batch, 1),
        "img_shapes": [[(1, size, size), (1, size, size)]] * batch,
    }


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def _sd3_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {
        "encoder_hidden_states": draw(1, 3, 8, seed=seed + 1).repeat(batch, 1, 1),
        "pooled_projections": draw(1, 8, seed=seed + 2).repeat(batch, 1),
    }


def _dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )


def _dit_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {"class_labels": torch.full((batch,), seed % 1000)}


def _pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=8,
        use_additional_conditions=False,
    )


def _pixart_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {
        "encoder_hidden_states": draw(1, 3, 8, seed=seed + 1).repeat(batch, 1, 1),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _wan(in_channels: int) -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _wan_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {"encoder_hidden_states": draw(1, 3, 8, seed=seed + 1).repeat(batch, 1, 1)}


def _unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
        norm_num_groups=4,
    )


@dataclass(frozen=True)
class Kind:
    """One denoiser class: how to make it, and what to call it with.

    Attributes:
        build: makes the model, weights as diffusers initialises them.
        latent: shape of a latent of `batch` and `size`.
        inputs: keyword arguments beside latent and timestep; `seed` says which prompt.
        slot: attribute of a pipeline that holds it.
        scale: what the scheduler's timestep is divided by before the network sees it.
        extra: condition channels behind the latent ones (image-to-video).
        variance: whether the prediction carries as many variance channels.
        cond_first: order of a batched call.
        blocks: number of blocks, 0 if there is no adapter.
        edits: whether the tokens of a picture that is edited stand behind those of the latent.
    """

    build: Callable[[], nn.Module]
    latent: Callable[[int, int], tuple[int, ...]]
    inputs: Callable[[int, int, int], Inputs]
    slot: str = "transformer"
    scale: float = 1.0
    extra: int = 0
    variance: bool = False
    cond_first: bool = False
    blocks: int = 3
    edits: bool = False

    def make(self, seed: int = 0) -> nn.Module:
        """A model with random weights."""
        torch.manual_seed(0)
        return randomise(self.build(), seed)


def _image(batch: int, size: int) -> tuple[int, ...]:
    return (batch, 4, size, size)


KINDS: dict[str, Kind] = {
    "flux": Kind(_flux, lambda b, n: (b, n * n, 4), _flux_inputs, scale=1000.0, blocks=4),
    "sd3": Kind(_sd3, _image, _sd3_inputs),
    "dit": Kind(_dit, _image, _dit_inputs, variance=True, cond_first=True),
    "pixart": Kind(_pixart, _image, _pixart_inputs, variance=True, blocks=2),
    "wan": Kind(lambda: _wan(4), lambda b, n: (b, 4, 2, n, n), _wan_inputs, blocks=2),
    "wan_i2v": Kind(lambda: _wan(9), lambda b, n: (b, 4, 2, n, n), _wan_inputs, extra=5, blocks=2),
    "kontext": Kind(_flux, lambda b, n: (b, n * n, 4), _kontext_inputs, scale=1000.0, blocks=4, edits=True),
    "qwen": Kind(_qwen, lambda b, n: (b, n * n, 4), _qwen_inputs, scale=1000.0, edits=True),
    "unet": Kind(_unet, _image, _wan_inputs, slot="unet", blocks=0),
}


class Loop:
    """A pipeline in miniature: one or two denoisers, a scheduler, guidance in two calls, in one, or none.

    Attributes:
        called: how often the denoiser was called.
    """

    def __init__(self, kind: str, scheduler: Any = None, model: nn.Module | None = None, seed: int = 0) -> None:
        self.kind = KINDS[kind]
        self.scheduler = FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
        setattr(self, self.kind.slot, self.kind.make(seed) if model is None else model)
        self.called = 0

    @property
    def model(self) -> nn.Module:
        """The denoiser in its slot."""
        model: nn.Module = getattr(self, self.kind.slot)
        return model

    def call(self, x: Tensor, t: Tensor, inputs: Inputs, **more: Any) -> Tensor:
        """One call of the denoiser; the prediction without its variance."""
        self.called += 1
        if self.kind.extra:
            shape = (len(x), self.kind.extra, *x.shape[2:])
            x = torch.cat([x, draw(1, *shape[1:], seed=77).expand(shape)], dim=1)
        width = x.shape[1]
        if self.kind.edits:
            x = torch.cat([x, self.picture(width).repeat(len(x), 1, 1)], dim=1)
        time = (t / self.kind.scale).expand(len(x))
        out: Tensor = self.model(x, timestep=time, return_dict=False, **inputs, **more)[0]
        out = out[:, :width] if self.kind.edits else out
        return out.chunk(2, dim=1)[0] if self.kind.variance else out

    @staticmethod
    def picture(tokens: int) -> Tensor:
        """The picture [1, tokens, 4] that is edited: the same for every image of a batch."""
        return draw(1, tokens, 4, seed=55)

    def name(self, branch: str) -> AbstractContextManager[Any]:
        """Diffusers' context of a guidance branch, where the model class has them."""
        if hasattr(self.model, "cache_context"):
            return self.model.cache_context(branch)  # type: ignore[no-any-return, operator]
        return contextlib.nullcontext()

    def predict(self, x: Tensor, t: Tensor, mode: str, name: Namer, order: Sequence[str], size: int) -> Tensor:
        """The guided prediction of one step."""
        prompts = {"cond": self.kind.inputs(len(x), size, 10), "uncond": self.kind.inputs(len(x), size, 20)}
        if mode == "distilled":
            return self.call(x, t, prompts["cond"])
        v: dict[str, Tensor] = {}
        if mode == "batched":
            rows = ("cond", "uncond") if self.kind.cond_first else ("uncond", "cond")
            both = {key: _stack([prompts[row][key] for row in rows], len(x), key) for key in prompts["cond"]}
            v = dict(zip(rows, self.call(torch.cat([x, x]), t, both).chunk(2), strict=True))
        else:
            for branch in order:
                with name(branch):
                    v[branch] = self.call(x, t, prompts[branch])
        return v["uncond"] + 2.0 * (v["cond"] - v["uncond"])

    @torch.no_grad()
    def __call__(
        self,
        seed: int = 0,
        steps: int = 8,
        mode: str = "distilled",
        batch: int = 1,
        size: int = 4,
        order: Sequence[str] = ("cond", "uncond"),
        name: Namer | None = None,
        begin: int = 0,
        each: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            seed: of the noise.
            steps: of the scheduler.
            mode: "distilled" (one call per step), "sequential" or "batched" guidance.
            batch: samples.
            size: height and width of the latent.
            order: of the two calls of sequential guidance.
            name: context of a branch; by default diffusers' `cache_context` where there is one.
            begin: index into the timesteps to start at, as image-to-image pipelines do.
            each: called with the step number before every step, and may raise.
        """
        x = draw(*self.kind.latent(batch, size), seed=seed)
        self.scheduler.set_timesteps(steps)
        if begin:
            self.scheduler.set_begin_index(begin)
        for n, t in enumerate(self.scheduler.timesteps[begin:]):
            if each is not None:
                each(n)
            v = self.predict(x, t, mode, name or self.name, order, size)
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        return x


def _stack(values: list[Any], batch: int, key: str) -> Any:
    """Rows of both branches behind each other; what has no batch axis stays as it is."""
    if isinstance(values[0], list):
        return [row for value in values for row in value]
    if not isinstance(values[0], Tensor) or key.endswith("_ids"):
        return values[0]
    return torch.cat(values)


def snapshot(*roots: Any) -> list[tuple[str, Any]]:
    """The instance `__dict__` of every module and object, entry by entry, to compare by identity.

    Mutable containers of a module (`_parameters`, `_modules`, hooks) are opened one level, so that their entries are
    compared by identity as well.
    """
    rows: list[tuple[str, Any]] = []
    for r, root in enumerate(roots):
        parts = list(root.named_modules()) if isinstance(root, nn.Module) else [("", root)]
        for path, part in parts:
            for key, value in vars(part).items():
                rows.append((f"{r}:{path}:{key}", value))
                if isinstance(part, nn.Module) and isinstance(value, dict):
                    rows += [(f"{r}:{path}:{key}:{k}", v) for k, v in value.items()]
    return rows


def changed(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> list[str]:
    """Keys that appeared, vanished, or hold another object (or value)."""
    old, new = dict(before), dict(after)
    differing = [k for k in old if k in new and old[k] is not new[k] and not _equal(old[k], new[k])]
    return sorted({*(old.keys() ^ new.keys()), *differing})


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    return bool(a == b) if isinstance(a, (int, float, str, bool, type(None))) else False
