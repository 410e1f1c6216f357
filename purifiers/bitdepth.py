"""Fewer grey levels."""

from __future__ import annotations

from torch import Tensor

from purifiers._base import Images, Purifier
from purifiers._noise import Noise
from purifiers._rounding import ROUND


class BitDepth(Purifier):
    """g(x) = round((2^bits - 1) x) / (2^bits - 1).

    Rounding has no gradient; ``surrogates``: "ste" takes it for the identity, "soft" for v - 0.9 sin(2πv) / 2π.

    Args:
        bits: per channel, 1 to 8.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``bits`` isn't in 1 … 8.

    Reference: Xu et al. 2018 (arXiv 1704.01155).
    """

    dial = "bits"
    stochastic = False
    differentiable = False
    surrogates = ("ste", "soft")

    def __init__(self, *, bits: int = 3, rounds: int = 1):
        super().__init__(rounds=rounds)
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must lie in 1 ... 8, got {bits}")
        self.levels = 2**bits - 1

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, None]:
        return self.levels * x, None

    def finish(self, state: Tensor, context: None) -> Images:
        return ROUND[self.through](state) / self.levels  # in [0, 1]; a clamp has no gradient at its ends
