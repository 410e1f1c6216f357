"""Images from Parquet files and folders: decoded, checked, in one fixed order."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark.dataset import FORMS, SPLITS, Dataset, Form, Request
from benchmark.errors import UsageError, unknown
from benchmark.fetch import sha256

CONTENTS = 2 << 30
"""Bytes of images in a folder up to which their contents are hashed."""


def parquet(
    request: Request, path: str, *, split: str = "test", family: str = "", label: str = "label", only: str = "",
    size: int = 0,
) -> Dataset:  # fmt: skip
    """Images in Parquet files, in the layout of the public hubs: ``img`` or ``image`` ({bytes, path} or bytes).

    Args:
        request: how many, from where.
        path: a file, or a folder whose files' names say the split.
        split: which files of a folder. Without files of validation, it is every tenth row of those for training,
            which those then leave out.
        family: the data set whose classifiers, purifiers and radii fit; by default the one that the path names.
        label: the column of labels.
        only: a column of booleans: rows where it is false are left out.
        size: if set, images are resized to 8/7 size on their shorter side and cut to the central size × size pixels.
    """
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("reading Parquet files needs pyarrow: python -m pip install pyarrow") from error
    files, kept = _shards(Path(path).expanduser(), split)
    family = _family(path, family)
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(sha256(file)))
    images: list[Callable[[], bytes]] = []
    labels: list[int] = []
    ids: list[int] = []
    row, classes = 0, FORMS[family].classes if family in FORMS else 0
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
        kinds = {c: table.schema_arrow.field(c).type for c in (label, only) if c}
        if not pa.types.is_integer(kinds[label]) or (only and not pa.types.is_boolean(kinds[only])):
            raise UsageError(f"{file}: labels are integers and only=COLUMN names booleans; found {kinds}")
        column_of_labels = table.read([label])[label]
        if column_of_labels.null_count:
            raise UsageError(f"{file}: {column_of_labels.null_count:,} rows have no {label!r}")
        if family not in FORMS:
            classes = max(classes, (pc.max(column_of_labels).as_py() or 0) + 1)
        for batch in table.iter_batches(256, columns=[c for c in (column, label, only) if c]):
            for entry in batch.to_pylist():
                if len(ids) < request.whole_blocks and (not only or entry[only]) and kept(row):
                    content = entry[column]
                    content = content.get("bytes") if isinstance(content, dict) else content
                    if not isinstance(content, bytes):
                        raise UsageError(f"{file}: row {row} of {column!r} holds no bytes of an image")
                    images.append(io.BytesIO(content).getvalue)
                    labels.append(entry[label])
                    ids.append(row)
                row += 1
            if len(ids) >= request.whole_blocks:
                break
    chosen = {"family": family, "label": (label, "label"), "only": (only, ""), "size": (size, 0)}
    name = named(f"parquet:{Path(path).name}", split=(split, "test"), **chosen)  # type: ignore[arg-type]
    return decoded(name, family, classes, images, labels, request.whole_blocks, size, ids=ids,
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
    if (root / split).is_dir():
        root = root / split
    elif split != "test":
        raise UsageError(f"folder:{path}: no folder {root / split} for split={split}")
    family = _family(path, family)
    classes = FORMS[family].classes if family in FORMS else None
    name = named(f"folder:{Path(path).name}", split=(split, "test"), family=family, size=(size, 0))
    return from_folders(name, family, root, request.whole_blocks, size, classes)


def _shards(path: Path, split: str) -> tuple[list[Path], Callable[[int], bool]]:
    """The Parquet files of a path, itself or those of a split, and which of their rows belong to it."""
    if path.is_file() and split == "test":
        return [path], lambda row: True
    if path.is_file():
        raise UsageError(
            f"parquet:{path}: a file has no splits; name the folder with a file for split={split}, or that file alone"
        )
    if not path.is_dir():
        raise UsageError(f"parquet:{path}: no such file or folder")
    everything = sorted(path.rglob("*.parquet"))
    stems = {"validation": "validation|valid|val"}
    of = {s: [f for f in everything if re.match(rf"({stems.get(s, s)})[-_.]", f.name)] for s in SPLITS}
    if split != "test" and of["train"] and not of["validation"]:
        return of["train"], lambda row: (row % 10 == 9) == (split == "validation")
    if of[split]:
        return of[split], lambda row: True
    raise UsageError(
        f"parquet:{path}: no file of the split {split!r} among {', '.join(f.name for f in everything) or 'no files'}; "
        "split=NAME names another"
    )


def _family(path: str, family: str) -> str:
    """The data set that a path's images belong to, as told or as the path's parts name it; else "images"."""
    if family:
        family = family.replace("_", "-").lower()
        if family not in (*FORMS, "images"):
            raise UsageError(unknown("data set (family=)", family, ["images", *sorted(FORMS)]))
    else:
        parts = [Path(path).stem, *reversed(Path(path).expanduser().absolute().parent.parts)]
        known = [p.lower().replace("_", "-") for p in parts]
        family = next((p for p in known if p in FORMS), "")
    return family or "images"


def from_folders(name: str, family: str, root: Path, rows: int, size: int, classes: int | None) -> Dataset:
    """A data set of one folder per class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    kinds = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
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
    sizes = [(root / file).stat().st_size for file, _ in files]
    small = sum(sizes) <= CONTENTS  # of more than that the names and sizes stand for the contents
    order = "\n".join(
        f"{file} {sha256(root / file) if small else size}" for (file, _), size in zip(files, sizes, strict=True)
    )
    labels = [label for _, label in files]
    return decoded(name, family, len(kinds), [(root / f).read_bytes for f, _ in files], labels, rows, size,
                    order=order)  # fmt: skip


def named(base: str, **options: Any) -> str:
    """A data set's name with the options that aren't as usual: pairs are (value, usual)."""
    pairs = [
        f"{key}={value[0] if isinstance(value, tuple) else value}"
        for key, value in options.items()
        if not isinstance(value, tuple) or value[0] != value[1]
    ]
    return base + ("," if ":" in base else ":") * bool(pairs) + ",".join(pairs)


def decoded(
    name: str, family: str, classes: int, contents: Sequence[Callable[[], bytes]], labels: Any, rows: int, size: int,
    *, order: str, crop: int = 0, ids: list[int] | None = None,
) -> Dataset:  # fmt: skip
    """A data set of image files, of which the first ``rows`` are decoded."""
    taken = min(rows, len(contents))
    if taken == 0:
        raise UsageError(f"{name} has no images")
    known = FORMS.get(family)
    pixels = list(_pixels(name, contents[:taken], size, crop, known.shape[0] if known else None))
    if known is None and len({len(p) for p in pixels}) > 1:  # grey images among coloured ones
        pixels = [p.expand(3, -1, -1) for p in pixels]
    shapes = sorted({tuple(p.shape) for p in pixels})
    if len(shapes) > 1:
        raise UsageError(f"{name}: images of {len(shapes)} shapes, {shapes[0]} and {shapes[-1]}; size=N makes them one")
    if known and not size and shapes[0] != known.shape:
        raise UsageError(
            f"{name}: images of shape {shapes[0]}, those of {family} are {known.shape}; size=N resizes them"
        )
    chosen = torch.as_tensor(labels)[:taken].long()
    if int(chosen.min()) < 0 or int(chosen.max()) >= classes:
        wrong = int(chosen.min()) if int(chosen.min()) < 0 else int(chosen.max())
        raise UsageError(f"{name}: a label is {wrong}, {family} has {classes} classes, from 0")
    return Dataset(
        name, torch.stack(pixels), chosen, torch.tensor(ids or range(taken))[:taken],
        hashlib.sha256(order.encode()).hexdigest(),
        Form(family, shapes[0], classes),  # type: ignore[arg-type]
    )  # fmt: skip


def _pixels(
    name: str, contents: Sequence[Callable[[], bytes]], size: int, crop: int, channels: int | None
) -> Iterator[Tensor]:
    """uint8 images (C, H, W): decoded, cut to ``crop``, or resized to 8/7 size and cut to ``size``.

    Grey or coloured as ``channels`` says (ImageNet has grey images too), or as they are.
    """
    from PIL import Image
    from torchvision.transforms import functional as f

    for position, content in enumerate(contents):
        try:
            opened = Image.open(io.BytesIO(content()))
            if deep(opened):
                raise UsageError(f"{name}: image {position} has {opened.mode} pixels; convert it to 8 bits a channel")
            grey = channels == 1 or (channels is None and opened.mode in ("1", "L", "LA"))
            image = opened.convert("L" if grey else "RGB")
        except (OSError, TypeError, SyntaxError) as error:
            raise UsageError(f"{name}: image {position} can't be decoded: {error}") from error
        if crop:
            image = f.resize(f.center_crop(image, [crop, crop]), [size, size])
        elif size:
            image = f.center_crop(f.resize(image, [round(size * 8 / 7)]), [size, size])
        yield f.pil_to_tensor(image)


def deep(image: Any) -> bool:
    """Whether a Pillow image has more than 8 bits a channel, which a conversion would cut off, not scale."""
    return str(image.mode).startswith(("I", "F"))
