"""Attacks that look inside a purification: the deviated reconstruction and the encoder's displacement, by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from attacks import NORMS, VIEWS, Calls, NotApplicable, Victim
from attacks._gradient import ce
from attacks.diffattack import DiffAttack
from attacks.encoder import Encoder
from benchmark import constructors, evaluate, registry
from purifiers import Defense, Purifier, Tape
from tests.conftest import classifier, images, undefended

N = 3


def victim_of(defense: Defense) -> Victim:
    return Victim(defense, VIEWS["exact"](keep=1), Tape(0, "attack", torch.arange(N)), Calls(N), stochastic=True)


def deviation(purifier, x: torch.Tensor, tape: Tape) -> torch.Tensor:
    """mean_k ‖z_k - z̄_k‖² / d over the states after every reverse step and all rounds, in plain loops."""
    found = []
    for r in range(purifier.rounds):
        noise = tape.fold("round", r)
        z, context = purifier.start(x, noise)
        entered = purifier.enter(x, noise)[0]
        n = noise.normal("diffuse", like=entered)
        for k in range(purifier.steps):
            z = purifier.step(k, z, context, noise)
            alpha_bar = purifier.denoiser.alpha_bar(purifier.times[k + 1])
            straight = alpha_bar**0.5 * entered + (1 - alpha_bar) ** 0.5 * n
            found.append((z - straight).square().flatten(1).mean(1))
        x = purifier.finish(z, context)
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        ("diffpure", {"rule": "sde"}), ("diffpure", {"rule": "eta"}), ("diffpure", {"rule": "eta", "rounds": 2}),
        ("latent", {"rule": "eta"}), ("diffusevae", {}), ("gdmp", {"t_star": 0.1}),
    ],
    ids=str,
)  # fmt: skip
def test_diffattack_climbs_the_loss_and_the_deviation(case, copies, make):
    purifier = make(case)
    defense, x, y = Defense(purifier, classifier(), copies=copies), images(N), torch.arange(N)
    victim = victim_of(defense)
    found = DiffAttack(weight=7.0, eot=1, steps=1).look(0, x, x, y, victim)
    tape = victim.tape.fold("pgd", 0).draws(1)
    inner = tape if copies == 1 else tape.fold("copies", copies).draws(copies)
    z = x.clone().requires_grad_()
    strayed = deviation(purifier, z.repeat_interleave(copies, 0), inner).unflatten(0, (N, copies)).mean(1)
    loss = ce(defense(z, tape), y) + 7.0 * strayed
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert torch.allclose(found.loss, loss.detach(), rtol=1e-10)
    assert torch.allclose(found.gradient, gradient, rtol=1e-8, atol=1e-12)
    assert (strayed > 1e-4).all()


def test_diffattack_on_a_purifier_without_a_path_takes_what_it_gives_back(make):
    purifier, x, y = make(("vae", {})), images(N), torch.arange(N)
    defense = Defense(purifier, classifier())
    victim = victim_of(defense)
    found = DiffAttack(weight=3.0, eot=1, steps=1).look(0, x, x, y, victim)
    tape = victim.tape.fold("pgd", 0).draws(1)
    z = x.clone().requires_grad_()
    loss = ce(defense(z, tape), y) + 3.0 * 4 * (purifier(z, tape) - z).square().flatten(1).mean(1)
    assert torch.allclose(found.loss, loss.detach(), rtol=1e-10)
    assert torch.allclose(found.gradient, torch.autograd.grad(loss.sum(), z)[0], rtol=1e-8, atol=1e-12)


def test_the_encoder_attack_drives_the_code_away_and_further_than_noise(make):
    purifier, x, y = make(("vae", {"temperature": 0.0})), images(N), torch.arange(N)
    defense, threat = Defense(purifier, classifier()), NORMS["Linf"](Fraction(1, 16))
    victim = victim_of(defense)

    def moved(to: torch.Tensor) -> torch.Tensor:
        tape = Tape(0, "x", torch.arange(N))
        with torch.no_grad():
            return (purifier.start(to, tape)[0] - purifier.start(x, tape)[0]).square().flatten(1).mean(1)

    found = Encoder(eot=1, steps=20).perturb(x, y, victim, threat).candidates[0]
    noise = threat.control(x, Tape(0, "random", torch.arange(N)))
    assert (moved(found) > 2 * moved(noise)).all()
    near = x + 0.01 * (images(2 * N)[N:] - 0.5)
    look = Encoder(eot=1, steps=1).look(0, near, x, y, victim)
    assert torch.allclose(look.loss, moved(near), rtol=1e-10)


def test_the_encoder_attack_asks_for_an_encoder(make):
    for case in (("diffpure", {}), ("identity", {})):
        with pytest.raises(NotApplicable, match="needs a purifier that encodes"):
            Encoder(eot=1, steps=1).perturb(
                images(N), torch.arange(N), victim_of(Defense(make(case), classifier())), NORMS["Linf"](Fraction(1, 16))
            )
    assert not {"random_start", "iterate", "loss"} & set(constructors.options(Encoder))


class Quantised(Purifier):
    """Pairs of pixels to a codebook of four grey values, by their mean; the gradient passes the codebook by."""

    stochastic, encodes = False, True

    def start(self, x, noise):
        return (x[..., ::2] + x[..., 1::2]) / 2, None

    def codes(self, state):
        return (4 * state).floor().clamp(0, 3).long()

    def finish(self, state, context):
        value = (self.codes(state).to(state) + 0.5) / 4
        return (state + (value - state).detach()).repeat_interleave(2, -1)


def test_an_attack_on_a_codec_records_how_many_codes_it_flipped(tmp_path):
    x = 0.1 + 0.8 * images(8, dtype=torch.float32)
    defense = Defense(Quantised(), classifier().float())
    settings = {"eps": "0.1", "n": 8, "out": tmp_path, "quiet": True, "preflight": False}
    flips = {}
    for attack in ("encoder:steps=20", "uniform:queries=1", "identity"):
        result = evaluate(defense, (x, torch.zeros(8).long()), attack, **settings)
        flips[attack] = [r["code_flips"] for r in result.records]
        x_adv = torch.from_numpy(np.load(result.folder / "adversarial.npy"))
        before, after = (defense.purifier.codes(defense.purifier.start(z, None)[0]) for z in (x, x_adv))
        assert flips[attack] == pytest.approx((before != after).flatten(1).double().mean(1).tolist())
    assert sum(flips["encoder:steps=20"]) > 1.3 * sum(flips["uniform:queries=1"]) > 0 == sum(flips["identity"])
    plain = evaluate(undefended(classifier().float()), (x, torch.zeros(8).long()), "identity", **settings)
    assert {r["code_flips"] for r in plain.records} == {None}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_iterate_of_lf_is_constant_on_blocks(norm):
    """At the default step, away from the box: the start's high frequencies would otherwise stay in."""
    x = torch.full((N, 1, 10, 10), 0.5, dtype=torch.float64)
    defense = Defense(registry.load("purifiers", "identity")(), classifier((1, 10, 10)))
    attack = registry.load("attacks", "lf")(steps=5, eot=1)
    seen = []
    found = attack.perturb(
        x, torch.arange(N), victim_of(defense), NORMS[norm](Fraction(1, 10)),
        watch=lambda k, state: seen.append(state["x_adv"].clone()),
    )  # fmt: skip
    for z in [*(s[0] for s in seen), found.candidates[0]]:
        delta = z - x
        for r in range(0, 10, 4):
            for c in range(0, 10, 4):
                block = delta[..., r : r + 4, c : c + 4].flatten(2)
                assert (block.amax(2) - block.amin(2)).max() < 1e-12
        assert delta.abs().flatten(1).amax(1).min() > 1e-3
    assert not torch.equal(seen[0], seen[-1])
