"""Laws of the autoencoders, of the searches through them, of their losses and priors, and of the plain controls."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.stats import chi2
from torch import distributions as D

from attacks._views import Exact, Surrogate
from purifiers import Batch, Tape, _objectives
from purifiers._codec import VQ, Posterior
from purifiers._priors import Mixture, PixelCNN
from purifiers._rounding import soft, ste
from purifiers.jpeg import TO_YCBCR
from tests.conftest import images

B = 4


def tape(n: int = B, role: str = "verdict") -> Tape:
    return Tape(0, role, torch.arange(n))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-12) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


def gradient(output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    (found,) = torch.autograd.grad((output if weights is None else output * weights).sum(), x)
    return found


def states(purifier, x: torch.Tensor, noise: Tape) -> tuple[list, object]:
    """The state after start and after every step of the first round, and the context."""
    noise = noise.fold("round", 0)
    state, context = purifier.start(x, noise)
    found = [state]
    for k in range(purifier.steps):
        found.append(purifier.step(k, found[-1], context, noise))
    return found, context


def follows(draws: torch.Tensor, expected: torch.Tensor) -> bool:
    """Pearson's test: whether draws (N,) have the expected counts (K,), at the 99.9 % level; rare ones are pooled."""
    counts = torch.bincount(draws, minlength=len(expected)).double()
    often = expected >= 5
    pooled = [torch.cat((v[often], v[~often].sum()[None])) for v in (counts, expected)]
    statistic = ((pooled[0] - pooled[1]).square() / pooled[1].clamp_min(1e-9)).sum()
    return float(statistic) < chi2.ppf(0.999, int(often.sum()))


# Autoencoders with a Gaussian code


def test_a_posterior_without_width_is_its_mean():
    mean, n = randn(B, 2, 3, 3), randn(B, 2, 3, 3, seed=1)
    assert torch.equal(Posterior(mean, torch.full_like(mean, -math.inf)).sample(n), mean)
    assert close(Posterior(mean, torch.full_like(mean, math.log(9.0))).sample(n), mean + 3 * n)


def test_temperature_0_decodes_the_mean(make):
    purifier, x = make(("vae", {"temperature": 0.0})), images(B)
    mean = purifier.codec.encode(x).mean
    assert torch.equal(purifier(x, tape()), purifier.codec.decode(mean, x.shape).clamp(0, 1))


def test_a_posterior_at_its_floor_decodes_the_mean_at_any_temperature(make):
    """diffusers cuts the log variance at -30: a deviation of 3e-7."""
    warm, cold, x = make(("vae", {"temperature": 2.0})), make(("vae", {"temperature": 0.0})), images(B)
    assert not close(warm(x, tape()), cold(x, tape()), atol=1e-3)
    for purifier in (warm, cold):
        convolution = purifier.autoencoder.quant_conv
        half = len(convolution.bias) // 2
        with torch.no_grad():
            convolution.weight[half:] = 0
            convolution.bias[half:] = -30
    assert close(warm(x, tape()), cold(x, tape()), atol=1e-5)


@pytest.mark.parametrize("code", [1, 3])
def test_a_shorter_code_has_the_first_channels_of_the_whole_one(code, make):
    (whole, _), (cut, _) = (make(("vae", {"code": k})).start(images(B), tape()) for k in (0, code))
    assert torch.equal(cut[:, :code], whole[:, :code])
    assert not cut[:, code:].any() and whole[:, code:].all()


def test_a_code_of_all_channels_is_the_whole_one(make):
    assert torch.equal(make(("vae", {"code": 4}))(images(B), tape()), make(("vae", {}))(images(B), tape()))


# Losses


def test_the_divergence_is_that_of_torch_and_has_its_slopes():
    mean = randn(5, 3).requires_grad_()
    sigma = randn(5, 3, seed=1).exp().requires_grad_()
    found = _objectives.divergence(mean, 2 * sigma.log())
    standard = D.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    assert close(found, D.kl_divergence(D.Normal(mean, sigma), standard))
    of_mean, of_sigma = torch.autograd.grad(found.sum(), (mean, sigma))
    assert close(of_mean, mean)
    assert close(of_sigma, sigma - 1 / sigma)


def test_the_gaussian_likelihood_is_that_of_torch():
    x, x_hat = images(B), images(B).flip(0)
    expected = -D.Normal(x_hat, 0.3).log_prob(x).flatten(1).sum(1).mean()
    assert close(_objectives.gaussian(x, x_hat, 0.3), expected, atol=1e-9)


def test_the_learned_width_is_the_best_one():
    x = images(B)
    x_hat = x + 0.2 * randn(*x.shape)
    best = minimize_scalar(
        lambda log: float(_objectives.gaussian(x, x_hat, math.exp(log))), bounds=(-6, 3), options={"xatol": 1e-9}
    )
    assert float(_objectives.gaussian(x, x_hat)) == pytest.approx(best.fun, abs=1e-9)
    assert math.exp(best.x) == pytest.approx(float((x - x_hat).square().mean().sqrt()), rel=1e-6)


def test_the_bernoulli_likelihood_is_that_of_torch():
    logits = 3 * randn(B, 1, 8, 8)
    for x in (images(B), images(B).round()):  # grey values are outside its support, its formula is the same
        expected = -D.Bernoulli(logits=logits, validate_args=False).log_prob(x).flatten(1).sum(1).mean()
        assert close(_objectives.bernoulli(x, logits), expected, atol=1e-9)


KL = [3.0, 1.0, 8.0]
SIDES = [1, 2, 4]


def of_groups() -> list[torch.Tensor]:
    """Divergences of three groups with the means ``KL`` over a batch of two."""
    return [torch.tensor([0.5, 1.5], dtype=torch.float64) * kl for kl in KL]


@pytest.mark.parametrize(("progress", "warm_up"), [(0.3, 0.3), (1.0, 0.3), (0.0, 0.0)])
def test_divergences_are_summed_after_the_warm_up(progress, warm_up):
    assert float(_objectives.balanced(of_groups(), SIDES, progress, warm_up)) == pytest.approx(sum(KL), abs=1e-12)


@pytest.mark.parametrize("progress", [0.1, 0.35])
def test_divergences_are_balanced_during_the_warm_up(progress):
    """KL per site is 3, 1/4 and 1/2, 5/4 in the mean: weights of 2.4, 0.2 and 0.4, which carry no gradient."""
    weights = [2.4, 0.2, 0.4]
    divergences = [d.requires_grad_() for d in of_groups()]
    found = _objectives.balanced(divergences, SIDES, progress, 0.4)
    c = progress / 0.4
    # the summand that keeps weights from 0/0 is 1e-8
    assert found.item() == pytest.approx(c * sum(w * kl for w, kl in zip(weights, KL, strict=True)), abs=1e-6)
    for slope, w in zip(torch.autograd.grad(found, divergences), weights, strict=True):
        assert close(slope, torch.full_like(slope, c * w / 2), atol=1e-6)


def chosen(z: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """The index of the nearest row of the embedding, (B, h, w), by brute force."""
    away = z.permute(0, 2, 3, 1)[..., None, :] - embedding
    return away.square().sum(-1).argmin(-1)


def book(**weights: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, six codes of which the last is far off, the chosen indices and the loss."""
    z, embedding = randn(2, 3, 2, 2).requires_grad_(), randn(6, 3, seed=1)
    embedding[-1] = 30 + randn(3, seed=2)
    embedding.requires_grad_()
    indices = chosen(z.detach(), embedding.detach())
    quantised = embedding[indices].permute(0, 3, 1, 2)
    return z, embedding, indices, _objectives.codebook(z, embedding, quantised, **weights)


def test_latents_are_moved_by_the_commitment_alone():
    z, embedding, indices, loss = book(commitment=0.7)
    quantised = embedding[indices].permute(0, 3, 1, 2)
    assert close(gradient(loss, z), 0.7 * 2 * (z - quantised) / z.numel())
    z, _, _, loss = book(commitment=0.0)
    assert not gradient(loss, z).any()


def test_codes_are_not_moved_by_the_commitment():
    slopes = [gradient(loss, embedding) for _, embedding, _, loss in (book(commitment=c) for c in (0.0, 0.25, 50.0))]
    assert slopes[0].any()
    assert torch.equal(slopes[0], slopes[1]) and torch.equal(slopes[0], slopes[2])


def test_a_code_is_moved_to_the_mean_of_its_latents():
    z, embedding, indices, loss = book(revive=0.0)
    slope, sites = gradient(loss, embedding), z.permute(0, 2, 3, 1)
    for k in range(len(embedding)):
        own = sites[indices == k]
        assert close(slope[k], 2 * (embedding[k] - own).sum(0) / z.numel())


def test_an_unused_code_is_drawn_to_the_nearest_latent():
    z, embedding, indices, loss = book()
    assert not (indices == 5).any()
    sites = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
    nearest = sites[(sites - embedding[5]).square().sum(1).argmin()]
    pull = -gradient(loss, embedding)[5]
    assert close(pull / pull.norm(), (nearest - embedding[5]) / (nearest - embedding[5]).norm())
    _, embedding, _, loss = book(revive=0.0)
    assert not gradient(loss, embedding)[5].any()


def test_shuffled_columns_keep_their_values_and_mix_the_rows():
    z = randn(40, 5)
    found = _objectives.shuffled(z, tape(40))
    assert torch.equal(found.sort(0).values, z.sort(0).values)
    origin = (found[:, None] == z[None]).double().argmax(1)  # per column, the row that a value comes from
    assert not (origin == origin[:, :1]).all(1).any()
    assert (origin != torch.arange(40)[:, None]).double().mean() > 0.8


# Discrete codes

GRID = (1, 16, 16)  # 4×4 codes


def test_distances_are_squared_euclidean_ones(make):
    codec, z = make(("vqvae", {})).codec, randn(2, 4, 3, 2)
    sites = z.permute(0, 2, 3, 1)
    assert close(codec.distances(z), torch.cdist(sites, codec.embedding[None]).square(), atol=1e-10)
    assert torch.equal(codec.nearest(z), chosen(z, codec.embedding))


@pytest.mark.parametrize("codes", [0, 3])
def test_the_decoder_sees_the_nearest_of_the_codes_in_use(codes, make):
    purifier, x = make(("vqvae", {"codes": codes}), GRID), images(B, GRID)
    state, context = purifier.start(x, tape())
    used = purifier.autoencoder.quantize.embedding.weight[: codes or None]
    indices = chosen(state, used)
    assert len(indices.unique()) > 1
    assert torch.equal(purifier.quantised(state), used[indices].permute(0, 3, 1, 2))
    assert torch.equal(purifier.codes(state), indices)
    expected = purifier.codec.decode(used[indices].permute(0, 3, 1, 2), x.shape).clamp(0, 1)
    assert torch.equal(purifier(x, tape()), expected)


def test_the_first_codes_are_used_and_no_others(make):
    """Other vectors past the cut change nothing, another one before it does."""
    purifier, x = make(("vqvae", {"codes": 3}), GRID), images(B, GRID)
    before, weight = purifier(x, tape()), purifier.autoencoder.quantize.embedding.weight
    used = purifier.codes(purifier.start(x, tape())[0])
    with torch.no_grad():
        weight[3:] = randn(*weight[3:].shape)
        assert torch.equal(purifier(x, tape()), before)
        weight[used[0, 0, 0]] += 0.1
        assert not torch.equal(purifier(x, tape()), before)


def test_bypass_is_the_autoencoder_without_its_codes(make):
    purifier, x = make(("vqvae", {})), images(B)
    codec = VQ(purifier.autoencoder)
    expected = codec.decode(codec.encode(x), x.shape).clamp(0, 1)
    assert torch.equal(purifier.surrogate("bypass")(x, tape()), expected)
    assert not close(purifier(x, tape()), expected, atol=1e-3)


def test_soft_codes_harden_as_their_temperature_falls(make):
    purifier, x = make(("vqvae", {"tau": 1e-6})), images(B)
    assert close(purifier.surrogate("soft")(x, tape()), purifier(x, tape()), atol=1e-9)
    warm = make(("vqvae", {"tau": 1.0}))
    assert not close(warm.surrogate("soft")(x, tape()), warm(x, tape()), atol=1e-3)


# Priors


@pytest.fixture(scope="module")
def pixelcnn() -> PixelCNN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PixelCNN(5, width=8).double()


@pytest.mark.parametrize("site", range(12))
def test_codes_are_predicted_from_those_before_them(site, pixelcnn):
    codes = torch.randint(5, (1, 3, 4), generator=torch.Generator().manual_seed(site))
    before = pixelcnn(codes).flatten(1, 2)[:, site]

    def after(changed: list[int]) -> torch.Tensor:
        others = codes.flatten(1).clone()
        others[:, changed] = (others[:, changed] + 1) % 5
        return pixelcnn(others.view_as(codes)).flatten(1, 2)[:, site]

    assert close(after(list(range(site, 12))), before)
    row, column = divmod(site, 4)
    earlier = {"left": column > 0, "above": row > 0, "above right": row > 0 and column < 3}
    for name, back in {"left": 1, "above": 4, "above right": 3}.items():
        if earlier[name]:
            assert not close(after([site - back]), before, atol=1e-6), name


@pytest.fixture
def resampling(make):
    """A VQ-VAE that draws 30 % of its codes anew from a prior with opinions; 16 sites."""
    purifier = make(("vqvae", {"resample": 0.3}), GRID)
    with torch.no_grad():
        purifier.prior.head.weight.mul_(8)
    return purifier


def test_the_least_likely_codes_are_resampled_and_no_others(resampling):
    assert resampling.steps == math.ceil(0.3 * 16)
    x = images(B, GRID)
    with torch.no_grad():
        codes = resampling.codec.nearest(resampling.codec.encode(x))
        log_prior = resampling.prior(codes).log_softmax(-1).gather(-1, codes[..., None])[..., 0].flatten(1)
        may = torch.zeros_like(log_prior, dtype=torch.bool).scatter(1, log_prior.argsort(1)[:, :5], True)
        changed = torch.zeros_like(may)
        for draw in range(20):
            found, _ = states(resampling, x, tape(role=f"draw {draw}"))
            changed |= (resampling.codes(found[-1]) != codes).flatten(1)
    assert torch.equal(changed, may)


def test_resampled_codes_follow_the_prior_given_those_before(resampling):
    n = 500
    with torch.no_grad():
        z, context = resampling.start(images(1, GRID), tape(1))
        z, which = z.expand(n, -1, -1, -1), context.which.expand(n, -1)
        context = type(context)(images(1, GRID).expand(n, -1, -1, -1), which)
        for k in range(2):
            site = int(which[0, k])
            prior = resampling.prior(resampling.codes(z)).softmax(-1).flatten(1, 2)[:, site]
            assert prior.max() > 0.2  # far from uniform
            z = resampling.step(k, z, context, tape(n))
            assert follows(resampling.codes(z).flatten(1)[:, site], prior.sum(0))
            assert not follows(resampling.codes(z).flatten(1)[:, site], torch.full((16,), n / 16))


def mixture(components: int = 3, d: int = 4) -> Mixture:
    """A mixture with random parameters, float64."""
    found = Mixture(d, components).double()
    found.weights.copy_(randn(components).softmax(0))
    found.means.copy_(2 * randn(components, d, seed=1))
    spread = randn(components, d, d, seed=2)
    found.factors.copy_(torch.linalg.cholesky(spread @ spread.mT + 0.1 * torch.eye(d)))
    return found


def test_the_density_of_a_mixture_is_that_of_torch():
    ours, z = mixture(), 2 * randn(10, 1, 2, 2, seed=3)
    components = D.MultivariateNormal(ours.means, scale_tril=ours.factors)
    theirs = D.MixtureSameFamily(D.Categorical(ours.weights), components)
    assert close(ours.log_prob(z), theirs.log_prob(z.flatten(1)), atol=1e-9)


def test_draws_of_a_mixture_have_its_moments():
    ours, n = mixture(), 20_000
    z = ours.sample(torch.empty(n, 1, 2, 2, dtype=torch.float64), tape(n)).flatten(1)
    mean = ours.weights @ ours.means
    away = ours.means - mean
    within = torch.einsum("k,kij->ij", ours.weights, ours.factors @ ours.factors.mT)
    covariance = within + torch.einsum("k,ki,kj->ij", ours.weights, away, away)
    products = torch.einsum("ni,nj->nij", z - mean, z - mean)
    for draws, expected in ((z, mean), (products, covariance)):
        error = (draws.mean(0) - expected).abs() / (draws.std(0) / n**0.5)
        assert error.max() < 4  # standard errors


def test_a_fit_finds_separate_gaussians():
    where = torch.tensor([[6.0, 0.0], [-2.0, 5.0]], dtype=torch.float64)
    z = where.repeat_interleave(torch.tensor([300, 100]), 0) + 0.5 * randn(400, 2)
    found = Mixture(2, 2).double()
    found.fit(z)
    order = found.weights.argsort(descending=True)
    assert close(found.weights[order], torch.tensor([0.75, 0.25], dtype=torch.float64), atol=1e-3)
    assert close(found.means[order], torch.stack((z[:300].mean(0), z[300:].mean(0))), atol=1e-3)
    for k, rows in zip(order, (z[:300], z[300:]), strict=True):
        covariance = rows.T.cov(correction=0) + 1e-3 * torch.eye(2)  # scikit-learn's regularisation
        assert close(found.factors[k] @ found.factors[k].mT, covariance, atol=1e-3)


def test_a_mixture_of_one_is_standard_normal_until_it_is_fitted():
    z = randn(10, 6)
    standard = D.Normal(torch.zeros(6, dtype=torch.float64), 1.0)
    assert close(Mixture(6).double().log_prob(z), standard.log_prob(z).sum(1))


# Hierarchies


def by_hand(purifier, x: torch.Tensor) -> torch.Tensor:
    """The pass from the top down with the mean of the posterior in every group, from the ladder's layers."""
    ladder = purifier.ladder
    features, h = ladder.features(x), ladder.top.repeat(len(x), 1, 1, 1)
    for side, group in zip(ladder.sides, ladder.groups, strict=True):
        while h.shape[-1] < side:
            h = torch.nn.functional.interpolate(h, scale_factor=2) + ladder.biases[str(2 * h.shape[-1])]
        of_prior, of_posterior = group.of_prior(h), group.of_posterior(torch.cat((h, features[side]), 1))
        c = group.latents
        sigma = (5 * (of_prior[:, c : 2 * c] / 5).tanh()).exp()
        z = of_prior[:, :c] + sigma * 5 * (of_posterior[:, :c] / 5).tanh()
        h = group.after(h + of_prior[:, 2 * c :] + group.enter(z))
    return ladder.image(h, x.shape).clamp(0, 1)


def test_means_alone_are_a_plain_reconstruction(make):
    purifier, x = make(("nvae", {"keep": 3})), images(B)
    with torch.no_grad():
        for bias in purifier.ladder.biases.values():  # 0 in a fresh network
            bias.copy_(randn(*bias.shape))
    assert close(purifier(x, tape()), by_hand(purifier, x))


def randomise(block: torch.nn.Module) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 + i))


@pytest.mark.parametrize("rule", ["mean", "sample"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_above_the_cut_the_posterior_is_not_consulted(keep, rule, make):
    case, x = ("nvae", {"keep": keep, "rule": rule}), images(B)
    expected = make(case)(x, tape())
    for k in range(3):
        purifier = make(case)
        randomise(purifier.ladder.groups[k].of_posterior)
        assert torch.equal(purifier(x, tape()), expected) == (k >= keep), k


def test_the_default_cut_leaves_out_the_highest_resolution(make):
    for keep in (1, 2, 3):
        same = torch.equal(make(("nvae", {"keep": keep}))(images(B), tape()), make(("nvae", {}))(images(B), tape()))
        assert same == (keep == 2)


@pytest.mark.parametrize(("group", "rule"), [(0, "mean"), (2, "prior")])
def test_a_mix_leads_from_the_mean_to_the_prior(group, rule, make):
    rules = ["sample", "sample", "sample"]
    mixed, pure, other = (
        make(("nvae", {"rule": rules[:group] + [r] + rules[group + 1 :]}))(images(B), tape())
        for r in ("mix", rule, {"mean": "prior", "prior": "mean"}[rule])
    )
    assert close(mixed, pure)
    assert not close(mixed, other, atol=1e-4)


def test_halfway_a_mix_is_halfway(make):
    purifiers = [make(("nvae", {"rule": ["mean", rule, "mean"]})) for rule in ("mix", "mean", "prior")]
    noise, entered = tape().fold("round", 0), []
    for purifier in purifiers:
        state, context = purifier.start(images(B), noise)
        group = purifier.ladder.groups[1]
        group.after = torch.nn.Identity()  # what is left is affine in z
        entered.append(purifier.step(1, purifier.step(0, state, context, noise), context, noise))
    assert close(entered[0], (entered[1] + entered[2]) / 2)
    assert not close(entered[0], entered[1], atol=1e-4)


@pytest.mark.parametrize("rule", [["prior"] * 3, ["mix"] * 3, ["mean", "mix", "prior"]], ids="+".join)
def test_a_prior_without_temperature_draws_nothing(rule, make):
    cold, warm = (make(("nvae", {"rule": rule, "tau": tau})) for tau in (0.0, 0.6))
    a, b = tape(), tape(role="select")
    assert torch.equal(cold(images(B), a), cold(images(B), b))
    assert not torch.equal(warm(images(B), a), warm(images(B), b))


def test_a_group_s_divergence_is_that_of_its_two_gaussians(make):
    group = make(("nvae", {})).ladder.group(1)
    h = randn(B, 8, 2, 2)
    prior, _ = group.prior(h)
    posterior, shift, logscale = group.posterior(h, randn(B, 8, 2, 2, seed=1), prior)
    expected = D.kl_divergence(D.Normal(*posterior), D.Normal(*prior))
    assert expected.min() > 0 and close(_objectives.divergence(shift, 2 * logscale), expected, atol=1e-9)


# Searches


@pytest.mark.parametrize("options", [{}, {"weight": 0.0}, {"weight": 20.0}, {"begin": "prior"}], ids=str)
def test_the_search_for_a_code_descends(options, make):
    purifier = make(("map", {"steps": 10, "rate": 0.01} | options))
    found, context = states(purifier, images(8), tape(8))
    before, after = (purifier.energy(z, context) for z in (found[0], found[-1]))
    assert (after < before).double().mean() > 0.8


def test_the_energy_of_a_code_is_its_negative_log_density(make):
    purifier, x = make(("map", {"sigma_x": 0.2})), images(B)
    (z, *_), context = states(purifier, x, tape())

    def log_density(z: torch.Tensor) -> torch.Tensor:
        pixels = D.Normal(purifier.codec.decode(z, x.shape), 0.2).log_prob(x).flatten(1).sum(1)
        return pixels + D.Normal(torch.zeros_like(z), 1.0).log_prob(z).flatten(1).sum(1)

    other = z + 0.3 * randn(*z.shape)
    rise = purifier.energy(other, context) - purifier.energy(z, context)
    assert close(rise, log_density(z) - log_density(other), atol=1e-9)


def test_the_truncated_gradient_of_a_search_holds_its_directions(make):
    purifier, x = make(("map", {"steps": 3})), images(B).requires_grad_()
    weights = randn(*x.shape)
    found = Surrogate(gradient="truncated")(purifier, x, tape())
    (first, *_, last), _ = states(purifier, x, tape())
    by_hand = purifier.codec.decode(purifier.codec.encode(x).mean + (last - first).detach(), x.shape).clamp(0, 1)
    assert close(found, by_hand)
    expected = gradient(by_hand, x, weights)
    assert close(gradient(found, x, weights), expected, atol=1e-10)
    assert not close(gradient(purifier(x, tape()), x, weights), expected, atol=1e-3)


@pytest.mark.parametrize("case", [("map", {}), ("map", {"begin": "prior"}), ("elbo", {})], ids=str)
def test_the_identity_stands_in_for_a_search(case, make):
    purifier, x = make(case), images(B).requires_grad_()
    weights = randn(*x.shape)
    found = Surrogate(gradient="identity")(purifier, x, tape())
    assert close(found, purifier(x, tape())) and not close(found, x, atol=1e-3)
    assert torch.equal(gradient(found, x, weights), weights)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("radius", [0.0, 0.01, 0.1])
def test_the_ascent_stays_in_its_ball(radius, sign, make):
    purifier, x = make(("elbo", {"radius": radius, "sign": sign, "steps": 5, "rate": 0.02})), images(B)
    x[0] = x[0].round()
    found = purifier(x, tape())
    assert (found - x).abs().max() <= radius + 1e-12
    assert 0 <= found.min() and found.max() <= 1
    if radius == 0:
        assert torch.equal(found, x)
    elif radius == 0.01:
        assert (found - x).abs().max() > 0.99 * radius  # the bound acts


@pytest.mark.parametrize("sign", [False, True])
def test_the_ascent_climbs(sign, make):
    purifier = make(("elbo", {"steps": 10, "rate": 0.001, "sign": sign}))
    found, context = states(purifier, images(8), tape(8))
    assert (purifier.energy(found[-1], context) < purifier.energy(found[0], context)).all()


def test_the_energy_of_an_image_is_its_reconstruction_and_divergence(make):
    purifier, v = make(("elbo", {"sigma_x": 0.2})), images(B)
    _, context = purifier.start(v, tape())
    mean, logvar = purifier.codec.encode(v)
    standard = D.Normal(torch.zeros_like(mean), 1.0)
    expected = (
        (v - purifier.codec.decode(mean, v.shape)).square().flatten(1).sum(1) / (2 * 0.2**2)
        + D.kl_divergence(D.Normal(mean, (0.5 * logvar).exp()), standard).flatten(1).sum(1)
    )  # fmt: skip
    assert close(purifier.energy(v, context), expected, atol=1e-9)


@pytest.mark.parametrize("view", [Exact(), Surrogate(gradient="identity")], ids=["exact", "identity"])
def test_signed_steps_pass_the_gradient_on(view, make):
    """Inside [0, 1] the image is moved by constants."""
    purifier, x = make(("elbo", {"sign": True, "radius": 0.05})), (0.2 + 0.6 * images(B)).requires_grad_()
    weights = randn(*x.shape)
    assert close(gradient(view(purifier, x, tape()), x, weights), weights)


# Controls


def photographs(n: int, channels: int, spread: float) -> torch.Tensor:
    """Smooth random images with a little noise, 16×24, whole numbers around 128."""
    coarse = torch.nn.functional.interpolate(randn(n, channels, 4, 6), scale_factor=4, mode="bicubic")
    return (128 + spread * (coarse + 0.1 * randn(n, channels, 16, 24, seed=1))).clamp(0, 255).round()


def pillow(pixels: torch.Tensor, mode: str, quality: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers after Pillow's libjpeg, colours at full resolution, and its tables: a row of 64 per channel."""
    found, tables = [], {}
    for image in pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        picture = Image.frombytes(mode, image.shape[1::-1], image.tobytes())
        picture.save(file, "JPEG", quality=quality, subsampling=0)
        read = Image.open(file)
        read.draft(mode, picture.size)  # of YCbCr: what was decoded, not its RGB
        assert read.mode == mode
        found.append(torch.from_numpy(np.array(read)).double().reshape(image.shape))
        tables = read.quantization
    steps = [tables[min(channel, 1)] for channel in range(pixels.shape[1])]
    return torch.stack(found).permute(0, 3, 1, 2), torch.tensor(steps, dtype=torch.float64)


def by_block(v: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) → (B, C, H / 8, W / 8, 64)."""
    return v.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2).flatten(-2)


def exactly(pixels: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The grey or RGB images that stand exactly for whole numbers, those of three channels Y, Cb and Cr; the way back.

    libjpeg takes and gives Y, Cb and Cr as whole numbers: so they are compared as they are.
    """
    to_ycbcr = torch.tensor(TO_YCBCR if pixels.shape[1] == 3 else [[1.0]], dtype=torch.float64)
    middle = torch.tensor([0.0, 128.0, 128.0], dtype=torch.float64)[: len(to_ycbcr), None, None]
    x = torch.einsum("dc,bchw->bdhw", to_ycbcr.inverse(), pixels - middle) / 255
    return x, lambda found: torch.einsum("dc,bchw->bdhw", to_ycbcr, 255 * found) + middle


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 51, 75, 90, 100])
@pytest.mark.parametrize("mode", ["L", "YCbCr"])
def test_coefficients_of_a_jpeg_are_scipys_in_steps_of_pillows_tables(mode, quality, make):
    pixels = photographs(2, 1 if mode == "L" else 3, 12)
    _, steps = pillow(pixels, mode, quality)
    expected = scipy.fft.dctn(by_block(pixels - 128).unflatten(-1, (8, 8)).numpy(), axes=(-2, -1), norm="ortho")
    found = make(("jpeg", {"quality": quality})).start(exactly(pixels)[0], tape(2))[0]
    assert close(found, torch.from_numpy(expected) / steps.view(-1, 1, 1, 8, 8), atol=1e-9)


@pytest.mark.parametrize("quality", [10, 50, 90])
@pytest.mark.parametrize("mode", ["L", "YCbCr"])
def test_jpeg_is_that_of_pillow(mode, quality, make):
    """Within half a grey level, but where a coefficient lies at a tie and may be rounded to the other side."""
    pixels = photographs(8, 1 if mode == "L" else 3, 12)
    x, back = exactly(pixels)
    purifier, (theirs, steps) = make(("jpeg", {"quality": quality})), pillow(pixels, mode, quality)
    found = purifier(x)
    assert 0 < found.min() and found.max() < 1  # no clamp acts
    away = by_block(back(found) - theirs).abs().amax(-1)
    coefficients = purifier.start(x, tape(8))[0].flatten(-2)
    # libjpeg's whole-number transform keeps eighths: its coefficients are off by about one of them
    steps = steps[:, None, None]
    tied = (coefficients - coefficients.floor() - 0.5).abs() < 0.15 / steps
    # 0.5 is libjpeg's last rounding; a coefficient that is off by a step moves a pixel by a quarter of it at most
    assert (away <= 0.55 + (tied * steps).sum(-1) / 4).all()
    assert away.median() <= 0.55 and by_block(pixels - theirs).abs().amax(-1).median() >= 3  # much more was lost


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_jpeg_of_colours_is_near_that_of_pillow(quality, make):
    """libjpeg rounds Y, Cb and Cr to whole numbers before and after: more coefficients fall to the other side.

    The two differ by about one grey level in the mean, the image from either by 4 (quality 90) to 12 (10).
    """
    pixels = photographs(8, 3, 40)
    theirs, _ = pillow(pixels, "RGB", quality)
    away = (255 * make(("jpeg", {"quality": quality}))(pixels / 255) - theirs).abs()
    assert away.mean() < 0.3 * (pixels - theirs).abs().mean()
    assert (away <= 2).double().mean() > 0.8


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_depth_leaves_the_nearest_of_its_levels(bits, make):
    purifier, x = make(("bitdepth", {"bits": bits})), torch.linspace(0, 1, 4096, dtype=torch.float64).view(1, 1, 64, 64)
    found = purifier(x)
    assert len(found.unique()) == 2**bits
    assert (found - x).abs().max() <= 0.5 / (2**bits - 1) + 1e-12
    assert torch.equal(purifier(found), found)


@pytest.mark.parametrize("size", [3, 5])
def test_the_median_is_that_of_scipy(size, make):
    x = images(B, (3, 8, 8))
    expected = scipy.ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="mirror")
    assert torch.equal(make(("median", {"size": size}), (3, 8, 8))(x), torch.from_numpy(expected))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_that_of_scipy(sigma, make):
    """The same weights at the same reach: what is left is the order of a few dozen sums in float64."""
    x = images(B, (3, 8, 8))
    found = make(("blur", {"sigma": sigma}), (3, 8, 8))(x)
    expected = scipy.ndimage.gaussian_filter(
        x.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, *[math.ceil(3 * sigma)] * 2)
    )
    assert close(found, torch.from_numpy(expected))


def test_noise_has_the_mean_of_the_image_and_its_own_deviation(make):
    n, sigma = 2000, 0.05
    x = torch.full((n, 1, 8, 8), 0.5, dtype=torch.float64)
    away = (make(("noise", {"sigma": sigma}))(x, tape(n)) - x).flatten()
    assert away.abs().max() < 0.5  # no clamp acts
    assert abs(float(away.mean())) < 4 * sigma / len(away) ** 0.5
    assert abs(float(away.std()) - sigma) < 4 * sigma / (2 * len(away)) ** 0.5


# Rounding


def test_straight_through_rounds_with_slope_1():
    v = (3 * randn(50)).requires_grad_()
    assert torch.equal(ste(v), v.round())
    assert torch.equal(gradient(ste(v), v), torch.ones_like(v))


def test_soft_rounding_meets_rounding_at_integers_and_halfway():
    whole = torch.arange(-3, 4, dtype=torch.float64)
    assert close(soft(whole), whole.round())
    assert close(soft(whole + 0.5), whole + 0.5)


def test_soft_rounding_is_flat_at_integers_and_steep_between():
    v = torch.linspace(-2, 2, 401, dtype=torch.float64).requires_grad_()
    slope = gradient(soft(v), v)
    assert slope.min() >= 0.1 - 1e-9 and slope.max() <= 1.9 + 1e-9
    assert close(slope[::100], torch.full((5,), 0.1, dtype=torch.float64))
    assert close(slope[50::100], torch.full((4,), 1.9, dtype=torch.float64))
    assert ((soft(v) - v.round()).abs() <= (v - v.round()).abs() + 1e-12).all()


# Options

OUT_OF_RANGE = [
    ("vae", {"temperature": -0.5}, "temperature must not be negative, got -0.5"),
    ("vae", {"code": 5}, "code must lie in 1 ... 4, .* or be 0 for all; got 5"),
    ("vae", {"code": -1}, "code must lie in 1 ... 4, .* or be 0 for all; got -1"),
    ("vae", {"likelihood": "laplace"}, "likelihood must be gaussian or bernoulli, got 'laplace'"),
    ("vqvae", {"codes": 17}, "codes must lie in 1 ... 16, .* or be 0 for all; got 17"),
    ("vqvae", {"codes": -1}, "codes must lie in 1 ... 16, .* or be 0 for all; got -1"),
    ("vqvae", {"resample": 1.5}, r"resample must lie in \[0, 1\], got 1.5"),
    ("vqvae", {"resample": -0.1}, r"resample must lie in \[0, 1\], got -0.1"),
    ("vqvae", {"tau": 0.0}, "tau must be positive, got 0.0"),
    ("nvae", {"keep": 4}, "keep must lie in 1 ... 3, .* or be 0; got 4"),
    ("nvae", {"keep": -1}, "keep must lie in 1 ... 3, .* or be 0; got -1"),
    ("nvae", {"tau": -0.1}, "tau must not be negative, got -0.1"),
    ("nvae", {"rule": "median"}, r"rule is mean, sample, mix, prior or a list .* joined by \+, got median"),
    ("nvae", {"rule": ["mean", "mode", "prior"]}, r"rule is mean, sample, mix, prior or .*, got mode$"),
    ("nvae", {"rule": ["mean", "prior"]}, r"3 groups need as many rules, got 2: mean\+prior"),
    ("nvae", {"rule": ["mean"] * 4}, "3 groups need as many rules, got 4"),
    ("map", {"steps": 0}, "steps must be at least 1, got 0"),
    ("map", {"rate": 0.0}, "rate must be positive, got 0.0"),
    ("map", {"weight": -1.0}, "weight must not be negative, got -1.0"),
    ("map", {"sigma_x": 0.0}, "sigma_x must be positive, got 0.0"),
    ("map", {"begin": "noise"}, "begin must be mean or prior, got 'noise'"),
    ("elbo", {"steps": 0}, "steps must be at least 1, got 0"),
    ("elbo", {"rate": -0.1}, "rate must be positive, got -0.1"),
    ("elbo", {"radius": -0.1}, "radius must not be negative, got -0.1"),
    ("elbo", {"sigma_x": 0.0}, "sigma_x must be positive, got 0.0"),
    ("jpeg", {"quality": 0}, "quality must lie in 1 ... 100, got 0"),
    ("jpeg", {"quality": 101}, "quality must lie in 1 ... 100, got 101"),
    ("bitdepth", {"bits": 0}, "bits must lie in 1 ... 8, got 0"),
    ("bitdepth", {"bits": 9}, "bits must lie in 1 ... 8, got 9"),
    ("median", {"size": 1}, "size must be odd and at least 3, got 1"),
    ("median", {"size": 4}, "size must be odd and at least 3, got 4"),
    ("blur", {"sigma": 0.0}, "sigma must be positive, got 0.0"),
    ("noise", {"sigma": 0.0}, "sigma must be positive, got 0.0"),
]


@pytest.mark.parametrize(("name", "options", "message"), OUT_OF_RANGE, ids=[f"{n},{o}" for n, o, _ in OUT_OF_RANGE])
def test_an_option_out_of_range_is_named_with_its_value_and_the_remedy(name, options, message, make):
    with pytest.raises(ValueError, match=message):
        make((name, options))


def test_a_jpeg_has_one_channel_or_three(make):
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        make(("jpeg", {}))(images(B, (2, 8, 8)))


@pytest.mark.parametrize("name", ["vae", "vqvae", "map", "elbo", "jpeg"])
def test_a_surrogate_that_is_not_offered_is_named_with_those_that_are(name, make):
    with pytest.raises(ValueError, match=r"no surrogate 'adjoint'; it offers \('"):
        make((name, {})).surrogate("adjoint")


def test_the_prior_of_codes_learns_from_the_whole_codebook(make):
    """Cut codebooks train the autoencoder; a prior that isn't told of the cut would learn a mixture of both."""
    purifier = make(("vqvae", {}))
    batch, cut = Batch(images(B), torch.zeros(B, dtype=torch.long)), 0
    for k in range(8):
        noise = Tape(k, "train", torch.arange(B))
        whole, nested = (purifier.objectives(batch, noise, nested=nested) for nested in (False, True))
        assert torch.equal(whole["prior"], nested["prior"])
        cut += not torch.equal(whole["autoencoder"], nested["autoencoder"])
    assert 0 < cut < 8
