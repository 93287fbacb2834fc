"""Methods as text: `easycache:threshold=0.1,warmup_steps=4` is the method `easycache` with two options set.

`diffusers:pab,range=2` is a cache of another library (see `elision.bench.peers`).
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elision.bench import peers
from elision.errors import OptionError, UnknownName
from elision.method import Method, find

_WORDS = {"none": None, "null": None, "true": True, "false": False}


@dataclass(frozen=True)
class Spec:
    """A method with its options, and the profile it is applied with, if any."""

    method: Method
    profile: str | None = None

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.method.name

    @property
    def label(self) -> str:
        """The shortest text that says this: options that differ from the defaults, of a profile only its file name.

        Results carry labels, and results do not tell where files lie. Without a folder `parse` reads it back.
        """
        fields = dataclasses.fields(self.method)
        given = {f.name: getattr(self.method, f.name) for f in fields if getattr(self.method, f.name) != f.default}
        parts = [f"{key}={_text(value)}" for key, value in given.items()]
        if self.profile is not None:
            parts.append(f"profile={Path(self.profile).name}")
        colon = "," if ":" in self.name else ":"
        return self.name + (colon + ",".join(parts) if parts else "")

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value."""
        return dataclasses.asdict(self.method)


def parse(text: str) -> Spec:
    """Read one method; unknown names and options, and values out of range, raise the library's errors.

    Caches of other libraries are `library:name,option=value`.

    Example:
        parse("taylorseer:interval=4,site=stack").method  ->  TaylorSeer(interval=4, site="stack")
    """
    name, _, rest = text.strip().partition(":")
    cls: type[Method]
    if name.replace("-", "_") in peers.LIBRARIES:
        short, _, rest = rest.partition(",")
        cls = peers.find(name.replace("-", "_"), short.strip())
    else:
        cls = find(name)
    options: dict[str, Any] = {}
    profile = None
    for part in _split(rest):
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not value.strip():
            raise OptionError(f"{part!r} in {text!r} is not option=value")
        if key == "profile" and not issubclass(cls, peers.Peer):
            profile = value.strip()
            continue
        if key not in cls.options():
            raise UnknownName.of(
                f"option of {cls.name}",
                key,
                [*cls.options(), "profile"] if not issubclass(cls, peers.Peer) else cls.options(),
            )
        options[key] = _value(cls.name, cls.options()[key], value.strip())
    return Spec(cls(**options), profile)


def parse_many(texts: str | Iterable[str]) -> list[Spec]:
    """Read several methods; one text may hold more, separated by spaces or semicolons.

    A comma also separates where a method's name follows it: `easycache,taylorseer:interval=3,uniform`.
    """
    texts = [texts] if isinstance(texts, str) else texts
    words = [word for text in texts for word in text.replace(";", " ").split()]
    pieces: list[str] = []
    for word in words:
        for part in _split(word):
            if pieces and part and "=" in part.partition(":")[0]:
                pieces[-1] += "," + part
            elif part:
                pieces.append(part)
    if not pieces:
        raise OptionError("no method given: name at least one, see `elision methods`")
    return [parse(piece) for piece in pieces]


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside of brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [part for part in [*parts, current] if part.strip()]


def _value(method: str, field: dataclasses.Field[Any], text: str) -> Any:
    """`text` as the type that the option declares."""
    choices = field.metadata.get("choices")
    if choices is not None:
        by_text = {str(choice).lower(): choice for choice in choices}
        return by_text.get(text.lower(), text)  # a text that is no choice is refused by the option's own check
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    kind = str(field.type)
    if isinstance(value, int) and not isinstance(value, bool) and "float" in kind and "int" not in kind:
        return float(value)
    if isinstance(value, str) and "str" not in kind:
        raise OptionError(f"{method}: {field.name}={text!r} is not of type {kind}")
    return tuple(value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, tuple):
        return "(" + ",".join(_text(v) for v in value) + ("," if len(value) == 1 else "") + ")"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
