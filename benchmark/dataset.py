"""A data set in memory, what a defense has to fit, and what a loader is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

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
