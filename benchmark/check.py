"""The contract of a component, checked in seconds: what a newcomer runs before a table, and before asking for help."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks import NORMS, VIEWS, Attack, AttackError, Calls, Victim
from attacks import View as GradientView
from attacks._calls import Request
from attacks._gradient import ce, margin
from attacks._views import Exact
from benchmark import checkpoints, config, defenses, registry, specs
from benchmark.checkpoints import Need
from benchmark.checks import Check, failures
from benchmark.dataset import Dataset
from benchmark.errors import RunError, UsageError, raised, unknown
from benchmark.plan import plan
from benchmark.preflight import accuracy_check, climb_check, correct, declared_check, integral_check, preflight
from benchmark.price import stopwatch
from benchmark.repeatable import make_repeatable
from benchmark.views import View
from purifiers import Defense, Purifier, Tape
from purifiers._base import call

ROWS = 8
"""Rows of a call: few, so that a large network is checked in seconds."""


FEW = slice(0, 4)


def component(kind: str, spec: str, need: Need, images: Dataset, judge: str | None = None) -> list[Check]:
    """The checks of a component; its own exceptions are what they are, a failed check.

    Args:
        kind: "purifier", "classifier" or "attack".
        spec: which.
        need: the data set's form, and where weights are.
        images: a few images of it, 64 if there are, on the device where the component is checked.
        judge: the classifier behind a purifier; by default the data set's first with weights, or a linear one.

    Raises:
        UsageError: if the component can't be built.
    """
    make_repeatable(images.device)
    try:
        if kind == "purifier":
            return purifier(spec, need, images, judge)
        return {"classifier": classifier, "attack": attack}[kind](spec, need, images)
    except (UsageError, RunError):
        raise
    except Exception as error:  # whatever a newcomer's code raises
        return [Check("runs", "fail", raised(error), "no error", "mend this first; the other checks follow it")]


def purifier(spec: str, need: Need, images: Dataset, judge: str | None = None) -> list[Check]:
    """A purifier before ``judge``, by default the data set's first classifier with weights, or a linear one."""
    g = checkpoints.build("purifiers", spec, need).module
    known = checkpoints.cards(need.form.family, need.roots)
    first = (n for n, card in known.items() if checkpoints.read_card(card)["kind"] == "classifiers")
    named = judge or next(first, None)
    f = checkpoints.build("classifiers", named, need).module if named else Linear(need.form.shape, need.form.classes)
    defense = defenses.tamed(Defense(g, f).to(images.device), images.images(slice(0, 8)))
    view = View("auto").fitting(defense.purifier)
    checks = [Check("view", "pass", str(view), "", "")] + preflight(
        defense, view(1), images.images(FEW), images.labels[FEW], images.ids[FEW], seed=0, rows=ROWS
    )
    if failures(checks):
        return checks
    few = slice(0, 8)
    tape = Tape(0, "preflight", images.ids[few]).to(images.device)
    x, y = images.images(few), images.labels[few]
    checks.append(integral_check(defense, view(1), x, tape, rows=ROWS))
    checks.append(declared_check(defense, x[:4], y[:4], tape[:4]))
    some, threat = slice(0, min(ROWS, len(images))), NORMS["Linf"](Fraction(8, 255))
    tape = Tape(0, "preflight", images.ids[some]).to(images.device).fold("climb")
    checks.append(climb_check(defense, view(1), images.images(some), images.labels[some], tape, threat, Calls(ROWS)))
    counted = _evaluations(defense.purifier, x[: len(tape)], tape)
    return [*checks, counted, _floor(defense, images, named), *_cost(defense, view(1), images)]


def classifier(spec: str, need: Need, images: Dataset) -> list[Check]:
    """A classifier without a purifier; the checks of a checkpoint's accuracy with it."""
    found = checkpoints.build("classifiers", spec, need)
    defense = Defense(registry.load("purifiers", "identity")(), found.module).to(images.device)
    with torch.no_grad():
        logits = defense.classifier(images.images(slice(0, 4)))
    if not isinstance(logits, torch.Tensor):
        advice = "return logits, a tensor of shape (images, classes): wrap what returns anything else"
        return [Check("classes", "fail", type(logits).__name__, "a tensor", advice)]
    shape = (min(4, len(images)), need.form.classes)
    checks = [
        Check.of(
            "classes", tuple(logits.shape) == shape, str(tuple(logits.shape)), str(shape),
            f"{need.form.family} has {need.form.classes} classes: one row of as many logits per image",
        )
    ]  # fmt: skip
    if checks[0].status == "fail":
        return checks
    checks += preflight(
        defense, Exact(keep=1), images.images(FEW), images.labels[FEW], images.ids[FEW], seed=0, rows=ROWS
    )
    few = slice(0, min(64, len(images)))
    x, y = images.images(few), images.labels[few]
    if found.accuracy is None:
        right = correct(defense.classifier, x, y, rows=ROWS)
        value = f"{right} of {len(x)} images, and neither a card nor a leaderboard says how many to expect"
        checks.append(Check("clean-accuracy", "n/a", value, "", ""))
    else:
        checks.append(accuracy_check(defense.classifier, x, y, found.accuracy, rows=ROWS))
    return checks if failures(checks) else [*checks, *_cost(defense, Exact(keep=1), images)]


def attack(spec: str, need: Need, images: Dataset) -> list[Check]:
    """An attack on a linear model, whose exact optimum is known, and on a noisy copy of it."""
    parsed = specs.parse(spec)
    component = registry.load("attacks", parsed.name, parsed.argument)
    options, _ = config.attack_options(parsed, component, config.BUDGETS["quick"], stochastic=True)
    try:
        made: Attack = component(**options)
    except ValueError as error:
        raise UsageError(f"{parsed.name}: {error}") from error
    if need.norm not in NORMS:
        raise UsageError(unknown("norm", need.norm, sorted(NORMS)))
    norm = need.norm if need.norm in made.norms else made.norms[0]
    model = Linear(need.form.shape, max(need.form.classes, 3), two=True).to(images.device)
    x = 0.25 + 0.5 * images.images(FEW)
    y = model(x).argmax(1)
    ids = torch.arange(len(x), device=x.device)
    threat = NORMS[norm]({"Linf": Fraction(1, 64), "L2": Fraction(1, 2), "StAdv": Fraction(1, 20)}[norm])
    quiet, noisy = (Defense(Noisy(sigma=s), model) for s in (0.0, 0.02))
    before = _generators(x.device)
    try:
        found = made.perturb(x, y, _victim(noisy, ids), threat)
        again = made.perturb(x, y, _victim(noisy, ids), threat)
        alone = made.perturb(x[1:2], y[1:2], _victim(noisy, ids[1:2]), threat)
        plain = made.perturb(x, y, _victim(quiet, ids), threat)
    except AttackError as error:
        advice = "return finite images of the shape given, projected into the threat model"
        return [Check("inside-the-threat-model", "fail", str(error), "at most 1e-6 outside", advice)]
    moved = before != _generators(x.device)
    gained = (margin(model(plain.candidates[0]), y) - margin(model(x), y)).min()
    gained_share = float(gained) / model.best_gain(threat) if norm != "StAdv" else float(gained)
    apart = float((alone.candidates[:, 0] - found.candidates[:, 1]).abs().max())

    return [
        Check.of("inside-the-threat-model", True, norm, "at most 1e-6 outside", ""),
        Check.of("repeatable", torch.equal(found.candidates, again.candidates), "", "the same images twice",
              "take all randomness from victim.tape"),
        Check("batch-independent", "n/a", "", "", "a package sees its whole block") if made.package(True)
        else Check.of("batch-independent", apart <= 1e-6, apart, 1e-6, "an image's search depends on its neighbours"),
        Check.of("global-generators", not moved, "", "untouched", "never seed or draw from torch's global generator"),
        Check("linear-optimum", "n/a", gained_share, "", "it doesn't search the whole ball with gradients")
        if made.black_box or made.restricted or norm == "StAdv"
        else Check.of("linear-optimum", gained_share >= 0.9, gained_share, 0.9,
                   "on a linear model the attack gains less than nine tenths of what the threat model allows"),
        Check("planned-cost", "pass",
              f"{made.evaluations(True):,} forward and {made.gradients(True):,} backward draws per image at quick", "",
              ""),
    ]  # fmt: skip


class Linear(nn.Module):
    """Logits of a linear model, z = W (x - 1/2), with keyed weights; ``two``: only the first two classes matter."""

    w: Tensor
    b: Tensor

    def __init__(self, shape: tuple[int, int, int], classes: int, *, two: bool = False):
        super().__init__()
        like = torch.empty(classes, int(np.prod(shape)))
        w = Tape(0, "check", torch.arange(classes)).normal("w", like=like) / like.shape[1] ** 0.5
        if two:
            w = torch.cat([w[:1], -w[:1], torch.zeros_like(w[2:])])
        self.register_buffer("w", w)
        self.register_buffer("b", torch.tensor([0.0, 0.0] + [-50.0 * two] * (classes - 2)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.w.T + self.b

    def best_gain(self, threat: Any) -> float:
        """The most by which an attack raises max_{i≠y} z_i - z_y where only two classes matter: 2 eps ‖w‖_dual."""
        dual = {"Linf": 1, "L2": 2}[threat.norm]
        return 2 * float(threat.bound) * float(self.w[0].norm(p=dual))


class Noisy(Purifier):
    """g(x) = x + sigma n: the simplest randomness for an attack to average over."""

    def __init__(self, *, sigma: float):
        super().__init__()
        self.sigma = sigma

    def start(self, x: Tensor, noise: Any) -> tuple[Tensor, None]:
        return x + self.sigma * noise.normal("noise", like=x), None

    def finish(self, state: Tensor, context: None) -> Tensor:
        return state


def _victim(defense: Defense, ids: Tensor) -> Victim:
    return Victim(defense, VIEWS["exact"](), Tape(0, "attack", ids), Calls(ROWS), stochastic=True)


def _generators(device: torch.device) -> list:
    there = [torch.cuda.get_rng_state(device).tolist()] if device.type == "cuda" else []
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), *there]  # type: ignore[index]


def _evaluations(g: nn.Module, x: Tensor, tape: Tape) -> Check:
    """Whether ``nfe``, which tables and plans give, is what runs: how often the median weight sees an image."""
    seen = {m: 0 for m in g.modules() if any(True for _ in m.parameters(recurse=False))}
    if not seen:
        return Check("evaluations", "n/a", "", "", "the purifier has no weights")

    def count(module: nn.Module, inputs: Any) -> None:
        seen[module] += next((len(a) for a in inputs if isinstance(a, Tensor) and a.ndim), len(x))

    hooks = [module.register_forward_pre_hook(count) for module in seen]
    try:
        with torch.no_grad():
            call(g, x, tape)
    finally:
        for hook in hooks:
            hook.remove()
    by_rows = sorted((rows, sum(p.numel() for p in m.parameters(recurse=False))) for m, rows in seen.items())
    up_to = np.cumsum([weights for _, weights in by_rows])
    median = by_rows[int(np.searchsorted(up_to, up_to[-1] / 2))][0] / len(x)
    declared = int(getattr(g, "nfe", 1))
    return Check.of(
        "evaluations", median <= declared, f"{median:g} per image", f"at most {declared}, its nfe",
        "say how often the networks run: a property nfe, which tables print and plan multiplies", bad="warn",
    )  # fmt: skip


def _floor(defense: Defense, images: Dataset, classifier: str | None) -> Check:
    """What mean, majority and worst of 9 draws read when nothing is perturbed: no attack is behind such a loss."""
    n, draws = min(16, len(images)), 9 if defense.stochastic else 1
    x, y, ids = images.images(slice(0, n)), images.labels[:n], images.ids[:n]
    logits = Calls(ROWS).ask(Request(defense, None, x, Tape(0, "clean", ids), draws)).logits
    share = (logits.argmax(1) == y.repeat_interleave(draws)).unflatten(0, (n, draws)).double().mean(1)
    mean, majority, worst = (
        float(share.mean()),
        float((share > 0.5).double().mean()),
        float((share == 1).double().mean()),
    )
    advice = "" if classifier else "no classifier has weights for these images: a linear stand-in judged"
    return Check(
        "null-floor", "pass" if classifier else "n/a",
        f"mean {mean:.1%}, majority {majority:.1%}, worst of {draws} {worst:.1%} (n={n}, {classifier or 'linear'})",
        "", advice,
    )  # fmt: skip


def _cost(defense: Defense, view: GradientView, images: Dataset) -> list[Check]:
    """What runs would cost on this machine, from one timed gradient of few rows; ``plan`` times full calls."""
    rows = torch.arange(ROWS) % len(images)
    tape = Tape(0, "attack", torch.arange(ROWS)).to(images.device)
    ask = Request(defense, view, images.images(rows), tape, 1, ce, (images.labels[rows],), gradient=True)
    a_row = stopwatch(Calls(ROWS), ask) / ROWS
    checks = []
    for name in ("quick", "paper"):
        budget = config.BUDGETS[name]
        component = registry.load("attacks", "autoattack")
        options, _ = config.attack_options(specs.Spec("autoattack"), component, budget, defense.stochastic)
        made = component(**options)
        draws, select = (budget.draws, budget.select) if defense.stochastic else (1, 1)
        cost = plan(made, stochastic=defense.stochastic, nfe=defense.nfe, n=budget.n, select=select, draws=draws)
        hours = cost.n * (cost.backwards + (cost.forwards - cost.backwards) / 3) * a_row / 3600
        time_text = "about " + (f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.0f} min")
        value = f"autoattack at {name}, n={cost.n}: {cost.passes:,} passes, {time_text} in calls of {ROWS} rows"
        checks.append(Check("planned-cost", "pass", value, "", ""))
    return checks
