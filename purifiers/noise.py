"""Noise added, and nothing taken away: randomised smoothing's input."""

from __future__ import annotations

from torch import Tensor

from purifiers._base import Images, Purifier
from purifiers._noise import Noise


class Noisy(Purifier):
    """g(x) = clamp(x + sigma n), n ~ N(0, I).

    Args:
        sigma: standard deviation in [0, 1] pixel units.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``sigma`` isn't positive.

    Reference: Cohen et al. 2019 (arXiv 1902.02918).
    """

    dial = "sigma"

    def __init__(self, *, sigma: float = 0.1, rounds: int = 1):
        super().__init__(rounds=rounds)
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        self.sigma = sigma

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, None]:
        return x + self.sigma * noise.normal("noise", like=x), None

    def finish(self, state: Tensor, context: None) -> Images:
        return state.clamp(0, 1)
