"""Square Attack: random search over square patches, with every loss a mean over draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attacks._base import Attack, State, first_broken
from attacks._gradient import Victim, margin
from attacks._threat import ThreatModel


class Square(Attack):
    """x_{k+1} = the better of x_k and x_k with one random square changed, by the margin max_{i≠y} z_i - z_y.

    Linf: the square becomes x ± eps, one sign per channel. L2: what two squares and the unused budget hold is moved
    into one of them, along a peaked pattern. The side of the square shrinks with the queries. The start is vertical
    stripes of ± eps (Linf) or a grid of patterns (L2).

    On a stochastic defense the margin is a mean over ``eot`` draws. The draws are the same for ``refresh`` queries, so
    that x_k and its rival are compared under equal noise, and then renewed, and x_k with them, so that the search
    doesn't live on one lucky set: with fresh draws for every query the best margin would be a record of luck.

    Args:
        queries: evaluations of the defense's mean margin.
        eot: draws per evaluation.
        share: the first square's share of the image's pixels.
        refresh: queries under one set of draws.

    Raises:
        ValueError: if a count is below 1 or the share isn't in (0, 1].

    Reference: Andriushchenko et al. 2020 (arXiv 1912.00049), algorithms 1-3.
    """

    black_box = True
    HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    """When the share is halved, out of 10,000 queries."""

    def __init__(self, *, queries: int = 5000, eot: int = 20, share: float = 0.8, refresh: int = 100):
        if min(queries, eot, refresh) < 1 or not 0 < share <= 1:
            got = f"{queries}, {eot}, {refresh}, {share}"
            raise ValueError(f"queries, eot and refresh must be at least 1, share in (0, 1], got {got}")
        self.queries, self.eot, self.share, self.refresh = queries, eot, share, refresh

    def display(self, stochastic: bool) -> str:
        return f"Square ({self.queries} queries{f', EOT {self.eot}' if stochastic else ''})"

    def length(self, stochastic: bool) -> int:
        return self.queries

    def evaluations(self, stochastic: bool) -> int:
        renewals = (self.queries - 1) // self.refresh if stochastic else 0
        return (self.queries + renewals) * self.eot

    def gradients(self, stochastic: bool) -> int:
        return 0

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        return {
            "x_adv": x.clone(),
            "margin": torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device),
            "broken_at": torch.full((len(x),), -1, device=x.device),
        }

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        s = dict(state)
        draws = ("square", "draws", k // self.refresh)
        if victim.stochastic and k > 0 and k % self.refresh == 0:
            s["margin"] = victim.evaluate(s["x_adv"], y, margin, *draws, eot=self.eot, gradient=False).loss
        noise = victim.tape.fold("square", k)
        move = {"Linf": _squares, "L2": _peaks}[threat.norm]
        side = self._side(k, x.shape[-2] * x.shape[-1], min(x.shape[-2:]))
        rival = threat.project(move(s["x_adv"], x, threat.bound, side, noise, first=k == 0), x)
        found = victim.evaluate(rival, y, margin, *draws, eot=self.eot, gradient=False)
        s["broken_at"] = first_broken(s["broken_at"], found, k)
        better = found.loss > s["margin"]
        s["x_adv"] = torch.where(better.view(-1, 1, 1, 1), rival, s["x_adv"])
        s["margin"] = torch.where(better, found.loss, s["margin"])
        return s

    def finish(self, state: State) -> Tensor:
        return state["x_adv"][None]

    def _side(self, k: int, pixels: int, shorter: int) -> int:
        """The square's side at query k: sqrt(share · pixels), halving the share as the search goes on."""
        share = self.share / 2 ** sum(k * 10_000 >= h * self.queries for h in self.HALVINGS)
        return min(max(round((share * pixels) ** 0.5), 1), shorter)


def _signs(noise: Any, *site: str | int, like: Tensor) -> Tensor:
    """Random signs of the shape of ``like``."""
    return torch.where(noise.uniform(*site, like=like) < 0.5, -1.0, 1.0).to(like)


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
        return x + eps * _signs(noise, "stripes", like=x[:, :, :1, :])
    rows, columns = _place(noise, "square", x, side)
    grid_rows = torch.arange(x.shape[-2], device=x.device).view(1, 1, -1, 1)
    grid_columns = torch.arange(x.shape[-1], device=x.device).view(1, 1, 1, -1)
    inside = ((grid_rows >= rows[:, :, :1]) & (grid_rows <= rows[:, :, -1:])) & (
        (grid_columns >= columns[..., :1]) & (grid_columns <= columns[..., -1:])
    )
    return torch.where(inside, x + eps * _signs(noise, "signs", like=x[:, :, :1, :1]), x_adv)


def _peaks(x_adv: Tensor, x: Tensor, eps: float, side: int, noise: Any, *, first: bool) -> Tensor:
    """L2: mass moved into one square along a peaked pattern, or at first a grid of patterns."""
    batch, channels, height, width = x.shape
    if first:
        tile = max(min(height, width) // 5, 1)
        delta = torch.zeros_like(x)
        for r in range(0, height - tile + 1, tile):
            for c in range(0, width - tile + 1, tile):
                signs = _signs(noise, "grid", r, c, like=x[:, :, :1, :1])
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
    signs = _signs(noise, "signs", like=x[:, :, :1, :1])
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
