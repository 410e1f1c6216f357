"""Tensors nested in tuples, lists, dicts and dataclasses: taken out in order, and others put in their places."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class _Slot:
    """Where a tensor was."""


def emptied(nest: Any, tensors: list[Tensor]) -> Any:
    """The nest with its tensors taken out, in order."""
    if isinstance(nest, Tensor):
        tensors.append(nest)
        return _Slot()
    return _mapped(nest, lambda part: emptied(part, tensors))


def filled(nest: Any, tensors: Iterator[Tensor]) -> Any:
    """The nest with tensors put where some were taken out."""
    return next(tensors) if isinstance(nest, _Slot) else _mapped(nest, lambda part: filled(part, tensors))


def _mapped(nest: Any, function: Callable[[Any], Any]) -> Any:
    """A container of the same build with the function applied to its parts; anything else as it is."""
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*map(function, nest))
    if type(nest) in (tuple, list):  # a torch.Size stays one
        return type(nest)(map(function, nest))
    if isinstance(nest, dict):
        return {key: function(part) for key, part in nest.items()}
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        twin = copy.copy(nest)
        for field in dataclasses.fields(nest):
            object.__setattr__(twin, field.name, function(getattr(nest, field.name)))
        return twin
    return nest
