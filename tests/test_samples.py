"""What purifiers draw from models of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import purifiers
from benchmark import cli, registry
from benchmark.recipes import LARGER, larger, recipes
from purifiers import Tape
from purifiers._diffusion import Diffusion
from purifiers._priors import PixelCNN
from purifiers._schedule import VP
from purifiers.diffpure import DiffPure
from tests.conftest import CASES, SHAPE, images

MODELS = {"vae", "vqvae", "nvae", "map", "diffpure", "gdmp", "langevin", "latent", "diffusevae", "decoder"}


def tape(n: int, seed: int = 0, first: int = 0) -> Tape:
    return Tape(seed, "sample", torch.arange(first, first + n))


def drawn(purifier: purifiers.Purifier, like: torch.Tensor, seed: int = 0, first: int = 0) -> torch.Tensor | None:
    with torch.no_grad():
        return purifier.sample(like, tape(len(like), seed, first))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_samples_are_images_of_the_model_alone(make, case, monkeypatch):
    monkeypatch.setattr(Diffusion, "SAMPLING", 4)
    purifier, like = make(case), images(3)
    found = drawn(purifier, like)
    assert (found is not None) == (case[0] in MODELS)
    if found is None:
        return
    assert found.shape == like.shape and found.min() >= 0 and found.max() <= 1
    assert torch.equal(found, drawn(purifier, 1 - like)), "something of the images that lend their shape is left"
    assert close(found[1:2], drawn(purifier, like[:1], first=1)), "a draw depends on its batch"
    assert not torch.allclose(found, drawn(purifier, like, seed=1)) and not torch.allclose(found[0], found[1])


# --- each family by its own equation, under the same noise


def test_a_vae_decodes_standard_normal_codes(make):
    purifier, like = make(("vae", {})), images(3)
    z = tape(3).normal("prior", like=purifier.codec.encode(like).mean)
    assert close(drawn(purifier, like), purifier.codec.decode(z, like.shape).clamp(0, 1))
    kept = torch.cat((z[:, :2], torch.zeros_like(z[:, 2:])), 1)
    assert close(drawn(make(("vae", {"code": 2})), like), purifier.codec.decode(kept, like.shape).clamp(0, 1))


def test_a_search_decodes_draws_of_its_fitted_prior(make):
    purifier, like = make(("map", {})), images(3)
    mean = purifier.codec.encode(like).mean
    purifier.prior.means.fill_(2.0)
    purifier.prior.factors.mul_(0.1)
    z = 2 + 0.1 * tape(3).normal("prior", like=mean.flatten(1)).view_as(mean)
    assert close(drawn(purifier, like), purifier.codec.decode(z, like.shape).clamp(0, 1))


class Counting(PixelCNN):
    """A prior over K codes under which each is sure to be the one before it, in raster order, plus one."""

    def __init__(self, codes: int):
        super().__init__(codes, width=1, layers=0)
        self.codes = codes

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        before = codes.flatten(1).roll(1, 1)
        before[:, 0] = -1
        expected = (before + 1) % self.codes
        return 99 * torch.nn.functional.one_hot(expected, self.codes).double().view(*codes.shape, self.codes)


def test_codes_are_drawn_one_after_the_other(make):
    purifier, like = make(("vqvae", {})), images(2)
    size, codes = len(purifier.codec.embedding), purifier.codec.nearest(purifier.codec.encode(like))
    purifier.prior = Counting(size)
    counted = (torch.arange(codes[0].numel()) % size).view(1, *codes.shape[1:]).expand_as(codes)
    expected = purifier.codec.decode(purifier.codec.vectors(counted), like.shape).clamp(0, 1)
    assert close(drawn(purifier, like), expected)


def test_every_group_of_a_ladder_is_drawn_at_temperature_1(make):
    purifier, like = make(("nvae", {})), images(2)
    ladder, noise = purifier.ladder, tape(2).fold("round", 0)
    h = ladder.top.expand(2, -1, -1, -1)
    for k, side in enumerate(ladder.sides):
        h = ladder.raised(h, side)
        prior, onwards = ladder.group(k).prior(h)
        h = ladder.group(k)(onwards, prior.mean + prior.sigma * noise.normal("prior", k, like=prior.mean))
    assert close(drawn(purifier, like), ladder.image(h, like.shape).clamp(0, 1))


@pytest.mark.parametrize("options", [{}, {"formulation": 2}, {"parts": "tiny-z"}, {"parts": "tiny-nvae"}])
def test_a_condition_is_one_that_stage_1_draws(make, options):
    purifier, like, told = make(("diffusevae", options)), images(2), []
    purifier.unet.register_forward_pre_hook(lambda module, given, more: told.append((given, more)), with_kwargs=True)
    drawn(purifier, like)
    (fed, _), more = told[0]
    if options.get("parts") == "tiny-nvae":
        x_hat = drawn_ladder(purifier.stage1, like)
    else:
        vae = make(("vae", {}))
        vae.autoencoder = vae.codec.autoencoder = purifier.stage1
        code = tape(2).fold("condition").normal("prior", like=vae.codec.encode(like).mean)
        x_hat = vae.finish(code, like)
    assert close(fed[:, fed.shape[1] // 2 :], torch.nn.functional.pixel_unshuffle(2 * x_hat - 1, 2))
    noise = tape(2).normal("sample", like=like)
    first = noise + 2 * x_hat - 1 if options.get("formulation") == 2 else noise
    assert close(fed[:, : fed.shape[1] // 2], torch.nn.functional.pixel_unshuffle(first, 2))
    if options.get("parts") == "tiny-z":
        assert close(more["class_labels"], purifier.embed(code.flatten(1)))


def drawn_ladder(ladder: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
    return registry.load("purifiers", "nvae")(ladder).sample(like, tape(len(like)).fold("condition"))


def test_a_decoder_is_told_of_a_code_that_the_prior_draws(make):
    purifier, like, told = make(("decoder", {})), images(2), []
    purifier.unet.register_forward_pre_hook(lambda module, given: told.append(given[0]))
    drawn(purifier, like)
    code = tape(2).fold("condition").normal("prior", like=purifier.codec.encode(like).mean)
    fed = told[0]
    assert close(fed[:, fed.shape[1] // 2 :], torch.nn.functional.pixel_unshuffle(purifier.canvas(code.flatten(1)), 2))


class Optimal(torch.nn.Module):
    """The best prediction of the noise in z_t where z_0 ~ N(mean, deviation²)."""

    def __init__(self, mean: float, deviation: float):
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        schedule = VP()
        a = schedule.discrete((label.double() + 1) / schedule.n)[:, None, None, None]
        return (1 - a).sqrt() * (z - a.sqrt() * self.mean) / (a * self.deviation**2 + 1 - a)


@pytest.mark.parametrize("deviation", [0.1, 0.3])
def test_the_chain_from_noise_draws_the_distribution_that_was_learned(deviation):
    found = drawn(DiffPure(Optimal(0.0, deviation)), torch.zeros(400, *SHAPE, dtype=torch.float64))
    assert found.mean().item() == pytest.approx(0.5, abs=0.003)
    assert found.std().item() == pytest.approx(deviation / 2, rel=0.05), "DDIM of so few steps loses a few percent"


def test_latents_are_drawn_at_their_own_scale(make, monkeypatch):
    purifier, decoded = make(("latent", {})), []
    purifier.standard.mean.fill_(3.0)
    purifier.standard.std.fill_(2.0)
    purifier.denoiser.net = Optimal(0.0, 1.0)
    decode = purifier.codec.decode
    monkeypatch.setattr(purifier.codec, "decode", lambda z, shape: decoded.append(z) or decode(z, shape))
    drawn(purifier, torch.zeros(500, *SHAPE, dtype=torch.float64))
    assert decoded[0].mean().item() == pytest.approx(3, abs=0.1)
    assert decoded[0].std().item() == pytest.approx(2, rel=0.05)


# --- the command, and what cards say


def test_the_command_writes_a_square_and_overwrites_nothing(tmp_path, capsys):
    target, sample = tmp_path / "samples.png", ["sample", "--offline", "--count", "5", "--out"]
    (tmp_path / "plain.py").write_text("import torch\n\n\nclass Plain(torch.nn.Module):\n    pass\n")
    assert cli.main([*sample, str(target), "--purifier", "vae:weights=gan"]) == cli.DONE
    assert "drawn from vae:weights=gan, seed 0" in capsys.readouterr().err
    with Image.open(target) as image:
        assert image.mode == "L" and image.size == (3 * 30 + 2, 2 * 30 + 2)
        assert np.asarray(image)[2:30, 2:30].std() > 5
    before = target.read_bytes()
    for arguments, message in (
        ([str(target), "--purifier", "vae"], "nothing was overwritten"),
        ([str(tmp_path / "a.png"), "--purifier", "blur"], "no model of images"),
        ([str(tmp_path / "a.png"), "--purifier", f"file:{tmp_path}/plain.py:Plain"], "no model of images"),
        ([str(tmp_path / "a.png"), "--purifier", "vae:temperature=0"], "leave out temperature"),
        ([str(tmp_path / "a.jpg"), "--purifier", "vae"], "name a PNG file"),
        ([str(tmp_path / "a.png"), "--purifier", "vae", "--count", "0"], "at least 1"),
    ):
        assert cli.main([*sample, *arguments]) == cli.USAGE
        assert message in capsys.readouterr().err
    assert target.read_bytes() == before and not list(tmp_path.glob("a.*"))


def test_a_small_recipe_names_the_one_for_a_gpu():
    assert larger("fashion-mnist", "diffpure") == larger(LARGER, "diffpure-compact") == "diffpure"
    assert larger(LARGER, "diffpure") is larger("fashion-mnist", "resnet") is larger(LARGER, "resnet") is None
    for family in ("fashion-mnist", LARGER):
        for name, small in recipes(family).items():
            if bigger := larger(family, name):
                large, shape = recipes(LARGER)[bigger], (3, 32, 32)
                assert large.component == small.component or small.kind == "classifiers"
                made = (registry.load(r.kind, r.component).parts(shape, r.size).values() for r in (small, large))
                few, many = (sum(p.numel() for net in parts for p in net.parameters()) for parts in made)
                assert few < many, name
