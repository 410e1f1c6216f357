"""PGD by looking only: the gradient estimated from differences along random directions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attacks._gradient import Evaluation, Victim
from attacks._threat import random_signs
from attacks.pgd import PGD


class SPSA(PGD):
    """PGD whose gradient is the mean over random sign vectors v of (L(x + delta v) - L(x - delta v)) / (2 delta) · v.

    Probes stay in [0, 1]; where a pixel is nearer to an end than delta, its difference is over what is left of 2 delta.

    Both ends of a difference, and all vectors of an iteration, see the same draws. A purifier whose gradient vanishes
    is no shelter from it.

    Args:
        samples: sign vectors per iteration, two looks each.
        delta: length of a probe per pixel.
        steps, eot, step, step_size, restarts, random_start, iterate, sign: as for ``pgd``.
        loss: as for ``pgd``, but the margin by default.

    Raises:
        ValueError: as ``pgd``, and if the count of samples is below 1 or delta isn't positive.

    Reference: Uesato et al. 2018 (arXiv 1802.05666).
    """

    black_box = True
    title = "SPSA"
    shown = (*PGD.shown, "samples")

    def __init__(self, *, samples: int = 32, delta: float = 0.01, loss: str = "margin", **pgd: Any):
        super().__init__(loss=loss, **pgd)
        if samples < 1 or delta <= 0:
            raise ValueError(f"samples must be at least 1 and delta positive, got {samples} and {delta}")
        self.samples, self.delta = samples, delta

    def display(self, stochastic: bool) -> str:
        return super().display(stochastic).replace(" it", f" it × {self.samples}", 1)

    def evaluations(self, stochastic: bool) -> int:
        return (2 * self.samples + 1) * super().evaluations(stochastic)

    def distinct(self, stochastic: bool) -> int:
        return super().evaluations(stochastic)

    def gradients(self, stochastic: bool) -> int:
        return 0

    def look(self, k: int, x_adv: Tensor, x: Tensor, y: Tensor, victim: Victim) -> Evaluation:
        look = partial(victim.evaluate, eot=self.eot, gradient=False)
        gradient = torch.zeros_like(x_adv)
        for sample in range(self.samples):
            probe = self.delta * random_signs(victim.tape.fold("spsa", k, sample), "signs", like=x_adv)
            up, down = (look((x_adv + end * probe).clamp(0, 1), y, self.loss, "spsa", k) for end in (1, -1))
            gradient += (up.loss - down.loss).view(-1, 1, 1, 1) * probe
        apart = (x_adv + self.delta).clamp(0, 1) - (x_adv - self.delta).clamp(0, 1)  # of a probe's two ends
        here = look(x_adv, y, self.loss, "spsa", k)  # the probes may lie outside the ball
        return here._replace(gradient=gradient / (apart * self.delta * self.samples))
