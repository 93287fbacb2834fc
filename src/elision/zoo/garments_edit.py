"""`garments-edit`: an instruction editor of two-garment canvases in diffusers' own `FluxTransformer2DModel`.

The layout is FLUX.1 Kontext's: the transformer reads the instruction, the noise tokens and the tokens of the picture
to be edited, which stand at the same rows and columns but have 1 as their first coordinate, and its output at the
noise tokens is the velocity. A canvas is two garments side by side, 32 x 64 pixels, 128 tokens of 4 x 4; an
instruction says which of the two is replaced, and by what. So the edited region is known: it is one half.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elision.errors import OptionError
from elision.zoo import _training, garments_flux
from elision.zoo.garments import CLASSES, accuracy, load_garments
from elision.zoo.garments_flux import CONFIG, NULL, PATCH, TEXT

HEIGHT, WIDTH = 32, 64
ROWS, COLUMNS = HEIGHT // PATCH, WIDTH // PATCH
SIDES = ("left", "right")
GUIDANCE = 2.5
_EXAMPLES = "examples.safetensors"
_INSTRUCTION = re.compile(rf"replace the ({'|'.join(SIDES)}) item (?:by|with) (?:an? )?({'|'.join(CLASSES)}|anything)")


def pack(images: Tensor) -> Tensor:
    """[B, 1, 32, 64] pixels to [B, 128, 16] tokens, row by row."""
    x = images.reshape(len(images), ROWS, PATCH, COLUMNS, PATCH).permute(0, 1, 3, 2, 4)
    return x.reshape(len(images), ROWS * COLUMNS, PATCH * PATCH)


def unpack(tokens: Tensor) -> Tensor:
    """[B, 128, 16] tokens to [B, 1, 32, 64] pixels, the inverse of `pack`."""
    x = tokens.reshape(len(tokens), ROWS, COLUMNS, PATCH, PATCH).permute(0, 1, 3, 2, 4)
    return x.reshape(len(tokens), 1, HEIGHT, WIDTH)


def instruction(side: int, label: int) -> str:
    """The sentence that asks for an item of class `label` at `side` (0 is left, 1 is right)."""
    return f"replace the {SIDES[side]} item by {(*CLASSES, 'anything')[label]}"


def parse(prompt: str) -> tuple[int, int]:
    """Side and class number of an instruction; class 10 is "anything"."""
    found = _INSTRUCTION.fullmatch(prompt.strip().lower().rstrip("."))
    if found is None:
        raise OptionError(
            f"prompt {prompt!r} is no instruction of this model; say 'replace the left item by coat': "
            f"left or right, and one of {', '.join(CLASSES)}, anything"
        )
    return SIDES.index(found[1]), (*CLASSES, "anything").index(found[2])


def edited(sides: Tensor) -> Tensor:
    """True edit mask [B, 128] over the tokens, for `sides` [B]."""
    right = torch.arange(COLUMNS, device=sides.device).ge(COLUMNS // 2).repeat(ROWS)
    return right[None] == sides[:, None].bool()


def condition(sides: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The keyword arguments of the transformer that say what to do: `sides` [B], `labels` [B], 10 is "anything"."""
    device = labels.device
    hot = nn.functional.one_hot(labels, NULL + 1).float()  # [B, 11]
    side = nn.functional.one_hot(sides, 2).float()
    place = torch.eye(TEXT, device=device).expand(len(labels), -1, -1)  # [B, 4, 4]
    signed = (side[:, 1] - side[:, 0])[:, None, None].expand(-1, TEXT, 1)
    text = torch.cat([hot[:, None].expand(-1, TEXT, -1), place, signed], dim=-1)  # [B, 4, 16]
    axes = [torch.arange(n, device=device).float() for n in (2, ROWS, COLUMNS)]
    return {
        "encoder_hidden_states": text,
        "pooled_projections": torch.cat([hot, side, torch.zeros(len(labels), 3, device=device)], dim=-1),
        "txt_ids": torch.zeros(TEXT, 3, device=device),
        "img_ids": torch.cartesian_prod(*axes),  # [256, 3]: noise tokens, then those of the reference
    }


class GarmentsEditPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Edits canvases of two garments by instruction, in the manner of diffusers' `FluxKontextPipeline`."""

    transformer: FluxTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def reference(self, image: Any) -> Tensor:
        """Tokens [B, 128, 16] of canvases: a tensor [B, 1, 32, 64] or an array [B, 32, 64, 1] in [0, 1], or PIL."""
        if isinstance(image, Tensor):
            pixels = image
        elif isinstance(image, np.ndarray):
            pixels = torch.from_numpy(image).permute(0, 3, 1, 2)
        else:
            pictures = list(image) if isinstance(image, (list, tuple)) else [image]
            pixels = torch.stack([torch.from_numpy(np.array(p.convert("L")))[None] / 255 for p in pictures])
        if pixels.ndim != 4 or pixels.shape[1:] != (1, HEIGHT, WIDTH):
            raise OptionError(f"image has the shape {tuple(pixels.shape)}; this model edits [B, 1, {HEIGHT}, {WIDTH}]")
        return pack(pixels.to(self._execution_device, self.transformer.dtype) * 2 - 1)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        prompt: str | Sequence[str],
        num_inference_steps: int = 28,
        guidance_scale: float = GUIDANCE,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Edit one canvas per instruction.

        Args:
            image: canvases, as `reference` takes them.
            prompt: instructions such as "replace the left item by coat".
            num_inference_steps: Euler steps.
            guidance_scale: true classifier-free guidance against "replace that item by anything", in two calls
                ("cond" and "uncond" of `cache_context`); 1 turns it off.
            generator: source of the noise, when `latents` is not given.
            latents: noise tokens [B, 128, 16].
            output_type: "pil", "np" or "pt" ([B, 1, 32, 64] in [0, 1]).
        """
        reference = self.reference(image)
        orders = [parse(p) for p in ([prompt] if isinstance(prompt, str) else prompt)]
        if len(orders) != len(reference):
            raise OptionError(f"{len(orders)} instructions for {len(reference)} images: give one each")
        sides, labels = torch.tensor(orders, device=reference.device).unbind(1)
        cond, uncond = condition(sides, labels), condition(sides, torch.full_like(labels, NULL))
        x = latents
        if x is None:
            x = randn_tensor(reference.shape, generator=generator, device=reference.device, dtype=reference.dtype)
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist())
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                v = self._velocity("cond", x, reference, t, cond)
                if guidance_scale != 1:
                    v_uncond = self._velocity("uncond", x, reference, t, uncond)
                    v = v_uncond + guidance_scale * (v - v_uncond)
                x = self.scheduler.step(v, t, x)[0]
                bar.update()
        self.maybe_free_model_hooks()
        pixels = unpack(x).float().clamp(-1, 1) * 0.5 + 0.5
        if output_type == "pt":
            return ImagePipelineOutput(images=pixels)
        arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=arrays if output_type == "np" else self.numpy_to_pil(arrays))

    def _velocity(self, branch: str, x: Tensor, reference: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        both = torch.cat([x, reference], dim=1)  # [B, 256, 16]
        time = (t / 1000).to(x.dtype).expand(len(x))
        with self.transformer.cache_context(branch):
            out = self.transformer(both, timestep=time, return_dict=False, **condition)[0]
        return out[:, : x.shape[1]]  # type: ignore[no-any-return]


def train_pipeline(
    rounds: Sequence[int] = (1100, 700),
    batch: int = 16,
    lr: float = 1.2e-3,
    seed: int = 0,
    start: str | None = "garments-flux",
    keep: Callable[[int, nn.Module], None] | None = None,
) -> GarmentsEditPipeline:
    """The recipe of `garments-edit`: velocity matching from the weights of `garments-flux`.

    Canvases are pairs of training images, the new item is a third one; times are logit-normal, and one instruction in
    ten says "anything". The model multiplies in bfloat16.

    Args:
        rounds: steps of every round; each begins with the averaged weights of the last, a learning rate that rises
            again, and a seed one higher.
        batch: canvases per step.
        lr: highest learning rate.
        seed: of the first round.
        start: a model of the zoo to begin with; None for random weights.
        keep: as in `_training.fit`.
    """
    from elision import zoo  # the package lists this module

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**CONFIG) if start is None else zoo.load(start).transformer
    images, labels = load_garments("train")
    for turn, steps in enumerate(rounds):
        torch.manual_seed(seed + turn)
        model = _round(model, images, labels, steps, batch, lr, keep)
    return GarmentsEditPipeline(model, FlowMatchEulerDiscreteScheduler())


def _round(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    batch: int,
    lr: float,
    keep: Callable[[int, nn.Module], None] | None,
) -> nn.Module:
    model.train().requires_grad_(True)

    def loss(step: int) -> Tensor:
        del step
        left, right, new = torch.randint(len(images), (3, batch))
        sides = torch.randint(2, (batch,))
        what = torch.where(torch.rand(batch) < 0.1, NULL, labels[new])
        reference = pack(torch.cat([images[left], images[right]], dim=-1))
        x0 = torch.where(edited(sides)[..., None], pack(torch.cat([images[new]] * 2, dim=-1)), reference)
        noise, sigma = torch.randn_like(x0), torch.sigmoid(torch.randn(batch))
        x = torch.cat([torch.lerp(x0, noise, sigma[:, None, None]), reference], dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            v = model(x, timestep=sigma, return_dict=False, **condition(sides, what))[0][:, : x0.shape[1]]
        return nn.functional.mse_loss(v.float(), noise - x0)

    return _training.fit(model, loss, steps=steps, lr=lr, keep=keep)


def load(folder: Path) -> GarmentsEditPipeline:
    """The trained pipeline, in float32."""
    where = {"local_files_only": True}
    transformer = FluxTransformer2DModel.from_pretrained(
        folder / "transformer", variant="fp16", dtype=torch.float32, **where
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", **where)
    pipe = GarmentsEditPipeline(transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train(folder: Path, **options: Any) -> None:
    """Train and write a diffusers folder with float16 weights."""
    save(train_pipeline(**options), folder)


def save(pipe: GarmentsEditPipeline, folder: Path) -> None:
    """Write the pipeline with float16 weights."""
    garments_flux.save(pipe, folder)


@dataclass(frozen=True)
class Edits:
    """Instructions on canvases, and what is true of them.

    Attributes:
        canvases: [n, 1, 32, 64] in [0, 1].
        sides: [n], 0 where the left item is to be replaced, 1 for the right.
        labels: [n], class of the new item; never that of the old one.
        items: [n, 2], classes of the left and the right item of the canvas.
    """

    canvases: Tensor
    sides: Tensor
    labels: Tensor
    items: Tensor

    def prompts(self) -> list[str]:
        """The instructions."""
        return [instruction(side, label) for side, label in zip(self.sides.tolist(), self.labels.tolist(), strict=True)]

    def pick(self, rows: Sequence[int]) -> Edits:
        """Some of them."""
        chosen = torch.tensor(list(rows))
        return Edits(self.canvases[chosen], self.sides[chosen], self.labels[chosen], self.items[chosen])

    def asked(self, prompts: Sequence[str]) -> Edits:
        """These instructions on these canvases in turn; one whose item is of the new class already is passed over."""
        orders = [parse(prompt) for prompt in prompts]
        rows: list[int] = []
        for side, label in orders:
            turn = [(rows[-1] + 1 + i if rows else i) % len(self.items) for i in range(len(self.items))]
            rows.append(next(row for row in turn if self.items[row, side] != label))
        sides, labels = torch.tensor(orders).unbind(1)
        return Edits(self.canvases[rows], sides, labels, self.items[rows])


def draw_edits(count: int, split: str = "t10k", seed: int = 0) -> Edits:
    """Random edits of canvases that no training has seen: classes take turns, so do sides."""
    images, classes = load_garments(split)
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(len(images), generator=generator)[: 2 * count].reshape(count, 2)
    order = torch.arange(count)
    sides, labels = order // len(CLASSES) % 2, order % len(CLASSES)
    for row in range(count):  # an item is never replaced by one of its own class: that could not be told from no edit
        while classes[pairs[row, sides[row]]] == labels[row]:
            pairs[row, sides[row]] = torch.randint(len(images), (), generator=generator)
    canvases = torch.cat([images[pairs[:, 0]], images[pairs[:, 1]]], dim=-1)
    return Edits(canvases * 0.5 + 0.5, sides, labels, classes[pairs])


def examples() -> Edits:
    """Twenty edits that ship with the package, so that the editor can be tried without the data set."""
    found = load_file(Path(__file__).parent / "weights" / "garments-edit" / _EXAMPLES)
    return Edits(found["canvases"].float() / 255, *(found[name].long() for name in ("sides", "labels", "items")))


def save_examples(edits: Edits, folder: Path) -> None:
    """Write edits as bytes."""
    numbers = {name: getattr(edits, name).to(torch.uint8).contiguous() for name in ("sides", "labels", "items")}
    save_file({"canvases": (edits.canvases * 255).round().to(torch.uint8), **numbers}, folder / _EXAMPLES)


def halves(images: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """The edited half and the other one, [B, 1, 32, 32] each, of canvases [B, 1, 32, 64]."""
    left, right = images.chunk(2, dim=-1)
    is_right = sides.bool()[:, None, None, None]
    return torch.where(is_right, right, left), torch.where(is_right, left, right)


def preserved(images: Tensor, edits: Edits) -> Tensor:
    """PSNR in dB [B] of the halves that are to stay, against the canvases; at most 100."""
    mine, truth = (halves(x, edits.sides)[1] for x in (images, edits.canvases))
    return -10 * (mine - truth).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def check(
    pipe: GarmentsEditPipeline, samples: int = 300, steps: int = 28, guidance: float = GUIDANCE, seed: int = 0
) -> dict[str, Any]:
    """Edit canvases of test images; the zoo's classifier says in how many the new item is what was asked for."""
    from elision import zoo  # the package lists this module

    classifier = zoo.load("garments-classifier")
    edits = draw_edits(samples, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = edits.prompts()
    drawn = [
        pipe(edits.canvases[rows], prompts[rows], steps, guidance, generator, output_type="pt").images
        for rows in (slice(first, first + 50) for first in range(0, samples, 50))
    ]
    images = torch.cat(drawn)
    new = halves(images, edits.sides)[0] * 2 - 1
    old = halves(edits.canvases, edits.sides)[0] * 2 - 1
    kept = preserved(images, edits)
    of = {name: edits.labels == i for i, name in enumerate(CLASSES)}
    return {
        "edits": samples,
        "steps": steps,
        "guidance": guidance,
        "followed": round(accuracy(classifier, new, edits.labels), 4),
        "followed_by_class": {n: round(accuracy(classifier, new[r], edits.labels[r]), 3) for n, r in of.items()},
        "followed_by_unedited_canvases": round(accuracy(classifier, old, edits.labels), 4),
        "psnr_of_the_other_half": round(float(kept.mean()), 2),
        "psnr_of_the_other_half_lowest": round(float(kept.min()), 2),
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
    }
