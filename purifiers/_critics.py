"""Networks that judge another network while it trains, and are thrown away after."""

from __future__ import annotations

from torch import Tensor, nn

from purifiers._base import Images


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
