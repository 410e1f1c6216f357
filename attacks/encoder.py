"""An attack on the encoder alone: if it falls, everything behind it falls?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attacks._adjoint import NotApplicable
from attacks._gradient import Evaluation, Victim
from attacks._views import Watched
from attacks.pgd import PGD


class Encoder(PGD):
    """PGD on ‖e(x') - e(x)‖² / d, with e the purifier's first stage; then the whole defense is judged.

    e is the first stage of a purifier that encodes, under one noise for both images. Labels and the classifier play no
    part in the search, so what is lost here is lost by the encoder. Before a codebook e is what will be quantised; the
    records say how many codes flipped.

    Args:
        steps, eot, step, step_size, restarts, sign: as for ``pgd``.

    Raises:
        ValueError: as ``pgd``.
        NotApplicable: for a purifier that doesn't encode, or under a view that doesn't differentiate it.
    """

    restricted = True
    title = "encoder PGD"

    def __init__(self, *, steps: int = 200, eot: int = 20, step: float = 2.5, step_size: float = 0.0, restarts: int = 1,
                 sign: bool = False):  # fmt: skip
        # at x itself the displacement has no gradient, and a best iterate would be chosen by labels
        super().__init__(steps=steps, eot=eot, step=step, step_size=step_size, restarts=restarts, sign=sign)

    def display(self, stochastic: bool) -> str:
        return super().display(stochastic).replace(f"-{self.loss_name.upper()}", "")

    def look(self, k: int, x_adv: Tensor, x: Tensor, y: Tensor, victim: Victim) -> Evaluation:
        first = _First()

        def displacement(logits: Tensor, labels: Tensor, clean: Tensor) -> Tensor:
            return first.displacement(clean.to(logits.dtype))

        return victim.evaluate(
            x_adv, y, displacement, "pgd", k, eot=self.eot, aside=(x,), view=Watched(victim.view, first.see)
        )


class _First:
    """The first stage of a purification, to be run again on the unperturbed image."""

    def __init__(self) -> None:
        self.stage: Callable[..., Any] | None = None

    def see(self, stage: Callable[..., Any], inputs: tuple, output: Any) -> None:
        if stage.__name__ == "start" and self.stage is None:
            self.stage, (_, self.noise), (self.state, _) = stage, inputs, output

    def displacement(self, clean: Tensor) -> Tensor:
        """The mean squared displacement per row; a row's purified copies are averaged."""
        if self.stage is None or not self.stage.__self__.encodes:  # type: ignore[attr-defined]
            raise NotApplicable("encoder needs a purifier that encodes, e.g. vae, and a view that runs it")
        if not self.state.requires_grad:
            raise NotApplicable("encoder needs a view that differentiates the purifier's stages: exact, surrogate")
        copies = len(self.state) // len(clean)
        before, _ = self.stage(clean.repeat_interleave(copies, 0), self.noise)
        self.stage = None
        moved = (self.state - before).square().flatten(1).mean(1)
        return moved.unflatten(0, (len(clean), copies)).mean(1)
