"""Diffusion held to the structure that a VAE sees: its reconstruction as condition, start, low frequencies or guide."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from purifiers import _objectives, _structure
from purifiers._base import Batch, Images, Purifier
from purifiers._codec import KL
from purifiers._denoiser import Denoiser, Embedding, embedding, unet
from purifiers._diffusion import Diffusion, Kept
from purifiers._ladder import Ladder
from purifiers._noise import Noise
from purifiers._rounding import straight_through
from purifiers.nvae import NVAE
from purifiers.vae import VAE


class Form(NamedTuple):
    """The family of stage 1, the images that the network takes, and whether it takes the code."""

    family: type[Purifier] = VAE
    images: int = 2
    code: bool = False


FORMS = {"": Form(), "z": Form(code=True), "nvae": Form(NVAE), "free": Form(images=1)}
"""What may follow a size, as in small-nvae. The free one takes no condition: its network is one of diffpure's."""
BEGINS = ("input", "reconstruction", "noise")
STRUCTURES = ("none", "lowpass", "guidance")


class DiffuseVAE(Diffusion):
    """g(x) = clamp((z_0 + 1) / 2), z_0 by reverse steps that know x̂, the reconstruction of x by stage 1.

    How x̂ enters a network that was trained with it (``formulation``), with n_theta the noise that it predicts in z:

    - 1: n_theta(z, t, x̂): x̂ is concatenated;
    - 2: n_theta(z + x̂, t, x̂): the chain runs on u = z_t - x̂, so that z_t has the mean sqrt(alpha_bar) z_0 + x̂;
      after that change of variable every rule is formulation 1's;
    - 0: n_theta(z, t): the network is unconditional.

    What needs no training: ``begin=reconstruction`` diffuses x̂ in place of x; ``structure=lowpass`` takes the coarse
    part of every predicted z_0 from x̂, ``structure=guidance`` pulls the chain towards x̂. x and x̂ both come from an
    attacked image, and the exact gradient goes through both branches. ``surrogates``: "image" and "structure" are the
    gradients through one of them alone.

    Args:
        stage1: diffusers' AutoencoderKL, or the ladder of a hierarchical VAE.
        unet: predicts the noise.
        embed: takes the code of stage 1 to the embedding of the time, where the network was trained with it.
        t_star, steps, rule, eta, labels: as ``Diffusion``.
        formulation: as the network was trained.
        begin: what is diffused: "input", "reconstruction", or "noise": nothing, with t_star=1.
        condition: 1 for the condition as trained; more exaggerates it, 0 leaves it off.
        structure: "none", "lowpass" or "guidance".
        strength: of the structure: the weight in [0, 1] of the low-passed difference that is added, 1 for all that the
            filter passes; guidance has the weight w = strength · sigma / sqrt(alpha_bar).
        factor: width in pixels of what counts as coarse.
        temperature: of stage 1's draws; 0 takes means. Of a ladder it is that of the groups drawn from the prior; the
            others are drawn at temperature 1.
        rounds: repetitions of the whole; the gradients of the branches then leave out paths that cross.

    Raises:
        ValueError: as ``Diffusion``; for an unknown formulation, begin or structure, a condition on a network without,
            a negative strength, temperature or condition, a strength or factor without a structure, a strength that
            overshoots, noise to begin with at another t_star than 1, or options by which x̂ never takes part.

    Reference: Pandey et al. 2022 (arXiv 2201.00308), sections 3.2 and 3.3; start from a reconstruction: Yue and Loy
    2022 (arXiv 2212.06512); low-pass replacement: Choi et al. 2021 (arXiv 2108.02938).
    """

    surrogates = ("image", "structure")
    passes = 1
    given = ("stage1",)
    as_trained = ("formulation",)
    FORMULATIONS: ClassVar[tuple[int, ...]] = (0, 1, 2)

    def __init__(
        self,
        stage1: nn.Module,
        unet: nn.Module,
        embed: nn.Module | None = None,
        *,
        t_star: float | list = 0.1,
        steps: int = 100,
        rule: str = "eta",
        eta: float = 1.0,
        labels: str = "index",
        formulation: int = 1,
        begin: str = "input",
        condition: float = 1.0,
        structure: str = "none",
        strength: float = 1.0,
        factor: int = 4,
        temperature: float = 0.0,
        rounds: int = 1,
    ):
        for name, value, known in (
            ("formulation", formulation, self.FORMULATIONS),
            ("begin", begin, BEGINS),
            ("structure", structure, STRUCTURES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
        for name, number in (("condition", condition), ("strength", strength), ("temperature", temperature)):
            if number < 0:
                raise ValueError(f"{name} must not be negative, got {number}")
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        if structure == "lowpass" and strength > 1:
            raise ValueError(f"strength={strength} overshoots: structure=lowpass replaces a share, at most 1")
        if structure == "none" and (strength, factor) != (1.0, 4):
            raise ValueError("strength and factor are of a structure: give structure=lowpass or structure=guidance")
        if condition != 1 and not formulation and embed is None:
            raise ValueError(f"condition={condition} asks for a network with a condition; formulation 0 has none")
        images = 2 if formulation else 1
        super().__init__(unet, images, t_star=t_star, steps=steps, rule=rule, eta=eta, labels=labels, rounds=rounds)
        self.stage1, self.embed = stage1, embed
        conditioned = bool(formulation or embed is not None)
        if not (conditioned or structure != "none" or begin == "reconstruction"):
            raise ValueError("nothing here looks at the reconstruction: give a formulation, structure or begin")
        if begin == "noise" and (t_star[0] if isinstance(t_star, list) else t_star) != 1:
            raise ValueError(
                f"begin=noise needs t_star=1, got {t_star}: a chain that begins later begins with an image"
            )
        if not self.chains:
            self.stochastic = begin == "reconstruction" and temperature > 0
        follows = self.chains and ((conditioned and condition > 0) or structure != "none")
        if begin != "input" or not follows:
            self.surrogates = ()  # type: ignore[misc, assignment]  # x comes in by one branch alone
        if structure == "guidance":
            self.check_pull(strength, True)
        self.formulation, self.begin, self.condition = formulation, begin, condition
        self.structure, self.strength, self.factor, self.temperature = structure, strength, factor, temperature

    def enter(self, x: Images, noise: Noise) -> tuple[Tensor, Kept]:
        seen = _held(x) if self.through == "image" else x
        x_hat, code = self._seen(seen, noise.fold("stage1"), self.temperature)
        z, context = super().enter(_held(x) if self.through == "structure" else x, noise)
        x_hat = self.denoiser.fit(2 * x_hat - 1)
        begin = {"input": z, "reconstruction": x_hat, "noise": torch.zeros_like(z)}[self.begin]
        embedded = None if self.embed is None else self.embed(code)
        return begin, context._replace(reference=x_hat, beside=x_hat if self.formulation else None, embedded=embedded)

    def denoising(self, k: int, context: Kept, noise: Noise) -> Denoiser:
        denoiser = self.conditioned(context).exaggerated(self.condition)
        if self.structure == "none":
            return denoiser
        reference: Any = context.reference
        if self.structure == "lowpass":
            return denoiser.edited(_structure.low_passed(reference, weight=self.strength, factor=self.factor))
        fresh = noise.fold("guide", k)
        return denoiser.edited(_structure.guided(reference, fresh, strength=self.strength, matched=True))

    def imagined(self, context: Kept, like: Images, noise: Noise) -> Kept:
        """x̂ = D(z) of a z that the prior of stage 1 draws, and that z."""
        if isinstance(self.stage1, Ladder):
            x_hat, code = NVAE(self.stage1).sample(like, noise), like.new_zeros(len(like), 0)
        else:
            drawn = VAE(self.stage1)  # type: ignore[arg-type]
            z = drawn.imagined(like, noise)
            x_hat, code = drawn.finish(z, like), z.flatten(1)
        beside = self.denoiser.fit(2 * x_hat - 1) if self.formulation else None
        return context._replace(beside=beside, embedded=None if self.embed is None else self.embed(code))

    def conditioned(self, context: Kept) -> Denoiser:
        return self._given(context.beside, context.embedded)

    def diffused(self, k: int, x: Images, noise: Noise) -> Tensor | None:
        return None if self.begin == "noise" else super().diffused(k, x, noise)

    def objectives(
        self,
        batch: Batch,
        noise: Noise,
        *,
        focus: float = 0.0,
        focus_below: float = 1.0,
        drop: float = 0.1,
        augment: float = 0.0,
    ) -> dict[str, Tensor]:
        """E ‖n - n_theta‖² given x̂, a reconstruction with a code drawn from stage 1.

        Args:
            focus, focus_below: as ``_objectives.eps``.
            drop: share of the images whose condition is left off, each by a coin of its own.
            augment: stage 1 sees x + sigma_c n with sigma_c uniform in [0, augment] for each image, so that the x̂ of an
                attacked image is one that the network knows.
        """
        x = batch.x
        sigma = augment * noise.uniform("augment", like=x[:, :1, :1, :1])
        x_hat, code = self._seen(x + sigma * noise.normal("augmented", like=x), noise.fold("stage1"), 1.0)
        kept = noise.uniform("drop", like=x[:, :1, :1, :1]) >= drop
        beside = _objectives.stopped(self.denoiser.fit(2 * x_hat - 1)) * kept if self.formulation else None
        embedded = None if self.embed is None else self.embed(_objectives.stopped(code)) * kept[:, :, 0, 0]
        z = self.denoiser.fit(2 * x - 1)
        loss = _objectives.eps(self._given(beside, embedded), z, noise, focus=focus, focus_below=focus_below)
        return {"unet" if self.embed is None else "unet+embed": loss}

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        size, _, form = size.partition("-")
        family, images, code = FORMS[form]
        (stage1,) = family.parts(shape, size).values()
        parts = {"stage1": stage1, "unet": unet(shape, size, images=images, embeds=code)}
        if code:
            parts["embed"] = Embedding(VAE.dimensions(shape, size), embedding(size))
        return parts

    def _given(self, beside: Tensor | None, embedded: Tensor | None) -> Denoiser:
        return self.denoiser.given(beside=beside, shifts=self.formulation == 2, embedded=embedded)

    def _seen(self, x: Images, noise: Noise, temperature: float) -> tuple[Images, Tensor]:
        """x̂ in [0, 1], and the code that it was decoded from (of a ladder none)."""
        if isinstance(self.stage1, Ladder):
            rule = "sample" if temperature else "mean"
            return NVAE(self.stage1, rule=rule, tau=temperature)(x, noise), x.new_zeros(len(x), 0)
        codec = KL(self.stage1)  # type: ignore[arg-type]
        posterior = codec.encode(x)
        code = posterior.mean
        if temperature:
            code = posterior.sample(temperature * noise.normal("posterior", like=code))
        return codec.decode(code, x.shape).clamp(0, 1), code.flatten(1)


def _held(x: Tensor) -> Tensor:
    """x without a gradient to it: the branch that an attacker leaves alone."""
    return straight_through(x, torch.zeros_like(x))
