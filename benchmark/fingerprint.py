"""What identifies a module that has no name: its code and all that it holds, in words that every process agrees on."""

from __future__ import annotations

import dis
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, NoneType
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmark.registry import OWN

BOOKKEEPING = {"training", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook", "_compiled_call_impl"}
"""What torch keeps of a module that says nothing of its outputs, or is told elsewhere."""
INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
"""Where code lies that its version tells."""
FACTS = (bool, int, float, str, Fraction, NoneType, bytes, torch.Tensor, np.ndarray, dict, list, tuple, set, frozenset,
         partial, FunctionType, nn.Module)  # fmt: skip
"""What a global name may stand for that a number can depend on; of other objects only their own text counts."""


def fingerprint(module: nn.Module) -> str:
    """The sha256 of what can move a module's output: its code, its tensors, and all that it and its parts hold.

    Functions count by their text, what they close over, and the globals that they name, as far as these are numbers,
    tensors, containers, functions or modules; of installed packages only the text of the module's own classes does.
    """
    return _module(module, frozenset())


def stamp(module: nn.Module) -> tuple:
    """What changes, in this process, when a module's parts, attributes or parameters are changed; cheap to ask."""
    parts = dict(module.named_modules())
    plain = [sorted((k, str(v)) for k, v in vars(part).items() if _is_plain(v)) for part in parts.values()]
    # moving a module to a device gives it new buffers; parameters stay the same tensors
    return [(name, id(part)) for name, part in parts.items()], plain, [p._version for p in module.parameters()]


def _module(module: nn.Module, seen: frozenset[int]) -> str:
    """``fingerprint``; ``seen`` are the ids of what it is part of."""
    digest, seen = hashlib.sha256(), seen | {id(module)}
    for name, child in module.named_modules():
        digest.update(f"{name} {type(child).__qualname__} {_classes(type(child), seen)}".encode())
        digest.update(_told({k: v for k, v in vars(child).items() if k not in BOOKKEEPING}, seen).encode())
    return digest.hexdigest()


def _classes(cls: type, seen: frozenset[int]) -> str:
    """The text of a class; of those of the user's own in its line also what their methods reach."""
    own = [base for base in cls.__mro__ if not _installed(base)]
    texts = [_source(base) for base in own] or [_source(cls) if cls.__module__.partition(".")[0] != "torch" else ""]
    held = [_told(_reached(f) if _source(base) else f, seen) for base in own for f in _methods(base)]
    return " ".join(texts + held)


def _methods(cls: type) -> Iterator[FunctionType]:
    """The functions that a class defines, in order of their names."""
    for _, value in sorted(vars(cls).items()):
        value = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(value, FunctionType):
            yield value


def _installed(thing: type | FunctionType) -> bool:
    """Whether a class or function is of an installed package, of Python, or of the benchmark."""
    if (thing.__module__ or "builtins").partition(".")[0] in (*OWN, "builtins", "torch"):
        return True
    try:
        return inspect.getfile(thing).startswith(INSTALLED)
    except (OSError, TypeError):  # typed at a prompt
        return False


def _source(thing: type | FunctionType) -> str:
    """The text of a class or function, where it has one: another text is another component."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def _reached(function: FunctionType) -> dict[str, Any]:
    """What a function closes over, its defaults, and the globals that its code names."""
    found: dict[str, Any] = {"defaults": [function.__defaults__, function.__kwdefaults__]}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        found[name] = cell.cell_contents
    named = set(_globals(function.__code__)) if not _installed(function) else set()
    return found | {
        name: value for name in named if isinstance(value := function.__globals__.get(name, dis), FACTS)
    }  # fmt: skip


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that code loads, and the functions within it."""
    yield from (str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)


def _told(value: Any, seen: frozenset[int]) -> str:
    """A value in words that are the same in every process, as deep as it goes; ``seen`` are the ids around it."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if _is_plain(value) or isinstance(value, type | NoneType | bytes | torch.dtype | torch.device | Path):
        return str(value)
    if id(value) in seen:
        return "around"
    if isinstance(value, nn.Module):
        return f"{_kind(value)} {_module(value, seen)}"
    seen = seen | {id(value)}
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_told(k, seen)}: {_told(v, seen)}' for k, v in value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_told(v, seen) for v in value)}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_told(v, seen) for v in value))}}}"
    if isinstance(value, partial):
        return f"partial {_told([value.func, value.args, value.keywords], seen)}"
    if isinstance(value, MethodType):
        return f"{value.__func__.__qualname__} of {_told(value.__self__, seen)}"
    if isinstance(value, FunctionType):
        lines = "" if value.__name__ == "<lambda>" else _source(value)  # a lambda's line may hold others
        return f"{value.__qualname__} {lines or _code(value.__code__)} {_told(_reached(value), seen)}"
    return f"{_kind(value)} {_told(getattr(value, '__dict__', None), seen)}"


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _code(code: CodeType) -> str:
    """What a function's code does, without where it stands."""
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


def _is_plain(value: Any) -> bool:
    """Whether a value means the same in every process: a number, a string, or a list of them."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | Fraction)
