"""Why a purifier does what it does: what it loses of an image, and what it lets through of a perturbation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark import report
from benchmark.errors import UsageError
from benchmark.replay import Replay, codes
from benchmark.spectra import ratio, spectrum


def diagnosis(replayed: Replay) -> dict[str, Any]:
    """Facts of one run's images, each over all images and the first verdict draw; None where there is none.

    - ``moved``: rms(g(x) - x), in [0, 1] pixel units: what purification itself changes.
    - ``fine_kept_ratio``: power of g(x) above half of the Nyquist frequency, as a share of that of x: small is blur.
    - ``variety_ratio``: variance over images of g(x), as a share of that of x: near 0 is collapse to one image.
    - ``passed_ratio``: median of ‖g(x') - g(x)‖ / ‖x' - x‖ under one noise: above 1 an attack is enlarged.
    - ``aligned``: median cosine of g(x') - g(x) with x' - x: near 1 is a leak, near 0 another image altogether.
    - ``codes_used``: exp(entropy) of the codes in use; None without a codebook.
    - ``kept_by_frequency``, ``passed_by_frequency``: power of g(x) as a share of that of x, and of g(x') - g(x) as a
      share of that of x' - x, at 1/N … 1/2 cycles per pixel.
    """
    x, g, moved = replayed.x.double(), replayed.unmoved.double(), (replayed.x_adv - replayed.x).double()
    carried = replayed.purified_adv.double() - g
    lengths = moved.flatten(1).norm(dim=1), carried.flatten(1).norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(moved.flatten(1), carried.flatten(1))
    attacked = lengths[0] > 0
    used = codes(replayed)
    names = replayed.run["names"]
    return {
        "purifier": names["purifier"],
        "classifier": names["classifier"],
        "display": names["display"],
        "view": report.row(replayed.run, replayed.records)["view"],
        "n": len(x),
        "moved": float((g - x).square().mean().sqrt()),
        "fine_kept_ratio": _fine(g) / _fine(x),
        "variety_ratio": float(g.var(0).sum() / x.var(0).sum()) if len(x) > 1 else None,
        "passed_ratio": float((lengths[1] / lengths[0])[attacked].median()) if attacked.any() else None,
        "aligned": float(cosine[attacked].median()) if attacked.any() else None,
        "codes_used": None if used is None else _perplexity(used),
        "kept_by_frequency": ratio(spectrum(g), spectrum(x)),
        "passed_by_frequency": ratio(spectrum(carried), spectrum(moved)),
        "run": str(replayed.run["folder"]),
    }


def saved(path: Path) -> list[dict[str, Any]]:
    """What ``diagnose --json`` once printed.

    Raises:
        UsageError: if the file is something else.
    """
    try:
        return json.loads(path.read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no saved diagnosis ({error}); write one: diagnose FOLDER --json > FILE") from error


def render(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown line per run."""
    heads = "purifier|classifier|attack|view|n|moved (rms)|fine detail kept|variety kept|passed|aligned|codes used"
    lines = [f"| {' | '.join(heads.split('|'))} |", "|" + "---|" * len(heads.split("|"))]
    for f in found:
        used = "–" if f["codes_used"] is None else f"{f['codes_used']:.0f}"
        ratios = [
            "–" if f[k] is None else f"{f[k]:.2f}"
            for k in ("fine_kept_ratio", "variety_ratio", "passed_ratio", "aligned")
        ]
        cells = [
            f["purifier"],
            f["classifier"],
            f["display"],
            f["view"],
            str(f["n"]),
            f"{f['moved']:.3f}",
            *ratios,
            used,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "Moved: rms of g(x) - x, pixels in [0, 1]. Fine detail: power of g(x) above half of the Nyquist frequency, as "
        "a share of that of x. Variety: variance over images, likewise. Passed: of a perturbation, median of "
        "‖g(x') - g(x)‖ / ‖x' - x‖ under one draw of noise; aligned: their cosine. Codes used: exp of their entropy."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _fine(images: Tensor) -> float:
    """Power above half of the Nyquist frequency in either direction, without the mean."""
    power = torch.fft.fft2(images - images.mean((2, 3), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(n, device=images.device).abs() for n in images.shape[-2:])
    return float(power[..., (rows[:, None] > 0.25) | (columns > 0.25)].sum())


def _perplexity(used: Tensor) -> float:
    shares = used.flatten().bincount().double() / used.numel()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
