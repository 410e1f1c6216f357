"""What purifiers draw from models of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import purifiers
from benchmark import cli, registry
from purifiers import Tape
from purifiers._schedule import VP
from purifiers.diffpure import DiffPure
from tests.conftest import CASES, SHAPE, images

MODELS = ("vae", "vqvae", "nvae", "map", "diffpure", "gdmp", "langevin", "latent", "diffusevae", "decoder")


def drawn(purifier: purifiers.Purifier, like: torch.Tensor, seed: int = 0, first: int = 0) -> torch.Tensor | None:
    with torch.no_grad():
        return purifier.sample(like, Tape(seed, "sample", torch.arange(first, first + len(like))))


@pytest.mark.parametrize("case", CASES)
def test_samples_are_images_of_the_model_alone(make, case):
    purifier, like = make(case), images(3)
    found = drawn(purifier, like)
    if found is None:
        assert case[0] not in MODELS
        return
    assert found.shape == like.shape and found.min() >= 0 and found.max() <= 1
    assert torch.equal(found, drawn(purifier, 1 - like)), "something of the images that lend their shape is left"
    assert torch.allclose(found[1:2], drawn(purifier, like[:1], first=1), atol=1e-9), "a draw depends on its batch"
    assert not torch.allclose(found, drawn(purifier, like, seed=1)) and not torch.allclose(found[0], found[1])


def test_every_family_with_a_model_draws(make):
    assert {name for name in registry.names("purifiers") if drawn(make((name, {})), images(1)) is not None} == {*MODELS}


class Optimal(torch.nn.Module):
    """The best prediction of the noise in z_t where z_0 ~ N(mean, deviation²)."""

    def __init__(self, mean: float, deviation: float):
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        schedule = VP()
        a = schedule.discrete((label.double() + 1) / schedule.n)[:, None, None, None]
        return (1 - a).sqrt() * (z - a.sqrt() * self.mean) / (a * self.deviation**2 + 1 - a)


def test_the_chain_from_noise_draws_the_distribution_that_was_learned(monkeypatch):
    monkeypatch.setattr(DiffPure, "SAMPLING", 1000)  # DDIM's bias, at 50 steps a tenth of the deviation, all but gone
    found = drawn(DiffPure(Optimal(0.0, 0.3)), torch.zeros(200, *SHAPE, dtype=torch.float64))
    assert found.mean().item() == pytest.approx(0.5, abs=0.005)
    assert found.std().item() == pytest.approx(0.3 / 2, rel=0.02)


def test_the_command_writes_a_square_and_overwrites_nothing(tmp_path, capsys):
    target, sample = tmp_path / "samples.png", ["sample", "--offline", "--count", "5", "--out"]
    assert cli.main([*sample, str(target), "--purifier", "vae"]) == cli.DONE
    assert "drawn from vae:" in capsys.readouterr().err
    with Image.open(target) as image:
        assert image.mode == "L" and image.size == (3 * 30 + 2, 2 * 30 + 2)
        assert np.asarray(image)[2:30, 2:30].std() > 5
    before = target.read_bytes()
    for arguments, message in (
        ([str(target), "--purifier", "vae"], "nothing was overwritten"),
        ([str(tmp_path / "a.png"), "--purifier", "blur"], "no model of images"),
        ([str(tmp_path / "a.jpg"), "--purifier", "vae"], "name a PNG file"),
        ([str(tmp_path / "a.png"), "--purifier", "vae", "--count", "0"], "at least 1"),
    ):
        assert cli.main([*sample, *arguments]) == cli.USAGE
        assert message in capsys.readouterr().err
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["samples.png"]
