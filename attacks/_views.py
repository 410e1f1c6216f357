"""What the attacker differentiates: the ways to run a purifier so that a gradient comes back.

A view is called as ``view(purifier, x, noise)`` in place of ``purifier(x, noise)``. Every view but ``blind`` computes
the purifier's own output; they differ in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attacks._adjoint import Adjoint, NotApplicable
from attacks._nest import emptied, filled
from attacks._recompute import staged

View = Callable[[nn.Module, Tensor, Any], Tensor]


class Exact:
    """The gradient of the discrete chain that is evaluated, by one recomputing fold over the purifier's stages.

    Stages (start, steps, finish) but the last ``keep`` store only their inputs; the backward pass runs them again under
    the same keyed noise. How many are kept changes no bit of the gradient.

    Args:
        keep: how many of the last stages keep their graphs; None keeps all, the fastest where memory allows.
    """

    def __init__(self, keep: int | None = None):
        self.keep = keep

    def __call__(self, purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
        if not hasattr(purifier, "rounds"):
            return purifier(x)
        if noise is None or not torch.is_grad_enabled():
            return purifier(x, noise)
        remaining = stages(purifier)
        keep = remaining if self.keep is None else self.keep

        def apply(stage: Callable[..., Any], *inputs: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            return staged(stage, *inputs, keep=remaining < keep)

        return purifier(x, noise, apply)


class BPDA:
    """Forward exact, backward the identity (Athalye et al. 2018 (arXiv 1802.00420))."""

    def __init__(self, keep: int | None = None):
        pass

    def __call__(self, purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
        with torch.no_grad():
            purified = _plain(purifier, x, noise)
        return x + (purified - x).detach()


class Blind:
    """The bare classifier: the attacker doesn't know of the purifier."""

    def __init__(self, keep: int | None = None):
        pass

    def __call__(self, purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
        return x


class Surrogate:
    """Forward exact; backward, stage by stage, the gradient of a stand-in that the purifier names.

    Each stage s is replaced by s(v) + (ŝ(v) - stop(ŝ(v))), with ŝ the same stage of ``purifier.surrogate(gradient)``:
    BPDA with another backward pass than the identity (Athalye et al. 2018 (arXiv 1802.00420), section 4.1).

    Args:
        keep: unused: every stage's graph is kept.
        gradient: one of ``purifier.surrogates``.
    """

    def __init__(self, keep: int | None = None, *, gradient: str):
        self.gradient = gradient

    def __call__(self, purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
        offered = getattr(purifier, "surrogates", ())
        if self.gradient not in offered:
            raise NotApplicable(
                f"{type(purifier).__name__} has no surrogate gradient {self.gradient!r}; "
                f"it offers {', '.join(offered) or 'none'}"
            )
        stand_in = purifier.surrogate(self.gradient)  # type: ignore[operator]

        def apply(stage: Callable[..., Any], *inputs: Any) -> Any:
            with torch.no_grad():
                exact = stage(*inputs)
            return _spliced(exact, getattr(stand_in, stage.__name__)(*inputs))

        return purifier(x, noise, apply)


class Watched:
    """Another view, through which the stages of a purification are seen as they run.

    Args:
        view: how the purifier is run.
        see: called after every stage with (stage, inputs, output); the output is part of the view's graph.
    """

    def __init__(self, view: View, see: Callable[[Callable[..., Any], tuple, Any], None]):
        self.view, self.see = view, see

    def __call__(self, purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
        return self.view(_Seen(purifier, self.see), x, noise)  # type: ignore[arg-type]


class _Seen:
    """A purifier that shows its stages; in all else the purifier itself."""

    def __init__(self, purifier: nn.Module, see: Callable[[Callable[..., Any], tuple, Any], None]):
        self.purifier, self.see = purifier, see

    def __getattr__(self, name: str) -> Any:
        return getattr(self.purifier, name)

    def __call__(self, x: Tensor, noise: Any = None, apply: Callable[..., Any] | None = None) -> Tensor:
        if not hasattr(self.purifier, "rounds"):
            return self.purifier(x)

        def seen(stage: Callable[..., Any], *inputs: Any) -> Any:
            output = stage(*inputs) if apply is None else apply(stage, *inputs)
            self.see(stage, inputs, output)
            return output

        return self.purifier(x, noise, seen)


def _spliced(exact: Any, approximate: Any) -> Any:
    """The values of one nest of tensors with the gradients of another of the same build."""
    values: list[Tensor] = []
    slopes: list[Tensor] = []
    nest, _ = emptied(exact, values), emptied(approximate, slopes)
    # detached: a stage may hand on its input, which has a gradient of its own
    return filled(nest, (v.detach() + (s - s.detach()) for v, s in zip(values, slopes, strict=True)))


VIEWS: dict[str, Callable[..., View]] = {
    "exact": Exact,
    "bpda": BPDA,
    "blind": Blind,
    "surrogate": Surrogate,
    "adjoint": Adjoint,
}


def stages(purifier: nn.Module) -> int:
    """How many stages one purification runs."""
    return int(purifier.rounds) * (int(purifier.steps) + 2)  # type: ignore[arg-type]


def _plain(purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
    return purifier(x, noise) if hasattr(purifier, "rounds") else purifier(x)
