"""The contract of every attack: inside its threat model, repeatable, as strong as it can be where that is known."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attacks import NORMS, VIEWS, Attack, AttackError, Calls, NotApplicable, Victim
from attacks._gradient import margin
from attacks._package import Model
from attacks._views import Exact
from benchmark import constructors, registry, specs
from purifiers import Defense, Purifier, Tape
from tests.conftest import SHAPE, Linear, classifier, images, undefended

EPS = {"Linf": Fraction(16, 255), "L2": Fraction(3, 5), "StAdv": Fraction(1, 5)}
SMALL = {"steps": 10, "eot": 2, "queries": 12, "samples": 3}
VARIANTS = [
    "pgd:iterate=best,restarts=2", "pgd:sign=true,step_size=0.01", "apgd:targets=2", "apgd:loss=dlr,restarts=2",
    "pgd:momentum=0.75,halving=true,restarts=2", "apgd:returns=false",
    "autoattack:version=rand,backend=pyautoattack",
    "torchattacks:PGD", "torchattacks:PGDL2",
]  # fmt: skip
"""What else an attack must keep the contract as, beside each file at its defaults."""
ATTACKS = [name for name in registry.names("attacks") if name != "torchattacks"] + VARIANTS
N = 24


def component_of(text: str) -> type:
    spec = specs.parse(text)
    return registry.load("attacks", spec.name, spec.argument)


def small(text: str, **chosen) -> Attack:
    component, spec = component_of(text), specs.parse(text)
    wanted = {k: v for k, v in (SMALL | chosen).items() if k in constructors.options(component)}
    return component(**constructors.resolve(component, spec, wanted))


def searching(cases: list[str]) -> list:
    """Each attack under each threat model that it can search."""
    return [pytest.param(text, norm, id=f"{text}-{norm}") for text in cases for norm in component_of(text).norms]


ANYWHERE = [text for text in ATTACKS if text != "encoder"]
"""All but the one that asks for a purifier that encodes."""
OURS = [text for text in ATTACKS if small(text).package(True) is None]
AIMING = [
    text for text in ATTACKS
    if not component_of(text).black_box and not component_of(text).restricted
]  # fmt: skip
"""White-box attacks that may change every pixel, and that aim at the label: they reach a linear model's optimum."""
IN_BALLS = [
    case for case in searching(AIMING)
    if case.values[1] != "StAdv" and not ("sign" in case.values[0] and case.values[1] == "L2")
]  # fmt: skip

every_attack = pytest.mark.parametrize("name", ATTACKS)


def generators() -> list[list[int]]:
    """The state of the global generators."""
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]


def victim_of(defense: Defense, ids: torch.Tensor, stochastic: bool | None = None) -> Victim:
    stochastic = defense.stochastic if stochastic is None else stochastic
    return Victim(defense, VIEWS["exact"](), Tape(0, "attack", ids), Calls(32), stochastic=stochastic)


def linear(classes: int = 10) -> Linear:
    """A linear model in which every image is at some distance from every boundary."""
    w = Tape(3, "images", torch.arange(classes)).normal("w", like=torch.empty(classes, 64))
    return Linear(w / 8, torch.zeros(classes))


def two_sided(shape: tuple[int, int, int] = SHAPE) -> tuple[Linear, torch.Tensor]:
    """Ten classes of which two matter: z = (⟨w, x - 1/2⟩, -⟨w, x - 1/2⟩, -50, …)."""
    size = int(np.prod(shape))
    w = Tape(4, "images", torch.arange(1)).normal("w", like=torch.empty(1, size))
    b = torch.full((10,), -50.0)
    b[:2] = 0
    return Linear(torch.cat([w, -w, torch.zeros(8, size)]), b), w.view(shape)


@pytest.mark.parametrize("name, norm", searching(ATTACKS))
@pytest.mark.parametrize("purifier", ["vae", "diffpure"])
def test_an_attack_on_a_stochastic_defense_stays_inside_and_leaves_no_trace(name, norm, purifier, make):
    defense = Defense(make((purifier, {})).float(), classifier().float())
    x, y = images(4, dtype=torch.float32), torch.arange(4)
    x[0], x[1] = x[0].round(), 0
    threat, before = NORMS[norm](EPS[norm]), generators()
    kept = x.clone(), {k: v.clone() for k, v in defense.state_dict().items()}
    attack, victim = small(name, steps=3), victim_of(defense, torch.arange(4))
    if name == "encoder" and purifier == "diffpure":
        with pytest.raises(NotApplicable):
            attack.perturb(x, y, victim, threat)
        return
    found = attack.perturb(x, y, victim, threat)
    assert generators() == before
    assert torch.equal(x, kept[0]) and all(torch.equal(v, kept[1][k]) for k, v in defense.state_dict().items())
    assert found.candidates.shape[1:] == x.shape and found.candidates.dtype == x.dtype
    assert found.candidates.shape[0] == attack.versions(True)
    assert (found.distances <= threat.bound).all() and found.distances.shape == found.candidates.shape[:2]
    for candidate, distance in zip(found.candidates, found.distances, strict=True):
        if norm != "StAdv":  # of a flow only the attack knows it
            assert torch.equal(threat.distance(candidate, x), distance)
        assert 0 <= candidate.min() and candidate.max() <= 1
        if attack.package(True) is None:  # a package may leave an image that it found misclassified
            assert torch.equal(distance, 0 * distance) == (name == "identity")
    if attack.package(True) is None:
        assert (found.forwards, found.backwards) == (attack.evaluations(True), attack.gradients(True))
    else:
        assert 0 <= found.backwards <= found.forwards <= attack.evaluations(True) + 1
    assert ((-1 <= found.broken_at) & (found.broken_at < max(attack.evaluations(True), 1))).all()


@pytest.mark.parametrize("name, norm", searching(ATTACKS))
def test_a_step_leaves_the_state_before_it_as_it_was(name, norm, make):
    """An interrupt in the middle of a step saves the state before it, and the step is taken again."""
    defense = Defense(make(("vae", {})).float(), classifier().float())
    x, y, states = images(3, dtype=torch.float32), torch.arange(3), []

    def watch(k, state):
        states.append((state, {key: value.clone() for key, value in state.items()}))
        for old, kept in states:
            assert old.keys() == kept.keys() and all(torch.equal(old[key], kept[key]) for key in kept)

    small(name, steps=3).perturb(x, y, victim_of(defense, torch.arange(3)), NORMS[norm](EPS[norm]), watch=watch)


def test_a_package_recomputes_what_memory_does_not_hold(make):
    """A deterministic defense under a package's attack: its stages run a second time where no graph is kept."""
    purifier = make(("vae", {})).float()
    seen, finish = [], purifier.finish
    purifier.finish = lambda *given: (seen.append(0), finish(*given))[1]
    x = images(2, dtype=torch.float32).requires_grad_()
    for keep, runs in ((None, 1), (0, 2)):
        victim = victim_of(Defense(purifier, classifier().float()), torch.arange(2), stochastic=False)
        victim.view = Exact(keep=keep)
        seen.clear()
        Model(victim, x.device)(x).sum().backward()
        assert len(seen) == runs


@pytest.mark.parametrize("view", ["bpda", "blind", "surrogate", "attacker"])
@every_attack
def test_an_attack_takes_every_view_and_attacker(name, view, make):
    """Or says that it can't: what looks inside the purifier needs a view that differentiates it."""
    defense = Defense(make(("vae", {})).float(), classifier().float())
    x, y, ids = images(3, dtype=torch.float32), torch.arange(3), torch.arange(3)
    threat = NORMS[norm := component_of(name).norms[0]](EPS[norm])
    victim = victim_of(defense, ids)
    if view == "attacker":
        victim.defense = Defense(make(("diffpure", {})).float(), defense.classifier)
    else:
        victim.view = VIEWS[view](**({"gradient": "mean"} if view == "surrogate" else {}))
    attack = small(name, steps=2)
    inside = specs.parse(name).name
    if (inside == "diffattack" and view in ("bpda", "blind")) or (inside == "encoder" and view != "surrogate"):
        with pytest.raises(NotApplicable, match="needs a"):
            attack.perturb(x, y, victim, threat)
        return
    exact = attack.perturb(x, y, victim_of(defense, ids), threat)
    found = attack.perturb(x, y, victim, threat)
    assert found.candidates.isfinite().all() and (found.distances <= threat.bound).all()
    looks_only = component_of(name).black_box and name != "transfer"
    if attack.package(True) is None and not (looks_only and view in ("bpda", "surrogate")):
        assert name == "identity" or not torch.equal(found.candidates, exact.candidates)


@given(
    case=st.sampled_from([case.values for case in searching(ANYWHERE)]),
    eps=st.fractions(0, 1, max_denominator=255),
    x=hnp.arrays(np.float32, (2, 1, 6, 6), elements=st.sampled_from([0.0, 1e-30, 8 / 255, 0.5, 1 - 8 / 255, 1.0])),
)
@settings(max_examples=30)
def test_no_example_leaves_its_threat_model(case, eps, x):
    """Any radius, pixels at the rim of the box, any attack: without a tolerance, by the threat model's own distance."""
    name, norm = case
    x, threat = torch.from_numpy(np.float32(x)), NORMS[norm](eps)
    model = Linear(Tape(3, "images", torch.arange(10)).normal("w", like=torch.empty(10, 36)), torch.zeros(10))
    found = small(name, steps=2).perturb(x, model(x).argmax(1), victim_of(undefended(model), torch.arange(2)), threat)
    assert (found.distances <= threat.bound).all() and found.distances.dtype == torch.float64
    for candidate in found.candidates:
        assert candidate.isfinite().all() and 0 <= candidate.min() and candidate.max() <= 1
        assert norm == "StAdv" or (threat.distance(candidate, x) <= threat.bound).all()


@pytest.mark.parametrize("name", OURS)
def test_an_attack_gives_the_same_in_any_batch_and_after_a_pause(name, make):
    """Keyed noise: an image attacked alone, or continued from a saved state, ends where it would have ended."""
    defense = Defense(make(("vae", {})), classifier())
    x, y, ids = images(5), torch.arange(5), torch.arange(5)
    attack, norm = small(name, steps=4), component_of(name).norms[0]
    threat = NORMS[norm](EPS[norm])
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


@pytest.mark.parametrize("shape, n", [(SHAPE, N), ((3, 6, 5), 40), ((2, 12, 9), 1)], ids=str)
@pytest.mark.parametrize("name, norm", IN_BALLS)
def test_natively_an_attack_reaches_the_optimum_of_a_linear_model(name, norm, shape, n):
    """The strongest perturbation is known: x - y eps sign(w) in Linf, x - y eps w / ‖w‖ in L2.

    Forty images are more than one call of the network takes.
    """
    model, w = two_sided(shape)
    x = 0.5 + 0.2 * (images(n, shape, torch.float32) - 0.5)  # so far from 0 and 1 that no clamp acts
    y = model(x).argmax(1)
    side = (1 - 2.0 * y).view(-1, 1, 1, 1)
    threat = NORMS[norm](EPS[norm])
    direction = {"Linf": w.sign(), "L2": w / w.norm()}[norm]
    optimum = x - side * threat.bound * direction
    assert 0 < optimum.min() and optimum.max() < 1
    attack = small(name, steps=20, eot=1, step=10.0)
    found = attack.perturb(x, y, victim_of(undefended(model), torch.arange(n), True), threat)
    best = {"Linf": w.abs().sum(), "L2": w.norm()}[norm] * threat.bound
    logits = model(found.candidates.flatten(0, 1)).unflatten(0, (-1, n))
    gained = (model(x) - logits).gather(2, y.view(1, -1, 1).expand(len(logits), -1, 1))[..., 0] / best
    # a candidate may aim at a class that is out of reach, or be Square's; the strongest is the optimum
    strongest = gained.amax(0)
    assert (strongest > 0.98).all() and (strongest <= 1 + 1e-4).all(), strongest
    if norm == "Linf" and specs.parse(name).name in ("pgd", "apgd", "diffattack") and "targets" not in name:
        assert torch.allclose(found.candidates, optimum.expand_as(found.candidates), rtol=0, atol=1e-6)


def test_the_native_standard_ensemble_is_its_members():
    """APGD-CE, nine targets and Square, each with a candidate; the strongest reaches the optimum."""
    attack = small("autoattack:version=standard,backend=native", steps=20, eot=1, queries=5)
    names = [member.display(True) for member in attack.members(True)]
    assert names == ["APGD-CE", *["APGD-DLR-TARGETED"] * 9, "Square (5 queries, EOT 1)"]
    assert attack.least_classes(True) == 10 and attack.versions(True) == 11
    model, w = two_sided()
    x = 0.5 + 0.2 * (images(4, dtype=torch.float32) - 0.5)
    y, threat = model(x).argmax(1), NORMS["Linf"](EPS["Linf"])
    found = attack.perturb(x, y, victim_of(undefended(model), torch.arange(4), True), threat)
    assert (found.forwards, found.backwards) == (attack.evaluations(True), attack.gradients(True))
    assert len(found.candidates[:, 0].flatten(1).unique(dim=0)) > 2
    gained = model(x).gather(1, y[:, None]) - model(found.candidates[1]).gather(1, y[:, None])
    assert (
        gained[:, 0] > 0.98 * w.abs().sum() * threat.bound
    ).all()  # the likeliest other class is the one that counts
    assert "made for deterministic defenses" in attack.caveat(True) and attack.caveat(False) is None


def test_a_sign_step_in_l2_falls_short_of_the_optimum():
    """Why it is marked: the published L2 attack steps along the sign, which isn't the steepest ascent in L2."""
    model, w = two_sided()
    x = 0.5 + 0.2 * (images(N, dtype=torch.float32) - 0.5)
    y, threat = model(x).argmax(1), NORMS["L2"](EPS["L2"])
    gained = {}
    for sign in (True, False):
        attack = small("pgd", steps=20, eot=1, step=10.0, sign=sign)
        assert attack.display(True).startswith("sign-step ") == sign
        found = attack.perturb(x, y, victim_of(undefended(model), torch.arange(N)), threat).candidates[0]
        gained[sign] = float((model(x) - model(found)).gather(1, y[:, None]).mean() / (w.norm() * threat.bound))
    assert gained[False] > 0.98 and gained[True] < 0.9, gained


DETERMINISTIC = [
    # a package's own numbers can't be made smaller: L2 takes as long again
    pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] if case.id == "autoattack-L2" else [])
    for case in IN_BALLS
]


@pytest.mark.parametrize("name, norm", DETERMINISTIC)
def test_on_a_deterministic_linear_model_the_verdict_is_the_exact_one(name, norm):
    """An image is robust iff every margin exceeds eps times the dual norm of w_y - w_c.

    The package targets every class and must decide ten of them; the untargeted losses only the two-sided model.
    """
    attack, before = small(name, steps=50, eot=1, step=10.0), generators()
    model = linear() if attack.package(False) == "pyautoattack" and "rand" not in name else two_sided()[0]
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
    for candidate in found.candidates:
        assert (threat.distance(candidate, x) <= threat.bound).all()
    survives = (model(found.candidates.flatten(0, 1)).argmax(1).unflatten(0, (-1, N)) == y).all(0)
    assert torch.equal(survives[decided], robust[decided])
    assert survives[robust].all()
    if found.package_correct is not None:
        assert torch.equal(found.package_correct[decided], robust[decided])


@pytest.mark.parametrize("name, norm", searching(ANYWHERE))
def test_no_radius_no_change(name, norm):
    x, y = images(4, dtype=torch.float32), torch.arange(4)
    threat = NORMS[norm](Fraction(0))
    found = small(name).perturb(x, y, victim_of(undefended(linear()), torch.arange(4), True), threat)
    assert (found.distances == 0).all()
    # rendering a flow of nought interpolates between a pixel and itself
    assert torch.allclose(found.candidates, x.expand_as(found.candidates), rtol=0, atol=1e-5 if norm == "StAdv" else 0)


@every_attack
def test_the_name_in_tables_says_how_much_was_done(name):
    attack = small(name)
    full = small(name, steps=100, queries=5000, eot=20)
    if name != "identity":
        assert full.display(True) != attack.display(True)
        assert re.search(r"10 it|12 queries", attack.display(True))
        assert "EOT 2" in attack.display(True) or "eot" not in constructors.options(component_of(name))


def test_autoattack_is_a_name_for_the_full_attack_only():
    component = registry.load("attacks", "autoattack")
    assert component().display(True) == "AutoAttack-rand (native)"
    assert component(steps=20, eot=4).display(True) == "APGD-CE+DLR (20 it, EOT 4)"
    assert component(steps=100, eot=19).display(True) == "APGD-CE+DLR (100 it, EOT 19)"
    assert component(steps=20, eot=4).display(False).startswith("AutoAttack (standard")
    native = component(backend="native")
    assert native.display(False) == "APGD-CE+T (100 it)+Square (5000 queries)"
    assert native.display(True) == "AutoAttack-rand (native)"
    package = component(version="rand", backend="pyautoattack")
    assert package.display(True) == "AutoAttack (rand, pyautoattack)"
    assert (
        component(version="plus", steps=20, backend="pyautoattack").display(True) == "AutoAttack (plus, pyautoattack)"
    )
    less = component(version="rand", backend="pyautoattack", steps=20)
    assert less.display(True) == "APGD-CE+DLR (20 it, EOT 20, pyautoattack)"


@every_attack
def test_attack_options_out_of_range_are_errors(name):
    component = component_of(name)
    wrong = {
        "steps": 0, "eot": 0, "loss": "mse", "restarts": 0, "step": 0.0, "step_size": -0.1, "queries": 0, "share": 0.0,
        "block": 0, "targets": -1, "iterate": "first", "version": "custom", "backend": "torchattacks",
        "weight": -1.0, "samples": 0, "delta": 0.0,
    }  # fmt: skip
    if component.__name__.startswith("TorchAttacks"):
        return  # the package's own affair
    for key in wrong.keys() & constructors.options(component).keys():
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


def weighted() -> Linear:
    """Two classes of opposite weights."""
    w = Tape(5, "images", torch.arange(1)).normal("w", like=torch.empty(1, images(1).numel()))
    return Linear(torch.cat([w, -w]), torch.zeros(2))


class Jitters(Purifier):
    """g(x) = x (1 + 4 n), n normal: of a linear loss the mean gradient is the weight, a draw's sign nearly noise."""

    def start(self, x, noise):
        return x * (1 + 4 * noise.normal("jitter", like=x)), None

    def finish(self, state, context):
        return state


def test_momentum_averages_over_iterations_what_draws_add_to_the_gradient():
    """At equal cost more of the optimum of a linear model, eps ‖w‖₁, is reached."""
    model, eps = weighted(), Fraction(1, 255)
    x = 0.5 + 0 * images(N)
    y = model(x).argmax(1)
    threat = NORMS["Linf"](eps)

    def gained(momentum: float) -> float:
        attack = component_of("pgd")(steps=40, eot=1, momentum=momentum, step=2.5, loss="margin")
        victim = Victim(
            Defense(Jitters(), model), Exact(), Tape(0, "attack", torch.arange(N)), Calls(N), stochastic=True
        )
        x_adv = attack.perturb(x, y, victim, threat).candidates[0]
        return float((margin(model(x_adv), y) - margin(model(x), y)).mean())

    plain, heavy = gained(0.0), gained(0.9)
    assert heavy > 1.5 * plain > 0
    assert "momentum 0.9" in component_of("pgd")(momentum=0.9).display(True)


def test_halving_begins_with_the_radius_and_ends_with_a_sixteenth():
    threat = NORMS["Linf"](EPS["Linf"])
    attack = component_of("pgd")(steps=20, eot=1, halving=True)
    sizes = [attack.size(k, threat) / threat.bound for k in range(20)]
    assert sizes == [1] * 5 + [1 / 2] * 4 + [1 / 4] * 4 + [1 / 8] * 3 + [1 / 16] * 4
    assert attack.ignored(True) == ("step",) and "halving" in attack.display(False)
    assert component_of("pgd")(steps=20, step_size=0.25, halving=True).size(19, threat) == 0.25 / 16
    assert {component_of("pgd")(steps=20).size(k, threat) for k in range(20)} == {2.5 * threat.bound / 20}


def test_without_returns_a_search_ends_where_it_stands():
    """And names itself otherwise; on a deterministic defense the two go apart at the first checkpoint that halves."""
    whole, plain = component_of("apgd")(steps=10, eot=1), component_of("apgd")(steps=10, eot=1, returns=False)
    assert plain.display(True) == whole.display(True).replace(")", ", no return)")
    (member,) = plain.members(True)
    x, y = images(N), torch.zeros(N, dtype=torch.long)
    victim = Victim(
        Defense(Jitters(), weighted()), Exact(), Tape(0, "attack", torch.arange(N)), Calls(N), stochastic=True
    )
    state = member.start(x, y, victim, NORMS["Linf"](EPS["Linf"]))
    for k in range(10):
        before = state["x"]
        state = member.step(k, state, x, y, victim, NORMS["Linf"](EPS["Linf"]))
        assert torch.equal(state["x_old"], before), "it goes on from where it was"
    assert (state["size"] < 2 * float(EPS["Linf"])).any(), "the step is halved as before"
    assert torch.equal(member.finish(state)[0], state["x"])


def test_the_packages_checkpoints_follow_another_length(make, monkeypatch):
    import pyautoattack
    from pyautoattack.autopgd_base import APGDAttack

    seen = []
    monkeypatch.setattr(
        pyautoattack.AutoAttack, "run_standard_evaluation",
        lambda self, x, y, **_: (seen.append(vars(self.apgd)), (x, y))[1],
    )  # fmt: skip
    attack = component_of("autoattack")(steps=20, eot=2, version="rand", backend="pyautoattack")
    x, y = images(4), torch.arange(4) % 3
    defense = Defense(make(("diffpure", {})), classifier())
    victim = Victim(defense, Exact(), Tape(0, "attack", torch.arange(4)), Calls(4), stochastic=True)
    attack.perturb(x, y, victim, NORMS["Linf"](EPS["Linf"]))
    fresh = vars(APGDAttack(classifier(), n_iter=20, norm="Linf", eps=0.1))
    for name in fresh:
        if "n_iter" in name or name == "size_decr":
            assert seen[0][name] == fresh[name], name
