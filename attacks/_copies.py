"""Copies of defenses: to ask again, to differentiate in other arithmetic, to lay out otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copied(module: M) -> M:
    """A deep copy; what a call left behind with its graph, e.g. an activation or a normed weight, is there without it.

    Raises:
        Exception: whatever something that the module holds raises where it can't be copied.
    """
    left = {id(t): t.detach().clone() for m in module.modules() for t in _tensors(vars(m)) if not t.is_leaf}
    return copy.deepcopy(module, left)


def _tensors(held: Any) -> Iterator[Tensor]:
    """The tensors among what a module holds, in containers, too; those of its parts are theirs."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, (dict, list, tuple)):
        for value in held.values() if isinstance(held, dict) else held:
            yield from _tensors(value)
