"""What a component's constructor takes: its options, their defaults and types."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from benchmark.errors import UsageError, unknown
from benchmark.specs import Spec, Value, head, show


def options(component: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a component's constructor, or of a function that makes one.

    A constructor that hands ``**more`` to its base has the base's options too.
    """
    found: dict[str, inspect.Parameter] = {}
    for constructor in _constructors(component):
        parameters = inspect.signature(constructor).parameters.values()
        found = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} | found
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return found


def resolve(component: Callable, spec: Spec, defaults: Mapping[str, Value] | None = None) -> dict[str, Any]:
    """Every option of a component: the class's defaults, then a card's, then the spec's, each of the declared type.

    Raises:
        UsageError: for an option that the component doesn't have, or a value of the wrong type.
    """
    known = options(component)
    chosen: dict[str, Any] = {k: p.default for k, p in known.items()} | dict(defaults or {})
    for key, value in spec.options.items():
        if key not in known:
            hint = "; options are keyword-only: write a * before them" if key in _positional(component) else ""
            raise UsageError(f"{head(spec)}: {unknown('option', key, sorted(known))}{hint}")
        chosen[key] = _typed(value, _hint(component, known[key]), f"{head(spec)}: {key}")
    if spec.name == "file" and (missing := [k for k, v in chosen.items() if v is inspect.Parameter.empty]):
        raise UsageError(f"{spec}: {missing[0]} has no default; write file:{spec.argument},{missing[0]}=VALUE")
    return chosen


def _positional(component: Callable) -> set[str]:
    """The parameters of a constructor, or of a function, that no spec sets."""
    parameters = (p for c in _constructors(component) for p in inspect.signature(c).parameters.values())
    return {p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD} - {"self"}


def _constructors(component: Callable) -> list[Callable]:
    """A component's own constructor and those of its bases, nearest first; a function is its own."""
    if not inspect.isclass(component):
        return [component]
    return [inspect.unwrap(vars(c)["__init__"]) for c in component.__mro__ if "__init__" in vars(c)]


def _hint(component: Callable, parameter: inspect.Parameter) -> Any:
    """The type of an option; annotations are strings wherever a module postpones them."""
    hint = parameter.annotation
    if hint is inspect.Parameter.empty:
        return type(parameter.default)
    if not isinstance(hint, str):
        return hint
    owner = next(c for c in _constructors(component) if parameter.name in inspect.signature(c).parameters)
    return eval(hint, owner.__globals__)  # type: ignore[attr-defined]


def _typed(value: Value, hint: Any, what: str) -> Any:
    """``value`` as the declared type, where that loses nothing."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{what} takes a finite number, got {value}")
    kinds = typing.get_args(hint) or (hint,)
    if hint is object or any(
        isinstance(value, k) and not (k is int and isinstance(value, bool)) for k in kinds if isinstance(k, type)
    ):
        return value
    if float in kinds and isinstance(value, int | Fraction) and not isinstance(value, bool):
        return float(value)
    if Fraction in kinds and isinstance(value, int | float):
        return Fraction(str(value))
    wanted = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
    raise UsageError(f"{what} takes {wanted}, got {show(value)!r}")
