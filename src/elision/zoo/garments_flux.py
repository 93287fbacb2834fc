"""`garments-flux`: a class-conditional rectified flow on Fashion-MNIST in diffusers' own `FluxTransformer2DModel`.

The image is its own latent: 32 x 32 pixels in 4 x 4 patches are 64 tokens of 16 numbers. A prompt is a class name; its
"text" is four one-hot tokens, so that no text encoder has to ship. The unconditional branch is an eleventh class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from elision.errors import OptionError
from elision.zoo import _training
from elision.zoo._quality import frechet
from elision.zoo.garments import CLASSES, accuracy, load_garments

SIZE, PATCH, TEXT = 32, 4, 4
NULL = len(CLASSES)
CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": PATCH * PATCH,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}


def pack(images: Tensor) -> Tensor:
    """[B, 1, 32, 32] pixels to [B, 64, 16] tokens, row by row."""
    b, n = len(images), SIZE // PATCH
    return images.reshape(b, n, PATCH, n, PATCH).permute(0, 1, 3, 2, 4).reshape(b, n * n, PATCH * PATCH)


def unpack(tokens: Tensor) -> Tensor:
    """[B, 64, 16] tokens to [B, 1, 32, 32] pixels, the inverse of `pack`."""
    b, n = len(tokens), SIZE // PATCH
    return tokens.reshape(b, n, n, PATCH, PATCH).permute(0, 1, 3, 2, 4).reshape(b, 1, SIZE, SIZE)


def condition(labels: Tensor) -> dict[str, Tensor]:
    """The keyword arguments of the transformer that say what to draw: `labels` [B], 10 is "anything"."""
    hot = torch.nn.functional.one_hot(labels, NULL + 1).float()  # [B, 11]
    place = torch.eye(TEXT, device=labels.device).expand(len(labels), -1, -1)  # [B, 4, 4]
    text = torch.cat([hot[:, None].expand(-1, TEXT, -1), place], dim=-1)  # [B, 4, 15]
    side = torch.arange(SIZE // PATCH, device=labels.device).float()
    image_ids = torch.cartesian_prod(torch.zeros(1, device=labels.device), side, side)  # [64, 3]
    return {
        "encoder_hidden_states": torch.nn.functional.pad(text, (0, 1)),
        "pooled_projections": torch.nn.functional.pad(hot, (0, 16 - hot.shape[-1])),
        "txt_ids": torch.zeros(TEXT, 3, device=labels.device),
        "img_ids": image_ids,
    }


class GarmentsPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws garments by class name, in the manner of diffusers' image pipelines."""

    transformer: FluxTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def labels(self, prompt: str | int | Sequence[str | int]) -> Tensor:
        """Class numbers [B] of class names or numbers."""
        items = [prompt] if isinstance(prompt, (str, int)) else list(prompt)
        for item in items:
            if (item not in CLASSES) if isinstance(item, str) else not 0 <= item <= NULL:
                raise OptionError(f"prompt {item!r} is no class of this model; classes: {', '.join(CLASSES)}")
        numbers = [CLASSES.index(item) if isinstance(item, str) else item for item in items]
        return torch.tensor(numbers, device=self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        num_inference_steps: int = 28,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        batched_cfg: bool = False,
    ) -> ImagePipelineOutput:
        """Sample one image per class name.

        Args:
            prompt: class names (see `CLASSES`) or numbers.
            num_inference_steps: Euler steps.
            guidance_scale: true classifier-free guidance; 1 turns the unconditional branch off.
            generator: source of the noise, when `latents` is not given.
            latents: noise tokens [B, 64, 16].
            output_type: "pil", "np" or "pt" ([B, 1, 32, 32] in [0, 1]).
            batched_cfg: both branches in one call of twice the batch (unconditional rows first) instead of two calls.
        """
        labels = self.labels(prompt)
        shape = (len(labels), (SIZE // PATCH) ** 2, PATCH * PATCH)
        dtype = self.transformer.dtype
        x = randn_tensor(shape, generator=generator, device=labels.device, dtype=dtype) if latents is None else latents
        cond, uncond = condition(labels), condition(torch.full_like(labels, NULL))
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist())
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self._guided(x, t, cond, uncond, guidance_scale, batched_cfg), t, x)[0]
                bar.update()
        self.maybe_free_model_hooks()
        pixels = unpack(x).float().clamp(-1, 1) * 0.5 + 0.5
        if output_type == "pt":
            return ImagePipelineOutput(images=pixels)
        arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=arrays if output_type == "np" else self.numpy_to_pil(arrays))

    def _guided(
        self, x: Tensor, t: Tensor, cond: dict[str, Tensor], uncond: dict[str, Tensor], scale: float, batched: bool
    ) -> Tensor:
        time = (t / 1000).to(x.dtype).expand(len(x))
        if scale != 1 and batched:
            rows = ("encoder_hidden_states", "pooled_projections")  # positions have no batch axis
            both = {k: torch.cat([uncond[k], v]) if k in rows else v for k, v in cond.items()}
            with self.transformer.cache_context("cond_uncond"):
                v = self.transformer(torch.cat([x, x]), timestep=time.repeat(2), return_dict=False, **both)[0]
            v_uncond, v_cond = v.chunk(2)
        else:
            with self.transformer.cache_context("cond"):
                v_cond = self.transformer(x, timestep=time, return_dict=False, **cond)[0]
            if scale == 1:
                return v_cond  # type: ignore[no-any-return]
            with self.transformer.cache_context("uncond"):
                v_uncond = self.transformer(x, timestep=time, return_dict=False, **uncond)[0]
        return v_uncond + scale * (v_cond - v_uncond)  # type: ignore[no-any-return]


def train_pipeline(
    steps: int = 3500, batch: int = 64, lr: float = 2e-3, seed: int = 0, config: dict[str, Any] | None = None
) -> GarmentsPipeline:
    """The recipe of `garments-flux`: velocity matching with logit-normal times and one label in ten dropped."""
    torch.manual_seed(seed)
    images, labels = load_garments("train")
    tokens = pack(images)
    model = FluxTransformer2DModel(**(config or CONFIG))

    def loss(step: int) -> Tensor:
        del step
        rows = torch.randint(len(tokens), (batch,))
        x0, noise = tokens[rows], torch.randn(batch, *tokens.shape[1:])
        sigma = torch.sigmoid(torch.randn(batch))
        what = torch.where(torch.rand(batch) < 0.1, NULL, labels[rows])
        x = torch.lerp(x0, noise, sigma[:, None, None])
        v = model(x, timestep=sigma, return_dict=False, **condition(what))[0]
        return torch.nn.functional.mse_loss(v, noise - x0)

    averaged = _training.fit(model, loss, steps=steps, lr=lr)
    return GarmentsPipeline(averaged, FlowMatchEulerDiscreteScheduler())


def load(folder: Path) -> GarmentsPipeline:
    """The trained pipeline, in float32."""
    where = {"local_files_only": True}
    transformer = FluxTransformer2DModel.from_pretrained(
        folder / "transformer", variant="fp16", dtype=torch.float32, **where
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", **where)
    pipe = GarmentsPipeline(transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train(folder: Path, **options: Any) -> None:
    """Train and write a diffusers folder with float16 weights."""
    save(train_pipeline(**options), folder)


def save(pipe: GarmentsPipeline, folder: Path) -> None:
    """Write the pipeline with float16 weights."""
    pipe.transformer.half()
    pipe.save_pretrained(folder, variant="fp16")
    config = folder / "transformer" / "config.json"
    entries = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(entries, indent=2) + "\n")  # where it was loaded from is nobody's business
    pipe.transformer.float()


def check(
    pipe: GarmentsPipeline, samples: int = 1000, steps: int = 28, guidance: float = 2.0, seed: int = 0
) -> dict[str, Any]:
    """Sample all classes equally often; the zoo's classifier says how many it recognises."""
    from elision import zoo  # the package lists this module

    classifier = zoo.load("garments-classifier")
    labels = torch.arange(samples) % len(CLASSES)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        pipe(rows.tolist(), steps, guidance, generator, output_type="pt").images for rows in torch.split(labels, 100)
    ]
    images = torch.cat(drawn) * 2 - 1
    real, _ = load_garments("t10k")
    with torch.no_grad():
        sets = [torch.cat([classifier.features(x) for x in torch.split(y, 500)]) for y in (images, real)]
    per_class = {name: accuracy(classifier, images[labels == i], labels[labels == i]) for i, name in enumerate(CLASSES)}
    return {
        "samples": samples,
        "steps": steps,
        "guidance": guidance,
        "recognised": round(accuracy(classifier, images, labels), 4),
        "recognised_by_class": {name: round(share, 3) for name, share in per_class.items()},
        "frechet_feature_distance": round(frechet(*(features.double().numpy() for features in sets)), 3),
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
    }
