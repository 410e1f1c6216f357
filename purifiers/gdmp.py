"""Guided diffusion: DiffPure whose reverse chain is pulled towards the input."""

from __future__ import annotations

from typing import Any

from torch import nn

from purifiers import _structure
from purifiers._base import Images
from purifiers._denoiser import Denoiser
from purifiers._diffusion import Kept
from purifiers._noise import Noise
from purifiers.diffpure import DiffPure


class GDMP(DiffPure):
    """DiffPure with the score s - w (z - z^adv_t), z^adv_t the input diffused to t anew at every step.

    The pull keeps the content of the image where DiffPure would need a small t_star for it; the same pull carries the
    perturbation. It is a sum over one image, never a mean over a batch, and the gradient to the input goes through it.

    Args:
        unet: as DiffPure.
        t_star: as DiffPure; the published CIFAR-10 setting is four rounds of 36 steps, each guided by the first input
            (and with clamped predictions and the larger variance beta_t, where eta=1 has the posterior's).
        steps: as DiffPure, from each time.
        rule, eta, labels, rounds: as DiffPure.
        strength: of the pull; 18.7 is published: 2 · 60,000 · 3 / (16/255), over the 307,200 numbers in a batch.
        weighting: "matched": w = strength · sigma / sqrt(alpha_bar), strong where noise drowns the perturbation;
            "constant": w = strength.

    Raises:
        ValueError: as DiffPure; if ``strength`` is negative, ``weighting`` neither, or a step overshoots.

    Reference: Wang et al. 2022 (arXiv 2205.14969).
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        t_star: float | list = [0.036, 0.036, 0.036, 0.036],  # noqa: B006  # read only
        steps: int = 36,
        rule: str = "eta",
        eta: float = 1.0,
        labels: str = "index",
        strength: float = 18.7,
        weighting: str = "matched",
        rounds: int = 1,
    ):
        super().__init__(unet, t_star=t_star, steps=steps, rule=rule, eta=eta, labels=labels, rounds=rounds)
        if strength < 0:
            raise ValueError(f"strength must not be negative, got {strength}")
        if weighting not in _structure.WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(_structure.WEIGHTINGS)}, got {weighting!r}")
        self.strength, self.matched = strength, weighting == "matched"
        self.check_pull(strength, self.matched)

    def enter(self, x: Images, noise: Noise) -> tuple:
        z, context = super().enter(x, noise)
        return z, context._replace(reference=z)

    def denoising(self, k: int, context: Kept, noise: Noise) -> Denoiser:
        z_x: Any = context.reference
        pull = _structure.guided(z_x, noise.fold("guide", k), strength=self.strength, matched=self.matched)
        return self.denoiser.edited(pull)

    def sde(self) -> None:
        return None  # the pull draws noise of its own at every step
