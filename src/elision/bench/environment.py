"""What a result was measured on: versions, processor, threads, date, commit. Never host names or paths."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("elision", "torch", "diffusers", "transformers", "numpy", "scipy", "scikit-image", "lpips"),
    *("metaworld", "mujoco"),
)


def versions() -> dict[str, str]:
    """Versions of the packages that matter, where they are installed."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "elision" not in found:  # run from a checkout
        import elision

        found["elision"] = elision.__version__
    return dict(sorted(found.items()))


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this file belongs to, with a plus sign if files were changed; None elsewhere."""
    here = Path(__file__).resolve().parent
    try:
        inside = ["git", "-C", str(here)]
        known = subprocess.run([*inside, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if known.returncode:
            return None
        head = subprocess.run([*inside, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True, text=True)
        # only the source counts: results and reports are written while a comparison runs
        source = str(Path(__file__).resolve().parents[1])
        changed = subprocess.run(
            [*inside, "status", "--porcelain", "--", source], capture_output=True, check=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def environment() -> dict[str, Any]:
    """The record that stands at the head of every result file."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }
