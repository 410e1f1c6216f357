"""Searches with a VAE's networks: a code or an image moved uphill on a density, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from purifiers._base import Images, Purifier
from purifiers._codec import KL
from purifiers._noise import Noise

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Kept(NamedTuple):
    """What is kept over all steps: the images that a search starts from."""

    x: Tensor


class Ascent(Purifier):
    """v_{k+1} = v_k - rate (1 - k / steps) u(∇_v energy(v_k)), with u(g) = g / rms(g) per row, or the sign.

    The exact gradient of a purification unrolls the steps: it differentiates ∇energy again. ``surrogates``:
    "truncated" takes the steps' directions as constants, "identity" the whole purification for the identity.

    Args:
        autoencoder: diffusers' AutoencoderKL.
        sigma_x: width of the Gaussian likelihood p(x | z), in [0, 1] pixel units.
        steps: how many.
        rate: length of the first step, in units of v per element.
        sign: move every element by the same length; that direction has no gradient, so the exact one is truncated.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``steps`` is below 1, or ``rate`` or ``sigma_x`` isn't positive.
    """

    surrogates = ("truncated", "identity")

    def __init__(
        self, autoencoder: AutoencoderKL, *, sigma_x: float, steps: int, rate: float, sign: bool, rounds: int = 1
    ):
        super().__init__(rounds=rounds)
        if not sigma_x > 0:
            raise ValueError(f"sigma_x must be positive, got {sigma_x}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        self.autoencoder, self.codec, self.sigma_x = autoencoder, KL(autoencoder), sigma_x
        self.steps, self.rate, self.sign = steps, rate, sign

    def energy(self, v: Tensor, context: Kept) -> Tensor:
        """What is descended, per row, in nats."""
        raise TypeError(f"{type(self).__name__} defines no energy")

    def misfit(self, x: Images, z: Tensor) -> Tensor:
        """-log p(x | z) up to a constant: ‖x - D(z)‖² / (2 sigma_x²), per row, in nats."""
        return (x - self.codec.decode(z, x.shape)).square().flatten(1).sum(1) / (2 * self.sigma_x**2)

    def allowed(self, v: Tensor, context: Kept) -> Tensor:
        """v moved back to where it may be."""
        return v

    def step(self, k: int, state: Tensor, context: Any, noise: Noise) -> Tensor:
        v = state
        if self.through != "exact":
            return v  # what stands in for the step: its direction is a constant
        direction = self._slope(v, context)
        if self.sign:
            direction = direction.sign()
        else:
            rms = direction.flatten(1).square().mean(1).add(1e-20).sqrt()
            direction = direction / rms.view(-1, *[1] * (v.ndim - 1))
        return self.allowed(v - self.rate * (1 - k / self.steps) * direction, context)

    @property
    def nfe(self) -> int:
        """One pass to start, one per step, one to finish."""
        return self.rounds * (self.steps + 2)

    def _slope(self, v: Tensor, context: Any) -> Tensor:
        """∇_v energy, part of the graph where one is kept."""
        watched = torch.is_grad_enabled() and any(t.requires_grad for t in (v, *context))
        with torch.enable_grad():
            v = v if v.requires_grad else v.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(v, context).sum(), v, create_graph=watched)
        return slope
