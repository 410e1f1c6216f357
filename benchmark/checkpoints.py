"""Weights with cards: where they lie, whether they are what the card says, and the components built from them.

``<root>/<data set>/<name>/card.json`` describes a component: its file, options, and per part a safetensors file with
its sha256. A part with a ``config.json`` of diffusers is built from that, so a diffusers checkpoint plugs in. A part
with a ``layout`` is a file that others publish: its entry says where, and its sha256, size and revision where known.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmark import constructors, registry, specs, zoo
from benchmark.dataset import FORMS, Form
from benchmark.errors import UsageError, raised, unknown
from benchmark.fetch import Remote, network, obtain, sha256
from benchmark.fingerprint import fingerprint
from benchmark.layouts import LAYOUTS
from benchmark.recipes import COMPACT, recipes
from benchmark.specs import Spec

SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Component:
    """A purifier or classifier, ready, with what identifies it: the canonical spec and its weights' hashes.

    ``accuracy`` is the clean accuracy that a classifier's publisher or card gives, a fraction, or None.
    """

    module: nn.Module
    spec: Spec
    weights: dict[str, str]
    accuracy: float | None = None


@dataclass(frozen=True)
class Need:
    """What components are needed for, and what may be done to get them.

    Args:
        form: the images and classes that they have to fit.
        norm: the run's threat model, for which a robust classifier is taken.
        roots: folders with further weights.
        offline: fetch nothing.
        trust: load checkpoints that execute code.
    """

    form: Form
    norm: str = "Linf"
    roots: tuple[Path, ...] = ()
    offline: bool = False
    trust: bool = False


def cards(dataset: str, roots: Sequence[Path] = ()) -> dict[str, Path]:
    """The cards for a data set, by name; earlier roots win."""
    found: dict[str, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise UsageError(f"--weights {root}: no such folder; create it, or fetch into it")
    for root in [*roots, SHIPPED]:
        for card in sorted((root / dataset).glob("*/card.json")):
            found.setdefault(card.parent.name, card)
    return found


def read_card(path: Path) -> dict[str, Any]:
    """What a card says.

    Raises:
        UsageError: if it isn't JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} isn't a card: {error}; restore it, or train the weights again") from error


def names(kind: str, dataset: str, roots: Sequence[Path] = ()) -> list[str]:
    """What a spec may name: component files that need no weights or have a card, and the cards themselves."""
    described = {n: read_card(p)["kind"] for n, p in cards(dataset, roots).items()}
    bare = {n for n in registry.names(kind) if not _needs_weights(kind, n)}
    return sorted(bare | {n for n, k in described.items() if k == kind})


def at_hand(kind: str, need: Need) -> list[str]:
    """Those of ``names`` that can run now: what others publish only where it was fetched."""
    found = cards(need.form.family, need.roots)
    missing = {n for n, p in found.items() if any(not r.path.is_file() for r in published(read_card(p), need))}
    return [name for name in names(kind, need.form.family, need.roots) if name not in missing]


def _needs_weights(kind: str, name: str) -> bool:
    """Whether a component has networks."""
    component = registry.load(kind, name)
    return component.parts.__func__ is not registry.base(kind).parts.__func__  # type: ignore[attr-defined]


class Shelf:
    """Components that were built, to be handed out again: the cells of a grid share their networks.

    Beyond ``LIMIT`` bytes of weights those that were not asked for longest are forgotten.
    """

    LIMIT = 4 << 30

    def __init__(self) -> None:
        self.built: dict[tuple, Component] = {}

    def build(self, kind: str, text: str, need: Need) -> Component:
        """``build``, once."""
        key = (kind, text, need)
        found = self.built.pop(key, None) or build(kind, text, need)
        self.built[key] = found
        while len(self.built) > 1 and sum(map(_bytes, self.built.values())) > self.LIMIT:
            del self.built[next(iter(self.built))]
        return found


def _bytes(component: Component) -> int:
    return sum(t.numel() * t.element_size() for t in component.module.state_dict().values())


def build(kind: str, text: str | Spec, need: Need, *, hollow: bool = False) -> Component:
    """The component of a spec, with the weights of its card or its zoo.

    Args:
        kind: "purifiers" or "classifiers".
        text: the spec.
        need: what it has to fit, and what may be done for it.
        hollow: leave its networks without weights, on the device "meta": to ask what it is, not to run it.

    Raises:
        UsageError: for an unknown name or option, a value out of range, missing or altered weights.
    """
    spec = specs.parse(text) if isinstance(text, str) else text
    if kind == "classifiers" and spec.name in zoo.ZOOS:
        return _from_zoo(spec, need)
    spec = named(spec)
    family, shape, classes = need.form
    path = cards(family, need.roots).get(spec.name)
    card = read_card(path) if path else {}
    if path and card["kind"] != kind:
        raise UsageError(f"{spec.name} is one of the {card['kind']}, not of the {kind}")
    if not path and spec.name != "file" and spec.name not in registry.names(kind):
        others = sorted(other.name for other in SHIPPED.glob("*") if spec.name in cards(other.name))
        hint = f"{spec.name} has weights for {', '.join(others)}, not for {family}; " if others else ""
        raise UsageError(hint + unknown(kind[:-1], spec.name, names(kind, family, need.roots)))
    component = registry.load(kind, card.get("component", spec.name), spec.argument)
    options = constructors.resolve(component, spec, card.get("options"))
    trained = constructors.resolve(component, Spec(spec.name), card.get("options")) if card else options
    for option in getattr(component, "as_trained", ()):
        if options[option] != trained[option]:
            others = [n for n in cards(family, need.roots) if n.startswith(card["component"])]
            raise UsageError(
                f"{spec}: its network was trained with {option}={specs.show(trained[option])}; for another value "
                f"take the card of one that was trained with that: {', '.join(sorted(others))}"
            )
    sizes = (shape, card.get("size", "tiny")) + ((classes,) if kind == "classifiers" else ())
    with torch.device("meta") if hollow else nullcontext():
        fresh: dict[str, nn.Module] = component.parts(*sizes) if hasattr(component, "parts") else {}
    hashes = registry.source(spec)
    for part in fresh:
        if path is None:
            raise UsageError(f"no weights for {spec.name} on {family}; {_remedy(kind, spec.name, need)}")
        entry = card["files"][part]
        fresh[part] = _configured(path.parent, entry, fresh[part])
        if not hollow:
            hashes[part] = _load(path.parent, entry, fresh[part], need)
    try:
        module: nn.Module = component(*fresh.values(), **options)
    except ValueError as error:
        raise UsageError(f"{specs.head(spec)}: {error}") from error
    except Exception as error:
        if spec.name != "file":
            raise
        raise UsageError(f"{spec}: {spec.argument} raised {raised(error)}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{spec}: {spec.argument} returned {type(module).__name__}, not a torch.nn.Module")
    if spec.name == "file" or not fresh and module.state_dict():  # it brought what it computes with
        hashes["module"] = fingerprint(module)
    accuracy = card.get("measured", {}).get("test", {}).get("accuracy") if kind == "classifiers" else None
    return Component(
        module.eval().requires_grad_(False), Spec(spec.name, spec.argument, options), hashes, accuracy
    )  # fmt: skip


def named(spec: Spec) -> Spec:
    """A spec by the name of its card: "vae:weights=beta4" is the card vae-beta4."""
    if "weights" not in spec.options or spec.name == "file":
        return spec
    options = dict(spec.options)
    return Spec(f"{spec.name}-{specs.show(options.pop('weights'))}", spec.argument, options)


def _remedy(kind: str, name: str, need: Need) -> str:
    """How to come by weights that aren't there."""
    family = need.form.family
    if name == "file":
        return (
            "only shipped components are handed their networks: make yours in __init__ from options alone and load "
            "its weights there (torch.load); they are part of what identifies it"
        )
    if name in recipes(family):
        train = f"train them: python -m benchmark train {name} --dataset {family}, then --weights FOLDER"
        compact = f"{name}{COMPACT}"
        return f"take {compact}, or {train}" if compact in cards(family, need.roots) else train
    known = [*names(kind, family, need.roots), *(f"{z}:NAME" for z in zoo.ZOOS if kind == "classifiers")]
    if family not in FORMS:
        return f"say whose images they are: --dataset …,family=NAME with a name of {', '.join(sorted(FORMS))}"
    return f"there is no recipe for it either (--weights FOLDER brings your own); what can be named: {', '.join(known)}"


def _from_zoo(spec: Spec, need: Need) -> Component:
    """A classifier of another package."""
    found, options = in_zoo(spec, need)
    paths = [obtain(remote, offline=need.offline) for remote in found.files]
    with zoo.trusting(need.trust, ", ".join(map(str, paths)) or str(spec)), network(not need.offline):
        module = found.build()
    hashes = {f"file{i}": sha256(path) for i, path in enumerate(paths)} or {"module": fingerprint(module)}
    return Component(
        module.eval().requires_grad_(False), Spec(spec.name, spec.argument, options), hashes, found.accuracy
    )


def remotes(text: str, need: Need) -> list[Remote]:
    """The files that a spec needs from elsewhere; none where its weights are shipped.

    Raises:
        UsageError: for an unknown name.
    """
    spec = specs.parse(text)
    if spec.name in zoo.ZOOS:
        return in_zoo(spec, need)[0].files
    if card := cards(need.form.family, need.roots).get(named(spec).name):
        return published(read_card(card), need)
    known = [*names("purifiers", need.form.family, need.roots), *names("classifiers", need.form.family, need.roots)]
    known += registry.names("attacks")
    if spec.name == "file":
        registry.source(spec)
    elif spec.name not in known:
        raise UsageError(unknown("component with weights at hand", spec.name, sorted({*known, *zoo.ZOOS})))
    return []


def in_zoo(spec: Spec, need: Need) -> tuple[zoo.Model, dict[str, Any]]:
    """What a zoo says of a classifier, and its options.

    Raises:
        UsageError: for an unknown name or option.
    """
    function = zoo.ZOOS[spec.name]
    if spec.argument is None:
        raise UsageError(f"write {spec.name}:NAME; python -m benchmark list classifiers --dataset {need.form.family}")
    options = constructors.resolve(function, spec, {"threat": need.norm} if spec.name == "robustbench" else {})
    return function(spec.argument, need.form, list(need.roots), **options), options


def halve(net: nn.Module) -> None:
    """Round all numbers of a network to half precision, as they lie on disk; it goes on computing in full."""
    state = net.state_dict()
    net.load_state_dict({k: v.half().to(v.dtype) if v.is_floating_point() else v for k, v in state.items()})


def save(folder: Path, parts: dict[str, nn.Module]) -> dict[str, dict[str, str]]:
    """Write each part in half precision as safetensors, diffusers' models with their config; returns a card's files."""
    from safetensors.torch import save_file

    files = {}
    for name, net in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        net = copy.deepcopy(net).half().cpu()  # the caller's own stays where it is
        if hasattr(net, "save_pretrained"):
            cast(Any, net).save_pretrained(folder / name)
        else:
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / name / "model.safetensors")
        (file,) = (folder / name).glob("*.safetensors")
        files[name] = {"file": f"{name}/{file.name}", "sha256": sha256(file)}
    return files


def check_files(card: Path) -> int:
    """How many files a card brings; an error if one isn't what it says."""
    entries = [entry for entry in read_card(card)["files"].values() if "layout" not in entry]
    for entry in entries:
        _checked(card.parent, entry)
    return len(entries)


def _checked(folder: Path, entry: dict[str, Any]) -> Path:
    """The file of a card's entry, beside the card or in an installed package, if its sha256 is the card's."""
    package, file = entry.get("package"), _own(folder, entry)
    found = sha256(file) if file.is_file() else "no such file"
    if found != entry["sha256"]:
        if package:
            remedy = f"install it again: python -m pip install --force-reinstall --no-deps {entry['distribution']}"
        else:
            remedy = (
                f"restore it from the repository (git checkout -- {file})"
                if SHIPPED in file.parents
                else "copy it again from where it was trained"
            ) + (
                f", or train it again: python -m benchmark train {folder.name} --dataset {folder.parent.name} "
                "--out NEW_FOLDER"
            )
        raise UsageError(f"weights {file}: expected sha256 {entry['sha256']}, found {found}; {remedy}")
    return file


def _own(folder: Path, entry: dict[str, Any]) -> Path:
    """The file of a card's entry: in an installed package, the card's folder, or that of the card whose part it is."""
    if "package" in entry:
        return _in_package(entry["package"], entry["file"])
    if "of" not in entry:
        return folder / entry["file"]
    near, shipped = (root / entry["of"] / entry["file"] for root in (folder.parent, SHIPPED / folder.parent.name))
    return near if near.is_file() else shipped


def published(card: dict[str, Any], need: Need) -> list[Remote]:
    """The files of a card that others publish: where they lie, or would, and whence they come."""
    return [_remote(entry, need) for entry in card.get("files", {}).values() if "layout" in entry]


def _remote(entry: dict[str, Any], need: Need) -> Remote:
    relative, repository = Path(need.form.family) / entry["file"], entry.get("repository")
    hub = (repository, relative.name) if repository else None
    url = zoo.on_hub(*hub, entry.get("revision", "main")) if hub else entry["url"]
    return Remote(zoo.place(relative, list(need.roots), hub), url, entry.get("sha256"), entry.get("size"))


def _read(file: Path, trust: bool) -> Any:
    """What a checkpoint holds; of a large one only what is used comes into memory."""
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=not trust, mmap=zipfile.is_zipfile(file))


def _configured(folder: Path, entry: dict[str, Any], fresh: nn.Module) -> nn.Module:
    """A part's network: of the shape that a ``config.json`` of diffusers beside its file gives, where there is one."""
    if "layout" in entry or not (config := _own(folder, entry).parent / "config.json").is_file():
        return fresh
    import diffusers

    said = json.loads(config.read_text())
    if not (name := said.get("_class_name")):
        return fresh
    if not hasattr(diffusers, name):
        raise UsageError(f"{config}: diffusers {diffusers.__version__} has no {name}; install a version that has it")
    with torch.device(next((p.device for p in fresh.parameters()), "cpu")):
        return getattr(diffusers, name).from_config(said)


def _load(folder: Path, entry: dict[str, Any], net: nn.Module, need: Need) -> str:
    """Give a part's network the weights of a card's entry; the sha256 of their file."""
    layout = entry.get("layout")
    file = obtain(_remote(entry, need), offline=need.offline) if layout else _checked(folder, entry)
    with zoo.trusting(need.trust, str(file)):
        state = _read(file, need.trust)
        if layout:
            state = _read_as(layout, state, net)
        for old, new in entry.get("rename", {}).items():
            state = {key.replace(old, new): value for key, value in state.items()}
        net.load_state_dict(state)
    return sha256(file) if layout else entry["sha256"]


def _read_as(layout: str, checkpoint: Any, net: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's weights under the names of the network's own.

    Raises:
        ValueError: if it isn't of that layout.
    """
    try:
        return LAYOUTS[layout](checkpoint, net)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"it isn't laid out as {layout} does: {type(error).__name__}: {error}") from error


def _in_package(package: str, file: str) -> Path:
    """A file of an installed package."""
    found = importlib.util.find_spec(package)
    return Path((found and found.submodule_search_locations or [package])[0]) / file
