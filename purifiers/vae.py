"""Reconstruction by a variational autoencoder: one encoding, one decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from purifiers import _objectives
from purifiers._base import Batch, Images, Purifier
from purifiers._codec import KL, Posterior
from purifiers._critics import CodeCritic, ImageCritic
from purifiers._noise import Noise
from purifiers._published import PUBLISHED

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Size(NamedTuple):
    """Widths from the first level to the last, and channels of the code; each level but the first halves the sides."""

    widths: tuple[int, ...]
    code: int


SIZES = {
    "tiny": Size((8, 8), 4),
    "small": Size((16, 32, 64), 4),
    "spatial": Size((16, 32, 64), 16),
    "vector": Size((16, 32, 32, 48, 48), 64),
    "latent": Size((24, 48), 4),
    "compact": Size((32, 64), 8),
    "compact-latent": Size((32, 64), 4),
    "medium": Size((64, 128, 128), 8),
    "medium-latent": Size((64, 128), 4),
    "medium-vector": Size((64, 64, 128, 128, 128), 128),
}
"""28×28 images: small 4×4×4, spatial 4×4×16, vector 1×1×64 (sides padded to 32), latent 7×7×4. For 32×32
images without a GPU: compact 8×8×8, compact-latent 8×8×4; with one: medium 4×4×8, medium-vector 1×1×128,
medium-latent 8×8×4."""


class VAE(Purifier):
    """g(x) = D(z), z ~ N(mu(x), temperature² diag sigma²(x)), clamped to [0, 1].

    What the code has no room for is lost: a perturbation, and fine texture with it. Weights that were trained with
    nested codes order the channels of z by what they tell; ``code`` then sets how many are kept, the rest are 0.
    ``surrogates``: "mean" is the gradient through mu alone, as if the spread didn't depend on x.

    Args:
        autoencoder: diffusers' AutoencoderKL.
        code: the first so many channels of z are kept; 0 keeps all.
        temperature: scale of the posterior's standard deviation: 1 decodes a sample, 0 the mean, deterministically.
        likelihood: as the weights were trained: "gaussian": D is the decoder's output; "bernoulli": its sigmoid.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``temperature`` is negative, ``code`` isn't among the channels, or the likelihood is unknown.

    Reference: Kingma and Welling 2014 (arXiv 1312.6114); as a purifier: Luo and Pfister 2018 (arXiv 1812.02891), Li and
    Ji 2018 (arXiv 1812.06570); nested codes: Rippel et al. 2014 (arXiv 1402.0915).
    """

    dial = "code"
    unset_at_zero = ("code",)
    surrogates = ("mean",)
    encodes = True
    LIKELIHOODS: ClassVar[tuple[str, ...]] = ("gaussian", "bernoulli")

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        code: int = 0,
        temperature: float = 1.0,
        likelihood: str = "gaussian",
        rounds: int = 1,
    ):
        super().__init__(rounds=rounds)
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        channels = autoencoder.config.latent_channels
        if not 0 <= code <= channels:
            raise ValueError(f"code must lie in 1 ... {channels}, the code's channels, or be 0 for all; got {code}")
        if likelihood not in self.LIKELIHOODS:
            raise ValueError(f"likelihood must be {' or '.join(self.LIKELIHOODS)}, got {likelihood!r}")
        self.autoencoder, self.codec = autoencoder, KL(autoencoder)
        self.code, self.temperature, self.likelihood = code, temperature, likelihood
        self.stochastic = temperature > 0

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, Images]:
        return self._kept(self._draw(self.codec.encode(x), noise)), x

    def finish(self, state: Tensor, context: Images) -> Images:
        return self._image(self.codec.decode(state, context.shape)).clamp(0, 1)

    def sample(self, like: Images, noise: Noise) -> Images:
        """D(z), z ~ N(0, I)."""
        return self.finish(self._kept(self.imagined(like, noise)), like)

    def imagined(self, like: Images, noise: Noise) -> Tensor:
        """A code z ~ N(0, I) for each of some images, of which it takes nothing."""
        return noise.normal("prior", like=self.codec.encode(like).mean)

    def objectives(
        self,
        batch: Batch,
        noise: Noise,
        *,
        sigma_x: float | None = None,
        beta: float = 1.0,
        nested: bool = False,
        warm_up: float = 0.0,
        tau: float = 0.0,
        features: float = 0.0,
        adversarial: float = 0.0,
        correlation: float = 0.0,
        judge: Callable[[Tensor], list[Tensor]] | None = None,
        image_critic: nn.Module | None = None,
        code_critic: nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """-log p(x | z) + beta KL(q(z | x) ‖ N(0, I)), and the terms of the relatives where their weight isn't 0.

        Args:
            sigma_x: width of a Gaussian likelihood; None learns it.
            beta: weight of the divergence (Higgins et al. 2017); 0 at temperature 0 is a plain autoencoder.
            nested: half of the batches keep a random number of channels of their codes only: every cut is a model of
                its own, with a learned width of its own.
            warm_up: share of the training over which beta grows from 0.
            tau: deviation of noise on what is encoded, never on what is to be told: the codec learns to ignore it.
            features: weight, in nats per pixel, of matched features of ``image_critic`` or, without one, of ``judge``.
            adversarial: weight, in nats per pixel, of passing for real with ``image_critic``.
            correlation: weight of the total correlation that ``code_critic`` sees (FactorVAE, arXiv 1802.05983).
            judge: a frozen network, x → features by layer.
            image_critic, code_critic: networks that train against this one; see ``critics``.

        Raises:
            ValueError: for the weight of a term whose network is missing.
        """
        judged = image_critic is not None or judge is not None
        if (features and not judged) or (adversarial and image_critic is None) or (correlation and code_critic is None):
            raise ValueError(
                "features need judge or image_critic, adversarial needs image_critic, correlation code_critic; "
                f"got features={features}, adversarial={adversarial}, correlation={correlation}"
            )
        x, pixels = batch.x, batch.x[0].numel()
        posterior = self.codec.encode(x + tau * noise.normal("encoded", like=x) if tau else x)
        z, divergence = self._draw(posterior, noise), _objectives.divergence(*posterior)
        if nested:
            kept = _random_cut(z, noise)
            z, divergence = _cut(z, kept), _cut(divergence, kept)
        decoded = self.codec.decode(z, x.shape)
        x_hat = self._image(decoded)
        bits = self.likelihood == "bernoulli"
        likelihood = _objectives.bernoulli(x, decoded) if bits else _objectives.gaussian(x, x_hat, sigma_x)
        weight = beta * min(1.0, batch.progress / warm_up) if warm_up else beta
        losses = {"autoencoder": likelihood + weight * divergence.flatten(1).sum(1).mean()}
        if image_critic is not None:
            (real, _), (fake, score) = image_critic(x), image_critic(x_hat)
            losses["autoencoder"] += pixels * features * _objectives.matched(real, fake)
            losses["autoencoder"] += pixels * adversarial * _objectives.fooled(score)
            (_, of_real), (_, of_fake) = image_critic(x), image_critic(_objectives.stopped(x_hat))
            losses["image_critic"] = _objectives.told_apart(of_real, of_fake)
        elif judge is not None:
            losses["autoencoder"] += pixels * features * _objectives.matched(judge(x), judge(x_hat))
        if code_critic is not None:
            losses["autoencoder"] += correlation * code_critic(z.flatten(1)).mean()
            codes = _objectives.stopped(z).flatten(1)
            losses["code_critic"] = _objectives.told_apart(
                code_critic(codes), code_critic(_objectives.shuffled(codes, noise))
            )
        return losses

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        from diffusers import AutoencoderKL  # heavy: only where networks are built

        if size in PUBLISHED:
            return {"autoencoder": PUBLISHED[size](shape)}
        channels, (widths, code) = 4 * shape[0], SIZES[size]  # on 2×2 patches: half the cost of pixels
        return {
            "autoencoder": AutoencoderKL(
                in_channels=channels,
                out_channels=channels,
                block_out_channels=widths,
                down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                latent_channels=code,
                layers_per_block=1,
                norm_num_groups=8 if size != "tiny" else 4,
                mid_block_add_attention=False,
            )
        }

    @classmethod
    def critics(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        return {"image_critic": ImageCritic(shape[0]), "code_critic": CodeCritic(cls.dimensions(shape, size))}

    @classmethod
    def dimensions(cls, shape: tuple[int, int, int], size: str = "tiny") -> int:
        """How many numbers the code of an image of ``shape`` (C, H, W) has."""
        widths, code = SIZES[size]
        factor = 2 ** len(widths)  # of the patches and the levels
        return code * -(-shape[1] // factor) * -(-shape[2] // factor)

    def _draw(self, posterior: Posterior, noise: Noise) -> Tensor:
        if not self.stochastic or self.through == "mean":
            return posterior.mean
        return posterior.sample(self.temperature * noise.normal("posterior", like=posterior.mean))

    def _kept(self, z: Tensor) -> Tensor:
        return _cut(z, self.code) if self.code else z

    def _image(self, decoded: Tensor) -> Tensor:
        return decoded.sigmoid() if self.likelihood == "bernoulli" else decoded


def _cut(z: Tensor, kept: int) -> Tensor:
    """z (B, c, h, w) with zeros in all but the first ``kept`` channels."""
    return torch.cat((z[:, :kept], torch.zeros_like(z[:, kept:])), 1)


def _random_cut(z: Tensor, noise: Noise) -> int:
    """How many channels a batch keeps: half of the time all, else uniform in 1 … c."""
    u, c = float(noise.uniform("nested", like=z[:, :1, 0, 0])[0]), z.shape[1]
    return c if u < 0.5 else 1 + int(2 * (u - 0.5) * c)
