"""What the attacker differentiates: the exact chain, whatever is stored or recomputed, over draws and in any batch."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch

from attacks import LOSSES, VIEWS, Calls, NotApplicable, Victim
from attacks._gradient import ce, dlr, margin
from attacks._recompute import footprint
from attacks._views import BPDA, Blind, Exact, stages
from benchmark.preflight import finite_difference_error
from purifiers import Defense, Purifier, Tape
from purifiers._diffusion import Kept
from purifiers.diffpure import DiffPure
from tests.conftest import CASES, classifier, images, smooth

every_purifier = pytest.mark.parametrize("case", CASES)
B = 3
X, Y = images(B), torch.arange(B)


def tape(n: int = B) -> Tape:
    return Tape(0, "attack", torch.arange(n))


def gradient(function, x: torch.Tensor = X) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@every_purifier
def test_the_gradient_is_the_plain_one_and_what_is_kept_changes_no_bit_of_it(case, make):
    defense = Defense(smooth(make(case)), classifier())
    plain = gradient(lambda x: ce(defense(x, tape()), Y))
    assert plain.isfinite().all() and (plain.flatten(1).norm(dim=1) > 0).all()
    kept = gradient(lambda x: ce(defense(x, tape(), Exact()), Y))
    assert torch.allclose(kept, plain, rtol=1e-12, atol=1e-14), "up to the order in which the stages' parts are summed"
    for keep in (0, 1, 2):
        view = Exact(keep=keep)
        assert torch.equal(gradient(lambda x, view=view: ce(defense(x, tape(), view), Y)), kept), keep
        assert torch.equal(defense(X, tape(), view), defense(X, tape()))


@every_purifier
def test_a_graph_that_is_retained_gives_its_gradient_twice(case, make):
    """As packages ask for it, which differentiate several logits of one pass."""
    defense = Defense(smooth(make(case)), classifier())
    for keep in (0, None):
        x = X.clone().requires_grad_()
        logits = defense(x, tape(), Exact(keep))
        first, second = (torch.autograd.grad(logits[:, 0].sum(), x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and first.any()


@every_purifier
def test_the_gradient_is_that_of_finite_differences(case, make):
    defense = Defense(smooth(make(case)), classifier())
    for keep in (0, None):

        def error(h, keep=keep):
            return finite_difference_error(lambda d, z: ce(d(z, tape(), Exact(keep)), Y), defense, X, h=h)

        # a long step may meet a kink, a short one drown in rounding where the gradient is small
        assert min(error(h) for h in (1e-3, 1e-5, 1e-6)) < 1e-5, keep


def test_finite_differences_see_a_gradient_that_was_cut():
    class Cut(torch.nn.Module):
        def forward(self, x):
            return (x.flatten(1) ** 2 + 0.2 * (x.flatten(1) ** 2).detach())[:, :10]

    assert finite_difference_error(lambda d, z: ce(d(z), Y), Cut(), X) > 0.1


def test_recomputing_stores_less(make):
    """Kept graphs hold every activation; recomputed stages only their inputs."""
    purifier = make(("diffpure", {}))

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # not the tensor itself, whose graph would hold on to it
            alive.add(self)

    alive: weakref.WeakSet = weakref.WeakSet()

    def stored(view) -> int:
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            purified = view(purifier, X.clone().requires_grad_(), tape())
        assert purified.requires_grad
        return sum(held.tensor.numel() for held in alive)

    assert stored(Exact(keep=0)) < 0.05 * stored(Exact(keep=None))
    assert stored(Exact(keep=0)) < stored(Exact(keep=2)) < stored(Exact(keep=None))


@every_purifier
def test_affordable_stages_follow_the_budget(case, make):
    purifier = make(case).requires_grad_(False)

    found = footprint(Defense(purifier, torch.nn.Flatten()), X[:1], tape(1), Exact(), staged=True)
    assert len(found.graphs) == stages(purifier) and found.inputs > 0 and found.rest == 0

    def keep(budget: int) -> int | None:
        return found.keep(32, budget)

    assert keep(1 << 40) is None and found.rows(128, 1 << 40) == 128
    if keep(0) is None:  # nothing is stored at all
        assert case[0] in ("identity", "bitdepth")
        return
    budgets = [keep(1 << bits) for bits in range(8, 40, 2)]
    measured = [k for k in budgets if k is not None]
    assert keep(0) == 0 and measured == sorted(measured) and measured[-1] < stages(purifier)
    assert budgets[len(measured) :] == [None] * (len(budgets) - len(measured))
    rows = [found.rows(128, 1 << bits) for bits in range(8, 40, 2)]
    assert rows[0] == 0 and rows[-1] == 128 and rows == sorted(rows) and not any(r % 32 for r in rows)


def test_measuring_memory_leaves_none_behind():
    """A chain's graphs are freed stage by stage: of a large network all of them together would fit nowhere."""
    held: list[weakref.ref] = []

    class Watched(Purifier):
        stochastic, steps = False, 4

        def start(self, x, noise):
            return x, None

        def step(self, k, state, context, noise):
            assert sum(ref() is not None for ref in held) <= 1, "of stages before the last"
            grown = (state / 2).exp()  # whose node saves its own output
            held.append(weakref.ref(grown))
            return grown.sigmoid()

        def finish(self, state, context):
            return state

    footprint(Defense(Watched(), torch.nn.Flatten()), X[:1], tape(1), Exact(), staged=True)
    assert len(held) == 4 and all(ref() is None for ref in held)


@every_purifier
def test_bpda_is_exact_forward_and_identity_backward(case, make):
    purifier, f = make(case), classifier()
    purified = purifier(X, tape()).detach()
    # one that differentiates inside computes that otherwise where a graph is kept, in its last digits
    assert torch.allclose(BPDA()(purifier, X, tape()), purified, rtol=0, atol=1e-12)
    defense = Defense(purifier, f)
    expected = gradient(lambda z: ce(f(z), Y), purified)
    assert torch.allclose(gradient(lambda x: ce(defense(x, tape(), BPDA()), Y)), expected, rtol=0, atol=1e-12)


@every_purifier
def test_blind_sees_the_classifier_alone(case, make):
    f = classifier()
    defense = Defense(make(case), f)
    assert torch.equal(defense(X, tape(), Blind()), f(X))
    assert torch.equal(gradient(lambda x: ce(defense(x, tape(), Blind()), Y)), gradient(lambda x: ce(f(x), Y)))


PLAIN = ("exact", "bpda", "blind")
"""Views that ask nothing of a purifier; the others are tested in test_views."""


@pytest.mark.parametrize("name", PLAIN)
def test_every_view_by_name_gives_a_gradient(name, make):
    defense = Defense(make(("diffpure", {})), classifier())
    for keep in (None, 1):
        g = gradient(lambda x, keep=keep: ce(defense(x, tape(), VIEWS[name](keep=keep)), Y))
        assert g.isfinite().all() and g.abs().sum() > 0


@pytest.mark.parametrize("name", VIEWS)
def test_a_foreign_module_can_stand_for_a_purifier_where_the_view_asks_nothing_of_it(name):
    f = classifier()
    defense = Defense(torch.nn.Identity(), f)
    view = VIEWS[name](**({"gradient": "ste"} if name == "surrogate" else {}))
    if name not in PLAIN:
        with pytest.raises(NotApplicable):
            defense(X.clone().requires_grad_(), tape(), view)
        return
    assert torch.equal(gradient(lambda x: ce(defense(x, tape(), view), Y)), gradient(lambda x: ce(f(x), Y)))


@every_purifier
@pytest.mark.parametrize("eot", [1, 3])
def test_eot_is_the_mean_over_separate_draws(case, eot, make):
    defense = Defense(smooth(make(case)), classifier())
    victim = Victim(defense, Exact(), tape(), Calls(32), stochastic=True)
    found = victim.evaluate(X, Y, ce, "it", 4, eot=eot)
    losses, corrects, gradients = [], [], []
    for draw in range(eot):
        one = tape().fold("it", 4).draws(eot)[draw::eot]
        logits = defense(X, one)
        losses.append(ce(logits, Y))
        corrects.append((logits.argmax(1) == Y).double())
        gradients.append(gradient(lambda x, one=one: ce(defense(x, one), Y)))
    for got, parts in zip(found, (losses, corrects, gradients), strict=True):
        assert torch.allclose(got, torch.stack(parts).mean(0), rtol=0, atol=1e-12)
    assert (victim.forwards, victim.backwards) == (eot, eot)


@every_purifier
def test_neither_rows_nor_neighbours_change_a_gradient(case, make):
    """Calls of 32 or 64 rows, padded or cut, whole batch or one image: the same numbers for an image."""
    defense = Defense(smooth(make(case)), classifier())

    def evaluate(rows: int, images_of: slice):
        index = torch.arange(40)[images_of]
        victim = Victim(defense, Exact(), Tape(0, "attack", index), Calls(rows), stochastic=True)
        return victim.evaluate(images(40)[images_of], index % 10, ce, 0, eot=2)

    whole = evaluate(32, slice(0, 40))
    for rows, part in ((64, slice(0, 40)), (32, slice(0, 7)), (64, slice(33, 40)), (32, slice(39, 40))):
        for got, expected in zip(evaluate(rows, part), whole, strict=True):
            assert torch.allclose(got, expected[part], rtol=0, atol=1e-12)


def test_the_attack_leaves_the_defense_as_it_was(make):
    defense = Defense(make(("diffpure", {})), classifier())
    before = {k: v.clone() for k, v in defense.state_dict().items()}
    Victim(defense, Exact(0), tape(), Calls(32), stochastic=True).evaluate(X, Y, ce, 0, eot=2)
    assert all(torch.equal(v, before[k]) for k, v in defense.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in defense.parameters())
    assert not any(module.training for module in defense.modules())


LOGITS = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 5.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1])


def test_losses_by_hand():
    assert ce(LOGITS, LABELS).tolist() == pytest.approx([0.16984602, 3.06588400], abs=1e-7)
    assert margin(LOGITS, LABELS).tolist() == [-2.0, 3.0]
    assert dlr(LOGITS, LABELS).tolist() == pytest.approx([-2 / 3, 3 / 4])
    assert torch.allclose(dlr(7 * LOGITS + 2, LABELS), dlr(LOGITS, LABELS))
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        dlr(LOGITS[:, :2], LABELS)


@pytest.mark.parametrize("name", ["dlr", "margin"])
def test_margin_losses_are_positive_where_wrong(name):
    logits = images(200, (1, 1, 10))[:, 0, 0]
    labels = torch.arange(200) % 10
    assert torch.equal(LOSSES[name](logits, labels) > 0, logits.argmax(1) != labels)


def test_a_row_that_is_not_finite_counts_as_wrong():
    class Broken(torch.nn.Module):
        def forward(self, x):
            out = x.flatten(1)[:, :10].clone()
            return torch.where(x.flatten(1)[:, :1] > 0.5, out / 0, out)

    x = X.clone()
    x[:, 0, 0, 0] = torch.tensor([0.9, 0.1, 0.1])
    labels = x.flatten(1)[:, :10].argmax(1)
    victim = Victim(Defense(torch.nn.Identity(), Broken()), Exact(), tape(), Calls(32), stochastic=False)
    assert victim.evaluate(x, labels, ce, 0, eot=1).correct.tolist() == [0.0, 1.0, 1.0]


def test_images_are_resized_to_the_nets_resolution_and_back_inside_the_gradient(default_float64):
    """As ImageNet at 224 before a net of 256: here 7 before a net of 8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DiffPure.parts((3, 8, 8))["unet"].double()
    purifier = DiffPure(net, t_star=0.2, steps=2, rule="eta").eval()
    bilinear = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=False)
    x, noise = images(2, (3, 7, 7)), tape(2).fold("round", 0)
    alpha_bar = purifier.denoiser.alpha_bar(0.2)
    z = alpha_bar**0.5 * bilinear(2 * x - 1, (8, 8))
    z = z + (1 - alpha_bar) ** 0.5 * noise.normal("diffuse", like=z)
    for k in range(2):
        z = purifier.step(k, z, Kept(x.shape[-2:]), noise)
    assert torch.allclose(purifier(x, tape(2)), ((bilinear(z, (7, 7)) + 1) / 2).clamp(0, 1), rtol=0, atol=1e-12)

    defense = Defense(purifier, classifier((3, 7, 7)))
    error = finite_difference_error(lambda d, v: ce(d(v, tape(2), Exact(keep=1)), torch.arange(2)), defense, x)
    assert error < 1e-6


class Slippery(torch.nn.Module):
    """Logits ±sum(x), whose gradient isn't finite in one pixel of images darker than a half, and zero above 0.9."""

    def forward(self, x):
        total = x.flatten(1).sum(1)
        dark, bright = x.flatten(1).mean(1) < 0.5, x.flatten(1).mean(1) > 0.9
        pixel = x[dark][:, 0, 0, 0]
        total = total.index_add(0, dark.nonzero().flatten(), (pixel - pixel.detach()).sqrt())  # 0, but infinitely steep
        total = torch.where(bright, total.detach(), total)
        return torch.stack((total, -total), 1)


def test_gradients_that_lead_nowhere_are_counted_and_leave_the_others_to_lead():
    x = torch.tensor([0.3, 0.7, 0.95]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    y = torch.zeros(3, dtype=torch.long)
    victim = Victim(
        Defense(torch.nn.Identity(), Slippery()), Exact(), Tape(0, "attack", torch.arange(3)), Calls(32),
        stochastic=False,
    )  # fmt: skip
    for k in range(2):
        gradient = victim.evaluate(x, y, margin, k, eot=2).gradient
    assert victim.blank.tolist() == [4, 0, 4] and victim.backwards == 4
    assert gradient.isfinite().all() and not gradient[2].any() and gradient[1].all()
    assert gradient[0, 0].flatten().tolist()[1:] == gradient[1, 0].flatten().tolist()[1:], "the other pixels still lead"
    victim.evaluate(x, y, margin, 2, eot=2, gradient=False)
    assert victim.blank.tolist() == [4, 0, 4]
