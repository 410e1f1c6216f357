"""Distributions of latents, fitted after the fact: an autoregressive net over codes, a Gaussian mixture."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from purifiers._noise import Noise


class _Causal(nn.Conv2d):
    """A convolution that sees the sites before a site in raster order, and the site itself unless ``strict``."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, *, strict: bool):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        mask = torch.zeros(kernel, kernel)
        mask[: kernel // 2] = 1
        mask[kernel // 2, : kernel // 2 + (not strict)] = 1
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class PixelCNN(nn.Module):
    """log p(c_i | c_1 … c_{i-1}) over codes in raster order: codes (B, h, w) → logits (B, h, w, K).

    Args:
        codes: K, the size of the codebook.
        width: channels inside.
        layers: residual layers after the first.

    Reference: van den Oord et al. 2016 (arXiv 1601.06759).
    """

    def __init__(self, codes: int, width: int = 48, layers: int = 3):
        super().__init__()
        self.embed = nn.Embedding(codes, width)
        self.first = _Causal(width, width, 5, strict=True)
        self.layers = nn.ModuleList(_Causal(width, width, 3, strict=False) for _ in range(layers))
        self.head = nn.Conv2d(width, codes, 1)

    def forward(self, codes: Tensor) -> Tensor:
        h = self.first(self.embed(codes).permute(0, 3, 1, 2))
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return self.head(nn.functional.silu(h)).permute(0, 2, 3, 1)


class Mixture(nn.Module):
    """p(z) = Σ_k w_k N(z; m_k, L_k L_kᵀ) over flattened latents; one standard normal until it is fitted.

    Args:
        d: dimensions of a latent.
        components: how many Gaussians.

    Reference: ex-post density estimation: Ghosh et al. 2020 (arXiv 1903.12436), section 4.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, d: int, components: int = 1):
        super().__init__()
        self.register_buffer("weights", torch.full((components,), 1 / components))
        self.register_buffer("means", torch.zeros(components, d))
        self.register_buffer("factors", torch.eye(d).repeat(components, 1, 1))

    def fit(self, z: Tensor) -> None:
        """Take the maximum-likelihood mixture of the rows of z (N, d), by scikit-learn's GaussianMixture."""
        from sklearn.mixture import GaussianMixture  # heavy: only where a mixture is fitted

        components = len(self.weights)
        found = GaussianMixture(components, covariance_type="full", reg_covar=1e-3, random_state=0).fit(z.cpu().numpy())
        self.weights.copy_(torch.as_tensor(found.weights_))
        self.means.copy_(torch.as_tensor(found.means_))
        self.factors.copy_(torch.linalg.cholesky(torch.as_tensor(found.covariances_)))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) per row of z (B, …), in nats."""
        away = z.flatten(1)[:, None] - self.means
        whitened = torch.linalg.solve_triangular(self.factors, away.permute(1, 2, 0), upper=False)
        logdet = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        logs = -0.5 * whitened.square().sum(1).T - logdet - 0.5 * self.means.shape[1] * math.log(2 * math.pi)
        return torch.logsumexp(logs + self.weights.log(), 1)

    def sample(self, like: Tensor, noise: Noise) -> Tensor:
        """One draw per row, of the shape of ``like``."""
        u = noise.uniform("component", like=like.flatten(1)[:, :1])
        k = (u > self.weights.cumsum(0)[:-1]).sum(1)
        n = noise.normal("prior", like=like.flatten(1))
        return (self.means[k] + (self.factors[k] @ n[..., None])[..., 0]).view_as(like)
