"""One image file, purified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from benchmark import checkpoints
from benchmark.errors import UsageError
from benchmark.foreign import Foreign
from benchmark.pictures import deep
from benchmark.repeatable import make_repeatable
from purifiers import Purifier, Tape
from purifiers._base import call


def purify(
    source: Path,
    target: Path,
    purifier: str,
    need: checkpoints.Need,
    *,
    resize: bool,
    seed: int,
    device: str = "cpu",
) -> str:
    """Write a purified copy of an image; returns the purifier's canonical spec, and what else was done to the image.

    The image is read in the data set's channels, 8 bits each. Draws depend on the seed alone.

    Raises:
        UsageError: if the file isn't an image or is of another size than the purifier takes; if the target exists.
    """
    if target.exists():
        raise UsageError(f"--out {target} exists; nothing was overwritten")
    channels, height, width = need.form.shape
    try:
        with Image.open(source) as opened:
            if deep(opened):
                raise UsageError(f"{source} has {opened.mode} pixels; convert it to 8 bits a channel")
            mode = "L" if channels == 1 else "RGB"
            changed = "" if opened.mode == mode else f"; read as {mode}, it was {opened.mode}"
            image = opened.convert(mode)
    except FileNotFoundError:
        raise UsageError(f"{source}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UsageError(f"{source} isn't an image that Pillow reads: {error}") from error
    if image.size != (width, height):
        if not resize:
            raise UsageError(
                f"{source} has {image.width}×{image.height} pixels, purifiers for {need.form.family} take "
                f"{width}×{height}: --resize scales it, or name another --dataset"
            )
        changed += f"; scaled from {image.width}×{image.height}"
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    component = checkpoints.build("purifiers", purifier, need)
    x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).view(1, height, width, -1).permute(0, 3, 1, 2)
    make_repeatable(torch.device(device))
    tape = Tape(seed, "purify", torch.zeros(1, dtype=torch.long)).to(device)
    x = x.contiguous()
    module = component.module.to(device)
    if not isinstance(module, Purifier):
        module = Foreign(module, x.to(device))
    with torch.no_grad():
        clean = call(module, x.to(device), tape).cpu()
    if clean.shape != x.shape or not clean.isfinite().all():
        what = f"shape {tuple(clean.shape)}" if clean.shape != x.shape else "values that aren't finite"
        raise UsageError(f"{component.spec} returned {what} for an image of shape {tuple(x.shape)}; check says more")
    pixels = (clean[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    try:
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(target)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {target}: {error}; name a file such as clean.png in a folder that exists") from error
    return f"{component.spec}{changed}"
