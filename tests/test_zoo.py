"""Classifiers of other packages, from files in their publishers' layout: real architectures, stand-in weights."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import pytest
import torch

from benchmark import checkpoints, cli, data, fetch, loaders, zoo
from benchmark.checkpoints import Need
from benchmark.errors import RunError, UsageError
from benchmark.fetch import Remote, obtain, sha256

CIFAR10, IMAGENET = data.form("cifar10"), data.form("imagenet")
pytest.importorskip("robustbench", reason="an extra; `make` installs it")


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No models folder and no caches but those of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))


def architecture(name: str, dataset: str = "cifar10", threat: str = "Linf") -> torch.nn.Module:
    with zoo._quiet():
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
        from robustbench.model_zoo.models import model_dicts

        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat)][name]["model"]()


@pytest.fixture(scope="module")
def wide_resnet(tmp_path_factory) -> Path:
    """A folder in RobustBench's layout with a WRN-28-10 of random weights, by the name of its standard model."""
    root = tmp_path_factory.mktemp("weights")
    (root / "cifar10" / "Linf").mkdir(parents=True)
    torch.save(architecture("Standard").state_dict(), root / "cifar10" / "Linf" / "Standard.pt")
    return root


def small(root: Path, name: str = "Sehwag2021Proxy_R18", content: object = None) -> Path:
    """One of the smaller models' files (a ResNet-18), as its publisher nests it, or something else in its place."""
    path = root / "cifar10" / "Linf" / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        state = {f"module.{key}": value for key, value in architecture(name).state_dict().items()}
        content = {"state_dict": state}
    torch.save(content, path)
    return path


# --- RobustBench


def test_the_shipped_figures_cover_the_whole_zoo():
    with zoo._quiet():
        from robustbench.model_zoo.models import model_dicts
    installed = {(d.value, t.value, m) for d, ts in model_dicts.items() for t, ms in ts.items() for m in ms}
    figures = zoo.leaderboard()
    assert len(installed) > 200 and installed <= set(figures)
    assert all(40 < f["clean"] < 100 and 0 <= f["robust"] < f["clean"] for f in figures.values())
    known = figures["cifar10", "Linf", "Standard"], figures["cifar10", "L2", "Rice2020Overfitting"]
    assert [(f["clean"], f["robust"]) for f in known] == [(94.78, 0.0), (88.67, 67.68)]


def test_every_model_of_the_zoo_says_which_files_it_needs():
    for (dataset, threat, name), _ in zoo.leaderboard().items():
        model = zoo.robustbench(name, data.form(dataset), [], threat=threat)
        assert all(remote.url.startswith("https://") for remote in model.files), name
        if model.files and threat in ("Linf", "L2") and "drive.google" in model.files[0].url:
            first = model.files[0].path
            assert first.parent.name == threat and first.parent.parent.name == dataset
            assert first.name in (f"{name}.pt", f"{name}.pt_m0.pt"), "RobustBench's own layout"
    ensemble = zoo.robustbench("Chen2020Adversarial", CIFAR10, []).files
    assert [r.path.name for r in ensemble] == [f"Chen2020Adversarial.pt_m{i}.pt" for i in range(3)]


@pytest.mark.slow
def test_a_wide_resnet_loads_by_name_and_is_refused_for_its_accuracy(wide_resnet, tmp_path, capsys):
    """The whole command, on images of CIFAR-10's form; random weights read about a tenth."""
    torch.manual_seed(0)
    from tests.test_loaders import PIXELS, write

    path = write(tmp_path / "cifar10" / "test.parquet", PIXELS)
    command = ["run", "--dataset", f"parquet:{path}", "--classifier", "robustbench:Standard", "--purifier", "identity",
               "--attack", "pgd:steps=1", "--n-examples", "2", "--weights", str(wide_resnet), "--out", "out",
               "--offline"]  # fmt: skip
    assert cli.main(command) == cli.FAILED
    message = capsys.readouterr().err
    assert "clean-accuracy" in message and "stated accuracy of 94.8%" in message and "nothing was run" in message
    assert cli.main([*command, "--no-preflight"]) == cli.DONE
    assert "[no preflight]" in capsys.readouterr().out


def test_a_model_loads_by_name_from_robustbenchs_layout(tmp_path):
    path = small(tmp_path / "w")
    built = checkpoints.build("classifiers", "robustbench:Sehwag2021Proxy_R18", Need(CIFAR10, roots=(tmp_path / "w",)))
    assert str(built.spec) == "robustbench:Sehwag2021Proxy_R18,threat=Linf" and built.accuracy == 0.8459
    assert built.weights == {"file0": sha256(path)}
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(built.module(x), architecture("Sehwag2021Proxy_R18").eval()(x))
    assert not built.module.training and not any(p.requires_grad for p in built.module.parameters())


def test_the_usual_folders_are_looked_into_too(tmp_path):
    small(tmp_path / "models")  # RobustBench's own default: ./models
    assert checkpoints.build("classifiers", "robustbench:Sehwag2021Proxy_R18", Need(CIFAR10, offline=True))


def test_the_threat_model_is_the_runs_unless_the_spec_says_otherwise():
    need = Need(CIFAR10, norm="L2", offline=True)
    for spec, threat in (("robustbench:Rice2020Overfitting", "L2"),
                         ("robustbench:Rice2020Overfitting,threat=Linf", "Linf")):  # fmt: skip
        with pytest.raises(UsageError, match=f"cifar10/{threat}/Rice2020Overfitting.pt is missing"):
            checkpoints.build("classifiers", spec, need)


def test_a_missing_model_names_address_and_path(tmp_path):
    with pytest.raises(UsageError) as error:
        checkpoints.build("classifiers", "robustbench:Carmon2019Unlabeled", Need(CIFAR10, offline=True))
    message = str(error.value)
    assert "https://drive.google.com/uc?id=15tUx-gkZMYx7BfEOw1GY5OKC-jECIsPQ" in message and "--offline" in message
    assert str(tmp_path / "cache" / "purification-benchmark" / "models" / "cifar10" / "Linf") in message


@pytest.mark.parametrize("name, text", [
    ("robustbench:Carmon2019Unlabled", "did you mean Carmon2019Unlabeled"),
    ("robustbench:Carmon2019Unlabeled,threat=L1", "RobustBench has no models for cifar10, L1; it has: cifar10 Linf"),
    ("robustbench:Carmon2019Unlabeled,threat=L2", "is for Linf: robustbench:Carmon2019Unlabeled,threat=Linf"),
    ("robustbench", "write robustbench:NAME"),
    ("robustbench:Standard,eps=1", "unknown option 'eps'"),
    ("torchvision:resnet50", "1,000 classes of colour images, cifar10 has 10 classes"),
    ("torchvision:resnet5", "did you mean resnet50"),
    ("timm:resnet50.a1_in", "did you mean resnet50.a1_in1k"),
])  # fmt: skip
def test_names_that_do_not_fit(name, text):
    with pytest.raises(UsageError, match=text):
        checkpoints.build("classifiers", name, Need(CIFAR10, offline=True))


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><title>Quota</title>", b"\n <HTML>", b"<?xml version='1.0'?>"])
def test_a_web_page_in_place_of_a_checkpoint_is_recognised(tmp_path, page):
    path = small(tmp_path)
    path.write_bytes(page)
    with pytest.raises(UsageError, match=r"is a web page, not a checkpoint .*delete it(.|\n)*drive.google.com.* → "):
        checkpoints.build("classifiers", "robustbench:Sehwag2021Proxy_R18", Need(CIFAR10, roots=(tmp_path,)))


@pytest.mark.parametrize("damage", ["truncated", "text", "other network"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = small(tmp_path, content={"state_dict": {"w": torch.zeros(3)}} if damage == "other network" else None)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    if damage == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UsageError, match="doesn't fit the network, or is damaged|isn't a checkpoint"):
        checkpoints.build("classifiers", "robustbench:Sehwag2021Proxy_R18", Need(CIFAR10, roots=(tmp_path,)))


class Payload:
    """What a malicious pickle does on loading."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_no_pickle_executes_code_unasked(tmp_path):
    mark = tmp_path / "executed"
    content = {"state_dict": architecture("Sehwag2021Proxy_R18").state_dict(), "extra": Payload(str(mark))}
    path = small(tmp_path / "w", content=content)
    need = Need(CIFAR10, roots=(tmp_path / "w",))
    with pytest.raises(UsageError, match=r"would execute code from the file.*--trust-checkpoint") as error:
        checkpoints.build("classifiers", "robustbench:Sehwag2021Proxy_R18", need)
    assert not mark.exists() and "mkdir" in str(error.value) and str(path) in str(error.value)
    trusting = Need(CIFAR10, roots=(tmp_path / "w",), trust=True)
    assert checkpoints.build("classifiers", "robustbench:Sehwag2021Proxy_R18", trusting)
    assert mark.exists(), "asked to, it does"
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_setting_of_the_shell_does_not_undo_safe_loading(tmp_path, monkeypatch):
    mark = tmp_path / "executed"
    content = {"state_dict": architecture("Sehwag2021Proxy_R18").state_dict(), "extra": Payload(str(mark))}
    small(tmp_path / "w", content=content)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UsageError, match="--trust-checkpoint"):
        checkpoints.build("classifiers", "robustbench:Sehwag2021Proxy_R18", Need(CIFAR10, roots=(tmp_path / "w",)))
    assert not mark.exists() and os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


# --- timm and torchvision, for ImageNet


def test_a_torchvision_model_resizes_and_normalises_inside(tmp_path):
    from torchvision import models

    weights = models.get_model_weights("squeezenet1_1")["DEFAULT"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.squeezenet1_1(weights=None).eval()
    path = tmp_path / "imagenet" / "torchvision" / weights.url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.save(net.state_dict(), path)
    need = Need(IMAGENET, roots=(tmp_path,), offline=True)
    with pytest.raises(UsageError, match=r"sha256 is [0-9a-f]{64}, expected b8a52dc0"):
        checkpoints.build("classifiers", "torchvision:squeezenet1_1", need)
    model = zoo.torchvision("squeezenet1_1", IMAGENET, [tmp_path])
    assert model.accuracy == pytest.approx(0.58178)
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)).requires_grad_()
    transform = weights.transforms()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transform.mean, transform.std))
    assert torch.equal(model.build().eval()(x), net((x - mean) / std))
    small_images = torch.rand(1, 3, 64, 64, requires_grad=True)
    logits = model.build().eval()(small_images)
    assert logits.shape == (1, 1000)
    assert torch.autograd.grad(logits.square().sum(), small_images)[0].abs().min() > 0


def test_a_timm_model_from_a_file(tmp_path):
    import timm
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model("lcnet_050.ra2_in1k").eval()
    path = tmp_path / "imagenet" / "timm" / "lcnet_050.ra2_in1k.safetensors"
    path.parent.mkdir(parents=True)
    save_file(net.state_dict(), path)
    built = checkpoints.build("classifiers", "timm:lcnet_050.ra2_in1k", Need(IMAGENET, roots=(tmp_path,), offline=True))
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (net.default_cfg["mean"], net.default_cfg["std"]))
    assert torch.allclose(built.module(x), net((x - mean) / std))
    assert built.weights == {"file0": sha256(path)}


def test_timms_own_pickle_readers_are_not_used(tmp_path):
    """Models with a loader of their own in timm (augreg's read numpy archives) load from safetensors too."""
    import timm
    from safetensors.torch import save_file

    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with torch.random.fork_rng():
        net = timm.create_model(name).eval()
    (remote,) = zoo.timm(name, IMAGENET, [tmp_path]).files
    remote.path.parent.mkdir(parents=True)
    save_file(net.state_dict(), remote.path)
    need = Need(IMAGENET, roots=(tmp_path,), offline=True)
    built = checkpoints.build("classifiers", f"timm:{name}", need)
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(built.module(x), net((x - 0.5) / 0.5), atol=1e-5)
    remote.path.write_bytes(remote.path.read_bytes()[:500])
    with pytest.raises(UsageError, match="doesn't fit the network, or is damaged"):
        checkpoints.build("classifiers", f"timm:{name}", need)


def test_the_hubs_address_is_a_setting(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    (remote,) = zoo.timm("lcnet_050.ra2_in1k", IMAGENET, []).files
    assert remote.url == "https://mirror.example/timm/lcnet_050.ra2_in1k/resolve/main/model.safetensors"


# --- fetching


def test_a_file_is_fetched_once_checked_and_renamed_into_place(server, tmp_path):
    root, address = server
    (root / "net.pt").write_bytes(b"weights")
    digest = sha256(root / "net.pt")
    remote = Remote(tmp_path / "there" / "net.pt", f"{address}/net.pt", digest[:8], 7)
    assert obtain(remote, offline=False).read_bytes() == b"weights"
    (root / "net.pt").unlink()
    assert obtain(remote, offline=True).read_bytes() == b"weights"
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["net.pt"]


@pytest.mark.parametrize("served, text", [
    (b"<!doctype html>quota", "is a web page"), (b"other", "sha256 is .* expected 00000000"), (None, "404"),
])  # fmt: skip
def test_what_is_not_the_file_is_not_kept(server, tmp_path, served, text):
    root, address = server
    if served is not None:
        (root / "net.pt").write_bytes(served)
    remote = Remote(tmp_path / "there" / "net.pt", f"{address}/net.pt", "00000000", 7)
    with pytest.raises(RunError, match=text) as error:
        obtain(remote, offline=False)
    assert f"{address}/net.pt → {remote.path}" in str(error.value)
    assert not list((tmp_path / "there").iterdir())


def test_the_fetch_command_brings_and_lists(server, tmp_path, monkeypatch, capsys):
    root, address = server
    model = small(tmp_path / "made")
    (root / "model.pt").write_bytes(model.read_bytes())
    original = zoo.ZOOS["robustbench"]

    def local(name, form, roots, *, threat: str = "Linf"):
        found = original(name, form, roots, threat=threat)
        return found._replace(files=[Remote(found.files[0].path, f"{address}/model.pt")])

    monkeypatch.setitem(zoo.ZOOS, "robustbench", local)
    from tests.test_loaders import PIXELS, write

    path = write(tmp_path / "cifar10" / "test.parquet", PIXELS)
    command = ["fetch", "robustbench:Sehwag2021Proxy_R18", "--dataset", f"parquet:{path}", "--weights", "w"]
    Path("w").mkdir()
    assert cli.main([*command, "--list"]) == cli.DONE
    assert f"{address}/model.pt → w/cifar10/Linf/Sehwag2021Proxy_R18.pt" in capsys.readouterr().out
    assert not list(Path("w").rglob("*.pt"))
    assert cli.main([*command, "--offline"]) == cli.USAGE
    assert cli.main(command) == cli.DONE
    assert sha256(model) in capsys.readouterr().out
    assert sha256(Path("w/cifar10/Linf/Sehwag2021Proxy_R18.pt")) == sha256(model)
    assert cli.main(["fetch", "resnett"]) == cli.USAGE
    assert "did you mean resnet" in capsys.readouterr().err
    assert cli.main(["fetch", "file:/nope.py:X"]) == cli.USAGE
    assert "/nope.py is no file" in capsys.readouterr().err


def test_offline_opens_no_socket(capsys, tmp_path, monkeypatch):
    """Audited by the interpreter itself: neither our code nor a library opens one."""
    with fetch.network(allowed=False):
        with pytest.raises(OSError, match="--offline"):
            socket.socket()
        for resolve in (lambda: socket.getaddrinfo("localhost", 80), lambda: socket.gethostbyname("localhost")):
            with pytest.raises(OSError, match="--offline"):
                resolve()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    socket.socket().close()
    command = ["run", "--purifier", "identity", "--attack", "pgd:steps=1", "--n-examples", "2", "--offline",
               "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(command) == cli.DONE

    def careless(request, *, split: str = "test"):
        socket.create_connection(("localhost", 80))

    monkeypatch.setitem(loaders.LOADERS, "careless", careless)
    assert cli.main([*command, "--dataset", "careless"]) == cli.USAGE
    assert "--offline: the network is off limits" in capsys.readouterr().err
    assert cli.main([*command, "--dataset", "cifar10"]) == cli.USAGE
    assert "--offline forbids the download" in capsys.readouterr().err


def test_listing_shows_the_zoo(capsys):
    import json

    assert cli.main(["list", "classifiers", "--dataset", "cifar10", "--json"]) == cli.DONE
    entries = {e["name"]: e for e in json.loads(capsys.readouterr().out)}
    assert "cifar10-resnet18" in entries and entries["robustbench:Carmon2019Unlabeled"]["clean"] == 89.69
    assert "robustbench:Rice2020Overfitting,threat=L2" in entries
    assert cli.main(["list", "classifiers", "--dataset", "imagenet"]) == cli.DONE
    assert "torchvision:resnet50 " in capsys.readouterr().out
    assert cli.main(["list", "classifiers", "--dataset", "svhn"]) == cli.DONE, "none, and no trace"
    assert "no classifiers with weights for svhn" in capsys.readouterr().err
    assert cli.main(["list", "classifiers", "--dataset", "cifar"]) == cli.USAGE
    assert "did you mean cifar10" in capsys.readouterr().err


def test_without_weights_the_remedy_is_one_that_works(capsys):
    assert cli.main(["plan", "--dataset", "cifar10", "--offline"]) == cli.USAGE
    with pytest.raises(UsageError, match=r"no weights for diffpure on svhn; there is no recipe .* identity"):
        checkpoints.build("purifiers", "diffpure", Need(data.form("svhn")))
    with pytest.raises(
        UsageError, match=r"for diffpure on cifar10; take diffpure-compact, or train .* --dataset cifar10"
    ):
        checkpoints.build("purifiers", "diffpure", Need(data.form("cifar10")))
    with pytest.raises(UsageError, match=r"for resnet18 on cifar10; train them: "):
        checkpoints.build("classifiers", "resnet18", Need(data.form("cifar10")))
    with pytest.raises(UsageError, match=r"no weights for resnet18 on fashion-mnist; .* resnet, resnet-at"):
        checkpoints.build("classifiers", "resnet18", Need(data.form("fashion-mnist")))


@pytest.mark.parametrize("text, message", [
    ("def Mine(:", "can't be imported: SyntaxError"),
    ("import nothing_of_the_kind", "can't be imported: ModuleNotFoundError.*mine.py:1"),
    ("def Mine(): raise KeyError('x')", "raised KeyError: 'x'.*mine.py:1"),
    ("def Mine(path): ...", "raised TypeError"),
    ("def Mine(): return None", "returned NoneType, not a torch.nn.Module"),
])  # fmt: skip
def test_somebodys_file_that_does_not_run_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UsageError, match=message):
        checkpoints.build("classifiers", f"file:{tmp_path / 'mine.py'}:Mine", Need(CIFAR10))
    with pytest.raises(UsageError, match="a file is written file:mine.py:Class"):
        checkpoints.build("purifiers", "mine.py:Mine", Need(CIFAR10))


def test_the_bundled_resnet18_is_loaded_from_its_package():
    built = checkpoints.build("classifiers", "cifar10-resnet18", Need(CIFAR10))
    assert sum(p.numel() for p in built.module.parameters()) == 11_173_962 and built.accuracy == 0.940898
    from pyautoattack.examples.resnet import ResNet18

    theirs = ResNet18().eval()
    state = checkpoints._in_package("pyautoattack", "examples/model_test.pt")
    theirs.load_state_dict(torch.load(state, map_location="cpu"))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(built.module(x), theirs(x), atol=1e-5)


def test_pickles_name_is_found_in_torchs_message(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": Payload("x")}, path)
    with pytest.raises(pickle.UnpicklingError) as error:
        torch.load(path)
    assert "mkdir" in zoo._wanted(str(error.value))
