"""The gradient that DiffPure's authors attacked with: torchsde's continuous adjoint, which isn't the chain's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class NotApplicable(ValueError):
    """A view or an attack asks a purifier for what it doesn't have."""


class Adjoint:
    """Forward the purifier's Euler-Maruyama chain; backward torchsde's stochastic adjoint, to reproduce DiffPure.

    Forward, in s = 1 - t from 1 - t_star to 1 - t_end with one step size h: z' = z + h f(z, s) + g(s) ΔW. Only the last
    state is kept. Backward, from s_end down in steps of h, with f and g at the *later* end of each step:

    z = z' - h f(z', s') - g(s') ΔW,   a = a' + h J_f(z', s')ᵀ a'

    So the states are rebuilt with an error, each Jacobian is taken one step too late, the grid is shifted by t_end (the
    path in between is linear), and the first Jacobian is that at t_end, where 1 / sigma is largest. For noise that
    counts as diagonal torchsde's default for the backward pass is Milstein's rule, whatever the forward rule; the
    diffusion doesn't depend on z, so Milstein's correction is 0. The attacker is weaker for it: never the default.

    Args:
        keep: unused: no stage's graph is kept.

    Raises:
        NotApplicable: if the purifier integrates no SDE or does so in uneven steps, if there is no tape (the backward
            pass asks for the noise again), or if torchsde isn't installed.

    Reference: Nie et al. 2022 (arXiv 2205.07460), section 3.3; Li et al. 2020 (arXiv 2001.01328).
    """

    def __init__(self, keep: int | None = None):
        pass

    def __call__(self, purifier: nn.Module, x: Tensor, noise: Any) -> Tensor:
        sde = purifier.sde() if hasattr(purifier, "sde") else None  # type: ignore[operator]
        if sde is None:
            raise NotApplicable("adjoint needs a purifier that integrates an SDE, e.g. diffpure:rule=sde")
        if not _even(sde.times):
            raise NotApplicable(
                f"adjoint integrates in steps of one size, and {len(sde.times) - 1} steps from {sde.times[0]} aren't: "
                "choose steps that divide 1000 · t_star"
            )
        if not torch.is_grad_enabled():
            return purifier(x, noise)
        if noise is None:
            raise NotApplicable("adjoint needs keyed noise: its backward pass asks for the same draw again")
        try:
            import torchsde  # heavy, and optional
        except ImportError as error:
            raise NotApplicable("adjoint needs the package torchsde: pip install torchsde") from error

        for r in range(purifier.rounds):  # type: ignore[arg-type]
            tape = noise.fold("round", r)
            state, context = purifier.start(x, tape)  # type: ignore[operator]
            system, path = _System(sde, state.shape[1:]), _Path(sde.times, tape, state.detach())
            ends = torch.tensor([1 - sde.times[0], 1 - sde.times[-1]], dtype=torch.float64)
            _, end = torchsde.sdeint_adjoint(
                system, state.flatten(1), ends, bm=path, method="euler", dt=_step(sde.times), adjoint_params=()
            )
            x = purifier.finish(end.view_as(state), context)  # type: ignore[operator]
        return x


class _System:
    """An SDE as torchsde takes it: in time s = 1 - t, on states flattened to (B, d)."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, sde: Any, shape: torch.Size):
        self.sde, self.shape = sde, shape

    def f(self, s: Tensor, z: Tensor) -> Tensor:
        return self.sde.drift(z.unflatten(1, self.shape), 1 - float(s)).flatten(1)

    def g(self, s: Tensor, z: Tensor) -> Tensor:
        return torch.full_like(z, self.sde.diffusion(1 - float(s)))


class _Path:
    """The Brownian path of a purification: W(s) through the chain's own increments, linear between its times.

    With s_k = 1 - times[k] and Δ_k = s_{k+1} - s_k:

    W(b) - W(a) = sum_k |[a, b] ∩ [s_k, s_{k+1}]| / Δ_k · sqrt(Δ_k) ξ_k

    Args:
        times: the chain's times, decreasing.
        noise: the round's tape; ξ_k is its site ("reverse", k).
        like: a state, shape (B, …).
    """

    levy_area_approximation = "none"

    def __init__(self, times: list[float], noise: Any, like: Tensor):
        self.times, self.noise, self.like = times, noise, like
        self.shape, self.dtype, self.device = like.flatten(1).shape, like.dtype, like.device

    def __call__(self, a: Tensor, b: Tensor, return_U: bool = False, return_A: bool = False) -> Tensor:
        early, late = 1 - float(a), 1 - float(b)
        increment = torch.zeros_like(self.like)
        for k, (t, t_next) in enumerate(zip(self.times, self.times[1:], strict=False)):
            share = (min(t, early) - max(t_next, late)) / (t - t_next)
            if share > 1e-9:  # less is rounding
                increment = increment + share * math.sqrt(t - t_next) * self.noise.normal("reverse", k, like=self.like)
        return increment.flatten(1)


def _step(times: list[float]) -> float:
    """The one step size h of a chain, by its first step."""
    return times[0] - times[1]


def _even(times: list[float]) -> bool:
    """Whether all steps have one size, but for the last that may be cut short."""
    h = _step(times)
    return all(abs(times[0] - k * h - t) < 1e-9 for k, t in enumerate(times[:-1])) and times[-2] - times[-1] < h + 1e-9
