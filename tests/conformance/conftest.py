"""Fixtures of the conformance tests."""

from __future__ import annotations

import pytest

from elision.denoise.flops import FlopBook


@pytest.fixture
def no_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without FLOPs: counting them takes longer than a tiny run, and test_report.py checks them."""
    monkeypatch.setattr(FlopBook, "totals", lambda self: None)
