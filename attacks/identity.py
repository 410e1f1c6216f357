"""No attack: what the whole protocol reads when nothing is perturbed."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks._base import Attack, State
from attacks._gradient import Victim
from attacks._threat import ThreatModel


class Identity(Attack):
    """x_adv = x. Its robust accuracy is the clean accuracy under other draws."""

    black_box = True

    def display(self, stochastic: bool) -> str:
        return "none"

    def length(self, stochastic: bool) -> int:
        return 1

    def evaluations(self, stochastic: bool) -> int:
        return 0

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        return {"x_adv": threat.origin(x), "broken_at": torch.full((len(x),), -1, device=x.device)}

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        return state

    def finish(self, state: State) -> Tensor:
        return state["x_adv"][None]
