"""Shared by the tests: shape checks at the purifiers' borders, and components small enough to be exact in float64."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bytes are the CPU's; where another device matters one is pretended
torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)  # a busy machine fails nothing, a rerun repeats
settings.load_profile("steady")
# before the first import of purifiers; the tower: an int will do for a float
install_import_hook("purifiers", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from benchmark import constructors, registry  # noqa: E402
from classifiers.resnet import ResNet  # noqa: E402
from purifiers import Defense, Purifier, Tape  # noqa: E402
from purifiers._denoiser import Embedding  # noqa: E402
from purifiers._ladder import Ladder  # noqa: E402
from purifiers.diffpure import DiffPure  # noqa: E402

SHAPE = (1, 8, 8)

FILE = '''
"""A purifier as a newcomer writes it: annotations postponed, an option of every type, no registration."""
from __future__ import annotations

from torch import Tensor

from purifiers import Purifier


class Shrink(Purifier):
    """g(x) = 1/2 + (1 - amount) (x - 1/2 + sigma n), clamped."""

    def __init__(self, *, amount: float = 0.25, sigma: float = 0.05, steps: int = 2, flip: bool = False,
                 border: str = "clamp", rounds: int = 1):
        super().__init__(rounds=rounds)
        self.amount, self.sigma, self.steps, self.flip = amount, sigma, steps, flip

    def start(self, x, noise):
        return x.flip(-1) if self.flip else x, None

    def step(self, k: int, state: Tensor, context: None, noise) -> Tensor:
        return 0.5 + (1 - self.amount) * (state - 0.5 + self.sigma * noise.normal("shrink", k, like=state))

    def finish(self, state, context):
        return state.clamp(0, 1)
'''

VARIANTS: dict[str, list[dict]] = {
    "diffpure": [
        {"rule": "ode"},
        {"rule": "eta"},
        {"rule": "eta", "eta": 0.0},
        {"labels": "continuous"},
        {"t_star": [0.1, 0.05]},
        {"spread": 0.05},
        {"labels": "continuous", "spread": 0.05},
        {"spread": 0.02, "rule": "eta", "t_star": [0.1, 0.05]},
    ],
    "gdmp": [{"weighting": "constant", "strength": 5.0}],
    "latent": [{"spread": 0.05}, {"parts": "tiny-vq"}],
    "diffusevae": [
        {"formulation": 2},
        {"parts": "tiny-z"},
        {"parts": "tiny-nvae"},
        {"begin": "noise", "t_star": 1.0, "rule": "sde"},
        {"condition": 2.0},
        {"temperature": 1.0},
        {"temperature": 0.5, "parts": "tiny-nvae"},
        {"parts": "tiny-free", "formulation": 0, "begin": "reconstruction"},
        {"parts": "tiny-free", "formulation": 0, "structure": "lowpass", "factor": 3},
        {"parts": "tiny-free", "formulation": 0, "structure": "guidance"},
    ],
    "decoder": [{"condition": 2.0}, {"rule": "sde"}],
    "vae": [{"temperature": 0.0}, {"code": 2}],
    "vqvae": [{"codes": 4}, {"resample": 0.5}],
    "nvae": [{"keep": 1, "tau": 0.0}, {"rule": ["mean", "sample", "mix"]}],
    "map": [{"begin": "prior"}],
    "elbo": [{"sign": True}],
}
"""Options beside the defaults under which a purifier must keep its contract, and sizes of its parts beside tiny; a
newcomer needs no entry."""

REPEATED = ("diffpure", "vae", "vqvae", "map", "file")
"""One of every build under which two rounds keep the whole contract; that they repeat it is tested of all."""

CASES = [
    pytest.param((name, options), id=",".join([name, *(f"{k}={v}" for k, v in options.items())]))
    for name in [*registry.names("purifiers"), "file"]
    for options in [{}, *([{"rounds": 2}] if name in REPEATED else []), *VARIANTS.get(name, [])]
]
"""Every purifier file, and one by path, at its defaults, some repeated, and in its variants."""


@pytest.fixture(scope="session")
def newcomer(tmp_path_factory) -> str:
    """``PATH.py:Class`` of a purifier outside the package."""
    path = tmp_path_factory.mktemp("newcomer") / "shrink.py"
    path.write_text(FILE)
    return f"{path}:Shrink"


@pytest.fixture(scope="session")
def make(newcomer):
    """Build a purifier of ``CASES`` from fresh tiny parts: float64, eval mode, 2 steps where it has steps."""

    def build(case: tuple[str, dict], shape: tuple[int, int, int] = SHAPE) -> Purifier:
        name, chosen = case[0], dict(case[1])
        component = registry.load("purifiers", name, newcomer if name == "file" else None)
        options = constructors.options(component)
        steps = {"steps": 2} if "steps" in options else {}
        if "t_star" in options and options["t_star"].default == 1.0:
            steps["t_star"] = 0.3  # from noise alone an untrained network leaves the range, and a clamp has no gradient
        with torch.random.fork_rng():
            torch.manual_seed(0)
            parts = component.parts(shape, chosen.pop("parts", "tiny"))
            for network in parts.values():  # a ladder starts out nearly blind to the image, an embedding quite
                if isinstance(network, Ladder):
                    for head in network.groups:
                        torch.nn.init.normal_(head.of_posterior.outwards.weight, std=3.0)
                if isinstance(network, Embedding):
                    torch.nn.init.normal_(network[-1].weight)
        return component(*parts.values(), **steps | chosen).double().eval()

    return build


def smooth(purifier: Purifier) -> Purifier:
    """The purifier; in place of one that rounds, the last of its surrogates: a differentiable function."""
    return purifier if purifier.differentiable else purifier.surrogate(purifier.surrogates[-1])


def classifier(shape: tuple[int, int, int] = SHAPE, seed: int = 1) -> torch.nn.Module:
    """The tiny residual network with random weights, float64."""
    component = registry.load("classifiers", "resnet")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return component(*component.parts(shape, "tiny").values()).double().eval()


def images(n: int, shape: tuple[int, int, int] = SHAPE, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """n fixed images, uniform in [0, 1)."""
    return Tape(11, "images", torch.arange(n)).uniform("pixels", like=torch.empty(n, *shape, dtype=dtype))


@pytest.fixture(scope="session")
def tiny_defense() -> Defense:
    """Untrained tiny DiffPure and ResNet on 8×8 images; stochastic, and of real layers."""
    torch.manual_seed(0)
    classifier = ResNet(*ResNet.parts((1, 8, 8)).values())
    with torch.no_grad():
        classifier.net[-1].weight.mul_(30)
    return Defense(DiffPure(*DiffPure.parts((1, 8, 8)).values(), t_star=0.3, steps=2, rule="eta"), classifier)


@pytest.fixture(scope="session")
def tiny_images(tiny_defense) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return x, tiny_defense(x, Tape(9, "labels", torch.arange(80))).argmax(1)


class Linear(torch.nn.Module):
    """Logits of a linear model: z_c = ⟨w_c, x - 1/2⟩ + b_c, w of shape (K, C·H·W)."""

    def __init__(self, w: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.register_buffer("w", w)
        self.register_buffer("b", b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - 0.5).flatten(1) @ self.w.to(x).T + self.b.to(x)


def undefended(model: torch.nn.Module) -> Defense:
    """A defense that doesn't purify."""
    return Defense(registry.load("purifiers", "identity")(), model)


@pytest.fixture
def default_float64():
    """torch's default dtype is float64 during the test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: its folder and its address."""
    root = tmp_path / "served"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    handler.log_message = lambda *arguments: None  # type: ignore[attr-defined]
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield root, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


PARITY = """\
# Parity

Our attacks and samplers beside published ones, measured by tests: both sides start from the same point, see the same
network and take the same number of steps, in float64. A row is written only if its test passed. *Largest difference* is
the maximum of |ours - theirs| over all iterates (of a sampler: all states of the chain), images and pixels; an image
spans [0, 1], a sampler's state [-1, 1]. *Still correct* counts the images that survive the package's attack, *same
verdict* those of which ours says the same.

Starts are drawn by the package unless they are x. APGD's paths include its halvings of the step size and returns to
the best point; `class k` is the class that a targeted attack aims at, the k-th likeliest but the label. In L2,
torchattacks' APGD adds 1e-12 to a length where the paper's code and ours don't, and the iterations make more of it: its
tolerance is wider; without that summand they agree as the others do. Its PGDL2 divides by a norm + 1e-10, set to the
1e-12 of ours here.

The small network is convolutional, with random weights. There and at the small radii on `cifar10-resnet18` about half
of the images survive; at 8/255 this undefended classifier loses nearly all: there the iterates say something, equal
verdicts little. Of its data set those first images are taken that it classifies correctly; a batch that it was asked
before, bit for bit, is answered from memory.

The command, with the test images of CIFAR-10 in any form that `--dataset` takes:

```bash
make parity CIFAR10=parquet:test.parquet,only=exact,family=cifar10
```

Versions: {versions}. The last digits of a difference depend on the machine.
"""
PACKAGES = ("torch", "numpy", "torchattacks", "pyautoattack", "diffusers", "torchsde", "torchdiffeq")
COLUMNS = ("ours", "theirs", "images", "steps", "largest difference", "tolerance", "still correct", "same verdict")


def pytest_addoption(parser):
    parser.addoption("--parity", metavar="FILE", help="write what the parity tests measured as a page, if all passed")


@pytest.fixture(scope="session")
def parity(request):
    """Takes one row of the page of parity at a time, from tests that passed so far; written when the session ends.

    ``parity(section, what, against, n=, iterations=, difference=, tolerance=)``, and of attacks ``correct=``: how many
    images survived, the same ones on both sides.
    """
    sections: dict[str, list[tuple[str, ...]]] = {}

    def take(
        section: str,
        what: str,
        against: str,
        *,
        n: int,
        iterations: int,
        difference: float,
        tolerance: float,
        correct: int | None = None,
    ) -> None:
        verdicts = () if correct is None else (f"{correct} of {n}", f"{n} of {n}")
        sizes = (f"{size:.0e}".replace("e-0", "e-") if size else "0" for size in (difference, tolerance))
        sections.setdefault(section, []).append((what, against, str(n), str(iterations), *sizes, *verdicts))

    yield take
    path = request.config.getoption("parity")
    if path and not request.session.testsfailed:
        Path(path).write_text(page(sections))


def page(sections: dict[str, list[tuple[str, ...]]]) -> str:
    """The page of parity in Markdown: what was compared, with which versions, and a table per section."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    parts = [PARITY.format(versions=versions)]
    for section, rows in sections.items():
        columns = COLUMNS[: len(rows[0])]  # samplers give no verdict
        lines = [columns, ("---",) * len(columns), *rows]
        parts.append("\n".join([f"## {section}", "", *("| " + " | ".join(line) + " |" for line in lines)]) + "\n")
    return "\n".join(parts)
