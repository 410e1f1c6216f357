"""A diffusion decoder: the image is drawn anew from its code alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from purifiers import _objectives
from purifiers._base import Batch, Images
from purifiers._codec import KL
from purifiers._denoiser import Canvas, Denoiser, unet
from purifiers._diffusion import Diffusion, Kept
from purifiers._noise import Noise
from purifiers.vae import VAE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Decoder(Diffusion):
    """g(x) = clamp((z_0 + 1) / 2), z_0 ~ p(z_0 | c) by reverse steps from sigma n; c = mu(x), the encoder's mean.

    The chain begins with noise: all that is left of the image goes through its code, perturbation and content alike.
    c enters beside z, as an image that is linear in it.

    Args:
        autoencoder: diffusers' AutoencoderKL, of which the encoder is used.
        canvas: c → the image that the network takes beside z.
        unet: predicts the noise, given that.
        t_star: time at which the chain begins; 1 is noise alone, below it stands for a grey image with noise.
        steps, rule, eta, labels: as ``Diffusion``.
        condition: 1 for the code as trained; more exaggerates it, 0 leaves it off:
            n = n_off + condition (n_on - n_off).
        rounds: repetitions of the whole.

    Raises:
        ValueError: as ``Diffusion``; if ``condition`` is negative.

    Reference: Preechakul et al. 2022 (arXiv 2111.15640), with a code from a VAE and noise that is drawn; guidance
    without a classifier: Ho and Salimans 2022 (arXiv 2207.12598).
    """

    dial = "condition"
    passes = 1
    given = ("autoencoder",)

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        canvas: nn.Module,
        unet: nn.Module,
        *,
        t_star: float | list = 1.0,
        steps: int = 100,
        rule: str = "eta",
        eta: float = 0.0,
        labels: str = "index",
        condition: float = 1.0,
        rounds: int = 1,
    ):
        super().__init__(unet, 2, t_star=t_star, steps=steps, rule=rule, eta=eta, labels=labels, rounds=rounds)
        if condition < 0:
            raise ValueError(f"condition must not be negative, got {condition}")
        if not self.chains:
            raise ValueError("t_star=0 leaves nothing to decode: no image is diffused; t_star=1 begins with noise")
        self.autoencoder, self.canvas, self.codec, self.condition = autoencoder, canvas, KL(autoencoder), condition

    def enter(self, x: Images, noise: Noise) -> tuple[Tensor, Kept]:
        z, context = super().enter(x, noise)
        return torch.zeros_like(z), context._replace(beside=self.canvas(self.codec.encode(x).mean.flatten(1)))

    def denoising(self, k: int, context: Kept, noise: Noise) -> Denoiser:
        return self.conditioned(context).exaggerated(self.condition)

    def imagined(self, context: Kept, like: Images, noise: Noise) -> Kept:
        """The canvas of a code that the prior draws."""
        return context._replace(beside=self.canvas(VAE(self.autoencoder).imagined(like, noise).flatten(1)))

    def diffused(self, k: int, x: Images, noise: Noise) -> None:
        return None  # no image is diffused

    def objectives(
        self, batch: Batch, noise: Noise, *, focus: float = 0.0, focus_below: float = 1.0, drop: float = 0.1
    ) -> dict[str, Tensor]:
        """E ‖n - n_theta(z_t, t, c)‖² with c drawn from q(c | x).

        Args:
            focus, focus_below: as ``_objectives.eps``.
            drop: share of the images whose condition is left off.
        """
        posterior = self.codec.encode(batch.x)
        code = _objectives.stopped(posterior.sample(noise.normal("posterior", like=posterior.mean))).flatten(1)
        kept = noise.uniform("drop", like=batch.x[:, :1, :1, :1]) >= drop
        denoiser, z = self.denoiser.given(beside=self.canvas(code) * kept), self.denoiser.fit(2 * batch.x - 1)
        return {"canvas+unet": _objectives.eps(denoiser, z, noise, focus=focus, focus_below=focus_below)}

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        return {
            "autoencoder": VAE.parts(shape, size)["autoencoder"],
            "canvas": Canvas(VAE.dimensions(shape, size), shape),
            "unet": unet(shape, size, images=2),
        }
