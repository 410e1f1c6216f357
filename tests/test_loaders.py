"""Data sets from files as their publishers lay them out: torchvision's, Parquet, folders. Stand-ins, real readers."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark import data, loaders
from benchmark.checkpoints import Need
from benchmark.dataset import ALL, FORMS, Form
from benchmark.errors import UsageError
from benchmark.purify import purify

RNG = np.random.default_rng(0)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar10(server, monkeypatch):
    """CIFAR-10's archive with 20 images a batch, served in the real layout, its md5 sums known to torchvision."""
    from torchvision.datasets import CIFAR10

    root, address = server
    batches, archive = {}, io.BytesIO()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = RNG.integers(0, 256, (20, 3072), dtype=np.uint8)
        batches[name] = pickle.dumps({"data": pixels, "labels": [int(v) for v in RNG.integers(0, 10, 20)]})
    batches["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in batches.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (root / "cifar-10-python.tar.gz").write_bytes(archive.getvalue())
    monkeypatch.setattr(CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive.getvalue()))
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5(batches[n])] for n in batches if n.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(batches["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(batches["batches.meta"])})
    monkeypatch.setattr(loaders, "VALIDATION", 30)
    return pickle.loads(batches["test_batch"])


def test_cifar10_is_downloaded_once_checked_and_split(cifar10, tmp_path):
    where = {"data_dir": str(tmp_path / "data")}
    test = data.load("cifar10", 20, **where)
    assert np.array_equal(test.pixels.numpy(), cifar10["data"].reshape(-1, 3, 32, 32))
    assert test.labels.tolist() == cifar10["labels"] and test.form == data.form("cifar10")
    assert (test.name, test.ids.tolist()) == ("cifar10", list(range(20)))
    again = data.load("cifar10", 20, offline=True, **where)
    assert again.fingerprint == test.fingerprint, "offline, from what the first download left"
    train, validation = (data.load(f"cifar10:split={s}", offline=True, **where) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (70, 30)
    assert validation.ids.tolist() == list(range(70, 100)) and validation.name == "cifar10:split=validation"
    assert len({test.fingerprint, train.fingerprint}) == 2 and train.fingerprint == validation.fingerprint


@pytest.mark.parametrize("offline", [True, False])
def test_without_cifar10_the_error_says_what_to_fetch_from_where_to_which_path(cifar10, tmp_path, monkeypatch, offline):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/gone.tar.gz")
    with pytest.raises(UsageError) as error:
        data.load("cifar10", data_dir=str(tmp_path / "data"), offline=offline)
    message = str(error.value)
    assert "http://127.0.0.1:9/gone.tar.gz" in message and str(tmp_path / "data" / CIFAR10.filename) in message
    assert CIFAR10.tgz_md5 in message and "--data-dir" in message
    assert ("--offline forbids" if offline else "the download failed") in message


def test_a_damaged_cifar10_is_refused_not_read(cifar10, tmp_path):
    where = {"data_dir": str(tmp_path / "data")}
    data.load("cifar10", **where)
    batch = tmp_path / "data" / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(batch.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="damaged"):
        data.load("cifar10", offline=True, **where)


def test_mnist_and_svhn_from_torchvisions_own_files(server, tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import MNIST, SVHN

    root, address = server
    digits, labels = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8), RNG.integers(0, 10, 12, dtype=np.uint8)
    resources = []
    for stem in ("train", "t10k"):
        for kind, array in (("images-idx3", digits), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = gzip.compress(header + array.tobytes())
            (root / f"{stem}-{kind}-ubyte.gz").write_bytes(content)
            resources.append((f"{stem}-{kind}-ubyte.gz", md5(content)))
    monkeypatch.setattr(MNIST, "mirrors", [f"{address}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    mnist = data.load("mnist", 12, data_dir=str(tmp_path))
    assert np.array_equal(mnist.pixels[:, 0].numpy(), digits) and mnist.labels.tolist() == labels.tolist()
    damaged = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes() + b"x")
    with pytest.raises(UsageError, match="its md5 isn't"):
        data.load("mnist", 12, data_dir=str(tmp_path), offline=True)

    houses = RNG.integers(0, 256, (32, 32, 3, 7), dtype=np.uint8)
    savemat(root / "test_32x32.mat", {"X": houses, "y": np.array([[10], [1], [2], [3], [4], [5], [6]], np.uint8)})
    content = (root / "test_32x32.mat").read_bytes()
    entry = [f"{address}/test_32x32.mat", "test_32x32.mat", md5(content)]
    monkeypatch.setattr(SVHN, "split_list", SVHN.split_list | {"test": entry})
    svhn = data.load("svhn", 7, data_dir=str(tmp_path))
    assert np.array_equal(svhn.pixels.numpy(), houses.transpose(3, 2, 0, 1))
    assert svhn.labels.tolist() == [0, 1, 2, 3, 4, 5, 6], "the digit 0 is stored as 10"


def test_celeba_by_attribute(tmp_path, monkeypatch):
    from torchvision.datasets import CelebA

    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 7)]
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (40 * i, 10, 200)).save(folder / "img_align_celeba" / name, quality=95)
    smiling = [1, -1, 1, 1, -1, 1]
    (folder / "list_attr_celeba.txt").write_text(
        "6\nEyeglasses Smiling \n" + "".join(f"{n} -1 {s}\n" for n, s in zip(names, smiling, strict=True))
    )
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {2 * (i >= 2)}\n" for i, n in enumerate(names)))
    (folder / "identity_CelebA.txt").write_text("".join(f"{n} 1\n" for n in names))
    for file in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        (folder / file).write_text("6\na b \n" + "".join(f"{n} 1 2\n" for n in names))
    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: True)  # the real md5 sums are of 1.4 GB
    faces = data.load("celeba", 4, data_dir=str(tmp_path), offline=True)
    assert (faces.shape, faces.classes, faces.labels.tolist()) == ((3, 64, 64), 2, [1, 1, 0, 1])
    assert (faces.pixels[1].float().mean((1, 2)) - torch.tensor([120.0, 10, 200])).abs().max() < 3
    glasses = data.load("celeba:attribute=Eyeglasses,size=32", data_dir=str(tmp_path), offline=True)
    assert glasses.labels.tolist() == [0, 0, 0, 0] and glasses.shape == (3, 32, 32)
    assert glasses.name == "celeba:attribute=Eyeglasses,size=32" and glasses.fingerprint == faces.fingerprint
    with pytest.raises(UsageError, match="did you mean Smiling"):
        data.load("celeba:attribute=Smiles", data_dir=str(tmp_path), offline=True)


# --- Parquet


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path: Path, pixels: np.ndarray, image: str = "img", label: str = "label", **columns) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {image: [{"bytes": png(p), "path": None} for p in pixels], label: [i % 10 for i in range(len(pixels))]}
    pyarrow.parquet.write_table(pyarrow.table(rows | columns), path)
    return path


PIXELS = RNG.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)


def test_parquet_in_the_hubs_layout(tmp_path):
    path = write(tmp_path / "cifar10" / "plain_text" / "test-00000-of-00001.parquet", PIXELS)
    write(tmp_path / "cifar10" / "plain_text" / "train-00000-of-00001.parquet", PIXELS[:5])
    by_file, by_folder = data.load(f"parquet:{path}", 40), data.load(f"parquet:{tmp_path / 'cifar10'}", 40)
    for read in (by_file, by_folder):
        assert read.form == Form("cifar10", (3, 32, 32), 10), "the path says which data set this is"
        assert len(read) == 64, "at least as many as asked for, in whole blocks of 32"
        assert np.array_equal(read.pixels.permute(0, 2, 3, 1).numpy(), PIXELS[:64])
        assert read.labels.tolist() == [i % 10 for i in range(64)] and read.ids.tolist() == list(range(64))
    assert by_file.name == "parquet:test-00000-of-00001.parquet,family=cifar10"
    assert data.load(f"parquet:{path}", 70).fingerprint == by_file.fingerprint, "raising n extends the same run"
    assert len(data.load(f"parquet:{tmp_path / 'cifar10'},split=train")) == 5


def test_a_folder_without_files_of_validation_cuts_it_off_its_training_rows(tmp_path):
    folder, exact = tmp_path / "cifar10", [i % 3 == 0 for i in range(70)]
    write(folder / "train-0.parquet", PIXELS, exact=exact)

    def ids(options: str) -> list[int]:
        return data.load(f"parquet:{folder},{options}", ALL).ids.tolist()

    assert ids("split=validation") == list(range(9, 70, 10))
    assert sorted(ids("split=validation") + ids("split=train")) == list(range(70))
    for split in ("train", "validation"):
        assert ids(f"split={split},only=exact") == [i for i in ids(f"split={split}") if exact[i]]
    write(folder / "validation-0.parquet", PIXELS[:5], exact=exact[:5])
    assert ids("split=train") == list(range(70)) and ids("split=validation") == list(range(5))


def test_parquet_rows_by_a_column_keep_their_ids(tmp_path):
    path = write(tmp_path / "x.parquet", PIXELS, exact=[i % 3 == 0 for i in range(70)])
    read = data.load(f"parquet:{path},only=exact,family=cifar10", 20)
    assert read.ids.tolist() == list(range(0, 70, 3))[:32] and read.name.endswith("family=cifar10,only=exact")
    assert np.array_equal(read.pixels.permute(0, 2, 3, 1).numpy(), PIXELS[::3])
    assert read.fingerprint != data.load(f"parquet:{path},family=cifar10", 20).fingerprint


def test_parquet_with_other_columns_and_bare_bytes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "y.parquet"
    rows = {"image": [png(p[:, :, 0]) for p in PIXELS[:4]], "fine": [3, 1, 2, 0]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    read = data.load(f"parquet:{path},label=fine")
    assert read.form == Form("images", (1, 32, 32), 4) and read.labels.tolist() == [3, 1, 2, 0]
    with pytest.raises(UsageError, match=r"no column 'label'; it has image, fine \(label=NAME"):
        data.load(f"parquet:{path}")
    with pytest.raises(UsageError, match="no column 'exact'"):
        data.load(f"parquet:{path},label=fine,only=exact")


def test_parquet_that_is_none_or_not_there(tmp_path):
    (tmp_path / "z.parquet").write_text("<html>")
    with pytest.raises(UsageError, match="isn't a Parquet file"):
        data.load(f"parquet:{tmp_path / 'z.parquet'}")
    with pytest.raises(UsageError, match="no such file or folder"):
        data.load("parquet:/nowhere.parquet")
    with pytest.raises(UsageError, match="no file of the split 'train' among z.parquet"):
        data.load(f"parquet:{tmp_path},split=train")
    with pytest.raises(UsageError, match="write parquet:PATH"):
        data.load("parquet")
    path = write(tmp_path / "w.parquet", PIXELS[:3])
    with pytest.raises(UsageError, match="did you mean cifar10"):
        data.load(f"parquet:{path},family=cifar")


def test_parquet_labels_must_fit_the_family(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "cifar10.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"img": [png(PIXELS[0])], "label": [10]}), path)
    with pytest.raises(UsageError, match="a label is 10, cifar10 has 10 classes"):
        data.load(f"parquet:{path}")


def test_without_pyarrow_the_error_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        data.load(f"parquet:{tmp_path}")


# --- folders


def folders(root: Path, kinds: list[str], each: int = 4, size: tuple[int, int] = (9, 9)) -> None:
    for kind in kinds:
        (root / kind).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / kind / f"{kind}_{i}.png")


def test_a_folder_per_class_in_one_fixed_mixed_order(tmp_path):
    folders(tmp_path / "pets" / "test", ["cat", "ant", "dog"], each=30)
    read = data.load(f"folder:{tmp_path / 'pets'}", 60)
    assert read.form == Form("images", (3, 9, 9), 3) and len(read) == 64
    assert read.labels.bincount().min() > 10, "the first n are a sample of all classes"
    again = data.load(f"folder:{tmp_path / 'pets' / 'test'}", 90)
    assert again.fingerprint == read.fingerprint and torch.equal(again.pixels[:64], read.pixels)
    (tmp_path / "pets" / "test" / "ant" / "ant_0.png").unlink()
    assert data.load(f"folder:{tmp_path / 'pets'}").fingerprint != read.fingerprint


def test_a_folder_of_images_of_several_sizes_asks_for_one(tmp_path):
    folders(tmp_path / "a", ["x"], size=(9, 12))
    folders(tmp_path / "a", ["y"], size=(20, 9))
    with pytest.raises(UsageError, match=r"size=N makes them one"):
        data.load(f"folder:{tmp_path / 'a'}", 8)
    assert data.load(f"folder:{tmp_path / 'a'},size=7", 8).shape == (3, 7, 7)


def test_hidden_folders_are_no_classes_and_images_may_be_of_no_known_family(tmp_path):
    folders(tmp_path / "imagenet" / "mine", ["cat", "dog"])
    (tmp_path / "imagenet" / "mine" / ".ipynb_checkpoints").mkdir()
    read = data.load(f"folder:{tmp_path / 'imagenet' / 'mine'},family=images", 8)
    assert read.form == Form("images", (3, 9, 9), 2) and sorted(read.labels.tolist()) == [0] * 4 + [1] * 4


def test_images_of_more_than_eight_bits_are_refused(tmp_path):
    folders(tmp_path / "a", ["x"], each=1)
    deep = tmp_path / "a" / "x" / "deep.png"
    Image.fromarray(np.linspace(0, 65535, 81).astype(np.uint16).reshape(9, 9)).save(deep)
    with pytest.raises(UsageError, match="has I;16 pixels; convert it to 8 bits a channel"):
        data.load(f"folder:{tmp_path / 'a'}", 2)
    with pytest.raises(UsageError, match="has I;16 pixels; convert it to 8 bits a channel"):
        purify(deep, tmp_path / "out.png", "identity", Need(Form("images", (3, 9, 9), 2)), resize=True, seed=0)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="no such folder; expected .*/CLASS/"):
        data.load(f"folder:{tmp_path / 'gone'}")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(UsageError, match="no images in"):
        data.load(f"folder:{tmp_path / 'empty'}")
    folders(tmp_path / "cifar10", ["cat", "dog"])
    with pytest.raises(UsageError, match="2 class folders, cifar10 has 10 classes"):
        data.load(f"folder:{tmp_path / 'cifar10'}")
    folders(tmp_path / "bad", ["cat"], each=1)
    (tmp_path / "bad" / "cat" / "broken.jpg").write_bytes(b"<html>")
    with pytest.raises(UsageError, match="can't be decoded"):
        data.load(f"folder:{tmp_path / 'bad'}", 8)


def test_imagenet_in_torchvisions_layout_is_resized_and_cut(tmp_path):
    kinds = [f"n{i:08d}" for i in range(1000)]
    for kind in kinds:
        (tmp_path / "imagenet" / "val" / kind).mkdir(parents=True)
    picture = np.zeros((300, 400, 3), np.uint8)
    picture[:, 200:] = 255
    for kind in (kinds[7], kinds[600]):
        Image.fromarray(picture).save(tmp_path / "imagenet" / "val" / kind / f"{kind}.JPEG", quality=95)
    read = data.load("imagenet", 2, data_dir=str(tmp_path), offline=True)
    assert read.form == data.form("imagenet") == Form("imagenet", (3, 224, 224), 1000)
    assert sorted(read.labels.tolist()) == [7, 600]
    columns = read.pixels[0, 0, 100].float()
    assert columns[:100].max() < 10 and columns[125:].min() > 245, "300×400 → 256×341 → the central 224×224"
    assert data.load("imagenet:size=64", data_dir=str(tmp_path), offline=True).shape == (3, 64, 64)
    (tmp_path / "imagenet" / "val" / kinds[0]).rmdir()
    with pytest.raises(UsageError, match="999 class folders, imagenet has 1,000"):
        data.load("imagenet", data_dir=str(tmp_path), offline=True)


def test_grey_images_among_coloured_ones_take_the_data_sets_channels(tmp_path):
    """ImageNet's validation set has grey JPEGs."""
    for i, mode in enumerate(("L", "RGB", "CMYK")):
        folder = tmp_path / "imagenet" / "val" / f"n{i:08d}"
        folder.mkdir(parents=True)
        Image.new(mode, (300, 260)).save(folder / "a.JPEG")
    for i in range(3, 1000):
        (tmp_path / "imagenet" / "val" / f"n{i:08d}").mkdir()
    assert data.load("imagenet", 3, data_dir=str(tmp_path), offline=True).pixels.shape == (3, 3, 224, 224)
    mixed = tmp_path / "mixed" / "a"
    mixed.mkdir(parents=True)
    Image.new("L", (9, 9), 77).save(mixed / "grey.png")
    Image.new("RGB", (9, 9), (1, 2, 3)).save(mixed / "colour.png")
    pixels = data.load(f"folder:{tmp_path / 'mixed'}", 2).pixels
    assert sorted(p[:, 0, 0].tolist() for p in pixels) == [[1, 2, 3], [77, 77, 77]]


def test_images_that_do_not_fit_their_family_are_named(tmp_path):
    path = write(tmp_path / "fashion-mnist.parquet", PIXELS[:3])
    with pytest.raises(UsageError, match=r"shape \(1, 32, 32\), those of fashion-mnist are \(1, 28, 28\); size=N"):
        data.load(f"parquet:{path}")


def test_no_split_is_taken_for_another(tmp_path):
    path = write(tmp_path / "pets" / "validation-0.parquet", PIXELS[:3])
    with pytest.raises(UsageError, match="a file has no splits"):
        data.load(f"parquet:{path},split=train")
    with pytest.raises(UsageError, match="no file of the split 'test' among validation-0.parquet; split=NAME"):
        data.load(f"parquet:{tmp_path / 'pets'}")
    assert len(data.load(f"parquet:{tmp_path / 'pets'},split=validation")) == 3
    folders(tmp_path / "flat", ["a"])
    with pytest.raises(UsageError, match="no folder .*/train for split=train"):
        data.load(f"folder:{tmp_path / 'flat'},split=train")


@pytest.mark.parametrize("column, values, message", [
    ("label", ["a", "b"], "labels are integers"), ("label", [1.5, 2.0], "labels are integers"),
    ("label", [1, None], "1 rows have no 'label'"), ("exact", ["false", "true"], "only=COLUMN names booleans"),
    ("img", [[1, 2], [3]], "holds no bytes of an image"),
])  # fmt: skip
def test_parquet_columns_of_another_type_are_named(tmp_path, column, values, message):
    import pyarrow
    import pyarrow.parquet

    rows = {"img": [png(p) for p in PIXELS[:2]], "label": [0, 1], "exact": [True, False]} | {column: values}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=message):
        data.load(f"parquet:{tmp_path / 'x.parquet'},only=exact")


def test_too_few_training_images_give_no_validation_split(cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "VALIDATION", 100)
    with pytest.raises(UsageError, match="100 training images: too few"):
        data.load("cifar10:split=validation", data_dir=str(tmp_path / "data"))


def test_the_contents_of_a_folder_are_part_of_its_identity(tmp_path):
    folder = tmp_path / "a" / "x"
    folder.mkdir(parents=True)
    Image.new("L", (4, 4), 0).save(folder / "i.bmp")
    before = data.load(f"folder:{tmp_path / 'a'}").fingerprint
    Image.new("L", (4, 4), 255).save(folder / "i.bmp")  # as many bytes
    assert data.load(f"folder:{tmp_path / 'a'}").fingerprint != before


def test_without_imagenet_the_error_says_where_it_goes(tmp_path):
    with pytest.raises(UsageError, match="--data-dir FOLDER with FOLDER/imagenet/val/n01440764"):
        data.load("imagenet", data_dir=str(tmp_path))
    with pytest.raises(UsageError, match="split=test .* and split=train"):
        data.load("imagenet:split=validation", data_dir=str(tmp_path))


def test_every_named_data_set_has_a_form_without_being_there():
    for name, form in FORMS.items():
        assert data.form(name, offline=True) == form and form.family == name
        assert data.reader(name).__doc__
