"""Codecs between images in [0, 1] and latents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from purifiers._rounding import straight_through

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, VQModel


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents: mean and log variance, shape (B, c, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, n: Tensor) -> Tensor:
        """mean + sigma n, the reparameterised draw."""
        return self.mean + torch.exp(0.5 * self.logvar) * n


class Standard(nn.Module):
    """Latents with mean 0 and deviation 1 in every channel: s(z) = (z - mean) / std; as they are until it is fitted.

    Args:
        channels: of the latents.

    Reference: scaling by the latents' deviation: Rombach et al. 2022 (arXiv 2112.10752), appendix G.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def fit(self, z: Tensor) -> None:
        """Take the moments of latents (N, c, h, w)."""
        self.mean.copy_(z.mean((0, 2, 3), keepdim=True))
        self.std.copy_(z.std((0, 2, 3), keepdim=True))

    def forward(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.std

    def inverse(self, z: Tensor) -> Tensor:
        """mean + std z."""
        return self.mean + self.std * z


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
        tau: temperature of soft codes, relative to the mean squared distance between codes.
    """

    def __init__(self, autoencoder: VQModel, codes: int = 0, tau: float = 0.1):
        self.autoencoder, self.codes, self.tau = autoencoder, codes, tau

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

    def quantised(self, z: Tensor, through: str) -> Tensor:
        """What is decoded in place of z: the nearest codes' vectors ("exact"), or what stands in for them.

        "soft": the codes averaged by softmax(-‖z - e_k‖² / tau); "ste": the nearest, the quantiser's gradient the
        identity; "bypass": z itself.
        """
        if through == "bypass":
            return z
        if through == "soft":
            scale = self.tau * 2 * (self.embedding - self.embedding.mean(0)).square().sum(1).mean()
            weights = (-self.distances(z) / scale).softmax(-1)
            return (weights @ self.embedding).permute(0, 3, 1, 2)
        vectors = self.vectors(self.nearest(z))
        return straight_through(vectors, z) if through == "ste" else vectors

    def decode(self, quantised: Tensor, shape: torch.Size) -> Tensor:
        """The image of latents as they are, quantised or not, cropped to (H, W) of ``shape``."""
        return self._images(self.autoencoder.decode(quantised, force_not_quantize=True).sample, shape)
