"""Purifiers that know nothing of tapes: any module images → images, with its randomness tamed as far as it goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from purifiers import Noise, Purifier, Tape


class Foreign(Purifier):
    """A module run in a fork of torch's generator, seeded from the tape.

    A call repeats exactly, but an image's noise depends on its place in the batch: runs are marked ``noise: global``,
    and batching may change them. Whether it is random at all is measured.

    Args:
        module: images in [0, 1] → images in [0, 1].
        x: a few images to measure on.
    """

    def __init__(self, module: nn.Module, x: Tensor):
        super().__init__()
        self.module = module.eval()
        self.stochastic = False
        with torch.no_grad():
            draws = [self(x, Tape(0, "measure", torch.arange(len(x)) + k * len(x))) for k in range(2)]
        self.stochastic = not torch.equal(*draws)

    def start(self, x: Tensor, noise: Noise) -> tuple[Tensor, None]:
        seed = int(noise.uniform("foreign", like=x[:, :1, :1, :1]).double().mul(2**24).sum())
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            images = self.module(x)
        if not isinstance(images, Tensor):
            raise TypeError(f"the purifier returned {type(images).__name__}; it has to return images, a tensor like x")
        return images, None

    def finish(self, state: Tensor, context: None) -> Tensor:
        return state
