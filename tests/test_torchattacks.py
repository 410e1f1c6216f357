"""Attacks of torchattacks by name: all of them, inside the run's threat model, and none under a false name."""

from __future__ import annotations

import inspect
import sys
from fractions import Fraction

import pytest
import torch
import torchattacks

from attacks import NORMS, VIEWS, Calls, Victim
from attacks._gradient import margin
from attacks.torchattacks import TorchAttacks
from benchmark import cli, constructors, evaluate, registry
from benchmark.errors import UsageError
from purifiers import Defense, Tape
from tests.conftest import classifier, images, undefended
from tests.test_black_box import Noisy

ALL = sorted(name for name, value in vars(torchattacks).items() if inspect.isclass(value))
LITTLE = {"steps": 2, "queries": 5, "eot": 2, "nb_sample": 4, "binary_search_steps": 1, "noise_batch_size": 2}


def runs_here(name: str) -> bool:
    try:
        TorchAttacks.of(name)
    except ValueError:
        return False
    return True


def victim(defense: Defense, n: int) -> Victim:
    tape = Tape(0, "attack", torch.arange(n))
    return Victim(defense, VIEWS["exact"](), tape, Calls(32), stochastic=defense.stochastic)


def test_what_is_refused_and_why():
    refused = {"AutoAttack", "MultiAttack", "VANILA", "GN", "LGV", "JSMA", "OnePixel", "Pixle", "SparseFool", "EADL1"}
    assert {name for name in ALL if not runs_here(name)} == refused
    reasons = {
        "AutoAttack": "10 iterations instead of 100", "autoattack": "use --attack autoattack",
        "OnePixel": "searches under L0", "PGDD": "has no attack 'PGDD'; it has APGD, ",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(UsageError, match=reason):
            registry.load("attacks", "torchattacks", name)
    with pytest.raises(UsageError, match="needs the name"):
        evaluate(undefended(classifier().float()), data=(images(2, dtype=torch.float32), torch.arange(2)),
                 attack="torchattacks", eps="0.1", n=2, quiet=True)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ALL if runs_here(name)])
@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_any_other_runs_inside_the_ball_and_repeats(name, sigma):
    shape = (3, 12, 12) if name in ("DIFGSM", "TIFGSM") else (3, 8, 8)
    component = registry.load("attacks", "torchattacks", name)
    known = constructors.options(component)
    little = LITTLE | ({"steps": 10} if name == "EADEN" else {})  # it divides by a tenth of its iterations
    attack = component(**{k: p.default for k, p in known.items()} | {k: v for k, v in little.items() if k in known})
    model = classifier(shape).float()
    defense = Defense(Noisy(sigma=sigma), model)
    defense.purifier.stochastic = sigma > 0
    x = images(3, shape, torch.float32)
    y = model(x).argmax(1)
    for norm in component.norms:
        threat = NORMS[norm](Fraction(1, 16))
        before = torch.get_rng_state()
        first, second = (attack.perturb(x, y, victim(defense, 3), threat) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert (first.distances <= threat.bound).all()
        assert torch.equal(first.candidates, second.candidates)
        assert first.forwards > 0
        if sigma == 0 and not component.black_box and not component.restricted:
            with torch.no_grad():
                gained = margin(model(first.candidates[0]), y) - margin(model(x), y)
            least = -0.01 if name == "TPGD" else -1e-6  # it climbs the divergence from the output at x, either way
            assert gained.min() > least and gained.max() > 0, f"{name} doesn't attack"


def test_iterations_are_told_and_printed(tmp_path):
    x, y = images(4, dtype=torch.float32), torch.arange(4)
    defense = undefended(classifier().float())
    rows = {}
    for attack in ("torchattacks:PGD", "torchattacks:PGD,steps=3", "torchattacks:PGDL2,steps=3"):
        result = evaluate(defense, (x, y), attack, eps="0.1", budget="quick", n=4, out=tmp_path, quiet=True)
        rows[attack] = result.rows[0]
    version = "torchattacks 3."
    assert rows["torchattacks:PGD"]["display"].startswith(f"PGD (20 it, {version}")
    assert rows["torchattacks:PGD,steps=3"]["display"].startswith(f"PGD (3 it, {version}")
    assert rows["torchattacks:PGDL2,steps=3"]["norm"] == "L2"


def test_a_norm_that_the_attack_does_not_search_is_an_error(capsys):
    assert cli.main(["plan", "--attack", "torchattacks:PGDL2", "--norm", "Linf"]) == cli.USAGE
    assert "searches under L2, not under Linf" in capsys.readouterr().err
    assert cli.main(["plan", "--attack", "torchattacks:PGD,stepz=3"]) == cli.USAGE
    assert "did you mean steps" in capsys.readouterr().err


def test_options_that_the_package_cannot_run_are_told_before_the_run(capsys):
    for spec, reason in (("EADEN,steps=5", "ZeroDivisionError"), ("TIFGSM,kernel_name=foo", "NotImplementedError")):
        assert cli.main(["plan", "--attack", f"torchattacks:{spec}"]) == cli.USAGE
        assert reason in capsys.readouterr().err


def test_its_cost_is_counted_and_its_seed_is_the_runs(tmp_path, monkeypatch):
    assert registry.load("attacks", "torchattacks", "VMIFGSM")(steps=5, N=5).cost == (30, 30)
    square = registry.load("attacks", "torchattacks", "Square")
    assert square.black_box and not registry.load("attacks", "torchattacks", "PGD").black_box
    seeds, made = [], TorchAttacks._made

    def seen(self, model, norm, bound, seed, classes):
        seeds.append(seed)
        return made(self, model, norm, bound, seed, classes)

    attack = square(queries=3)
    monkeypatch.setattr(TorchAttacks, "_made", seen)
    x, y = images(4, dtype=torch.float32), torch.arange(4)
    for seed, first in ((0, 0), (1, 0), (1, 32)):
        of = victim(undefended(classifier().float()), 4)
        of.tape = Tape(seed, "attack", first + torch.arange(4))
        attack.perturb(x, y, of, NORMS["Linf"](Fraction(1, 16)))
    assert len(set(seeds)) == 3


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(UsageError, match="pip install --no-deps torchattacks"):
        registry.load("attacks", "torchattacks", "PGD")
