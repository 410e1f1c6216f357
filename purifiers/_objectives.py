"""Training losses, one function per equation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from purifiers._denoiser import Denoiser
from purifiers._noise import Noise


def eps(denoiser: Denoiser, z: Tensor, noise: Noise, *, focus: float = 0.0, focus_below: float = 1.0) -> Tensor:
    """E ‖n - n_theta(sqrt(alpha_bar_i) z + sigma_i n, i)‖² over random indices i, mean over elements.

    Args:
        z: clean images or latents on the scale of the diffusion.
        focus: the share of indices drawn below ``focus_below``, the rest are drawn from all.
        focus_below: a time in (0, 1]; a purifier never looks beyond its t_star.

    Reference: Ho et al. 2020 (arXiv 2006.11239), eq. 14.
    """
    n = denoiser.schedule.n
    u, pick = noise.uniform("index", like=z[:, :1, 0, 0]), noise.uniform("focus", like=z[:, :1, 0, 0])
    i = (u * torch.where(pick < focus, focus_below, 1.0) * n).long()[:, 0].clamp_max(n - 1)
    alpha_bar = torch.tensor(denoiser.schedule.table, dtype=z.dtype, device=z.device)[i].view(-1, 1, 1, 1)
    target = noise.normal("target", like=z)
    return (denoiser.noise(alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * target, i) - target).square().mean()


def elbo(x: Tensor, x_hat: Tensor, mean: Tensor, logvar: Tensor, *, sigma_x: float, beta: float = 1.0) -> Tensor:
    """The negative evidence lower bound with a Gaussian likelihood of fixed width, in nats per image.

    ‖x - x̂‖² / (2 sigma_x²) + D/2 log(2π sigma_x²) + beta · ½ Σ (mean² + exp(logvar) - logvar - 1)

    Reference: Kingma and Welling 2014 (arXiv 1312.6114); beta: Higgins et al. 2017.
    """
    reconstruction = (x - x_hat).square().flatten(1).sum(1) / (2 * sigma_x**2)
    constant = 0.5 * x[0].numel() * math.log(2 * math.pi * sigma_x**2)
    divergence = 0.5 * (mean.square() + logvar.exp() - logvar - 1).flatten(1).sum(1)
    return (reconstruction + constant + beta * divergence).mean()
