"""Several searches one after another, each for every image: the loop of all ensembles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attacks._base import Attack, State
from attacks._gradient import Victim
from attacks._threat import ThreatModel


class Ensemble(Attack):
    """Members in a row; each leaves its candidates, and no image is spared a member because another broke it."""

    @abstractmethod
    def members(self, stochastic: bool) -> Sequence[Any]:
        """The searches, with noise sites of their own and ``eot`` draws per look."""

    def versions(self, stochastic: bool) -> int:
        return sum(m.versions(stochastic) for m in self.members(stochastic))

    def least_classes(self, stochastic: bool) -> int:
        return max(m.least_classes(stochastic) for m in self.members(stochastic))

    def length(self, stochastic: bool) -> int:
        return sum(m.length(stochastic) for m in self.members(stochastic))

    def evaluations(self, stochastic: bool) -> int:
        return sum(m.evaluations(stochastic) for m in self.members(stochastic))

    def distinct(self, stochastic: bool) -> int:
        return sum(m.distinct(stochastic) for m in self.members(stochastic))

    def gradients(self, stochastic: bool) -> int:
        return sum(m.gradients(stochastic) for m in self.members(stochastic))

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        candidates = torch.stack([threat.origin(x)] * self.versions(victim.stochastic))
        state = {"candidates": candidates, "broken_at": torch.full((len(x),), -1, device=x.device)}
        if self.retire:
            state["lost"] = torch.zeros(candidates.shape[:2], dtype=torch.bool, device=x.device)
        return state

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        seen = version = 0  # evaluations and candidates that came before this member's
        for member in self.members(victim.stochastic):
            if k < member.length(victim.stochastic):
                break
            k -= member.length(victim.stochastic)
            seen += member.evaluations(victim.stochastic) // member.eot
            version += member.versions(victim.stochastic)
        inner = member.start(x, y, victim, threat) if k == 0 else _inner(state)
        inner = member.step(k, inner, x, y, victim, threat)
        outer = {key: value for key, value in state.items() if not key.startswith("inner.")}
        if k == member.length(victim.stochastic) - 1 or self.retire:
            own = slice(version, version + member.versions(victim.stochastic))
            outer["candidates"] = _with(outer["candidates"], own, member.finish(inner))
            if self.retire:
                outer["lost"] = _with(outer["lost"], own, member.lost(inner))
            found = torch.where(inner["broken_at"] >= 0, inner["broken_at"] + seen, -1)
            outer["broken_at"] = torch.where(outer["broken_at"] < 0, found, outer["broken_at"])
        if k < member.length(victim.stochastic) - 1:
            outer |= {f"inner.{key}": value for key, value in inner.items()}
        return outer

    def finish(self, state: State) -> Tensor:
        return state["candidates"]

    def lost(self, state: State) -> Tensor:
        return state["lost"].clone()


def _with(old: Tensor, own: slice, new: Tensor) -> Tensor:
    """A tensor with a part of it replaced; the old one stays, for a state under way may be saved at any moment."""
    made = old.clone()
    made[own] = new
    return made


def _inner(state: State) -> State:
    """The state of the member that is at work."""
    return {key.removeprefix("inner."): value for key, value in state.items() if key.startswith("inner.")}
