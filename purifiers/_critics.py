"""Networks that judge or steer another network while it trains, and are thrown away after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from purifiers._base import Images
from purifiers._objectives import stopped
from purifiers._schedule import VP


class ImageCritic(nn.Module):
    """A discriminator of images that shows its features: x → (features of every layer, score per image).

    Reference: Larsen et al. 2016 (arXiv 1512.09300).
    """

    def __init__(self, channels: int, width: int = 16):
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, x: Images) -> tuple[list[Tensor], Tensor]:
        features: list[Tensor] = []
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x), 0.2)
            features.append(x)
        return features, self.head(x.mean((2, 3)))[:, 0]


class CodeCritic(nn.Sequential):
    """A discriminator of codes (B, d): score of a draw from q(z) against one from the product of its marginals.

    Its score estimates log q(z) / Π_i q(z_i), whose mean is the total correlation.

    Reference: Kim and Mnih 2018 (arXiv 1802.05983), section 3.
    """

    def __init__(self, d: int, width: int = 256):
        super().__init__(
            nn.Linear(d, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z)[:, 0]


class Levels(nn.Module):
    """A learned schedule: a monotone, piecewise linear map from [0, 1] to the log-SNR λ of a schedule's table.

    Args:
        pieces: how many, of equal length in λ.

    Reference: Kingma et al. 2021 (arXiv 2107.00630).
    """

    SPEED = 50.0
    """How much faster than a network's weights it learns, at the rate of both."""

    def __init__(self, pieces: int = 32):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(pieces))

    def forward(self, u: Tensor, schedule: VP) -> tuple[Tensor, Tensor]:
        """For u uniform (B, 1): times of exact indices, shape (B, 1, 1, 1), and log q(λ) of each, shape (B,)."""
        table = schedule.column(u.device)
        snr = (table.log() - (-table).log1p()).to(u.dtype)  # falls
        width = (snr[0] - snr[-1]) / len(self.logits)
        share = (self.SPEED * self.logits).softmax(0)
        ends = stopped(share).cumsum(0)
        piece = torch.searchsorted(ends, u[:, 0].contiguous()).clamp_max(len(ends) - 1)
        inside = (u[:, 0] - (ends - stopped(share))[piece]) / stopped(share)[piece]
        level = snr[-1] + (piece + inside.clamp(0, 1)) * width
        nearest = (snr[None] - level[:, None]).abs().argmin(1)
        return ((nearest + 1).to(u.dtype) / schedule.n).view(-1, 1, 1, 1), (share[piece] / width).log()
