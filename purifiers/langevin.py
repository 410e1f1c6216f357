"""Langevin dynamics on a diffusion model's density, anchored at the input."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from purifiers import _sampler
from purifiers._base import Images
from purifiers._denoiser import Denoiser, root
from purifiers._diffusion import Kept
from purifiers._noise import Noise
from purifiers.diffpure import DiffPure


class Langevin(DiffPure):
    """z_{k+1} = z_k + ½ rate (s(z_k, t_star) - (z_k - z_x) / anchor²) + eta sqrt(rate) ξ, from z_x = 2x - 1.

    DiffPure's LD-SDE by Euler-Maruyama: for eta = 1 and small steps it samples p(z) exp(-‖z - z_x‖² / (2 anchor²)).
    Nothing is diffused: the score is that of one small noise level, the input is never left.

    Args:
        unet: as DiffPure.
        t_star: the time whose score is followed, in (0, 1].
        steps: of the dynamics.
        rate: of a step; the published lambda 0.01 times the step 0.01.
        anchor: deviation of the Gaussian around the input, on [-1, 1]; the published sigma² is 1e-3.
        eta: temperature of the noise.
        labels: as DiffPure.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if t_star isn't in (0, 1], ``steps`` is below 1, ``rate`` or ``anchor`` isn't positive, ``eta`` is
            negative, or a step is so long that it overshoots the anchor or the score.

    Reference: Nie et al. 2022 (arXiv 2205.07460), appendix C.
    """

    dial = "anchor"

    def __init__(
        self,
        unet: nn.Module,
        *,
        t_star: float = 0.01,
        steps: int = 100,
        rate: float = 1e-4,
        anchor: float = 0.0316,
        eta: float = 5.0,
        labels: str = "index",
        rounds: int = 1,
    ):
        if not 0 < t_star <= 1:
            raise ValueError(f"t_star must lie in (0, 1], got {t_star}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not (rate > 0 and anchor > 0):
            raise ValueError(f"rate and anchor must be positive, got {rate} and {anchor}")
        if eta < 0:
            raise ValueError(f"eta must not be negative, got {eta}")
        super().__init__(unet, t_star=t_star, steps=1, labels=labels, rounds=rounds)
        # the drift's slope: the anchor's, and at most that of a score that sees nothing but noise
        most = 2 / (1 / anchor**2 + 1 / (1 - self.denoiser.alpha_bar(t_star)))
        if rate > most:
            raise ValueError(
                f"rate={rate} overshoots at anchor={anchor} and t_star={t_star}: it must be at most {most:.3g}; "
                "a larger t_star or anchor bears more"
            )
        self.chains, self.steps, self.per_chain = [[t_star] * steps], steps, steps
        self.rule = partial(_sampler.langevin, rate=rate, eta=eta)
        self.anchor, self.stochastic = anchor, eta > 0

    def enter(self, x: Images, noise: Noise) -> tuple:
        z, context = super().enter(x, noise)
        return z, context._replace(reference=z)

    def start(self, x: Images, noise: Noise) -> tuple:
        return self.enter(x, noise)

    def denoising(self, k: int, context: Kept, noise: Noise) -> Denoiser:
        z_x: Any = context.reference
        return self.denoiser.edited(
            lambda denoiser, z, t, n: n + root(1 - denoiser.alpha_bar(t)) * (z - z_x) / self.anchor**2
        )

    def diffused(self, k: int, x: Images, noise: Noise) -> None:
        return None  # the chain has no noise levels to stand at
