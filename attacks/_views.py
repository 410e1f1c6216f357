"""What the attacker differentiates: the ways to run a purifier so that a gradient comes back.

A view is called as ``view(purifier, x, noise)`` in place of ``purifier(x, noise)``. Every view but ``blind`` computes
the purifier's own output; they differ in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

View = Callable[[nn.Module, Tensor, Any], Tensor]


class Exact:
    """The gradient of the discrete chain that is evaluated, by one recomputing fold over the purifier's stages.

    Stages (start, steps, finish) but the last ``keep`` store only their inputs; the backward pass runs them again under
    the same keyed noise. The gradient is the one that storing everything would give, bit for bit.

    Args:
        keep: how many of the last stages keep their graphs; None keeps all, the fastest where memory allows.
    """

    def __init__(self, keep: int | None = None):
        self.keep = keep

    def __call__(self, purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
        if not hasattr(purifier, "rounds"):
            return purifier(x)
        if self.keep is None or noise is None or not torch.is_grad_enabled():
            return purifier(x, noise)
        keep, remaining = self.keep, stages(purifier)

        def apply(stage: Callable[..., Any], *inputs: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining < keep:
                return stage(*inputs)
            return checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=False)

        return purifier(x, noise, apply)


def bpda(purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
    """Forward exact, backward the identity (Athalye et al. 2018, arXiv 1802.00420)."""
    with torch.no_grad():
        purified = _plain(purifier, x, noise)
    return x + (purified - x).detach()


def blind(purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
    """The bare classifier: the attacker doesn't know of the purifier."""
    return x


VIEWS: dict[str, Callable[..., View]] = {
    "exact": Exact,
    "bpda": lambda keep=None: bpda,
    "blind": lambda keep=None: blind,
}


def stages(purifier: nn.Module) -> int:
    """How many stages one purification runs."""
    return int(purifier.rounds) * (int(purifier.steps) + 2)  # type: ignore[arg-type]


def affordable(purifier: nn.Module, x: Tensor, noise: Any, rows: int, budget: int) -> int | None:
    """How many last stages' graphs fit into ``budget`` bytes at ``rows`` rows: None for all.

    Measured, not modelled: the bytes that autograd saves for a purification of ``x``, whose first row stands for all.
    """
    if not hasattr(purifier, "rounds"):
        return None
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        purifier(x.detach().requires_grad_(), noise)
    weights = {p.data_ptr() for p in purifier.parameters()}
    per_row = sum(size for pointer, size in saved.items() if pointer not in weights) / len(x)
    if per_row * rows <= budget:
        return None
    return int(stages(purifier) * budget / (per_row * rows))


def _plain(purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
    return purifier(x, noise) if hasattr(purifier, "rounds") else purifier(x)
