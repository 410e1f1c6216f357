"""Another device than the CPU: pretended, so that every machine tests it; what runs there ends in the CPU's bytes."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from attacks._gradient import ce
from attacks._views import Exact
from benchmark import audit, cli, constructors, evaluate, registry
from benchmark import train as training
from benchmark.cell import Cell, Incomplete
from benchmark.errors import UsageError
from benchmark.settings import Settings
from benchmark.train import train
from purifiers import Batch, Defense, Purifier, Tape
from purifiers.vae import VAE
from tests import pretend
from tests.conftest import CASES, SHAPE, classifier, images, smooth
from tests.test_evaluate import Foreign
from tests.test_resume import outcome
from tests.test_train import DATASET, needs_full, tiny, weights  # noqa: F401

SETTINGS = {"eps": "32/255", "draws": 3, "quiet": True, "n": 2, "rows": 32, "budget": "quick"}
SEARCH = SETTINGS | {"preflight": False}
SMALL = {"steps": 3, "eot": 2, "queries": 12, "samples": 4}
ATTACKS = [name for name in registry.names("attacks") if name not in ("torchattacks", "encoder", "stadv")] + [
    "torchattacks:MIFGSM", "apgd:targets=2,loss=dlr", "pgd:retire=32",
]  # fmt: skip


@pytest.fixture
def gpu():
    with pretend.device():
        yield


# --- the pretended device itself


def test_devices_are_not_mixed(gpu):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    mixed = [
        lambda: here + there, lambda: torch.cat([there, here]), lambda: here[there.long()],
        lambda: torch.stack([there.sum(), here.sum()]), lambda: there.index_put_((torch.tensor([0, 1]),), here[:2]),
    ]  # fmt: skip
    for mix in mixed:
        with pytest.raises(RuntimeError, match="on the same device"):
            mix()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="can't convert cuda"):
        there.numpy()
    assert torch.equal((there * torch.tensor(2.0))[torch.tensor([0])].cpu(), torch.tensor([2.0]))
    assert (there.double() @ torch.arange(3, device="cuda").double()).item() == 3


def test_what_is_made_of_a_tensor_lies_where_it_does(gpu):
    there = torch.rand(2, 3, device="cuda", requires_grad=True)
    made = [
        torch.zeros_like(there), there.new_tensor([1.0]), torch.nn.functional.one_hot(there.argmax(1), 3),
        torch.ones(2).to(there), torch.nn.Linear(3, 1).to("cuda")(there), copy.deepcopy(torch.nn.ReLU().cuda())(there),
        torch.autograd.grad(there.chunk(3, 1)[0].sort(0).values.sum(), there)[0], there.amax(1),
    ]  # fmt: skip
    assert all(t.is_cuda for t in made) and not torch.zeros(2).is_cuda
    assert not any(isinstance(t, pretend.Pretended) for t in (there.cpu(), there.to("cpu"), there.detach().cpu()))


# --- purifiers, attacks


@pytest.mark.parametrize("case", CASES)
def test_a_purifier_and_its_exact_gradient(case, make):
    def found(device: str) -> tuple[torch.Tensor, ...]:
        defense = Defense(smooth(make(case)), classifier()).to(device)
        x, y = images(2).to(device).requires_grad_(), torch.tensor([0, 1]).to(device)
        tape = Tape(0, "attack", torch.arange(2))
        loss = ce(defense(x, tape, Exact(keep=1)), y)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        return defense.purifier(x, tape).detach().cpu(), loss.detach().cpu(), gradient.cpu()

    expected = found("cpu")
    with pretend.device():
        assert all(map(torch.equal, found("cuda"), expected))


def trained(case: tuple[str, dict]) -> bool:
    """Whether a purifier has objectives of its own; the newcomer has none."""
    return case[0] != "file" and registry.load("purifiers", case[0]).objectives is not Purifier.objectives


@pytest.mark.parametrize("case", [case for case in CASES if trained(case.values[0])])
def test_the_losses_that_train_a_purifier(case, make):
    def found(device: str) -> list[torch.Tensor]:
        purifier = make(case).to(device)
        batch = Batch(images(2).to(device), torch.tensor([0, 1]).to(device))
        losses = purifier.objectives(batch, Tape(0, "train", torch.arange(2)))
        gradients = torch.autograd.grad(sum(losses.values()), list(purifier.parameters()), allow_unused=True)
        return [t.detach().cpu() for t in (*losses.values(), *gradients) if t is not None]

    expected = found("cpu")
    with pretend.device():
        there = found("cuda")
    assert len(there) == len(expected) > 1 and all(map(torch.equal, there, expected))


def small(attack: str) -> str:
    """The spec with few steps, draws and queries."""
    name, _, given = attack.partition(":")
    known = constructors.options(registry.load("attacks", name, given if name == "torchattacks" else None))
    options = [f"{k}={v}" for k, v in SMALL.items() if k in known and (name, k) != ("autoattack", "queries")]
    return f"{name}:{','.join([given] * bool(given) + options)}" if given or options else name


def short() -> Defense:
    """A stochastic defense of few operations, for what doesn't depend on the purifier."""
    torch.manual_seed(0)
    return Defense(VAE(*VAE.parts(SHAPE).values()), classifier().float())


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack(tmp_path, tiny_defense, tiny_images, attack):
    run = {"attack": small(attack)} | SEARCH
    defense = tiny_defense if attack in ("pgd", "diffattack") else short()  # of several steps, where those may matter
    expected = evaluate(defense, tiny_images, out=tmp_path / "cpu", **run)
    with pretend.device():
        found = evaluate(copy.deepcopy(defense), tiny_images, out=tmp_path / "there", device="cuda", **run)
    assert outcome(found.folder) == outcome(expected.folder)
    environment = json.loads((found.folder / "run.json").read_text())["environment"]
    assert environment["device"] == "cuda" and environment["device_name"] == "Pretended"


@pytest.mark.parametrize(
    "attack, norm", [("encoder:steps=2", "Linf"), ("stadv:steps=2", "StAdv"), ("pgd:steps=2", "L2")]
)
def test_an_attack_on_an_encoder_and_other_threats(tmp_path, tiny_images, attack, norm):
    defense, run = short(), {"attack": attack, "norm": norm} | SEARCH | {"eps": "1/2" if norm == "L2" else "32/255"}
    expected = evaluate(defense, tiny_images, out=tmp_path / "cpu", **run)
    with pretend.device():
        found = evaluate(copy.deepcopy(defense), tiny_images, out=tmp_path / "there", device="cuda", **run)
    assert outcome(found.folder) == outcome(expected.folder)


def test_a_module_with_random_numbers_of_its_own(tmp_path, tiny_images):
    run = {"attack": "pgd:steps=2,eot=2"} | SETTINGS
    expected = evaluate(Defense(Foreign(0.1), classifier().float()), tiny_images, out=tmp_path / "cpu", **run)
    with pretend.device():
        own = Defense(Foreign(0.1), classifier().float())
        found = evaluate(own, tiny_images, out=tmp_path / "there", device="cuda", **run)
    assert outcome(found.folder) == outcome(expected.folder)


# --- the commands


def test_every_view_is_audited(tmp_path, tiny_defense, tiny_images):
    with pretend.device():
        settings = Settings(device="cuda", n=2, eps="0.1")
        found = audit.gradients(Cell(copy.deepcopy(tiny_defense), tiny_images, "pgd:steps=2,eot=2", settings))
    assert {r["view"] for r in found["rows"] if r["status"] == "pass"} == {"exact", "bpda", "blind"}
    assert {c["id"]: c["status"] for c in found["checks"]}["finite-differences"] == "pass"


@pytest.mark.parametrize("before, after", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_search_stopped_on_one_device_goes_on_on_another(tmp_path, tiny_defense, tiny_images, before, after):
    run = {"attack": "autoattack:steps=3,eot=2", "mixed_environment": True} | SEARCH

    def search(folder: str, device: str, **more) -> Path:
        with pretend.device() if device == "cuda" else nullcontext():
            own = copy.deepcopy(tiny_defense)
            return evaluate(own, tiny_images, out=tmp_path / folder, device=device, **run, **more).folder

    with pytest.raises(Incomplete):
        search("stopped", before, stop_after=0)
    assert outcome(search("stopped", after)) == outcome(search("whole", "cpu"))


@needs_full
@pytest.mark.parametrize("before, after", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_training_stopped_on_one_device_goes_on_on_another(tmp_path, tiny, before, after):  # noqa: F811
    def fitted(folder: str, device: str, **more) -> Path:
        with pretend.device() if device == "cuda" else nullcontext():
            return train("vae", DATASET, tmp_path / folder, epochs=2, limit=64, device=device, **more)

    fitted("stopped", before, stop_steps=2)
    stopped = fitted("stopped", after)
    assert training.paused(stopped) is None and (stopped / "samples.png").exists()
    assert weights(stopped) == weights(fitted("whole", "cpu"))


HOMEBOUND = """
import torch
from purifiers import Purifier
class Mine(Purifier):
    stochastic = False
    def start(self, x, noise): return x + {made}, None
    def finish(self, state, context): return state.clamp(0, 1)
"""


@pytest.mark.parametrize("component", ["--purifier diffpure", "--classifier resnet", "--attack apgd"])
def test_a_component_is_checked_there(gpu, capsys, component):
    assert cli.main(["check", *component.split(), "--device", "cuda"]) == 0
    assert "planned-cost" in capsys.readouterr().out


@pytest.mark.parametrize("made, code", [("torch.zeros(1, 28, 28)", 1), ("torch.zeros(1, 28, 28).to(x)", 0)])
def test_a_purifier_that_stays_at_home_fails_its_check(tmp_path, capsys, made, code):
    (tmp_path / "mine.py").write_text(HOMEBOUND.format(made=made))
    spec = f"file:{tmp_path / 'mine.py'}:Mine"
    assert cli.main(["check", "--purifier", spec, "--device", "cpu"]) == 0
    with pretend.device():
        assert cli.main(["check", "--purifier", spec, "--device", "cuda"]) == code
    assert ("FAIL" in capsys.readouterr().out) == bool(code)


def test_a_file_is_purified_there(gpu, tmp_path):
    Image.fromarray((255 * images(1)[0, 0].float()).byte().numpy()).save(tmp_path / "photo.png")
    for device in ("cpu", "cuda"):
        command = ["purify", str(tmp_path / "photo.png"), "--resize", "--out", str(tmp_path / f"{device}.png")]
        assert cli.main([*command, "--device", device]) == 0
    assert (tmp_path / "cpu.png").read_bytes() == (tmp_path / "cuda.png").read_bytes()


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])  # asked for there; computed in float32 here
def test_a_run_its_verification_and_samples(tmp_path, gpu, capsys, precision):
    there, root = ["--device", "cuda"], str(tmp_path / "run")
    run = "run --purifier vae --attack pgd:steps=2,eot=2 --draws 3 --n-examples 2 --budget quick --eps 0.1".split()
    checks = [] if precision == "float32" else ["--no-preflight"]  # none is of how an attacker rounds
    assert cli.main([*run, "--precision", precision, "--out", root, *there, *checks]) == 0
    assert cli.main(["verify", root, *there]) == 0
    if precision == "float32":
        assert cli.main(["sample", "--purifier", "vae", "--count", "4", "--out", str(tmp_path / "s.png"), *there]) == 0


@needs_full
def test_a_training_on_other_weights_ends_there_as_here(tmp_path, tiny):  # noqa: F811
    """Parts that came trained stay where they are while the others are saved; samples then need both."""
    for where in ("cpu", "cuda"):
        with pretend.device() if where == "cuda" else nullcontext():
            for name in ("vae-latent", "latent"):
                train(name, DATASET, tmp_path / where, device=where, epochs=1, limit=64)
        made = {path.name for path in (tmp_path / where / DATASET / "latent").iterdir()}
        assert {"card.json", "samples.png"} <= made
    here, there = (weights(tmp_path / where / DATASET / "latent") for where in ("cpu", "cuda"))
    assert here == there


def test_a_defense_that_is_on_the_gpu_already_is_taken_as_it_is(gpu, tmp_path, tiny_images):
    defense = Defense(Foreign(0.1), classifier().float()).to("cuda")
    evaluate(defense, tiny_images, "pgd:steps=2,eot=2", out=tmp_path, **SETTINGS)
    assert {p.device.type for p in defense.parameters()} == {"cuda"}


def test_where_there_is_a_gpu_it_is_used_and_the_defense_comes_back(gpu, tmp_path, tiny_images):
    defense = short()
    result = evaluate(defense, tiny_images, "pgd:steps=2,eot=2", out=tmp_path, **SETTINGS)
    environment = json.loads((result.folder / "run.json").read_text())["environment"]
    assert environment["device"] == "cuda"
    assert {p.device.type for p in defense.parameters()} == {"cpu"}, "the caller's own stays where it was"
    assert defense(tiny_images[0][:1]).device.type == "cpu"


def test_a_gpu_that_is_not_there_is_said(gpu):
    assert Settings(device="cuda:0").device == "cuda:0"
    with pytest.raises(UsageError, match="--device cuda:7: torch sees 1 CUDA devices here; use --device cuda"):
        Settings(device="cuda:7")
