"""What all diffusion purifiers share: enter, diffuse to t_star, run the reverse chain, leave."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Size, Tensor, nn

from purifiers import _sampler, _structure
from purifiers._base import Images, Purifier
from purifiers._denoiser import Denoiser, resize
from purifiers._noise import Noise
from purifiers._schedule import VP, Time


class Kept(NamedTuple):
    """What is kept over all steps.

    Attributes:
        size: height and width to return to, or the whole shape.
        t_star: the time that each row starts from, (B, 1, 1, 1), where rows have their own.
        reference: an image on the scale of z that the chain is held to.
        beside: a condition of z's shape.
        embedded: a condition (B, d).
    """

    size: Size
    t_star: Tensor | None = None
    reference: Tensor | None = None
    beside: Tensor | None = None
    embedded: Tensor | None = None


class Diffusion(Purifier):
    """g(x) = leave(z_0), with z = sqrt(alpha_bar(t_star)) enter(x) + sigma n and z_0 by reverse steps from there.

    A subclass says how images enter and leave, and what the denoiser knows at a step (``denoising``). The input is
    noised with the alpha_bar of index round(1000 t_star) - 1, and the first reverse step undoes that index. ``sde``
    integrates the continuous reverse SDE to t = 1e-5 as DiffPure does and leaves the noise of its last step, of
    deviation sqrt(beta(t) dt): little at hundreds of steps, at three 0.16 on [-1, 1] from t_star 0.1, 0.31 from 0.2;
    its input is noised with the discrete alpha_bar even if the net is one of continuous time. ``eta`` ends in the
    predicted clean image and needs few steps; ``ode`` is the probability flow. No rule clamps a predicted clean image,
    as samplers of DDPM often do.

    Args:
        unet: predicts the noise; a diffusers UNet2DModel, on pixels or on patches.
        images: as ``Denoiser``: how many it takes.
        t_star: time in [0, 1] to which the input is diffused, 0 for not at all, so that it only enters and leaves; or a
            list of times in (0, 1], each diffused to and undone in turn.
        steps: reverse steps from each time; t_star · 1000 of them is a dt of 1e-3.
        rule: "sde" (Euler-Maruyama), "ode" or "eta".
        eta: with rule "eta": 0 is DDIM, 1 DDPM's ancestral sampling.
        labels: what the net takes for a time: "index" (DDPM) or "continuous" (score_sde).
        spread: each row's t_star is uniform on [t_star - spread, t_star + spread]; 0 for one and the same.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if a t_star is out of range or the list empty, steps don't fit, the rule is unknown, eta isn't in
            [0, 1], or spread leads out of (0, 1].
    """

    dial = "t_star"
    RULES: ClassVar[dict[str, Callable[..., Tensor]]] = {
        "sde": _sampler.euler_maruyama,
        "ode": _sampler.probability_flow,
        "eta": _sampler.eta_rule,
    }
    T_END = 1e-5
    SAMPLING = 100
    """Steps of DDIM that ``sample`` takes, dense towards t = 0: of a normal distribution they lose 2 to 4 % of the
    deviation."""
    passes: ClassVar[int] = 0
    """Evaluations of other networks before and after the chain: an encoder's and its decoder's count as one."""
    condition: float = 1.0
    """How much of a condition is followed; neither off (0) nor as trained (1), a step evaluates the network twice."""

    def __init__(
        self,
        unet: nn.Module,
        images: int = 1,
        *,
        t_star: float | list = 0.1,
        steps: int = 100,
        rule: str = "sde",
        eta: float = 1.0,
        labels: str = "index",
        spread: float = 0.0,
        rounds: int = 1,
    ):
        super().__init__(rounds=rounds)
        if rule not in self.RULES:
            raise ValueError(f"rule must be one of {', '.join(self.RULES)}, got {rule!r}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        usual = inspect.signature(type(self)).parameters.get("eta")
        if rule != "eta" and eta not in (1.0, usual.default if usual else 1.0):
            raise ValueError(
                f"eta={eta} has no effect with rule={rule}, be it given or the card's: rule=eta goes by it"
            )
        self.unet, self.schedule = unet, VP()
        self.denoiser = Denoiser(unet, self.schedule, labels, images)
        stars = [float(t) for t in (t_star if isinstance(t_star, list) else [t_star])]
        if not stars:
            raise ValueError("t_star is an empty list; give a time, or 0 for none")
        self.chains = [] if stars == [0.0] else [self.schedule.times(t, steps) for t in stars]
        self.stochastic = bool(self.chains)
        for t in stars if spread else []:
            if spread < 0 or not 0 < t - spread < t + spread <= 1:
                raise ValueError(f"spread must lead to times in (0, 1], got t_star={t} and spread={spread}")
            self.schedule.times(t - spread, steps)  # the shortest chain holds the steps, too
        self.t_star, self.spread = t_star, spread
        self.per_chain, self.steps = steps, steps * len(self.chains)
        self.t_end = 0.0 if rule == "eta" else self.T_END
        self.response = partial(_sampler.response, rule, self.denoiser, eta=eta)
        self.rule = partial(self.RULES[rule], eta=eta) if rule == "eta" else self.RULES[rule]

    def enter(self, x: Images, noise: Noise) -> tuple[Tensor, Kept]:
        """z_0 of the images, and what is kept of them; here 2x - 1 at the net's size."""
        return self.denoiser.fit(2 * x - 1), Kept(x.shape[-2:])

    def leave(self, z: Tensor, context: Kept) -> Images:
        """The image of a z_0, at the size that came in."""
        return ((resize(z, context.size) + 1) / 2).clamp(0, 1)

    def denoising(self, k: int, context: Kept, noise: Noise) -> Denoiser:
        """The denoiser of step k: the network's, or one that also knows a condition or follows a structure."""
        return self.denoiser

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, Kept]:
        z, context = self.enter(x, noise)
        if self.spread:
            u = noise.uniform("t_star", like=z[:, :1, :1, :1])
            context = context._replace(t_star=self.spread * (2 * u - 1))
        return (self._diffused(z, 0, context, noise) if self.chains else z), context

    def step(self, k: int, state: Tensor, context: Kept, noise: Noise) -> Tensor:
        chain, i = divmod(k, self.per_chain)
        if i == 0 and chain > 0:
            state = self._diffused(state, chain, context, noise.fold("chain", chain))
        t, t_next = self._time(chain, i, context), self._time(chain, i + 1, context)
        return self.rule(self.denoising(k, context, noise), state, t, t_next, k, noise)

    def finish(self, state: Tensor, context: Kept) -> Images:
        return self.leave(state, context)

    def sample(self, like: Images, noise: Noise) -> Images:
        """DDIM's chain from noise at quadratic times (Song et al. 2021, arXiv 2010.02502, appendix D.2).

        A network with a condition gets one that its prior draws.
        """
        z, context = self.enter(torch.full_like(like, 0.5), noise)
        context = self.imagined(context, like, noise.fold("condition"))
        denoiser, z = self.conditioned(context), noise.normal("sample", like=z)
        n, steps = self.schedule.n, self.SAMPLING
        indices = sorted({max(round(n * (k / steps) ** 2), 1) for k in range(1, steps + 1)}, reverse=True)
        for k, (i, i_next) in enumerate(pairwise([*indices, 0])):
            z = _sampler.eta_rule(denoiser, z, i / n, i_next / n, k, noise, eta=0.0)
        return self.leave(z, context)

    def imagined(self, context: Kept, like: Images, noise: Noise) -> Kept:
        """What is kept, with the condition of an image that doesn't exist in place of that of a real one."""
        return context

    def conditioned(self, context: Kept) -> Denoiser:
        """The network under the condition that is kept, as it was trained."""
        return self.denoiser.given(beside=context.beside, embedded=context.embedded)

    def diffused(self, k: int, x: Images, noise: Noise) -> Tensor | None:
        if self.spread or len(self.chains) != 1:
            return None
        z, context = self.enter(x, noise)
        if k == 0:
            return self._diffused(z, 0, context, noise)
        return _sampler.diffuse(z, self.denoiser.alpha_bar(self.times[k]), noise)

    @property
    def nfe(self) -> int:
        """Of the chain and of what stands before and after it; at least 1."""
        return self.rounds * max(self.passes + self.steps * (1 if self.condition in (0, 1) else 2), 1)

    def check_pull(self, strength: float, matched: bool) -> None:
        """No step may move z beyond what it is pulled to: from there on the chain swings, and what it gives is noise.

        Raises:
            ValueError: with the strongest pull that these steps bear.
        """
        gains = [0.0]
        for chain in self.chains:
            for t, t_next in pairwise([*chain, self.t_end]):
                a = self.denoiser.alpha_bar(t)
                gain: Any = -self.response(t, t_next) * _structure.pull(a, strength=1.0, matched=matched)
                gains.append(gain)
        if strength * max(gains) > 1:
            raise ValueError(
                f"strength={strength} overshoots: with these steps it must be at most {1 / max(gains):.3g}; "
                "more steps bear more"
            )

    @property
    def times(self) -> list[float]:
        """The times of the first chain, from t_star to its end."""
        return [*self.chains[0], self.t_end] if self.chains else []

    def _time(self, chain: int, i: int, context: Kept) -> Time:
        """Time i of a chain: its own, or where rows differ that of the row's."""
        if i == self.per_chain:
            return self.t_end
        if context.t_star is None:
            return self.chains[chain][i]
        return self.schedule.time(self.chains[chain][0] + context.t_star, i, self.per_chain)

    def _diffused(self, z: Tensor, chain: int, context: Kept, noise: Noise) -> Tensor:
        t = self._time(chain, 0, context)
        papers = self.rule is _sampler.euler_maruyama  # which noises by the table whatever it integrates
        return _sampler.diffuse(z, self.schedule.discrete(t) if papers else self.denoiser.alpha_bar(t), noise)
