"""The HTML report of a comparison: one file, nothing loaded from anywhere."""

from __future__ import annotations

from elision.bench.report._page import render, write_report

__all__ = ["render", "write_report"]
