"""Attack losses, and the gradient over draws of a defense: the one place where EOT lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attacks._views import View

LossFunction = Callable[[Tensor, Tensor], Tensor]


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


LOSSES: dict[str, LossFunction] = {"ce": ce, "dlr": dlr, "margin": margin}


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
    """

    def __init__(self, defense: nn.Module, view: View, tape: Any, *, rows: int, stochastic: bool):
        self.defense, self.view, self.tape, self.rows, self.stochastic = defense, view, tape, rows, stochastic
        self.forwards = self.backwards = 0

    def evaluate(
        self, x: Tensor, y: Tensor, loss: LossFunction, *site: str | int, eot: int, gradient: bool = True
    ) -> Evaluation:
        """Loss, correctness and, if asked for, gradient at x over ``eot`` draws of the site.

        All are averaged over the same draws, summed in draw order.
        """
        losses, corrects, gradients = [], [], []
        for inputs, labels, noise, count in blocks(self.rows, x, y, self.tape.fold(*site), eot):
            inputs = inputs.detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                logits = self.defense(inputs, noise, self.view)
                value = loss(logits, labels)
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


def blocks(rows: int, x: Tensor, y: Tensor, tape: Any, draws: int = 1) -> Iterator[tuple[Tensor, Tensor, Any, int]]:
    """Cut images × draws into calls of exactly ``rows`` rows, the last padded with its own last row.

    One fixed shape makes a row's result independent of its neighbours, so that batching changes no byte.

    Args:
        rows: rows of every call.
        x, y: images and labels, a row each.
        tape: keyed noise, a row per image; None for none.
        draws: draws per image, the rows of one image side by side.

    Yields:
        (x, y, tape, how many of the rows are real).
    """
    total = len(x) * draws
    tape = None if tape is None else tape.draws(draws)
    for first in range(0, total, rows):
        index = torch.arange(first, first + rows).clamp_max(total - 1)
        source = (index // draws).to(x.device)
        yield x[source], y[source], None if tape is None else tape[index], min(rows, total - first)


def _mean(values: Tensor, eot: int) -> Tensor:
    values = values.unflatten(0, (-1, eot))
    total = values[:, 0].clone()
    for draw in range(1, eot):
        total += values[:, draw]
    return total / eot
