"""The most probable code: from the encoder's guess uphill on log p(x | z) + log p(z), then decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from purifiers._ascent import Ascent, Kept
from purifiers._base import Images
from purifiers._noise import Noise
from purifiers._priors import Mixture
from purifiers.vae import VAE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SIZES = {"tiny": ("tiny", 2), "small": ("small", 1), "mixture": ("small", 16), "medium": ("medium", 1),
         "medium-mixture": ("medium", 64)}  # fmt: skip
"""The size of the autoencoder, and the components of the prior."""


class MAP(Ascent):
    """g(x) = D(z*), z* = argmin_z ‖x - D(z)‖² / (2 sigma_x²) - weight log p(z), by ``steps`` of descent.

    With ``begin=prior`` the search starts from a draw of p(z). Defense-GAN's objective is that with ``weight=0``, for a
    VAE; its random restarts, of which the best is kept, are not made.

    Args:
        autoencoder: diffusers' AutoencoderKL.
        prior: p(z): a standard normal, or a mixture fitted to the codes of the training images.
        steps: of the search.
        rate: length of its first step, per element of z.
        weight: of the prior.
        sigma_x: width of the Gaussian likelihood, in [0, 1] pixel units.
        begin: "mean": from the encoder's mean; "prior": from a draw of the prior.
        rounds: repetitions of the whole.

    Raises:
        ValueError: as ``Ascent``; if ``weight`` is negative or ``begin`` unknown.

    Reference: Samangouei et al. 2018 (arXiv 1805.06605); ex-post density: Ghosh et al. 2020 (arXiv 1903.12436).
    """

    dial = "weight"
    encodes = True
    given = ("autoencoder", "prior")

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        prior: Mixture,
        *,
        steps: int = 10,
        rate: float = 0.1,
        weight: float = 1.0,
        sigma_x: float = 0.1,
        begin: str = "mean",
        rounds: int = 1,
    ):
        super().__init__(autoencoder, sigma_x=sigma_x, steps=steps, rate=rate, sign=False, rounds=rounds)
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        if begin not in ("mean", "prior"):
            raise ValueError(f"begin must be mean or prior, got {begin!r}")
        self.prior, self.weight, self.begin = prior, weight, begin
        self.stochastic = begin == "prior"
        if self.stochastic:
            self.surrogates = ("identity",)  # type: ignore[misc, assignment]  # the truncated gradient is that of the start: none

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, Kept]:
        mean = self.codec.encode(x).mean
        return (self.prior.sample(mean, noise) if self.begin == "prior" else mean), Kept(x)

    def energy(self, v: Tensor, context: Kept) -> Tensor:
        return self.misfit(context.x, v) - self.weight * self.prior.log_prob(v)

    def finish(self, state: Tensor, context: Kept) -> Images:
        if self.through == "identity":
            return context.x
        return self.codec.decode(state, context.x.shape).clamp(0, 1)

    def sample(self, like: Images, noise: Noise) -> Images:
        """D(z), z ~ p(z)."""
        z = self.prior.sample(self.codec.encode(like).mean, noise)
        return self.codec.decode(z, like.shape).clamp(0, 1)

    def settle(self, x: Images) -> None:
        """Fit the mixture to the means of the codes of training images; a single component stays standard normal."""
        if len(self.prior.weights) > 1:
            self.prior.fit(self.codec.encode(x).mean.flatten(1))

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        networks, components = SIZES[size]
        return VAE.parts(shape, networks) | {"prior": Mixture(VAE.dimensions(shape, networks), components)}
