"""The median of a window around every pixel."""

from __future__ import annotations

from torch import Tensor, nn

from purifiers._base import Images, Purifier
from purifiers._noise import Noise


class Median(Purifier):
    """g(x)_p = median of x over the size × size window around p, edges reflected.

    Args:
        size: side of the window, odd.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``size`` isn't odd and at least 3.

    Reference: Xu et al. 2018 (arXiv 1704.01155).
    """

    dial = "size"
    stochastic = False

    def __init__(self, *, size: int = 3, rounds: int = 1):
        super().__init__(rounds=rounds)
        if size < 3 or size % 2 == 0:
            raise ValueError(f"size must be odd and at least 3, got {size}")
        self.size = size

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, None]:
        return x, None

    def finish(self, state: Tensor, context: None) -> Images:
        padded = nn.functional.pad(state, (self.size // 2,) * 4, mode="reflect")
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        return windows.flatten(-2).median(-1).values
