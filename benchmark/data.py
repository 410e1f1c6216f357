"""Data sets by spec: loaded, described, or made of a caller's own arrays."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from benchmark import constructors, specs
from benchmark.dataset import FORMS, SPLITS, Dataset, Form, Request
from benchmark.errors import UsageError, unknown
from benchmark.loaders import LOADERS


def names() -> list[str]:
    """The data sets known by name, and the ways to read others."""
    return sorted(LOADERS)


def reader(name: str) -> Callable[..., Dataset]:
    """What loads a data set, and documents it."""
    return LOADERS[name]


def load(text: str, at_least: int = 1, *, data_dir: str | None = None, offline: bool = False) -> Dataset:
    """The examples of a data set that are at hand, or, if those are fewer than ``at_least``, all that there are.

    Args:
        text: a spec: a known name, ``parquet:PATH`` or ``folder:PATH``, with options such as ``split=validation``.
        at_least: how many are needed.
        data_dir: folder to look in and to download to; by default ``cache_dir()``.
        offline: never download.

    Raises:
        UsageError: for an unknown name or option, or if the images aren't to be had.
    """
    spec, options = _read(text)
    request = Request(at_least, Path(data_dir).expanduser() if data_dir else cache_dir(), offline)
    arguments = () if spec.argument is None else (spec.argument,)
    return LOADERS[spec.name](request, *arguments, **options)


def from_arrays(source: Any) -> Dataset:
    """The caller's own images and labels, tensors or arrays; uint8 images are levels of 255.

    Raises:
        UsageError: for anything else, or values that can't be meant.
    """
    try:
        images, labels = (torch.as_tensor(part).detach().cpu() for part in source)
    except Exception as error:  # whatever torch, or a foreign type, raises
        raise UsageError(f"data is a data set's name or (images, labels), not {type(source).__name__}") from error
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images):
        raise UsageError(
            f"images have the shape (N, C, H, W) and labels (N,), N at least 1; got {tuple(images.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.min() < 0:
        raise UsageError(f"labels are class numbers from 0 on, got {labels.dtype} from {labels.min()}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise UsageError(f"images are floats in [0, 1], or uint8 in levels of 255; got {images.dtype}")
        images = images.float()
        if not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
            raise UsageError(
                f"images are in [0, 1], got {images.min():.3g} to {images.max():.3g}; divide levels by 255"
            )
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    form = Form("tensors", tuple(images.shape[1:]), int(labels.max()) + 1)  # type: ignore[arg-type]
    return Dataset(f"tensors-{digest[:8]}", images, labels.long(), torch.arange(len(labels)), digest, form)


def part(text: str, split: str | None = None) -> str:
    """The spec of another split of a data set, or of what has splits."""
    spec = specs.parse(text)
    options = {key: value for key, value in spec.options.items() if key != "split"}
    return str(replace(spec, options=options | ({} if split is None else {"split": split})))


def form(text: str, *, data_dir: str | None = None, offline: bool = False) -> Form:
    """What a defense for a data set has to fit; looks at an image only where the name alone doesn't say.

    Raises:
        UsageError: as ``load``.
    """
    spec, options = _read(text)
    if spec.name in FORMS and "size" not in spec.options:
        return FORMS[spec.name]
    return load(text, data_dir=data_dir, offline=offline).form


def _read(text: str) -> tuple[specs.Spec, dict]:
    """A data set's spec and all its options."""
    spec = specs.parse(text)
    if spec.name not in LOADERS:
        raise UsageError(unknown("dataset", spec.name, names()))
    takes_path = "path" in inspect.signature(LOADERS[spec.name]).parameters
    if spec.argument is not None and not takes_path:
        raise UsageError(f"{text}: {spec.name} takes no argument; options are written {spec.name}:split=validation")
    if spec.argument is None and takes_path:
        raise UsageError(f"{text!r} names no place: write {spec.name}:PATH")
    options = constructors.resolve(LOADERS[spec.name], spec)
    if options["split"] not in SPLITS:
        raise UsageError(f"{text}: a data set takes split=test, split=validation or split=train")
    return spec, options


def cache_dir() -> Path:
    """Where downloads go unless --data-dir says otherwise: the platform's cache folder."""
    return user_cache_path("purification-benchmark", appauthor=False)
