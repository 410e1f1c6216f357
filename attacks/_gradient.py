"""Attack losses, and the gradient over draws of a defense: the one place where EOT lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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

    Reference: Croce and Hein 2020 (arXiv 2003.01690), eq. 8.
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
    """A defense as an attack sees it: losses and gradients averaged over draws, in calls of one fixed row count.

    Args:
        defense: ``defense(x, noise, purify)`` → logits; what the attacker differentiates.
        view: how the purifier is run for the gradient.
        tape: keyed noise of the attack, a row per image.
        rows: rows of every network call; the last call is padded.
        stochastic: whether draws differ.
        foreknown: whether the attacker knows the draws that will judge: the tape is theirs, and every evaluation uses
            its first ``eot`` draws, whatever the site.
    """

    def __init__(
        self, defense: nn.Module, view: View, tape: Any, *, rows: int, stochastic: bool, foreknown: bool = False
    ):
        self.defense, self.view, self.tape, self.rows, self.stochastic = defense, view, tape, rows, stochastic
        self.foreknown = foreknown
        self.forwards = self.backwards = 0

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

        All are averaged over the same draws, summed in draw order.

        Args:
            x, y: images and labels.
            loss: called with logits, labels and ``aside``, a row each.
            site: what the draws are for; another site has other draws.
            eot: draws.
            gradient: whether to differentiate.
            aside: what else the loss needs of each image, e.g. target classes.
            view: another view than the attacker's, to see more of the purifier.
        """
        losses, corrects, gradients = [], [], []
        for inputs, labels, *more, noise, count in blocks(self.rows, (x, y, *aside), self._noise(*site), eot):
            inputs = inputs.detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                logits = self.defense(inputs, noise, view or self.view)
                value = loss(logits, labels, *more)
                if gradient:
                    (slope,) = torch.autograd.grad(value.sum(), inputs)
                    gradients.append(slope[:count])
            finite = logits.detach().isfinite().all(1)
            losses.append(value.detach()[:count])
            corrects.append(((logits.detach().argmax(1) == labels) & finite)[:count])
        self.forwards += eot
        self.backwards += eot if gradient else 0
        return Evaluation(
            _mean(torch.cat(losses), eot),
            _mean(torch.cat(corrects).to(x.dtype), eot),
            _mean(torch.cat(gradients), eot) if gradient else x.new_empty(0),
        )

    def logits(self, x: Tensor, *site: str | int, eot: int) -> Tensor:
        """Logits at x, the mean over ``eot`` draws of the site: shape (B, K)."""
        with torch.no_grad():
            calls = blocks(self.rows, (x,), self._noise(*site), eot)
            logits = [self.defense(inputs, noise, self.view)[:count] for inputs, noise, count in calls]
        self.forwards += eot
        return _mean(torch.cat(logits), eot)

    def _noise(self, *site: str | int) -> Any:
        return self.tape if self.foreknown else self.tape.fold(*site)


def blocks(rows: int, columns: tuple[Tensor, ...], tape: Any, draws: int = 1) -> Iterator[tuple]:
    """Cut images × draws into calls of exactly ``rows`` rows, the last padded with its own last row.

    One fixed shape makes a row's result independent of its neighbours, so that batching changes no byte.

    Args:
        rows: rows of every call.
        columns: images, labels, … : tensors with a row per image.
        tape: keyed noise, a row per image; None for none.
        draws: draws per image, the rows of one image side by side.

    Yields:
        (*columns, tape, how many of the rows are real).
    """
    total = len(columns[0]) * draws
    tape = None if tape is None else tape.draws(draws)
    for first in range(0, total, rows):
        index = torch.arange(first, first + rows).clamp_max(total - 1)
        source = (index // draws).to(columns[0].device)
        yield *(c[source] for c in columns), None if tape is None else tape[index], min(rows, total - first)


def _mean(values: Tensor, eot: int) -> Tensor:
    values = values.unflatten(0, (-1, eot))
    total = values[:, 0].clone()
    for draw in range(1, eot):
        total += values[:, draw]
    return total / eot
