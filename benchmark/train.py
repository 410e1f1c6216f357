"""One training loop for anything with ``objectives``: purifiers, classifiers, and classifiers trained adversarially."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks._precision import set_tf32
from benchmark import checkpoints, data, registry
from benchmark.dataset import ALL, CUT, Dataset
from benchmark.errors import UsageError
from benchmark.files import replace, sole
from benchmark.measure import MOST, SPLITS, measure
from benchmark.recipes import ADVERSARIES, LARGER, Recipe, larger, ordered, recipes
from benchmark.samples import samples
from purifiers import Batch, Tape

SAVE_EVERY = 60.0
"""Seconds between saves of a training under way."""
SHOWN_EVERY = 20
"""Steps between losses on the progress bar: to read one waits for the device."""


def train(
    name: str,
    dataset: str,
    out: Path,
    *,
    device: str = "cpu",
    data_dir: str | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    finish: str | None = None,
    stop_steps: int | None = None,
) -> Path:
    """Train ``name`` by its recipe and write weights and card to ``out/<data set>/<name>``, with images it draws.

    The state is saved every minute; the same command continues after a kill. Noise, order and augmentation are keyed
    by the step, so a resumed training is the training that was interrupted.

    Args:
        dataset: a data set's spec; its splits train, validation and test are used.
        epochs: other than the recipe's; the card says so.
        limit: train on the first so many images only; the card says so.
        finish: the data set of the last steps, as many as the recipe says, e.g. of better images than most are; the
            card is measured on it.
        stop_steps: leave after so many steps, with the state saved and no card: ``paused`` says what is left.

    Raises:
        UsageError: for an unknown name, if ``out`` holds finished weights already, or an unfinished training of
            another recipe, length or data set.
    """
    family = data.form(dataset, data_dir=data_dir).family
    (name,), known = ordered(family, [name]), recipes(family)
    if any(number is not None and number < 1 for number in (epochs, stop_steps)):
        raise UsageError(f"--epochs and --stop-steps are at least 1, got {epochs} and {stop_steps}")
    recipe = known[name] if epochs is None else Recipe(**asdict(known[name]) | {"epochs": epochs})
    folder = out / family / name
    if (folder / "card.json").exists():
        raise UsageError(
            f"{folder}/card.json exists; choose another --out or delete the folder: nothing was overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    material = _material(dataset, finish, limit, data_dir)
    images = material.images
    torch.manual_seed(recipe.seed)
    set_tf32(False, False)  # what a card measures is what a run will compute
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
    skipped: int | None = 0
    if recipe.epochs:
        of = json.dumps([asdict(recipe), material.fingerprints, started, _judge(recipe, family, out)], sort_keys=True)
        with sole(folder / ".work.lock", "choose another --out"):
            skipped = _fit(module, recipe, material, folder / "state.pt", device, aside, of, stop_steps)
    if skipped is None:
        return folder
    # parts that came trained and weren't moved stay where they are
    kept = {k: v for k, v in started.items() if not recipe.epochs or k in getattr(module, "given", ())}
    for part in parts.keys() - kept.keys():
        checkpoints.halve(parts[part])
    measured = measure(module, recipe, material.held_out, aside, out, limit=limit)
    files = kept | checkpoints.save(folder, {k: v for k, v in parts.items() if k not in kept})
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
            "dataset": data.part(images.name),
            "training_images": len(images),
            "validation": f"{CUT}, never trained on",
            "sha256": images.fingerprint,
        }
        | material.finishing(recipe),
        "skipped_steps": skipped,
        "measured": measured,
        "command": f"python -m benchmark train {name} --dataset {dataset}"
        + (f" --finish {finish}" if finish else "")
        + (f" --epochs {epochs}" if epochs is not None else ""),
        "torch": torch.__version__.split("+")[0],
    }
    if bigger := larger(family, name):
        command = f"python -m benchmark train {bigger} --dataset {LARGER} --device cuda"
        card["larger"] = {"recipe": asdict(recipes(LARGER)[bigger]), "command": command}
    if recipe.kind == "purifiers":
        samples(module.eval(), images.form, folder / "samples.png")  # type: ignore[arg-type]
    replace(folder / "card.json", json.dumps(card, indent=2) + "\n")
    (folder / "state.pt").unlink(missing_ok=True)
    return folder


class Material(NamedTuple):
    """The images of a training.

    Attributes:
        images: those of most steps.
        last: those of the last steps, if they are others.
        held_out: by split, what the trained weights are measured on.
    """

    images: Dataset
    last: Dataset | None
    held_out: dict[str, Dataset]

    @property
    def fingerprints(self) -> list[Any]:
        """What tells the training images from others."""
        return [(d.fingerprint, len(d)) for d in (self.images, self.last) if d is not None]

    def finishing(self, recipe: Recipe) -> dict[str, Any]:
        """What a card says of the last steps; nothing if they are like the others."""
        steps = _finishing(recipe, self)
        if self.last is None or not steps:
            return {}
        return {"finish": data.part(self.last.name), "finishing_images": len(self.last), "finishing_steps": steps}


def _material(dataset: str, finish: str | None, limit: int | None, data_dir: str | None) -> Material:
    """All images of a training, before its first step: a missing split is no surprise for the last one.

    Raises:
        UsageError: if images are missing, have two forms, or are both trained on and held out.
    """
    shown = []
    for source in [dataset, *([finish] if finish else [])]:
        images = data.load(data.part(source, "train"), ALL, data_dir=data_dir)
        shown.append(images if limit is None else images.first(min(limit, len(images))))
    if len({images.form for images in shown}) > 1:
        raise UsageError(f"--finish {finish}: {shown[1].form}, the other images are {shown[0].form}")
    held_out = {split: data.load(data.part(finish or dataset, split), MOST, data_dir=data_dir) for split in SPLITS}
    known = {pixels.numpy().tobytes() for images in shown for pixels in images.pixels}
    for split, images in held_out.items():
        met = sum(pixels.numpy().tobytes() in known for pixels in images.pixels)
        if met > len(images) / 100:  # a few doubles are in most data sets
            raise UsageError(
                f"{met:,} of {len(images):,} images of {split} are among the training images: --dataset and --finish "
                "cut them off differently; let both read the same files: parquet:FOLDER and parquet:FOLDER,only=exact"
            )
    return Material(shown[0], shown[1] if finish else None, held_out)


def _steps(recipe: Recipe, images: Dataset) -> int:
    return len(images) // recipe.batch_size * recipe.epochs


def _finishing(recipe: Recipe, material: Material) -> int:
    """How many of the steps, the last ones, see the finishing images."""
    return 0 if material.last is None else round(recipe.finish * _steps(recipe, material.images))


def _judge(recipe: Recipe, family: str, out: Path) -> Any:
    """What the weights of the judge are, as its card says."""
    if recipe.judge is None:
        return None
    known = checkpoints.cards(family, (out,) if out.is_dir() else ())
    return checkpoints.read_card(known[recipe.judge])["files"]


def paused(folder: Path) -> dict[str, float] | None:
    """Of an unfinished training in ``folder``: its "step", "total" steps and "seconds" per step; None without one."""
    if not (folder / "state.pt").is_file():
        return None
    state = _state(folder / "state.pt")
    return {key: state[key] for key in ("step", "total", "seconds")}


def _state(path: Path) -> dict[str, Any]:
    """What a training saved, in main memory, from whatever device: what takes it over puts it where it belongs."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its reader does
        raise UsageError(f"{path} can't be read ({error}); delete it, and the training begins anew") from error


def _start(recipe: Recipe, images: Dataset, parts: dict[str, nn.Module], out: Path) -> dict[str, dict[str, str]]:
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


def _aside(recipe: Recipe, component: Any, images: Dataset, out: Path, device: str) -> dict[str, Any]:
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


def _fit(
    module: nn.Module,
    recipe: Recipe,
    material: Material,
    state_file: Path,
    device: str,
    aside: dict[str, Any],
    of: str,
    stop_steps: int | None,
) -> int | None:
    """Minimise the objectives; leaves the averaged weights in ``module``.

    Returns how many steps were skipped, or None if it stopped before the end.
    """
    from diffusers.training_utils import EMAModel

    images = material.images.to(device)
    last = None if material.last is None else material.last.to(device)
    total = _steps(recipe, images)
    if not total:
        raise UsageError(f"{len(images):,} training images make no batch of {recipe.batch_size}")
    until = total - _finishing(recipe, material)
    objective = recipe.objective | aside
    probe = _batch(images, recipe, 0, total, device)
    keys = list(module.objectives(*probe, **objective))  # type: ignore[operator]
    critics = {k: v for k, v in aside.items() if isinstance(v, nn.Module)}
    optimisers = {k: _optimiser(module, k, recipe, critics) for k in keys}
    schedules = {
        k: torch.optim.lr_scheduler.LambdaLR(o, lambda step: _one_cycle(step / total)) for k, o in optimisers.items()
    }
    ema = EMAModel(module.parameters(), decay=recipe.ema, foreach=True)
    stateful: dict[str, Any] = {"module": module, "ema": ema} | {f"critic {k}": v for k, v in critics.items()}
    stateful |= {f"optimiser {k}": o for k, o in optimisers.items()} | {f"lr {k}": s for k, s in schedules.items()}
    first = skipped = 0
    if state_file.exists():
        saved = _state(state_file)
        if saved["total"] != total:
            raise UsageError(f"{state_file} is of a training of {saved['total']} steps, not {total}; delete it")
        if saved.get("of") != of:
            raise UsageError(
                f"{state_file} is of another recipe, other images or other weights to start from; delete it, or choose "
                "another --out"
            )
        for k, part in stateful.items():
            part.load_state_dict(saved[k])
        ema.to(device)  # type: ignore[no-untyped-call]
        first, skipped = saved["step"], saved["skipped"]

    end = total if stop_steps is None else min(total, first + stop_steps)
    began = last_save = time.monotonic()
    progress = tqdm(range(first, end), initial=first, total=total, unit="it", desc=state_file.parent.name)
    progress.mininterval = 0.1 if os.isatty(2) else 30
    mean: dict[str, Any] = {k: 0.0 for k in keys}  # on the device: to read a loss waits for it
    for step in progress:
        shown, since = (images, 0) if last is None or step < until else (last, until)
        batch, tape = _batch(shown, recipe, step, total, device, since)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            if recipe.adversarial_eps:
                batch = _adversarial(module, batch, tape, recipe)
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
            mean[k] += (loss.detach() - mean[k]) * max(0.01, 1 / (step - first + 1))
        ema.step(module.parameters())
        if step % SHOWN_EVERY == 0:
            progress.set_postfix({k: f"{float(v):.4g}" for k, v in mean.items()}, refresh=False)
        if time.monotonic() - last_save > SAVE_EVERY or step + 1 == end:
            saved = {k: part.state_dict() for k, part in stateful.items()}
            seconds = (time.monotonic() - began) / (step + 1 - first)
            saved |= {"step": step + 1, "total": total, "skipped": skipped, "of": of, "seconds": seconds}
            torch.save(saved, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            last_save = time.monotonic()
    if end < total:
        return None
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


def _batch(images: Dataset, recipe: Recipe, step: int, total: int, device: str, began: int = 0) -> tuple[Batch, Tape]:
    """The batch of a step and its noise, both functions of (seed, step) alone; of images used since step ``began``."""
    size = min(recipe.batch_size, len(images))
    epoch, position = divmod(step - began, len(images) // size)
    rows = _order(len(images), recipe.seed * 1_000_003 + epoch)[position * size : (position + 1) * size].to(device)
    tape = Tape(recipe.seed, "finish" if began else "train", images.ids[rows], torch.full_like(rows, epoch))
    x = images.images(rows)
    for name in recipe.augment:
        x = AUGMENT[name](x, tape.fold("augment", name))
    return Batch(x, images.labels[rows], step / total), tape


@lru_cache(maxsize=2)
def _order(count: int, seed: int) -> Tensor:
    """The order of an epoch's images."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _flip(x: Tensor, tape: Tape) -> Tensor:
    """Mirror half of the images."""
    return torch.where(tape.uniform("flip", like=x[:, :1, :1, :1]) < 0.5, x.flip(-1), x)


def _crop(x: Tensor, tape: Tape, pad: int = 2) -> Tensor:
    """Shift by up to ``pad`` pixels each way, black moving in."""
    shift = (tape.uniform("crop", like=x[:, 0, :2, 0]) * (2 * pad + 1)).long()
    padded = nn.functional.pad(x, (pad,) * 4)
    down, right = (shift[:, k, None] + torch.arange(side, device=x.device) for k, side in enumerate(x.shape[-2:]))
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[image, :, down[:, :, None], right[:, None, :]].movedim(-1, 1).contiguous()


AUGMENT = {"flip": _flip, "crop": _crop}


def _adversarial(module: nn.Module, batch: Batch, tape: Tape, recipe: Recipe) -> Batch:
    """One signed step from a uniform start in an Linf ball, as the recipe's adversary says."""
    from attacks import Linf

    eps = Fraction(recipe.adversarial_eps or 0)
    around, length, ball = (eps * Fraction(units) for units in ADVERSARIES[recipe.adversary])
    start = Linf(around).random(batch.x, tape.fold("adversarial")).requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(module(start), batch.y), start)
    threat = Linf(ball)
    return batch._replace(x=threat.project(start.detach() + threat.step(gradient, float(length)), batch.x))
