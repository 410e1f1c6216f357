"""DiffAttack: PGD that also drives a purification's states away from where they should pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attacks._adjoint import NotApplicable
from attacks._gradient import Evaluation, Victim
from attacks._views import Watched
from attacks.pgd import PGD


class DiffAttack(PGD):
    """PGD on L(f∘g(x'), y) + ``weight`` · mean_k ‖z_k - z̄_k‖² / d: the loss and the deviated reconstruction.

    z_k are the states of the reverse process after k = 1 … ``steps`` steps, z̄_k is x' diffused to the time of z_k under
    the same noise: a purifier that gave x' back would pass there. A purifier without such states is driven to give back
    another image than it got: g(x') takes the place of z_k, x' that of z̄_k. Both ends of a difference depend on x', and
    the gradient goes through both. All times weigh alike.

    Args:
        weight: of the deviation beside the loss; where an image is confidently right the loss has a small gradient, and
            a large weight climbs the deviation alone.
        steps, eot, step, step_size, loss, restarts, random_start, iterate, sign: as for ``pgd``.

    Raises:
        ValueError: as ``pgd``, and if the weight is negative.
        NotApplicable: under a view that doesn't differentiate the purifier's states.

    Reference: Kang et al. 2023 (arXiv 2311.16124), section 3.2.
    """

    title = "DiffAttack"

    def __init__(self, *, weight: float = 0.01, **pgd: Any):
        super().__init__(**pgd)
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        self.weight = weight

    def look(self, k: int, x_adv: Tensor, x: Tensor, y: Tensor, victim: Victim) -> Evaluation:
        path = _Path()

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return self.loss(logits, labels) + self.weight * path.deviation(logits)

        return victim.evaluate(x_adv, y, loss, "pgd", k, eot=self.eot, view=Watched(victim.view, path.see))


class _Path:
    """How far a purification strays from the path of the image that it was given."""

    def __init__(self) -> None:
        self.strayed: list[Tensor] = []

    def see(self, stage: Callable[..., Any], inputs: tuple, output: Any) -> None:
        purifier = stage.__self__  # type: ignore[attr-defined]
        if stage.__name__ == "start":
            self.x, self.noise = inputs
            self.inner = 0
        if stage.__name__ == "step":
            expected = purifier.diffused(inputs[0] + 1, self.x, self.noise)
            if expected is not None:
                self.inner += 1
                self._add(output, expected)
        if stage.__name__ == "finish" and not self.inner:
            self._add(2 * output, 2 * self.x)  # in [-1, 1], as the states are

    def deviation(self, logits: Tensor) -> Tensor:
        """The mean squared deviation per row of logits; a row's purified copies are averaged."""
        strayed, self.strayed = self.strayed, []
        if not any(s.requires_grad for s in strayed):
            raise NotApplicable("diffattack needs a view that differentiates the purifier's states: exact, surrogate")
        return torch.stack(strayed).mean(0).unflatten(0, (len(logits), -1)).mean(1)

    def _add(self, state: Tensor, expected: Tensor) -> None:
        self.strayed.append((state - expected).square().flatten(1).mean(1))
