"""Writes what the documentation derives from the registry: a page per method, and the table in the README.

python tools/make_docs.py           write both
python tools/make_docs.py --check   fail if the README's table is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path

from elision.method import Method, describe_range, registry

ROOT = Path(__file__).parent.parent
USE = {
    "denoise": ("pipe", 'pipe("sneaker")'),
    "kv": ("model", "model.generate(**inputs, max_new_tokens=256)"),
    "dllm": ("model", "run.generate(prompt_ids, gen_length=128)"),
}
BEGIN, END = "<!-- methods: made by tools/make_docs.py -->", "<!-- /methods -->"


def table() -> str:
    """A row per method: name, what it does, where it acts, paper."""
    rows = ["| method | what it does | acts at | source |", "| --- | --- | --- | --- |"]
    for cls in sorted(registry().values(), key=lambda c: (c.family, c.control, c.name)):
        paper = f"[{cls.paper.venue}]({cls.paper.url})" if cls.paper else "–"
        levels = ", ".join(getattr(cls, "levels", ()))
        rows.append(f"| `{cls.name}` | {cls.description} | {levels} | {paper} |")
    return "\n".join(rows)


def page(cls: type[Method]) -> str:
    """One method as a page: its module's docstring, and its options."""
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    head, _, body = module.partition("\n")
    lines = [f"# {cls.name}", "", head, "", body.strip(), "", "## Options", ""]
    lines += ["| option | default | range | meaning |", "| --- | --- | --- | --- |"]
    for name, f in cls.options().items():
        lines.append(f"| `{name}` | `{f.default!r}` | {describe_range(f) or '–'} | {f.metadata['doc']} |")
    if not dataclasses.fields(cls):
        lines.append("| – | | | |")
    lines += ["", "## Targets", "", ", ".join(f"`{t}`" for t in cls.targets()) or "–"]
    target, call = USE[cls.family]
    lines += ["", "## Use", "", "```python", f'with elision.apply({target}, "{cls.name}") as run:', f"    {call}"]
    lines += ["print(run.report())", "```", ""]
    return "\n".join(lines)


def readme() -> str:
    """The README with a fresh table."""
    text = (ROOT / "README.md").read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    fresh, target = readme(), ROOT / "README.md"
    if parser.parse_args().check:
        return int(fresh != target.read_text())
    target.write_text(fresh)
    folder = ROOT / "docs" / "methods"
    folder.mkdir(exist_ok=True)
    for cls in registry().values():
        (folder / f"{cls.name}.md").write_text(page(cls))
    (folder / "index.md").write_text(f"# Methods\n\n{table()}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
