"""The best of many random perturbations."""

from __future__ import annotations

from torch import Tensor

from attacks._gradient import Victim
from attacks._search import RandomSearch
from attacks._threat import ThreatModel


class Uniform(RandomSearch):
    """x_adv = the best of ``queries`` random perturbations of full radius, cut off at [0, 1].

    Random signs in Linf, random directions in L2, flows of random signs: the control that every attack
    must beat, what noise alone does to a defense.

    Args:
        queries, eot, refresh: as ``RandomSearch``.
    """

    def propose(self, k: int, x_adv: Tensor, x: Tensor, victim: Victim, threat: ThreatModel) -> Tensor:
        return threat.extreme(x, victim.tape.fold(self.site, k))
