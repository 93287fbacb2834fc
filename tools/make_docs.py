"""Writes what the documentation derives: a page per method, the table in the README, the table of denoiser classes.

The last one comes from the tests, which make a tiny model of every class and try what it can do.

python tools/make_docs.py           write all
python tools/make_docs.py --check   fail if a table is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import warnings
from pathlib import Path

from elision.method import Method, describe_range, registry

ROOT = Path(__file__).parent.parent
USE = {
    "denoise": ("pipe", 'pipe("sneaker")'),
    "kv": ("model", "model.generate(**inputs, max_new_tokens=256)"),
    "dllm": ("model", "run.generate(prompt_ids, gen_length=128)"),
}
TITLES = {
    "denoise": "Diffusion transformers (`denoise`)",
    "kv": "K/V caches of language and vision-language models (`kv`)",
    "dllm": "Diffusion language models (`dllm`)",
}
BEGIN, END = "<!-- methods: made by tools/make_docs.py -->", "<!-- /methods -->"
CLASSES = "<!-- classes: made by tools/make_docs.py -->", "<!-- /classes -->"


def table() -> str:
    """A table per family: name, what it does, where it acts if that differs, paper."""
    parts = []
    for family, title in TITLES.items():
        mine = [cls for cls in registry().values() if cls.family == family]
        with_levels = any(getattr(cls, "levels", ()) for cls in mine)
        heads = ["method", "what it does", *(["acts at"] if with_levels else []), "source"]
        parts += [f"### {title}", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        for cls in sorted(mine, key=lambda c: (c.control, c.name)):
            paper = f"[{cls.paper.venue}]({cls.paper.url})" if cls.paper else "–"
            levels = [", ".join(getattr(cls, "levels", ()))] if with_levels else []
            parts.append(f"| {' | '.join([f'`{cls.name}`', cls.description, *levels, paper])} |")
        parts.append("")
    return "\n".join(parts[:-1])


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


def _between(text: str, marks: tuple[str, str], fresh: str) -> str:
    """`text` with something else between two marks."""
    before, rest = text.split(marks[0])
    _, after = rest.split(marks[1])
    return f"{before}{marks[0]}\n{fresh}\n{marks[1]}{after}"


def readme() -> str:
    """The README with a fresh table."""
    return _between((ROOT / "README.md").read_text(), (BEGIN, END), table())


def classes() -> str:
    """The page on the denoise engine with a fresh table of classes."""
    sys.path.insert(0, str(ROOT))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.denoise.adapters.table import table as made  # the tests are no package of the library

        return _between((ROOT / "docs" / "denoise.md").read_text(), CLASSES, made())


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    pages = {ROOT / "README.md": readme(), ROOT / "docs" / "denoise.md": classes()}
    if parser.parse_args().check:
        return int(any(target.read_text() != fresh for target, fresh in pages.items()))
    for target, fresh in pages.items():
        target.write_text(fresh)
    folder = ROOT / "docs" / "methods"
    folder.mkdir(exist_ok=True)
    for cls in registry().values():
        (folder / f"{cls.name}.md").write_text(page(cls))
    (folder / "index.md").write_text(f"# Methods\n\n{table()}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
