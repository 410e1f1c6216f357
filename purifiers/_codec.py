"""Codecs between images in [0, 1] and latents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, VQModel


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents: mean and log variance, shape (B, c, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, n: Tensor) -> Tensor:
        """mean + sigma n, the reparameterised draw."""
        return self.mean + torch.exp(0.5 * self.logvar) * n


class _Patches:
    """What the codecs of diffusers' autoencoders share: images in [0, 1] at one end, p×p patches in [-1, 1] inside.

    Images whose sides the downsampling does not divide are padded with black and cropped again. An autoencoder with
    p² C input channels sees p×p patches.
    """

    autoencoder: Any  # a model of diffusers

    def _patched(self, x: Tensor) -> Tensor:
        c, h, w = x.shape[1:]
        patch = self._patch(c)
        factor = patch * 2 ** (len(self.autoencoder.config.block_out_channels) - 1)
        x = nn.functional.pad(2 * x - 1, (0, -w % factor, 0, -h % factor), value=-1.0)
        return nn.functional.pixel_unshuffle(x, patch)

    def _images(self, decoded: Tensor, shape: torch.Size) -> Tensor:
        x = nn.functional.pixel_shuffle(decoded, self._patch(shape[1]))
        return (x[..., : shape[-2], : shape[-1]] + 1) / 2

    def _patch(self, channels: int) -> int:
        return math.isqrt(self.autoencoder.config.in_channels // channels)


class KL(_Patches):
    """A KL-regularised autoencoder of diffusers, images in [0, 1] at both ends."""

    def __init__(self, autoencoder: AutoencoderKL):
        self.autoencoder = autoencoder

    def encode(self, x: Tensor) -> Posterior:
        distribution = self.autoencoder.encode(self._patched(x)).latent_dist
        return Posterior(distribution.mean, distribution.logvar)

    def decode(self, z: Tensor, shape: torch.Size) -> Tensor:
        """The decoder's mean, cropped to (H, W) of ``shape``."""
        return self._images(self.autoencoder.decode(z).sample, shape)


class VQ(_Patches):
    """A vector-quantised autoencoder of diffusers, images in [0, 1] at both ends.

    Args:
        autoencoder: diffusers' VQModel.
        codes: the first so many codes of its codebook are used; 0 uses all.
    """

    def __init__(self, autoencoder: VQModel, codes: int = 0):
        self.autoencoder, self.codes = autoencoder, codes

    @property
    def embedding(self) -> Tensor:
        """The codebook in use, shape (K, d)."""
        weight = self.autoencoder.quantize.embedding.weight
        return weight[: self.codes] if self.codes else weight

    def encode(self, x: Tensor) -> Tensor:
        """Latents before they are quantised, shape (B, d, h, w)."""
        return self.autoencoder.encode(self._patched(x)).latents

    def distances(self, z: Tensor) -> Tensor:
        """‖z_i - e_k‖² of every site and code, shape (B, h, w, K)."""
        sites = z.permute(0, 2, 3, 1)
        return sites.square().sum(-1, keepdim=True) - 2 * sites @ self.embedding.T + self.embedding.square().sum(1)

    def nearest(self, z: Tensor) -> Tensor:
        """The index of the nearest code, shape (B, h, w)."""
        return self.distances(z).argmin(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """The codebook's vectors of codes (B, h, w), shape (B, d, h, w)."""
        return nn.functional.embedding(codes, self.embedding).permute(0, 3, 1, 2)

    def decode(self, quantised: Tensor, shape: torch.Size) -> Tensor:
        """The image of latents as they are, quantised or not, cropped to (H, W) of ``shape``."""
        return self._images(self.autoencoder.decode(quantised, force_not_quantize=True).sample, shape)
