"""Low-frequency PGD: what survives a purifier that removes high frequencies."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attacks.pgd import PGD


class LF(PGD):
    """PGD over perturbations that are constant on blocks: delta = U(w), the gradient of w being the sum over a block.

    A perturbation without high frequencies passes a diffusion purifier, which diffuses those away first.

    Args:
        block: side of a block in pixels.
        steps, eot, step, step_size, loss, restarts, random_start, iterate, sign: as for ``pgd``.

    Raises:
        ValueError: as ``pgd``, and if the block is below 1.

    Reference: Guo et al. 2018 (arXiv 1809.08758), of low frequencies; here inside the ball and by gradients.
    """

    restricted = True

    def __init__(self, *, block: int = 4, **pgd: Any):
        super().__init__(**pgd)
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.block = block

    def display(self, stochastic: bool) -> str:
        return super().display(stochastic).replace("PGD", f"LF{self.block}-PGD")

    def shaped(self, direction: Tensor) -> Tensor:
        """The mean over each block, in its place; blocks at the rim are cut."""
        height, width = direction.shape[-2:]
        pooled = nn.functional.avg_pool2d(direction, self.block, ceil_mode=True, count_include_pad=False)
        return nn.functional.interpolate(pooled, scale_factor=float(self.block))[..., :height, :width]
