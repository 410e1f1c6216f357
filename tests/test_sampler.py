"""Schedule and sampling rules: diffusers' schedulers step by step, and the closed form for a Gaussian prior."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from purifiers import Fresh, Tape
from purifiers._denoiser import Denoiser
from purifiers._sampler import diffuse, eta_rule
from purifiers._schedule import VP
from purifiers.diffpure import DiffPure

VP_1000 = VP()
COMMON = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


class FromGenerator(Fresh):
    """Noise in the order of the calls, from a generator: what diffusers' DDPM draws if given the same one."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *site, like):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


class Wavy(torch.nn.Module):
    """A smooth net that depends on its label."""

    def forward(self, z, label):
        return torch.sin(3 * z + label.view(-1, 1, 1, 1) / 100) + 0.1 * z


def chain(steps: int, eta: float, noise) -> list[torch.Tensor]:
    """The states of our eta rule from t_star = 0.2, in float64."""
    z = torch.linspace(-2, 2, 32, dtype=torch.float64).view(2, 1, 4, 4)
    times = [*VP_1000.times(0.2, steps), 0.0]
    states = [z]
    for k in range(steps):
        states.append(eta_rule(Denoiser(Wavy(), VP_1000), states[-1], times[k], times[k + 1], k, noise, eta=eta))
    return states


def diffusers_scheduler(kind, steps: int, **more):
    """A scheduler of diffusers over the same indices, its float32 table replaced by float64."""
    scheduler = kind(**COMMON, **more)
    table = torch.tensor(VP_1000.table, dtype=torch.float64)
    assert torch.allclose(scheduler.alphas_cumprod.double(), table, rtol=1e-5)
    scheduler.alphas_cumprod = table
    scheduler.set_timesteps(1000 * steps // 200)
    return scheduler


@pytest.mark.parametrize("steps", [5, 20, 200])
def test_eta_1_is_diffusers_ddpm(steps):
    states = chain(steps, 1.0, FromGenerator(0))
    scheduler = diffusers_scheduler(DDPMScheduler, steps, variance_type="fixed_small")
    scheduler.timesteps += 200 // steps - 1  # leading spacing starts at 0, ours at the last index of each stride
    generator = torch.Generator().manual_seed(0)
    for k, i in enumerate(range(199, -1, -200 // steps)):
        assert round(VP_1000.times(0.2, steps)[k] * 1000) - 1 == i
        epsilon = Wavy()(states[k], torch.full((2,), i))
        expected = scheduler.step(epsilon, i, states[k], generator=generator).prev_sample
        assert torch.allclose(states[k + 1], expected, rtol=0, atol=1e-9), k


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [5, 20, 200])
def test_eta_is_that_of_diffusers_ddim(steps, eta):
    tape = Tape(0, "clean", torch.arange(2))
    states = chain(steps, eta, tape)
    scheduler = diffusers_scheduler(DDIMScheduler, steps, set_alpha_to_one=True)
    for k, i in enumerate(range(199, -1, -200 // steps)):
        noise = tape.normal("reverse", k, like=states[k]) if eta else None
        epsilon = Wavy()(states[k], torch.full((2,), i))
        expected = scheduler.step(epsilon, i, states[k], eta=eta, variance_noise=noise).prev_sample
        assert torch.allclose(states[k + 1], expected, rtol=0, atol=1e-9), k


@given(t=st.integers(1, 1000), share=st.floats(0, 1))
def test_times_are_strictly_decreasing_exact_indices(t, share):
    steps = max(1, round(share * t))
    times = VP_1000.times(t / 1000, steps)
    indices = [VP_1000.index(time) for time in times]
    assert len(times) == steps and indices[0] == t - 1 and indices[-1] >= 0
    assert all(a > b for a, b in zip(indices, indices[1:], strict=False))
    assert times == [(i + 1) / 1000 for i in indices]


@given(k=st.integers(1, 1000), error=st.floats(-1e-9, 1e-9))
def test_the_index_of_a_time_bears_rounding(k, error):
    """0.3 and 0.1 + 0.2 are one index: truncation would repeat and skip some."""
    assert VP_1000.index(k / 1000 + error) == k - 1


def test_all_steps_visit_every_index_once():
    assert [VP_1000.index(t) for t in VP_1000.times(0.15, 150)] == list(range(149, -1, -1))


def test_t_star_a_tenth_is_index_99_in_the_discrete_schedule():
    assert VP_1000.index(0.1) == 99
    assert VP_1000.table[99] == pytest.approx(0.89702, abs=5e-6)
    assert VP_1000.alpha_bar(0.1) == pytest.approx(0.89628, abs=5e-6)
    assert VP_1000.table[-1] == pytest.approx(float(DDPMScheduler(**COMMON).alphas_cumprod[-1]), rel=1e-4)


def test_the_denoiser_never_mixes_schedules():
    """Index labels go with the table, continuous labels with the formula; one time for all rows or one for each."""

    class Label(torch.nn.Module):
        def forward(self, z, label):
            return z * 0 + label.view(-1, 1, 1, 1).to(z)

    z = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    index, continuous = Denoiser(Label(), VP_1000), Denoiser(Label(), VP_1000, "continuous")
    assert index.alpha_bar(0.1) == VP_1000.table[99] and continuous.alpha_bar(0.1) == VP_1000.alpha_bar(0.1)
    assert index.alpha_bar(0) == continuous.alpha_bar(0) == 1
    assert index.noise(z, 0.1).unique().tolist() == [99]
    assert continuous.noise(z, 0.1).unique().tolist() == [pytest.approx(99.9)]
    each = torch.tensor([0.004, 0.1], dtype=torch.float64).view(2, 1, 1, 1)
    assert index.noise(z, each).amax((1, 2, 3)).tolist() == [3, 99]
    assert continuous.noise(z, each).amax((1, 2, 3)).tolist() == pytest.approx([999 * 0.004, 99.9])
    for denoiser in (index, continuous):
        assert denoiser.alpha_bar(each).flatten().tolist() == [denoiser.alpha_bar(0.004), denoiser.alpha_bar(0.1)]
    with pytest.raises(ValueError, match="'both'"):
        Denoiser(Label(), VP_1000, "both")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"t_star": -0.1}, "t_star must lie in"),
        ({"t_star": [0.1, 0.0]}, "t_star must lie in"),
        ({"t_star": 0.1, "spread": 0.1}, r"spread must lead to times in \(0, 1\], got t_star=0.1 and spread=0.1"),
        ({"t_star": 0.1, "spread": -0.1}, "spread must lead to times"),
        ({"t_star": 0.1, "spread": 0.05, "steps": 60}, "between 1 and"),
        ({"t_star": 1.5}, "t_star must lie in"),
        ({"t_star": 0.1, "steps": 101}, "between 1 and"),
        ({"steps": 0}, "between 1 and"),
        ({"rule": "heun"}, "rule must be one of sde, ode, eta, got 'heun'"),
        ({"eta": 2.0}, "eta must lie in"),
        ({"rounds": 0}, "rounds must be at least 1"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DiffPure(Wavy(), **options)


def test_diffusing_has_the_marginals_of_the_schedule():
    z0 = torch.full((500, 1, 8, 8), 0.5, dtype=torch.float64)
    z = diffuse(z0, 0.6, Tape(0, "clean", torch.arange(500)))
    assert float(z.mean()) == pytest.approx(0.5 * math.sqrt(0.6), abs=0.02)
    assert float(z.var()) == pytest.approx(0.4, rel=0.03)


M, S = 0.1, 0.12
"""Mean and standard deviation of the Gaussian prior on the scale of z; small, so that no clamp acts."""


class Analytic(torch.nn.Module):
    """The exact denoiser of the prior N(M, S²): E[n | z] = sigma (z - sqrt(a) M) / (a S² + sigma²)."""

    def forward(self, z, label):
        a = torch.tensor(VP_1000.table, dtype=z.dtype)[label].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (z - a.sqrt() * M) / (a * S**2 + 1 - a)


RULES = {
    "sde": ({"rule": "sde"}, 1.0),
    "ode": ({"rule": "ode"}, 0.0),
    "eta=1": ({"rule": "eta", "eta": 1.0}, 1.0),
    "eta=0.5": ({"rule": "eta", "eta": 0.5}, 0.5),
    "eta=0": ({"rule": "eta", "eta": 0.0}, 0.0),
}


def purify(rule: str, z: torch.Tensor, steps: int, t_star: float) -> torch.Tensor:
    """The purified images on the scale of z; no clamp may have acted."""
    out = DiffPure(Analytic(), t_star=t_star, steps=steps, **RULES[rule][0])(
        (z + 1) / 2, Tape(0, "clean", torch.arange(len(z)))
    )
    assert 0 < out.min() and out.max() < 1
    return 2 * out - 1


@pytest.mark.parametrize("rule", RULES)
def test_a_gaussian_prior_is_preserved(rule):
    """Images from the prior are images from the prior again: 64,000 pixels, mean to 1 %, deviation to 3 % of S."""
    n = Tape(1, "clean", torch.arange(1000)).normal("prior", like=torch.empty(1000, 1, 8, 8, dtype=torch.float64))
    out = purify(rule, M + S * n, 100, 0.1)
    assert float(out.mean()) == pytest.approx(M, abs=0.02 * S)
    assert float(out.std()) == pytest.approx(S, rel=0.03)


@pytest.mark.parametrize("t_star", [0.05, 0.15])
@pytest.mark.parametrize("rule", RULES)
def test_a_fixed_image_reaches_the_posterior_of_the_gaussian_prior(rule, t_star):
    """From one image far out in the prior: what is kept of it and what is drawn anew follow the theory.

    With V = a S² + sigma² and u = (z - sqrt(a) M) / sqrt(V), a rule of stochasticity eta moves u to its value at
    t = 0 with correlation c = (sqrt(a) S / sqrt(V))^(eta²): 1 for the probability flow, Bayes' posterior for eta 1.
    So z_0 has mean M + S c sqrt(a) (x - M) / sqrt(V) and variance S² (c² sigma² / V + 1 - c²).
    """
    steps, x = round(1000 * t_star), 0.4
    eta, a = RULES[rule][1], VP_1000.table[VP_1000.index(t_star)]
    v = a * S**2 + 1 - a
    c = (math.sqrt(a) * S / math.sqrt(v)) ** (eta**2)
    mean = M + S * c * math.sqrt(a) * (x - M) / math.sqrt(v)
    std = S * math.sqrt(c**2 * (1 - a) / v + 1 - c**2)
    out = purify(rule, torch.full((1000, 1, 8, 8), x, dtype=torch.float64), steps, t_star)
    assert float(out.mean()) == pytest.approx(mean, abs=0.03 * (mean - M) + 4 * std / out.numel() ** 0.5)
    assert float(out.std()) == pytest.approx(std, rel=0.05)
