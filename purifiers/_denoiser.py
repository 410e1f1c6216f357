"""A network as an estimator of the noise in z_t, whatever its own conventions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from purifiers._schedule import VP


def resize(z: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation to (height, width), as DiffPure's of ImageNet; differentiable, and nothing if it fits."""
    if tuple(z.shape[-2:]) == tuple(size):
        return z
    return nn.functional.interpolate(z, tuple(size), mode="bilinear", align_corners=False)


class Denoiser:
    """Predicts the noise n in z_t = sqrt(alpha_bar) z_0 + sigma n, with sigma = sqrt(1 - alpha_bar).

    A net trained on discrete indices is fed index i and paired with the table's alpha_bar_i; one trained in continuous
    time is fed 999 t and paired with alpha_bar(t): the two schedules are never mixed. A net whose inputs are patches
    (p² C channels) works at 1/p of the resolution.

    Args:
        net: (z, label) → predicted noise; a diffusers model or any module returning a tensor or an object with
            ``sample``. Extra output channels (a learned variance) are dropped.
        schedule: the schedule that the net was trained on.
        labels: "index" or "continuous".

    Raises:
        ValueError: if ``labels`` is neither.
    """

    def __init__(self, net: nn.Module, schedule: VP, labels: str = "index"):
        if labels not in ("index", "continuous"):
            raise ValueError(f'labels must be "index" or "continuous", got {labels!r}')
        self.net, self.schedule, self.labels = net, schedule, labels

    def alpha_bar(self, t: float) -> float:
        """The alpha_bar that belongs to the net's label at time t; 1 at t = 0."""
        if t <= 0:
            return 1.0
        if self.labels == "index" and (index := self.schedule.index(t)) >= 0:
            return self.schedule.table[index]
        return self.schedule.alpha_bar(t)  # in continuous time, and before the first index

    def noise(self, z: Tensor, t: float | Tensor) -> Tensor:
        """The predicted noise, for one time for all rows (a float) or one index per row (an integer tensor)."""
        if isinstance(t, Tensor):
            label = t
        elif self.labels == "index":
            label = torch.full((len(z),), max(self.schedule.index(t), 0), device=z.device)
        else:
            label = torch.full((len(z),), (self.schedule.n - 1) * t, device=z.device, dtype=z.dtype)
        channels = z.shape[1]
        patch = self._patch(channels)
        z = nn.functional.pixel_unshuffle(z, patch)
        out = self.net(z, label)
        out = out if isinstance(out, Tensor) else out.sample
        return nn.functional.pixel_shuffle(out[:, : channels * patch * patch], patch)

    def fit(self, z: Tensor) -> Tensor:
        """z at the net's own resolution, where it states one: 224×224 images become 256×256 for a 256×256 net."""
        side = getattr(getattr(self.net, "config", None), "sample_size", None)
        if side is None:
            return z
        height, width = (side, side) if isinstance(side, int) else side
        patch = self._patch(z.shape[1])
        return resize(z, (height * patch, width * patch))

    def score(self, z: Tensor, t: float) -> Tensor:
        """grad log p_t(z) = -n / sigma."""
        return -self.noise(z, t) / math.sqrt(1 - self.alpha_bar(t))

    def _patch(self, channels: int) -> int:
        inputs = getattr(getattr(self.net, "config", None), "in_channels", channels)
        return math.isqrt(inputs // channels)
