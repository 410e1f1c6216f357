"""Models of other packages and places: RobustBench's model zoo, timm and torchvision by name; where their files lie."""

from __future__ import annotations

import csv
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import nn

from benchmark import data
from benchmark.dataset import ASSETS, Form
from benchmark.errors import UsageError, unknown
from benchmark.fetch import Remote
from classifiers._pretrained import Pretrained


class Model(NamedTuple):
    """A classifier of a zoo: the files it needs, how to build it once they are there, and what it should read.

    ``accuracy`` is the publisher's clean accuracy, a fraction, or None if there is none.
    """

    files: list[Remote]
    build: Callable[[], nn.Module]
    accuracy: float | None


def folders(roots: list[Path]) -> list[Path]:
    """Where models are looked for: --weights, RobustBench's own default, the cache."""
    return [*roots, Path("models"), data.cache_dir() / "models"]


def place(relative: Path, roots: list[Path], hub: tuple[str, str] | None = None) -> Path:
    """Where a model's file lies, or where its download would go: to the first root, or to the cache.

    Args:
        relative: its place in a folder of models.
        roots: folders to look in before the usual ones.
        hub: the repository and the name that it has on the hub, whose cache may hold it.
    """
    near = next((r / relative for r in folders(roots) if (r / relative).is_file()), None)
    return near or (hub and _cached(*hub)) or (roots[0] if roots else folders([])[-1]) / relative


def on_hub(repository: str, file: str, revision: str = "main") -> str:
    """The address of a file of a hub's repository; HF_ENDPOINT names another hub."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{hub}/{repository}/resolve/{revision}/{file}"


# --- RobustBench -------------------------------------------------------------------------------------------------


def robustbench(name: str, form: Form, roots: list[Path], *, threat: str = "Linf") -> Model:
    """A model of RobustBench (Croce et al. 2021, arXiv 2010.09670), from ``FOLDER/DATASET/THREAT/NAME.pt`` or Drive.

    Args:
        name: the model's ID on the leaderboard.
        form: the images and classes that it has to fit.
        roots: folders to look in before the usual ones; the first is where downloads go.
        threat: Linf, L2 or corruptions: the threat model it was trained for; by default the run's norm.

    Raises:
        UsageError: for an unknown name, or if robustbench isn't installed.
    """
    figures = leaderboard()
    with _quiet():
        try:
            from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
            from robustbench.model_zoo.models import model_dicts
            from robustbench.utils import load_model
        except ImportError as error:
            raise UsageError(
                f"robustbench:{name} needs the package robustbench ({error}): make install, or, in this order, "
                "python -m pip install 'robustbench>=1.1.1' 'setuptools<82' && python -m pip install -e shims; "
                "python -m benchmark doctor says what is wrong"
            ) from error
    try:
        zoo = model_dicts[BenchmarkDataset(form.family)][ThreatModel(threat)]
    except (ValueError, KeyError):
        pairs = ", ".join(f"{d.value} {t.value}" for d, ts in model_dicts.items() for t in ts)
        raise UsageError(
            f"RobustBench has no models for {form.family or 'an unnamed data set'}, {threat}; it has: {pairs}. "
            "threat=NAME names another threat model; parquet:PATH,family=NAME says which data set the images are"
        ) from None
    if name not in zoo:
        elsewhere = [t for d, t, n in figures if (d, n) == (form.family, name)]
        hint = f" ({name} is for {elsewhere[0]}: robustbench:{name},threat={elsewhere[0]})" if elsewhere else ""
        raise UsageError(unknown(f"RobustBench model for {form.family}, {threat}{hint}", name, sorted(zoo)))
    drive = zoo[name].get("gdrive_id") or []  # an id, or one for each member of an ensemble
    first = Path(form.family) / threat / f"{name}.pt"
    paths = [first] if isinstance(drive, str) else [Path(f"{first}_m{i}.pt") for i in range(len(drive))]
    drive = [drive] if isinstance(drive, str) else drive
    root = next((r for r in folders(roots) if paths and all((r / p).is_file() for p in paths)), None)
    root = root or (roots[0] if roots else folders([])[-1])
    files = [
        Remote(root / path, f"https://drive.google.com/uc?id={key}") for path, key in zip(paths, drive, strict=True)
    ] or _hub_file(name, f"{name.lower().replace('-', '_')}_{form.family}_{threat.lower()}")

    def build() -> nn.Module:
        with _quiet():
            return load_model(name, model_dir=str(root), dataset=form.family, threat_model=threat)

    figure = figures.get((form.family, threat, name))
    return Model(files, build, None if figure is None or figure["clean"] is None else figure["clean"] / 100)


def leaderboard() -> dict[tuple[str, str, str], dict[str, Any]]:
    """RobustBench's figures by (data set, threat model, name): clean and robust accuracy in percent, eps, source."""
    with (ASSETS / "robustbench.csv").open(newline="") as file:
        return {
            (row["dataset"], row["threat"], row["name"]): {
                "clean": float(row["clean"]) if row["clean"] else None,
                "robust": float(row["robust"]) if row["robust"] else None,
                "eps": row["eps"],
            }
            for row in csv.DictReader(file)
        }


def _hub_file(name: str, timm_name: str) -> list[Remote]:
    """The file that timm or torchvision looks for in torch's hub folder, for the few models that have none on Drive."""
    import timm
    import torch
    from torchvision.models import ResNet50_Weights

    if name == "Standard_R50":
        url = ResNet50_Weights.IMAGENET1K_V1.url
    else:
        url = timm.get_pretrained_cfg(timm_name).url if timm.is_model(timm_name) else ""
    return [Remote(Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1], url, _digest(url))] if url else []


def listing(family: str) -> list[dict[str, Any]]:
    """What the zoos offer for a data set, with the clean and robust accuracy that they state, in percent."""
    entries: list[dict[str, Any]] = [
        {"name": f"robustbench:{name}" + ("" if threat == "Linf" else f",threat={threat}"), "threat": threat,
         "eps": figures["eps"], "clean": figures["clean"], "robust": figures["robust"]}
        for (dataset, threat, name), figures in leaderboard().items() if dataset == family
    ]  # fmt: skip
    if family == "imagenet":
        from torchvision import models

        for name in models.list_models(module=models):
            metrics = models.get_model_weights(name)["DEFAULT"].meta["_metrics"]
            entries.append({"name": f"torchvision:{name}", "clean": metrics["ImageNet-1K"]["acc@1"]})
        entries.append({"name": "timm:NAME", "about": "any of timm.list_models(pretrained=True)"})
    return entries


# --- timm and torchvision ----------------------------------------------------------------------------------------


def timm(name: str, form: Form, roots: list[Path]) -> Model:
    """A pretrained ImageNet model of timm, from ``FOLDER/imagenet/timm/NAME.safetensors``, its cache, or its hub.

    Raises:
        UsageError: for an unknown name, one without weights, or if timm isn't installed.
    """
    try:
        import timm as library
    except ImportError as error:
        raise UsageError(f"timm:{name} needs the package timm: python -m pip install timm") from error
    known = library.list_models(pretrained=True)
    if name not in known:
        near = unknown("timm model with weights", name, known).split("known:")[0]
        raise UsageError(f"{near}there are {len(known):,}: timm.list_models(pretrained=True)")
    config = library.get_pretrained_cfg(name)
    _fits(f"timm:{name}", form, config.num_classes)
    repository = str(config.hf_hub_id).rstrip("/") if config.hf_hub_id else None
    url = on_hub(repository, "model.safetensors") if repository else config.url
    relative = Path("imagenet") / "timm" / (name + Path(url).suffix)
    path = place(relative, roots, (repository, "model.safetensors") if repository else None)

    def build() -> nn.Module:
        overlay = {"file": str(path), "custom_load": False}  # else timm's own readers, of pickled data too
        net = library.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        return Pretrained(net, size=config.input_size[-1], mean=config.mean, std=config.std)

    return Model([Remote(path, url)], build, None)


def torchvision(name: str, form: Form, roots: list[Path], *, weights: str = "DEFAULT") -> Model:
    """A pretrained ImageNet model of torchvision, from ``FOLDER/imagenet/torchvision/FILE``, its cache, or its server.

    Args:
        name: the model, e.g. resnet50.
        form: the images and classes that it has to fit.
        roots: folders to look in before the usual ones; the first is where downloads go.
        weights: which of its weights, e.g. IMAGENET1K_V1.

    Raises:
        UsageError: for an unknown name or weights.
    """
    import torch
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(unknown("torchvision model", name, known))
    choices = models.get_model_weights(name)
    if weights != "DEFAULT" and weights not in choices.__members__:
        raise UsageError(unknown(f"weights of {name}", weights, sorted(choices.__members__)))
    chosen = choices[weights]
    _fits(f"torchvision:{name}", form, len(chosen.meta["categories"]))
    file = chosen.url.rsplit("/", 1)[1]
    relative = Path("imagenet") / "torchvision" / file
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    path = next((p for p in [*(r / relative for r in folders(roots)), cached] if p.is_file()), None)
    path = path or (roots[0] / relative if roots else cached)
    form_of_input = chosen.transforms()

    def build() -> nn.Module:
        net = models.get_model(name, weights=None)
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return Pretrained(net, size=form_of_input.crop_size[0], mean=form_of_input.mean, std=form_of_input.std)

    accuracy = chosen.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100
    size = int(chosen.meta["_file_size"] * 2**20)
    return Model([Remote(path, chosen.url, _digest(file), size)], build, accuracy)


def _digest(url: str) -> str | None:
    """The start of the sha256 that torch's and timm's file names carry."""
    found = re.search(r"-([0-9a-f]{8,})\.", url)
    return found.group(1) if found else None


def _fits(what: str, form: Form, classes: int) -> None:
    if form.classes != classes or form.shape[0] != 3:
        raise UsageError(
            f"{what} has {classes:,} classes of colour images, {form.family} has {form.classes:,} classes of shape "
            f"{form.shape}: use it with --dataset imagenet, or images of its classes with family=imagenet"
        )


def _cached(repository: str, file: str) -> Path | None:
    """A model's file in the hub's cache, if an earlier download left it there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """RobustBench and what it imports print to stdout, which is for documents, and warn of their own past."""
    import warnings

    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def trusting(trust: bool, what: str) -> Iterator[None]:
    """Load checkpoints safely: no pickle executes code, unless asked to.

    Raises:
        UsageError: for a checkpoint that only loads by executing code, or that is no checkpoint.
    """
    # torch's own way to tell a load that isn't ours; it goes before defaults and arguments
    safe, unsafe = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    kept = {name: os.environ.pop(name, None) for name in (safe, unsafe)}
    os.environ[unsafe if trust else safe] = "1"
    try:
        yield
    except pickle.UnpicklingError as error:
        if wanted := _wanted(str(error)):
            raise UsageError(
                f"{what} holds more than tensors ({wanted}): loading it would execute code from the file. "
                "If you trust where it comes from: --trust-checkpoint"
            ) from error
        raise UsageError(f"{what} isn't a checkpoint; delete it and fetch it again") from error
    except OSError as error:
        raise UsageError(f"{what} needs a file from the network: {error}") from error
    except (RuntimeError, EOFError, KeyError, ValueError, SafetensorError) as error:
        raise UsageError(f"{what} doesn't fit the network, or is damaged: {error}") from error
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _wanted(message: str) -> str | None:
    """The name that a pickle wanted to call, from torch's message; None if it wanted none."""
    found = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", message)
    return next((g for g in found.groups() if g), None) if found else None


ZOOS: dict[str, Callable[..., Model]] = {"robustbench": robustbench, "timm": timm, "torchvision": torchvision}
