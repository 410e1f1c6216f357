"""Weights with cards: where they lie, whether they are what the card says, and the components built from them.

``<root>/<data set>/<name>/card.json`` describes a component: its file, options, and per part a safetensors file with
its sha256. A part with a ``config.json`` of diffusers is built from that, so a diffusers checkpoint plugs in.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from benchmark import registry
from benchmark.errors import UsageError
from benchmark.registry import Spec

SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Component:
    """A purifier or classifier, ready, with what identifies it: the canonical spec and its weights' hashes."""

    module: nn.Module
    spec: Spec
    weights: dict[str, str]


def cards(dataset: str, roots: list[Path] | None = None) -> dict[str, Path]:
    """The cards for a data set, by name; earlier roots win."""
    found: dict[str, Path] = {}
    for root in roots or []:
        if not root.is_dir():
            raise UsageError(f"--weights {root}: no such folder")
    for root in [*(roots or []), SHIPPED]:
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


def names(kind: str, dataset: str, roots: list[Path] | None = None) -> list[str]:
    """What a spec may name: component files that need no weights or have a card, and the cards themselves."""
    described = {n: read_card(p)["kind"] for n, p in cards(dataset, roots).items()}
    return sorted(set(registry.names(kind)) | {n for n, k in described.items() if k == kind})


def build(
    kind: str, text: str | Spec, dataset: str, shape: tuple[int, int, int], roots: list[Path] | None = None
) -> Component:
    """The component of a spec with the weights of its card.

    Raises:
        UsageError: for an unknown name or option, a value out of range, missing or altered weights.
    """
    spec = registry.parse(text) if isinstance(text, str) else text
    path = cards(dataset, roots).get(spec.name)
    card = read_card(path) if path else {}
    if path and card["kind"] != kind:
        raise UsageError(f"{spec.name} is one of the {card['kind']}, not of the {kind}")
    if not path and spec.name != "file" and spec.name not in registry.names(kind):
        raise UsageError(registry.unknown(kind[:-1], spec.name, names(kind, dataset, roots)))
    component = registry.load(kind, card.get("component", spec.name), spec.argument)
    options = registry.resolve(component, spec, card.get("options"))
    parts: dict[str, nn.Module] = component.parts(shape, card.get("size", "tiny"))  # type: ignore[attr-defined]
    hashes = registry.source(spec)
    for part in parts:
        if path is None:
            raise UsageError(
                f"no weights for {spec.name} on {dataset}; train them: "
                f"python -m benchmark train {spec.name} --dataset {dataset}, then --weights FOLDER"
            )
        parts[part], hashes[part] = _load_part(path.parent, part, card["files"][part], parts[part])
    if spec.name == "file":  # code from outside the repository: another text is another component
        hashes["file"] = sha256(Path(str(spec.argument).partition(":")[0]))
    try:
        module: nn.Module = component(*parts.values(), **options)
    except ValueError as error:
        raise UsageError(f"{spec.name}: {error}") from error
    return Component(module.eval().requires_grad_(False), Spec(spec.name, spec.argument, options), hashes)


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: Path, parts: dict[str, nn.Module]) -> dict[str, dict[str, str]]:
    """Write each part as safetensors, diffusers' models with their config; returns the card's list of files."""
    from safetensors.torch import save_file

    files = {}
    for name, net in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        if hasattr(net, "save_pretrained"):
            cast(Any, net).save_pretrained(folder / name)
        else:
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / name / "model.safetensors")
        (file,) = (folder / name).glob("*.safetensors")
        files[name] = {"file": f"{name}/{file.name}", "sha256": sha256(file)}
    return files


def _load_part(folder: Path, name: str, entry: dict[str, str], fresh: nn.Module) -> tuple[nn.Module, str]:
    file = folder / entry["file"]
    found = sha256(file) if file.is_file() else "no such file"
    if found != entry["sha256"]:
        remedy = (
            f"restore it from the repository (git checkout -- {file})"
            if SHIPPED in file.parents
            else "copy it again from where it was trained"
        )
        raise UsageError(
            f"weights {file}: expected sha256 {entry['sha256']}, found {found}; {remedy}, or train it again: "
            f"python -m benchmark train {folder.name} --dataset {folder.parent.name} --out NEW_FOLDER"
        )
    from safetensors.torch import load_file

    config = folder / name / "config.json"
    if config.is_file() and (class_name := json.loads(config.read_text()).get("_class_name")):
        import diffusers

        fresh = getattr(diffusers, class_name).from_config(json.loads(config.read_text()))
    fresh.load_state_dict(load_file(file))
    return fresh, entry["sha256"]
