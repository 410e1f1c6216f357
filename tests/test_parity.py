"""Our APGD against pyautoattack's, from one start: the same iterates, the same verdict on every image."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack

from attacks import NORMS, VIEWS, Victim
from attacks._autopgd import AutoPGD as APGD
from benchmark import registry
from purifiers import Tape
from tests.conftest import images, undefended

N, STEPS = 40, 100
EPS = {"Linf": Fraction(4, 255), "L2": Fraction(1, 10)}
"""Radii at which 30 to 70 % of the images survive."""


class Witness(torch.nn.Module):
    """A network that remembers every batch it was shown."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.net(x)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    """A small convolutional network in float64: random weights, steep first layers, ten classes equally likely."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(1, 8, 3, 1, 1), torch.nn.Conv2d(8, 16, 3, 2, 1), torch.nn.Linear(256, 10)
    with torch.no_grad():
        for layer, scale in zip(layers, (3.0, 3.0, 0.3), strict=True):
            layer.weight *= scale
        a, b, c = layers
        net = torch.nn.Sequential(a, torch.nn.SiLU(), b, torch.nn.SiLU(), torch.nn.Flatten(), c).double()
        c.bias -= net(images(200)).mean(0)
    return net.requires_grad_(False)


def start(norm: str, x: torch.Tensor) -> torch.Tensor:
    return NORMS[norm](EPS[norm]).random(x, Tape(5, "attack", torch.arange(len(x))))


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", NORMS)
def test_iterates_and_verdicts_are_the_packages(norm, loss, net, default_float64):
    threat, x = NORMS[norm](EPS[norm]), images(N)
    y, x_init = net(x).argmax(1), start(norm, x)

    theirs = Witness(net)
    package = APGDAttack(theirs, n_iter=STEPS, norm=norm, eps=threat.bound, loss=loss, device=x.device)
    package.init_hyperparam(x)
    *_, correct, _, x_package = package.attack_single_run(x, y, x_init=x_init)

    ours = Witness(net)
    victim = Victim(undefended(ours), VIEWS["exact"](), Tape(0, "attack", torch.arange(N)), rows=N, stochastic=False)
    attack = APGD(steps=STEPS, eot=1, loss=loss)
    state = attack.start(x, y, victim, threat, x_init=x_init)
    for k in range(STEPS):
        state = attack.step(k, state, x, y, victim, threat)
    (x_adv,) = attack.finish(state)

    assert len(ours.seen) == len(theirs.seen) == STEPS + 1
    for k, (a, b) in enumerate(zip(ours.seen, theirs.seen, strict=True)):
        assert (a - b).abs().max() < 1e-8, f"iterate {k}"
    assert 0.3 <= correct.float().mean() <= 0.7  # else agreement says nothing
    assert torch.equal(net(x_adv).argmax(1) == y, correct)
    assert torch.equal(net(x_package).argmax(1) == y, correct)
    assert torch.equal(state["broken_at"] < 0, correct)
    assert (victim.forwards, victim.backwards) == (STEPS + 1, STEPS + 1)
    assert (state["size"] < 2 * threat.bound).all()  # every image came through a halving and a return to its best


def test_the_wrong_momentum_would_be_noticed(net, default_float64):
    """Losing x_k - x_{k-1} before it is used, as one published tool does, leaves the package's path."""

    class Forgetful(APGD):
        def step(self, k, state, x, y, victim, threat):
            return super().step(k, state | {"x_old": state["x"]}, x, y, victim, threat)

    threat, x = NORMS["Linf"](EPS["Linf"]), images(N)
    y, x_init = net(x).argmax(1), start("Linf", x)
    paths = []
    for attack in (APGD(steps=5, eot=1), Forgetful(steps=5, eot=1)):
        witness = Witness(net)
        victim = Victim(
            undefended(witness), VIEWS["exact"](), Tape(0, "attack", torch.arange(N)), rows=N, stochastic=False
        )
        state = attack.start(x, y, victim, threat, x_init=x_init)
        for k in range(5):
            state = attack.step(k, state, x, y, victim, threat)
        paths.append(torch.stack(witness.seen))
    assert (paths[0] - paths[1]).abs().amax((1, 2, 3, 4)).max() > 1e-4


@pytest.mark.parametrize("steps", [10, 20, 37, 50, 100])
def test_checkpoints_are_the_papers(steps):
    """p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), in whole iterations as in the reference."""
    window, shorter, least = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    expected, counter = {}, 0
    for k in range(steps):
        counter += 1
        if counter == window:
            expected[k], counter, window = window, 0, max(window - shorter, least)
    assert APGD(steps=steps)._windows() == expected


def test_eot_on_a_deterministic_network_changes_nothing(net, default_float64):
    x = images(8)
    y, threat = net(x).argmax(1), NORMS["Linf"](EPS["Linf"])
    found = [
        registry.load("attacks", "apgd")(steps=20, eot=eot).perturb(
            x, y,
            Victim(undefended(net), VIEWS["exact"](), Tape(0, "attack", torch.arange(8)), rows=32, stochastic=True),
            threat,
        ).candidates
        for eot in (1, 2)
    ]  # fmt: skip
    assert torch.allclose(*found, rtol=0, atol=1e-12)
