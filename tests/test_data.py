"""Data sets: the embedded excerpt is the real thing, splits are disjoint, and what is missing is said."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark import data, loaders
from benchmark.dataset import ASSETS
from benchmark.errors import UsageError

SYSTEM = Path("/usr/share/datasets/fashion-mnist")
needs_full = pytest.mark.skipif(
    not (SYSTEM / "train-images-idx3-ubyte.gz").exists(), reason=f"the full Fashion-MNIST isn't in {SYSTEM}"
)
EXCERPT = ASSETS / "fashion-mnist-test-1000.npz"


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> dict:
    """Arguments under which the full set is nowhere to be found."""
    monkeypatch.setattr(loaders, "SYSTEM", tmp_path / "system")
    return {"data_dir": str(tmp_path / "data"), "offline": True}


def test_the_excerpt_is_small_complete_and_needs_nothing_else(nowhere):
    assert EXCERPT.stat().st_size <= 600_000
    images = data.load("fashion-mnist", 1000, **nowhere)
    assert (images.name, images.shape, images.classes, len(images)) == ("fashion-mnist", (1, 28, 28), 10, 1000)
    assert images.labels.bincount().tolist() == [107, 105, 111, 93, 115, 87, 97, 95, 95, 95]
    x = images.images(slice(0, 10))
    assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert torch.equal((x * 255).round().to(torch.uint8), images.pixels[:10])


def test_the_licence_lies_beside_the_excerpt():
    notice = (ASSETS / "LICENSE-fashion-mnist").read_text()
    assert "MIT" in notice and "Zalando SE" in notice and "without restriction" in notice


@needs_full
def test_the_excerpt_is_the_start_of_the_full_set():
    excerpt, full = data.load("fashion-mnist", 1000), data.load("fashion-mnist", 1001)
    assert len(full) == 10_000
    assert torch.equal(excerpt.pixels, full.pixels[:1000]) and torch.equal(excerpt.labels, full.labels[:1000])
    assert torch.equal(excerpt.ids, full.ids[:1000])
    assert excerpt.fingerprint == full.fingerprint, "raising n beyond the excerpt extends the same run"


@needs_full
def test_the_files_hold_what_they_should_by_another_reader():
    with gzip.open(SYSTEM / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28)
    assert np.array_equal(data.load("fashion-mnist", 10_000).pixels[:, 0].numpy(), pixels)


@needs_full
def test_validation_is_cut_from_training_and_never_overlaps_it():
    parts = {split: data.load(f"fashion-mnist:split={split}") for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 55_000, "validation": 5_000, "test": 1_000}
    assert {part.name for part in parts.values()} == {
        "fashion-mnist", "fashion-mnist:split=train", "fashion-mnist:split=validation",
    }  # fmt: skip
    assert {part.family for part in parts.values()} == {"fashion-mnist"}
    assert not set(parts["train"].ids.tolist()) & set(parts["validation"].ids.tolist())
    train, validation = ({pixels.tobytes() for pixels in parts[s].pixels.numpy()} for s in ("train", "validation"))
    # the data set has a few duplicates of its own; an overlap of the splits would be 5,000
    assert len(train & validation) < 10
    assert torch.equal(parts["validation"].ids, torch.arange(55_000, 60_000))


@pytest.mark.parametrize("split, n", [("test", 1001), ("validation", 1), ("train", 1)])
def test_when_the_full_set_is_missing_both_ways_to_get_it_are_named(nowhere, split, n):
    with pytest.raises(UsageError) as error:
        data.load(f"fashion-mnist:split={split}", n, **nowhere)
    message = str(error.value)
    assert nowhere["data_dir"] in message and str(loaders.SYSTEM / "fashion-mnist") in message
    assert "apt install dataset-fashion-mnist" in message and "torchvision" in message and "--offline" in message


def test_a_failed_download_says_why_and_names_the_other_way(nowhere, monkeypatch):
    import torchvision

    def unreachable(*arguments, **keywords):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", unreachable)
    with pytest.raises(UsageError, match="Error downloading train-images.*apt install dataset-fashion-mnist"):
        data.load("fashion-mnist", 1001, data_dir=nowhere["data_dir"])


@needs_full
@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_files_in_the_data_folder_are_read_and_checked(nowhere, packed):
    folder = Path(nowhere["data_dir"]) / "FashionMNIST" / "raw"  # torchvision's place
    folder.mkdir(parents=True)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        if packed:
            shutil.copy(SYSTEM / f"{name}.gz", folder)
        else:
            (folder / name).write_bytes(gzip.decompress((SYSTEM / f"{name}.gz").read_bytes()))
    assert len(data.load("fashion-mnist", 2000, **nowhere)) == 10_000

    images = folder / ("t10k-images-idx3-ubyte.gz" if packed else "t10k-images-idx3-ubyte")
    raw = bytearray(gzip.decompress(images.read_bytes()) if packed else images.read_bytes())
    raw[-1] ^= 1
    images.write_bytes(gzip.compress(bytes(raw), 1) if packed else bytes(raw))
    with pytest.raises(UsageError, match=rf"t10k-\*: sha256 .* expected {loaders.FASHION_SHA256['t10k']}; delete"):
        data.load("fashion-mnist", 2000, **nowhere)


@needs_full
@pytest.mark.parametrize("spoil", ["truncated", "html", "no labels"])
def test_files_that_are_no_data_are_named(nowhere, spoil):
    folder = Path(nowhere["data_dir"])
    folder.mkdir(parents=True)
    images, labels = folder / "t10k-images-idx3-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz"
    shutil.copy(SYSTEM / images.name, images)
    if spoil != "no labels":
        shutil.copy(SYSTEM / labels.name, labels)
    if spoil == "truncated":
        images.write_bytes(images.read_bytes()[:100_000])
    if spoil == "html":
        images.write_bytes(b"<!doctype html><title>Quota exceeded</title>")
    with pytest.raises(UsageError, match=str(folder)):
        data.load("fashion-mnist", 2000, **nowhere)


@pytest.mark.parametrize("name", ["fashion-mnist:split=dev", "fashion-mnist:part=test", "fashion-mnist:split"])
def test_an_unknown_split_is_named(name):
    with pytest.raises(UsageError, match="split=(test, split=validation or split=train|validation)|known: split"):
        data.load(name)


def test_an_unknown_data_set_gives_the_nearest():
    with pytest.raises(UsageError, match="did you mean fashion-mnist"):
        data.load("fashion_mnits")


def test_first_takes_the_first_or_says_how_many_there_are():
    images = data.load("fashion_mnist")
    few = images.first(7)
    assert len(few) == 7 and torch.equal(few.pixels, images.pixels[:7]) and few.fingerprint == images.fingerprint
    with pytest.raises(UsageError, match="1,000 examples, --n-examples asked for 1,001"):
        images.first(1001)
