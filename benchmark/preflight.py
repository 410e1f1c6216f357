"""Checks of a defense before the first example: a run that would measure a fault doesn't start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import binom
from torch import Tensor, nn

from attacks._gradient import ce
from attacks._views import Exact, View
from benchmark.foreign import Foreign
from purifiers import Defense, Tape
from purifiers._base import call


class Check(NamedTuple):
    """One check: status is "pass", "fail" or "n/a"; advice says what to do about a failure."""

    id: str
    status: str
    value: float | str
    threshold: float | str
    advice: str


class RepeatedSite(Exception):
    """A purifier asked for the noise of one site twice."""


class Recording(Tape):
    """A tape that refuses to be asked for one site twice."""

    def __init__(self, of: Tape, asked: set[tuple]):
        super().__init__(of.seed, of.role, of.ids, of.draw, of.path)
        self.asked = asked

    def __getitem__(self, rows: Tensor | slice) -> Recording:
        return Recording(super().__getitem__(rows), self.asked)

    def fold(self, *site: str | int) -> Recording:
        return Recording(super().fold(*site), self.asked)

    def draws(self, count: int) -> Recording:
        return Recording(super().draws(count), self.asked)

    def _words(self, site: tuple[str | int, ...], like: Tensor) -> Tensor:
        key = (*self.path, *site)
        if key in self.asked:
            raise RepeatedSite(f"{key} was asked for twice")
        self.asked.add(key)
        return super()._words(site, like)


def preflight(
    defense: Defense,
    view: View | None,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    *,
    seed: int,
    rows: int,
    attacker: Defense | None = None,
) -> list[Check]:
    """Run all checks on the first few images; at most about 2 % of a run.

    Args:
        defense: what is attacked.
        view: how the attacker differentiates; None for one that doesn't.
        x, y, ids: images, labels and ids, at least one.
        seed: the run's seed.
        rows: the fixed row count of every call.
        attacker: what the attacker differentiates, if not the defense.
    """
    repeat = torch.arange(rows) % len(x)
    images = x[repeat]
    tape = Tape(seed, "preflight", ids[repeat], torch.arange(rows) // len(x))
    asked: set[tuple] = set()
    with torch.no_grad():
        try:
            purified = call(defense.purifier, images, Recording(tape, asked))
            repeated = ""
        except RepeatedSite as error:
            purified, repeated = call(defense.purifier, images, tape), str(error)
        if purified.shape != images.shape or purified.dtype != images.dtype:
            return [_check(
                "shape", False, f"{tuple(purified.shape)} {purified.dtype}", f"{tuple(images.shape)} {images.dtype}",
                "a purifier returns images of the shape and dtype that it was given",
            )]  # fmt: skip
        logits = defense(images, tape)
        again = defense(images, tape)
        other = defense(images, tape.fold("other"))
        order = torch.arange(rows).roll(1)
        neighbours = images[order]
        neighbours[rows // 2 :] = 1 - neighbours[rows // 2 :]
        moved = defense(neighbours, tape[order])[: rows // 2]
        history = _history(defense, images, tape)
    if not logits.isfinite().all():
        return [_check("finite-logits", False, "", "all finite", "look for overflow in the defense")]
    probabilities = bool((logits >= 0).all() and (logits <= 1).all())  # of a softmax, scaled or not, or of sigmoids
    spread = max(float((logits - other).abs().max()), 0.0)
    repeatable = float((logits - again).abs().max())
    position = float((logits[order][: rows // 2] - moved).abs().max())
    scale = float(logits.abs().max().clamp_min(1))
    training = [name or "defense" for name, module in defense.named_modules() if module.training]
    low, high = float(purified.min()), float(purified.max())
    checks = [
        _check("finite-logits", True, "", "all finite", ""),
        _check(
            "logits-not-probabilities", not probabilities, f"[{logits.min():.3g}, {logits.max():.3g}]",
            "not all in [0, 1]",
            "return logits, not what a softmax or sigmoid made of them: CE on probabilities has vanishing gradients, "
            "and the attack would fail for that reason",
        ),
        _check(
            "range", low >= -1e-6 and high <= 1 + 1e-6, f"[{low:.3g}, {high:.3g}]", "[0, 1]",
            "a purifier returns images in [0, 1]: clamp in finish, inside the gradient",
        ),
        _check(
            "noise-sites", not repeated, repeated, "each asked for once",
            "two draws under one name are one draw: name each, e.g. noise.normal('reverse', k, like=x)",
        ),
        _check("eval-mode", not training, ", ".join(training[:3]), "no module training", "call defense.eval()"),
        _check(
            "repeatable", repeatable <= 1e-5 * scale, repeatable, 1e-5 * scale,
            "the same tape gave other logits: draw all randomness from the tape (noise.normal(site, like=x))",
        ),
        Check("stateless", "n/a", "", "", "it can't be copied")
        if history is None
        else _check(
            "stateless", history <= 1e-3 * scale, history, 1e-3 * scale,
            "an answer depends on what was asked before: keep nothing between calls, or the number is of one order of "
            "queries, and an attacker who asks in another finds another defense",
        ),
        Check("row-position", "n/a", "", "", "the noise of a foreign module depends on a row's place")
        if isinstance(defense.purifier, Foreign) and defense.stochastic
        else _check(
            "row-position", position <= 1e-4 * scale, position, 1e-4 * scale,
            "a row's result depends on its place or neighbours: look for batch statistics or batch means",
        ),
        _check(
            "stochastic-as-declared", defense.stochastic == (spread > 1e-6 * scale), spread,
            "> 0" if defense.stochastic else "0",
            f"declared stochastic = {defense.stochastic}, but two draws differ by {spread:.3g}",
        ),
    ]  # fmt: skip
    if view is None:
        return checks
    return checks + _gradient_checks(attacker or defense, view, x[:4], y[:4], Tape(seed, "preflight", ids[:4]))


def correct(classifier: nn.Module, x: Tensor, y: Tensor, rows: int) -> int:
    """How many images a classifier gets right, in calls of so many rows."""
    with torch.no_grad():
        return sum(int((classifier(a).argmax(1) == b).sum()) for a, b in zip(x.split(rows), y.split(rows), strict=True))


def accuracy_check(classifier: nn.Module, x: Tensor, y: Tensor, expected: float, rows: int) -> Check:
    """Whether a classifier reads what its publisher says: a wrong or damaged checkpoint does not.

    Fails if so few of the images would be right with probability below 0.001, were the stated accuracy true.

    Args:
        classifier: f, without its purifier.
        x, y: unperturbed images of the data set it was made for.
        expected: its stated clean accuracy, a fraction.
        rows: images per call.
    """
    right = correct(classifier, x, y, rows)
    least = int(binom.ppf(1e-3, len(x), expected))
    value, threshold = f"{right} of {len(x)} images", f"at least {least} at a stated accuracy of {expected:.1%}"
    if least == 0:
        return Check("clean-accuracy", "n/a", value, threshold, "too few images to tell")
    return _check(
        "clean-accuracy", right >= least, value, threshold,
        "the classifier doesn't read what its card or leaderboard says: another checkpoint, or another data set",
    )  # fmt: skip


def failures(checks: list[Check]) -> list[Check]:
    """The checks that forbid a run."""
    return [check for check in checks if check.status == "fail"]


def generic(x: Tensor, tape: Tape) -> Tensor:
    """Points a hundredth inside of [0, 1] and off the images, to look at gradients.

    On flat areas a median has as many gradients as equal neighbours, and a clamp at 0 none; an attack leaves them with
    its first step.
    """
    return 0.01 + 0.97 * x + 0.01 * tape.uniform("generic", like=x)


def _gradient_checks(defense: Defense, view: View, x: Tensor, y: Tensor, tape: Tape) -> list[Check]:
    """Zero gradients, and the view's gradient against central differences along two directions, in float64."""
    x = generic(x, tape)
    images = x.clone().requires_grad_()
    gradient = _gradient(ce(defense(images, tape, view), y), images)
    zero = float((gradient.flatten(1).norm(dim=1) == 0).float().mean())
    # places that no image reaches: a median passes over many pixels, but of each image others
    pixels = float((gradient == 0).all(0).float().mean())
    checks = [
        _check(
            "zero-gradients", zero < 1 and pixels <= 0.5, f"{zero:.0%} of images, {pixels:.0%} of pixels in all images",
            "not all images, at most half of the pixels",
            "no gradient reaches the input: rounding, argmax or no_grad inside the defense, or options by which it "
            "never looks at the image; a CE attack means nothing; attack with --view surrogate:gradient=NAME or bpda",
        )
    ]  # fmt: skip
    if not isinstance(view, Exact):
        return [*checks, Check("finite-differences", "n/a", "", "", "only the exact view claims to be the gradient")]

    def loss(module: nn.Module, z: Tensor) -> Tensor:
        return ce(module(z, tape, view), y)

    error = finite_difference_error(loss, defense, x.double())
    if not error <= 1e-2:  # a defense that computes in float32 inside is too coarse for the small step
        error = min(error, finite_difference_error(loss, defense, x.double(), h=1e-3))
    return [
        *checks,
        _check(
            "finite-differences", error <= 1e-2, error, 1e-2,
            "the gradient isn't that of the defense: look for detach, no_grad or a custom backward",
        ),
    ]  # fmt: skip


def finite_difference_error(
    loss: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, x: Tensor, h: float = 1e-5
) -> float:
    """The largest |⟨g, d⟩ - (L(x + h d) - L(x - h d)) / 2h| / ‖g‖ over images and two directions, in float64.

    The directions are the gradient's own and a fixed pseudo-random one, both of length 1.
    """
    module = copy.deepcopy(module).double()
    images = x.clone().requires_grad_()
    gradient = _gradient(loss(module, images), images)
    norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, 1, 1, 1)
    wave = torch.sin(torch.arange(x[0].numel(), dtype=x.dtype, device=x.device) ** 1.5).view(x[:1].shape)
    worst = 0.0
    for direction in (gradient / norm, (wave / wave.norm()).expand_as(x)):
        with torch.no_grad():
            slope = (loss(module, x + h * direction) - loss(module, x - h * direction)) / (2 * h)
        along = (gradient * direction).flatten(1).sum(1)
        worst = max(worst, float(((along - slope).abs() / norm.flatten()).nan_to_num(torch.inf).max()))
    return worst


def _gradient(losses: Tensor, images: Tensor) -> Tensor:
    """The gradient of the summed losses; zero where the graph is cut."""
    if not losses.requires_grad:
        return torch.zeros_like(images)
    (gradient,) = torch.autograd.grad(losses.sum(), images, allow_unused=True, materialize_grads=True)
    return gradient


def _history(defense: Defense, x: Tensor, tape: Tape) -> float | None:
    """How far logits near some images move once those images were asked; None of a defense that can't be copied.

    A copy is asked at once, the defense itself after images that neither has seen: mirrored ones.
    """
    try:
        other = copy.deepcopy(defense)
    except Exception:  # what a user's module holds may refuse
        return None
    seen = x.flip(-1)
    near = (seen + 0.02).clamp(0, 1)
    expected = other(near, tape)
    defense(seen, tape)
    return float((defense(near, tape) - expected).abs().max())


def _check(name: str, good: bool, value: float | str, threshold: float | str, advice: str) -> Check:
    return Check(name, "pass" if good else "fail", value, threshold, advice)
