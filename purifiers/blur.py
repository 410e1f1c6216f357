"""Convolution with a Gaussian."""

from __future__ import annotations

import math

from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from purifiers._base import Images, Purifier
from purifiers._noise import Noise


class Blur(Purifier):
    """g(x) = x * N(0, sigma² I), the kernel cut at 3 sigma, edges reflected.

    Args:
        sigma: width of the Gaussian in pixels.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``sigma`` isn't positive, or 3 sigma reach across an image.
    """

    dial = "sigma"
    stochastic = False

    def __init__(self, *, sigma: float = 1.0, rounds: int = 1):
        super().__init__(rounds=rounds)
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        self.sigma = sigma

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, None]:
        if math.ceil(3 * self.sigma) >= min(x.shape[-2:]):
            raise ValueError(f"3 sigma reach across images of {tuple(x.shape[-2:])}, got sigma={self.sigma}")
        return x, None

    def finish(self, state: Tensor, context: None) -> Images:
        return gaussian_blur(state, [2 * math.ceil(3 * self.sigma) + 1] * 2, [self.sigma] * 2).clamp(0, 1)
