"""Where images come from: the embedded excerpt, torchvision's data sets, Parquet files, folders."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.data import ASSETS, VALIDATION, Dataset, Form, Request
from benchmark.errors import UsageError

SYSTEM = Path("/usr/share/datasets")
"""Where Debian's data set packages put their files."""

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
    """
    source = _torchvision("CelebA", request, split={"validation": "valid"}.get(split, split))
    known = [name for name in source.attr_names if name]
    if attribute not in known:
        from benchmark.registry import unknown

        raise UsageError(unknown("CelebA attribute", attribute, known))
    labels = source.attr[:, known.index(attribute)]
    files = [request.root / source.base_folder / "img_align_celeba" / name for name in source.filename]
    name = _named("celeba", split=(split, "test"), attribute=(attribute, "Smiling"), size=(size, 64))
    return _decoded(name, "celeba", 2, [p.read_bytes for p in files], labels, request.whole_blocks, size, crop=178,
                    order="\n".join(source.filename))  # fmt: skip


def imagenet(request: Request, *, split: str = "test", size: int = 224) -> Dataset:
    """ImageNet (Russakovsky et al. 2015, arXiv 1409.0575): the 50,000 validation images, which are its test set here.

    ``DIR/val/nXXXXXXXX/*.JPEG``, as torchvision lays it out; resized to 8/7 size, the central ``size`` pixels. In the
    order of the sha256 of the file names: any first n are a fixed random sample of the classes.
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
    name = _named("imagenet", split=(split, "test"), size=(size, 224))
    return _folders(name, "imagenet", found, request.whole_blocks, size, classes=1000)


def _torchvision(name: str, request: Request, **which: Any) -> Any:
    """One of torchvision's data sets, from the data folder or by its download, checked by its md5 sums."""
    from torchvision import datasets

    make = getattr(datasets, name)
    try:
        return make(str(request.root), **which, download=False)
    except (RuntimeError, OSError, EOFError) as missing:
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


# --- Parquet files and folders -----------------------------------------------------------------------------------


def parquet(
    request: Request, path: str, *, split: str = "test", family: str = "", label: str = "label", only: str = "",
    size: int = 0,
) -> Dataset:  # fmt: skip
    """Images in Parquet files, in the layout of the public hubs: ``img`` or ``image`` ({bytes, path} or bytes).

    Args:
        request: how many, from where.
        path: a file, or a folder whose files' names say the split.
        split: which files of a folder.
        family: the data set whose classifiers, purifiers and radii fit; by default the one that the path names.
        label: the column of labels.
        only: a column of booleans: rows where it is false are left out.
        size: if set, images are resized to 8/7 size on their shorter side and cut to the central size × size pixels.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("reading Parquet files needs pyarrow: python -m pip install pyarrow") from error
    files = _shards(Path(path).expanduser(), split)
    family, classes = _family(path, family)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    images: list[Callable[[], bytes]] = []
    labels: list[int] = []
    ids: list[int] = []
    row, highest = 0, 0
    for file in files:
        try:
            table = pq.ParquetFile(file)
        except Exception as error:  # pyarrow's own errors derive from ValueError, OSError or neither
            raise UsageError(f"{file} isn't a Parquet file: {error}") from error
        columns = table.schema_arrow.names
        column = next((c for c in ("img", "image") if c in columns), None)
        missing = [c for c in (label, only) if c and c not in columns]
        if column is None or missing:
            raise UsageError(
                f"{file}: no column {missing[0] if missing else 'img or image'!r}; it has {', '.join(columns)} "
                "(label=NAME and only=NAME name others)"
            )
        highest = max([highest, *table.read([label])[label].to_pylist()])
        for batch in table.iter_batches(256, columns=[c for c in (column, label, only) if c]):
            for entry in batch.to_pylist():
                if len(ids) < request.whole_blocks and (not only or entry[only]):
                    content = entry[column]
                    images.append(io.BytesIO(content["bytes"] if isinstance(content, dict) else content).getvalue)
                    labels.append(entry[label])
                    ids.append(row)
                row += 1
            if len(ids) >= request.whole_blocks:
                break
    chosen = {"family": family, "label": (label, "label"), "only": (only, ""), "size": (size, 0)}
    name = _named(f"parquet:{Path(path).name}", split=(split, "test"), **chosen)  # type: ignore[arg-type]
    return _decoded(name, family, classes or highest + 1, images, labels, request.whole_blocks, size, ids=ids,
                    order=digest.hexdigest() + name)  # fmt: skip


def folder(request: Request, path: str, *, split: str = "test", family: str = "", size: int = 0) -> Dataset:
    """Images in one folder per class, whose sorted names are the classes: ``PATH[/SPLIT]/CLASS/*.png|jpg|…``.

    In the order of the sha256 of the file names: any first n are a fixed random sample of the classes.

    Args:
        request: how many.
        path: the folder.
        split: a folder below it, if there is one of that name.
        family: the data set whose classifiers, purifiers and radii fit; by default the one that the path names.
        size: if set, images are resized to 8/7 size on their shorter side and cut to the central size × size pixels.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UsageError(f"folder:{path}: no such folder; expected {path}/CLASS/*.png")
    root = root / split if (root / split).is_dir() else root
    family, classes = _family(path, family)
    name = _named(f"folder:{Path(path).name}", split=(split, "test"), family=family, size=(size, 0))
    return _folders(name, family, root, request.whole_blocks, size, classes)


def _shards(path: Path, split: str) -> list[Path]:
    """The Parquet files of a path: itself, or those of a split."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"parquet:{path}: no such file or folder")
    stems = {"test": ("test", "validation", "valid", "val"), "validation": ("validation", "valid", "val")}
    everything = sorted(path.rglob("*.parquet"))
    for stem in stems.get(split, (split,)):
        if chosen := [f for f in everything if re.match(rf"{stem}\b|{stem}[-_.]", f.name)]:
            return chosen
    raise UsageError(
        f"parquet:{path}: no file of the split {split!r} among {', '.join(f.name for f in everything) or 'no files'}"
    )


def _family(path: str, family: str) -> tuple[str, int | None]:
    """The data set that a path's images belong to, as told or as the path's parts name it, and its classes."""
    if family:
        family = family.replace("_", "-").lower()
        if family not in FORMS:
            from benchmark.registry import unknown

            raise UsageError(unknown("data set (family=)", family, sorted(FORMS)))
    else:
        parts = [Path(path).stem, *reversed(Path(path).expanduser().absolute().parent.parts)]
        known = [p.lower().replace("_", "-") for p in parts]
        family = next((p for p in known if p in FORMS), "")
    return family or "images", FORMS[family].classes if family else None


def _folders(name: str, family: str, root: Path, rows: int, size: int, classes: int | None) -> Dataset:
    """A data set of one folder per class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    kinds = sorted(p.name for p in root.iterdir() if p.is_dir())
    if classes is not None and len(kinds) != classes:
        raise UsageError(
            f"{root} has {len(kinds):,} class folders, {family} has {classes:,} classes: labels are the folders' "
            "places among all, so a part of them would be numbered wrongly"
        )
    files = [
        (f"{kind}/{entry.name}", label)
        for label, kind in enumerate(kinds)
        for entry in os.scandir(root / kind)
        if entry.name.lower().endswith(IMG_EXTENSIONS)
    ]
    if not files:
        raise UsageError(f"no images in {root}/CLASS/: {', '.join(IMG_EXTENSIONS)} are read")
    files.sort(key=lambda file: hashlib.sha256(file[0].encode()).digest())
    order = "\n".join(f"{file} {(root / file).stat().st_size}" for file, _ in files)
    labels = [label for _, label in files]
    return _decoded(name, family, len(kinds), [(root / f).read_bytes for f, _ in files], labels, rows, size,
                    order=order)  # fmt: skip


# --- shared ------------------------------------------------------------------------------------------------------


def _named(base: str, **options: Any) -> str:
    """A data set's name with the options that aren't as usual: pairs are (value, usual)."""
    pairs = [
        f"{key}={value[0] if isinstance(value, tuple) else value}"
        for key, value in options.items()
        if not isinstance(value, tuple) or value[0] != value[1]
    ]
    return base + ("," if ":" in base else ":") * bool(pairs) + ",".join(pairs)


def _cut(family: str, split: str, pixels: np.ndarray, labels: Any, fingerprint: str | None = None) -> Dataset:
    """A split of a data set in memory: the last training images are for validation."""
    first = 0
    labels = np.asarray(labels).astype(np.int64)
    if fingerprint is None:
        fingerprint = hashlib.sha256(np.ascontiguousarray(pixels).tobytes() + labels.tobytes()).hexdigest()
    if split == "train":
        pixels, labels = pixels[:-VALIDATION], labels[:-VALIDATION]
    elif split == "validation":
        first = len(labels) - VALIDATION
        pixels, labels = pixels[first:], labels[first:]
    return Dataset(
        _named(family, split=(split, "test")),
        torch.from_numpy(pixels.copy()),
        torch.from_numpy(labels),
        torch.arange(len(labels)) + first,
        fingerprint,
        FORMS[family],
    )


def _decoded(
    name: str, family: str, classes: int, contents: Sequence[Callable[[], bytes]], labels: Any, rows: int, size: int,
    *, order: str, crop: int = 0, ids: list[int] | None = None,
) -> Dataset:  # fmt: skip
    """A data set of image files, of which the first ``rows`` are decoded."""
    taken = min(rows, len(contents))
    if taken == 0:
        raise UsageError(f"{name} has no images")
    pixels = list(_pixels(name, contents[:taken], size, crop))
    shapes = sorted({tuple(p.shape) for p in pixels})
    if len(shapes) > 1:
        raise UsageError(f"{name}: images of {len(shapes)} shapes, {shapes[0]} and {shapes[-1]}; size=N makes them one")
    chosen = torch.as_tensor(labels)[:taken].long()
    if int(chosen.min()) < 0 or int(chosen.max()) >= classes:
        raise UsageError(f"{name}: a label is {int(chosen.max())}, {family} has {classes} classes")
    return Dataset(
        name, torch.stack(pixels), chosen, torch.tensor(ids or range(taken))[:taken],
        hashlib.sha256(order.encode()).hexdigest(),
        Form(family, shapes[0], classes),  # type: ignore[arg-type]
    )  # fmt: skip


def _pixels(name: str, contents: Sequence[Callable[[], bytes]], size: int, crop: int) -> Iterator[Tensor]:
    """uint8 images (C, H, W): decoded, cut to ``crop``, or resized to 8/7 size and cut to ``size``."""
    from PIL import Image
    from torchvision.transforms import functional as f

    for position, content in enumerate(contents):
        try:
            opened = Image.open(io.BytesIO(content()))
            image = opened.convert("L" if opened.mode in ("1", "L", "LA") else "RGB")
        except (OSError, TypeError, SyntaxError) as error:
            raise UsageError(f"{name}: image {position} can't be decoded: {error}") from error
        if crop:
            image = f.resize(f.center_crop(image, [crop, crop]), [size, size])
        elif size:
            image = f.center_crop(f.resize(image, [round(size * 8 / 7)]), [size, size])
        yield f.pil_to_tensor(image)


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
