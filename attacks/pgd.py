"""Projected gradient ascent, with the gradient averaged over draws."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks._base import Attack, State, first_broken
from attacks._gradient import LOSSES, Victim
from attacks._threat import ThreatModel


class PGD(Attack):
    """x_{k+1} = P(x_k + size · direction(mean over draws of grad L(f∘g(x_k), y))).

    direction is the sign in Linf, the normalised gradient in L2; size = ``step`` · eps / ``steps``. The last iterate
    of each restart is a candidate.

    Args:
        steps: iterations.
        eot: draws per gradient.
        step: step size as a multiple of eps / steps.
        loss: "ce", "dlr" or "margin".
        restarts: independent searches.
        random_start: start in a random point of the ball, otherwise in x.

    Raises:
        ValueError: if a count is below 1, the step isn't positive, or the loss is unknown.

    Reference: Madry et al. 2018 (arXiv 1706.06083); EOT: Athalye et al. 2018 (arXiv 1707.07397).
    """

    def __init__(
        self,
        *,
        steps: int = 200,
        eot: int = 20,
        step: float = 2.5,
        loss: str = "ce",
        restarts: int = 1,
        random_start: bool = True,
    ):
        if min(steps, eot, restarts) < 1 or step <= 0:
            raise ValueError(f"steps, eot, restarts and step must be positive, got {steps}, {eot}, {restarts}, {step}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        self.steps, self.eot, self.step_factor, self.restarts = steps, eot, step, restarts
        self.versions = restarts
        self.loss, self.random_start = LOSSES[loss], random_start
        self.loss_name = loss

    def display(self, stochastic: bool) -> str:
        draws = f", EOT {self.eot}" if stochastic else ""
        restarts = f" × {self.restarts}" if self.restarts > 1 else ""
        return f"PGD-{self.loss_name.upper()} ({self.steps} it{draws}){restarts}"

    def least_classes(self, stochastic: bool) -> int:
        return 3 if self.loss_name == "dlr" else 2

    def length(self, stochastic: bool) -> int:
        return self.steps * self.restarts

    def evaluations(self, stochastic: bool) -> int:
        return self.length(stochastic) * self.eot

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        return {
            "x_adv": torch.stack([self._first(x, victim, threat, r) for r in range(self.restarts)]),
            "broken_at": torch.full((len(x),), -1, device=x.device),
        }

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        restart = k // self.steps
        x_adv = state["x_adv"][restart]
        evaluation = victim.evaluate(x_adv, y, self.loss, "pgd", k, eot=self.eot)
        size = self.step_factor * threat.bound / self.steps
        state["x_adv"][restart] = threat.project(x_adv + threat.step(self.shaped(evaluation.gradient), size), x)
        state["broken_at"] = first_broken(state["broken_at"], evaluation, k)
        return state

    def finish(self, state: State) -> Tensor:
        return state["x_adv"]

    def shaped(self, direction: Tensor) -> Tensor:
        """A direction as this attack may take it; PGD takes any."""
        return direction

    def _first(self, x: Tensor, victim: Victim, threat: ThreatModel, restart: int) -> Tensor:
        return threat.random(x, victim.tape.fold("pgd", "start", restart)) if self.random_start else x.clone()
