"""What every component promises, for every file of the registry: a newcomer is tested by being there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks._gradient import ce
from attacks._views import Exact, Surrogate
from benchmark import constructors, registry
from benchmark.preflight import Recording, RepeatedSite
from purifiers import Batch, Defense, Tape
from tests.conftest import CASES, SHAPE, classifier, images

every_purifier = pytest.mark.parametrize("case", CASES)
B = 6


def tape(ids=range(B), role: str = "verdict") -> Tape:
    return Tape(0, role, torch.tensor(list(ids)))


def generators() -> list[list[int]]:
    """The state of the global generators (Python's own is moved by the shape checker)."""
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]


# Purifiers


@every_purifier
@pytest.mark.parametrize("shape", [SHAPE, (3, 8, 8), (1, 28, 28)], ids=str)
def test_shape_dtype_and_range(case, shape, make):
    purifier = make(case, shape)
    for dtype in (torch.float32, torch.float64):
        x = images(2, shape, dtype)
        x[0] = x[0].round()
        out = purifier.to(dtype)(x, tape(range(2)))
        assert out.shape == x.shape and out.dtype == dtype
        assert out.isfinite().all() and 0 <= out.min() and out.max() <= 1


@every_purifier
def test_the_same_under_one_tape_and_other_under_another_as_declared(case, make):
    purifier, x = make(case), images(B)
    once = purifier(x, tape())
    assert torch.equal(once, purifier(x, tape()))
    others = (tape(role="select"), tape(range(100, 100 + B)), tape().fold("more"), None)
    for other in others:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # where None draws from, which few draws may leave as it was
            differs = (purifier(x, other) != once).flatten(1).any(1)
        assert differs.all() if purifier.stochastic else not differs.any()


@every_purifier
def test_two_draws_of_one_image_differ_as_declared(case, make):
    purifier = make(case)
    a, b = purifier(images(1).repeat(2, 1, 1, 1), tape([3]).draws(2))
    assert torch.equal(a, b) != purifier.stochastic


@every_purifier
def test_an_image_is_purified_alike_in_any_batch_and_position(case, make):
    purifier, x = make(case), images(B)
    whole = purifier(x, tape())
    for rows in ([2], [4, 1], [5, 3, 3, 0], list(reversed(range(B)))):
        part = purifier(x[rows], tape(rows))
        assert torch.allclose(part, whole[rows], rtol=0, atol=1e-12)


@every_purifier
def test_global_generators_are_neither_moved_nor_consulted(case, make):
    purifier, x = make(case), images(2)
    before = generators()
    out = purifier(x, tape(range(2)))
    assert generators() == before
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        assert torch.equal(purifier(x, tape(range(2))), out)


@every_purifier
def test_no_site_is_asked_for_twice(case, make):
    purifier, asked = make(case), set()
    with torch.no_grad():
        purifier(images(B), Recording(tape(), asked))
    assert bool(asked) == purifier.stochastic


def test_the_recording_tape_notices():
    recording = Recording(tape(), set())
    recording.fold("a").normal("b", like=images(B))
    recording.fold("c").normal("b", like=images(B))
    with pytest.raises(RepeatedSite, match="asked for twice"):
        recording.draws(2)[torch.arange(B)].fold("a").normal("b", like=images(B))


@every_purifier
def test_the_gradient_is_finite_and_not_zero(case, make):
    x = images(B).requires_grad_()
    purifier = make(case)
    for through in (["exact"] if purifier.differentiable else []) + list(purifier.surrogates):
        view = Exact() if through == "exact" else Surrogate(gradient=through)
        (gradient,) = torch.autograd.grad(view(purifier, x, tape()).square().sum(), x)
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).norm(dim=1) > 0).all(), through


@every_purifier
def test_a_purifier_is_differentiable_as_declared(case, make):
    """One that isn't is constant between jumps, and offers another gradient."""
    purifier, x = make(case), images(B).requires_grad_()
    (gradient,) = torch.autograd.grad(purifier(x, tape()).square().sum(), x, allow_unused=True, materialize_grads=True)
    assert gradient.any() == purifier.differentiable
    assert purifier.differentiable or purifier.surrogates


@every_purifier
def test_rounds_repeat_the_whole_with_noise_of_their_own(case, make):
    name, options = case
    once, twice = make((name, options | {"rounds": 1})), make((name, options | {"rounds": 2}))
    assert twice.nfe == 2 * once.nfe and twice.stochastic == once.stochastic

    def alone(x, r):
        noise = tape().fold("round", r)
        state, context = once.start(x, noise)
        for k in range(once.steps):
            state = once.step(k, state, context, noise)
        return once.finish(state, context)

    x = images(B)
    assert torch.equal(once(x, tape()), alone(x, 0))
    assert torch.equal(twice(x, tape()), alone(alone(x, 0), 1))
    if once.stochastic:
        assert not torch.equal(alone(x, 0), alone(x, 1))


@every_purifier
def test_the_dial_is_an_option_and_rounds_are_checked(case, make):
    purifier = make(case)
    if purifier.dial is not None:
        assert purifier.dial in constructors.options(type(purifier))
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        make((case[0], case[1] | {"rounds": 0}))


@every_purifier
def test_objectives_reach_every_parameter_of_the_parts_they_name(case, make):
    purifier = make(case).train()
    parts = {
        k: v for k, v in purifier.named_children() if k in type(purifier).parts(SHAPE, case[1].get("parts", "tiny"))
    }
    losses = purifier.objectives(Batch(images(B), torch.arange(B)), tape())
    moved = {part for key in losses for part in key.split("+")}
    assert moved | set(purifier.given) == set(parts) and not moved & set(purifier.given)
    for key, loss in losses.items():
        assert loss.shape == () and loss.isfinite()
        purifier.zero_grad()
        loss.backward(retain_graph=True)
        for part in key.split("+"):
            for name, parameter in parts[part].named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{part}.{name}"
            assert any(p.grad.abs().sum() > 0 for p in parts[part].parameters())
    again = purifier.objectives(Batch(images(B), torch.arange(B)), tape())
    assert all(torch.equal(again[key], losses[key]) for key in losses)


# Classifiers and defenses


@pytest.mark.parametrize("name", registry.names("classifiers"))
@pytest.mark.parametrize("shape", [SHAPE, (3, 32, 32)], ids=str)
def test_classifiers(name, shape):
    component = registry.load("classifiers", name)
    f = component(*component.parts(shape, "tiny").values()).double().eval()
    x = images(B, shape).requires_grad_()
    logits = f(x)
    assert logits.shape == (B, 10) and logits.isfinite().all()
    assert torch.allclose(f(x[[4, 1]]), logits[[4, 1]], rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(ce(logits, torch.arange(B)).sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    for key, loss in f.train().objectives(Batch(x.detach(), torch.arange(B)), None).items():
        loss.backward()
        assert all(p.grad is not None for part in key.split("+") for p in getattr(f, part).parameters())


class Broken(torch.nn.Module):
    """Finite logits for dark images, none for bright ones."""

    def forward(self, x):
        z = x.flatten(1)[:, :3].double()
        return torch.where(x.mean((1, 2, 3), keepdim=False)[:, None] > 0.5, torch.nan, z)


def test_a_defense_is_frozen_and_in_eval_mode(make):
    defense = Defense(make(("diffpure", {})).train(), classifier().train())
    assert not any(m.training for m in defense.modules())
    assert not any(p.requires_grad for p in defense.parameters())


@pytest.mark.parametrize("combine", Defense.COMBINE)
def test_copies_are_combined_draws(combine, make):
    purifier, f, x = make(("diffpure", {})), classifier(), images(B)
    defense = Defense(purifier, f, copies=3, combine=combine)
    rows = f(purifier(x.repeat_interleave(3, 0), tape().fold("copies", 3).draws(3))).unflatten(0, (B, 3))
    votes = torch.nn.functional.one_hot(rows.argmax(-1), 10).double().mean(1)
    expected = {
        "logits": rows.mean(1),
        "probabilities": rows.softmax(-1).mean(1).log(),
        "vote": (votes + rows.softmax(-1).mean(1) / 6).log(),
    }[combine]
    assert torch.allclose(defense(x, tape()), expected, rtol=0, atol=1e-12)
    assert torch.allclose(defense.bind(tape())(x), defense(x, tape()), rtol=0, atol=0)
    assert defense.nfe == 3 * purifier.nfe


@pytest.mark.parametrize("combine", Defense.COMBINE)
def test_a_copy_that_is_not_finite_leaves_nothing_of_its_image(combine):
    defense = Defense(torch.nn.Identity(), Broken(), copies=2, combine=combine)
    logits = defense(torch.stack([torch.full(SHAPE, level) for level in (0.1, 0.9)]))
    assert logits[0].isfinite().all() and logits[1].isnan().all()


@pytest.mark.parametrize("combine", Defense.COMBINE)
def test_a_copy_without_finite_logits_leaves_nothing_of_the_row(combine):
    class Broken(torch.nn.Module):
        def forward(self, x):
            logits = torch.tensor([5.0, 1.0, 0.0]).repeat(len(x), 1)
            logits[1, 2] = -torch.inf
            return logits

    logits = Defense(torch.nn.Identity(), Broken(), copies=2, combine=combine)(torch.zeros(2, 1, 4, 4))
    assert not logits[0].isfinite().all() and logits[1].isfinite().all()


def test_a_tied_vote_goes_to_the_class_that_is_likelier():
    class Split(torch.nn.Module):
        def forward(self, x):  # of two copies one is nearly sure of class 2, the other just prefers class 0
            return torch.tensor([[1.0, 0.0, 0.9], [0.0, 0.0, 8.0]]).repeat(len(x) // 2, 1)

    defense = Defense(torch.nn.Identity(), Split(), copies=2, combine="vote")
    assert defense(torch.rand(3, *SHAPE)).argmax(1).tolist() == [2, 2, 2]


def test_defense_options_out_of_range():
    for options, message in (({"copies": 0}, "copies must be at least 1"), ({"combine": "max"}, "'max'")):
        with pytest.raises(ValueError, match=message):
            Defense(torch.nn.Identity(), classifier(), **options)
