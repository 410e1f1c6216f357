"""Random search: keep the best of what is proposed, by the mean margin over draws."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from attacks._base import Attack, State, first_broken
from attacks._gradient import Victim, margin
from attacks._threat import ThreatModel


class RandomSearch(Attack):
    """x_{k+1} = the better of x_k and ``propose(k, x_k)``, by the mean over ``eot`` draws of max_{i≠y} z_i - z_y.

    The draws are the same for ``refresh`` queries, so that x_k and its rival are compared under equal noise, and then
    renewed, and x_k's margin with them, so that the search doesn't live on one lucky set. With fresh draws for every
    query the best margin would be a record of luck.

    Args:
        queries: proposals.
        eot: draws per evaluation.
        refresh: queries under one set of draws.

    Raises:
        ValueError: if a count is below 1.
    """

    black_box = True

    def __init__(self, *, queries: int = 5000, eot: int = 20, refresh: int = 100):
        if min(queries, eot, refresh) < 1:
            raise ValueError(f"queries, eot and refresh must be at least 1, got {queries}, {eot}, {refresh}")
        self.queries, self.eot, self.refresh = queries, eot, refresh
        self.site = type(self).__name__.lower()

    @abstractmethod
    def propose(self, k: int, x_adv: Tensor, x: Tensor, victim: Victim, threat: ThreatModel) -> Tensor:
        """Proposal k, in the ball up to rounding; randomness from ``victim.tape.fold(self.site, k)``."""

    def display(self, stochastic: bool) -> str:
        return f"{type(self).__name__} ({self.queries} queries{f', EOT {self.eot}' if stochastic else ''})"

    def length(self, stochastic: bool) -> int:
        return self.queries

    def evaluations(self, stochastic: bool) -> int:
        renewals = (self.queries - 1) // self.refresh if stochastic else 0
        return (self.queries + renewals) * self.eot

    def distinct(self, stochastic: bool) -> int:
        return -(-self.queries // self.refresh) * self.eot

    def gradients(self, stochastic: bool) -> int:
        return 0

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        return {
            "x_adv": threat.origin(x),
            "margin": torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device),
            "broken_at": torch.full((len(x),), -1, device=x.device),
        }

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        s = dict(state)
        draws = (self.site, "draws", k // self.refresh)
        if victim.stochastic and k > 0 and k % self.refresh == 0:
            s["margin"] = _highest(
                victim.evaluate(threat.render(s["x_adv"], x), y, margin, *draws, eot=self.eot, gradient=False).loss
            )
        rival = self.propose(k, s["x_adv"], x, victim, threat)
        found = victim.evaluate(threat.render(rival, x), y, margin, *draws, eot=self.eot, gradient=False)
        s["broken_at"] = first_broken(s["broken_at"], found, k)
        loss = _highest(found.loss)
        better = loss > s["margin"]
        s["x_adv"] = torch.where(better.view(-1, 1, 1, 1), rival, s["x_adv"])
        s["margin"] = torch.where(better, loss, s["margin"])
        return s

    def finish(self, state: State) -> Tensor:
        return state["x_adv"][None]

    def lost(self, state: State) -> Tensor:
        return torch.zeros_like(state["margin"], dtype=torch.bool)[None]  # a search by means doesn't look at each draw


def _highest(loss: Tensor) -> Tensor:
    """A loss that isn't a number is the highest: the logits overflowed, which is as wrong as a prediction gets."""
    return loss.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
