"""Every denoiser class under test, and what each can do, found by doing it."""

from __future__ import annotations

import dataclasses

from tests.denoise.adapters.images import IMAGES
from tests.denoise.adapters.subjects import Subject
from tests.denoise.adapters.videos import VIDEOS
from tests.denoise.policy import policy
from tests.models import KINDS, draw


def _known(kind: str, guidance: str = "one call") -> Subject:
    fields = {f.name: getattr(KINDS[kind], f.name) for f in dataclasses.fields(KINDS[kind])}
    return Subject(**fields, guidance=guidance)


SUBJECTS: dict[str, Subject] = {
    "Flux": _known("flux", "none, or two named calls"),
    "SD3": _known("sd3"),
    "DiT": _known("dit"),
    "PixArt": _known("pixart"),
    **IMAGES,
    **VIDEOS,
    "Diffusion Policy": Subject(
        policy,
        lambda b, n: (b, n, 2),
        lambda b, n, s: {"cond": draw(1, 3, 4, seed=s).repeat(b, 1, 1)},
        blocks=2,
        invoke=lambda model, x, time, inputs: model(x, time[:1], inputs["cond"]),
        guidance="none",
    ),
}
