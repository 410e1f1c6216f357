"""The contract of every attack: it searches, and the base class enforces the threat model on what it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from attacks._gradient import Evaluation, Victim, margin
from attacks._threat import ThreatModel

RETIRE_FIRST = 5
"""Iterations before it is first asked whether an image may leave."""

State: TypeAlias = dict[str, Tensor]
Watch: TypeAlias = Callable[[int, State], None]


class AttackError(RuntimeError):
    """An attack returned something outside its threat model: its own fault, and the run's end."""


class Found(NamedTuple):
    """What an attack found.

    Attributes:
        candidates: images inside the threat model, shape (V, B, C, H, W): one per restart or version.
        distances: how far each is from x, in the threat model's unit and float64, shape (V, B).
        broken_at: index of the first evaluation in which any draw was wrong, shape (B,); -1 if none.
        package_correct: a third-party package's own verdict, shape (B,), or None.
        forwards, backwards: draws of the defense per image.
        blank: of each image's gradients how many led nowhere, shape (B,).
    """

    candidates: Tensor
    distances: Tensor
    broken_at: Tensor
    package_correct: Tensor | None
    forwards: int
    backwards: int
    blank: Tensor


class Attack(ABC):
    """A search as a fold of iterations, so that it can be watched, saved and continued.

    Keyword-only parameters of a subclass are its options. It never draws from a global generator: its randomness is the
    victim's tape under a site of its own.
    """

    norms: tuple[str, ...] = ("Linf", "L2", "StAdv")
    """The threat models it can search, the first the default."""
    black_box: ClassVar[bool] = False
    """Whether it only looks at outputs: no white-box attack may be weaker."""
    shown: ClassVar[tuple[str, ...]] = ("steps", "eot", "queries", "retire")
    """Options that ``display`` speaks of; a table adds the others that were given."""
    later: ClassVar[tuple[str, ...]] = ()
    """Options that came after the first records: at their defaults no identity names them, so that those go on."""
    restricted: ClassVar[bool] = False
    """Whether it searches only a part of the threat model, or for another goal than a wrong label."""

    retire: int = 0
    """How many new draws must all be wrong for an image to leave before the end; 0: none leaves.

    It saves time on images that are lost, and reads too high: an attack that went on would have made some that are
    wrong in most draws wrong in all.
    """

    @abstractmethod
    def display(self, stochastic: bool) -> str:
        """The name in tables at the current options."""

    def versions(self, stochastic: bool) -> int:
        """How many candidates per image it leaves."""
        return 1

    def package(self, stochastic: bool) -> str | None:
        """The distribution that does the work, if not this code; it takes whole blocks, with noise as a stream."""
        return None

    def ignored(self, stochastic: bool) -> tuple[str, ...]:
        """Options that have no effect on such a defense."""
        return ()

    def looks(self, stochastic: bool) -> int:
        """Of how many single draws at x a package's own verdict would be made, were x never moved."""
        return 0

    def caveat(self, stochastic: bool) -> str | None:
        """What must be known about the attack on such a defense before its number is read."""
        return None

    @abstractmethod
    def length(self, stochastic: bool) -> int:
        """How many iterations the attack takes."""

    @abstractmethod
    def evaluations(self, stochastic: bool) -> int:
        """Draws of the defense that the attack looks at per image, all iterations together (forwards).

        Of a package's attack an upper bound, where one is known.
        """

    def distinct(self, stochastic: bool) -> int:
        """How many different draws those are, were x never moved: what the null floor of the loop is measured with."""
        return self.evaluations(stochastic)

    def gradients(self, stochastic: bool) -> int:
        """Draws of the defense that it differentiates per image (backwards)."""
        return self.evaluations(stochastic)

    def least_classes(self, stochastic: bool) -> int:
        """With how few classes its losses are defined."""
        return 2

    @abstractmethod
    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        """The state before the first iteration, with ``broken_at``."""

    @abstractmethod
    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        """Iteration k of ``length``."""

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """The codes of the candidates, shape (V, B, …); of a pixel ball, images."""

    def lost(self, state: State) -> Tensor:
        """Which candidates were wrong in every draw when they were looked at, shape (V, B): what may retire."""
        raise TypeError(f"{type(self).__name__} has no retire")

    def retires(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> bool:
        """Whether all images leave after iteration k: each lost, and then wrong in ``retire`` draws that are new.

        It is asked after 5, 10, 20, 40, … iterations: an image that is nearly lost would else pay for its draws over
        and over.
        """
        asked, rest = divmod(k + 1, RETIRE_FIRST)
        if not self.retire or rest or asked & (asked - 1):
            return False
        lost, eot = self.lost(state), self.retire if victim.stochastic else 1
        for v in torch.nonzero(lost.any(1)).flatten().tolist():
            code = self.finish(state)[v]
            again = victim.evaluate(threat.render(code, x), y, margin, "retire", k, v, eot=eot, gradient=False)
            lost[v] &= again.correct == 0
        return bool(lost.any(0).all())

    def perturb(
        self,
        x: Tensor,
        y: Tensor,
        victim: Victim,
        threat: ThreatModel,
        *,
        state: State | None = None,
        watch: Watch | None = None,
    ) -> Found:
        """Search, then enforce.

        Args:
            x: images in [0, 1], shape (B, C, H, W).
            y: labels, shape (B,).
            victim: the defense as the attacker sees it.
            threat: the threat model.
            state: a saved state to continue from.
            watch: called after each iteration with the number done and the state.

        Raises:
            AttackError: if a candidate isn't finite or lies outside the threat model by more than 1e-6.
        """
        if state is None:
            state = self.start(x, y, victim, threat)
            state["done"] = torch.tensor(0)
        else:
            victim.forwards, victim.backwards = state["cost"].tolist()
            victim.blank = state.get("blank", victim.blank).clone()
        k = int(state["done"])
        # a search that was stopped is asked again what it was asked, of the same draws
        while k < self.length(victim.stochastic) and not (k and self.retires(k - 1, state, x, y, victim, threat)):
            state = self.step(k, state, x, y, victim, threat)
            k += 1
            state["done"] = torch.tensor(k)
            state["cost"], state["blank"] = torch.tensor([victim.forwards, victim.backwards]), victim.blank.clone()
            if watch is not None:
                watch(k, state)
        codes = [self._enforced(code, x, threat) for code in self.finish(state)]
        return Found(
            torch.stack([threat.render(code, x) for code in codes]),
            torch.stack([threat.distance(code, x) for code in codes]),
            state["broken_at"], state.get("package_correct"), victim.forwards, victim.backwards,
            victim.blank,
        )  # fmt: skip

    def _enforced(self, candidate: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
        name, shape = type(self).__name__, threat.origin(x).shape
        if candidate.shape != shape:
            raise AttackError(f"{name} returned shape {tuple(candidate.shape)}, expected {tuple(shape)}")
        if not candidate.isfinite().all():
            raise AttackError(f"{name} returned values that aren't finite: look at the defense's gradient first")
        inside = threat.enforce(candidate.to(x.dtype), x)
        moved = (inside - candidate).abs().max().item()
        if moved > 1e-6:
            raise AttackError(f"{name} left the {threat.norm} ball of {threat.eps} by {moved:.2g} in an element")
        return inside


def first_broken(broken_at: Tensor, evaluation: Evaluation, index: int) -> Tensor:
    """Note ``index`` for the images of which a draw was wrong for the first time."""
    return torch.where((broken_at < 0) & (evaluation.correct < 1), index, broken_at)
