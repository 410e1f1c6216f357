"""Data sets: images in [0, 1], labels, and one fixed order each."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from platformdirs import user_cache_path
from torch import Tensor

from benchmark import registry
from benchmark.errors import UsageError

ASSETS = Path(__file__).parent / "assets"
VALIDATION = 5_000
"""The last this many training images are cut off for choices; nothing shipped was trained on them."""
CUT = f"the last {VALIDATION:,} training images, or every tenth of a Parquet folder without a split of that name"
"""Which images are for validation: never trained on."""
ALL = 1 << 40
"""As ``at_least``: every image that there is."""
SPLITS = ("test", "validation", "train")


class Form(NamedTuple):
    """What a defense has to fit: the data set that weights and radii are filed under, (C, H, W), number of classes."""

    family: str
    shape: tuple[int, int, int]
    classes: int


FORMS = {
    "fashion-mnist": Form("fashion-mnist", (1, 28, 28), 10),
    "mnist": Form("mnist", (1, 28, 28), 10),
    "cifar10": Form("cifar10", (3, 32, 32), 10),
    "cifar100": Form("cifar100", (3, 32, 32), 100),
    "svhn": Form("svhn", (3, 32, 32), 10),
    "celeba": Form("celeba", (3, 64, 64), 2),
    "imagenet": Form("imagenet", (3, 224, 224), 1000),
}
"""The data sets with a name, as they come unless an option says otherwise."""


class Request(NamedTuple):
    """What a loader is asked for: at least ``rows`` examples, if there are, from ``root`` or downloaded to it."""

    rows: int
    root: Path
    offline: bool

    @property
    def whole_blocks(self) -> int:
        """Rows to the next multiple of 32: a package's attack is never handed a part of a block."""
        return -(-self.rows // 32) * 32


@dataclass(frozen=True)
class Dataset:
    """Images in a fixed order.

    Args:
        name: the name in records, with the options that aren't as usual.
        pixels: uint8, or float in [0, 1], shape (N, C, H, W).
        labels: int64, shape (N,).
        ids: int64, shape (N,): what keys the noise of an example; its position in its split, by default.
        fingerprint: sha256 that identifies the data set and its order, whatever n is.
        form: what a defense has to fit.
    """

    name: str
    pixels: Tensor
    labels: Tensor
    ids: Tensor
    fingerprint: str
    form: Form

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.form.shape

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    @property
    def family(self) -> str:
        """What radii and weights are filed under."""
        return self.form.family

    @property
    def classes(self) -> int:
        return self.form.classes

    def images(self, rows: slice | Tensor) -> Tensor:
        """float32 images in [0, 1] of some rows."""
        chosen = self.pixels[rows]
        return chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen

    def to(self, device: str) -> Dataset:
        """The examples on a device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in ("pixels", "labels", "ids")})

    def first(self, n: int) -> Dataset:
        """The first n of the order; an error if there are fewer."""
        if n > len(self):
            raise UsageError(f"{self.name} has {len(self):,} examples, --n-examples asked for {n:,}")
        return replace(self, pixels=self.pixels[:n], labels=self.labels[:n], ids=self.ids[:n])


def names() -> list[str]:
    """The data sets known by name, and the ways to read others."""
    from benchmark.loaders import LOADERS  # they build on this module

    return sorted(LOADERS)


def reader(name: str) -> Callable[..., Dataset]:
    """What loads a data set, and documents it."""
    from benchmark.loaders import LOADERS

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
    from benchmark.loaders import LOADERS

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
    spec = registry.parse(text)
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


def _read(text: str) -> tuple[registry.Spec, dict]:
    """A data set's spec and all its options."""
    from benchmark.loaders import LOADERS

    spec = registry.parse(text)
    if spec.name not in LOADERS:
        raise UsageError(registry.unknown("dataset", spec.name, names()))
    takes_path = "path" in inspect.signature(LOADERS[spec.name]).parameters
    if spec.argument is not None and not takes_path:
        raise UsageError(f"{text}: {spec.name} takes no argument; options are written {spec.name}:split=validation")
    if spec.argument is None and takes_path:
        raise UsageError(f"{text!r} names no place: write {spec.name}:PATH")
    options = registry.resolve(LOADERS[spec.name], spec)
    if options["split"] not in SPLITS:
        raise UsageError(f"{text}: a data set takes split=test, split=validation or split=train")
    return spec, options


def cache_dir() -> Path:
    """Where downloads go unless --data-dir says otherwise: the platform's cache folder."""
    return user_cache_path("purification-benchmark", appauthor=False)
