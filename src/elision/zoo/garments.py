"""Fashion-MNIST as tensors, and the small classifier that judges what the garment models draw.

The images come from Debian's package `dataset-fashion-mnist`; `ELISION_FASHION_MNIST` names another folder
with the four original `.gz` files.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elision.errors import MissingDependency
from elision.zoo import _training

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_FOLDER = "/usr/share/datasets/fashion-mnist"
_FILE = "model.fp16.safetensors"


def load_garments(split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 32, 32] in [-1, 1] (28 x 28 padded with black) and labels [n] of `train` or `t10k`."""
    folder = Path(os.environ.get("ELISION_FASHION_MNIST", _FOLDER))
    images, labels = folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz"
    if not images.exists():
        raise MissingDependency(
            f"Fashion-MNIST is not in {folder}: install the Debian package dataset-fashion-mnist, "
            "or set ELISION_FASHION_MNIST to the folder that holds its four .gz files"
        )
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    x = torch.from_numpy(pixels.copy()).float() / 127.5 - 1
    return nn.functional.pad(x, (2, 2, 2, 2), value=-1.0), torch.from_numpy(classes.astype(np.int64))


class GarmentsClassifier(nn.Module):
    """A convolutional classifier for [B, 1, 32, 32] images in [-1, 1]; `features` feeds the Fréchet distance."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, len(CLASSES))

    def features(self, x: Tensor) -> Tensor:
        """Pooled features [B, 4 * width]."""
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Class logits [B, 10]."""
        out: Tensor = self.head(self.features(x))
        return out


def train_classifier(steps: int = 2000, batch: int = 128, seed: int = 0) -> GarmentsClassifier:
    """The recipe of `garments-classifier`: cross entropy with shifts of up to two pixels and mild noise."""
    torch.manual_seed(seed)
    images, labels = load_garments("train")
    model = GarmentsClassifier()

    def loss(step: int) -> Tensor:
        del step
        rows = torch.randint(len(images), (batch,))
        dy, dx = (int(v) for v in torch.randint(-2, 3, (2,)))
        x = torch.roll(images[rows], (dy, dx), (2, 3))
        x = x + 0.05 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        return nn.functional.cross_entropy(model(x), labels[rows], label_smoothing=0.05)

    averaged = _training.fit(model, loss, steps=steps, lr=2e-3, weight_decay=0.05)
    for mine, theirs in zip(averaged.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)  # batch-norm statistics are averages already
    assert isinstance(averaged, GarmentsClassifier)
    return averaged


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of `images` [n, 1, 32, 32] that `model` assigns to `labels` [n]."""
    pairs = zip(torch.split(images, batch), torch.split(labels, batch), strict=True)
    hits = [model(x).argmax(-1).eq(y).sum() for x, y in pairs]
    return float(torch.stack(hits).sum()) / len(images)


def load(folder: Path) -> GarmentsClassifier:
    """The trained classifier in eval mode."""
    model = GarmentsClassifier()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / _FILE).items()})
    return model.eval()


def train(folder: Path, **options: Any) -> None:
    """Train and write float16 weights."""
    save(train_classifier(**options), folder)


def save(model: GarmentsClassifier, folder: Path) -> None:
    """Write the weights as float16."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, folder / _FILE)


def check(model: GarmentsClassifier) -> dict[str, Any]:
    """Accuracy on the 10,000 test images."""
    images, labels = load_garments("t10k")
    return {"test_accuracy": round(accuracy(model, images, labels), 4)}
