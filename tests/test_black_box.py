"""Attacks that only look, and the low-frequency one: against the package, the exact optimum, and noise."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from attacks import NORMS, VIEWS, Calls, Victim
from attacks._gradient import margin
from attacks.lf import LF
from attacks.pgd import PGD
from attacks.spsa import SPSA
from attacks.square import Square, _peaks, _squares
from attacks.uniform import Uniform
from benchmark import cli, evaluate
from purifiers import Defense, Purifier, Tape
from tests.conftest import Linear, classifier, images, undefended

N = 32


def victim_of(defense: Defense, n: int = N, stochastic: bool | None = None) -> Victim:
    stochastic = defense.stochastic if stochastic is None else stochastic
    return Victim(defense, VIEWS["exact"](), Tape(0, "attack", torch.arange(n)), Calls(32), stochastic=stochastic)


class Noisy(Purifier):
    """x + sigma n."""

    def __init__(self, *, sigma: float):
        super().__init__()
        self.sigma = sigma

    def start(self, x, noise):
        return x + self.sigma * noise.normal("n", like=x), None

    def finish(self, state, context):
        return state


def linear(shape: tuple[int, int, int]) -> Linear:
    size = shape[0] * shape[1] * shape[2]
    return Linear(Tape(3, "images", torch.arange(10)).normal("w", like=torch.empty(10, size)) / 8, torch.zeros(10))


@pytest.mark.parametrize("norm, eps", [("Linf", Fraction(1, 20)), ("L2", Fraction(1, 2))])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 10, 10)])
def test_square_gains_what_the_packages_square_gains(norm, eps, shape):
    """The same budget on the same smooth and non-linear victims: the mean margins gained are close to each other."""
    from pyautoattack.square import SquareAttack

    x = 0.2 + 0.6 * images(N, shape, torch.float32)
    for model in (linear(shape), classifier(shape).float()):
        y = model(x).argmax(1)
        threat = NORMS[norm](eps)
        ours = Square(queries=300, eot=1).perturb(x, y, victim_of(undefended(model)), threat).candidates[0]
        with torch.random.fork_rng(), torch.no_grad():
            package = SquareAttack(
                model, p_init=0.8, n_queries=300, eps=float(eps), norm=norm, loss="margin", seed=0, device="cpu",
                resc_schedule=True,
            )  # fmt: skip
            package.init_hyperparam(x)
            theirs = _run_to_the_end(package, x, y)
        gained, expected = ((margin(model(z), y) - margin(model(x), y)).mean() for z in (ours, theirs))
        assert gained > 0 and gained > 0.8 * expected, (norm, shape, float(gained), float(expected))


def _run_to_the_end(package, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The package stops at the first wrong answer; a label that is never given makes it use all its queries."""
    z = package.predict
    package.predict = lambda v: torch.cat([z(v), z(v).amax(1, keepdim=True) + 1e6], 1)

    def without_the_decoy(v, labels):
        logits = z(v)
        own = logits.gather(1, labels[:, None])[:, 0]
        rest = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        return torch.full_like(own, 1.0), own - rest

    package.margin_and_loss = without_the_decoy
    return package.attack_single_run(x, y)[1]


@pytest.mark.parametrize("norm, eps", [("Linf", Fraction(1, 20)), ("L2", Fraction(1, 2))])
def test_more_queries_gain_more_and_never_as_much_as_the_gradient(norm, eps):
    """PGD reaches the exact optimum of a model with two classes, so nothing may gain more."""
    w = linear((1, 8, 8)).w[:1]
    x, model = 0.2 + 0.6 * images(N, (1, 8, 8), torch.float32), Linear(torch.cat([w, -w]), torch.zeros(2))
    y = model(x).argmax(1)
    threat, gains = NORMS[norm](eps), []
    for attack in (Uniform(queries=100, eot=1), Square(queries=100, eot=1), Square(queries=400, eot=1),
                   PGD(steps=40, eot=1, step=10.0)):  # fmt: skip
        found = attack.perturb(x, y, victim_of(undefended(model)), threat).candidates[0]
        gains.append(float((margin(model(found), y) - margin(model(x), y)).mean()))
    assert gains == sorted(gains), gains


@pytest.mark.parametrize("norm", Square.norms)
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_a_move_stays_in_the_ball_and_changes_at_most_its_squares(norm, side):
    x = 0.3 + 0.4 * images(4, (3, 8, 8))
    threat = NORMS[norm](Fraction(1, 10))
    move = {"Linf": _squares, "L2": _peaks}[norm]
    tape = Tape(0, "attack", torch.arange(4))
    start = move(x, x, threat.bound, side, tape, first=True)
    assert (threat.distance(start, x) <= threat.bound * (1 + 1e-9)).all()
    moved = start
    for k in range(20):
        before = moved
        moved = move(before, x, threat.bound, side, tape.fold(k), first=False)
        assert (threat.distance(moved, x) <= threat.bound * (1 + 1e-9)).all()
        changed = (moved != before).any(1).flatten(1).sum(1)
        assert (changed <= (1 if norm == "Linf" else 2) * max(side, 3 if norm == "L2" else 1) ** 2).all()
    assert not torch.equal(moved, start)


def test_under_noise_square_still_beats_random_noise():
    """Equal draws within a window: with fresh ones for every query, the best margin is a record of luck."""
    x, model = 0.2 + 0.6 * images(N, (1, 8, 8), torch.float32), linear((1, 8, 8))
    y, threat = model(x).argmax(1), NORMS["Linf"](Fraction(1, 20))
    defense = Defense(Noisy(sigma=0.5), model)
    gains = {}
    for name, attack in (("uniform", Uniform(queries=200, eot=4)), ("square", Square(queries=200, eot=4, refresh=50)),
                         ("fresh", Square(queries=200, eot=4, refresh=1))):  # fmt: skip
        victim = victim_of(defense)
        found = attack.perturb(x, y, victim, threat)
        assert victim.forwards == attack.evaluations(True) and victim.backwards == 0
        gains[name] = float((margin(model(found.candidates[0]), y) - margin(model(x), y)).mean())
    assert gains["square"] > 1.5 * gains["uniform"] > 0, gains


@pytest.mark.parametrize("attack", [Square(queries=40, eot=2, refresh=5), Uniform(queries=40, eot=2, refresh=5)])
def test_a_point_where_logits_overflow_is_kept(attack):
    """Right wherever logits are numbers, and none where one pixel falls: what looks has to return such a point."""

    class Overflowing(torch.nn.Module):
        def forward(self, x):
            z = torch.stack([x.mean((1, 2, 3)), -torch.ones(len(x))], 1)
            return torch.where(x[:, 0, 0, :1] < 0.5, torch.nan, z)

    x, threat = torch.full((8, 1, 4, 4), 0.55), NORMS["Linf"](Fraction(1, 10))
    defense = Defense(Noisy(sigma=0.0), Overflowing())
    found = attack.perturb(x, torch.zeros(8, dtype=torch.long), victim_of(defense, 8, True), threat)
    assert (found.broken_at >= 0).any() and defense(found.candidates[0])[found.broken_at >= 0].isnan().any(1).all()


def test_spsa_knows_the_gradient_of_a_pixel_at_the_end_of_its_range():
    """On a linear loss the mean over all sign vectors is the gradient, at 0 and 1 as inside."""
    model = linear((1, 2, 2))
    x = torch.tensor([0.0, 0.004, 0.5, 1.0]).view(1, 1, 2, 2)
    y = torch.tensor([0])
    exact = torch.autograd.grad(margin(model(leaf := x.clone().requires_grad_()), y).sum(), leaf)[0]
    found = SPSA(samples=4000, eot=1, steps=1).look(0, x, x, y, victim_of(undefended(model), 1)).gradient
    assert torch.allclose(found, exact, atol=0.1 * float(exact.norm()))


def test_lf_reaches_the_optimum_among_block_perturbations():
    """On a linear model the best block-constant perturbation in Linf is eps times the sign of each block's sum of w."""
    w = Tape(4, "images", torch.arange(1)).normal("w", like=torch.empty(1, 100))
    model = Linear(torch.cat([w, -w]), torch.zeros(2))
    x = 0.3 + 0.4 * images(8, (1, 10, 10), torch.float32)
    y = model(x).argmax(1)
    threat = NORMS["Linf"](Fraction(1, 32))
    found = LF(steps=20, eot=1, block=4, step=10.0).perturb(x, y, victim_of(undefended(model), 8), threat).candidates[0]
    sums = torch.zeros(3, 3)
    for r in range(10):
        for c in range(10):
            sums[r // 4, c // 4] += w.view(10, 10)[r, c]
    block = sums.sign().repeat_interleave(4, 0).repeat_interleave(4, 1)[:10, :10]
    side = (1 - 2.0 * y).view(-1, 1, 1, 1)
    assert torch.allclose(found, x - side * threat.bound * block, atol=1e-6)


class Rounding(Purifier):
    """Pixels to 16 levels: nothing to differentiate."""

    stochastic = False

    def start(self, x, noise):
        return (15 * x).round() / 15, None

    def finish(self, state, context):
        return state


def test_spsa_needs_no_gradient_and_comes_near_the_optimum():
    x, model = 0.2 + 0.6 * images(N, (1, 8, 8), torch.float32), linear((1, 8, 8))
    y, threat = model(x).argmax(1), NORMS["Linf"](Fraction(1, 10))
    gains = {}
    for name, attack, defense in (
        ("optimum", PGD(steps=20, eot=1, loss="margin"), undefended(model)),
        ("spsa", SPSA(steps=20, eot=1, samples=64), undefended(model)),
        ("blocked", PGD(steps=20, eot=1, loss="margin", random_start=False), Defense(Rounding(), model)),
        ("rounded", SPSA(steps=20, eot=1, samples=64, delta=0.05), Defense(Rounding(), model)),
    ):
        victim = victim_of(defense)
        found = attack.perturb(x, y, victim, threat).candidates[0]
        assert victim.backwards == attack.gradients(False) and victim.forwards == attack.evaluations(False)
        with torch.no_grad():
            gains[name] = float((margin(defense(found), y) - margin(defense(x), y)).mean())
    assert gains["blocked"] == 0
    assert gains["spsa"] > 0.7 * gains["optimum"] and gains["rounded"] > 0.5 * gains["optimum"], gains


def test_transfer_differentiates_its_source_and_asks_the_defense_nothing(tmp_path):
    from benchmark import load

    defense = load("vae", "resnet")
    settings = dict(budget="quick", n=4, out=tmp_path, quiet=True)
    by_transfer = evaluate(defense, attack="transfer:steps=3", **settings)
    by_view = evaluate(defense, attack="pgd:steps=3", attacker="identity", **settings)
    assert by_transfer.rows[0]["display"] == "PGD-CE (3 it, EOT 4) from identity"
    pairs = zip(by_transfer.records, by_view.records, strict=True)
    assert all(a["adv"] == b["adv"] and a["distance"] == b["distance"] for a, b in pairs)
    import json

    identity = json.loads((by_transfer.folder / "run.json").read_text())["identity"]
    assert identity["attacker"] is None and "source=identity" in identity["attack"]
    assert identity["weights"]["attack.source"] == "identity:rounds=1"
    assert by_transfer.rows[0]["robust_any_iteration"] is None  # its loop never saw the defense
    assert cli.main(["plan", "--attack", "transfer:source=vaee"]) == cli.USAGE


def test_the_identity_attack_reads_the_clean_accuracy(tmp_path):
    result = evaluate(undefended(classifier().float()), data=(images(8, dtype=torch.float32), torch.arange(8)),
                      attack="identity", eps="0.1", n=8, out=tmp_path, quiet=True)  # fmt: skip
    assert result.rows[0]["robust"] == result.rows[0]["clean"] and result.rows[0]["display"] == "none"
