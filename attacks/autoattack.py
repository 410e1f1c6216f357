"""AutoAttack: the package itself on a deterministic defense, its attacks over draws on a stochastic one."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from attacks._autopgd import AutoPGD
from attacks._base import Attack, State
from attacks._ensemble import Ensemble
from attacks._gradient import Victim
from attacks._package import Model, contained, seed_of
from attacks._threat import ThreatModel
from attacks.square import Square

SCHEDULE = {"n_iter": 1, "n_iter_orig": 1, "n_iter_2": 0.22, "n_iter_min": 0.06, "size_decr": 0.03}
"""What the package's APGD derives from its length when it is made: checkpoints that another length has to move, too."""


class AutoAttack(Ensemble):
    """The ensembles of Croce and Hein.

    | version | attacks |
    |---|---|
    | standard | APGD-CE, targeted APGD-DLR, targeted FAB, Square |
    | rand | APGD-CE and APGD-DLR, over draws |
    | plus | APGD-CE, APGD-DLR (five starts each), targeted APGD-DLR, FAB, targeted FAB, Square |

    ``backend="pyautoattack"`` is the package itself, ``"native"`` this code: the draws share a batch, every decision is
    a mean over draws, no image is left out for a lucky draw, and every result is a candidate; it has no FAB, and is
    named after what it has. Left to itself, a deterministic defense meets ``standard`` by the package, at the package's
    own numbers, a stochastic one ``rand`` natively.

    Args:
        steps: iterations of each APGD; the package's own is 100.
        eot: draws per look; the package's own is 20.
        queries: of Square, natively; the package's own is 5,000.
        version: "standard", "rand", "plus" or "auto".
        backend: "native", "pyautoattack" or "auto".
        retire: natively, leave an image that a candidate got wrong in all draws, and in so many new ones; 0: none.

    Raises:
        ValueError: if a count is below 1, or the version or backend is unknown.

    Reference: Croce and Hein 2020 (arXiv 2003.01690).
    """

    norms = ("Linf", "L2")
    shown = ("steps", "eot", "queries", "version", "backend", "retire")
    VERSIONS, BACKENDS = ("standard", "rand", "plus"), ("native", "pyautoattack")
    TARGETS, RESTARTS = 9, 5
    COST = {"standard": (7_864, 1_910), "plus": (9_787, 3_319)}
    """Forwards and backwards of one image that stays robust with ten classes, by the package, as counted."""
    LOOKS = {"standard": 5, "rand": 3, "plus": 7}
    """Of how many single draws the package's own verdict is made: one at x, one after each attack."""

    def __init__(
        self,
        *,
        steps: int = 100,
        eot: int = 20,
        queries: int = 5000,
        version: str = "auto",
        backend: str = "auto",
        retire: int = 0,
    ):
        if min(steps, eot, queries) < 1 or retire < 0:
            raise ValueError(
                f"steps, eot and queries must be positive, retire not negative, got {steps}, {eot}, {queries}, {retire}"
            )
        for what, value, known in (("version", version, self.VERSIONS), ("backend", backend, self.BACKENDS)):
            if value not in ("auto", *known):
                raise ValueError(f"{what} must be one of auto, {', '.join(known)}, got {value!r}")
        self.steps, self.eot, self.queries, self.chosen, self.backend = steps, eot, queries, version, backend
        self.retire = retire

    def version(self, stochastic: bool) -> str:
        """Which of the three it is for such a defense."""
        return ("rand" if stochastic else "standard") if self.chosen == "auto" else self.chosen

    def package(self, stochastic: bool) -> str | None:
        chosen = ("native" if stochastic else "pyautoattack") if self.backend == "auto" else self.backend
        return None if chosen == "native" else chosen

    def members(self, stochastic: bool) -> list[Attack]:
        version = self.version(stochastic)
        restarts = self.RESTARTS if version == "plus" else 1
        ranks = () if version == "rand" else range(1, self.TARGETS + 1)
        losses = ("ce",) if version == "standard" else ("ce", "dlr")
        run = partial(AutoPGD, steps=self.steps, eot=self.eot)
        members: list[Attack] = [run(loss=loss, restart=r) for loss in losses for r in range(restarts)]
        members += [run(rank=rank) for rank in ranks]
        return members if version == "rand" else [*members, Square(queries=self.queries, eot=self.eot)]

    def display(self, stochastic: bool) -> str:
        version, package = self.version(stochastic), self.package(stochastic)
        if package and version != "rand":
            return f"AutoAttack ({version}, {package})"
        full = (self.steps, self.eot, self.retire) == (100, 20, 0)
        if full and version == "rand":
            return f"AutoAttack (rand, {package})" if package else "AutoAttack-rand (native)"
        draws = f", EOT {self.eot}" if stochastic or version == "rand" else ""
        draws += f", retire {self.retire}" if self.retire and not package else ""
        losses = {"rand": "CE+DLR", "standard": "CE+T", "plus": f"(CE+DLR)×{self.RESTARTS}+T"}[version]
        square = "" if version == "rand" else f"+Square ({self.queries} queries)"
        by = f", {package}" if package else ""
        return f"APGD-{losses} ({self.steps} it{draws}{by}){square}"

    def least_classes(self, stochastic: bool) -> int:
        if self.package(stochastic):  # the targeted DLR divides by z_(1) - (z_(3) + z_(4)) / 2
            return 3 if self.version(stochastic) == "rand" else 4
        return super().least_classes(stochastic)

    def length(self, stochastic: bool) -> int:
        return 1 if self.package(stochastic) else super().length(stochastic)

    def versions(self, stochastic: bool) -> int:
        return 1 if self.package(stochastic) else super().versions(stochastic)

    def evaluations(self, stochastic: bool) -> int:
        return self._cost(stochastic)[0] if self.package(stochastic) else super().evaluations(stochastic)

    def gradients(self, stochastic: bool) -> int:
        return self._cost(stochastic)[1] if self.package(stochastic) else super().gradients(stochastic)

    def distinct(self, stochastic: bool) -> int:
        return 0 if self.package(stochastic) else super().distinct(stochastic)

    def looks(self, stochastic: bool) -> int:
        return self.LOOKS[self.version(stochastic)] if self.package(stochastic) else 0

    def caveat(self, stochastic: bool) -> str | None:
        if not stochastic or self.version(stochastic) == "rand":
            return None
        if not self.package(stochastic):
            return (
                f"AutoAttack's version {self.version(stochastic)} was made for deterministic defenses, and is no bound "
                "on one that draws; here its APGDs and Square run with every decision averaged over draws, without FAB"
            )
        return (
            f"AutoAttack's version {self.version(stochastic)} was made for deterministic defenses: on one that draws, "
            "FAB follows boundaries that move, Square keeps what was lucky once, and an image that a single draw got "
            "wrong is given up unattacked, so the package's own verdict is no bound on robustness"
        )

    def ignored(self, stochastic: bool) -> tuple[str, ...]:
        if not self.package(stochastic):
            return ("queries",) if self.version(stochastic) == "rand" else ()
        return ("queries", "retire") if self.version(stochastic) == "rand" else ("steps", "eot", "queries", "retire")

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        if not self.package(victim.stochastic):
            return super().step(k, state, x, y, victim, threat)
        from pyautoattack import AutoAttack as Package

        version, model = self.version(victim.stochastic), Model(victim, x.device)
        with contained(victim, x.device), torch.no_grad():
            package = Package(
                model, norm=threat.norm, eps=threat.bound, seed=seed_of(victim), version=version, device=x.device
            )
            if version == "rand":
                package.apgd.eot_iter = self.eot
                for name, share in SCHEDULE.items():
                    setattr(package.apgd, name, max(int(share * self.steps), 1))
            # nine target classes, or all others where there are fewer
            classes = victim.defense(x[:1], victim.tape[:1], victim.view).shape[1]
            targets = min(self.TARGETS, classes - 1)
            package.apgd_targeted.n_target_classes = package.fab.n_target_classes = targets
            x_adv, y_adv = package.run_standard_evaluation(x, y, batch_size=len(x))
        model.charge(len(x))
        return state | {"candidates": x_adv[None], "package_correct": y_adv == y}

    def _cost(self, stochastic: bool) -> tuple[int, int]:
        version = self.version(stochastic)
        if version != "rand":
            return self.COST[version]
        draws = 2 * (self.steps + 1) * self.eot
        return draws + 7, draws  # and single draws: three checks, one at x, two before and one after each search
