"""Reconstruction from discrete codes: encode, take the nearest code at every site, decode."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from purifiers import _objectives
from purifiers._base import Batch, Images, Purifier
from purifiers._codec import VQ
from purifiers._noise import Noise
from purifiers._priors import PixelCNN
from purifiers._rounding import straight_through

if TYPE_CHECKING:
    from diffusers import VQModel


class Size(NamedTuple):
    """Widths from the first level to the last, dimensions of a code, size of the codebook."""

    widths: tuple[int, ...]
    dimensions: int
    codes: int


SIZES = {"tiny": Size((8, 8), 4, 16), "small": Size((24, 48), 8, 256), "compact": Size((32, 64), 8, 512),
         "medium": Size((64, 128), 8, 512)}  # fmt: skip
"""28×28 images: small 7×7 codes. For 32×32: compact 8×8 without a GPU, medium 8×8 with one."""


class Sites(NamedTuple):
    """What is kept over all steps: the images, and per row the sites to resample, in raster order."""

    x: Tensor
    which: Tensor


class VQVAE(Purifier):
    """g(x) = D(e[c]), c_i = argmin_k ‖E(x)_i - e_k‖², clamped to [0, 1].

    The map is constant between jumps: its exact gradient is 0 and says nothing of an attacker. ``surrogates``:
    "soft" (the codes are averaged by softmax(-‖z - e_k‖² / tau)), "ste" (the quantiser's gradient is the identity) and
    "bypass" (no quantisation). The strongest counts; "soft" was it on the shipped weights, so it stands first.

    With ``resample`` > 0 the least likely share of the codes under an autoregressive prior is drawn anew from it, site
    by site in raster order, each given the codes before it: PixelDefend's idea in code space.

    Args:
        autoencoder: diffusers' VQModel.
        prior: a PixelCNN over its codes.
        codes: the first so many codes of the codebook are used; 0 uses all.
        resample: share of the sites that are resampled, in [0, 1].
        tau: temperature of the soft surrogate, relative to the mean squared distance between codes.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``codes`` isn't in the codebook, ``resample`` not in [0, 1], or ``tau`` not positive.

    Reference: van den Oord et al. 2017 (arXiv 1711.00937); PixelDefend: Song et al. 2018 (arXiv 1710.10766).
    """

    dial = "codes"
    unset_at_zero = ("codes",)
    surrogates = ("soft", "ste", "bypass")
    encodes = True
    differentiable = False

    def __init__(
        self,
        autoencoder: VQModel,
        prior: PixelCNN,
        *,
        codes: int = 0,
        resample: float = 0.0,
        tau: float = 0.1,
        rounds: int = 1,
    ):
        super().__init__(rounds=rounds)
        size = autoencoder.config.num_vq_embeddings
        if not 0 <= codes <= size:
            raise ValueError(f"codes must lie in 1 ... {size}, the codebook's size, or be 0 for all; got {codes}")
        if not 0 <= resample <= 1:
            raise ValueError(f"resample must lie in [0, 1], got {resample}")
        if not tau > 0:
            raise ValueError(f"tau must be positive, got {tau}")
        self.autoencoder, self.prior, self.codec = autoencoder, prior, VQ(autoencoder, codes, tau)
        self.resample = resample
        self.stochastic = resample > 0
        self.steps = math.ceil(resample * self._sites(autoencoder)) if resample else 0

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, Sites]:
        """Latents before they are quantised; the least likely sites of their codes."""
        z = self.codec.encode(x)
        if not self.steps:
            return z, Sites(x, torch.empty(len(x), 0, dtype=torch.long, device=x.device))
        codes = self.codec.nearest(z)
        likely = self._log_prior(codes).gather(-1, codes[..., None])[..., 0].flatten(1)
        return z, Sites(x, likely.topk(self.steps, 1, largest=False).indices.sort(1).values)

    def step(self, k: int, state: Tensor, context: Sites, noise: Noise) -> Tensor:
        """The vector of a code drawn from the prior, put in place of the latent at the k-th site of every row."""
        codes, site = self.codec.nearest(state), context.which[:, k]
        logs = self._log_prior(codes).flatten(1, 2)[torch.arange(len(site), device=site.device), site]
        u = noise.uniform("resample", k, like=logs).clamp(1e-7, 1 - 1e-7)
        drawn = (logs - torch.log(-torch.log(u))).argmax(1)
        here = (torch.arange(codes[0].numel(), device=site.device) == site[:, None]).view_as(codes)[:, None]
        return torch.where(here, self.codec.embedding[drawn][..., None, None], state)

    def finish(self, state: Tensor, context: Sites) -> Images:
        return self.codec.decode(self.quantised(state), context.x.shape).clamp(0, 1)

    def quantised(self, z: Tensor) -> Tensor:
        """What is decoded in place of z: the nearest codes' vectors, or what stands in for them."""
        return self.codec.quantised(z, self.through)

    def codes(self, state: Tensor) -> Tensor:
        return self.codec.nearest(state)

    def sample(self, like: Images, noise: Noise) -> Images:
        """Every code drawn from the prior in raster order, so that none of ``like``'s is left."""
        return VQVAE(self.autoencoder, self.prior, codes=self.codec.codes, resample=1.0)(like, noise)

    @property
    def nfe(self) -> int:
        """One pass of the autoencoder, and with resampling one of the prior per site and one to choose them."""
        return self.rounds * (1 + (self.steps + 1 if self.steps else 0))

    def objectives(
        self, batch: Batch, noise: Noise, *, commitment: float = 0.25, revive: float = 0.1, nested: bool = False
    ) -> dict[str, Tensor]:
        """Likelihood and codebook terms of the autoencoder, in nats per pixel; cross-entropy of the prior per code.

        Args:
            commitment: weight of ‖z - sg(e)‖².
            revive: weight of drawing unused codes to latents.
            nested: half of the batches use the first K / 2^j codes, j uniform in 1 ... 4; the prior is of all codes.
        """
        codec = self.codec
        if nested:
            u = float(noise.uniform("nested", like=batch.x[:, :1, 0, 0])[0])
            size = len(codec.embedding)
            codec = VQ(self.autoencoder, size if u < 0.5 else size >> (1 + int(8 * (u - 0.5))))
        z = codec.encode(batch.x)
        codes = codec.nearest(z)
        whole = self.codec.nearest(z) if nested else codes  # the prior isn't told of a cut, and would learn the mixture
        vectors = codec.vectors(codes)
        x_hat = codec.decode(straight_through(vectors, z), batch.x.shape)
        return {
            "autoencoder": _objectives.gaussian(batch.x, x_hat) / batch.x[0].numel()
            + _objectives.codebook(z, codec.embedding, vectors, commitment=commitment, revive=revive),
            "prior": nn.functional.cross_entropy(self.prior(whole).flatten(0, 2), whole.flatten()),
        }

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        from diffusers import VQModel  # heavy: only where networks are built

        if shape[1] != shape[2]:
            raise ValueError(f"the prior's sites are those of square images, got {shape}")
        channels, (widths, dimensions, codes) = 4 * shape[0], SIZES[size]  # on 2×2 patches
        autoencoder = VQModel(
            in_channels=channels,
            out_channels=channels,
            sample_size=shape[1],
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            latent_channels=dimensions,
            vq_embed_dim=dimensions,
            num_vq_embeddings=codes,
            layers_per_block=1,
            norm_num_groups=8 if size != "tiny" else 4,
            mid_block_add_attention=False,
        )
        nn.init.normal_(autoencoder.quantize.embedding.weight, std=0.5)
        return {"autoencoder": autoencoder, "prior": PixelCNN(codes)}

    def _log_prior(self, codes: Tensor) -> Tensor:
        """log p of every code at every site given those before it, among the codes in use."""
        return self.prior(codes)[..., : len(self.codec.embedding)].log_softmax(-1)

    @staticmethod
    def _sites(autoencoder: VQModel) -> int:
        """How many codes an image of the size that the autoencoder states has."""
        factor = 2 ** len(autoencoder.config.block_out_channels)
        return (-(-autoencoder.config.sample_size // factor)) ** 2
