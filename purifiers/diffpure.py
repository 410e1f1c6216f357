"""DiffPure: diffuse the image to t_star, then run the reverse process back to an image."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Size, Tensor, nn

from purifiers import _objectives, _sampler
from purifiers._base import SDE, Batch, Images, Purifier
from purifiers._denoiser import Denoiser, resize
from purifiers._noise import Noise
from purifiers._schedule import VP

SIZES = {"tiny": (8, 8), "small": (32, 64)}


class DiffPure(Purifier):
    """z = sqrt(alpha_bar(t_star)) (2x - 1) + sigma n, then ``steps`` reverse steps; g(x) = clamp((z_0 + 1) / 2).

    Images of another size than the net's are resized to it and, purified, back, inside the gradient.
    The input is noised with the discrete alpha_bar of index round(1000 t_star) - 1, and the first reverse step undoes
    that index. ``sde`` integrates the continuous reverse SDE to t = 1e-5 as in the paper, which leaves a little noise;
    ``eta`` ends in the predicted clean image and needs few steps; ``ode`` is the probability flow.

    Args:
        unet: predicts the noise; a diffusers UNet2DModel, on pixels or on patches.
        t_star: time to which x is diffused, in (0, 1].
        steps: reverse steps; t_star · 1000 of them is the paper's dt of 1e-3.
        rule: "sde" (Euler-Maruyama), "ode" or "eta".
        eta: with rule "eta": 0 is DDIM, 1 DDPM's ancestral sampling.
        labels: what the net takes for a time: "index" (DDPM) or "continuous" (score_sde).
        rounds: repetitions of the whole.

    Raises:
        ValueError: if t_star isn't in (0, 1], steps don't fit, the rule is unknown, or eta isn't in [0, 1].

    Reference: Nie et al. 2022 (arXiv 2205.07460), section 3.2.
    """

    dial = "t_star"
    RULES: ClassVar[dict] = {
        "sde": _sampler.euler_maruyama,
        "ode": _sampler.probability_flow,
        "eta": _sampler.eta_rule,
    }
    T_END = 1e-5

    def __init__(
        self,
        unet: nn.Module,
        *,
        t_star: float = 0.1,
        steps: int = 100,
        rule: str = "sde",
        eta: float = 1.0,
        labels: str = "index",
        rounds: int = 1,
    ):
        super().__init__(rounds=rounds)
        if rule not in self.RULES:
            raise ValueError(f"rule must be one of {', '.join(self.RULES)}, got {rule!r}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        self.unet, self.schedule = unet, VP()
        self.denoiser = Denoiser(unet, self.schedule, labels)
        self.t_star, self.steps = t_star, steps
        self.times = [*self.schedule.times(t_star, steps), 0.0 if rule == "eta" else self.T_END]
        self.rule = partial(self.RULES[rule], eta=eta) if rule == "eta" else self.RULES[rule]

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, Size]:
        alpha_bar = self.schedule.table[self.schedule.index(self.t_star)]
        return _sampler.diffuse(self.denoiser.fit(2 * x - 1), alpha_bar, noise), x.shape[-2:]

    def step(self, k: int, state: Tensor, context: Size, noise: Noise) -> Tensor:
        return self.rule(self.denoiser, state, self.times[k], self.times[k + 1], k, noise)

    def finish(self, state: Tensor, context: Size) -> Images:
        return ((resize(state, context) + 1) / 2).clamp(0, 1)

    def diffused(self, k: int, x: Images, noise: Noise) -> Tensor:
        return _sampler.diffuse(self.denoiser.fit(2 * x - 1), self.denoiser.alpha_bar(self.times[k]), noise)

    def sde(self) -> SDE | None:
        if self.rule is not _sampler.euler_maruyama:
            return None
        drift, diffusion = _sampler.reverse_drift, _sampler.diffusion
        return SDE(partial(drift, self.denoiser), partial(diffusion, self.denoiser), self.times)

    def objectives(
        self, batch: Batch, noise: Noise, *, focus: float = 0.0, focus_below: float = 1.0
    ) -> dict[str, Tensor]:
        return {"unet": _objectives.eps(self.denoiser, 2 * batch.x - 1, noise, focus=focus, focus_below=focus_below)}

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        from diffusers import UNet2DModel  # heavy: only where networks are built

        channels, side, widths = 4 * shape[0], shape[1] // 2, SIZES[size]  # on 2×2 patches: half the cost of pixels
        return {
            "unet": UNet2DModel(
                sample_size=side,
                in_channels=channels,
                out_channels=channels,
                block_out_channels=widths,
                layers_per_block=1,
                down_block_types=("DownBlock2D",) * len(widths),
                up_block_types=("UpBlock2D",) * len(widths),
                norm_num_groups=8 if size != "tiny" else 4,
                add_attention=False,
            )
        }
