"""Transfer: PGD on another defense, judged on this one."""

from __future__ import annotations

from typing import Any

from attacks.pgd import PGD


class Transfer(PGD):
    """PGD whose gradients come from ``source`` + the defense's own classifier; the defense never answers a query.

    Args:
        source: the purifier that is differentiated, without options or by the name of a card; "identity" is the bare
            classifier.
        steps, eot, step, step_size, loss, restarts, random_start, iterate, sign: as for ``pgd``.

    Raises:
        ValueError: as ``pgd``.

    Reference: Papernot et al. 2016 (arXiv 1605.07277).
    """

    black_box = True
    shown = (*PGD.shown, "source")

    def __init__(self, *, source: str = "identity", **pgd: Any):
        super().__init__(**pgd)
        self.source = source

    def display(self, stochastic: bool) -> str:
        return f"{super().display(stochastic)} from {self.source}"
