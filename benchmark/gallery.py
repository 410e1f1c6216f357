"""Galleries: what purifiers make of images, attacked and not, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark.errors import UsageError
from benchmark.plots import STYLE, written
from benchmark.replay import Replay
from benchmark.samples import tiled

HEADS = ("clean", "attacked", "difference", "g(clean)", "g(attacked)")
ROWS = ("clean", "attacked", "g(clean)", "g(attacked)")
"""The rows of a run's own gallery."""
SHOWN = 8
"""How many images it has."""
RIGHT, WRONG = "#15803d", "#c2410c"


def gallery(replays: Sequence[Replay], path: Path) -> list[Path]:
    """A row per run, and per image: clean, adversarial, their difference enlarged, and both purified by one draw.

    Under an image stands the class that its purified version got in the run's first draw, under purified images green
    where it is the label. Written as PDF and PNG.

    Raises:
        UsageError: if the runs attacked different images.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = [[(r["id"], r["label"]) for r in replayed.records] for replayed in replays]
    sources = {replayed.run["identity"]["fingerprint"] for replayed in replays}
    if len(sources) > 1 or any(other != labels[0] for other in labels):
        raise UsageError("a gallery compares purifiers on the same images; the runs attacked different ones")
    count, columns = len(labels[0]), len(HEADS)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(
            len(replays), count * columns + count - 1, squeeze=False,
            figsize=(0.2 + 0.62 * (count * columns + 0.3 * (count - 1)), 0.35 + 0.78 * len(replays)),
            width_ratios=([1] * columns + [0.3]) * (count - 1) + [1] * columns,
        )  # fmt: skip
        for line, replayed in zip(axes, replays, strict=True):
            for cell in line:
                cell.set_axis_off()
            for k, record in enumerate(replayed.records):
                here = line[k * (columns + 1) : k * (columns + 1) + columns]
                _strip(here, replayed, k, record)
        for k in range(count):
            for head, cell in zip(HEADS, axes[0][k * (columns + 1) :], strict=False):
                cell.set_title(head, fontsize=5.5, pad=3)
        for line, replayed in zip(axes, replays, strict=True):
            line[0].text(
                -0.15, 0.5, replayed.run["names"]["purifier"], transform=line[0].transAxes, rotation=0, ha="right",
                va="center", fontsize=7,
            )  # fmt: skip
        figure.subplots_adjust(wspace=0.06, hspace=0.28)
        return written(figure, path.with_suffix(""), dpi=200)


def beside(replayed: Replay) -> Path:
    """``gallery.png`` in the run's own folder, where the page finds it.

    A row each of ``ROWS``, a column per image, as the run's first draws made them.
    """
    rows = torch.stack((replayed.x, replayed.x_adv, replayed.purified, replayed.purified_adv))
    return tiled(rows.flatten(0, 1), rows.shape[1], Path(replayed.run["folder"]) / "gallery.png")


def _strip(cells: Sequence[Any], replayed: Replay, k: int, record: dict[str, Any]) -> None:
    """One image of one run."""
    x, x_adv = replayed.x[k], replayed.x_adv[k]
    difference = x_adv - x
    # grey is no change; as large as fits, at most 10 times
    factor = min(10.0, 0.5 / max(float(difference.abs().max()), 1e-6))
    pictures = (x, x_adv, 0.5 + factor * difference, replayed.purified[k], replayed.purified_adv[k])
    for cell, picture in zip(cells, pictures, strict=True):
        array = picture.clamp(0, 1).permute(1, 2, 0).numpy()
        if array.shape[-1] == 1:
            cell.imshow(array[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        else:
            cell.imshow(array, interpolation="nearest")
    below = {"fontsize": 6, "ha": "center", "va": "top"}
    cells[0].text(0.5, -0.04, f"label {record['label']}", transform=cells[0].transAxes, **below)
    cells[2].text(0.5, -0.04, f"× {factor:.3g}", transform=cells[2].transAxes, **below)
    for cell, key in ((cells[3], "clean"), (cells[4], "adv")):
        right = record[key][0] == record["label"]
        cell.text(0.5, -0.04, f"{record[key][0]} {'✓' if right else '✗'}", transform=cell.transAxes,
                  color=RIGHT if right else WRONG, **below)  # fmt: skip
