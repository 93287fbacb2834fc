"""The README's table is what the registry says, and every method has a page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from elision.method import registry

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_current(tool: ModuleType) -> None:
    assert tool.readme() == (ROOT / "README.md").read_text(), "run: python tools/make_docs.py"


@pytest.mark.parametrize("name", registry())
def test_pages(tool: ModuleType, name: str) -> None:
    cls = registry()[name]
    page = tool.page(cls)
    assert all(f"| `{option}` |" in page for option in cls.options())
    assert all(f.metadata.get("doc") for f in cls.options().values())
    assert cls.control or (cls.paper is not None and cls.paper.url in page)


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_readme_names_the_two_commands(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()
