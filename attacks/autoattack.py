"""AutoAttack: the package itself on a deterministic defense, APGD-CE and APGD-DLR over draws on a stochastic one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attacks._base import Attack, State
from attacks._gradient import Victim
from attacks._threat import ThreatModel
from attacks.apgd import APGD


class AutoAttack(Attack):
    """The ensemble of Croce and Hein, in the version that the defense admits.

    Deterministic: ``standard`` (APGD-CE, targeted APGD-DLR, targeted FAB, Square with 5,000 queries) by pyautoattack,
    always at the package's own numbers. Stochastic: ``rand`` (APGD-CE and APGD-DLR) natively: the draws share a batch,
    every decision is a mean over draws, no image is left out for a lucky draw, and both results are candidates.

    Args:
        steps: iterations of each APGD; the package's own is 100.
        eot: draws per gradient; the package's own is 20.

    Raises:
        ValueError: if a count is below 1.

    Reference: Croce and Hein 2020 (arXiv 2003.01690).
    """

    LOSSES = ("ce", "dlr")
    package = "pyautoattack"

    def __init__(self, *, steps: int = 100, eot: int = 20):
        self.steps, self.eot = steps, eot
        self.members = [APGD(steps=steps, eot=eot, loss=loss) for loss in self.LOSSES]
        self.versions = len(self.members)

    STANDARD_FORWARDS, STANDARD_BACKWARDS = 7_864, 1_910
    """What one image that stays robust costs under the package's standard version with ten classes."""

    def display(self, stochastic: bool) -> str:
        if not stochastic:
            return f"AutoAttack (standard, {self.package})"
        full = (self.steps, self.eot) == (100, 20)
        return "AutoAttack-rand (native)" if full else f"APGD-CE+DLR ({self.steps} it, EOT {self.eot})"

    def least_classes(self, stochastic: bool) -> int:
        return 3 if stochastic else 4  # DLR divides by z_(1) - z_(3), its targeted form by z_(1) - (z_(3) + z_(4)) / 2

    def length(self, stochastic: bool) -> int:
        return len(self.members) * self.steps if stochastic else 1

    def evaluations(self, stochastic: bool) -> int:
        return sum(m.evaluations(True) for m in self.members) if stochastic else self.STANDARD_FORWARDS

    def gradients(self, stochastic: bool) -> int:
        return self.evaluations(True) if stochastic else self.STANDARD_BACKWARDS

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        return {
            "candidates": torch.stack([x] * (len(self.members) if victim.stochastic else 1)),
            "broken_at": torch.full((len(x),), -1, device=x.device),
        }

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        if not victim.stochastic:
            return self._package(state, x, y, victim, threat)
        number, j = divmod(k, self.steps)
        member = self.members[number]
        inner = {key.removeprefix("inner."): value for key, value in state.items() if key.startswith("inner.")}
        if j == 0:
            inner = member.start(x, y, victim, threat)
        inner = member.step(j, inner, x, y, victim, threat)
        outer = {key: value for key, value in state.items() if not key.startswith("inner.")}
        if j == self.steps - 1:
            (outer["candidates"][number],) = member.finish(inner)
            found = torch.where(inner["broken_at"] >= 0, inner["broken_at"] + number * (self.steps + 1), -1)
            outer["broken_at"] = torch.where(outer["broken_at"] < 0, found, outer["broken_at"])
            return outer
        return outer | {f"inner.{key}": value for key, value in inner.items()}

    def finish(self, state: State) -> Tensor:
        return state["candidates"]

    def _package(self, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        """pyautoattack's standard version on the whole block at once."""
        from pyautoattack import AutoAttack as Package

        model = _Counted(victim)
        with _forked_generator(x.device), torch.no_grad(), _log_of_package():
            package = Package(
                model, norm=threat.norm, eps=threat.bound, seed=_seed(victim), version="standard", device=x.device
            )
            # nine target classes, or all others where there are fewer
            targets = min(9, victim.defense(x[:1], None, victim.view).shape[1] - 1)
            package.apgd_targeted.n_target_classes = package.fab.n_target_classes = targets
            x_adv, y_adv = package.run_standard_evaluation(x, y, batch_size=len(x))
        victim.forwards += round(model.forwards / len(x))
        victim.backwards += round(model.backwards / len(x))
        return state | {"candidates": x_adv[None], "package_correct": y_adv == y}


class _Counted(nn.Module):
    """The defense as a module x → logits, with its rows counted.

    Calls have the package's own shrinking row counts: a block is always run whole, so they repeat, and padding the few
    images left at the end would multiply the cost.
    """

    def __init__(self, victim: Victim):
        super().__init__()
        self.victim, self.forwards, self.backwards = [victim], 0, 0  # in a list: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        (victim,) = self.victim
        self.forwards += len(x)
        self.backwards += len(x) if torch.is_grad_enabled() and x.requires_grad else 0
        return victim.defense(x, None, victim.view)


def _seed(victim: Victim) -> int:
    """A seed for the package that follows from the run's seed and the block's first image."""
    return (int(victim.tape.seed) * 1_000_003 + int(victim.tape.ids[0])) % 2**31


@contextmanager
def _forked_generator(device: torch.device) -> Iterator[None]:
    """The package seeds torch's global generator for every batch: let it, in a fork."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _log_of_package() -> Iterator[None]:
    """The package prints its checks as warnings on a logger; keep its chatter out of the way of the progress bar."""
    logger = logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
