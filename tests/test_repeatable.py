"""float32 is float32, whatever a caller asked of torch before; on a GPU convolutions repeat."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from PIL import Image

from attacks._precision import PRECISIONS, get_tf32, set_tf32
from benchmark import audit, cli
from benchmark.cell import Cell
from benchmark.price import price
from benchmark.repeatable import make_repeatable
from benchmark.settings import Settings
from purifiers import Defense
from purifiers.vae import VAE
from tests import pretend
from tests.conftest import SHAPE, classifier


class Looking(torch.nn.Module):
    """A classifier that notes how torch is set whenever gradients are taken; on its class, for it is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.net, Looking.seen = classifier().float(), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(settings_of_torch())
        return self.net(x)


def settings_of_torch() -> tuple:
    """How exact products are; whether lower precision is allowed anywhere; whether cuDNN repeats itself, races."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    newer = [cudnn.conv, cudnn.rnn, mkldnn.conv, torch.backends.cuda.matmul] if hasattr(cudnn, "conv") else []
    lower = any(get_tf32()) or cudnn.allow_tf32 or any(part.fp32_precision != "ieee" for part in newer)
    return torch.get_float32_matmul_precision(), lower, cudnn.deterministic, cudnn.benchmark


@pytest.fixture
def torch_as_it_was():
    before = get_tf32()
    yield
    for part in (torch.backends, torch.backends.cudnn):
        if hasattr(torch.backends.cudnn, "conv"):
            part.fp32_precision = "none"
    make_repeatable(torch.device("cpu"))
    set_tf32(*before)


def named(part: Any, value: str) -> None:
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("torch names its precisions since 2.9")
    part.fp32_precision = value


ASKED = {  # by a caller, in one of torch's ways
    "nothing": lambda: None,
    "switches": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    "products": lambda: torch.set_float32_matmul_precision("medium"),
    "named": lambda: [named(part, "tf32") for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)],
    "everything": lambda: named(torch.backends, "tf32"),
    "cudnn": lambda: named(torch.backends.cudnn, "tf32"),
    "bfloat16": lambda: named(torch.backends.mkldnn.conv, "bf16"),
    "apart": lambda: [named(torch.backends.cuda.matmul, "tf32"), named(torch.backends.cudnn.conv, "ieee")],
}


@pytest.mark.parametrize("asked", ASKED)
def test_tensor_cores_are_left_as_they_were_found(torch_as_it_was, asked):
    ASKED[asked]()
    found = get_tf32()
    with PRECISIONS["tf32"]().context("cuda"):
        assert get_tf32() == (True, True)
    assert get_tf32() == found


@pytest.mark.parametrize("asked", ASKED)
def test_float32_is_float32_whatever_a_caller_asked_for(torch_as_it_was, asked):
    left, right = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0))
    make_repeatable(torch.device("cpu"))
    expected = left @ right
    ASKED[asked]()
    make_repeatable(torch.device("cpu"))
    assert settings_of_torch()[:2] == ("highest", False)
    assert torch.equal(left @ right, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("what", ["run", "price", "audit"])
def test_arithmetic_repeats_where_numbers_are_made(tmp_path, tiny_images, monkeypatch, torch_as_it_was, device, what):
    ASKED["switches"]()
    for name, other in (("deterministic", False), ("benchmark", True)):
        monkeypatch.setattr(torch.backends.cudnn, name, other)
    looking = Looking()
    defense = Defense(VAE(*VAE.parts(SHAPE).values()), looking)
    with pretend.device() if device == "cuda" else nullcontext():
        settings = Settings(device=device, out=str(tmp_path), eps="0.1", n=2, rows=32, draws=3, quiet=True)
        cell = Cell(defense, tiny_images, "pgd:steps=1,eot=1", settings)
        {"run": Cell.run, "price": price, "audit": audit.gradients}[what](cell)
    assert looking.seen[-1] == ("highest", False, *((True, False) if device == "cuda" else (False, True)))


@pytest.mark.parametrize("command", ["check --classifier resnet", "purify {png} --out {out}", "sample --out {out}"])
def test_other_commands_compute_as_a_run_does(tmp_path, torch_as_it_was, command):
    Image.new("L", (28, 28), 128).save(tmp_path / "photo.png")
    words = command.format(png=tmp_path / "photo.png", out=tmp_path / "out.png").split()
    ASKED["products"]()
    ASKED["switches"]()
    assert cli.main([*words, *(["--purifier", "vae"] if "out" in command else [])]) == cli.DONE
    assert settings_of_torch()[:2] == ("highest", False)
