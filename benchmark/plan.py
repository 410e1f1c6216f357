"""How much a run will compute: the draws of an attack and of the verdict, counted before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from attacks import Attack


@dataclass(frozen=True)
class Plan:
    """Draws of the defense per image, and image passes of the purifier's network in all.

    A pass is one image through the network once, forward or backward. For a third-party attack it is roughly an
    upper bound: images that break leave early. So it is for an attack that retires images.
    """

    n: int
    nfe: int
    forwards: int
    backwards: int
    upper_bound: bool

    @property
    def passes(self) -> int:
        return self.n * self.nfe * (self.forwards + self.backwards)

    def __str__(self) -> str:
        bound = "at most about " if self.upper_bound else ""
        return (
            f"plan: {self.n} images × ({bound}{self.forwards:,} forward + {self.backwards:,} backward draws) × "
            f"{self.nfe} network evaluations = {bound}{self.passes:,} image passes"
        )


def plan(
    attack: Attack, *, stochastic: bool, nfe: int, n: int, select: int, draws: int, null: int | None = None
) -> Plan:
    """The plan of one cell: the attack, the null floor (``null`` draws at x), selection, three verdicts.

    Without ``null`` it is the attack's different draws.
    """
    observed = attack.evaluations(stochastic)
    verdicts = 3 * draws + (attack.versions(stochastic) + 1) * select
    if null is None:
        null = max(attack.distinct(stochastic), attack.looks(stochastic)) if stochastic else 0
    return Plan(
        n, nfe, observed + null + verdicts, attack.gradients(stochastic),
        attack.package(stochastic) is not None or attack.retire > 0,
    )  # fmt: skip
