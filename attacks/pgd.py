"""Projected gradient ascent, with the gradient averaged over draws."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from attacks._base import Attack, State, first_broken
from attacks._gradient import LEAST_CLASSES, LOSSES, Evaluation, Victim
from attacks._threat import ThreatModel

HALVED = (0.25, 0.45, 0.65, 0.8)
"""After which shares of the iterations ``halving`` halves the step."""
WALKED = sum((b - a) / 2**i for i, (a, b) in enumerate(pairwise((0.0, *HALVED, 1.0))))
"""The mean of its steps, the first being 1."""


class PGD(Attack):
    """x_{k+1} = P(x_k + size · direction(mean over draws of grad L(f∘g(x_k), y))).

    direction is the sign in Linf, the normalised gradient in L2; size = ``step`` · eps / ``steps``, or ``step_size``.
    With ``momentum`` mu it is the direction of m_k = mu m_{k-1} + g_k / mean |g_k| instead, g_k being that gradient:
    what draws add to it is averaged over iterations, too, which costs nothing and finds more of a defense that draws.
    A candidate is the last iterate of a restart, or its best: of the points it went on from, the one with the fewest
    correct draws, among those the one of highest loss.

    Args:
        steps: iterations.
        eot: draws per gradient.
        step: step size as a multiple of eps / steps.
        step_size: step size in the threat model's unit; 0 goes by ``step``.
        loss: "ce", "dlr", "margin" or "error".
        restarts: independent searches.
        random_start: start in a random point of the ball, otherwise in x.
        iterate: "last" or "best".
        retire: leave an image whose best iterate is wrong in all draws, and in so many new ones; 0 leaves none.
        sign: step along the gradient's sign whatever the norm: Lee and Kim's "L2" attack, marked so in tables.
        momentum: mu, in [0, 1]; 0 is plain PGD.
        halving: begin with steps of eps, or of ``step_size``, and halve them after 25, 45, 65 and 80 % of the
            iterations; a constant size is too small to begin with and too large to end with.

    Raises:
        ValueError: if a count is below 1, a step isn't positive, the momentum outside [0, 1], or the loss or the
            iterate is unknown.

    Reference: Madry et al. 2018 (arXiv 1706.06083); EOT: Athalye et al. 2018 (arXiv 1707.07397); the sign in L2: Lee
    and Kim 2023 (arXiv 2303.09051); momentum: Dong et al. 2018 (arXiv 1710.06081).
    """

    title: ClassVar[str] = "PGD"
    shown: ClassVar[tuple[str, ...]] = (
        "steps",
        "eot",
        "loss",
        "restarts",
        "iterate",
        "sign",
        "retire",
        "momentum",
        "halving",
    )
    later: ClassVar[tuple[str, ...]] = ("momentum", "halving")

    def __init__(
        self,
        *,
        steps: int = 200,
        eot: int = 20,
        step: float = 2.5,
        step_size: float = 0.0,
        loss: str = "ce",
        restarts: int = 1,
        random_start: bool = True,
        iterate: str = "last",
        sign: bool = False,
        retire: int = 0,
        momentum: float = 0.0,
        halving: bool = False,
    ):
        if min(steps, eot, restarts) < 1 or step <= 0 or min(step_size, retire) < 0:
            raise ValueError(
                "step_size and retire must not be negative, steps, eot, restarts and step must be positive, got "
                f"{step_size}, {retire} and {steps}, {eot}, {restarts}, {step}"
            )
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if iterate not in ("last", "best"):
            raise ValueError(f'iterate must be "last" or "best", got {iterate!r}')
        self.steps, self.eot, self.step_factor, self.step_size, self.restarts = steps, eot, step, step_size, restarts
        self.loss, self.random_start, self.iterate, self.sign = LOSSES[loss], random_start, iterate, sign
        self.loss_name, self.retire, self.momentum = loss, retire, momentum
        self.halving = halving
        self.best = iterate == "best" or retire > 0  # who retires was seen; the last iterate was not

    def display(self, stochastic: bool) -> str:
        done = [f"{self.steps} it"] + [f"EOT {self.eot}"] * stochastic
        done += [f"momentum {self.momentum:g}"] * bool(self.momentum) + ["halving"] * self.halving
        done += ["best iterate"] * self.best + [f"retire {self.retire}"] * bool(self.retire)
        restarts = f" × {self.restarts}" if self.restarts > 1 else ""
        sign = "sign-step " if self.sign else ""
        return f"{sign}{self.title}-{self.loss_name.upper()} ({', '.join(done)}){restarts}"

    def versions(self, stochastic: bool) -> int:
        return self.restarts

    def least_classes(self, stochastic: bool) -> int:
        return LEAST_CLASSES.get(self.loss_name, 2)

    def length(self, stochastic: bool) -> int:
        return self.steps * self.restarts

    def evaluations(self, stochastic: bool) -> int:
        return self.length(stochastic) * self.eot

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        first = torch.stack([self.first(x, victim, threat, r) for r in range(self.restarts)])
        state = {"x_adv": first, "broken_at": torch.full((len(x),), -1, device=x.device)}
        if self.momentum:
            state["momentum"] = torch.zeros_like(first)
        if self.best:
            worst = torch.full((self.restarts, len(x)), torch.inf, dtype=x.dtype, device=x.device)
            state |= {"best": first.clone(), "best_correct": worst, "best_loss": -worst}
        return state

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        state = {key: value.clone() for key, value in state.items()}  # an interrupt leaves the one before as it was
        restart = k // self.steps
        code = state["x_adv"][restart]
        evaluation = self.look(k, threat.render(code, x), x, y, victim)
        if self.best:
            _remember(state, restart, code, evaluation)
        gradient = threat.pullback(evaluation.gradient, code, x)
        if self.momentum:
            unit = gradient / gradient.abs().flatten(1).mean(1).clamp_min(1e-30).view(-1, 1, 1, 1)
            gradient = state["momentum"][restart] = self.momentum * state["momentum"][restart] + unit
        gradient = self.shaped(gradient)
        size = self.size(k % self.steps, threat)
        direction = size * gradient.sign() if self.sign else threat.step(gradient, size)
        state["x_adv"][restart] = threat.project(code + direction, x)
        state["broken_at"] = first_broken(state["broken_at"], evaluation, k)
        return state

    def finish(self, state: State) -> Tensor:
        return state["best" if self.best else "x_adv"]

    def lost(self, state: State) -> Tensor:
        return state["best_correct"] == 0

    def size(self, k: int, threat: ThreatModel) -> float:
        """The length of the step that iteration k of a restart takes."""
        if self.halving:
            return (self.step_size or threat.bound) / 2 ** sum(k >= share * self.steps for share in HALVED)
        return self.step_size or self.step_factor * threat.bound / self.steps

    def ignored(self, stochastic: bool) -> tuple[str, ...]:
        return ("step",) if self.halving or self.step_size else ()

    def look(self, k: int, x_adv: Tensor, x: Tensor, y: Tensor, victim: Victim) -> Evaluation:
        """What iteration k learns at x_adv, and climbs."""
        return victim.evaluate(x_adv, y, self.loss, "pgd", k, eot=self.eot)

    def shaped(self, direction: Tensor) -> Tensor:
        """A direction as this attack may take it; PGD takes any."""
        return direction

    def first(self, x: Tensor, victim: Victim, threat: ThreatModel, restart: int) -> Tensor:
        """Where a restart begins."""
        return threat.random(x, victim.tape.fold("pgd", "start", restart)) if self.random_start else threat.origin(x)


def _remember(state: State, restart: int, code: Tensor, evaluation: Evaluation) -> None:
    """Keep the point of a restart that has the fewest correct draws, and among those the highest loss."""
    correct, loss = state["best_correct"][restart], state["best_loss"][restart]
    better = (evaluation.correct < correct) | ((evaluation.correct == correct) & (evaluation.loss > loss))
    state["best"][restart] = torch.where(better.view(-1, 1, 1, 1), code, state["best"][restart])
    state["best_correct"][restart] = torch.where(better, evaluation.correct, correct)
    state["best_loss"][restart] = torch.where(better, evaluation.loss, loss)
