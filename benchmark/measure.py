"""What trained weights do on images that they never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmark import checkpoints
from benchmark.dataset import Dataset
from benchmark.recipes import Recipe
from purifiers import Batch, Tape

SPLITS = ("validation", "test")
MOST = 10_000
"""Images that are measured on, if there are as many, and network evaluations that go into them."""
FEW = 800
"""Images that a purifier of many steps is measured on, and that a Fréchet distance is of, if it has fewer features."""
VICTIMS = ("resnet", "resnet18")
"""Classifiers of our own, one of them for each data set; the first that has weights looks at purified images."""


def measure(
    module: nn.Module,
    recipe: Recipe,
    held_out: dict[str, Dataset],
    aside: dict[str, Any] | None = None,
    root: Path | None = None,
    *,
    limit: int | None = None,
) -> dict[str, dict[str, float | None]]:
    """What trained weights do on images by split: the objective and the accuracy, with n.

    Of a purifier the accuracy is that of the first of ``VICTIMS`` which has weights, in ``root`` or shipped, on images
    purified once; beside it stands the Fréchet distance between its features of the first ``FEW`` images purified and
    as they are: None where there are fewer, or no more than features. Purifiers of many steps are measured on the first
    ``MOST`` / NFE images, at least ``FEW``.
    """
    module.eval()
    device = next(module.parameters()).device
    form = next(iter(held_out.values())).form
    roots = (root,) if root is not None and root.is_dir() else ()
    name = next((v for v in VICTIMS if v in checkpoints.cards(form.family, roots)), None)
    victim = None
    if recipe.kind == "purifiers" and name:
        victim = checkpoints.build("classifiers", name, checkpoints.Need(form, roots=roots)).module.to(device)
    # a cut is drawn for a whole batch: the value of few batches would be of few cuts, so that none is made
    asked = recipe.objective | ({"nested": False} if "nested" in recipe.objective else {})
    measured: dict[str, dict[str, float | None]] = {}
    for split, images in held_out.items():
        most = min(len(images), MOST, max(MOST // getattr(module, "nfe", 1), FEW))
        images = images.first(most if limit is None else min(limit, most))
        sums: dict[str, float] = {}
        features: list[tuple[Tensor, Tensor]] = []
        for first in range(0, len(images), 250):
            rows = slice(first, first + 250)
            batch = Batch(images.images(rows).to(device), images.labels[rows].to(device))
            tape = Tape(recipe.seed, "measure", images.ids[rows]).to(device)
            with torch.no_grad():
                losses = module.objectives(batch, tape, **asked, **aside or {})  # type: ignore[operator]
                values = {f"objective of {k}": float(v) for k, v in losses.items()}
                if recipe.kind == "classifiers":
                    values["accuracy"] = float((module(batch.x).argmax(1) == batch.y).float().mean())
                elif victim is not None:
                    purified, logits = last_features(victim, module(batch.x, tape.fold("purify")))
                    features.append((last_features(victim, batch.x)[0], purified))
                    values[f"accuracy with {name}"] = float((logits.argmax(1) == batch.y).float().mean())
            for k, v in values.items():
                sums[k] = sums.get(k, 0.0) + v * len(batch.y)
        found: dict[str, float | None] = {k: round(v / len(images), 6) for k, v in sums.items()}
        measured[split] = found | {"n": len(images)}
        if features:
            sides = [torch.cat(side)[:FEW].double().cpu().numpy() for side in zip(*features, strict=True)]
            enough = len(sides[0]) == FEW > sides[0].shape[1]
            measured[split][f"frechet with {name}"] = round(frechet(*sides), 6) if enough else None
    return measured


def last_features(classifier: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a classifier's last linear layer takes, (B, d), and the logits of images."""
    *_, last = (layer for layer in classifier.modules() if isinstance(layer, nn.Linear))
    taken: list[Tensor] = []
    hook = last.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0]))
    try:
        logits = classifier(x)
    finally:
        hook.remove()
    return taken[0], logits


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """d² = ‖m_a - m_b‖² + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), of the means and covariances of features (N, d).

    Between Gaussians it is the squared Wasserstein distance. It shrinks with more images: compare at equal n only.

    Reference:
        Heusel et al. 2017, arXiv 1706.08500.
    """
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    squares = np.linalg.eigvals(s_a @ s_b).real.clip(0)  # those of the root, squared: no root of a singular matrix
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a) + np.trace(s_b) - 2 * np.sqrt(squares).sum())
