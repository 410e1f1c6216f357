"""What becomes of what an attack found: chosen by draws of one role, judged by draws of another, and written down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attacks import Calls, Found
from attacks._calls import Request
from purifiers import Defense, Noise, Purifier, Tape
from purifiers._noise import Sealed

if TYPE_CHECKING:
    from benchmark.cell import Cell

AT_X: WeakKeyDictionary[Defense, dict[tuple, dict[int, Tensor]]] = WeakKeyDictionary()
"""Logits at the unperturbed images and under random perturbations, by defense and what it was made of: all cells of a
grid share them. Of the many null draws the classes."""


class Judged(NamedTuple):
    """Records of some images, the candidates that stand for them, and the logits of every draw."""

    records: list[dict[str, Any]]
    x_adv: Tensor
    logits: dict[str, Tensor]


class Judge:
    """Verdicts of one cell.

    Args:
        cell: what was attacked, and how many draws of each role it gets.
        calls: how the defense is called.
    """

    def __init__(self, cell: Cell, calls: Calls):
        self.cell, self.calls = cell, calls

    def verdict(self, found: Found, x: Tensor, y: Tensor, ids: Tensor) -> Judged:
        """Choose, judge, and say what happened to each image."""
        cell = self.cell
        version, select = self._chosen(found.candidates, y, ids)
        x_adv, distance = (
            of[version, torch.arange(len(y), device=y.device)] for of in (found.candidates, found.distances)
        )
        logits = {
            "select": select,
            "clean": self._kept(x, ids, "clean", cell.draws),
            "adv": self._draws(x_adv, ids, "verdict", cell.draws),
            "random": self._kept(x, ids, "random", cell.draws, control=True),
        }
        predicted = {k: classes(v) for k, v in logits.items()}
        null, package_null, flips = self._null(x, y, ids), self._package_null(x, y, ids), self._flips(x_adv, x, ids)
        extra = 3 * cell.draws + (len(found.candidates) + 1) * cell.select
        records = [
            {
                "id": int(ids[i]),
                "label": int(y[i]),
                **{k: predicted[k][i].tolist() for k in ("clean", "adv", "select", "random")},
                "distance": float(distance[i]),
                "broken_at": int(found.broken_at[i]),
                "null_wrong": int(null[i]),
                "fallback": bool(distance[i] == 0),
                "package_verdict": None if found.package_correct is None else bool(found.package_correct[i]),
                "package_null": None if package_null is None else bool(package_null[i]),
                "code_flips": None if flips is None else float(flips[i]),
                "forwards": found.forwards + extra + cell.distinct,
                "backwards": found.backwards,
                "blank": None if cell.attack.package(cell.drawing) else int(found.blank[i]),
            }
            for i in range(len(ids))
        ]
        return Judged(records, x_adv, logits)

    def clean(self, x: Tensor, ids: Tensor) -> Tensor:
        """Logits of the draws at unperturbed images, shape (B, draws, K)."""
        return self._draws(x, ids, "clean", self.cell.draws)

    def share(self, candidates: Tensor, y: Tensor, ids: Tensor, draws: int) -> Tensor:
        """The share of correct ``select`` draws per image, of the candidate that other draws found the strongest."""
        version, _ = self._chosen(candidates, y, ids)
        chosen = candidates[version, torch.arange(len(y), device=y.device)]
        return (classes(self._draws(chosen, ids, "select", draws, "judge")) == y[:, None]).double().mean(1)

    def _chosen(self, candidates: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Per image the number of the candidate with the fewest correct ``select`` draws, and logits of further draws.

        The draws that chose would flatter the chosen; attacks are compared by draws that chose nothing yet. An attacker
        who knows the draws that judge chooses by those.
        """
        cell = self.cell
        if cell.view.foreknown:
            logits = [self._draws(c, ids, "verdict", cell.draws) for c in candidates]
        else:
            logits = [self._draws(c, ids, "select", cell.select, "candidate", v) for v, c in enumerate(candidates)]
        correct = (classes(torch.stack(logits)) == y[:, None]).sum(-1)
        version = correct.argmin(0)
        chosen = candidates[version, torch.arange(len(y), device=y.device)]
        return version, self._draws(chosen, ids, "select", cell.select)

    def _draws(self, x: Tensor, ids: Tensor, role: str, count: int, *site: str | int) -> Tensor:
        """Logits of ``count`` keyed draws per image, shape (B, count, K)."""
        tape = Tape(self.cell.settings.seed, role, ids).to(x.device).fold(*site)
        return self.calls.ask(Request(self.cell.defense, None, x, tape, count)).logits.unflatten(0, (-1, count))

    def _random(self, x: Tensor, ids: Tensor, role: str, count: int) -> Tensor:
        """``_draws``, each under a random perturbation of its own."""
        tape = Tape(self.cell.settings.seed, role, ids).to(x.device).draws(count)
        perturbed = self.cell.threat.control(x.repeat_interleave(count, 0), tape)
        answer = self.calls.ask(Request(self.cell.defense, None, perturbed, tape, 1))
        return answer.logits.unflatten(0, (-1, count))

    def _kept(self, x: Tensor, ids: Tensor, role: str, count: int, *, control: bool = False) -> Tensor:
        """Draws at x or around it: keyed noise makes them the same in every cell of a defense, so they are kept."""
        cell = self.cell
        threat = (cell.threat.norm, cell.identity.eps) if control else ()
        key = (cell.told, str(x.device), cell.identity.fingerprint, cell.settings.seed, cell.rows, role, *threat)
        kept = AT_X.setdefault(cell.defense, {}).setdefault(key, {})
        missing = [k for k, i in enumerate(ids.tolist()) if i not in kept or len(kept[i]) < count]
        if missing:
            ask = self._random if control else self._draws
            found = ask(x[missing], ids[missing], role, count)
            found = classes(found).to(torch.int16) if role == "null" else found
            kept.update(zip(ids[missing].tolist(), found, strict=True))
        return torch.stack([kept[i][:count] for i in ids.tolist()])

    def _null(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Of as many different draws as the attack sees in its loop, how many are wrong at x itself."""
        if self.cell.distinct == 0:
            return torch.zeros(len(x), dtype=torch.long)
        return (self._kept(x, ids, "null", self.cell.distinct) != y[:, None]).sum(1)

    def _flips(self, x_adv: Tensor, x: Tensor, ids: Tensor) -> Tensor | None:
        """The share of an image's discrete codes that the attack changed, under one verdict draw."""
        purifier = self.cell.defense.purifier
        if not isinstance(purifier, Purifier) or type(purifier).codes is Purifier.codes:
            return None  # no codebook
        tape, encoder = Tape(self.cell.settings.seed, "verdict", ids).to(x.device), _Encoder(purifier)
        before, after = (self.calls.ask(Request(encoder, None, z, tape, 1)).logits for z in (x, x_adv))
        return before.ne(after).double().mean(1) if before.shape[1] else None

    def _package_null(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor | None:
        """The package's own verdict, were x never moved: its rule, single draws all right, played on ``null`` draws."""
        looks = self.cell.attack.looks(self.cell.drawing)
        if not (self.cell.stochastic and looks):
            return None
        return (self._kept(x, ids, "null", looks) == y[:, None]).all(1)


class _Encoder(nn.Module):
    """x → the discrete codes of its first round, (B, codes); none where an instance has no codebook."""

    def __init__(self, purifier: Purifier):
        super().__init__()
        self.purifier = purifier

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        codes = self.purifier.codes(self.purifier.start(x, Sealed(noise.fold("round", 0)))[0])
        return x.new_empty(len(x), 0) if codes is None else codes.flatten(1).to(x.dtype)


def classes(logits: Tensor) -> Tensor:
    """Predicted classes; -1 where a row isn't finite."""
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)
