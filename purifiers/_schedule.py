"""The variance-preserving schedule, discrete and continuous, with integer indices from tables."""

from __future__ import annotations

import functools
import math
from typing import TypeAlias

import torch
from torch import Tensor

Time: TypeAlias = float | Tensor
"""A time, or what belongs to it: one number for all rows, or one per row, shape (B, 1, 1, 1)."""


class VP:
    """Variance-preserving noise: z_t = sqrt(alpha_bar(t)) z_0 + sqrt(1 - alpha_bar(t)) n.

    Discrete: beta_i = linspace(beta_min / N, beta_max / N, N), alpha_bar_i = prod_{j <= i} (1 - beta_j).
    Continuous: beta(t) = beta_min + t (beta_max - beta_min), alpha_bar(t) = exp(-int_0^t beta(s) ds).
    They are two schedules: at t = 0.1 alpha_bar is 0.89702 discretely and 0.89628 continuously. Time t in (0, 1]
    belongs to the index round(t N) - 1, so t = 0.1 is index 99 of 1000: the last of 100 noising steps, and the first
    to be undone.

    Reference: Ho et al. 2020 (arXiv 2006.11239), Song et al. 2021 (arXiv 2011.13456).
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, n: int = 1000):
        self.beta_min, self.beta_max, self.n = beta_min, beta_max, n
        betas = torch.linspace(beta_min / n, beta_max / n, n, dtype=torch.float64)
        self.table: list[float] = (1 - betas).cumprod(0).tolist()

    def index(self, t: float) -> int:
        """The discrete index of time t."""
        return round(t * self.n) - 1

    def indices(self, t: Tensor) -> Tensor:
        """The discrete index of each row's time."""
        return (t * self.n).round().long() - 1

    def beta(self, t: Time) -> Time:
        """beta(t), the continuous rate."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def alpha_bar(self, t: Time) -> Time:
        """alpha_bar(t) of the continuous schedule."""
        log = -0.5 * (self.beta_max - self.beta_min) * t * t - self.beta_min * t
        return log.exp() if isinstance(log, Tensor) else math.exp(log)

    def column(self, device: torch.device) -> Tensor:
        """The table on a device, where rows look up their own; it travels once."""
        return _column(self.beta_min, self.beta_max, self.n, device)

    def discrete(self, t: Time) -> Time:
        """alpha_bar of the index of t; before the first index, of one time for all, that of the continuous schedule."""
        if isinstance(t, Tensor):
            return self.column(t.device)[self.indices(t).clamp_min(0)].to(t.dtype)
        i = self.index(t)
        return self.table[i] if i >= 0 else self.alpha_bar(t)

    def times(self, t_star: float, steps: int) -> list[float]:
        """Times of a reverse chain, t_star first, evenly spaced on the index grid, each an exact index.

        The chain then leaves the last time for t = 0. With ``steps`` = t_star N every index is visited once.

        Raises:
            ValueError: if t_star isn't in (0, 1] or there are more steps than indices.
        """
        if not 0 < t_star <= 1:
            raise ValueError(f"t_star must lie in (0, 1], or be 0 for no diffusion, got {t_star}")
        first = self.index(t_star) + 1
        if first < 1:
            raise ValueError(f"t_star={t_star} lies below the first of {self.n} noise levels, {1 / self.n}")
        if not 1 <= steps <= first:
            raise ValueError(f"steps must lie between 1 and t_star · {self.n} = {first}, got {steps}")
        indices = [round(first * (steps - k) / steps) - 1 for k in range(steps)]
        assert all(a > b for a, b in zip(indices, indices[1:], strict=False)), indices
        return [(i + 1) / self.n for i in indices]

    def time(self, t_star: Tensor, k: int, steps: int) -> Tensor:
        """Time k of ``times``, for rows that each start from a t_star of their own."""
        return ((self.indices(t_star) + 1) * (steps - k) / steps).round().to(t_star.dtype) / self.n


@functools.cache
def _column(beta_min: float, beta_max: float, n: int, device: torch.device) -> Tensor:
    return torch.tensor(VP(beta_min, beta_max, n).table, dtype=torch.float64, device=device)
