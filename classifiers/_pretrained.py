"""Networks trained elsewhere, in the form of this house: images in [0, 1] → logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from classifiers._base import Classifier


class Pretrained(Classifier):
    """f(x) = net((resize(x) - mean) / std), the resize bilinear, antialiased, and inside the gradient.

    Args:
        net: standardised images of ``size`` × ``size`` → logits.
        size: the network's input size; other images are resized to it.
        mean, std: per channel, of images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, *, size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.net, self.size = net, size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.size, self.size):
            x = nn.functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.net((x - self.mean) / self.std)
