"""Latent diffusion: encode, diffuse the code to t_star, run the reverse chain, decode."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from purifiers import _objectives
from purifiers._base import Batch, Images, Purifier
from purifiers._codec import KL, VQ, Standard
from purifiers._denoiser import unet
from purifiers._diffusion import Diffusion, Kept
from purifiers._noise import Noise
from purifiers.vae import VAE
from purifiers.vqvae import VQVAE


class Form(NamedTuple):
    """The family and size of the autoencoder; the form of the network on latents."""

    family: type[Purifier]
    size: str
    unet: str


SIZES = {
    "tiny": Form(VAE, "tiny", "latent-tiny"),
    "tiny-vq": Form(VQVAE, "tiny", "latent-tiny"),
    "small": Form(VAE, "latent", "latent-small"),
    "vq": Form(VQVAE, "small", "latent-small"),
    "compact": Form(VAE, "compact-latent", "latent-compact"),
    "medium": Form(VAE, "medium-latent", "latent-medium"),
    "medium-vq": Form(VQVAE, "medium", "latent-medium"),
}
"""28×28 images: small 7×7×4 latents, vq 7×7×8. For 32×32, 8×8 latents: compact without a GPU, medium with
one."""


class Latent(Diffusion):
    """g(x) = D(s^-1(z_0)), z_0 by reverse steps from z = sqrt(alpha_bar) s(E(x)) + sigma n; clamped to [0, 1].

    s gives latents mean 0 and deviation 1. E is the mean of a KL autoencoder, or what a VQ autoencoder has before its
    codebook: z_0 is quantised as it is decoded. Encoder and decoder are in the gradient. A t_star here is not one of
    pixels: compare at matched clean accuracy. With a codebook the map is constant between jumps, and an attacker
    takes one of the ``surrogates`` of ``vqvae``.

    Args:
        autoencoder: diffusers' AutoencoderKL or VQModel.
        standard: s.
        unet: predicts the noise in latents.
        more: t_star, steps, rule, eta, labels, spread, rounds: as ``Diffusion``.

    Raises:
        ValueError: as ``Diffusion``.

    Reference: Rombach et al. 2022 (arXiv 2112.10752), section 3.
    """

    encodes = True
    passes = 1
    given = ("autoencoder", "standard")

    def __init__(self, autoencoder: nn.Module, standard: Standard, unet: nn.Module, **more: Any):
        super().__init__(unet, **more)
        self.autoencoder, self.standard = autoencoder, standard
        self.codec: Any = VQ(autoencoder) if hasattr(autoencoder, "quantize") else KL(autoencoder)  # type: ignore[arg-type]
        if isinstance(self.codec, VQ):
            self.differentiable, self.surrogates = False, VQVAE.surrogates  # type: ignore[misc]

    def enter(self, x: Images, noise: Noise) -> tuple[Tensor, Kept]:
        return self.standard(self._encoded(x)), Kept(x.shape)

    def leave(self, z: Tensor, context: Kept) -> Images:
        z = self.standard.inverse(z)
        if isinstance(self.codec, VQ):
            z = self.codec.quantised(z, self.through)
        return self.codec.decode(z, context.size).clamp(0, 1)

    def objectives(
        self, batch: Batch, noise: Noise, *, focus: float = 0.0, focus_below: float = 1.0
    ) -> dict[str, Tensor]:
        """E ‖n - n_theta‖² on latents; the autoencoder stays as it is."""
        z = _objectives.stopped(self.standard(self._encoded(batch.x)))
        return {"unet": _objectives.eps(self.denoiser, z, noise, focus=focus, focus_below=focus_below)}

    def settle(self, x: Images) -> None:
        """Measure the latents of training images."""
        self.standard.fit(self._encoded(x))

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        family, codec, form = SIZES[size]
        autoencoder: Any = family.parts(shape, codec)["autoencoder"]
        channels = autoencoder.config.latent_channels
        factor = 2 ** len(autoencoder.config.block_out_channels)  # of the patches and the levels
        grid = (channels, -(-shape[1] // factor), -(-shape[2] // factor))
        return {
            "autoencoder": autoencoder,
            "standard": Standard(channels),
            "unet": unet(grid, form),
        }

    def _encoded(self, x: Images) -> Tensor:
        z = self.codec.encode(x)
        return z if isinstance(self.codec, VQ) else z.mean
