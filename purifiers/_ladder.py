"""The network of a hierarchical VAE: features from the image upwards, groups of latents from the top down."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from purifiers._base import Images


class Normal(NamedTuple):
    """A diagonal Gaussian over one group: mean and standard deviation, shape (B, c, h, w)."""

    mean: Tensor
    sigma: Tensor


class Block(nn.Module):
    """x → x + W₂ s(conv(s(W₁ s(x)))), s = SiLU, W 1×1: a bottleneck without normalisation, near the identity at first.

    Reference: Child 2021 (arXiv 2011.10650), figure 3.
    """

    def __init__(self, width: int, outputs: int | None = None, depth: int = 1):
        super().__init__()
        inside = max(width // 2, 4)
        self.inwards = nn.Conv2d(width, inside, 1)
        self.across = nn.Conv2d(inside, inside, 3, padding=1)
        self.outwards = nn.Conv2d(inside, outputs or width, 1)
        self.residual = outputs is None
        nn.init.zeros_(self.outwards.bias)  # type: ignore[arg-type]
        if self.residual:
            nn.init.xavier_uniform_(self.outwards.weight, gain=depth**-0.5)
        else:
            nn.init.normal_(self.outwards.weight, std=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        s = nn.functional.silu
        h = self.outwards(s(self.across(s(self.inwards(s(x))))))
        return x + h if self.residual else h


class Group(nn.Module):
    """One group of latents, its prior p(z_l | z_<l) and its posterior relative to that.

    From the state h: p = N(mu, sigma²). From h and the features e of the image at this resolution: a shift and a log
    scale, both bounded by 5 tanh(· / 5); q = N(mu + sigma shift, sigma² exp(2 logscale)).

    Reference: residual normal: Vahdat and Kautz 2020 (arXiv 2007.03898), section 3.2; body: Child 2021.
    """

    def __init__(self, width: int, latents: int, depth: int):
        super().__init__()
        self.of_prior = Block(width, 2 * latents + width)
        self.of_posterior = Block(2 * width, 2 * latents)
        self.enter = nn.Conv2d(latents, width, 1)
        self.after = Block(width, depth=depth)
        self.latents = latents

    def prior(self, h: Tensor) -> tuple[Normal, Tensor]:
        """p(z_l | z_<l), and the state with what the prior adds to it."""
        mean, logsigma, more = self.of_prior(h).split([self.latents, self.latents, h.shape[1]], 1)
        return Normal(mean, _bounded(logsigma).exp()), h + more

    def posterior(self, h: Tensor, features: Tensor, prior: Normal) -> tuple[Normal, Tensor, Tensor]:
        """q(z_l | z_<l, x), its shift in units of the prior's sigma, and its log scale."""
        shift, logscale = (_bounded(v) for v in self.of_posterior(torch.cat((h, features), 1)).chunk(2, 1))
        return Normal(prior.mean + prior.sigma * shift, prior.sigma * logscale.exp()), shift, logscale

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """The state with z_l in it."""
        return self.after(h + self.enter(z))


class Ladder(nn.Module):
    """Features of an image at falling resolutions, and groups of latents at rising ones, on 2×2 patches.

    Args:
        channels: of the images.
        side: of the images, which are padded with black to twice the next power of 2 of half of it.
        width: channels inside.
        groups: (resolution, latents) of every group, resolutions rising, powers of 2.
    """

    def __init__(self, channels: int, side: int, width: int, groups: tuple[tuple[int, int], ...]):
        super().__init__()
        self.sides = [s for s, _ in groups]
        self.full = 1 << (-(-side // 2) - 1).bit_length()  # of the patches
        depth = len(groups) + 2
        self.stem = nn.Conv2d(4 * channels, width, 3, padding=1)
        resolutions, s = [], self.full
        while s >= self.sides[0]:
            resolutions.append(s)
            s //= 2
        self.up = nn.ModuleDict({str(s): Block(width, depth=depth) for s in resolutions})
        self.lower = nn.ModuleDict({str(s): nn.Conv2d(width, width, 3, 2, 1) for s in resolutions[:-1]})
        self.top = nn.Parameter(torch.zeros(1, width, self.sides[0], self.sides[0]))
        self.biases = nn.ParameterDict(
            {str(s): nn.Parameter(torch.zeros(1, width, s, s)) for s in resolutions if s > self.sides[0]}
        )
        self.groups = nn.ModuleList(Group(width, latents, depth) for _, latents in groups)
        self.last = nn.Sequential(Block(width, depth=depth), nn.SiLU(), nn.Conv2d(width, 4 * channels, 3, padding=1))

    def group(self, k: int) -> Group:
        """The k-th group from the top."""
        return cast(Group, self.groups[k])

    def features(self, x: Images) -> dict[int, Tensor]:
        """Features by resolution, of images in [0, 1]."""
        h, w = x.shape[-2:]
        z = nn.functional.pad(2 * x - 1, (0, 2 * self.full - w, 0, 2 * self.full - h), value=-1.0)
        state, found = self.stem(nn.functional.pixel_unshuffle(z, 2)), {}
        for name, block in self.up.items():
            state = found[int(name)] = block(state)
            if name in self.lower:
                state = self.lower[name](state)
        return found

    def raised(self, h: Tensor, side: int) -> Tensor:
        """The state at a higher resolution: repeated, and a bias added that tells places apart."""
        while h.shape[-1] < side:
            h = h.repeat_interleave(2, -2).repeat_interleave(2, -1)
            h = h + self.biases[str(h.shape[-1])]
        return h

    def image(self, h: Tensor, shape: torch.Size) -> Tensor:
        """The likelihood's mean, from the last state; on the scale of [0, 1], not clamped."""
        x = nn.functional.pixel_shuffle(self.last(self.raised(h, self.full)), 2)
        return (x[..., : shape[-2], : shape[-1]] + 1) / 2


def _bounded(v: Tensor) -> Tensor:
    """5 tanh(v / 5): no log scale runs away."""
    return 5 * torch.tanh(v / 5)
