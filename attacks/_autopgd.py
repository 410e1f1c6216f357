"""One run of Auto-PGD: momentum, a step size that halves itself, and returns to the best point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attacks._base import Attack, State, first_broken
from attacks._gradient import LEAST_CLASSES, LOSSES, Evaluation, Victim, dlr_targeted
from attacks._threat import ThreatModel


class AutoPGD(Attack):
    """APGD from one start, with every decision taken on means over the iteration's own draws.

    u_k = P(x_k + eta direction(g_k)); x_{k+1} = P(x_k + a (u_k - x_k) + (1 - a) (x_k - x_{k-1})), a = 0.75 (1 at the
    first step). At each checkpoint an image whose loss rose in at most 75 % of the steps since the last, or whose
    best loss stood still without a halving, halves eta and returns to its best point. The candidate is the point with
    the fewest correct draws, among those the one of highest loss.

    Args:
        steps: iterations.
        eot: draws per gradient.
        loss: one of ``LOSSES``; unused with a target.
        restart: number of the restart: another random start, other draws.
        returns: go back to the best point at a checkpoint, as the reference does. Where draws differ the best is the
            luckiest, too: the loss there was a maximum over other draws each time.
        rank: of the class that is aimed at, by mean logits at x: 1 is the most likely but the label. The loss is then
            the targeted DLR; 0 aims at none.

    Reference: Croce and Hein 2020 (arXiv 2003.01690), algorithm 1.
    """

    RHO, MOMENTUM = 0.75, 0.75

    def __init__(
        self, *, steps: int, eot: int, loss: str = "ce", restart: int = 0, rank: int = 0, returns: bool = True
    ):
        self.steps, self.eot, self.rank, self.returns = steps, eot, rank, returns
        self.loss = dlr_targeted if rank else LOSSES[loss]
        self.loss_name = "dlr-targeted" if rank else loss
        self.site = ("apgd", self.loss_name, *((rank,) if rank else ()), *(("restart", restart) if restart else ()))

    def display(self, stochastic: bool) -> str:
        return f"APGD-{self.loss_name.upper()}"

    def least_classes(self, stochastic: bool) -> int:
        return max(LEAST_CLASSES.get(self.loss_name, 2), self.rank + 1)

    def length(self, stochastic: bool) -> int:
        return self.steps

    def evaluations(self, stochastic: bool) -> int:
        return self.gradients(stochastic) + (self.eot if self.rank else 0)

    def distinct(self, stochastic: bool) -> int:
        return self.gradients(stochastic)  # the draws that name the targets judge nothing

    def gradients(self, stochastic: bool) -> int:
        return (self.steps + 1) * self.eot

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel, x_init: Tensor | None = None) -> State:
        code = threat.random(x, victim.tape.fold(*self.site, "start")) if x_init is None else x_init.clone()
        state: State = {"target": self._target(x, y, victim)} if self.rank else {}
        first = self._look(0, code, state, x, y, victim, threat)
        return state | {
            "x": code,
            "x_old": code.clone(),
            "gradient": first.gradient,
            "x_best": code.clone(),
            "gradient_best": first.gradient.clone(),
            "loss_best": first.loss,
            "x_out": code.clone(),
            "correct_out": first.correct,
            "loss_out": first.loss.clone(),
            "size": torch.full_like(first.loss, 2 * threat.bound),
            "losses": torch.zeros(self.steps, len(x), dtype=x.dtype, device=x.device),
            "halved": torch.ones_like(first.loss, dtype=torch.bool),
            "loss_best_at_check": first.loss.clone(),
            "broken_at": first_broken(torch.full((len(x),), -1, device=x.device), first, 0),
        }

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        s = dict(state)
        a = self.MOMENTUM if k > 0 else 1.0
        momentum = s["x"] - s["x_old"]  # before x_old is overwritten
        ahead = threat.project(s["x"] + threat.step(s["gradient"], s["size"].view(-1, 1, 1, 1)), x)
        s["x_old"] = s["x"]
        s["x"] = threat.project(s["x"] + a * (ahead - s["x"]) + (1 - a) * momentum, x)

        new = self._look(k + 1, s["x"], s, x, y, victim, threat)
        s["gradient"] = new.gradient
        s["losses"] = s["losses"].clone()
        s["losses"][k] = new.loss
        s["broken_at"] = first_broken(s["broken_at"], new, k + 1)
        better = (new.correct < s["correct_out"]) | ((new.correct == s["correct_out"]) & (new.loss > s["loss_out"]))
        s["x_out"] = _where(better, s["x"], s["x_out"])
        s["correct_out"] = torch.where(better, new.correct, s["correct_out"])
        s["loss_out"] = torch.where(better, new.loss, s["loss_out"])
        higher = new.loss > s["loss_best"]
        s["x_best"] = _where(higher, s["x"], s["x_best"])
        s["gradient_best"] = _where(higher, new.gradient, s["gradient_best"])
        s["loss_best"] = torch.where(higher, new.loss, s["loss_best"])

        window = self._windows().get(k)
        return s if window is None else self._check(s, k, window)

    def finish(self, state: State) -> Tensor:
        return state["x_out" if self.returns else "x"][None]

    def lost(self, state: State) -> Tensor:
        return state["correct_out"][None] == 0

    def _look(
        self, k: int, code: Tensor, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel
    ) -> Evaluation:
        """What evaluation k learns of a code; the gradient is the code's."""
        aside = (state["target"],) if self.rank else ()
        found = victim.evaluate(threat.render(code, x), y, self.loss, *self.site, k, eot=self.eot, aside=aside)
        return found._replace(gradient=threat.pullback(found.gradient, code, x))

    def _target(self, x: Tensor, y: Tensor, victim: Victim) -> Tensor:
        """The class of this run's rank at x; every rank asks the same draws."""
        logits = victim.logits(x, "apgd", "targets", eot=self.eot)
        own = nn.functional.one_hot(y, logits.shape[1]).bool()
        return logits.masked_fill(own, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, self.rank - 1]

    def _windows(self) -> dict[int, int]:
        """The iterations that end a window, with its length: 0.22 N, each later one 0.03 N shorter, at least 0.06 N."""
        n = self.steps
        window, shorter, shortest = max(int(0.22 * n), 1), max(int(0.03 * n), 1), max(int(0.06 * n), 1)
        ends, k = {}, window - 1
        while k < n:
            ends[k] = window
            window = max(window - shorter, shortest)
            k += window
        return ends

    def _check(self, s: State, k: int, window: int) -> State:
        """Halve the step and return to the best point where the loss oscillates or stands still."""
        # The reference compares an image's very first loss with zero; kept, so that the iterates agree with it.
        previous = torch.cat((torch.zeros_like(s["losses"][:1]), s["losses"][:-1]))
        rises = (s["losses"] > previous)[k - window + 1 : k + 1].sum(0)
        oscillates = rises <= window * self.RHO
        stands = ~s["halved"] & (s["loss_best_at_check"] >= s["loss_best"])
        s["halved"] = oscillates | stands
        s["loss_best_at_check"] = s["loss_best"].clone()
        s["size"] = torch.where(s["halved"], s["size"] / 2, s["size"])
        if self.returns:
            s["x"] = _where(s["halved"], s["x_best"], s["x"])
            s["gradient"] = _where(s["halved"], s["gradient_best"], s["gradient"])
        return s


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, 1, 1, 1), a, b)
