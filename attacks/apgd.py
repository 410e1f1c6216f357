"""Auto-PGD, untargeted or aimed at the likeliest other classes."""

from __future__ import annotations

from attacks._autopgd import AutoPGD
from attacks._ensemble import Ensemble
from attacks._gradient import LOSSES


class APGD(Ensemble):
    """Auto-PGD, untargeted by restarts or, with ``targets``, at each of the likeliest other classes.

    Every run leaves a candidate. See ``attacks._autopgd`` for one run.

    Args:
        steps: iterations of a run.
        eot: draws per gradient.
        loss: "ce", "dlr", "margin" or "error"; with targets it is the targeted DLR.
        restarts: runs from other starts.
        targets: how many classes are aimed at, the likeliest by mean logits at x; 0 for none.
        returns: go back to the best point at a checkpoint, and end in the best, as the reference does. Where draws
            differ the best of many looks is the luckiest, too; without returns a search goes on from where it is.
        retire: leave an image whose candidate is wrong in all draws, and in so many new ones; 0 leaves none.

    Raises:
        ValueError: if a count is below 1, ``targets`` is negative or the loss is unknown.

    Reference: Croce and Hein 2020 (arXiv 2003.01690).
    """

    shown = ("steps", "eot", "loss", "restarts", "targets", "retire", "returns")
    later = ("returns",)

    def __init__(
        self,
        *,
        steps: int = 100,
        eot: int = 20,
        loss: str = "ce",
        restarts: int = 1,
        targets: int = 0,
        retire: int = 0,
        returns: bool = True,
    ):
        if min(steps, eot, restarts) < 1 or min(targets, retire) < 0:
            raise ValueError(
                f"steps, eot and restarts must be positive, targets and retire not negative, "
                f"got {steps}, {eot}, {restarts}, {targets}, {retire}"
            )
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        self.steps, self.eot, self.loss, self.restarts, self.targets = steps, eot, loss, restarts, targets
        self.retire, self.returns = retire, returns

    def members(self, stochastic: bool) -> list[AutoPGD]:
        return [
            AutoPGD(steps=self.steps, eot=self.eot, loss=self.loss, restart=r, rank=rank, returns=self.returns)
            for rank in (range(1, self.targets + 1) if self.targets else (0,))
            for r in range(self.restarts)
        ]

    def display(self, stochastic: bool) -> str:
        draws = f", EOT {self.eot}" if stochastic else ""
        aims = f", {self.targets} targets" if self.targets else ""
        aims += "" if self.returns else ", no return"
        aims += f", retire {self.retire}" if self.retire else ""
        restarts = f" × {self.restarts}" if self.restarts > 1 else ""
        loss = "T" if self.targets else self.loss.upper()
        return f"APGD-{loss} ({self.steps} it{draws}{aims}){restarts}"
