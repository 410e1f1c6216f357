"""Views whose gradient isn't the chain's own: torchsde's adjoint, a purifier's stand-ins; and the view that watches."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from attacks import VIEWS, NotApplicable
from attacks._adjoint import Adjoint
from attacks._views import BPDA, Blind, Exact, Surrogate, Watched
from benchmark import cli
from purifiers import Defense, Tape
from purifiers.diffpure import DiffPure
from tests.conftest import CASES, classifier, images, smooth

B = 3
X = images(B)
SDE = ("diffpure", {"rule": "sde"})
every_purifier = pytest.mark.parametrize("case", CASES)


def tape(ids=range(B)) -> Tape:
    return Tape(0, "attack", torch.tensor([*ids]))


def directions(x: torch.Tensor) -> torch.Tensor:
    """What an output is multiplied with before it is summed: one fixed weight per element, the same in every batch."""
    return torch.sin(torch.arange(x[0].numel(), dtype=x.dtype) ** 1.5).view(x[:1].shape)


def gradient(function, x: torch.Tensor = X) -> torch.Tensor:
    x = x.clone().requires_grad_()
    out = function(x)
    return torch.autograd.grad((directions(out) * out).sum(), x)[0]


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return cosine_similarity(a.flatten(1), b.flatten(1))


# The equation that a purifier integrates


@every_purifier
def test_a_purifier_that_states_an_sde_steps_by_its_euler_maruyama_rule(case, make):
    purifier = make(case)
    sde = purifier.sde()
    if case[0] == "diffpure":
        one_chain = not {"spread", "t_star"} & set(case[1])  # of the same times for every row
        assert (sde is not None) == (case[1].get("rule", "sde") == "sde" and one_chain)
    if sde is None:
        return
    assert len(sde.times) == purifier.steps + 1 and all(np.diff(sde.times) < 0)
    z, context = purifier.start(X, tape())
    for k, (t, t_next) in enumerate(zip(sde.times, sde.times[1:], strict=False)):
        dw = math.sqrt(t - t_next) * tape().normal("reverse", k, like=z)
        expected = z + sde.drift(z, t) * (t - t_next) + sde.diffusion(t) * dw
        z = purifier.step(k, z, context, tape())
        assert torch.allclose(z, expected, rtol=0, atol=1e-12)


# Adjoint


@pytest.mark.parametrize("side", [8, 7], ids=["as the net", "resized to it"])
@pytest.mark.parametrize(
    "options",
    [{}, {"rounds": 2}, {"steps": 1}, {"steps": 5, "labels": "continuous"}, {"steps": 20, "t_star": 0.2}],
    ids=str,
)
def test_the_adjoint_view_computes_the_purifiers_output(options, side, make):
    purifier, x = make(("diffpure", {"rule": "sde"} | options), (3, 8, 8)), images(B, (3, side, side))
    expected = purifier(x, tape())
    got = Adjoint()(purifier, x.clone().requires_grad_(), tape())
    assert got.requires_grad and got.shape == x.shape
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(got, purifier(x, tape(range(5, 5 + B))), rtol=0, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(Adjoint()(purifier, x, tape()), expected)


def by_hand(purifier: DiffPure, noise: Tape, x: torch.Tensor) -> torch.Tensor:
    """The gradient of one round by the adjoint's recursion: z rebuilt backwards, Jacobians at the later ends."""
    noise, times = noise.fold("round", 0), purifier.times
    x = x.clone().requires_grad_()
    start, context = purifier.start(x, noise)
    path = [torch.zeros_like(start)]
    z = start.detach()
    for k in range(purifier.steps):
        path.append(path[-1] + math.sqrt(times[k] - times[k + 1]) * noise.normal("reverse", k, like=z))
        z = purifier.step(k, z, context, noise).detach()

    def w(t: float) -> torch.Tensor:
        k = max(k for k in range(purifier.steps) if times[k] >= t)
        part = (times[k] - t) / (times[k] - times[k + 1])
        return (1 - part) * path[k] + part * path[k + 1]

    end = z.clone().requires_grad_()
    out = purifier.finish(end, context)
    a = torch.autograd.grad((directions(out) * out).sum(), end)[0]
    t = times[-1]
    while t < times[0] - 1e-9:
        t_before = min(t + times[0] - times[1], times[0])
        beta, late = purifier.schedule.beta(t), z.clone().requires_grad_()
        f = 0.5 * beta * late + beta * purifier.denoiser.score(late, t)
        pulled = torch.autograd.grad(f, late, a)[0]
        z = (late - (t_before - t) * f - math.sqrt(beta) * (w(t) - w(t_before))).detach()
        a, t = a + (t_before - t) * pulled, t_before
    return torch.autograd.grad(start, x, a)[0]


@pytest.mark.parametrize("options", [{}, {"steps": 10}, {"steps": 5, "labels": "continuous"}], ids=str)
def test_the_adjoint_is_the_recursion_that_its_docstring_states(options, make):
    purifier = make(("diffpure", {"rule": "sde"} | options))
    expected, got = by_hand(purifier, tape(), X), gradient(lambda x: Adjoint()(purifier, x, tape()))
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"rounds": 2}, {"steps": 5}], ids=str)
def test_the_adjoint_is_a_gradient_but_not_the_chains(options, make):
    purifier = make(("diffpure", {"rule": "sde"} | options))
    exact, got = (gradient(lambda x, view=view: view(purifier, x, tape())) for view in (Exact(), Adjoint()))
    assert got.isfinite().all() and (got.flatten(1).norm(dim=1) > 0).all()
    assert (cosine(got, exact) < 0.999).all()


class Smooth(torch.nn.Module):
    """Noise that is predicted from each pixel and its neighbour, smooth in z and in the label."""

    def forward(self, z, label):
        return 0.3 * torch.sin(3 * z + label.view(-1, 1, 1, 1) / 50) + 0.2 * z.roll(1, -1)


def test_away_from_time_0_the_adjoint_nears_the_exact_gradient_as_the_steps_shrink():
    """From 0.2 to 0.1 in 10, 40 and 160 steps: the gap falls in proportion to the step."""

    def both(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        purifier = DiffPure(Smooth(), t_star=0.2, steps=1, rule="sde", labels="continuous")
        *times, purifier.t_end = np.linspace(0.2, 0.1, steps + 1).tolist()
        purifier.chains, purifier.steps, purifier.per_chain = [times], steps, steps
        return tuple(gradient(lambda x, view=view: view(purifier, x, tape())) for view in (Exact(), Adjoint()))

    gaps = []
    for steps in (10, 40, 160):
        exact, got = both(steps)
        gaps.append(float((got - exact).norm() / exact.norm()))
    assert 0.001 < gaps[0] and gaps[-1] < 0.01
    assert [a / b for a, b in zip(gaps, gaps[1:], strict=False)] == pytest.approx([4, 4], rel=0.3)
    assert (cosine(got, exact) > 0.9999).all()


def test_the_first_jacobian_of_the_adjoint_is_that_at_time_0():
    """One step from t_star to T_END, net c z: exact is 1 + h (½ β - β c / sigma) at t_star, the adjoint's at T_END."""
    purifier = DiffPure(Linear(), t_star=0.001, steps=1, rule="sde", labels="continuous")
    early, late = 0.001, DiffPure.T_END
    sigma, beta = (lambda t: math.sqrt(1 - purifier.schedule.alpha_bar(t))), purifier.schedule.beta
    scale = math.sqrt(purifier.schedule.table[0])  # of the noising
    x = 0.4 + 0.2 * X  # no clamp acts
    for view, t in ((Exact(), early), (Adjoint(), late)):
        slope = scale * (1 + (early - late) * (0.5 * beta(t) - beta(t) * Linear.C / sigma(t)))
        got = gradient(lambda v, view=view: view(purifier, v, tape()), x)
        assert torch.allclose(got, slope * directions(x).expand_as(x), rtol=1e-9, atol=0)
    coefficients = [beta(t) / sigma(t) for t in (early, late)]
    assert coefficients[1] / coefficients[0] == pytest.approx(8.8, abs=0.1)


class Linear(torch.nn.Module):
    C = 0.3

    def forward(self, z, label):
        return self.C * z


def test_an_image_has_the_same_adjoint_in_any_batch_and_no_global_generator_is_touched(make):
    purifier = make(SDE)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    whole = gradient(lambda x: Adjoint()(purifier, x, tape()))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    for rows in ([1], [2, 0]):
        got = gradient(lambda x, rows=rows: Adjoint()(purifier, x, tape(rows)), X[rows])
        assert torch.allclose(got, whole[rows], rtol=0, atol=1e-12)
    assert torch.equal(gradient(lambda x: Adjoint()(purifier, x, tape())), whole)


@pytest.mark.parametrize(
    "case", [("vae", {}), ("identity", {}), ("diffpure", {"rule": "eta"}), ("diffpure", {"rule": "ode"}), None], ids=str
)
@pytest.mark.parametrize("grad", [True, False])
def test_the_adjoint_needs_an_sde(case, grad, make):
    purifier = torch.nn.Identity() if case is None else make(case)
    with pytest.raises(NotApplicable, match="integrates an SDE, e.g. diffpure:rule=sde"), torch.set_grad_enabled(grad):
        Adjoint()(purifier, X, tape())


def test_the_adjoint_names_what_else_it_needs(make, monkeypatch):
    with pytest.raises(NotApplicable, match="3 steps from 0.1 aren't: choose steps that divide"):
        Adjoint()(make(("diffpure", {"rule": "sde", "steps": 3})), X, tape())
    with pytest.raises(NotApplicable, match="keyed noise"):
        Adjoint()(make(SDE), X, None)
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(NotApplicable, match="pip install torchsde"):
        Adjoint()(make(SDE), X, tape())


def test_the_adjoint_is_a_view_of_a_defense(make):
    """By its name, under copies too; the weights gather no gradient."""
    defense = Defense(make(SDE), classifier(), copies=2)
    got, exact = (
        gradient(lambda x, name=name: defense(x, tape(), VIEWS[name](keep=1))) for name in ("adjoint", "exact")
    )
    assert got.isfinite().all() and (got.flatten(1).norm(dim=1) > 0).all() and not torch.allclose(got, exact, rtol=1e-3)
    assert all(p.grad is None for p in defense.parameters())


# Surrogate


@every_purifier
def test_every_surrogate_that_a_purifier_offers_computes_its_output_and_gives_a_gradient(case, make):
    purifier = make(case)
    for name in purifier.surrogates:
        view = Surrogate(gradient=name)
        assert torch.allclose(view(purifier, X, tape()), purifier(X, tape()), rtol=0, atol=1e-12)
        got = gradient(lambda x, view=view: view(purifier, x, tape()))
        assert got.isfinite().all() and (got.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_surrogate_mean_is_the_gradient_with_the_posteriors_spread_held_fixed(rounds, make):
    """Of x → D(mu(x) + stop(sigma(x) n)): encoder's mean and decoder both differentiated at the states that were."""
    purifier, bare = make(("vae", {"rounds": rounds})), make(("vae", {"temperature": 0.0}))

    def held(x):
        for r in range(rounds):
            noise = tape().fold("round", r)
            (mean, _), (z, _) = bare.start(x, noise), purifier.start(x, noise)
            x = purifier.finish(mean + (z - mean).detach(), x)
        return x

    got = gradient(lambda x: Surrogate(gradient="mean")(purifier, x, tape()))
    assert torch.allclose(got, gradient(held), rtol=0, atol=1e-12)
    for other in (gradient(lambda x: purifier(x, tape())), gradient(lambda x: bare(x, tape()))):
        assert not torch.allclose(got, other, rtol=1e-3)


def test_at_temperature_0_the_surrogate_mean_is_the_exact_gradient(make):
    purifier = make(("vae", {"temperature": 0.0}))
    got = gradient(lambda x: Surrogate(gradient="mean")(purifier, x, tape()))
    assert torch.allclose(got, gradient(lambda x: purifier(x, tape())), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case, offers", [("vae", "mean"), ("identity", "none"), (None, "none")])
def test_a_surrogate_that_is_not_offered_is_an_error_that_lists_what_is(case, offers, make):
    purifier = torch.nn.Identity() if case is None else make((case, {}))
    with pytest.raises(NotApplicable, match=f"{type(purifier).__name__} has no .* 'soft'; it offers {offers}"):
        Surrogate(gradient="soft")(purifier, X, tape())
    if case is not None:
        with pytest.raises(ValueError, match=f"has no surrogate 'soft'.*{offers}"):
            purifier.surrogate("soft")


# Watched


def watch(view, purifier, x: torch.Tensor = X):
    """The stages that a watched view shows as (name, k, inputs, output), and its gradient."""
    seen: list[tuple] = []

    def see(stage, inputs, output):
        assert stage.__self__ is purifier
        seen.append((stage.__name__, inputs[0] if stage.__name__ == "step" else None, inputs, output))

    return seen, gradient(lambda v: Watched(view, see)(purifier, v, tape()), x)


WATCHABLE = {"exact": Exact(), "keep=1": Exact(keep=1), "keep=0": Exact(keep=0), "bpda": BPDA()}


@every_purifier
@pytest.mark.parametrize("name", WATCHABLE)
def test_every_stage_is_seen_once_in_order_and_nothing_changes(name, case, make):
    purifier, view = smooth(make(case)), WATCHABLE[name]
    seen, got = watch(view, purifier)
    steps = [("step", k) for k in range(purifier.steps)]
    assert [s[:2] for s in seen] == purifier.rounds * [("start", None), *steps, ("finish", None)]
    assert torch.equal(got, gradient(lambda x: view(purifier, x, tape())))
    watched = Watched(view, lambda *of: None)(purifier, X, tape())
    assert torch.equal(watched, view(purifier, X, tape()))
    if name != "bpda":  # whose value is x + (g(x) - x)
        assert torch.equal(watched, purifier(X, tape()))


@pytest.mark.parametrize("name", WATCHABLE)
@pytest.mark.parametrize("case", [("diffpure", {"rounds": 2}), ("vae", {})], ids=str)
def test_what_is_seen_is_what_was_computed(name, case, make):
    """Each stage's output is the next one's input, the last the purified image, its noise the round's own."""
    purifier = make(case)
    seen, _ = watch(WATCHABLE[name], purifier)
    drawn = [s[2][-1].normal("site", like=X) for s in seen if s[0] == "start"]
    assert len(drawn) == purifier.rounds
    for r, values in enumerate(drawn):
        assert torch.equal(values, tape().fold("round", r).normal("site", like=X))
    for (before, _, _, output), (stage, k, inputs, _) in zip(seen, seen[1:], strict=False):
        state = output[0] if before == "start" else output
        assert inputs[0 if k is None else 1] is state, (before, stage)
    assert torch.equal(seen[-1][3], purifier(X, tape()))


@pytest.mark.parametrize("name", WATCHABLE)
def test_a_seen_output_is_differentiable_where_the_view_differentiates_it(name, make):
    purifier, x, states = make(("diffpure", {})), X.clone().requires_grad_(), []
    Watched(WATCHABLE[name], lambda stage, inputs, output: states.append(output))(purifier, x, tape())
    assert states[1].requires_grad == (name != "bpda")
    if name != "bpda":
        inner = torch.autograd.grad(states[1].square().sum(), x)[0]

        def by_hand(v):
            noise = tape().fold("round", 0)
            return purifier.step(0, *purifier.start(v, noise), noise)

        v = X.clone().requires_grad_()
        assert torch.equal(inner, torch.autograd.grad(by_hand(v).square().sum(), v)[0])


def test_the_surrogates_stages_are_seen_and_a_view_without_stages_shows_none(make):
    purifier = make(("vae", {}))
    seen, got = watch(Surrogate(gradient="mean"), purifier)
    assert [s[0] for s in seen] == ["start", "finish"]
    assert torch.equal(got, gradient(lambda x: Surrogate(gradient="mean")(purifier, x, tape())))
    assert watch(Blind(), purifier)[0] == []
    foreign: list = []
    assert (
        torch.equal(Watched(Exact(), lambda *of: foreign.append(of))(torch.nn.Identity(), X, None), X) and not foreign
    )


# On the command line


def test_a_view_is_asked_of_the_attacker_and_not_of_the_defense(tmp_path, capsys):
    """What is differentiated has the capability; the defense that is judged needs none."""
    common = ["--attack", "pgd:steps=1,eot=1", "--n-examples", "2", "--batch-size", "32", "--out", str(tmp_path)]
    attacker = ["--attacker", "diffpure:rule=sde,steps=2,t_star=0.1"]
    assert cli.main(["run", "--purifier", "identity", *attacker, "--view", "adjoint", *common]) == cli.DONE
    assert "| adjoint@diffpure:" in capsys.readouterr().out
    assert cli.main(["run", "--purifier", "diffpure", "--view", "surrogate:gradient=mean", *common]) == cli.USAGE
    assert "DiffPure has no surrogate gradient 'mean'; it offers none" in capsys.readouterr().err


def test_a_cell_that_is_not_applicable_spoils_no_other_and_leaves_no_folder(tmp_path, capsys):
    common = ["--purifier", "blur", "--n-examples", "2", "--batch-size", "32", "--out", str(tmp_path)]
    few = "encoder:steps=1,pgd:steps=1"
    assert cli.main(["run", *common, "--attack", few]) == cli.DONE
    printed = capsys.readouterr()
    assert "PGD-CE (1 it)" in printed.out and "encoder" not in printed.out
    assert "not in the table" in printed.err and "needs a purifier that encodes" in printed.err
    assert [p.name.split("-")[0] for p in (tmp_path / "fashion-mnist" / "blur").iterdir()] == ["pgd"]
    assert cli.main(["run", *common, "--attack", "encoder:steps=1"]) == cli.USAGE
    assert cli.main(["run", *common, "--attack", "stadv:steps=1", "--eps", "2"]) == cli.USAGE
    assert "write 0.05" in capsys.readouterr().err


def test_an_attacker_that_draws_averages_draws_on_a_defense_that_does_not(tmp_path, capsys):
    common = ["--purifier", "vae:temperature=0", "--n-examples", "2", "--batch-size", "32", "--out", str(tmp_path)]
    assert cli.main(["run", *common, "--attack", "transfer:source=vae,steps=1"]) == cli.DONE
    line = next(line for line in capsys.readouterr().out.splitlines() if "PGD-CE" in line)
    assert "PGD-CE (1 it, EOT 4) from vae" in line and "| 2 | 1 |" in line  # two images, one draw judges


def test_what_only_looks_is_not_refused_for_a_gradient_that_vanishes(tmp_path, capsys):
    rounding = tmp_path / "rounding.py"
    rounding.write_text(
        "from purifiers import Purifier\n\n\nclass Rounding(Purifier):\n    stochastic = False\n\n"
        "    def start(self, x, noise):\n        return (15 * x).round() / 15, None\n\n"
        "    def finish(self, state, context):\n        return state\n"
    )
    common = ["--purifier", f"file:{rounding}", "--n-examples", "2", "--out", str(tmp_path / "out")]
    assert cli.main(["run", *common, "--attack", "square:queries=2"]) == cli.DONE
    assert cli.main(["run", *common, "--attack", "pgd:steps=2"]) == cli.FAILED
    assert "zero-gradients" in capsys.readouterr().err
