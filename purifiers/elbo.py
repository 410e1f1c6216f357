"""The image moved uphill on a VAE's evidence lower bound, within a ball around it."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from torch import Tensor, nn

from purifiers import _objectives
from purifiers._ascent import Ascent, Kept
from purifiers._base import Images
from purifiers._noise import Noise
from purifiers.vae import VAE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class ELBO(Ascent):
    """g(x) = x + δ, δ = argmin of -ELBO(x + δ) over ‖δ‖∞ ≤ radius, x + δ in [0, 1], by ``steps`` of descent.

    -ELBO(v) = ‖v - D(mu(v))‖² / (2 sigma_x²) + KL(q(z | v) ‖ N(0, I))

    The image isn't reconstructed: what is fine in it stays, and so may what an attacker put there. With the steps'
    directions held fixed it moves by constants: the truncated gradient would be the identity.

    Args:
        autoencoder: diffusers' AutoencoderKL.
        radius: of the ball, in [0, 1] pixel units.
        steps: of the search.
        rate: length of its first step, in [0, 1] pixel units per pixel.
        sign: the paper's signed steps, which cut the gradient of the direction; else steps of one rms length.
        sigma_x: width of the Gaussian likelihood, in [0, 1] pixel units.
        rounds: repetitions of the whole.

    Raises:
        ValueError: as ``Ascent``; if ``radius`` is negative.

    Reference: Yang et al. 2024 (arXiv 2210.14404), there with a classifier of its own on the code.
    """

    dial = "radius"
    stochastic = False
    surrogates = ("identity",)  # type: ignore[assignment]
    given = ("autoencoder",)

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        radius: float | Fraction = Fraction(16, 255),
        steps: int = 10,
        rate: float = 0.02,
        sign: bool = False,
        sigma_x: float = 0.1,
        rounds: int = 1,
    ):
        super().__init__(autoencoder, sigma_x=sigma_x, steps=steps, rate=rate, sign=sign, rounds=rounds)
        if radius < 0:
            raise ValueError(f"radius must not be negative, got {radius}")
        self.radius = float(radius)

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, Kept]:
        return x, Kept(x)

    @property
    def nfe(self) -> int:
        """One pass of the autoencoder per step."""
        return self.rounds * self.steps

    def energy(self, v: Tensor, context: Kept) -> Tensor:
        posterior = self.codec.encode(v)
        return self.misfit(v, posterior.mean) + _objectives.divergence(*posterior).flatten(1).sum(1)

    def allowed(self, v: Tensor, context: Kept) -> Tensor:
        return (context.x + (v - context.x).clamp(-self.radius, self.radius)).clamp(0, 1)

    def finish(self, state: Tensor, context: Kept) -> Images:
        return context.x if self.through == "identity" else state

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        return VAE.parts(shape, size)
