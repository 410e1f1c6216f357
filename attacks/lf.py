"""Low-frequency PGD: what survives a purifier that removes high frequencies."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attacks._gradient import Victim
from attacks._threat import ThreatModel
from attacks.pgd import PGD


class LF(PGD):
    """PGD over perturbations that are constant on blocks: delta = U(w), stepping by the mean gradient of a block.

    A perturbation without high frequencies passes a diffusion purifier, which diffuses those away first. The start is
    of that kind, too; only clipping to the box breaks a block.

    Args:
        block: side of a block in pixels.
        steps, eot, step, step_size, loss, restarts, random_start, iterate, sign: as for ``pgd``.

    Raises:
        ValueError: as ``pgd``, and if the block is below 1.

    Reference: Guo et al. 2018 (arXiv 1809.08758), of low frequencies; here inside the ball and by gradients.
    """

    restricted = True
    title = "LF"
    shown = (*PGD.shown, "block")

    def __init__(self, *, block: int = 4, **pgd: Any):
        super().__init__(**pgd)
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.block = block

    def display(self, stochastic: bool) -> str:
        return super().display(stochastic).replace(self.title, f"{self.title}{self.block}-PGD")

    def first(self, x: Tensor, victim: Victim, threat: ThreatModel, restart: int) -> Tensor:
        """A random start that is constant on blocks: each takes what its first pixel drew."""
        delta = super().first(x, victim, threat, restart) - threat.origin(x)
        return threat.project(threat.origin(x) + self._spread(delta[..., :: self.block, :: self.block], delta), x)

    def shaped(self, direction: Tensor) -> Tensor:
        """The mean over each block, in its place; blocks at the rim are cut."""
        pooled = nn.functional.avg_pool2d(direction, self.block, ceil_mode=True, count_include_pad=False)
        return self._spread(pooled, direction)

    def _spread(self, values: Tensor, like: Tensor) -> Tensor:
        """U: a value per block on all its pixels."""
        height, width = like.shape[-2:]
        return nn.functional.interpolate(values, scale_factor=float(self.block))[..., :height, :width]
