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
        returned = tuple(o.detach() for o in outputs)
        ctx.mark_non_differentiable(*(r for r, o in zip(returned, outputs, strict=True) if not o.requires_grad))
        return returned

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
    """Bytes that the gradient of a defense needs per image, copies included.

    Attributes:
        graphs: what autograd stores of each of the purifier's stages, first to last; where they can be recomputed.
        inputs: what a stage that is recomputed stores, all stages together.
        rest: what is stored in any case: the classifier's graph, and under most views the purifier's.
    """

    graphs: tuple[float, ...] = (0.0,)
    inputs: float = 0.0
    rest: float = 0.0

    @property
    def least(self) -> float:
        """What is needed where every stage is recomputed: one graph at a time."""
        return self.rest + self.inputs + max(self.graphs)

    def stored(self, keep: int | None) -> float:
        """What is stored with the graphs of so many last stages kept; None for all."""
        if keep is None:
            return self.rest + sum(self.graphs)
        return self.least + sum(self.graphs[len(self.graphs) - keep :])

    def keep(self, rows: int, budget: float) -> int | None:
        """How many of the last stages' graphs fit into ``budget`` bytes at ``rows`` rows; None if all do."""
        if self.stored(None) * rows <= budget:
            return None
        return max((k for k in range(len(self.graphs)) if self.stored(k) * rows <= budget), default=0)

    def rows(self, most: int, budget: float) -> int:
        """The most rows, a multiple of 32 up to ``most``, at which a fully recomputed gradient fits; 0 if none."""
        return int(min(budget / max(self.least, 1), most)) // ROWS * ROWS


def footprint(defense: nn.Module, x: Tensor, noise: Any, view: Any, *, staged: bool) -> Footprint:
    """What the gradient of a defense stores, measured on ``x``, not modelled.

    Args:
        defense: called with (x, noise, view).
        x: an image or more.
        noise: keyed noise, a row per image.
        view: how the purifier is run.
        staged: whether the view recomputes stages; then no two of their graphs are held at a time.
    """
    weights = {p.data_ptr() for p in defense.parameters()}
    graphs: list[float] = []
    inputs = 0.0

    def measured(stage: Stage, *given: Any) -> Any:
        nonlocal inputs
        tensors: list[Tensor] = []
        nest = emptied(given, tensors)
        inputs += sum(t.numel() * t.element_size() for t in tensors) / len(x)
        leaves = _leaves(tensors, [t.is_floating_point() for t in tensors])
        with (saved := _Saved(weights)):
            output = stage(*filled(nest, iter(leaves)))
        graphs.append(saved.bytes / len(x))
        found: list[Tensor] = []
        nest = emptied(output, found)
        return filled(nest, iter([t.detach() for t in found]))

    def purify(purifier: nn.Module, z: Tensor, tape: Any) -> Tensor:
        return purifier(z, tape, measured).requires_grad_()

    with torch.enable_grad(), (saved := _Saved(weights)):
        logits = defense(x.detach().requires_grad_(), noise, purify if staged else view)
    del logits
    return Footprint(tuple(graphs) or (0.0,), inputs, saved.bytes / len(x))


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves within, each tensor once, weights left out."""

    def __init__(self, weights: set[int]):
        self.sizes: dict[int, int] = {}
        super().__init__(self._note, lambda tensor: tensor)
        self.weights = weights

    def _note(self, tensor: Tensor) -> Tensor:
        self.sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor.detach()  # a node that held its own output would never be freed

    @property
    def bytes(self) -> int:
        return sum(size for pointer, size in self.sizes.items() if pointer not in self.weights)


def _leaves(tensors: Any, needed: Any) -> list[Tensor]:
    """The tensors cut from their graphs, with a gradient of their own where one is needed."""
    return [t.detach().requires_grad_(bool(need)) for t, need in zip(tensors, needed, strict=True)]


def _autocast(device: str) -> Callable[[], Any]:
    """The autocast mode of now, to enter again: a backward pass may run in another thread, outside of it."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled=enabled)
