"""Random search: the best of many random perturbations."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks._base import Attack, State, first_broken
from attacks._gradient import Victim, margin
from attacks._threat import ThreatModel


class Uniform(Attack):
    """x_adv = argmax over ``queries`` random perturbations of full radius of the mean margin over ``eot`` draws.

    The control that every attack must beat: what noise alone does to a defense.

    Args:
        queries: perturbations tried.
        eot: draws per perturbation.

    Raises:
        ValueError: if a count is below 1.
    """

    black_box = True

    def __init__(self, *, queries: int = 100, eot: int = 20):
        if min(queries, eot) < 1:
            raise ValueError(f"queries and eot must be at least 1, got {queries}, {eot}")
        self.queries, self.eot = queries, eot

    def display(self, stochastic: bool) -> str:
        return f"Uniform (best of {self.queries}{f', EOT {self.eot}' if stochastic else ''})"

    def length(self, stochastic: bool) -> int:
        return self.queries

    def evaluations(self, stochastic: bool) -> int:
        return self.queries * self.eot

    def gradients(self, stochastic: bool) -> int:
        return 0

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        return {
            "x_adv": x.clone(),
            "margin": torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device),
            "broken_at": torch.full((len(x),), -1, device=x.device),
        }

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        s = dict(state)
        rival = threat.control(x, victim.tape.fold("uniform", k))
        found = victim.evaluate(rival, y, margin, "uniform", "draws", k, eot=self.eot, gradient=False)
        s["broken_at"] = first_broken(s["broken_at"], found, k)
        better = found.loss > s["margin"]
        s["x_adv"] = torch.where(better.view(-1, 1, 1, 1), rival, s["x_adv"])
        s["margin"] = torch.where(better, found.loss, s["margin"])
        return s

    def finish(self, state: State) -> Tensor:
        return state["x_adv"][None]
