"""Other people's attacks: a defense as the module x → logits that they expect, and their side effects kept in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from attacks._gradient import Victim


class Model(nn.Module):
    """The defense as a module x → logits, with its rows counted.

    A package asks with shrinking subsets of a block, and nobody can tell which rows they are. A stochastic defense
    therefore answers with a stream of noise: keyed by the block's first image, the number of the call and the row.

    Calls have the package's own row counts: a block is always run whole, so they repeat, and padding the few images
    left at the end would multiply the cost.
    """

    def __init__(self, victim: Victim, device: torch.device):
        super().__init__()
        self.victim, self.forwards, self.backwards, self.calls = [victim], 0, 0, 0  # in a list: not a submodule
        self.device = nn.Parameter(torch.empty(0, device=device), requires_grad=False)  # where packages look for it

    def forward(self, x: Tensor) -> Tensor:
        (victim,) = self.victim
        self.forwards += len(x)
        self.backwards += len(x) if torch.is_grad_enabled() and x.requires_grad else 0
        self.calls += 1
        noise = victim.tape[:1].draws(len(x)).fold("stream", self.calls)
        return victim.defense(x, noise, victim.view)

    def charge(self, images: int) -> None:
        """Book the rows asked for on the victim, as draws per image, in whole numbers."""
        (victim,) = self.victim
        victim.forwards += round(self.forwards / images)
        victim.backwards += round(self.backwards / images)


def seed_of(victim: Victim) -> int:
    """A seed for a package that follows from the run's seed and the block's first image."""
    return (int(victim.tape.seed) * 1_000_003 + int(victim.tape.ids[0])) % 2**31


@contextmanager
def forked(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators seeded, and afterwards as they were."""
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            np.random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy_state)


@contextmanager
def contained(victim: Victim, device: torch.device) -> Iterator[None]:
    """Packages seed and draw from the global generators, and print: let them, in a fork and on a quiet logger."""
    logger = logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with forked(seed_of(victim), device):
            yield
    finally:
        logger.setLevel(level)
