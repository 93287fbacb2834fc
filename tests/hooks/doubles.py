"""What is tapped in these tests, and something that notes who called it."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.hooks import ModelHook
from torch import Tensor, nn

quiet = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


MODEL = {"interval": 3, "site": "model"}


class Double(nn.Module):
    """Twice its argument."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Noting(ModelHook):  # type: ignore[misc]
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs
