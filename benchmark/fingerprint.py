"""What identifies a module that has no name: its code and all that it holds, in words that every process agrees on."""

from __future__ import annotations

import builtins
import dis
import hashlib
import inspect
import sysconfig
from argparse import Namespace
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType, NoneType, SimpleNamespace
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
         partial, FunctionType, nn.Module, Namespace, SimpleNamespace)  # fmt: skip
"""What a name may stand for that a number can depend on, beside what is of the user's own making."""


def fingerprint(module: nn.Module) -> str:
    """The sha256 of what can move a module's output: its code, its tensors, and all that it and its parts hold.

    Functions count by their text, what they close over, and the globals that they name: numbers, tensors, containers,
    functions, networks, and whatever is of the user's own classes and files. Of installed packages only the text of the
    module's own classes counts. Not seen is what code reads elsewhere, e.g. files; what is on disk is asked again.
    """
    return _told(module, {})


def stamp(module: nn.Module) -> tuple:
    """What changes, in this process, when a module's parts, attributes, parameters or buffers are; cheap to ask."""
    parts = dict(module.named_modules())
    plain = [sorted((k, str(v)) for k, v in vars(part).items() if _is_plain(v)) for part in parts.values()]
    # moving a module gives it new buffers, which are small, of the same values; parameters stay the same tensors
    buffers = [_content(buffer.cpu().double(), {}) for buffer in module.buffers()]
    return [(name, id(part)) for name, part in parts.items()], plain, [p._version for p in module.parameters()], buffers


Memo = dict[int, tuple[Any, str]]
"""What was told already, by id, with the thing itself, so that no other takes its id."""


def _module(module: nn.Module, memo: Memo) -> str:
    """A module, its parts, their classes and what they hold."""
    found = []
    for name, child in module.named_modules():
        held = {k: v for k, v in vars(child).items() if k not in BOOKKEEPING and "_hooks" not in k}
        hooks = [f for k, v in vars(child).items() if "_hooks" in k and isinstance(v, dict) for f in v.values()]
        held |= {"hooks": [_source(f) if isinstance(f, FunctionType) else _kind(f) for f in hooks]}  # they may count
        found.append(f"{name} {_kind(child)} {_made_by(child, memo)} {_told(held, memo)}")
    return " ".join(found)


def _made_by(thing: Any, memo: Memo) -> str:
    """The nearest class of the user's own in a thing's line; of an installed one, but for torch's, its text."""
    cls = type(thing)
    own = next((base for base in cls.__mro__ if not _installed(base)), None)
    if own is not None:
        return _told(own, memo)
    known = not isinstance(thing, nn.Module) or cls.__module__.partition(".")[0] == "torch"
    return "" if known else _source(cls)  # type: ignore[arg-type]


def _class(cls: type, memo: Memo) -> str:
    """The texts of the classes of the user's own in a class's line, what they hold, and what their methods reach."""
    own = [base for base in cls.__mro__ if not _installed(base)]
    texts = [_source(base) for base in own]
    methods = [(f, text) for base, text in zip(own, texts, strict=True) for f in _methods(base)]
    held = [_told(_reached(f) if text else f, memo) for f, text in methods]
    return " ".join([*texts, *held, *(_told(_facts(vars(base)), memo) for base in own)])


def _facts(held: Mapping[str, Any]) -> dict[str, Any]:
    """What a class or a module of the user's own holds beside its functions."""
    return {
        name: value
        for name, value in held.items()
        if not name.startswith("__") and not isinstance(value, FunctionType) and _counts(value)
    }


def _counts(value: Any) -> bool:
    """Whether a number can depend on what a name stands for, and no version tells it."""
    if isinstance(value, type | ModuleType):
        return not _installed(value)
    return isinstance(value, FACTS) or not _installed(type(value))


def _methods(cls: type) -> Iterator[FunctionType]:
    """The functions that a class defines, in order of their names."""
    for _, value in sorted(vars(cls).items()):
        value = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(value, FunctionType):
            yield value


def _installed(thing: type | FunctionType | ModuleType) -> bool:
    """Whether a class, function or module is of an installed package, of Python, or of the benchmark."""
    module = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    if module is None or module.partition(".")[0] in (*OWN, "torch"):
        return True
    if module == "builtins":  # or made by exec
        return isinstance(thing, ModuleType) or getattr(builtins, thing.__name__, None) is thing
    try:
        return inspect.getfile(thing).startswith(INSTALLED)
    except (OSError, TypeError):  # typed at a prompt
        return False


@cache
def _source(thing: type | FunctionType | ModuleType) -> str:
    """The text of a class, function or module, where it has one: another text is another component."""
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
    return found | {name: value for name in sorted(named) if _counts(value := function.__globals__.get(name, builtins))}


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that code loads, and the functions within it."""
    yield from (str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)


def _told(value: Any, memo: Memo) -> str:
    """A value in words that are the same in every process, as deep as it goes."""
    if _is_plain(value) or isinstance(value, NoneType | bytes | torch.dtype | torch.device | Path):
        return str(value)
    if isinstance(value, type | ModuleType) and _installed(value):
        return value.__name__
    if id(value) not in memo:
        memo[id(value)] = value, "around"  # for what it holds that holds it
        memo[id(value)] = value, hashlib.sha256(_content(value, memo).encode()).hexdigest()
    return memo[id(value)][1]


def _content(value: Any, memo: Memo) -> str:
    """What a thing is made of."""
    told = partial(_told, memo=memo)
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, nn.Module):
        return f"{_kind(value)} {_module(value, memo)}"
    if isinstance(value, type):
        return f"{value.__qualname__} {_class(value, memo)}"
    if isinstance(value, ModuleType):
        return f"{value.__name__} {_source(value)} {told(_facts(vars(value)))}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{told(k)}: {told(v)}' for k, v in value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(told, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(told, value)))}}}"
    if isinstance(value, partial):
        return f"partial {told([value.func, value.args, value.keywords])}"
    if isinstance(value, MethodType):
        return f"{value.__func__.__qualname__} of {told(value.__self__)}"
    if isinstance(value, FunctionType):
        lines = "" if value.__name__ == "<lambda>" else _source(value)  # a lambda's line may hold others
        return f"{value.__qualname__} {lines or _code(value.__code__)} {told(_reached(value))}"
    return f"{_kind(value)} {_made_by(value, memo)} {told(getattr(value, '__dict__', None))}"


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
