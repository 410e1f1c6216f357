"""What this machine and environment can do: each finding is OK or comes with the command that mends it."""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata as metadata
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmark.checks import Check
from benchmark.errors import UsageError
from benchmark.fetch import network, sha256

ROBUSTBENCH = "python -m pip install 'robustbench>=1.1.1' 'setuptools<82' && python -m pip install -e shims"
REAL_ROBUSTBENCH = "python -m pip install --force-reinstall --no-deps robustbench"
TORCHATTACKS = "python -m pip install --no-deps torchattacks && " + REAL_ROBUSTBENCH
EXCERPT = "d9e4badbf69d7ea7ed43572d9220a7a50c9fdb161fe3511cbe3900e8f4ffd1f8"
"""The sha256 of the embedded images and labels."""


def findings(out: str = "results/run", data_dir: str | None = None, path: Sequence[str] | None = None) -> list[Check]:
    """All findings, in the order in which to mend them.

    Args:
        out: where runs would be written.
        data_dir: where data sets lie, if not in the cache.
        path: folders of installed packages; by default ``sys.path``.
    """
    path = list(sys.path if path is None else path)
    return [
        finding
        for check in (_python, _core, _torch_pair, _device, _data(data_dir), _weights, _writable(out),
                      _robustbench(path), _torchattacks(path), _autoattack, _pickle, _tests_package, _parquet)
        for finding in check()
    ]  # fmt: skip


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Check("python", "pass" if good else "fail", version, advice="" if good else "install Python 3.11 or newer")


def _core() -> Iterator[Check]:
    """The packages without which nothing runs."""
    for name in ("torch", "torchvision", "diffusers", "safetensors", "pyautoattack", "pandas", "scipy", "tqdm",
                 "jaxtyping"):  # fmt: skip
        try:
            importlib.import_module(name)
            yield Check(name, "pass", _version(name))
        except Exception as error:  # a broken binary raises whatever it likes on import
            yield Check(
                name, "fail", f"{type(error).__name__}: {error}".split("\n")[0], advice="python -m pip install -e ."
            )


def _torch_pair() -> Iterator[Check]:
    """torchvision's compiled operators exist only beside the torch they were built with (one index for both)."""
    try:
        import torch
        from torchvision.ops import nms

        nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
        yield Check("torch-torchvision", "pass", "built for each other")
    except Exception as error:
        yield Check(
            "torch-torchvision", "fail", str(error).split("\n")[0],
            advice="python -m pip install --force-reinstall torch torchvision  # both from one index",
        )  # fmt: skip


def _device() -> Iterator[Check]:
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        yield Check("device", "pass", f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    else:
        threads = torch.get_num_threads()
        yield Check("device", "pass", f"no GPU that torch can use: CPU, {threads} threads (budget quick by default)")


def _data(data_dir: str | None) -> Callable[[], Iterator[Check]]:
    def check() -> Iterator[Check]:
        if (data := _module("data")) is None:
            return
        from benchmark.dataset import ASSETS, FORMS  # as ``data`` does

        try:
            images = data.load("fashion-mnist", 1000, offline=True)
            digest = hashlib.sha256(images.pixels.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest()
            if digest != EXCERPT:
                raise UsageError(f"sha256 of the embedded images is {digest}, expected {EXCERPT}")
            yield Check("data-embedded", "pass", f"{len(images):,} images of fashion-mnist")
        except Exception as error:
            yield Check("data-embedded", "fail", str(error), advice=f"git checkout -- {ASSETS}")
        for name in FORMS:
            try:
                with network(allowed=False):
                    images = data.load(name, 1001, data_dir=data_dir, offline=True)
                yield Check(f"data-{name}", "pass", f"found: {len(images):,} images or more")
            except UsageError as error:
                where = data_dir or data.cache_dir()
                by_hand = str(error).split(". ", 1)[-1] if name == "imagenet" else ""
                yield Check(
                    f"data-{name}", "warn", f"not in {where}",
                    advice=by_hand or f"python -m benchmark fetch --dataset {name}  # or --data-dir FOLDER where it is",
                )  # fmt: skip

    return check


def _weights() -> Iterator[Check]:
    """Every shipped file against its card."""
    if (checkpoints := _module("checkpoints")) is None:
        return
    for folder in sorted(p for p in checkpoints.SHIPPED.iterdir() if p.is_dir()):
        for name, card in checkpoints.cards(folder.name).items():
            try:
                if files := checkpoints.check_files(card):  # else others publish them
                    yield Check(f"weights-{name}", "pass", f"{files} files as their card says")
            except UsageError as error:
                status = "fail" if name in ("diffpure", "resnet") else "warn"
                yield Check(f"weights-{name}", status, str(error).split(";")[0], advice=str(error).split("; ", 1)[-1])


def _writable(out: str) -> Callable[[], Iterator[Check]]:
    def check() -> Iterator[Check]:
        data = _module("data")
        for what, folder in (("out", Path(out)), *([("cache", data.cache_dir())] if data else [])):
            existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
            try:
                with tempfile.TemporaryFile(dir=existing):
                    free = shutil.disk_usage(existing).free / 1e9
                small = free < 1
                yield Check(
                    f"write-{what}", "warn" if small else "pass", f"{folder}: {free:,.0f} GB free",
                    advice="free some disk, or --out elsewhere" if small else "",
                )  # fmt: skip
            except OSError as error:
                advice = "--out FOLDER elsewhere" if what == "out" else "export XDG_CACHE_HOME=FOLDER"
                yield Check(f"write-{what}", "fail" if what == "out" else "warn", f"{existing}: {error}", advice=advice)

    return check


def _robustbench(path: list[str]) -> Callable[[], Iterator[Check]]:
    """robustbench against its own list of files: torchattacks' wheel carries an old copy that overwrites it."""

    def check() -> Iterator[Check]:
        found = _installed("robustbench", path)
        if found is None:
            yield Check(
                "robustbench", "warn", "not installed: no robustbench:NAME classifiers",
                advice=ROBUSTBENCH,
            )  # fmt: skip
            return
        changed = _changed(found)
        if changed:
            shown = ", ".join(changed[:3]) + ("…" if len(changed) > 3 else "")
            yield Check(
                "robustbench", "warn",
                f"{len(changed)} files aren't those of robustbench {found.version} ({shown}): torchattacks, installed "
                "after it, brings an old copy",
                advice=TORCHATTACKS if _installed("torchattacks", path) else REAL_ROBUSTBENCH,
            )  # fmt: skip
        elif fault := _import_fault("robustbench.utils"):
            yield Check("robustbench", "warn", f"{found.version} can't be imported: {fault}", advice=ROBUSTBENCH)
        else:
            yield Check("robustbench", "pass", f"{found.version}, its files are its own")
        setuptools = _installed("setuptools", path)
        major = int(setuptools.version.split(".")[0]) if setuptools else None
        if major is None or major >= 82:
            version = setuptools.version if setuptools else "missing"
            yield Check(
                "pkg_resources", "warn", f"setuptools {version} has no pkg_resources, which robustbench imports",
                advice="python -m pip install 'setuptools<82'",
            )  # fmt: skip
        else:
            yield Check("pkg_resources", "pass", f"setuptools {setuptools.version}")  # type: ignore[union-attr]

    return check


def _torchattacks(path: list[str]) -> Callable[[], Iterator[Check]]:
    """torchattacks pins a 2021 release of requests, which breaks others if pip obeys it."""

    def check() -> Iterator[Check]:
        found = _installed("torchattacks", path)
        if found is None:
            yield Check("torchattacks", "warn", "not installed", advice=TORCHATTACKS)
            return
        requests = _installed("requests", path)
        if requests and requests.version.startswith("2.25."):
            yield Check(
                "torchattacks", "warn", f"brought requests {requests.version} of 2021 with it",
                advice="python -m pip install --upgrade requests  # torchattacks itself wants --no-deps",
            )  # fmt: skip
        else:
            yield Check("torchattacks", "pass", found.version)

    return check


def _autoattack() -> Iterator[Check]:
    """robustbench imports a module that isn't on the package index."""
    found = importlib.util.find_spec("autoattack")
    if found is None:
        yield Check(
            "autoattack",
            "warn",
            "no module autoattack, which robustbench imports",
            advice="python -m pip install -e shims",
        )
    else:
        ours = "shims" in str(found.origin)
        yield Check("autoattack", "pass", "the stand-in on pyautoattack" if ours else f"{found.origin}")


def _pickle() -> Iterator[Check]:
    """Whether torch.load is safe unless told otherwise (since 2.6)."""
    try:
        import torch
    except ImportError:
        return
    default = inspect.signature(torch.load).parameters["weights_only"].default
    forced = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    if forced:
        yield Check(
            "safe-loading", "warn", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: any checkpoint may execute code",
            advice="unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD  # --trust-checkpoint does it for one run",
        )  # fmt: skip
    elif default is False:
        yield Check(
            "safe-loading", "warn", f"torch {torch.__version__} executes pickles in robustbench's checkpoints",
            advice="python -m pip install 'torch>=2.6' torchvision",
        )  # fmt: skip
    else:
        yield Check("safe-loading", "pass", "torch.load takes tensors only")


def _tests_package() -> Iterator[Check]:
    """robustbench's wheel installs a top-level package ``tests``."""
    ours = Path("tests/__init__.py").exists()
    if Path("tests").is_dir() and not ours:
        yield Check(
            "tests-package",
            "warn",
            "tests/ has no __init__.py: robustbench's hides it",
            advice="touch tests/__init__.py",
        )


def _parquet() -> Iterator[Check]:
    if importlib.util.find_spec("pyarrow") is None:
        yield Check("parquet", "warn", "no pyarrow: no --dataset parquet:PATH", advice="python -m pip install pyarrow")
    else:
        yield Check("parquet", "pass", f"pyarrow {_version('pyarrow')}")


def _module(name: str) -> Any:
    """One of the benchmark's own modules, or None where what it imports is broken, which is said already."""
    try:
        return importlib.import_module(f"benchmark.{name}")
    except Exception:
        return None


def _import_fault(name: str) -> str | None:
    """What importing a package raises, seen from a process of its own; None if it works."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {name}"], capture_output=True, text=True)
    return done.stderr.strip().split("\n")[-1] if done.returncode else None


def _installed(name: str, path: list[str]) -> metadata.Distribution | None:
    return next(iter(metadata.distributions(name=name, path=path)), None)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _changed(found: metadata.Distribution) -> list[str]:
    """The Python files of a distribution that are missing or other than its RECORD says."""
    changed = []
    for file in found.files or []:
        if file.suffix != ".py" or file.hash is None or not str(file).startswith("robustbench/"):
            continue
        path = Path(str(found.locate_file(file)))
        wanted = base64.urlsafe_b64decode(file.hash.value + "=").hex()
        if not path.is_file() or sha256(path) != wanted:
            changed.append(str(file))
    return changed
