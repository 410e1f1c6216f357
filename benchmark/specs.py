"""The grammar of specs, ``name[:argument][,key=value…]``: how a component and its options are written."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import MappingProxyType

from benchmark.errors import UsageError

Value = int | float | Fraction | bool | str | list


@dataclass(frozen=True)
class Spec:
    """``name[:argument][,key=value…]``: a component with options."""

    name: str
    argument: str | None = None
    options: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        head = self.name if self.argument is None else f"{self.name}:{self.argument}"
        pairs = [f"{key}={show(value)}" for key, value in sorted(self.options.items())]
        if not pairs:
            return head
        return head + (":" if self.argument is None else ",") + ",".join(pairs)


def show(value: Value | None) -> str:
    """A value as a spec writes it."""
    if isinstance(value, list | tuple):
        return "+".join(show(v) for v in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def read(text: str) -> Value:
    """A spec's value: int, float, fraction, bool, word, or a list joined by ``+``."""
    if "+" in text.strip("+") and not re.fullmatch(r"[-+]?[\d.]+[eE]\+\d+", text):
        return [read(item) for item in text.split("+")]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for pattern, make in ((r"[-+]?\d+", int), (r"[-+]?\d+/\d+", Fraction)):
        if re.fullmatch(pattern, text):
            return make(text)
    try:
        return float(text)
    except ValueError:
        return text


def expand(text: str) -> list[str]:
    """All readings of ``{a,b}`` alternatives: "vae:temperature={0,1}" is two specs."""
    braces = re.search(r"\{([^{}]*)\}", text)
    if not braces:
        return [text]
    heads = (text[: braces.start()] + option + text[braces.end() :] for option in braces.group(1).split(","))
    return list(itertools.chain.from_iterable(expand(head) for head in heads))


def split(text: str) -> list[str]:
    """The specs of a comma-separated list; an item with "=" before any ":" belongs to the spec before it."""
    specs: list[str] = []
    for item in text.split(","):
        head, colon, _ = item.partition(":")
        continues = "=" in head if colon else "=" in item
        if continues and specs:
            specs[-1] += "," + item
        else:
            specs.append(item)
    return [spec for spec in (s.strip() for s in specs) if spec]


@functools.lru_cache(4096)
def parse(text: str) -> Spec:
    """Read one spec; a report reads the same few thousands of times. Its options can't be changed in place.

    Raises:
        UsageError: if it isn't ``name[:argument][,key=value…]``.
    """
    head, *items = text.strip().split(",")
    name, colon, rest = head.partition(":")
    argument: str | None = rest if colon else None
    if argument and re.match(r"^[\w-]+=", argument):
        items, argument = [argument, *items], None
    options: dict[str, Value] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"{text!r}: expected key=value, got {item!r}; a spec is name[:argument][,key=value...]")
        options[key.strip().replace("-", "_")] = read(value.strip())
    if not name:
        raise UsageError(f"{text!r} names no component; a spec is name[:argument][,key=value...]")
    return Spec(name if name == "file" else name.replace("_", "-").lower(), argument or None, MappingProxyType(options))


def head(spec: Spec) -> str:
    """A spec without its options; of a file the file and its class."""
    return str(replace(spec, options={})) if spec.name == "file" else spec.name
