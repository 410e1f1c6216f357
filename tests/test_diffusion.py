"""The diffusion families: one chain, conditions and structure in the denoiser, closed forms where there are any."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import avg_pool2d

from benchmark.train import _grow
from purifiers import Batch, Tape, _objectives, _structure
from purifiers._critics import Levels
from purifiers._denoiser import Denoiser, unet
from purifiers._sampler import diffuse
from purifiers._schedule import VP
from purifiers.decoder import Decoder
from purifiers.diffpure import DiffPure
from purifiers.diffusevae import DiffuseVAE
from purifiers.gdmp import GDMP
from purifiers.langevin import Langevin
from purifiers.latent import Latent
from purifiers.vae import VAE
from tests.conftest import SHAPE, images
from tests.test_sampler import VP_1000, Analytic, M, S, Wavy

B = 4
ETA = {"rule": "eta", "t_star": 0.2, "steps": 3}


def tape(n: int = B, role: str = "clean") -> Tape:
    return Tape(0, role, torch.arange(n))


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-11) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


class Beside(torch.nn.Module):
    """A smooth net that takes an image beside z, and depends on its label."""

    def forward(self, fed, label):
        z, beside = fed.chunk(2, 1)
        return torch.sin(3 * z + label.view(-1, 1, 1, 1) / 100) + 0.3 * torch.cos(2 * beside) * z


# t_star


@pytest.mark.parametrize("family", [DiffPure, GDMP])
def test_t_star_0_is_the_identity(family):
    x = images(B)
    purifier = family(Wavy(), t_star=0.0)
    assert purifier.steps == 0 and close(purifier(x, tape()), x)


@pytest.mark.parametrize("formulation", [1, 2])
def test_t_star_0_is_the_identity_whatever_the_structure_says(formulation, make):
    purifier = make(("diffusevae", {"t_star": 0.0, "formulation": formulation}))
    assert close(purifier(images(B), tape()), images(B))


def test_t_star_0_in_latents_leaves_the_autoencoder_alone(make):
    latent = make(("latent", {"t_star": 0.0}))
    assert close(latent(images(B), tape()), VAE(latent.autoencoder, temperature=0.0)(images(B), tape()))


def test_a_list_of_times_is_one_chain_after_the_other():
    x, z = images(B), 2 * images(B) - 1
    got = DiffPure(Wavy(), rule="eta", t_star=[0.2, 0.1], steps=2)(x, tape())
    for chain, t in enumerate((0.2, 0.1)):
        noise = tape().fold("round", 0)
        z = diffuse(z, VP_1000.table[round(1000 * t) - 1], noise.fold("chain", 1) if chain else noise)
        one = DiffPure(Wavy(), rule="eta", t_star=t, steps=2)
        for i in range(2):
            z = one.rule(one.denoiser, z, one.times[i], one.times[i + 1], 2 * chain + i, noise)
    assert close(got, ((z + 1) / 2).clamp(0, 1))


@pytest.mark.parametrize("labels", ["index", "continuous"])
@pytest.mark.parametrize("rule", ["sde", "ode", "eta"])
def test_a_random_t_star_is_each_rows_own(rule, labels):
    """Every row is what a purifier with that row's t_star gives; the times fill the interval."""
    n, options = 6, {"rule": rule, "labels": labels, "steps": 3}
    x, spread = images(n), 0.05
    purifier = DiffPure(Wavy(), t_star=0.2, spread=spread, **options)
    u = tape(n).fold("round", 0).uniform("t_star", like=x[:, :1, :1, :1]).flatten()
    got, stars = purifier(x, tape(n)), 0.2 + spread * (2 * u - 1)
    assert 0.15 <= stars.min() and stars.max() <= 0.25 and stars.max() - stars.min() > 0.04
    for i, t in enumerate(stars.tolist()):
        expected = DiffPure(Wavy(), t_star=round(t, 3), **options)(x, tape(n))
        assert close(got[i], expected[i], 1e-9)


# A Gaussian prior, whose exact denoiser is affine: mean and variance of a chain follow without sampling


class Constant:
    """Noise that is one number everywhere."""

    def __init__(self, value: float):
        self.value = value

    def normal(self, *site, like):
        return torch.full_like(like, self.value)

    uniform = normal

    def fold(self, *site):
        return self

    def draws(self, count):
        return self


class AnalyticContinuous(torch.nn.Module):
    """The exact denoiser of N(M, S²) in continuous time."""

    def forward(self, z, label):
        a = VP_1000.alpha_bar(label.double() / 999).view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (z - a.sqrt() * M) / (a * S**2 + 1 - a)


def moments(purifier: DiffPure, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance after the chain: every step is z' = A z + b + c ξ, read off at z = 0 and 1, ξ = 0 and 1."""
    unit = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for k in range(purifier.steps):

        def step(z, xi, k=k):
            return float(purifier.step(k, z * unit, purifier.enter(unit, Constant(0.0))[1], Constant(xi)))

        b, c = step(0.0, 0.0), step(0.0, 1.0) - step(0.0, 0.0)
        slope = step(1.0, 0.0) - b
        mean, variance = slope * mean + b, slope**2 * variance + c**2
    return mean, variance


def error(rule: str, steps: int, eta: float = 0.0) -> tuple[float, float]:
    """How far mean and variance of p_t, t = 0.5, are from N(M, S²) after the reverse chain."""
    more = {"eta": eta} if rule == "eta" else {}
    purifier = DiffPure(AnalyticContinuous(), t_star=0.5, steps=steps, rule=rule, labels="continuous", **more)
    a = VP_1000.alpha_bar(0.5)
    mean, variance = moments(purifier, math.sqrt(a) * M, a * S**2 + 1 - a)
    return abs(mean - M), abs(variance - S**2)


@pytest.mark.parametrize("rule", ["sde", "ode", "eta"])
def test_mean_and_variance_are_reached_at_the_first_order(rule):
    """Twice the steps, half the error."""
    errors = [error(rule, steps) for steps in (125, 250, 500)]
    assert errors[-1][0] < 0.02 * M + 1e-3 and errors[-1][1] < 0.15 * S**2
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse[1] / fine[1] == pytest.approx(2, rel=0.25)


def test_euler_maruyama_converges_to_the_eta_rule():
    """Started from one point far out, both laws near one another: half the distance at twice the steps, from 50."""
    gaps = []
    for steps in (50, 100, 200):
        ends = []
        for rule in ("sde", "eta"):
            purifier = DiffPure(AnalyticContinuous(), t_star=0.2, steps=steps, rule=rule, labels="continuous")
            ends.append(moments(purifier, 0.5, 0.0))
        gaps.append([abs(a - b) for a, b in zip(*ends, strict=True)])
    for coarse, fine in zip(gaps, gaps[1:], strict=False):
        assert fine[0] < 0.7 * coarse[0] and fine[1] < 0.7 * coarse[1]
    assert gaps[-1][0] < 0.05 * abs(0.5 - M) and gaps[-1][1] < 0.1 * S**2


@pytest.mark.parametrize("x", [0.3, 0.7])
def test_langevin_samples_the_prior_times_the_anchor(x):
    """Stationary law of p_t(z) exp(-(z - z_x)² / (2 anchor²)): mean and variance, as rate falls."""
    t, anchor = 0.05, 0.2
    a = VP_1000.table[49]
    v, z_x = a * S**2 + 1 - a, 2 * x - 1
    precision = 1 / v + 1 / anchor**2
    mean, variance = (math.sqrt(a) * M / v + z_x / anchor**2) / precision, 1 / precision
    gaps = []
    for rate in (2e-3, 1e-3):
        purifier = Langevin(Analytic(), t_star=t, steps=1, rate=rate, anchor=anchor, eta=1.0)
        context = purifier.enter(torch.full((1, 1, 1, 1), x, dtype=torch.float64), Constant(0.0))[1]

        def step(z, xi, purifier=purifier, context=context):
            return float(purifier.step(0, torch.full((1, 1, 1, 1), z, dtype=torch.float64), context, Constant(xi)))

        b, c = step(0.0, 0.0), step(0.0, 1.0) - step(0.0, 0.0)
        slope = step(1.0, 0.0) - b
        assert b / (1 - slope) == pytest.approx(mean, rel=1e-9)
        gaps.append(abs(c**2 / (1 - slope**2) - variance))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1) and gaps[1] < 0.05 * variance


# Guidance


def test_guidance_is_the_score_less_the_pull():
    z, x, noise = 2 * images(B) - 1, 2 * images(B, dtype=torch.float64).flip(0) - 1, tape()
    plain = Denoiser(Wavy(), VP_1000)
    a = VP_1000.table[199]
    r_t = math.sqrt(a) * x + math.sqrt(1 - a) * noise.normal("diffuse", like=x)
    for matched, w in ((False, 0.7), (True, 0.7 * math.sqrt((1 - a) / a))):
        pulled = plain.edited(_structure.guided(x, noise, strength=0.7, matched=matched))
        zz = z.clone().requires_grad_()
        (pull,) = torch.autograd.grad(0.5 * (zz - r_t).square().sum(), zz)
        assert close(pulled.score(z, 0.2), plain.score(z, 0.2) - w * pull)


def test_without_strength_gdmp_is_diffpure():
    x, options = images(B), {**ETA, "t_star": [0.2, 0.1]}
    assert close(GDMP(Wavy(), strength=0.0, **options)(x, tape()), DiffPure(Wavy(), **options)(x, tape()))
    assert not close(GDMP(Wavy(), strength=0.5, **options)(x, tape()), DiffPure(Wavy(), **options)(x, tape()), 1e-3)


@pytest.mark.parametrize("t_star, steps, strengths", [(0.2, 40, (0.0, 5.0, 20.0, 45.0)), (0.25, 3, (0.0, 0.7, 1.4))])
def test_the_stronger_the_pull_the_nearer_the_input(t_star, steps, strengths):
    x, far = 0.4 + 0.2 * images(B), []
    for strength in strengths:
        purifier = GDMP(Analytic(), t_star=t_star, steps=steps, strength=strength, weighting="constant")
        far.append(float((purifier(x, tape()) - x).norm()))
    assert far == sorted(far, reverse=True) and far[-1] < 0.9 * far[0]


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("rule, eta", [("eta", 1.0), ("eta", 0.0), ("sde", 1.0), ("ode", 1.0)])
def test_a_pull_that_overshoots_is_refused_where_a_step_would_land_on_the_reference(rule, eta, matched):
    """At the strongest pull allowed one of the steps takes z - r_t away; by a thousandth more it is an error."""
    options = {"t_star": 0.2, "steps": 3, "rule": rule, "eta": eta, "weighting": "matched" if matched else "constant"}
    with pytest.raises(ValueError, match="overshoots: with these steps it must be at most") as refused:
        GDMP(Wavy(), strength=1e9, **options)
    most = float(str(refused.value).split("at most ")[1].split(";")[0])
    with pytest.raises(ValueError, match="overshoots"):
        GDMP(Wavy(), strength=1.01 * most, **options)

    class Silent(torch.nn.Module):
        def forward(self, z, label):
            return torch.zeros_like(z)

    purifier, left = GDMP(Silent(), strength=0.99 * most, **options), []
    context = purifier.enter(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), Constant(0.0))[1]  # r = 0
    unpulled = DiffPure(Silent(), **{k: v for k, v in options.items() if k != "weighting"})
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for k in range(3):
        moved = unpulled.step(k, one, context, Constant(0.0)) - purifier.step(k, one, context, Constant(0.0))
        left.append(1 - float(moved))
    assert min(left) == pytest.approx(0.01, abs=0.01) and max(left) < 1


# Structure


def test_a_low_pass_takes_means_of_cells():
    v = images(B)
    assert close(_structure.low_pass(v, 1), v)
    cells = avg_pool2d(v, 4)
    assert close(_structure.low_pass(v, 8), v.mean((2, 3), keepdim=True).expand_as(v))
    assert close(avg_pool2d(_structure.low_pass(v, 4), 8), cells.mean((2, 3), keepdim=True), 0.02)
    odd = images(B, (1, 7, 7))
    assert _structure.low_pass(odd, 3).shape == odd.shape


@pytest.mark.parametrize("factor", [4, 7])
def test_a_low_pass_is_no_projection(factor):
    """Of differences between the means of neighbouring cells some 40 % (rms) stay, as ``low_passed`` says."""
    v = torch.randn(64, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def cells(x: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(x, factor)

    left = cells(v - _structure.low_pass(v, factor)).square().mean().sqrt() / cells(v).square().mean().sqrt()
    assert 0.33 < left < 0.48


def test_to_replace_every_frequency_is_to_return_the_reconstruction(make):
    case = ("diffusevae", {"parts": "tiny-free", "formulation": 0, "structure": "lowpass", "factor": 1})
    purifier = make(case)
    x_hat = VAE(purifier.stage1, temperature=0.0)(images(B), tape())
    assert close(purifier(images(B), tape()), x_hat, 1e-9)


def test_low_frequencies_are_those_of_the_reconstruction_the_others_are_not(make):
    case = ("diffusevae", {"parts": "tiny-free", "formulation": 0, "structure": "lowpass", "factor": 8, "t_star": 0.05})
    purifier = make(case)
    x = 0.45 + 0.1 * images(B)  # no clamp acts
    x_hat, out = VAE(purifier.stage1, temperature=0.0)(x, tape()), purifier(x, tape())
    assert 0 < out.min() and out.max() < 1
    assert close(out.mean((2, 3)), x_hat.mean((2, 3)), 1e-9) and not close(out, x_hat, 1e-2)


# Conditions


def test_formulation_2_is_formulation_1_on_u_plus_the_reconstruction():
    """DiffuseVAE's own posterior, in x_t = u_t + x̂, step by step: mean c1 x0 + c2 x_t + (1 - c2) x̂."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stage1 = VAE.parts(SHAPE)["autoencoder"].double().eval()
    purifier = DiffuseVAE(stage1, Beside(), t_star=0.01, steps=10, formulation=2)
    x, noise = images(B), tape().fold("round", 0)
    x_hat = 2 * VAE(stage1, temperature=0.0)(x, tape()) - 1
    table = VP_1000.table
    state = math.sqrt(table[9]) * (2 * x - 1) + x_hat + math.sqrt(1 - table[9]) * noise.normal("diffuse", like=x)
    for k, i in enumerate(range(9, -1, -1)):
        a, a_next = table[i], table[i - 1] if i else 1.0
        beta = 1 - a / a_next
        n = Beside()(torch.cat((state, x_hat), 1), torch.full((B,), i))
        x0 = (state - x_hat - math.sqrt(1 - a) * n) / math.sqrt(a)
        c1, c2 = math.sqrt(a_next) * beta / (1 - a), math.sqrt(1 - beta) * (1 - a_next) / (1 - a)
        mean = c1 * x0 + c2 * state + (1 - c2) * x_hat
        if not i:
            state = x0 + x_hat  # the last step returns x0 + x̂
            break
        state = mean + math.sqrt(beta * (1 - a_next) / (1 - a)) * noise.normal("reverse", k, like=x)
    assert close(purifier(x, tape()), ((state - x_hat + 1) / 2).clamp(0, 1), 1e-9)


@pytest.mark.parametrize("case", [{}, {"formulation": 2}, {"parts": "tiny-z"}], ids=str)
def test_condition_off_is_unconditional(case, make):
    """With condition=0 the net is one of z and t alone, fed zeros: nothing of x comes in but through the diffusion."""
    purifier = make(("diffusevae", case | {"condition": 0.0} | ETA))

    class Unconditional(torch.nn.Module):
        def forward(self, z, label):
            fed = torch.nn.functional.pixel_unshuffle(torch.cat((z, torch.zeros_like(z)), 1), 2)
            more = {"class_labels": z.new_zeros(len(z), 32)} if purifier.embed is not None else {}
            return torch.nn.functional.pixel_shuffle(purifier.unet(fed, label, **more).sample, 2)

    assert close(purifier(images(B), tape()), DiffPure(Unconditional(), **ETA)(images(B), tape()))
    assert not close(make(("diffusevae", case | ETA))(images(B), tape()), purifier(images(B), tape()), 1e-4)


def test_the_condition_is_extrapolated(make):
    z, context = 2 * images(B) - 1, None
    off, on, more = (make(("diffusevae", {"condition": w} | ETA)) for w in (0.0, 1.0, 2.5))
    n = []
    for purifier in (off, on, more):
        context = purifier.enter(images(B), tape())[1]
        n.append(purifier.denoising(0, context, tape()).noise(z, 0.2))
    assert close(n[2], n[0] + 2.5 * (n[1] - n[0]))
    assert (off.nfe, on.nfe, more.nfe) == (4, 4, 7)


def test_a_decoder_without_its_code_draws_from_nothing(make):
    without = make(("decoder", {"condition": 0.0} | ETA))

    class Unconditional(torch.nn.Module):
        def forward(self, z, label):
            fed = torch.nn.functional.pixel_unshuffle(torch.cat((z, torch.zeros_like(z)), 1), 2)
            return torch.nn.functional.pixel_shuffle(without.unet(fed, label).sample, 2)

    grey = torch.full_like(images(B), 0.5)
    assert close(without(images(B), tape()), DiffPure(Unconditional(), eta=0.0, **ETA)(grey, tape()))
    assert close(without(images(B), tape()), without(images(B).flip(0), tape()))
    within = make(("decoder", ETA))
    assert not close(within(images(B), tape()), within(images(B).flip(0), tape()), 1e-4)


def test_a_chain_from_noise_sees_the_image_through_stage_1_alone(make):
    """Two images with one reconstruction are purified alike."""
    purifier = make(("diffusevae", {"begin": "noise", "t_star": 1.0}))
    x_hat, code = purifier._seen(images(B), tape(), 0.0)
    purifier._seen = lambda x, noise, temperature: (x_hat, code)
    assert close(purifier(images(B), tape()), purifier(images(B).flip(0), tape()))


def test_a_network_that_grew_does_what_it_did():
    """Fine-tuning with a condition starts from the unconditional network: the new channels' weights are 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small, large = unet(SHAPE, "tiny"), unet(SHAPE, "tiny", images=2, embeds=True)
    _grow(large, small.state_dict())
    z, beside = 2 * images(B, dtype=torch.float32) - 1, images(B, dtype=torch.float32)
    before = Denoiser(small, VP_1000).noise(z, 0.2)
    assert close(Denoiser(large, VP_1000, images=2).given(beside=beside).noise(z, 0.2), before, 1e-5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        _grow(unet(SHAPE, "small"), small.state_dict())


def test_conditions_are_dropped_image_by_image(make):
    """Half of the rows are fed zeros, whole rows; the others the reconstruction of what stage 1 was shown."""
    purifier = make(("diffusevae", {"parts": "tiny-z"}))
    fed, embedded = [], []
    purifier.unet.register_forward_pre_hook(
        lambda net, inputs, more: fed.append(inputs[0]) or embedded.append(more["class_labels"]), with_kwargs=True
    )
    n = 64
    purifier.objectives(Batch(images(n), torch.zeros(n)), tape(n), drop=0.5)
    rows = fed[0][:, 4:].flatten(1).abs().sum(1) > 0
    assert 0.3 < rows.double().mean() < 0.7
    assert torch.equal(rows, embedded[0].abs().sum(1) > 0)


def test_stage_1_is_shown_noise_of_its_own_strength(make):
    purifier, n = make(("diffusevae", {})), 64
    shown = []
    seen = purifier._seen
    purifier._seen = lambda x, noise, temperature: (shown.append(x), seen(x, noise, temperature))[1]
    purifier.objectives(Batch(images(n), torch.zeros(n)), tape(n), augment=0.2)
    sigma = (shown[0] - images(n)).flatten(1).std(1)
    assert 0.02 > sigma.min() and 0.15 < sigma.max() < 0.3 and float(sigma.mean()) == pytest.approx(0.1, abs=0.02)


# Gradients


def directional(function, x: torch.Tensor, direction: torch.Tensor, h: float = 1e-5) -> float:
    with torch.no_grad():
        return float((function(x + h * direction) - function(x - h * direction)).sum() / (2 * h))


GUIDED = [
    ("gdmp", {"strength": 0.5, "t_star": [0.2, 0.1]}),
    ("gdmp", {"strength": 0.5, "t_star": 0.2, "weighting": "constant"}),
    ("langevin", {"rate": 0.01, "anchor": 0.3}),
    ("diffusevae", {"parts": "tiny-free", "formulation": 0, "structure": "guidance"}),
    ("diffusevae", {"parts": "tiny-free", "formulation": 0, "structure": "lowpass", "factor": 3}),
    ("diffusevae", {"formulation": 2, "condition": 2.0}),
    ("diffusevae", {"parts": "tiny-z"}),
    ("diffusevae", {"parts": "tiny-nvae"}),
    ("decoder", {}),
]


def calm(case) -> tuple[str, dict]:
    """A case whose output leaves the clamps alone."""
    return case[0], {"t_star": 0.05} | case[1]


@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_gradients_of_guidance_and_conditions_are_finite_differences(case, make):
    purifier, x = make(calm(case)), (0.4 + 0.2 * images(B)).requires_grad_()
    direction = images(B).sub(0.5).flip(0)

    def function(v):
        return purifier(v, tape()).square().sum((1, 2, 3))

    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    slope = float((gradient * direction).sum())
    assert abs(slope) > 1e-6
    assert slope == pytest.approx(directional(function, x.detach(), direction), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("case", [c for c in GUIDED if c[0] == "diffusevae"], ids=str)
def test_each_branch_has_its_own_gradient_and_they_add_up(case, make):
    """Through one branch alone: what finite differences give with the other branch's input held."""
    purifier, x = make(calm(case)), 0.4 + 0.2 * images(B)
    direction, gradients = images(B).sub(0.5).flip(0), {}
    for through in ("exact", "image", "structure"):
        v = x.clone().requires_grad_()
        twin = purifier if through == "exact" else purifier.surrogate(through)
        assert torch.equal(twin(v, tape()), purifier(x, tape()))
        (gradients[through],) = torch.autograd.grad(twin(v, tape()).square().sum(), v)
    assert close(gradients["image"] + gradients["structure"], gradients["exact"], 1e-10)
    held = purifier._seen(x, tape().fold("round", 0).fold("stage1"), 0.0)
    purifier._seen = lambda v, noise, temperature: held

    def function(v):
        return purifier(v, tape()).square().sum((1, 2, 3))

    slope = float((gradients["image"] * direction).sum())
    assert slope == pytest.approx(directional(function, x, direction), rel=1e-6, abs=1e-8)
    assert abs(float((gradients["structure"] * direction).sum())) > 1e-8


# Latents


def test_latents_are_brought_to_mean_0_and_deviation_1(make):
    purifier = make(("latent", {}))
    purifier.settle(images(64))
    z = purifier.enter(images(64), tape(64))[0]
    assert close(z.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), 1e-6)
    assert close(z.std((0, 2, 3)), torch.ones(4, dtype=torch.float64), 1e-6)
    back = VAE(purifier.autoencoder, temperature=0.0)(images(64), tape(64))
    assert close(purifier.leave(z, purifier.enter(images(64), tape(64))[1]), back, 1e-6)


def test_latents_are_quantised_as_they_are_decoded(make):
    """What is decoded are codes, though what is diffused is not; the exact map is constant between jumps."""
    purifier = make(("latent", {"parts": "tiny-vq", "t_star": 0.02}))
    decoded = []
    decode = purifier.codec.decode
    purifier.codec.decode = lambda z, shape: (decoded.append(z), decode(z, shape))[1]
    state, context = purifier.start(images(B), tape())
    purifier(images(B), tape())
    assert purifier.codec.distances(decoded[0]).min(-1).values.max() < 1e-9
    assert purifier.codec.distances(state).min(-1).values.min() > 1e-3
    assert not purifier.differentiable and purifier.surrogates == ("soft", "ste", "bypass")
    assert Latent.differentiable and make(("latent", {})).differentiable


def test_a_codec_may_learn_to_ignore_noise(make):
    """With tau the encoder is shown x + tau n, and the likelihood is that of x."""
    vae, shown = make(("vae", {})), []
    encode = vae.codec.encode
    vae.codec.encode = lambda x: (shown.append(x), encode(x))[1]
    batch = Batch(images(64), torch.zeros(64))
    vae.objectives(batch, tape(64), tau=0.2)
    assert float((shown[0] - images(64)).std()) == pytest.approx(0.2, rel=0.05)
    plain = vae.objectives(batch, tape(64))["autoencoder"]
    assert torch.equal(vae.objectives(batch, tape(64), tau=0.0)["autoencoder"], plain)


# A learned schedule


class Misses(torch.nn.Module):
    """A net whose error at log-SNR λ is exp(-λ / 4): large where there is much noise. Its target is known to it."""

    target: torch.Tensor

    def forward(self, z, label):
        a = torch.tensor(VP_1000.table, dtype=z.dtype)[label]
        return self.target + torch.exp(-torch.log(a / (1 - a)) / 8).view(-1, 1, 1, 1)


def estimate(levels: Levels, seed: int, n: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    noise, z, net = Tape(seed, "train", torch.arange(n)), torch.zeros(n, 1, 1, 1, dtype=torch.float64), Misses()
    net.target = noise.normal("target", like=z)
    t, log_q = levels(noise.uniform("level", like=z[:, :1, 0, 0]), VP_1000)
    per_image = 0.5 * (net(z, VP_1000.indices(t).flatten()) - net.target).square().flatten() / log_q.exp()
    bound, loss = _objectives.vlb(Denoiser(net, VP_1000), z, noise, levels)
    assert float(bound) == pytest.approx(float(per_image.mean()))
    return per_image.detach(), loss


def test_a_schedule_changes_the_variance_of_the_bound_and_not_its_mean():
    """½ ∫ exp(-λ / 4) dλ over the table's range, whatever the schedule; learning lowers the variance."""
    low, high = (math.log(a / (1 - a)) for a in (VP_1000.table[-1], VP_1000.table[0]))
    expected = 2 * (math.exp(-low / 4) - math.exp(-high / 4))
    levels = Levels(16).double()
    optimiser = torch.optim.Adam(levels.parameters(), lr=1e-3)
    spread = []
    for seed in range(150):
        per_image, loss = estimate(levels, seed)
        assert float(per_image.mean()) == pytest.approx(expected, rel=0.1)
        spread.append(float(per_image.std()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert spread[-1] < 0.3 * spread[0]
    share = (levels.SPEED * levels.logits).softmax(0)
    assert share[0] > 5 * share[8] > 0, "most draws where the error is"


def test_the_levels_of_a_schedule_are_exact_indices():
    u = torch.linspace(0, 1, 501)[:, None]
    t, log_q = Levels(8)(u, VP())
    i = VP_1000.indices(t).flatten()
    assert t.dtype == u.dtype and i.min() == 0 and i.max() == 999 and (i.diff() <= 0).all()
    assert close(log_q.exp(), torch.full_like(log_q, float(log_q[0].exp())), 1e-6), "uniform until it is trained"


# Options


@pytest.mark.parametrize(
    "family, options, message",
    [
        (GDMP, {"strength": -1.0}, "strength must not be negative, got -1.0"),
        (GDMP, {"weighting": "rising"}, "weighting must be one of constant, matched, got 'rising'"),
        (Langevin, {"t_star": 0.0}, "t_star must lie in"),
        (Langevin, {"steps": 0}, "steps must be at least 1"),
        (Langevin, {"anchor": 0.0}, "rate and anchor must be positive"),
        (Langevin, {"eta": -1.0}, "eta must not be negative"),
        (
            Langevin,
            {"rate": 0.05, "anchor": 0.1},
            "rate=0.05 overshoots at anchor=0.1 and t_star=0.01: it must be at most",
        ),
        (Langevin, {"rate": 0.1, "anchor": 9.0, "t_star": 0.03}, "a larger t_star or anchor bears more"),
        (DiffPure, {"t_star": 1e-4}, "lies below the first of 1000 noise levels"),
        (DiffPure, {"t_star": []}, "t_star is an empty list"),
    ],
)
def test_options_out_of_range_are_errors(family, options, message):
    with pytest.raises(ValueError, match=message):
        family(Wavy(), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"formulation": 3}, "formulation must be one of 0, 1, 2, got 3"),
        ({"begin": "z"}, "begin must be one of input, reconstruction, noise, got 'z'"),
        ({"structure": "edges"}, "structure must be one of none, lowpass, guidance, got 'edges'"),
        ({"condition": -1.0}, "condition must not be negative"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"factor": 0}, "factor must be at least 1"),
        ({"formulation": 0}, "nothing here looks at the reconstruction"),
        ({"begin": "noise", "t_star": 0.0}, "begin=noise needs t_star=1"),
        ({"begin": "noise", "t_star": 0.25}, "begin=noise needs t_star=1, got 0.25"),
        ({"begin": "noise", "t_star": [0.25, 1.0]}, "begin=noise needs t_star=1"),
        ({"strength": 5.0}, "give structure=lowpass or structure=guidance"),
        ({"factor": 2}, "give structure=lowpass or structure=guidance"),
        ({"formulation": 0, "structure": "lowpass", "strength": 1.5}, "replaces a share, at most 1"),
        ({"formulation": 0, "structure": "guidance", "strength": 99.0, "steps": 2}, "strength=99.0 overshoots"),
        ({"formulation": 0, "condition": 2.0}, "asks for a network with a condition; formulation 0 has none"),
    ],
)
def test_structure_that_makes_no_sense_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        DiffuseVAE(
            *DiffuseVAE.parts(SHAPE, "tiny" if options.get("formulation", 1) else "tiny-free").values(), **options
        )


@pytest.mark.parametrize(
    "options, message",
    [({"condition": -0.5}, "condition must not be negative"), ({"t_star": 0.0}, "nothing to decode")],
)
def test_a_decoder_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Decoder(*Decoder.parts(SHAPE).values(), **options)


@pytest.mark.parametrize("size, formulation", [("tiny-free", 1), ("tiny", 0)])
def test_a_network_trained_otherwise_is_named(size, formulation):
    """A condition for a network that takes none, or none for one that does: an error that says so."""
    parts = DiffuseVAE.parts(SHAPE, size).values()
    with pytest.raises(ValueError, match=r"the network takes \d channels, which aren't \d image"):
        purifier = DiffuseVAE(*parts, formulation=formulation, begin="reconstruction", steps=2)
        purifier(images(B, dtype=torch.float32), tape())  # without a condition it could be a learned variance


@pytest.mark.parametrize(
    "case",
    [
        {"parts": "tiny-free", "formulation": 0, "begin": "reconstruction"},
        {"condition": 0.0},
        {"begin": "noise", "t_star": 1.0},
        {"t_star": 0.0},
    ],
    ids=str,
)
def test_where_one_branch_is_all_there_is_no_branch_to_choose(case, make):
    assert make(("diffusevae", case)).surrogates == ()


@pytest.mark.parametrize(
    "name, options, draws",
    [
        ("diffpure", {}, False),
        ("latent", {}, False),
        ("diffusevae", {}, False),
        ("diffusevae", {"begin": "reconstruction"}, False),
        ("diffusevae", {"begin": "reconstruction", "temperature": 1.0}, True),
    ],
    ids=str,
)
def test_without_diffusion_there_is_noise_only_in_stage_1(name, options, draws, make):
    purifier = make((name, options | {"t_star": 0.0}))
    first, second = (purifier(images(B), tape(role=role)) for role in ("clean", "verdict"))
    assert purifier.stochastic is draws is (not torch.equal(first, second))


def test_t_star_0_from_the_reconstruction_is_the_reconstruction(make):
    purifier = make(("diffusevae", {"begin": "reconstruction", "t_star": 0.0}))
    assert close(purifier(images(B), tape()), VAE(purifier.stage1, temperature=0.0)(images(B), tape()))


@pytest.mark.parametrize("rule", ["eta", "ode"])
def test_in_continuous_time_no_table_takes_part(rule):
    """The input is noised to the level that the first step undoes, where DiffAttack's path begins, too."""
    purifier = DiffPure(Wavy(), rule=rule, labels="continuous", t_star=0.1, steps=3)
    state, _ = purifier.start(images(B), tape())
    a = VP_1000.alpha_bar(0.1)
    n = tape().normal("diffuse", like=images(B))
    assert close(state, math.sqrt(a) * (2 * images(B) - 1) + math.sqrt(1 - a) * n)
    assert close(purifier.diffused(0, images(B), tape()), state)


@pytest.mark.parametrize("rule", ["sde", "ode"])
def test_an_eta_that_no_step_asks_for_is_refused(rule):
    with pytest.raises(ValueError, match=f"eta=0.5 has no effect with rule={rule}"):
        DiffPure(*DiffPure.parts((1, 8, 8)).values(), t_star=0.3, steps=2, rule=rule, eta=0.5)
