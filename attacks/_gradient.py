"""Attack losses, and the gradient over draws of a defense: the one place where EOT lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attacks._calls import Calls, Request
from attacks._views import View

LossFunction = Callable[..., Tensor]
"""(logits, labels, *aside) → a loss per row, to be raised."""


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per row: -log softmax(logits)_y."""
    return nn.functional.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The difference of logits ratio per row: -(z_y - max_{i≠y} z_i) / (z_(1) - z_(3)), z_(k) the k-th largest.

    Raises:
        ValueError: with fewer than three classes.

    Reference: Croce and Hein 2020 (arXiv 2003.01690), eq. 6.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, got {logits.shape[1]}")
    ordered = logits.sort(1).values
    return margin(logits, y) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i≠y} z_i - z_y per row: positive where the row is misclassified."""
    own = nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(1) - logits[own]


def error(logits: Tensor, y: Tensor) -> Tensor:
    """sigmoid(max_{i≠y} z_i - z_y) per row: the 0-1 loss made smooth, so that its mean over draws is the share of wrong
    draws. Draws that are lost or safe weigh little; those near the boundary decide the direction.
    """
    return margin(logits, y).sigmoid()


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted difference of logits ratio per row: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2).

    Raises:
        ValueError: with fewer than four classes.

    Reference: Croce and Hein 2020 (arXiv 2003.01690), the targeted DLR loss.
    """
    if logits.shape[1] < 4:
        raise ValueError(f"the targeted DLR loss needs at least 4 classes, got {logits.shape[1]}")
    ordered = logits.sort(1).values
    own, other = (logits.gather(1, label[:, None])[:, 0] for label in (y, target))
    return (other - own) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12)


LOSSES: dict[str, LossFunction] = {"ce": ce, "dlr": dlr, "margin": margin, "error": error}
LEAST_CLASSES = {"dlr": 3, "dlr-targeted": 4}
"""With how few classes a loss is defined; two where it isn't listed."""


class Evaluation(NamedTuple):
    """What an attacker learns of a point: means over the draws of one iteration.

    Attributes:
        loss: mean loss, shape (B,).
        correct: share of draws classified correctly, shape (B,).
        gradient: gradient of the mean loss, shape (B, C, H, W); empty, shape (0,), if none was asked for.
    """

    loss: Tensor
    correct: Tensor
    gradient: Tensor


class Victim:
    """A defense as an attack sees it: losses and gradients averaged over draws.

    Args:
        defense: ``defense(x, noise, purify)`` → logits; what the attacker differentiates.
        view: how the purifier is run for the gradient.
        tape: keyed noise of the attack, a row per image.
        calls: how the network is called: alone, or together with other searches.
        stochastic: whether draws differ.
        foreknown: whether the attacker knows the draws that will judge: the tape is theirs, and every evaluation uses
            its first ``eot`` draws, whatever the site.
    """

    def __init__(
        self, defense: nn.Module, view: View, tape: Any, calls: Calls, *, stochastic: bool, foreknown: bool = False
    ):
        self.defense, self.view, self.tape, self.calls, self.stochastic = defense, view, tape, calls, stochastic
        self.foreknown = foreknown
        self.forwards = self.backwards = 0
        self.blank = torch.zeros(len(tape), dtype=torch.int64, device=tape.ids.device)
        """Of each image's gradients how many were zero everywhere, or somewhere not finite: they lead nowhere."""

    def evaluate(
        self,
        x: Tensor,
        y: Tensor,
        loss: LossFunction,
        *site: str | int,
        eot: int,
        gradient: bool = True,
        aside: tuple[Tensor, ...] = (),
        view: View | None = None,
    ) -> Evaluation:
        """Loss, correctness and, if asked for, gradient at x over ``eot`` draws of the site.

        All are averaged over the same draws, summed in draw order. What isn't finite of a draw's gradient counts as
        zero, so that the rest still leads. ``blank`` says how often a gradient led nowhere: not finite somewhere, or
        zero where the draw is still right.

        Args:
            x, y: images and labels.
            loss: called with logits, labels and ``aside``, a row each.
            site: what the draws are for; another site has other draws.
            eot: draws.
            gradient: whether to differentiate.
            aside: what else the loss needs of each image, e.g. target classes.
            view: another view than the attacker's, to see more of the purifier; its calls are this search's alone.
        """
        found = self.calls.ask(
            Request(
                self.defense, view or self.view, x, self._noise(*site), eot, loss, (y, *aside), gradient,
                alone=view is not None,
            )
        )  # fmt: skip
        right = (found.logits.argmax(1) == y.repeat_interleave(eot)) & found.logits.isfinite().all(1)
        self.forwards += eot
        slope = x.new_empty(0)
        if gradient:
            self.backwards += eot
            largest = found.gradients.flatten(1).abs().amax(1)  # not a number where one pixel's isn't
            self.blank += (~largest.isfinite() | (largest == 0) & right).view(-1, eot).sum(1)
            slope = _mean(found.gradients.nan_to_num(0, 0, 0), eot)
        return Evaluation(_mean(found.losses, eot), _mean(right.to(x.dtype), eot), slope)

    def logits(self, x: Tensor, *site: str | int, eot: int) -> Tensor:
        """Logits at x, the mean over ``eot`` draws of the site: shape (B, K)."""
        found = self.calls.ask(Request(self.defense, self.view, x, self._noise(*site), eot))
        self.forwards += eot
        return _mean(found.logits, eot)

    def _noise(self, *site: str | int) -> Any:
        return self.tape if self.foreknown else self.tape.fold(*site)


def _mean(values: Tensor, eot: int) -> Tensor:
    values = values.unflatten(0, (-1, eot))
    total = values[:, 0].clone()
    for draw in range(1, eot):
        total += values[:, draw]
    return total / eot
