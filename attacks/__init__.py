"""Attacks search for x_adv within a threat model. One attack is one file."""

from attacks._adjoint import NotApplicable
from attacks._base import Attack, AttackError, Found
from attacks._calls import Batcher, Calls
from attacks._gradient import LOSSES, Victim
from attacks._precision import PRECISIONS
from attacks._threat import L2, NORMS, Linf, ThreatModel
from attacks._views import VIEWS, View

__all__ = [
    "L2",
    "LOSSES",
    "NORMS",
    "PRECISIONS",
    "VIEWS",
    "Attack",
    "AttackError",
    "Batcher",
    "Calls",
    "Found",
    "Linf",
    "NotApplicable",
    "ThreatModel",
    "Victim",
    "View",
]
