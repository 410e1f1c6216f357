"""Data sets by name: the embedded excerpt, and those that torchvision reads."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark.dataset import ASSETS, FORMS, VALIDATION, Dataset, Request
from benchmark.errors import UsageError, unknown
from benchmark.pictures import decoded, folder, from_folders, named, parquet

SYSTEM = Path("/usr/share/datasets")
"""Where Debian's data set packages put their files."""

# --- Fashion-MNIST: an excerpt is embedded -----------------------------------------------------------------------

FASHION_SHA256 = {
    "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    "t10k": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}


def fashion_mnist(request: Request, *, split: str = "test") -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 28×28 grey images of 10 kinds of clothing."""
    with np.load(ASSETS / "fashion-mnist-test-1000.npz") as excerpt:
        pixels, labels = excerpt["images"], excerpt["labels"]
    if split != "test" or request.rows > len(labels):
        pixels, labels = _fashion_files("t10k" if split == "test" else "train", request)
    fingerprint = FASHION_SHA256["t10k" if split == "test" else "train"]
    return _cut("fashion-mnist", split, pixels[:, None], labels, fingerprint)


def _fashion_files(stem: str, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """The full set from the system's package, from torchvision's folder, or by torchvision's download."""
    root = request.root
    folders = [root, root / "fashion-mnist", root / "FashionMNIST" / "raw", SYSTEM / "fashion-mnist"]
    found = next((f for f in folders if _idx(f, f"{stem}-images-idx3-ubyte")), None)
    if found is None and not request.offline:
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


# --- torchvision's data sets -------------------------------------------------------------------------------------


def mnist(request: Request, *, split: str = "test") -> Dataset:
    """MNIST: 28×28 grey images of handwritten digits."""
    source = _torchvision("MNIST", request, train=split != "test")
    _check_mnist(request)
    return _cut("mnist", split, source.data.numpy()[:, None], source.targets)


def cifar10(request: Request, *, split: str = "test") -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 32×32 colour images of 10 classes."""
    source = _torchvision("CIFAR10", request, train=split != "test")
    return _cut("cifar10", split, source.data.transpose(0, 3, 1, 2), source.targets)


def cifar100(request: Request, *, split: str = "test") -> Dataset:
    """CIFAR-100 (Krizhevsky 2009): 32×32 colour images of 100 classes."""
    source = _torchvision("CIFAR100", request, train=split != "test")
    return _cut("cifar100", split, source.data.transpose(0, 3, 1, 2), source.targets)


def svhn(request: Request, *, split: str = "test") -> Dataset:
    """SVHN (Netzer et al. 2011): 32×32 colour images of house numbers, cropped to a digit."""
    source = _torchvision("SVHN", request, split="test" if split == "test" else "train")
    return _cut("svhn", split, source.data, source.labels)


def celeba(request: Request, *, split: str = "test", attribute: str = "Smiling", size: int = 64) -> Dataset:
    """CelebA (Liu et al. 2015, arXiv 1411.7766): aligned faces, labelled by whether they have an attribute.

    The central 178×178 pixels, resized to ``size``.

    Args:
        request: how many, from where.
        split: "test", "validation" or "train", as the data set has them.
        attribute: one of CelebA's 40, which makes two classes.
        size: height and width of the images.
    """
    source = _torchvision("CelebA", request, split={"validation": "valid"}.get(split, split))
    known = [name for name in source.attr_names if name]
    if attribute not in known:
        raise UsageError(unknown("CelebA attribute", attribute, known))
    labels = source.attr[:, known.index(attribute)]
    files = [request.root / source.base_folder / "img_align_celeba" / name for name in source.filename]
    name = named("celeba", split=(split, "test"), attribute=(attribute, "Smiling"), size=(size, 64))
    return decoded(name, "celeba", 2, [p.read_bytes for p in files], labels, request.whole_blocks, size, crop=178,
                    order="\n".join(source.filename))  # fmt: skip


def imagenet(request: Request, *, split: str = "test", size: int = 224) -> Dataset:
    """ImageNet (Russakovsky et al. 2015, arXiv 1409.0575): the 50,000 validation images, which are its test set here.

    ``DIR/val/nXXXXXXXX/*.JPEG``, as torchvision lays it out; resized to 8/7 size, the central ``size`` pixels. In the
    order of the sha256 of the file names: any first n are a fixed random sample of the classes.

    Args:
        request: how many, from where.
        split: "test" (the validation images) or "train".
        size: height and width of the images.
    """
    part = {"test": "val", "train": "train"}.get(split)
    if part is None:
        raise UsageError(f"imagenet has split=test (its validation images) and split=train, not {split!r}")
    roots = [request.root / "imagenet" / part, request.root / part]
    found = next((r for r in roots if r.is_dir()), None)
    if found is None:
        raise UsageError(
            f"no ImageNet in {roots[0]} or {roots[1]}. It can't be downloaded freely: get ILSVRC2012_img_{part}.tar "
            f"from https://image-net.org, sort it into one folder per class (torchvision.datasets.ImageNet does), and "
            f"say where it is: --data-dir FOLDER with FOLDER/imagenet/{part}/n01440764/*.JPEG"
        )
    name = named("imagenet", split=(split, "test"), size=(size, 224))
    return from_folders(name, "imagenet", found, request.whole_blocks, size, classes=1000)


def _check_mnist(request: Request) -> None:
    """torchvision checks MNIST's archives when it fetches them only."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import check_integrity

    for file, md5 in MNIST.resources:
        archive = request.root / "MNIST" / "raw" / file
        if archive.is_file() and not check_integrity(str(archive), md5):
            raise UsageError(f"{archive}: its md5 isn't {md5}; delete {archive.parent} and fetch it again")


def _torchvision(name: str, request: Request, **which: Any) -> Any:
    """One of torchvision's data sets, from the data folder or by its download; it checks md5 sums."""
    from torchvision import datasets

    make = getattr(datasets, name)
    try:
        return make(str(request.root), **which, download=False)
    except Exception as missing:  # of a damaged file torchvision raises whatever its reader does
        if request.offline:
            raise UsageError(_torchvision_remedy(name, make, request, "--offline forbids the download")) from missing
    try:
        return make(str(request.root), **which, download=True)
    except Exception as error:  # torchvision raises bare URLError, RuntimeError and OSError alike
        raise UsageError(_torchvision_remedy(name, make, request, f"the download failed: {error}")) from error


def _torchvision_remedy(name: str, make: Any, request: Request, why: str) -> str:
    """What to fetch by hand, from where and to which place, as torchvision itself knows it."""
    sources = {
        "CIFAR10": lambda: [(make.url, make.filename, make.tgz_md5)],
        "CIFAR100": lambda: [(make.url, make.filename, make.tgz_md5)],
        "MNIST": lambda: [(make.mirrors[0] + file, f"MNIST/raw/{file}", md5) for file, md5 in make.resources],
        "SVHN": lambda: [entry for part, entry in make.split_list.items() if part != "extra"],
        "CelebA": lambda: [
            (f"https://drive.google.com/uc?id={key}", f"celeba/{file}", md5) for key, md5, file in make.file_list
        ],
    }[name]()
    lines = "\n".join(f"  {url} → {request.root / file} (md5 {md5})" for url, file, md5 in sources)
    return (
        f"{name} isn't in {request.root}, or a file of it is damaged, and {why}. By hand (archives are unpacked "
        f"there):\n{lines}\nor say where it is: --data-dir FOLDER; or read another copy: --dataset parquet:PATH"
    )


def _cut(family: str, split: str, pixels: np.ndarray, labels: Any, fingerprint: str | None = None) -> Dataset:
    """A split of a data set in memory: the last training images are for validation."""
    first = 0
    if split != "test" and len(pixels) <= VALIDATION:
        raise UsageError(
            f"{family} has {len(pixels):,} training images: too few to cut off {VALIDATION:,} for validation"
        )
    labels = np.asarray(labels).astype(np.int64)
    if fingerprint is None:
        fingerprint = hashlib.sha256(np.ascontiguousarray(pixels).tobytes() + labels.tobytes()).hexdigest()
    if split == "train":
        pixels, labels = pixels[:-VALIDATION], labels[:-VALIDATION]
    elif split == "validation":
        first = len(labels) - VALIDATION
        pixels, labels = pixels[first:], labels[first:]
    return Dataset(
        named(family, split=(split, "test")),
        torch.from_numpy(pixels.copy()),
        torch.from_numpy(labels),
        torch.arange(len(labels)) + first,
        fingerprint,
        FORMS[family],
    )


LOADERS: dict[str, Callable[..., Dataset]] = {
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "celeba": celeba,
    "imagenet": imagenet,
    "parquet": parquet,
    "folder": folder,
}
