"""Structure from an image: edits of a denoiser's prediction that hold a reverse chain to a reference.

All images are on the scale of the diffusion, [-1, 1] for pixels. An edit is pure algebra: the gradient to the reference
and to z goes through, for each row by itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from purifiers._denoiser import Denoiser, Edit, resize, root
from purifiers._noise import Noise
from purifiers._sampler import diffuse
from purifiers._schedule import Time

WEIGHTINGS = ("constant", "matched")


def guided(reference: Tensor, noise: Noise, *, strength: float, matched: bool) -> Edit:
    """s' = s - w ∇_z ½ ‖z - r_t‖² = s - w (z - r_t), with r_t the reference diffused to t by fresh noise.

    As a prediction of noise: n' = n + sigma w (z - r_t). The distance is a sum over one image, so that w means the same
    in any batch.

    Args:
        reference: r, of z's shape.
        noise: of this step alone.
        strength: w; with ``matched`` w = strength · sigma / sqrt(alpha_bar): strong where noise drowns the image.

    Reference: Wang et al. 2022 (arXiv 2205.14969), section 3.3; as a score: Dhariwal and Nichol 2021
    (arXiv 2105.05233), section 4.2.
    """

    def edit(denoiser: Denoiser, z: Tensor, t: Time, n: Tensor) -> Tensor:
        a = denoiser.alpha_bar(t)
        return n + pull(a, strength=strength, matched=matched) * (z - diffuse(reference, a, noise))

    return edit


def pull(a: Time, *, strength: float, matched: bool) -> Time:
    """sigma w at alpha_bar = a: by how much of z - r_t ``guided`` moves the predicted noise."""
    sigma = root(1 - a)
    return sigma * strength * (sigma / root(a) if matched else 1)


def low_passed(reference: Tensor, *, weight: float, factor: int) -> Edit:
    """z_0' = z_0 + weight L(r - z_0): coarse structure from the reference r, the rest from the prediction.

    L takes means over cells, about ``factor`` pixels wide, and interpolates them bilinearly back. It is no projection:
    of a difference between the means of neighbouring cells about half (rms) stays at weight 1, of the means themselves
    some 40 %.

    Reference: Choi et al. 2021 (arXiv 2108.02938), eq. 8, here on the predicted z_0.
    """

    def edit(denoiser: Denoiser, z: Tensor, t: Time, n: Tensor) -> Tensor:
        z_0 = denoiser.clean(z, t, n)
        return denoiser.dirt(z, t, z_0 + weight * low_pass(reference - z_0, factor))

    return edit


def low_pass(v: Tensor, factor: int) -> Tensor:
    """L v: means over cells of about ``factor`` by ``factor`` pixels, bilinearly interpolated to v's size."""
    height, width = v.shape[-2:]
    cells = nn.functional.adaptive_avg_pool2d(v, (-(-height // factor), -(-width // factor)))
    return resize(cells, (height, width))
