"""Attacks search for x_adv within a threat model. One attack is one file."""

from attacks._base import Attack, AttackError, Found
from attacks._gradient import LOSSES, Victim
from attacks._threat import L2, NORMS, Linf, ThreatModel
from attacks._views import VIEWS, NotApplicable, View

__all__ = [
    "L2",
    "LOSSES",
    "NORMS",
    "VIEWS",
    "Attack",
    "AttackError",
    "Found",
    "Linf",
    "NotApplicable",
    "ThreatModel",
    "Victim",
    "View",
]
