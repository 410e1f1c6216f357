"""Grids of small images: what a purifier's own model draws."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from benchmark.dataset import Form
from purifiers import Purifier, Tape

TILE = 64
"""Pixels a side of an image in a grid, at most."""
AT_ONCE = 32
"""Samples drawn together."""


def samples(purifier: Purifier, form: Form, path: Path, *, count: int = 64, seed: int = 0) -> Path | None:
    """A square of images that the purifier's own model draws, as PNG; None where it has no model of images."""
    device = next((p.device for p in purifier.parameters()), torch.device("cpu"))
    drawn = []
    for ids in torch.arange(count).split(AT_ONCE):
        like = torch.zeros(len(ids), *form.shape, device=device)
        with torch.no_grad():
            found = purifier.sample(like, Tape(seed, "sample", ids).to(device))
        if found is None:
            return None
        drawn.append(found.cpu())
    return tiled(torch.cat(drawn), math.isqrt(count - 1) + 1, path)


def tiled(images: Tensor, columns: int, path: Path) -> Path:
    """A PNG of images (N, C, H, W) in rows, their pixels as they are, of large ones ``TILE`` a side."""
    from PIL import Image
    from torchvision.utils import make_grid

    tiles = images.clamp(0, 1).expand(-1, 3, -1, -1)
    if (side := max(tiles.shape[-2:])) > TILE:
        tiles = torch.nn.functional.interpolate(tiles, scale_factor=TILE / side, mode="area")
    grid = make_grid(tiles, nrow=columns, padding=2, pad_value=1.0)
    temporary = path.with_suffix(".new.png")
    picture = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    (picture.convert("L") if images.shape[1] == 1 else picture).save(temporary, optimize=True)
    temporary.replace(path)
    return path
