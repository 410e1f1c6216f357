"""One training loop for anything with ``objectives``: purifiers, classifiers, and classifiers trained adversarially."""

from __future__ import annotations

import json
import math
import os
import time
import tomllib
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmark import checkpoints, data, registry
from benchmark.errors import UsageError
from purifiers import Batch, Tape

RECIPES = Path(__file__).parent / "recipes.toml"
LARGER = "cifar10"
"""The data set whose recipes, for a GPU, stand in the cards of small models, too."""
MEASURED = 10_000
"""Network evaluations of a purifier that a card's accuracies are measured with."""
SAVE_EVERY = 60.0
"""Seconds between saves of a training under way."""


@dataclass(frozen=True)
class Recipe:
    """How a component's weights are made; a section of recipes.toml."""

    kind: str
    component: str
    size: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    ema: float
    augment: list[str]
    adversarial_eps: str | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    init: str | dict[str, str] | None = None
    """The weights that training starts from: a card, for parts of one name, or a "card.part" for every part."""
    critics: list[str] = field(default_factory=list)
    """Networks of ``Purifier.critics`` that train along."""
    judge: str | None = None
    """A classifier whose features the objective compares; never the victim of the tables."""
    skip_above: float | None = None
    """Steps with a longer gradient, or one that isn't finite, move nothing."""
    dial: str | None = None
    """The option that sets the strength of these weights, where it isn't the component's."""
    settle: int = 0
    """Training images handed to ``Purifier.settle``, before the training."""


def recipes(dataset: str) -> dict[str, Recipe]:
    """The recipes for a data set, by name; a section with ``like`` changes what it names of another recipe."""
    sections = tomllib.loads(RECIPES.read_text())

    def whole(section: dict[str, Any]) -> dict[str, Any]:
        if "like" not in section:
            return section
        family, _, name = section["like"].partition(".")
        return whole(sections[family][name]) | {k: v for k, v in section.items() if k != "like"}

    return {name: Recipe(**whole(section)) for name, section in sections.get(dataset, {}).items()}


def train(
    name: str,
    dataset: str,
    out: Path,
    *,
    device: str = "cpu",
    data_dir: str | None = None,
    epochs: int | None = None,
    limit: int | None = None,
) -> Path:
    """Train ``name`` by its recipe and write weights and card to ``out/<dataset>/<name>``.

    The state is saved every minute; the same command continues after a kill. Noise, order and augmentation are keyed
    by the step, so a resumed training is the training that was interrupted.

    Args:
        epochs: other than the recipe's; the card says so.
        limit: train on the first so many images only; the card says so.

    Raises:
        UsageError: for an unknown name, or if ``out`` holds finished weights already.
    """
    known = recipes(dataset)
    if name not in known:
        raise UsageError(registry.unknown(f"recipe on {dataset}", name, sorted(known)))
    recipe = known[name] if epochs is None else Recipe(**asdict(known[name]) | {"epochs": epochs})
    folder = out / dataset / name
    if (folder / "card.json").exists():
        raise UsageError(
            f"{folder}/card.json exists; choose another --out or delete the folder: nothing was overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    images = data.load(f"{dataset}:split=train", data_dir=data_dir)
    images = images if limit is None else images.first(limit)
    torch.manual_seed(recipe.seed)
    component = registry.load(recipe.kind, recipe.component)
    classes = (images.classes,) if recipe.kind == "classifiers" else ()
    parts = component.parts(images.shape, recipe.size, *classes)  # type: ignore[attr-defined]
    module = component(*parts.values(), **recipe.options).to(device).train()
    started = _start(recipe, images, parts, out)
    aside = _aside(recipe, component, images, out, device)
    if recipe.settle:
        with torch.no_grad():
            module.eval().settle(images.images(slice(0, recipe.settle)).to(device))  # type: ignore[operator]
        module.train()
    skipped = _fit(module, recipe, images, folder / "state.pt", device, aside) if recipe.epochs else 0
    # parts that came trained and weren't moved stay where they are
    kept = {k: v for k, v in started.items() if not recipe.epochs or k in getattr(module, "given", ())}
    for part in parts.keys() - kept.keys():
        checkpoints.halve(parts[part])
    measured = measure(module, recipe, dataset, aside, data_dir=data_dir, limit=limit)
    files = kept | checkpoints.save(folder, {k: v.cpu() for k, v in parts.items() if k not in kept})
    files = {k: files[k] for k in parts}
    card = {
        "kind": recipe.kind,
        "component": recipe.component,
        "size": recipe.size,
        "options": recipe.options,
        "files": files,
        "parameters": sum(p.numel() for p in module.parameters()),
        "recipe": asdict(recipe),
        "data": {
            "dataset": dataset,
            "training_images": len(images),
            "validation": f"the last {data.VALIDATION:,} training images, never trained on",
            "sha256": images.fingerprint,
        },
        "skipped_steps": skipped,
        "measured": measured,
        "command": f"python -m benchmark train {name} --dataset {dataset}",
        "torch": torch.__version__.split("+")[0],
    }
    if dataset != LARGER and name in recipes(LARGER):
        command = f"python -m benchmark train {name} --dataset {LARGER} --device cuda"
        card["larger"] = {"recipe": asdict(recipes(LARGER)[name]), "command": command}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (folder / "state.pt").unlink(missing_ok=True)
    return folder


def _start(recipe: Recipe, images: data.Dataset, parts: dict[str, nn.Module], out: Path) -> dict[str, dict[str, str]]:
    """Copy the weights that a recipe starts from into the parts that they have; their entries for a card."""
    if recipe.init is None:
        return {}
    sources = recipe.init if isinstance(recipe.init, dict) else {part: f"{recipe.init}.{part}" for part in parts}
    roots = (out,) if out.is_dir() else ()
    known, entries = checkpoints.cards(images.family, roots), {}
    for part, source in sources.items():
        card, _, trained = source.rpartition(".")
        if card not in known:
            raise UsageError(f"training starts from {card}, which has no weights; train it first into the same --out")
        files = checkpoints.read_card(known[card])["files"]
        found = files.get(trained)
        if found is None and isinstance(recipe.init, str):
            continue  # a part of its own
        if found is None or part not in parts:
            raise UsageError(f"init: {part} = {source!r}: parts are {', '.join(parts)}; {card} has {', '.join(files)}")
        built = checkpoints.build(recipe.kind, card, checkpoints.Need(images.form, roots=roots))
        _grow(parts[part], built.module.get_submodule(trained).state_dict())
        entries[part] = {"of": card} | found
    return entries


def _grow(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights into a network that may take more input channels than they do: it does nothing with those yet."""
    for name, fresh in net.state_dict().items():
        missing = fresh.shape[1] - state[name].shape[1] if fresh.ndim == 4 and name in state else 0
        if missing > 0:
            state[name] = nn.functional.pad(state[name], (0, 0, 0, 0, 0, missing))
    net.load_state_dict(state)


def _aside(recipe: Recipe, component: Any, images: data.Dataset, out: Path, device: str) -> dict[str, Any]:
    """What the objective takes beside weights: critics that train along, the features of a judge."""
    aside: dict[str, Any] = {}
    if recipe.critics:
        critics = component.critics(images.shape, recipe.size)
        aside |= {name: critics[name].to(device).train() for name in recipe.critics}
    if recipe.judge:
        need = checkpoints.Need(images.form, roots=(out,) if out.is_dir() else ())
        judge = checkpoints.build("classifiers", recipe.judge, need).module.to(device)
        aside["judge"] = partial(_features, judge)
    return aside


def _features(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What the layers of a network's sequences give for images, while it still has height and width."""
    found: list[Tensor] = []
    layers = [layer for part in network.modules() if isinstance(part, nn.Sequential) for layer in part]
    hooks = [layer.register_forward_hook(lambda module, inputs, output: found.append(output)) for layer in layers]
    network(x)
    for hook in hooks:
        hook.remove()
    return [f for f in found if f.ndim == 4 and f.shape[-1] > 1]


def measure(
    module: nn.Module,
    recipe: Recipe,
    dataset: str,
    aside: dict[str, Any] | None = None,
    *,
    data_dir: str | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """What trained weights do on images they never saw: the objective and the accuracy, with n.

    The accuracy of a purifier is that of the shipped ``resnet`` on images purified once. Purifiers of many steps are
    measured on the first ``MEASURED`` / NFE images.
    """
    module.eval()
    device = next(module.parameters()).device
    judge = None
    if recipe.kind == "purifiers" and "resnet" in checkpoints.cards(dataset):
        need = checkpoints.Need(data.form(dataset))
        judge = checkpoints.build("classifiers", "resnet", need).module.to(device)
    measured = {}
    for split in ("validation", "test"):
        wanted = 10_000 if split == "test" else 1  # a test set at hand may be an excerpt
        images = data.load(f"{dataset}:split={split}", wanted, data_dir=data_dir)
        most = min(len(images), max(MEASURED // getattr(module, "nfe", 1), 100))
        images = images.first(most if limit is None else min(limit, most))
        sums: dict[str, float] = {}
        for first in range(0, len(images), 250):
            rows = slice(first, first + 250)
            batch = Batch(images.images(rows).to(device), images.labels[rows].to(device))
            tape = Tape(recipe.seed, "measure", images.ids[rows])
            with torch.no_grad():
                losses = module.objectives(batch, tape, **recipe.objective, **aside or {})  # type: ignore[operator]
                values = {f"objective of {k}": float(v) for k, v in losses.items()}
                if recipe.kind == "classifiers":
                    values["accuracy"] = float((module(batch.x).argmax(1) == batch.y).float().mean())
                elif judge is not None:
                    purified = module(batch.x, tape.fold("purify"))
                    values["accuracy with resnet"] = float((judge(purified).argmax(1) == batch.y).float().mean())
            for k, v in values.items():
                sums[k] = sums.get(k, 0.0) + v * len(batch.y)
        measured[split] = {k: round(v / len(images), 6) for k, v in sums.items()} | {"n": len(images)}
    return measured


def _fit(
    module: nn.Module, recipe: Recipe, images: data.Dataset, state_file: Path, device: str, aside: dict[str, Any]
) -> int:
    """Minimise the objectives; leaves the averaged weights in ``module``. Returns how many steps were skipped."""
    from diffusers.training_utils import EMAModel

    per_epoch = len(images) // recipe.batch_size
    total = per_epoch * recipe.epochs
    objective = recipe.objective | aside
    probe = _batch(images, recipe, 0, per_epoch, total, device)
    keys = list(module.objectives(*probe, **objective))  # type: ignore[operator]
    critics = {k: v for k, v in aside.items() if isinstance(v, nn.Module)}
    optimisers = {k: _optimiser(module, k, recipe, critics) for k in keys}
    schedules = {
        k: torch.optim.lr_scheduler.LambdaLR(o, lambda step: _one_cycle(step / total)) for k, o in optimisers.items()
    }
    ema = EMAModel(module.parameters(), decay=recipe.ema)
    stateful: dict[str, Any] = {"module": module, "ema": ema} | {f"critic {k}": v for k, v in critics.items()}
    stateful |= {f"optimiser {k}": o for k, o in optimisers.items()} | {f"lr {k}": s for k, s in schedules.items()}
    first = skipped = 0
    if state_file.exists():
        saved = torch.load(state_file, map_location=device, weights_only=True)
        if saved["total"] != total:
            raise UsageError(f"{state_file} is of a training of {saved['total']} steps, not {total}; delete it")
        for k, part in stateful.items():
            part.load_state_dict(saved[k])
        first, skipped = saved["step"], saved["skipped"]

    last_save = time.monotonic()
    progress = tqdm(range(first, total), initial=first, total=total, unit="it", desc=state_file.parent.name)
    progress.mininterval = 0.1 if os.isatty(2) else 30
    mean = {k: 0.0 for k in keys}
    for step in progress:
        batch, tape = _batch(images, recipe, step, per_epoch, total, device)
        if recipe.adversarial_eps:
            batch = _adversarial(module, batch, tape, Fraction(recipe.adversarial_eps))
        losses = module.objectives(batch, tape, **objective)  # type: ignore[operator]
        for k, loss in losses.items():
            optimisers[k].zero_grad(set_to_none=True)
            loss.backward(retain_graph=len(losses) > 1)
            length = nn.utils.clip_grad_norm_([p for g in optimisers[k].param_groups for p in g["params"]], 1.0)
            if length <= (recipe.skip_above or math.inf):  # false for nan
                optimisers[k].step()
            else:
                skipped += 1
            schedules[k].step()
            mean[k] += (loss.item() - mean[k]) * max(0.01, 1 / (step - first + 1))
        ema.step(module.parameters())
        progress.set_postfix({k: f"{v:.4g}" for k, v in mean.items()}, refresh=False)
        if time.monotonic() - last_save > SAVE_EVERY:
            saved = {k: part.state_dict() for k, part in stateful.items()}
            saved |= {"step": step + 1, "total": total, "skipped": skipped}
            torch.save(saved, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            last_save = time.monotonic()
    ema.copy_to(module.parameters())
    return skipped


def _one_cycle(progress: float, warm_up: float = 0.1) -> float:
    """The share of the peak learning rate: a linear warm-up, then half a cosine to zero."""
    if progress < warm_up:
        return max(progress / warm_up, 1e-2)
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def _optimiser(module: nn.Module, key: str, recipe: Recipe, critics: dict[str, nn.Module]) -> torch.optim.Optimizer:
    parts = [critics[part] if part in critics else module.get_submodule(part) for part in key.split("+")]
    parameters = [p for part in parts for p in part.parameters()]
    return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


def _batch(
    images: data.Dataset, recipe: Recipe, step: int, per_epoch: int, total: int, device: str
) -> tuple[Batch, Tape]:
    """The batch of a step and its noise, both functions of (seed, step) alone."""
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch))
    rows = order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
    tape = Tape(recipe.seed, "train", images.ids[rows], torch.full_like(rows, epoch))
    x = images.images(rows)
    for name in recipe.augment:
        x = AUGMENT[name](x, tape.fold("augment", name))
    return Batch(x.to(device), images.labels[rows].to(device), step / total), tape


def _flip(x: Tensor, tape: Tape) -> Tensor:
    """Mirror half of the images."""
    return torch.where(tape.uniform("flip", like=x[:, :1, :1, :1]) < 0.5, x.flip(-1), x)


def _crop(x: Tensor, tape: Tape, pad: int = 2) -> Tensor:
    """Shift by up to ``pad`` pixels each way, black moving in."""
    shift = (tape.uniform("crop", like=x[:, 0, :2, 0]) * (2 * pad + 1)).long()
    padded = nn.functional.pad(x, (pad,) * 4)
    h, w = x.shape[-2:]
    return torch.stack([p[:, i : i + h, j : j + w] for p, (i, j) in zip(padded, shift.tolist(), strict=True)])


AUGMENT = {"flip": _flip, "crop": _crop}


def _adversarial(module: nn.Module, batch: Batch, tape: Tape, eps: Fraction) -> Batch:
    """One signed step of 1.25 eps from a uniform start in the Linf ball (Wong et al. 2020, arXiv 2001.03994)."""
    from attacks import Linf

    threat = Linf(eps)
    start = threat.random(batch.x, tape.fold("adversarial")).requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(module(start), batch.y), start)
    moved = threat.project(start.detach() + threat.step(gradient, 1.25 * float(eps)), batch.x)
    return batch._replace(x=moved)
