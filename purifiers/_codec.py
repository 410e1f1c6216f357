"""Codecs between images in [0, 1] and latents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents: mean and log variance, shape (B, c, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, n: Tensor) -> Tensor:
        """mean + sigma n, the reparameterised draw."""
        return self.mean + torch.exp(0.5 * self.logvar) * n


class KL:
    """A KL-regularised autoencoder of diffusers, images in [0, 1] at both ends.

    Images whose sides the downsampling does not divide are padded with black and cropped again. An autoencoder with
    p² C input channels sees p×p patches.
    """

    def __init__(self, autoencoder: AutoencoderKL):
        self.autoencoder = autoencoder

    def encode(self, x: Tensor) -> Posterior:
        c, h, w = x.shape[1:]
        patch = self._patch(c)
        factor = patch * 2 ** (len(self.autoencoder.config.block_out_channels) - 1)
        x = nn.functional.pad(2 * x - 1, (0, -w % factor, 0, -h % factor), value=-1.0)
        distribution = self.autoencoder.encode(nn.functional.pixel_unshuffle(x, patch)).latent_dist
        return Posterior(distribution.mean, distribution.logvar)

    def decode(self, z: Tensor, shape: torch.Size) -> Tensor:
        """The decoder's mean, cropped to (H, W) of ``shape``."""
        x = nn.functional.pixel_shuffle(self.autoencoder.decode(z).sample, self._patch(shape[1]))
        return (x[..., : shape[-2], : shape[-1]] + 1) / 2

    def _patch(self, channels: int) -> int:
        return math.isqrt(self.autoencoder.config.in_channels // channels)
