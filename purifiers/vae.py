"""Reconstruction by a variational autoencoder: one encoding, one decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from purifiers import _objectives
from purifiers._base import Batch, Images, Purifier
from purifiers._codec import KL
from purifiers._noise import Noise

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SIZES = {"tiny": (8, 8), "small": (16, 32, 64)}


class VAE(Purifier):
    """g(x) = D(z), z ~ N(mu(x), temperature² diag sigma²(x)), clamped to [0, 1].

    What the code has no room for is lost: a perturbation, and fine texture with it.

    Args:
        autoencoder: diffusers' AutoencoderKL.
        temperature: scale of the posterior's standard deviation; 0 decodes the mean and makes g deterministic.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``temperature`` is negative.

    Reference: Kingma and Welling 2014 (arXiv 1312.6114); as a purifier: Li and Ji 2019 (arXiv 1812.02891).
    """

    dial = "temperature"
    surrogates = ("mean",)
    encodes = True

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        temperature: float = 1.0,
        rounds: int = 1,
    ):
        super().__init__(rounds=rounds)
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        self.autoencoder, self.codec = autoencoder, KL(autoencoder)
        self.temperature = temperature
        self.stochastic = temperature > 0

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, Images]:
        posterior = self.codec.encode(x)
        if self.stochastic:
            return posterior.sample(self.temperature * noise.normal("posterior", like=posterior.mean)), x
        return posterior.mean, x

    def finish(self, state: Tensor, context: Images) -> Images:
        return self.codec.decode(state, context.shape).clamp(0, 1)

    def surrogate(self, name: str) -> Purifier:
        """ "mean": the gradient through the posterior's mean alone, as if its spread didn't depend on x."""
        return VAE(self.autoencoder, temperature=0.0) if name == "mean" else super().surrogate(name)

    def objectives(self, batch: Batch, noise: Noise, *, sigma_x: float = 0.1, beta: float = 1.0) -> dict[str, Tensor]:
        posterior = self.codec.encode(batch.x)
        x_hat = self.codec.decode(posterior.sample(noise.normal("posterior", like=posterior.mean)), batch.x.shape)
        return {"autoencoder": _objectives.elbo(batch.x, x_hat, *posterior, sigma_x=sigma_x, beta=beta)}

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        from diffusers import AutoencoderKL  # heavy: only where networks are built

        channels, widths = 4 * shape[0], SIZES[size]  # on 2×2 patches: half the cost of pixels
        return {
            "autoencoder": AutoencoderKL(
                in_channels=channels,
                out_channels=channels,
                block_out_channels=widths,
                down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=8 if size != "tiny" else 4,
                mid_block_add_attention=False,
            )
        }
