"""Rules that take z from time t to an earlier time; the loop around them is the purifier's own fold.

A time is one for all rows or one per row. What makes a method of its own (a condition, guidance, structure) is in the
denoiser that a rule is handed: there is no second sampler.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from purifiers._denoiser import Denoiser, root
from purifiers._noise import Noise
from purifiers._schedule import Time


def diffuse(z: Tensor, alpha_bar: Time, noise: Noise) -> Tensor:
    """z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) n."""
    return root(alpha_bar) * z + root(1 - alpha_bar) * noise.normal("diffuse", like=z)


def eta_rule(denoiser: Denoiser, z: Tensor, t: Time, t_next: Time, k: int, noise: Noise, *, eta: float = 1.0) -> Tensor:
    """DDIM (eta 0) to DDPM ancestral sampling (eta 1) in one rule.

    With a = alpha_bar(t), a' = alpha_bar(t_next) and n the predicted noise: x0 = (z - sqrt(1 - a) n) / sqrt(a),
    s = eta sqrt((1 - a') / (1 - a) (1 - a / a')), z' = sqrt(a') x0 + sqrt(1 - a' - s²) n + s ξ. The last step, to
    a' = 1, returns x0. x0 isn't clamped to [-1, 1] on the way, so that no gradient ends there.

    Reference: Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16.
    """
    a, a_next = denoiser.alpha_bar(t), denoiser.alpha_bar(t_next)
    n = denoiser.noise(z, t)
    x0 = denoiser.clean(z, t, n)
    s: Time = eta * root((1 - a_next) / (1 - a) * (1 - a / a_next))
    z = root(a_next) * x0 + root(1 - a_next - s * s) * n
    if not isinstance(s, Tensor) and s == 0:
        return z
    return z + s * noise.normal("reverse", k, like=z)


def reverse_drift(denoiser: Denoiser, z: Tensor, t: Time) -> Tensor:
    """f = ½ β(t) z + β(t) s(z, t), in dz = f dτ + g dW as t falls: dτ = -dt > 0.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 6; Nie et al. 2022 (arXiv 2205.07460), eq. 6.
    """
    beta = denoiser.schedule.beta(t)
    return 0.5 * beta * z + beta * denoiser.score(z, t)


def diffusion(denoiser: Denoiser, t: Time, delta: Time = 1.0) -> Time:
    """g sqrt(Δ) = sqrt(β(t) Δ), the deviation of what a time Δ adds; over a unit of time g itself."""
    return root(denoiser.schedule.beta(t) * delta)


def euler_maruyama(denoiser: Denoiser, z: Tensor, t: Time, t_next: Time, k: int, noise: Noise) -> Tensor:
    """The reverse VP-SDE, coefficients at the noisy end of the step, Δ = t - t_next > 0.

    z' = z + f(z, t) Δ + g(t) sqrt(Δ) ξ, with f = ``reverse_drift`` and g = ``diffusion``
    """
    delta = t - t_next
    drift = reverse_drift(denoiser, z, t)
    return z + drift * delta + diffusion(denoiser, t, delta) * noise.normal("reverse", k, like=z)


def probability_flow(denoiser: Denoiser, z: Tensor, t: Time, t_next: Time, k: int, noise: Noise) -> Tensor:
    """The ODE with the marginals of the SDE: z' = z + ½ β(t) (z + s(z, t)) Δ.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 13.
    """
    beta = denoiser.schedule.beta(t)
    return z + 0.5 * beta * (z + denoiser.score(z, t)) * (t - t_next)


def response(rule: str, denoiser: Denoiser, t: float, t_next: float, eta: float) -> Any:
    """dz' / dn: how a step of "eta", "sde" or "ode" moves z when the predicted noise is moved."""
    a: Any = denoiser.alpha_bar(t)
    a_next: Any = denoiser.alpha_bar(t_next)
    if rule == "eta":
        s = eta * root((1 - a_next) / (1 - a) * (1 - a / a_next))
        return root(1 - a_next - s * s) - root(a_next / a) * root(1 - a)
    drift = denoiser.schedule.beta(t) * (t - t_next) / root(1 - a)
    return -drift if rule == "sde" else -0.5 * drift


def langevin(
    denoiser: Denoiser, z: Tensor, t: Time, t_next: Time, k: int, noise: Noise, *, rate: float, eta: float
) -> Tensor:
    """A step of Langevin dynamics on log p_t, at one noise level: z' = z + ½ rate s(z, t) + eta sqrt(rate) ξ.

    With eta = 1 and small steps it samples p_t. ``t_next`` takes no part.

    Reference: Langevin sampling: Song and Ermon 2019 (arXiv 1907.05600), eq. 4.
    """
    z = z + 0.5 * rate * denoiser.score(z, t)
    return z + eta * root(rate) * noise.normal("reverse", k, like=z) if eta else z
