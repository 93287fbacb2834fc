"""Fixtures of the denoise tests."""

from __future__ import annotations

import pytest

from elision.denoise.flops import FlopBook


@pytest.fixture
def no_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without FLOPs: counting them takes longer than a tiny run."""
    monkeypatch.setattr(FlopBook, "totals", lambda self: None)
