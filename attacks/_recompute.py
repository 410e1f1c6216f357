"""Stages of a purification that store their graph or their inputs alone, and what either costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attacks._nest import emptied, filled

Stage = Callable[..., Any]

ROWS = 32
"""Row counts are multiples of this, so that no row sees its place."""


def staged(stage: Stage, *inputs: Any, keep: bool) -> Any:
    """Run a stage v = s(u) that will be asked for ū = J_s(u)ᵀ v̄: either its graph is kept, or s runs again.

    Recomputed, only the tensors among the inputs survive the forward pass, however they are nested in tuples, lists,
    dicts and dataclasses. Both passes run the same operations in the same order under the same keyed noise, and ū is
    summed up within the stage before it leaves it, so that what is kept changes no bit of the gradient. Parameters get
    none: a defense's are frozen.
    """
    tensors: list[Tensor] = []
    call = _Call(stage, emptied(inputs, tensors), keep)
    if not any(t.requires_grad for t in tensors):
        return stage(*inputs)
    outputs = _Staged.apply(call, *tensors)
    return filled(call.outputs, iter(outputs))


class _Call:
    """A stage, with where its tensors go and where its outputs' come from."""

    def __init__(self, stage: Stage, inputs: Any, keep: bool):
        self.stage, self.inputs, self.keep, self.outputs = stage, inputs, keep, None

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        self.outputs = emptied(self.stage(*filled(self.inputs, iter(tensors))), found)
        return found


class _Staged(torch.autograd.Function):
    """See ``staged``."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.cast, ctx.kept = call, _autocast(tensors[0].device.type), None
        ctx.set_materialize_grads(False)
        inputs = _leaves(tensors, ctx.needs_input_grad[1:])
        # always with a graph: what differentiates inside computes otherwise without one, in its last digits
        with torch.enable_grad():
            outputs = call(inputs)
        if call.keep:
            ctx.kept = inputs, outputs
        else:
            ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(o for o in outputs if not o.requires_grad))
        return tuple(o.detach() for o in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if ctx.kept:
            inputs, outputs = ctx.kept
        else:
            inputs = _leaves(ctx.saved_tensors, needed)
            with torch.enable_grad(), ctx.cast():
                outputs = ctx.call(inputs)
        ends = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        if not ends:
            return (None,) * (1 + len(needed))
        wanted = [v for v, need in zip(inputs, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in ends], wanted, [g for _, g in ends], allow_unused=True,
                retain_graph=ctx.kept is not None,  # whoever differentiates may do so twice
            )
        )  # fmt: skip
        return (None, *(next(found) if need else None for need in needed))


class Footprint(NamedTuple):
    """Bytes that the gradient of one purification needs per row.

    Attributes:
        graphs: what autograd stores of each stage, first to last.
        inputs: what a stage that is recomputed stores, all stages together.
    """

    graphs: tuple[float, ...]
    inputs: float

    def keep(self, rows: int, budget: float) -> int | None:
        """How many of the last stages' graphs fit into ``budget`` bytes at ``rows`` rows; None if all do.

        The graphs of the others come and go one at a time, beside those that are kept.
        """
        if sum(self.graphs) * rows <= budget:
            return None
        left = budget / rows - self.inputs - max(self.graphs)
        kept = 0
        for graph in reversed(self.graphs):
            left -= graph
            if left < 0:
                break
            kept += 1
        return kept

    def rows(self, most: int, budget: float) -> int:
        """The most rows, a multiple of 32 up to ``most``, at which a fully recomputed gradient fits; 0 if none."""
        return min(most, int(budget / max(self.inputs + max(self.graphs), 1)) // ROWS * ROWS)


def footprint(purifier: nn.Module, x: Tensor, noise: Any) -> Footprint:
    """What the gradient of a purification stores, measured on ``x``, not modelled; no two graphs are held at a time."""
    if not hasattr(purifier, "rounds"):
        return Footprint((0.0,), 0.0)
    weights = {p.data_ptr() for p in purifier.parameters()}
    graphs: list[float] = []
    inputs = 0.0

    def measured(stage: Stage, *given: Any) -> Any:
        nonlocal inputs
        tensors: list[Tensor] = []
        nest = emptied(given, tensors)
        inputs += sum(t.numel() * t.element_size() for t in tensors) / len(x)
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        leaves = _leaves(tensors, [t.is_floating_point() for t in tensors])
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = stage(*filled(nest, iter(leaves)))
        graphs.append(sum(size for pointer, size in saved.items() if pointer not in weights) / len(x))
        found: list[Tensor] = []
        nest = emptied(output, found)
        return filled(nest, iter([t.detach() for t in found]))

    purifier(x.detach(), noise, measured)
    return Footprint(tuple(graphs), inputs)


def _leaves(tensors: Any, needed: Any) -> list[Tensor]:
    """The tensors cut from their graphs, with a gradient of their own where one is needed."""
    return [t.detach().requires_grad_(bool(need)) for t, need in zip(tensors, needed, strict=True)]


def _autocast(device: str) -> Callable[[], Any]:
    """The autocast mode of now, to enter again: a backward pass may run in another thread, outside of it."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled=enabled)
