"""Checks of a defense before the first example: a run that would measure a fault doesn't start."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from scipy.stats import binom
from torch import Tensor, nn

from attacks import Calls, ThreatModel
from attacks._calls import Answer, Request, slopes_of
from attacks._copies import copied
from attacks._gradient import ce, margin
from attacks._views import Exact, View
from benchmark import stats
from benchmark.checks import Check
from benchmark.foreign import Foreign
from purifiers import Defense, Tape
from purifiers._base import call

PAIRS, NODES = 4, 16
"""Pairs of images between which gradients are integrated, and nodes of each integral."""
STARTS = 4
"""From how many random starts a gradient may show that it climbs."""
LED = 0.1
"""The share of its own length by which a gradient that is there leads uphill, at least."""
FEWEST = 6
"""Images of which a sign-flip test can say anything at 5 %."""


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
            return [Check.of(
                "shape", False, f"{tuple(purified.shape)} {purified.dtype}", f"{tuple(images.shape)} {images.dtype}",
                "a purifier returns images of the shape and dtype that it was given",
            )]  # fmt: skip
        logits = defense(images, tape)
        again = defense(images, tape)
        draws = not torch.equal(defense.classifier(purified), defense.classifier(purified))
        other = defense(images, tape.fold("other"))
        order = torch.arange(rows).roll(1)
        neighbours = images[order]
        neighbours[rows // 2 :] = 1 - neighbours[rows // 2 :]
        moved = defense(neighbours, tape[order])[: rows // 2]
        history = _history(defense, images, tape)
    if history is None:
        return [Check.of(
            "copyable", False, "copy.deepcopy refuses the defense", "a copy",
            "a copy's answers tell whether the defense remembers, and its own in float64 whether a gradient is right: "
            "hold no lock, open file, generator or graph, or define __deepcopy__",
        )]  # fmt: skip
    if not logits.isfinite().all():
        return [Check.of("finite-logits", False, "", "all finite", "look for overflow in the defense")]
    probabilities = bool((logits >= 0).all() and (logits <= 1).all())  # of a softmax, scaled or not, or of sigmoids
    spread = max(float((logits - other).abs().max()), 0.0)
    repeatable = float((logits - again).abs().max())
    position = float((logits[order][: rows // 2] - moved).abs().max())
    scale = float(logits.abs().max().clamp_min(1))
    training = [name or "defense" for name, module in defense.named_modules() if module.training]
    low, high = float(purified.min()), float(purified.max())
    checks = [
        Check.of("finite-logits", True, "", "all finite", ""),
        Check.of(
            "logits-not-probabilities", not probabilities, f"[{logits.min():.3g}, {logits.max():.3g}]",
            "not all in [0, 1]",
            "return logits, not what a softmax or sigmoid made of them: CE on probabilities has vanishing gradients, "
            "and the attack would fail for that reason",
        ),
        Check.of(
            "range", low >= -1e-6 and high <= 1 + 1e-6, f"[{low:.3g}, {high:.3g}]", "[0, 1]",
            "a purifier returns images in [0, 1]: clamp in finish, inside the gradient",
        ),
        Check.of(
            "noise-sites", not repeated, repeated, "each asked for once",
            "two draws under one name are one draw: name each, e.g. noise.normal('reverse', k, like=x)",
        ),
        Check.of("eval-mode", not training, ", ".join(training[:3]), "no module training", "call defense.eval()"),
        Check.of(
            "repeatable", repeatable <= 1e-5 * scale, repeatable, 1e-5 * scale,
            "the classifier draws at random itself, so that no gradient can be recomputed: take its noise out and name "
            "it as a purifier, e.g. --purifier noise:sigma=0.1 --copies 10 --combine vote"
            if draws
            else "the same tape gave other logits: draw all randomness from the tape (noise.normal(site, like=x))",
        ),
        Check.of(
            "stateless", history <= 1e-3 * scale, history, 1e-3 * scale,
            "an answer depends on what was asked before: keep no state between calls, or the number holds for one "
            "order of queries alone",
        ),
        Check("row-position", "n/a", "", "", "the noise of a foreign module depends on a row's place")
        if isinstance(defense.purifier, Foreign) and defense.stochastic
        else Check.of(
            "row-position", position <= 1e-4 * scale, position, 1e-4 * scale,
            "a row's result depends on its place or neighbours: look for batch statistics or batch means",
        ),
        Check.of(
            "stochastic-as-declared", defense.stochastic == (spread > 1e-6 * scale), spread,
            "> 0" if defense.stochastic else "0",
            f"declared stochastic = {defense.stochastic}, but two draws differ by {spread:.3g}",
        ),
    ]  # fmt: skip
    if view is None:
        return checks
    return checks + _gradient_checks(attacker or defense, view, x[:4], y[:4], Tape(seed, "preflight", ids[:4]))


def integral_check(defense: Defense, view: View, x: Tensor, tape: Tape, *, rows: int) -> Check:
    """Whether the gradient accounts for how the defense changes between images, by the fundamental theorem of calculus.

    With p the probability of what the defense says of a: p(b) - p(a) = ∫ ⟨∇p(a + t (b - a)), b - a⟩ dt, t from 0 to 1.
    Where a hard decision is made aside (argmax, a nearest prototype, a threshold) and the gradient only sees what
    passes by it, a derivative is right almost everywhere and its integral is not: an attack climbs the wrong hill.
    The value is the largest share of a change that the integral gives, over ``PAIRS`` pairs of ``NODES`` nodes each;
    so few nodes miss or double a steep change now and then, but not all.

    Args:
        defense: what the attacker differentiates. Votes are hard by design: their probabilities are looked at.
        view: how.
        x: a few images.
        tape: their noise, the same all the way from a to b.
        rows: at most so many rows a call.
    """
    name, threshold = "gradient-integral", 0.5
    if not isinstance(view, Exact):
        return Check(name, "n/a", "", threshold, "only the exact view claims to be the gradient")
    if defense.combine == "vote":
        defense = copy.copy(defense)
        defense.combine = "probabilities"
    with torch.no_grad():
        p = defense(x, tape).softmax(1)
    said = p.argmax(1)
    pairs = [(a, b) for a in range(len(x)) for b in _others(said, a) if p[a, said[a]] - p[b, said[a]] > 0.1][:PAIRS]
    if not pairs:
        return Check(name, "n/a", "", threshold, "the defense says the same of all images that were looked at")
    a, b = torch.tensor(pairs, device=x.device).repeat_interleave(NODES, 0).unbind(1)
    t = (torch.arange(NODES, device=x.device, dtype=x.dtype) + 0.5).repeat(len(pairs)) / NODES
    slopes = []
    for part in torch.arange(len(a), device=x.device).split(rows):
        along, start = x[b[part]] - x[a[part]], x[a[part]]
        z = (start + t[part].view(-1, 1, 1, 1) * along).requires_grad_()
        held = defense(z, tape[a[part]], view).softmax(1).gather(1, said[a[part], None])
        slopes.append((slopes_of(held, z) * along).flatten(1).sum(1))
    integral = torch.cat(slopes).view(len(pairs), NODES).mean(1)
    change = torch.stack([p[b, said[a]] - p[a, said[a]] for a, b in pairs])
    share = float((integral / change).max())
    return Check.of(
        name, share >= threshold, share, threshold,
        "the gradient accounts for little of how the defense changes from image to image: something hard decides "
        "beside it (argmax, rounding, sorting, a threshold); attack with square and with --view blind, too, and name "
        "a surrogate for what is hard", bad="warn",
    )  # fmt: skip


def climb_check(
    defense: Defense, view: View, x: Tensor, y: Tensor, tape: Tape, threat: ThreatModel, calls: Calls
) -> Check:
    """Whether a step along the attacker's gradient raises a loss, as an attack takes it: in calls of its size.

    From a random start s, under one draw per image, L(s + step(∇L)) - L(s + step(n)) with n random, steps of a tenth of
    the radius, and L the margin, which doesn't saturate as cross-entropy does. A gradient that a surrogate made up, or
    that is another in calls of the attack's size, raises it no more than chance does. Images of which it stands still
    in both directions say nothing. What one start doesn't show is looked for from up to ``STARTS``, averaged.

    Args:
        defense: what the attacker differentiates.
        view: how.
        x, y: images and their labels.
        tape: their noise.
        threat: the ball.
        calls: as the attack makes them.
    """
    name, gains = "gradient-climbs", []

    def losses(code: Tensor, noise: Tape, gradient: bool = False) -> Answer:
        return calls.ask(Request(defense, view, threat.render(code, x), noise, 1, margin, (y,), gradient))

    for start in range(STARTS):
        noise = tape.fold(f"climb {start}")
        code = threat.random(x, noise.fold("start"))
        found = losses(code, noise, gradient=True)
        uphill = threat.pullback(found.gradients.nan_to_num(0, 0, 0), code, x)
        directions = (uphill, noise.normal("anywhere", like=code))
        ends = [threat.project(code + threat.step(d, 0.1 * threat.bound), x) for d in directions]
        gains.append(torch.stack([(losses(end, noise).losses - found.losses).nan_to_num() for end in ends]))
        up, other = torch.stack(gains).double().mean(0).cpu().numpy()
        up, other = up[up != other], other[up != other]
        if len(up) < FEWEST:
            return Check(name, "n/a", "", "", f"it moves of fewer than {FEWEST} images, which tells nothing")
        if (p := stats.compare(up, other, one_sided=True).p) < 0.05:
            break
    told = f"margin {up.mean():+.2g} along it, {other.mean():+.2g} at random, p = {p:.2g}"
    return Check.of(
        name, p < 0.05, told, "more than at random",
        "a step along the gradient isn't seen to raise the loss more than a random one, so the attack may be weaker "
        "than its name: attack with square, too, and through another --view",
        bad="warn",
    )  # fmt: skip


def declared_check(defense: Defense, x: Tensor, y: Tensor, tape: Tape) -> Check:
    """Whether a purifier that says it has no gradient has none: else its author chose the attacker's gradient.

    One that rounds stands still almost everywhere: in float64, L(x + h d) - L(x - h d) is 0 along its own gradient's
    direction d, whatever that is. One that climbs by more than ``LED`` of what the gradient says, of half of the
    images, has one, be it scaled or turned.
    """
    name = "rounds-as-declared"
    if getattr(defense.purifier, "differentiable", True):
        return Check(name, "n/a", "", "", "it says that it has a gradient")
    try:
        _, found = _slopes(_loss_of(Exact(keep=1), y, tape), defense, generic(x, tape).double(), h=1e-5)
    except Exception:  # what leaves torch has no gradient
        return Check(name, "pass", "no gradient", "none, or one that leads nowhere", "")
    led = float(((found[0] > LED) & found[0].isfinite()).double().mean())
    return Check.of(
        name, led < 0.5, f"leads uphill at {led:.0%} of images", "none, or one that leads nowhere",
        "it says differentiable = False, but its gradient is there, and leads uphill: leave that out, and the attack "
        "takes the exact one",
    )  # fmt: skip


def _others(said: Tensor, a: int) -> list[int]:
    """The first image after image a, around, of which something else is said; none if there is none."""
    n = len(said)
    return [b for k in range(1, n) if said[b := (a + k) % n] != said[a]][:1]


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
    return Check.of(
        "clean-accuracy", right >= least, value, threshold,
        "the classifier doesn't read what its card or leaderboard says: another checkpoint, or another data set",
    )  # fmt: skip


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
    gradient = slopes_of(ce(defense(images, tape, view), y), images)
    zero = float((gradient.flatten(1).norm(dim=1) == 0).float().mean())
    # places that no image reaches: a median passes over many pixels, but of each image others
    pixels = float((gradient == 0).all(0).float().mean())
    checks = [
        Check.of(
            "zero-gradients", zero < 1 and pixels <= 0.5, f"{zero:.0%} of images, {pixels:.0%} of pixels in all images",
            "not all images, at most half of the pixels",
            "no gradient reaches the input: rounding, argmax or no_grad inside the defense, or options by which it "
            "never looks at the image; a CE attack means nothing; attack with --view surrogate:gradient=NAME or bpda",
        )
    ]  # fmt: skip
    if not isinstance(view, Exact):
        return [*checks, Check("finite-differences", "n/a", "", "", "only the exact view claims to be the gradient")]

    if zero == 1:
        return [*checks, Check("finite-differences", "n/a", "", "", "there is no gradient to hold against them")]
    loss = _loss_of(view, y, tape)
    error = finite_difference_error(loss, defense, x.double())
    # a defense that computes in float32 inside is too coarse for that step, one that bends sharply too fine
    for h in (1e-3, 1e-7) if not error <= 1e-2 else ():
        error = min(error, finite_difference_error(loss, defense, x.double(), h=h))
    return [
        *checks,
        Check.of(
            "finite-differences", error <= 1e-2, error, 1e-2,
            "the gradient isn't that of the defense: look for detach, no_grad or a custom backward",
        ),
    ]  # fmt: skip


def _loss_of(view: View, y: Tensor, tape: Tape) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda module, z: ce(module(z, tape, view), y)


def finite_difference_error(
    loss: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, x: Tensor, h: float = 1e-5
) -> float:
    """The largest |⟨g, d⟩ - (L(x + h d) - L(x - h d)) / 2h| / ‖g‖ over images and two directions, in float64.

    The directions are the gradient's own and a fixed pseudo-random one, both of length 1.
    """
    said, found = _slopes(loss, module, x, h)
    return float((said - found).abs().nan_to_num(torch.inf, torch.inf).max())


def _slopes(
    loss: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, x: Tensor, h: float
) -> tuple[Tensor, Tensor]:
    """The slopes along two directions that the gradient says, and those by central differences, over ‖g‖: (2, N) each.

    Where the gradient is zero they are 0, and infinite if the loss moves.
    """
    module = copied(module).double()
    images = x.clone().requires_grad_()
    gradient = slopes_of(loss(module, images), images)
    norm = gradient.flatten(1).norm(dim=1)
    wave = torch.sin(torch.arange(x[0].numel(), dtype=x.dtype, device=x.device) ** 1.5).view(x[:1].shape)
    own = gradient / norm.view(-1, 1, 1, 1).clamp_min(1e-300)
    directions = (own, (wave / wave.norm()).expand_as(x))
    with torch.no_grad():
        found = torch.stack([(loss(module, x + h * d) - loss(module, x - h * d)) / (2 * h) for d in directions])
    said = torch.stack([(gradient * d).flatten(1).sum(1) for d in directions])
    return tuple(torch.where(slope == 0, 0, slope / norm) for slope in (said, found))  # type: ignore[return-value]


def _history(defense: Defense, x: Tensor, tape: Tape) -> float | None:
    """How far logits near some images move once those images were asked; None of a defense that can't be copied.

    A copy is asked at once, the defense itself after images that neither has seen: mirrored ones.
    """
    try:
        other = copied(defense)
    except Exception:  # what a user's module holds may refuse
        return None
    seen = x.flip(-1)
    near = (seen + 0.02).clamp(0, 1)
    expected = other(near, tape)
    defense(seen, tape)
    return float((defense(near, tape) - expected).abs().max())
