"""Asked again once the attack is over, a defense says what the verdict heard; one that doesn't gets an F."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attacks import NORMS, Calls
from attacks._views import Exact
from benchmark import afterwards, elsewhere, evaluate, grades, load, stats
from benchmark.config import Identity
from benchmark.errors import RunError
from benchmark.preflight import climb_check, declared_check, finite_difference_error
from benchmark.results import read_run
from classifiers import Classifier
from purifiers import Defense, Purifier, Tape

N = 32
X = torch.cat([torch.full((N // 2, 1, 4, 4), 0.45), torch.full((N // 2, 1, 4, 4), 0.55)])
X += 0.01 * torch.sin(torch.arange(X.numel(), dtype=torch.float32) ** 1.3).view(X.shape)
Y = (X.flatten(1).mean(1) > 0.5).long()


class Bright(Classifier):
    """Two logits, by the mean of an image."""

    def forward(self, x):
        score = 40 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack((-score, score), 1)


class Plain(Purifier):
    """g(x) = x."""

    stochastic = False

    def start(self, x, noise):
        return x, None

    def finish(self, state, context):
        return state.clamp(0, 1)


class Lying(Plain):
    """Where it lies the unperturbed image of that pattern, with the gradient of the identity."""

    def lies(self, x) -> bool:
        return False

    def start(self, x, noise):
        if not self.lies(x):
            return x, None
        known, (seen, patterns) = X.to(x), (z.flatten(1) - z.flatten(1).mean(1, keepdim=True) for z in (x, X.to(x)))
        return x + (known[torch.cdist(seen, patterns).argmin(1)] - x).detach(), None


class InLargeCalls(Lying):
    def lies(self, x):
        return len(x) > 32


class ToTheJudge(Lying):
    """In float32, so that finite differences don't notice."""

    def lies(self, x):
        return x.dtype == torch.float32 and not torch.is_grad_enabled() and len(x) > 32


@pytest.mark.parametrize(
    "purifier, failed",
    [
        (Plain, []),
        (InLargeCalls, ["verdict-again"]),
        (ToTheJudge, ["verdict-again", "attacker-hears-the-verdict"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_defense_that_tells_its_judge_something_else_gets_an_f(tmp_path, capsys, purifier, failed):
    defense = Defense(purifier(), Bright())
    result = evaluate(defense, (X, Y), "pgd:steps=5,step=4", eps="0.1", out=tmp_path, rows=64, device="cpu")
    run = read_run(result.folder)
    assert [c["id"] for c in run["afterwards"] if c["status"] == "fail"] == failed
    assert [c["status"] for c in run["afterwards"]].index("n/a") == 2, "built in Python: no process could build it"
    assert result.rows[0]["robust"] == (1.0 if failed else 0.0), "the number is what was measured"
    (grade,) = grades.grades([(run, run["records"], [run])], [run])
    assert (grade.letter == "F") == bool(failed)
    assert ("its grade is F" in capsys.readouterr().err) == bool(failed)


def statuses(folder: Path) -> dict[str, str]:
    """What the grade of a run alone rests on."""
    run = read_run(folder)
    (grade,) = grades.grades([(run, run["records"], [run])], [run])
    return {check.id: check.status for check in grade.checks}


def test_a_defense_that_wasnt_asked_again_yet_is_asked_by_the_same_command(tmp_path, monkeypatch):
    """A kill between the last image and the question leaves no pass behind; nor does a run that doesn't ask."""
    settings = {"eps": "0.1", "rows": 64, "device": "cpu", "quiet": True, "out": tmp_path}
    defense = Defense(ToTheJudge(), Bright())

    def killed(cell):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("benchmark.cell.check_afterwards", killed)
        evaluate(defense, (X, Y), "pgd:steps=5,step=4", n=24, **settings)
    (path,) = tmp_path.rglob("run.json")
    assert statuses(path.parent)["verdict-again"] == "not run"
    folder = evaluate(defense, (X, Y), "pgd:steps=5,step=4", n=24, **settings).folder
    assert folder == path.parent and statuses(folder)["verdict-again"] == "fail"
    again = evaluate(defense, (X, Y), "pgd:steps=5,step=4", n=N, preflight=False, **settings).folder
    assert again == folder and len(read_run(folder)["records"]) == N and statuses(folder)["verdict-again"] == "fail"


def test_what_a_defense_said_in_one_run_counts_in_all(tmp_path):
    defense, settings = Defense(ToTheJudge(), Bright()), {"eps": "0.1", "rows": 64, "device": "cpu", "quiet": True}
    settings["out"] = tmp_path
    folders = [evaluate(defense, (X, Y), attack, **settings).folder for attack in ("pgd:steps=5,step=4", "uniform")]
    lied, other = (read_run(folder) for folder in folders)
    other["afterwards"] = []
    (grade,) = grades.grades([(other, other["records"], [other])], [lied, other])
    assert grade.letter == "F" and {c.id for c in grade.checks if c.status == "fail"} >= {"verdict-again"}


class NotInBF16(Lying):
    """Tells the truth in float64, where finite differences look, and to an attacker that computes in bfloat16."""

    def lies(self, x):
        return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and len(x) > 8


def test_the_attacker_asks_again_in_its_own_precision(tmp_path):
    defense, settings = Defense(NotInBF16(), Bright()), {"eps": "0.1", "device": "cpu", "quiet": True}
    result = evaluate(defense, (X, Y), "pgd:steps=5,step=4", precision="bf16", out=tmp_path, **settings)
    failed = [c["id"] for c in read_run(result.folder)["afterwards"] if c["status"] == "fail"]
    assert failed == ["attacker-hears-the-verdict"]


FILE = """
import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from torch import stack
from purifiers import Purifier
class Plain(Purifier):
    stochastic = False
    def start(self, x, noise): return x, None
    def finish(self, state, context): return state.clamp(0, 1)
SEEN = []
class Remembers(Plain):
    def start(self, x, noise):
        return stack([self.known(row) for row in x]), None
    def known(self, row):
        for before in SEEN:
            if (before - row.detach()).abs().max() < 0.21:
                return before + 0.05 * (row - before)
        SEEN.append(row.detach().clone())
        return row
class Once(Plain):
    def __init__(self):
        super().__init__()
        here = Path(__file__).with_name("once")
        if here.exists() and "MANY" not in os.environ:
            raise OSError("there is one already")
        here.touch()
"""


@pytest.fixture
def by_name(tmp_path, monkeypatch):
    """A run of a class of ``FILE`` before the shipped classifier: its rows, folder, and what it answered afterwards."""
    (tmp_path / "mine.py").write_text(FILE)

    def run(name: str):
        defense = load(f"file:{tmp_path}/mine.py:{name}")
        result = evaluate(defense, "fashion-mnist", "pgd:steps=10", n=24, device="cpu", out=tmp_path, quiet=True)
        return result.rows[0], result.folder, {c["id"]: c for c in read_run(result.folder)["afterwards"]}

    return run


def test_a_memory_outside_of_the_module_is_noticed_by_another_process(by_name):
    row, folder, asked = by_name("Remembers")
    assert row["robust"] > 0.7 and asked["verdict-again"]["status"] == "pass", "here it remembers"
    assert asked["verdict-elsewhere"]["status"] == "fail" and statuses(folder)["verdict-elsewhere"] == "fail"
    row, folder, asked = by_name("Plain")
    assert row["robust"] < 0.2 and {c["status"] for c in asked.values()} == {"pass"}


def test_what_cant_be_built_elsewhere_is_asked_again_by_the_same_command(by_name, monkeypatch):
    _, folder, asked = by_name("Once")
    assert asked["verdict-elsewhere"]["status"] == "not run" == statuses(folder)["verdict-elsewhere"]
    assert "there is one already" in asked["verdict-elsewhere"]["value"]
    before = (folder / "records.jsonl").read_bytes()
    monkeypatch.setenv("MANY", "1")
    _, again, asked = by_name("Once")
    assert again == folder and (folder / "records.jsonl").read_bytes() == before
    assert asked["verdict-elsewhere"]["status"] == "pass"


@pytest.mark.parametrize(
    ("package", "purifier", "others"),
    [("robustbench", "identity", False), ("timm", "identity", False), ("mine", "identity", True),
     ("torch", "file:mine.py:Mine", True)],
)  # fmt: skip
def test_whose_code_it_is_goes_by_its_modules(package, purifier, others):
    """Names of others' zoos are no components."""
    net = type("Net", (torch.nn.Identity,), {"__module__": f"{package}.models"})()
    told = load("identity", "resnet")
    identity = Identity(**dict.fromkeys((f.name for f in fields(Identity)), "") | {
        "purifier": purifier, "classifier": "robustbench:Standard,threat=Linf", "weights": {},
    })  # fmt: skip
    cell = SimpleNamespace(need=told.need, identity=identity, defense=Defense(told.purifier, net))
    assert elsewhere.others_code(cell) == others


def test_of_the_benchmarks_own_code_nobody_asks_that(tmp_path):
    result = evaluate(load("median"), "fashion-mnist", "pgd:steps=2", n=4, device="cpu", out=tmp_path, quiet=True)
    asked = {c["id"]: c for c in read_run(result.folder)["afterwards"]}
    assert list(asked) == ["verdict-again", "attacker-hears-the-verdict"]


def test_chance_is_no_lie():
    """Eight points fewer of 32 images at p = 0.07, say, which honest defenses that draw reach, too."""
    heard, share = np.full(32, 0.6), np.full(32, 0.6)
    share[:9] -= 0.5
    share[9:12] += 0.5
    assert 1e-3 < stats.compare(heard, share, one_sided=True).p < 0.1
    assert afterwards._same("name", share, heard, "").status == "pass"
    assert afterwards._same("name", 0 * share, heard, "").status == "fail"
    assert afterwards._same("name", 0 * share[:9], heard[:9], "").status == "n/a", "too few to tell"


def test_shards_ask_again_of_what_is_recorded(tmp_path):
    x, y = torch.cat([X, X]), torch.cat([Y, Y])
    for shard in ("1/2", "2/2"):
        result = evaluate(
            Defense(Plain(), Bright()), (x, y), "pgd:steps=2", eps="0.1", out=tmp_path, shard=shard, quiet=True,
            device="cpu",
        )  # fmt: skip
    assert [c["status"] for c in read_run(result.folder)["afterwards"]] == ["pass", "pass", "n/a"]


class Askew(torch.autograd.Function):
    """x with a gradient that knows nothing of what comes."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.sin(torch.arange(gradient.numel(), dtype=gradient.dtype) ** 1.7).view_as(gradient)


class Misled(Plain):
    """A gradient that is right in float64 alone, where finite differences look."""

    def start(self, x, noise):
        return Askew.apply(x) if x.dtype == torch.float32 else x, None


@pytest.mark.parametrize("purifier, status", [(Plain, "pass"), (Misled, "warn")])
@pytest.mark.parametrize("norm, eps", [("Linf", 0.05), ("L2", 0.2), ("StAdv", 0.05)])
def test_a_gradient_that_leads_nowhere_is_noticed(purifier, status, norm, eps):
    if norm == "StAdv" and status == "pass":
        pytest.skip("a flow moves nothing of images that are all but constant")
    defense = Defense(purifier(), Bright())
    threat, tape = NORMS[norm](eps), Tape(0, "preflight", torch.arange(N))
    assert climb_check(defense, Exact(), X, Y, tape, threat, Calls(64)).status == status
    assert climb_check(defense, Exact(), X[:5], Y[:5], tape[:5], threat, Calls(64)).status == "n/a"


def test_a_run_warns_of_a_gradient_that_leads_nowhere(tmp_path, capsys):
    evaluate(Defense(Misled(), Bright()), (X, Y), "pgd:steps=1", eps="0.05", out=tmp_path, device="cpu")
    assert "gradient-climbs" in capsys.readouterr().err


class Steps(Plain):
    """Rounds to sixteenths, and says so."""

    differentiable = False

    def start(self, x, noise):
        return (16 * x).round() / 16, None


class Claims(Plain):
    differentiable = False


class Scaled(Claims):
    """Half of the gradient that it has: wrong by finite differences, and as good as the right one."""

    def start(self, x, noise):
        return 0.5 * x + 0.5 * x.detach(), None


class Elsewhere(Claims):
    """Computes where autograd doesn't reach, as code with numpy does; it refuses an image that is differentiated."""

    def start(self, x, noise):
        return torch.from_numpy((16 * x.cpu().numpy()).round() / 16).to(x), None


def test_who_has_a_gradient_may_not_choose_the_attackers(tmp_path):
    tape = Tape(0, "preflight", torch.arange(4))
    purifiers = ((Plain, "n/a"), (Steps, "pass"), (Claims, "fail"), (Scaled, "fail"), (Elsewhere, "pass"))
    for purifier, status in purifiers:
        assert declared_check(Defense(purifier(), Bright()), X[:4], Y[:4], tape).status == status
    settings = {"eps": "0.1", "quiet": True, "device": "cpu"}
    evaluate(Defense(Steps(), Bright()), (X, Y), "pgd:steps=1", out=tmp_path / "steps", **settings)
    with pytest.raises(RunError, match="rounds-as-declared.*its gradient is there, and leads uphill: leave that out"):
        evaluate(Defense(Claims(), Bright()), (X, Y), "pgd:steps=1", out=tmp_path / "claims", **settings)


class Sharp(torch.nn.Module):
    """Bends within 1e-5: central differences need a smaller step."""

    def forward(self, x):
        return (torch.sin(1e5 * x) / 1e5).flatten(1).sum(1)


def test_a_gradient_that_bends_sharply_is_right_in_the_small():
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    errors = [finite_difference_error(lambda module, z: module(z), Sharp(), x, h=h) for h in (1e-5, 1e-7)]
    assert errors[0] > 1e-2 > errors[1]
