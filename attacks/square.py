"""Square Attack: random search over square patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attacks._gradient import Victim
from attacks._search import RandomSearch
from attacks._threat import ThreatModel, random_signs


class Square(RandomSearch):
    """Random search whose proposal is x_k with one random square changed.

    Linf: the square becomes x ± eps, one sign per channel. L2: what two squares and the unused budget hold is moved
    into one of them, along a peaked pattern. The side of the square shrinks with the queries. The first proposal is
    vertical stripes of ± eps (Linf) or a grid of patterns (L2).

    Args:
        share: the first square's share of the image's pixels.
        queries, eot, refresh: as ``RandomSearch``.

    Raises:
        ValueError: as every random search, and if the share isn't in (0, 1].

    Reference: Andriushchenko et al. 2020 (arXiv 1912.00049), algorithms 1-3.
    """

    norms = ("Linf", "L2")
    HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    """When the share is halved, out of 10,000 queries."""

    def __init__(self, *, share: float = 0.8, **search: Any):
        super().__init__(**search)
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        self.share = share

    def propose(self, k: int, x_adv: Tensor, x: Tensor, victim: Victim, threat: ThreatModel) -> Tensor:
        move = {"Linf": _squares, "L2": _peaks}[threat.norm]
        side = self._side(k, x.shape[-2] * x.shape[-1], min(x.shape[-2:]))
        return threat.project(move(x_adv, x, threat.bound, side, victim.tape.fold(self.site, k), first=k == 0), x)

    def _side(self, k: int, pixels: int, shorter: int) -> int:
        """The square's side at query k: sqrt(share · pixels), halving the share as the search goes on."""
        share = self.share / 2 ** sum(k * 10_000 >= h * self.queries for h in self.HALVINGS)
        return min(max(round((share * pixels) ** 0.5), 1), shorter)


def _place(noise: Any, site: str, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of one random square per image: indices of shape (B, 1, side, 1) and (B, 1, 1, side)."""
    first = x[:, :1, :1, :1]
    corner = [
        (noise.uniform(site, axis, like=first) * (size - side + 1)).long().clamp_max(size - side)
        for axis, size in (("row", x.shape[-2]), ("column", x.shape[-1]))
    ]
    steps = torch.arange(side, device=x.device)
    return corner[0] + steps.view(1, 1, -1, 1), corner[1] + steps.view(1, 1, 1, -1)


def _squares(x_adv: Tensor, x: Tensor, eps: float, side: int, noise: Any, *, first: bool) -> Tensor:
    """Linf: x ± eps within a square, or at first in vertical stripes."""
    if first:
        return x + eps * random_signs(noise, "stripes", like=x[:, :, :1, :])
    rows, columns = _place(noise, "square", x, side)
    grid_rows = torch.arange(x.shape[-2], device=x.device).view(1, 1, -1, 1)
    grid_columns = torch.arange(x.shape[-1], device=x.device).view(1, 1, 1, -1)
    inside = ((grid_rows >= rows[:, :, :1]) & (grid_rows <= rows[:, :, -1:])) & (
        (grid_columns >= columns[..., :1]) & (grid_columns <= columns[..., -1:])
    )
    return torch.where(inside, x + eps * random_signs(noise, "signs", like=x[:, :, :1, :1]), x_adv)


def _peaks(x_adv: Tensor, x: Tensor, eps: float, side: int, noise: Any, *, first: bool) -> Tensor:
    """L2: mass moved into one square along a peaked pattern, or at first a grid of patterns."""
    batch, channels, height, width = x.shape
    if first:
        tile = max(min(height, width) // 5, 1)
        delta = torch.zeros_like(x)
        for r in range(0, height - tile + 1, tile):
            for c in range(0, width - tile + 1, tile):
                signs = random_signs(noise, "grid", r, c, like=x[:, :, :1, :1])
                delta[:, :, r : r + tile, c : c + tile] = signs * _pattern(tile, noise.fold(r, c), x)
        return x + eps * delta / _norm(delta, (1, 2, 3))
    side = max(side, min(3, height, width))
    nu = x_adv - x
    image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    into = (image, channel, *_place(noise, "into", x, side))
    source = (image, channel, *_place(noise, "from", x, side))
    unused = (eps**2 - nu.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
    cleared = nu.clone()
    cleared[into] = 0
    cleared[source] = 0
    held = nu.square().sum((2, 3), keepdim=True) - cleared.square().sum((2, 3), keepdim=True)
    available = (held.clamp_min(0) + unused / channels).sqrt()
    own = nu[into]
    pattern = _pattern(side, noise, x)
    signs = random_signs(noise, "signs", like=x[:, :, :1, :1])
    shape = signs * pattern / _norm(pattern, (2, 3)) + own / _norm(own, (2, 3))
    cleared[into] = shape / _norm(shape, (2, 3)) * available
    return x + cleared


def _norm(v: Tensor, axes: tuple[int, ...]) -> Tensor:
    return v.square().sum(axes, keepdim=True).sqrt().clamp_min(1e-12)


def _pattern(side: int, noise: Any, x: Tensor) -> Tensor:
    """Two peaks of opposite sign side by side, or one above the other, per image: shape (B, 1, side, side).

    A peak is sum_{k=0}^{M} 1 / (n + 1 - k)² with n half its height and M counting rings from the rim inwards.
    """
    half = side // 2
    both = torch.cat([_peak(side, half), -_peak(side, side - half)], 1).to(x)
    lying = noise.uniform("turn", like=x[:, :1, :1, :1]) < 0.5
    return torch.where(lying, both, both.T)


def _peak(height: int, width: int) -> Tensor:
    if width == 0:
        return torch.zeros(height, 0)
    n = height // 2
    rows = (torch.arange(height) - n).abs()[:, None]
    columns = (torch.arange(width) - width // 2).abs()[None]
    rings = (n - torch.maximum(rows, columns)).clamp_min(0)
    heights = torch.cumsum(1.0 / (n + 1 - torch.arange(n + 1)) ** 2, 0)
    return heights[rings]
