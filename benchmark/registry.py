"""Components by name: a file in ``purifiers``, ``attacks`` or ``classifiers`` is a component, with no list to keep."""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import math
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmark.errors import UsageError

BASES = {"purifiers": "Purifier", "attacks": "Attack", "classifiers": "Classifier"}
OWN = (*BASES, "benchmark")
"""The packages of the benchmark, whose version says what they are."""
Value = int | float | Fraction | bool | str | list


@dataclass(frozen=True)
class Spec:
    """``name[:argument][,key=value…]``: a component with options."""

    name: str
    argument: str | None = None
    options: dict[str, Value] = field(default_factory=dict)

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


def parse(text: str) -> Spec:
    """Read one spec.

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
    return Spec(name if name == "file" else name.replace("_", "-").lower(), argument or None, options)


def names(kind: str) -> list[str]:
    """The components of a kind that files and installed packages offer."""
    package = importlib.import_module(kind)
    own = {m.name.replace("_", "-") for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}
    return sorted(own | _plugins(kind, tuple(sys.path)).keys())


@functools.lru_cache
def _plugins(kind: str, path: tuple[str, ...]) -> dict[str, importlib.metadata.EntryPoint]:
    """What installed packages offer; every package's metadata is read for it, so once for a path."""
    return {p.name.replace("_", "-"): p for p in importlib.metadata.entry_points(group=kind)}


def load(kind: str, name: str, argument: str | None = None) -> type:
    """The class of a component: ``purifiers.diffpure``'s one public Purifier for ("purifiers", "diffpure").

    Args:
        kind: "purifiers", "attacks" or "classifiers".
        name: the file's name, an entry point's name, or "file".
        argument: for "file": ``PATH.py:Class``, or, but for attacks, ``PATH.py:function`` that makes a module; for a
            component with a classmethod ``of``: what that makes a component of.

    Raises:
        UsageError: for an unknown name, with the nearest and all; for an argument that nothing reads; or for a file
            that doesn't define the class.
    """
    if name == "file":
        return _from_file(kind, argument)
    plugins = _plugins(kind, tuple(sys.path))
    if name not in names(kind):
        raise UsageError(unknown(kind[:-1], name, names(kind)))
    if name in plugins:
        component = plugins[name].load()
    else:
        (component,) = _components(kind, importlib.import_module(f"{kind}.{name.replace('-', '_')}"))
    if argument is None:
        return component
    if not hasattr(component, "of"):
        raise UsageError(f"{name}:{argument}: {name} takes no argument; options are written {name}:key=value")
    try:
        return component.of(argument)
    except ValueError as error:
        raise UsageError(str(error)) from error


@functools.cache
def completed(kind: str, text: str) -> str:
    """A recorded spec with the options that its component has gained since, at their defaults, which change nothing.

    Specs of components that aren't here stay as they are.
    """
    spec = parse(text)
    try:
        component = described(kind, spec.name, spec.argument)
    except UsageError:
        return text
    defaults = {k: p.default for k, p in options(component).items() if p.default is not inspect.Parameter.empty}
    return str(Spec(spec.name, spec.argument, defaults | spec.options))


def described(kind: str, name: str, argument: str | None = None) -> type:
    """The class behind a name, be it a component's or a card's: vae-gan is a vae.

    Raises:
        UsageError: as ``load``.
    """
    while "-" in name and name not in names(kind):
        name = name.rpartition("-")[0]
    return load(kind, name, argument)


def raised(error: BaseException) -> str:
    """What an exception says, and the line of code it came from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    where = error.__traceback__
    while where and where.tb_next:
        where = where.tb_next
    place = f" ({where.tb_frame.f_code.co_filename}:{where.tb_lineno})" if where else ""
    return f"{type(error).__name__}: {error}{place}"


def source(spec: Spec) -> dict[str, str]:
    """The sha256 of a ``file:`` component's file and of those beside it that it imports: another text is another
    component. Empty for the rest."""
    if spec.name != "file":
        return {}
    path = Path((spec.argument or "").partition(":")[0])
    if not path.is_file():
        raise UsageError(f"{spec}: {path} is no file; write file:PATH.py:Class")
    return {"source": hashlib.sha256(b"".join(file.read_bytes() for file in _with_imports(path))).hexdigest()}


def _with_imports(path: Path) -> list[Path]:
    """A file and those beside it that it imports, or that these do; not what is installed, nor the benchmark's own."""
    found = [path]
    for file in found:  # grows
        try:
            nodes = list(ast.walk(ast.parse(file.read_bytes())))
        except SyntaxError:
            continue  # loading it says so
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        for name in sorted(n for n in imported if n.partition(".")[0] not in OWN):
            beside = path.parent.joinpath(*name.split("."))
            found += [p for p in (beside.with_suffix(".py"), beside / "__init__.py") if p.is_file() and p not in found]
    return found


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


def head(spec: Spec) -> str:
    """A spec without its options; of a file the file and its class."""
    return str(replace(spec, options={})) if spec.name == "file" else spec.name


def _positional(component: Callable) -> set[str]:
    """The parameters of a constructor, or of a function, that no spec sets."""
    parameters = (p for c in _constructors(component) for p in inspect.signature(c).parameters.values())
    return {p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD} - {"self"}


def unknown(kind: str, name: str, known: list[str]) -> str:
    """The message for a name that doesn't exist: the nearest ones, and the whole list."""
    if ".py" in name:
        return f"unknown {kind} {name!r}: a file is written file:{name.removesuffix('.py')}.py:Class"
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}known: {', '.join(known) or 'none'}"


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


def base(kind: str) -> type:
    """The class that every component of a kind derives from."""
    return getattr(importlib.import_module(kind), BASES[kind])


def _components(kind: str, module: ModuleType) -> list[type]:
    """The public subclasses of a kind's base that a module itself defines."""
    public = [c for n, c in vars(module).items() if inspect.isclass(c) and not n.startswith("_")]
    return [c for c in public if issubclass(c, base(kind)) and c.__module__ == module.__name__]


def _from_file(kind: str, argument: str | None) -> type:
    path, _, name = (argument or "").partition(":")
    file = Path(path)
    if not path.endswith(".py") or not file.is_file():
        raise UsageError(f"file:{argument}: {path or 'PATH'} is no Python file; write file:PATH.py:Class")
    module_spec = importlib.util.spec_from_file_location(f"_file_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where inspect and dataclasses look for it
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with somebody's file
        raise UsageError(f"file:{argument}: {file} can't be imported: {raised(error)}") from error
    found = {c.__name__: c for c in _components(kind, module)}
    made = getattr(module, name, None) if name and not name.startswith("_") else None
    if name not in found and callable(made) and kind != "attacks":
        return made  # any function or class that makes a module
    if name not in found and not (not name and len(found) == 1):
        raise UsageError(
            f"file:{argument}: {unknown(BASES[kind], name, sorted(found))}; "
            f"the class must derive from {kind}.{BASES[kind]}"
            + ("" if kind == "attacks" else ", or name a function that returns a torch.nn.Module")
        )
    return found[name] if name else next(iter(found.values()))
