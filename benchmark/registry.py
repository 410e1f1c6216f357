"""Components by name: a file in ``purifiers``, ``attacks`` or ``classifiers`` is a component, with no list to keep."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from benchmark import constructors, specs
from benchmark.errors import UsageError, raised, unknown

BASES = {"purifiers": "Purifier", "attacks": "Attack", "classifiers": "Classifier"}
OWN = (*BASES, "benchmark")
"""The packages of the benchmark, whose version says what they are."""


def names(kind: str) -> list[str]:
    """The components of a kind that files and installed packages offer."""
    return list(_names(kind, tuple(importlib.import_module(kind).__path__), tuple(sys.path)))


@functools.lru_cache
def _names(kind: str, folders: tuple[str, ...], path: tuple[str, ...]) -> tuple[str, ...]:
    own = {m.name.replace("_", "-") for m in pkgutil.iter_modules(folders) if not m.name.startswith("_")}
    return tuple(sorted(own | _plugins(kind, path).keys()))


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
        component = _shipped(kind, name)
    if argument is None:
        return component
    if not hasattr(component, "of"):
        raise UsageError(f"{name}:{argument}: {name} takes no argument; options are written {name}:key=value")
    try:
        return component.of(argument)
    except ValueError as error:
        raise UsageError(str(error)) from error


@functools.cache
def _shipped(kind: str, name: str) -> type:
    """The component of the benchmark's own that a file defines."""
    (component,) = _components(kind, importlib.import_module(f"{kind}.{name.replace('-', '_')}"))
    return component


@functools.cache
def completed(kind: str, text: str) -> str:
    """A recorded spec with the options that its component has gained since, at their defaults, which change nothing.

    Specs of components that aren't here stay as they are.
    """
    spec = specs.parse(text)
    try:
        component = described(kind, spec.name, spec.argument)
    except UsageError:
        return text
    defaults = {
        k: p.default for k, p in constructors.options(component).items() if p.default is not inspect.Parameter.empty
    }
    return str(replace(spec, options={**defaults, **spec.options}))


def described(kind: str, name: str, argument: str | None = None) -> type:
    """The class behind a name, be it a component's or a card's: vae-gan is a vae.

    Raises:
        UsageError: as ``load``.
    """
    while "-" in name and name not in names(kind):
        name = name.rpartition("-")[0]
    return load(kind, name, argument)


def source(spec: specs.Spec) -> dict[str, str]:
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
