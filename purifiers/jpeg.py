"""JPEG: the cosine transform of 8×8 blocks, rounded to the steps of a table."""

from __future__ import annotations

import math

import torch
from torch import Size, Tensor, nn

from purifiers._base import Images, Purifier
from purifiers._noise import Noise
from purifiers._rounding import ROUND

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8,) * 4,
)  # fmt: skip
"""Steps of the two tables of ITU-T T.81, annex K."""
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class JPEG(Purifier):
    """g(x): compress and decompress: T⁻¹(q · round(T(255 x - 128) / q)), T the cosine transform of 8×8 blocks.

    Colours are coded as Y, Cb, Cr, all at full resolution (4:4:4); one channel as luminance. Entropy coding, which
    loses nothing, is left out, and so is the rounding of colours and pixels to 8 bits, half a level of 255. Rounding
    has no gradient; ``surrogates``: "ste" takes it for the identity, "soft" for v - 0.9 sin(2πv) / 2π.

    Args:
        quality: 1 to 100, on the scale of libjpeg.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``quality`` isn't in 1 … 100, or images have neither 1 nor 3 channels.

    Reference: Dziugaite et al. 2016 (arXiv 1608.00853); attacked through rounding: Shin and Song 2017.
    """

    dial = "quality"
    stochastic = False
    differentiable = False
    surrogates = ("ste", "soft")

    def __init__(self, *, quality: int = 50, rounds: int = 1):
        super().__init__(rounds=rounds)
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must lie in 1 ... 100, got {quality}")
        self.quality = quality

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, Size]:
        """Coefficients in units of their steps, not rounded yet; shape (B, C, rows, columns, 8, 8)."""
        if x.shape[1] not in (1, 3):
            raise ValueError(f"jpeg takes images of 1 or 3 channels, got {x.shape[1]}")
        z = 255 * x
        if x.shape[1] == 3:
            z = torch.einsum("dc,bchw->bdhw", z.new_tensor(TO_YCBCR), z) + z.new_tensor([0, 128, 128])[:, None, None]
        h, w = x.shape[-2:]
        z = nn.functional.pad(z - 128, (0, -w % 8, 0, -h % 8), mode="replicate")
        blocks = z.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)
        basis = _basis(z)
        return basis @ blocks @ basis.T / self._steps(z), x.shape

    def finish(self, state: Tensor, context: Size) -> Images:
        basis = _basis(state)
        blocks = basis.T @ (ROUND[self.through](state) * self._steps(state)) @ basis
        z = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)[..., : context[-2], : context[-1]] + 128
        if context[1] == 3:
            back = torch.linalg.inv(torch.tensor(TO_YCBCR, dtype=torch.float64)).to(z)  # bfloat16 has no inverse
            z = torch.einsum("dc,bchw->bdhw", back, z - z.new_tensor([0, 128, 128])[:, None, None])
        return (z / 255).clamp(0, 1)

    def _steps(self, like: Tensor) -> Tensor:
        """Steps of the coefficients, by channel: the tables scaled as libjpeg does, at least 1 and at most 255."""
        scale = 5000 // self.quality if self.quality < 50 else 200 - 2 * self.quality
        tables = [LUMINANCE] + [CHROMINANCE] * (like.shape[1] - 1)
        return ((like.new_tensor(tables) * scale + 50) / 100).floor().clamp(1, 255)[:, None, None]


def _basis(like: Tensor) -> Tensor:
    """The orthonormal cosine transform of 8 values: ½ c_i cos((2 j + 1) i π / 16), c_0 = 1/√2, else 1."""
    i = torch.arange(8, dtype=torch.float64)
    basis = 0.5 * torch.cos((2 * i + 1) * i[:, None] * math.pi / 16)
    basis[0] /= math.sqrt(2)
    return basis.to(like)
