"""Reconstruction by a hierarchical VAE that keeps coarse groups of latents and draws fine ones from the prior."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from purifiers import _objectives
from purifiers._base import Batch, Images, Purifier
from purifiers._ladder import Ladder, Normal
from purifiers._noise import Noise


class Size(NamedTuple):
    """Channels inside; (resolution, latents) of every group from the top."""

    width: int
    groups: tuple[tuple[int, int], ...]


SIZES = {
    "tiny": Size(8, ((1, 4), (2, 2), (4, 1))),
    "small": Size(48, ((1, 16), (4, 4), (4, 4), (8, 2), (8, 2))),
    "compact": Size(64, ((1, 16), (4, 4), (4, 4), (8, 4), (8, 4), (16, 2))),
    "medium": Size(128, ((1, 64), (4, 8), (4, 8), (4, 8), (8, 4), (8, 4), (8, 4), (16, 2), (16, 2), (16, 2))),
}
"""For 32×32 images: compact without a GPU, medium with one."""
RULES = ("mean", "sample", "mix", "prior")


class State(NamedTuple):
    """What is kept over all steps: the images (for their shape), and the features that the kept groups ask for."""

    x: Tensor
    features: tuple[Tensor, ...]


class NVAE(Purifier):
    """g(x) = E[x | z], with z_l ~ q(z_l | z_<l, x) in the first ``keep`` groups, z_l ~ p_tau(z_l | z_<l) in the others.

    p_tau has the prior's mean and tau times its deviation. Above the cut the posterior is never consulted: it sees the
    attacked image, and would write what the coarse groups left out back into it. A rule per group:

    - "mean", "sample": the mean of q, a draw from q;
    - "prior": mu_p + tau sigma_p n;
    - "mix": (1 - a_l) mu_q + a_l (mu_p + tau sigma_p n), a_l = ½ (1 - cos(π l / (L - 1))); it leaks by design.

    Args:
        ladder: features upwards, groups downwards.
        keep: groups that take ``rule``; 0 all but those at the highest resolution.
        rule: of the kept groups, or a list with a rule for every group, e.g. mean+sample+mix+prior.
        tau: temperature of the prior.
        rounds: repetitions of the whole.

    Raises:
        ValueError: if ``keep`` isn't among the groups or stands beside a list of rules, if a rule is unknown or
            missing, or if ``tau`` is negative.

    Reference: Vahdat and Kautz 2020 (arXiv 2007.03898); body: Child 2021 (arXiv 2011.10650); mixing as a purifier:
    Serez et al. 2025 (arXiv 2412.03453).
    """

    dial = "keep"
    unset_at_zero = ("keep",)

    def __init__(self, ladder: Ladder, *, keep: int = 0, rule: str | list = "mean", tau: float = 0.6, rounds: int = 1):
        super().__init__(rounds=rounds)
        groups = len(ladder.groups)
        if not 0 <= keep <= groups:
            raise ValueError(f"keep must lie in 1 ... {groups}, the groups there are, or be 0; got {keep}")
        if tau < 0:
            raise ValueError(f"tau must not be negative, got {tau}")
        kept = keep or sum(s < ladder.sides[-1] for s in ladder.sides)
        if isinstance(rule, list) and keep:
            raise ValueError(f"a list of rules says itself which groups are kept: leave out keep={keep}")
        rules = rule if isinstance(rule, list) else [rule] * kept + ["prior"] * (groups - kept)
        if unknown := sorted({str(r) for r in rules} - set(RULES)):
            raise ValueError(f"rule is {', '.join(RULES)} or a list of them joined by +, got {'+'.join(unknown)}")
        if len(rules) != groups:
            raise ValueError(f"rule: {groups} groups need as many rules, got {len(rules)}: {'+'.join(rules)}")
        self.ladder, self.steps, self.rules, self.tau = ladder, groups, rules, tau
        self.stochastic = "sample" in rules or (tau > 0 and bool({"prior", "mix"} & set(rules)))

    def start(self, x: Images, noise: Noise) -> tuple[Tensor, State]:
        """The state at the top, the same for all images; the features that groups ask for."""
        features = self.ladder.features(x)
        consulted = [features[s] for s, rule in zip(self.ladder.sides, self.rules, strict=True) if rule != "prior"]
        return self.ladder.top.expand(len(x), -1, -1, -1).contiguous(), State(x, tuple(consulted))

    def step(self, k: int, state: Tensor, context: State, noise: Noise) -> Tensor:
        """Group k: the state with z_k in it."""
        group, rule = self.ladder.group(k), self.rules[k]
        h = self.ladder.raised(state, self.ladder.sides[k])
        prior, onwards = group.prior(h)
        if rule == "prior":
            return group(onwards, self._drawn(prior, k, noise))
        features = context.features[sum(r != "prior" for r in self.rules[:k])]
        posterior, _, _ = group.posterior(h, features, prior)
        if rule == "sample":
            z = posterior.mean + posterior.sigma * noise.normal("posterior", k, like=posterior.mean)
        elif rule == "mix":
            a = 0.5 * (1 - math.cos(math.pi * k / max(self.steps - 1, 1)))
            z = (1 - a) * posterior.mean + a * self._drawn(prior, k, noise)
        else:
            z = posterior.mean
        return group(onwards, z)

    def finish(self, state: Tensor, context: State) -> Images:
        return self.ladder.image(state, context.x.shape).clamp(0, 1)

    def sample(self, like: Images, noise: Noise) -> Images:
        """Every group drawn from its prior, at temperature 1."""
        return NVAE(self.ladder, rule="prior", tau=1.0)(like, noise)

    @property
    def nfe(self) -> int:
        """One pass of the ladder."""
        return self.rounds

    def objectives(self, batch: Batch, noise: Noise, *, nested: float = 0.0, warm_up: float = 0.0) -> dict[str, Tensor]:
        """The negative ELBO in nats per pixel, with a learned width of the likelihood.

        Args:
            nested: share of the batches that draw all groups after a random one from the prior at the purifier's tau:
                at tau = 1 the ELBO of a shorter hierarchy, so that every cut is a model of its own.
            warm_up: share of the training over which the divergences grow to their full weight, balanced until then.
        """
        x, ladder = batch.x, self.ladder
        u = float(noise.uniform("nested", like=x[:, :1, 0, 0])[0])
        kept = 1 + int(u / nested * (self.steps - 1)) if u < nested else self.steps
        features, h, divergences = ladder.features(x), ladder.top.expand(len(x), -1, -1, -1), []
        for k, side in enumerate(ladder.sides):
            group, h = ladder.group(k), ladder.raised(h, side)
            prior, onwards = group.prior(h)
            n = noise.normal("posterior", k, like=prior.mean)
            if k < kept:
                q, shift, logscale = group.posterior(h, features[side], prior)
                divergences.append(_objectives.divergence(shift, 2 * logscale).flatten(1).sum(1))
                h = group(onwards, q.mean + q.sigma * n)
            else:
                h = group(onwards, prior.mean + self.tau * prior.sigma * n)
        total = _objectives.balanced(divergences, ladder.sides[:kept], batch.progress, warm_up)
        return {"ladder": (_objectives.gaussian(x, ladder.image(h, x.shape)) + total) / x[0].numel()}

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        width, groups = SIZES[size]
        return {"ladder": Ladder(shape[0], max(shape[1:]), width, groups)}

    def _drawn(self, prior: Normal, k: int, noise: Noise) -> Tensor:
        if self.tau == 0:
            return prior.mean
        return prior.mean + self.tau * prior.sigma * noise.normal("prior", k, like=prior.mean)
