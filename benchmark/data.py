"""Data sets: images in [0, 1], labels, and one fixed order each."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmark.errors import UsageError

ASSETS = Path(__file__).parent / "assets"
SYSTEM = Path("/usr/share/datasets")
VALIDATION = 5_000
"""The last this many training images are cut off for choices; nothing shipped was trained on them."""


@dataclass(frozen=True)
class Dataset:
    """Images in a fixed order.

    Args:
        name: the name in records, with the split if it isn't the test set.
        pixels: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        ids: int64, shape (N,): what keys the noise of an example; its position in its split, by default.
        fingerprint: sha256 that identifies the data set and its order, whatever n is.
        classes: number of classes.
    """

    name: str
    pixels: Tensor
    labels: Tensor
    ids: Tensor
    fingerprint: str
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.pixels.shape[1:])  # type: ignore[return-value]

    @property
    def family(self) -> str:
        """The data set without the split: what radii and weights are filed under."""
        return self.name.split(":")[0]

    def images(self, rows: slice | Tensor) -> Tensor:
        """float32 images in [0, 1] of some rows."""
        chosen = self.pixels[rows]
        return chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen

    def first(self, n: int) -> Dataset:
        """The first n of the order; an error if there are fewer."""
        if n > len(self):
            raise UsageError(f"{self.name} has {len(self):,} examples, --n-examples asked for {n:,}")
        return Dataset(self.name, self.pixels[:n], self.labels[:n], self.ids[:n], self.fingerprint, self.classes)


def names() -> list[str]:
    """The data sets known by name."""
    return sorted(LOADERS)


def load(name: str, at_least: int = 1, *, data_dir: str | None = None, offline: bool = False) -> Dataset:
    """The examples of ``name`` that are at hand, or, if those are fewer than ``at_least``, all that there are.

    Args:
        name: a known name, or ``NAME:split=test|validation|train``.
        at_least: how many are needed.
        data_dir: folder to look in first and to download to.
        offline: never download.

    Raises:
        UsageError: for an unknown name or split, or if the images aren't to be had.
    """
    base, _, option = name.partition(":")
    key, _, split = option.partition("=") if option else ("split", "", "test")
    base = base.replace("_", "-")
    if base not in LOADERS:
        from benchmark.registry import unknown

        raise UsageError(unknown("dataset", base, names()))
    if key != "split" or split not in ("test", "validation", "train"):
        raise UsageError(f"{name!r}: a data set takes split=test, split=validation or split=train")
    return LOADERS[base](split, at_least, data_dir, offline)


def cache_dir() -> Path:
    """Where downloads go unless --data-dir says otherwise: the platform's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "purification-benchmark"


FASHION_SHA256 = {
    "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    "t10k": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}


def _fashion_mnist(split: str, at_least: int, data_dir: str | None, offline: bool) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 28×28 grey images of 10 kinds of clothing."""
    with np.load(ASSETS / "fashion-mnist-test-1000.npz") as excerpt:
        pixels, labels = excerpt["images"], excerpt["labels"]
    if split != "test" or at_least > len(labels):
        full_pixels, full_labels = _fashion_files("t10k" if split == "test" else "train", data_dir, offline)
        if split == "train":
            pixels, labels = full_pixels[:-VALIDATION], full_labels[:-VALIDATION]
        elif split == "validation":
            pixels, labels = full_pixels[-VALIDATION:], full_labels[-VALIDATION:]
        else:
            pixels, labels = full_pixels, full_labels
    ids = torch.arange(len(labels)) + (60_000 - VALIDATION if split == "validation" else 0)
    return Dataset(
        "fashion-mnist" if split == "test" else f"fashion-mnist:split={split}",
        torch.from_numpy(pixels.copy())[:, None],
        torch.from_numpy(labels.astype(np.int64)),
        ids,
        FASHION_SHA256["t10k" if split == "test" else "train"],
        10,
    )


def _fashion_files(stem: str, data_dir: str | None, offline: bool) -> tuple[np.ndarray, np.ndarray]:
    """The full set from the system's package, from torchvision's folder, or by torchvision's download."""
    root = Path(data_dir) if data_dir else cache_dir()
    folders = [root, root / "fashion-mnist", root / "FashionMNIST" / "raw", SYSTEM / "fashion-mnist"]
    found = next((f for f in folders if _idx(f, f"{stem}-images-idx3-ubyte")), None)
    if found is None and not offline:
        try:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(str(root), download=True)
            found = root / "FashionMNIST" / "raw"
        except Exception as error:  # torchvision raises bare URLError, RuntimeError and OSError alike
            raise UsageError(_fashion_remedy(root, f"the download failed: {error}")) from error
    if found is None:
        raise UsageError(_fashion_remedy(root, "--offline forbids the download"))
    try:
        images = _read_idx(_idx(found, f"{stem}-images-idx3-ubyte"))
        labels = _read_idx(_idx(found, f"{stem}-labels-idx1-ubyte"))
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:  # truncated, or a web page in its place
        raise UsageError(f"{found}/{stem}-*: {error or 'unreadable'}; delete the files and fetch them again") from error
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if digest != FASHION_SHA256[stem]:
        raise UsageError(
            f"{found}/{stem}-*: sha256 of the decoded images and labels is {digest}, expected {FASHION_SHA256[stem]}; "
            "delete the files and fetch them again"
        )
    return images, labels


def _fashion_remedy(root: Path, why: str) -> str:
    return (
        f"the full Fashion-MNIST isn't in {root} or {SYSTEM / 'fashion-mnist'}, and {why}. "
        "Either install Debian's package: apt install dataset-fashion-mnist; or, with a network, let torchvision "
        "fetch it: run again without --offline (--data-dir says where to). "
        "The first 1,000 test images are embedded: --n-examples up to 1000 needs neither."
    )


def _idx(folder: Path, name: str) -> Path | None:
    """An idx file, gzipped or not."""
    return next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)


def _read_idx(path: Path | None) -> np.ndarray:
    """The array in an idx file of unsigned bytes: a magic number ending in the rank, the sizes, the data."""
    if path is None:
        raise FileNotFoundError("the labels file beside the images file is missing")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


LOADERS = {"fashion-mnist": _fashion_mnist}
