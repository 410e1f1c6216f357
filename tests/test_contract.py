"""What every component promises, for every file of the registry: a newcomer is tested by being there."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from attacks import NORMS, VIEWS, Attack, AttackError, Victim
from attacks._gradient import ce
from benchmark import registry
from benchmark.preflight import Recording, RepeatedSite
from purifiers import Batch, Defense, Tape
from tests.conftest import CASES, SHAPE, Linear, classifier, images, undefended

every_purifier = pytest.mark.parametrize("case", CASES)
every_attack = pytest.mark.parametrize("name", registry.names("attacks"))
every_norm = pytest.mark.parametrize("norm", NORMS)
B = 6
EPS = {"Linf": Fraction(16, 255), "L2": Fraction(3, 5)}


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
    (gradient,) = torch.autograd.grad(make(case)(x, tape()).square().sum(), x)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


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
        assert purifier.dial in registry.options(type(purifier))
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        make((case[0], case[1] | {"rounds": 0}))


@every_purifier
def test_objectives_reach_every_parameter_of_the_parts_they_name(case, make):
    purifier = make(case).train()
    parts = {k: v for k, v in purifier.named_children() if k in type(purifier).parts(SHAPE, "tiny")}
    losses = purifier.objectives(Batch(images(B), torch.arange(B)), tape())
    assert {part for key in losses for part in key.split("+")} == set(parts)
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


def test_a_defense_is_frozen_and_in_eval_mode(make):
    defense = Defense(make(("diffpure", {})).train(), classifier().train())
    assert not any(m.training for m in defense.modules())
    assert not any(p.requires_grad for p in defense.parameters())


@pytest.mark.parametrize("combine", Defense.COMBINE)
def test_copies_are_combined_draws(combine, make):
    purifier, f, x = make(("diffpure", {})), classifier(), images(B)
    defense = Defense(purifier, f, copies=3, combine=combine)
    rows = f(purifier(x.repeat_interleave(3, 0), tape().fold("copies", 3).draws(3))).unflatten(0, (B, 3))
    expected = {
        "logits": rows.mean(1),
        "probabilities": rows.softmax(-1).mean(1).log(),
        "vote": torch.nn.functional.one_hot(rows.argmax(-1), 10).double().mean(1).clamp_min(2.0**-1022).log(),
    }[combine]
    assert torch.allclose(defense(x, tape()), expected, rtol=0, atol=1e-12)
    assert torch.allclose(defense.bind(tape())(x), defense(x, tape()), rtol=0, atol=0)
    assert defense.nfe == 3 * purifier.nfe


def test_defense_options_out_of_range():
    for options, message in (({"copies": 0}, "copies must be at least 1"), ({"combine": "max"}, "'max'")):
        with pytest.raises(ValueError, match=message):
            Defense(torch.nn.Identity(), classifier(), **options)


# Attacks

SMALL = {"steps": 10, "eot": 2, "queries": 12}
WHITE = [name for name in registry.names("attacks") if not registry.load("attacks", name).black_box]
N = 24


def small(name: str, **chosen) -> Attack:
    component = registry.load("attacks", name)
    wanted = SMALL | chosen
    return component(**{k: v for k, v in wanted.items() if k in registry.options(component)})


def victim_of(defense: Defense, ids: torch.Tensor, stochastic: bool | None = None) -> Victim:
    stochastic = defense.stochastic if stochastic is None else stochastic
    return Victim(defense, VIEWS["exact"](), Tape(0, "attack", ids), rows=32, stochastic=stochastic)


def linear(classes: int = 10) -> Linear:
    """A linear model in which every image is at some distance from every boundary."""
    w = Tape(3, "images", torch.arange(classes)).normal("w", like=torch.empty(classes, 64))
    return Linear(w / 8, torch.zeros(classes))


def two_sided() -> tuple[Linear, torch.Tensor]:
    """Ten classes of which two matter: z = (⟨w, x - 1/2⟩, -⟨w, x - 1/2⟩, -50, …)."""
    w = Tape(4, "images", torch.arange(1)).normal("w", like=torch.empty(1, 64))
    b = torch.full((10,), -50.0)
    b[:2] = 0
    return Linear(torch.cat([w, -w, torch.zeros(8, 64)]), b), w.view(SHAPE)


@every_attack
@every_norm
@pytest.mark.parametrize("purifier", ["vae", "diffpure"])
def test_an_attack_on_a_stochastic_defense_stays_inside_and_leaves_no_trace(name, norm, purifier, make):
    defense = Defense(make((purifier, {})).float(), classifier().float())
    x, y = images(4, dtype=torch.float32), torch.arange(4)
    x[0], x[1] = x[0].round(), 0
    threat, before = NORMS[norm](EPS[norm]), generators()
    kept = x.clone(), {k: v.clone() for k, v in defense.state_dict().items()}
    attack, victim = small(name, steps=3), victim_of(defense, torch.arange(4))
    found = attack.perturb(x, y, victim, threat)
    assert generators() == before
    assert torch.equal(x, kept[0]) and all(torch.equal(v, kept[1][k]) for k, v in defense.state_dict().items())
    assert found.candidates.shape[1:] == x.shape and found.candidates.dtype == x.dtype
    for candidate in found.candidates:
        assert (threat.distance(candidate, x) <= threat.bound).all()
        assert 0 <= candidate.min() and candidate.max() <= 1
        assert torch.equal(candidate, x) == (name == "identity")
    assert (found.forwards, found.backwards) == (attack.evaluations(True), attack.gradients(True))
    assert ((-1 <= found.broken_at) & (found.broken_at < max(attack.evaluations(True), 1))).all()


@every_attack
def test_an_attack_gives_the_same_in_any_batch_and_after_a_pause(name, make):
    """Keyed noise: an image attacked alone, or continued from a saved state, ends where it would have ended."""
    defense = Defense(make(("vae", {})), classifier())
    x, y, ids = images(5), torch.arange(5), torch.arange(5)
    attack, threat = small(name, steps=4), NORMS["Linf"](EPS["Linf"])
    saved = {}

    def watch(k, state):
        saved[k] = {key: value.clone() for key, value in state.items()}

    whole = attack.perturb(x, y, victim_of(defense, ids), threat, watch=watch)
    assert list(saved) == list(range(1, attack.length(True) + 1))
    for k in {1, max(attack.length(True) // 2, 1), attack.length(True)}:
        resumed = attack.perturb(x, y, victim_of(defense, ids), threat, state=saved[k])
        assert torch.equal(resumed.candidates, whole.candidates) and torch.equal(resumed.broken_at, whole.broken_at)
        assert (resumed.forwards, resumed.backwards) == (whole.forwards, whole.backwards)
    alone = attack.perturb(x[3:4], y[3:4], victim_of(defense, ids[3:4]), threat)
    assert torch.allclose(alone.candidates[:, 0], whole.candidates[:, 3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in WHITE if name != "lf"])
@every_norm
def test_natively_an_attack_reaches_the_optimum_of_a_linear_model(name, norm):
    """The strongest perturbation is known: x - y eps sign(w) in Linf, x - y eps w / ‖w‖ in L2."""
    model, w = two_sided()
    x = 0.5 + 0.2 * (images(N, dtype=torch.float32) - 0.5)  # so far from 0 and 1 that no clamp acts
    y = model(x).argmax(1)
    side = (1 - 2.0 * y).view(-1, 1, 1, 1)
    threat = NORMS[norm](EPS[norm])
    direction = {"Linf": w.sign(), "L2": w / w.norm()}[norm]
    optimum = x - side * threat.bound * direction
    assert 0 < optimum.min() and optimum.max() < 1
    attack = small(name, steps=20, eot=1, step=10.0)
    found = attack.perturb(x, y, victim_of(undefended(model), torch.arange(N), True), threat)
    for candidate in found.candidates:
        best, reached = ce(model(optimum), y), ce(model(candidate), y)
        assert (reached <= best + 1e-3).all()
        margin = {"Linf": w.abs().sum(), "L2": w.norm()}[norm] * threat.bound
        gained = ((model(x) - model(candidate)).gather(1, y[:, None])[:, 0]) / margin
        assert (gained > 0.98).all(), gained.min()
        if norm == "Linf" and name != "autoattack":
            assert torch.allclose(candidate, optimum, rtol=0, atol=1e-6)


DETERMINISTIC = [
    # a package's own numbers can't be made smaller: L2 takes as long again
    pytest.param(name, norm, marks=[pytest.mark.slow] if name == "autoattack" and norm == "L2" else [])
    for name in WHITE
    for norm in NORMS
    if name != "lf"  # its optimum is another: see test_lf
]


@pytest.mark.parametrize("name, norm", DETERMINISTIC)
def test_on_a_deterministic_linear_model_the_verdict_is_the_exact_one(name, norm):
    """An image is robust iff every margin exceeds eps times the dual norm of w_y - w_c.

    The package targets every class and must decide ten of them; the untargeted losses only the two-sided model.
    """
    attack, before = small(name, steps=50, eot=1, step=10.0), generators()
    model = linear() if attack.package else two_sided()[0]
    x = 0.5 + 0.2 * (images(N, dtype=torch.float32) - 0.5)
    logits = model(x)
    y, ids = logits.argmax(1), torch.arange(N)
    dual = {"Linf": 1, "L2": 2}[norm]
    lengths = (model.w[y][:, None] - model.w[None]).norm(dual, dim=2)
    slack = (logits.gather(1, y[:, None]) - logits) / lengths
    radius = slack.masked_fill(torch.nn.functional.one_hot(y, 10).bool(), torch.inf).amin(1)
    eps = Fraction(round(float(radius.median()) * 1e6), 10**6)
    threat = NORMS[norm](eps)
    assert 0 < (x - threat.bound).min() and (x + threat.bound).max() < 1
    decided = (radius - threat.bound).abs() > 0.03 * threat.bound
    robust = radius > threat.bound
    assert 0.3 < robust.float().mean() < 0.7 and decided.float().mean() > 0.8

    found = attack.perturb(x, y, victim_of(undefended(model), ids), threat)
    assert generators() == before
    (candidate,) = found.candidates
    assert (threat.distance(candidate, x) <= threat.bound).all()
    survives = model(candidate).argmax(1) == y
    assert torch.equal(survives[decided], robust[decided])
    assert survives[robust].all()
    if found.package_correct is not None:
        assert torch.equal(found.package_correct[decided], robust[decided])


@every_attack
@every_norm
def test_no_radius_no_change(name, norm):
    x, y = images(4, dtype=torch.float32), torch.arange(4)
    threat = NORMS[norm](Fraction(0))
    found = small(name).perturb(x, y, victim_of(undefended(linear()), torch.arange(4), True), threat)
    assert torch.allclose(found.candidates, x.expand_as(found.candidates), rtol=0, atol=0)


@every_attack
def test_the_name_in_tables_says_how_much_was_done(name):
    attack = small(name)
    full = registry.load("attacks", name)()
    if name != "identity":
        assert full.display(True) != attack.display(True)
        assert re.search(r"10 it|12 queries|best of 12", attack.display(True)) and "EOT 2" in attack.display(True)


def test_autoattack_is_a_name_for_the_full_attack_only():
    component = registry.load("attacks", "autoattack")
    assert component().display(True) == "AutoAttack-rand (native)"
    assert component(steps=20, eot=4).display(True) == "APGD-CE+DLR (20 it, EOT 4)"
    assert component(steps=100, eot=19).display(True) == "APGD-CE+DLR (100 it, EOT 19)"
    assert component(steps=20, eot=4).display(False).startswith("AutoAttack (standard")


@every_attack
def test_attack_options_out_of_range_are_errors(name):
    component = registry.load("attacks", name)
    wrong = {"steps": 0, "eot": 0, "loss": "mse", "restarts": 0, "step": 0.0, "queries": 0, "share": 0.0, "block": 0}
    for key in wrong.keys() & registry.options(component).keys():
        with pytest.raises(ValueError, match=key):
            component(**{key: wrong[key]})


@pytest.mark.parametrize(
    "fault, message", [("outside", "left the L2 ball"), ("nan", "aren't finite"), ("shape", "shape")]
)
def test_an_attack_that_leaves_its_threat_model_ends_the_run(fault, message):
    faults = {
        "outside": lambda x: (x + 0.2).clamp(0, 1),
        "nan": lambda x: x / 0 * 0,
        "shape": lambda x: x[:, :, :4],
    }

    class Faulty(registry.load("attacks", "pgd")):
        def finish(self, state):
            return faults[fault](state["x_adv"][0])[None]

    x, y = images(2, dtype=torch.float32), torch.arange(2)
    with pytest.raises(AttackError, match=message):
        Faulty(steps=1, eot=1).perturb(x, y, victim_of(undefended(linear()), y), NORMS["L2"](Fraction(1, 2)))


def test_more_restarts_are_more_candidates_and_start_apart():
    x, y = images(3, dtype=torch.float32), torch.arange(3)
    victim = victim_of(undefended(linear()), y)
    threat = NORMS["Linf"](EPS["Linf"])
    several = small("pgd", steps=1, restarts=3, step=0.01).perturb(x, y, victim, threat).candidates
    assert len(several) == 3 and len(several.flatten(1).unique(dim=0)) == 3
    one = small("pgd", steps=1, step=0.01).perturb(x, y, victim_of(undefended(linear()), y), threat).candidates
    assert torch.equal(one[0], several[0])
