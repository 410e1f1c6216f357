"""``check``: what keeps the contract passes in seconds; what breaks it is named, with the remedy."""

from __future__ import annotations

import json

import pytest

from benchmark import check, cli, data
from benchmark.checkpoints import Need
from benchmark.dataset import Dataset

NEED = Need(data.form("fashion-mnist"))

GOOD = """
from torch.nn.functional import avg_pool2d
from purifiers import Purifier
class Mine(Purifier):
    def start(self, x, noise): return x + 0.1 * noise.normal("blur", like=x), None
    def finish(self, state, context): return avg_pool2d(state, 3, 1, 1).clamp(0, 1)
"""

FAULTS = {
    "range": GOOD.replace(".clamp(0, 1)", " + 1"),
    "shape": GOOD.replace("3, 1, 1)", "2)"),
    "noise-sites": GOOD.replace("noise.normal", '0.5 * noise.normal("blur", like=x) + 0.1 * noise.normal'),
    "repeatable": GOOD.replace('noise.normal("blur", like=x)', "__import__('torch').randn_like(x)"),
    "row-position": GOOD.replace("+ 0.1", "- x.mean() + 0.1"),
    "stochastic-as-declared": GOOD.replace("+ 0.1 * noise.normal(\"blur\", like=x)", ""),
    "zero-gradients": GOOD.replace("avg_pool2d(state", "avg_pool2d(state.round()"),
    "finite-differences": GOOD.replace("avg_pool2d(state", "avg_pool2d(0.5 * state + 0.5 * state.detach()"),
    "finite-logits": GOOD.replace("return x +", "return x / 0 * 0 +").replace(".clamp(0, 1)", ""),
    "runs": GOOD.replace("return x +", "return undefined +"),
    "eval-mode": GOOD.replace("def start", "def train(self, mode=True): return super().train(True)\n    def start"),
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "mine.py").write_text(text)
        return f"file:{tmp_path / 'mine.py'}:Mine"

    return write


@pytest.mark.parametrize("name", ["identity", "vae", "diffpure"])
def test_the_shipped_purifiers_pass(name, capsys):
    assert cli.main(["check", "--purifier", name]) == cli.DONE
    out = capsys.readouterr().out
    assert "FAIL" not in out and "null-floor" in out and "planned-cost" in out and "finite-differences" in out


def test_the_classifier_that_is_named_judges(capsys):
    for named, judge in (([], "resnet"), (["--classifier", "resnet-at"], "resnet-at")):
        assert cli.main(["check", "--purifier", "identity", *named, "--json"]) == cli.DONE
        (floor,) = [c for c in json.loads(capsys.readouterr().out)["identity"] if c["id"] == "null-floor"]
        assert floor["value"].endswith(f"(n=16, {judge})")


def test_a_newcomer_passes_and_sees_floor_and_cost(file, capsys):
    spec = file(GOOD)
    assert cli.main(["check", "--purifier", spec, "--json"]) == cli.DONE
    (found,) = json.loads(capsys.readouterr().out).items()
    assert found[0] == spec
    checks = {c["id"]: c for c in found[1]}
    assert {c["status"] for c in found[1]} <= {"pass", "n/a"}
    assert "worst of 9" in checks["null-floor"]["value"] and "passes" in checks["planned-cost"]["value"]
    assert all(set(c) == {"id", "status", "value", "threshold", "advice"} for c in found[1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_purifier_is_told_what_is_wrong(fault, file, capsys):
    assert cli.main(["check", "--purifier", file(FAULTS[fault]), "--json"]) == cli.FAILED
    (checks,) = json.loads(capsys.readouterr().out).values()
    failed = {c["id"]: c for c in checks if c["status"] == "fail"}
    if fault == "shape" and "runs" in failed:  # the shape checks of the test run were faster
        fault = "runs"
    assert fault in failed, failed
    assert failed[fault]["advice"]


def test_classifiers(file, capsys):
    assert cli.main(["check", "--classifier", "resnet-at"]) == cli.DONE
    assert "clean-accuracy" in capsys.readouterr().out
    wrong = """
import torch
def Mine(*, classes: int = 10, probabilities: bool = False):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, classes))
    return torch.nn.Sequential(net, torch.nn.Softmax(1)) if probabilities else net
"""
    spec = file(wrong)
    assert cli.main(["check", "--classifier", spec]) == cli.DONE, "a function that returns a module will do"
    assert "clean-accuracy" in capsys.readouterr().out
    assert cli.main(["check", "--classifier", f"{spec},classes=9"]) == cli.FAILED
    assert "one row of as many logits per image" in capsys.readouterr().out
    assert cli.main(["check", "--classifier", f"{spec},probabilities=true"]) == cli.FAILED
    assert "return logits" in capsys.readouterr().out


def test_a_checkpoint_that_reads_other_than_stated_fails():
    images = data.load("fashion-mnist")
    spoiled = Dataset("x", images.pixels, (images.labels + 1) % 10, images.ids, "x", images.form)
    found = {c.id: c for c in check.classifier("resnet", NEED, spoiled)}
    assert found["clean-accuracy"].status == "fail" and "of 64 images" in str(found["clean-accuracy"].value)


@pytest.mark.parametrize("name", ["pgd", "apgd", "autoattack"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_shipped_attacks_pass(name, norm, capsys):
    assert cli.main(["check", "--attack", name, "--norm", norm]) == cli.DONE
    assert "FAIL" not in capsys.readouterr().out


BASE = """
import torch
from attacks.pgd import PGD
class Mine(PGD):
"""


@pytest.mark.parametrize("fault, body", [
    ("inside-the-threat-model", "    def finish(self, state): return super().finish(state) + 0.01"),
    ("repeatable", "    def step(self, k, state, x, *rest):\n        s = super().step(k, state, x, *rest)\n"
                   "        return s | {'x_adv': x + (s['x_adv'] - x) * (1 - 0.1 * torch.rand(()))}"),
    ("linear-optimum", "    def step(self, k, state, *rest): return super().step(k, state, *rest) if k < 2 else state"),
])  # fmt: skip
def test_a_broken_attack_is_told_what_is_wrong(fault, body, file, capsys):
    assert cli.main(["check", "--attack", file(BASE + body), "--json"]) == cli.FAILED
    (checks,) = json.loads(capsys.readouterr().out).values()
    assert fault in {c["id"] for c in checks if c["status"] == "fail"}


def test_rounding_most_of_an_image_is_seen(file, capsys):
    text = GOOD.replace("return avg_pool2d(state", "state = __import__('torch').cat("
                        "[state[..., :27].round(), state[..., 27:]], -1); return avg_pool2d(state")  # fmt: skip
    assert cli.main(["check", "--purifier", file(text)]) == cli.FAILED
    assert "FAIL zero-gradients           0% of images, 9" in capsys.readouterr().out


def test_float32_inside_is_no_wrong_gradient(file, capsys):
    text = GOOD.replace("avg_pool2d(state, 3, 1, 1)", "avg_pool2d(state.float(), 3, 1, 1).to(state)")
    assert cli.main(["check", "--purifier", file(text)]) == cli.DONE


@pytest.mark.parametrize("kind, text", [
    ("classifier", "import torch\nclass Mine(torch.nn.Module):\n    def forward(self, x): return x.nothing"),
    ("purifier", "import torch\nclass Mine(torch.nn.Module):\n    def forward(self, x): return x.nothing"),
    ("attack", BASE + "    def step(self, k, state, *rest): return state['nothing']"),
])  # fmt: skip
def test_what_raises_is_a_failed_check_with_its_line(kind, text, file, capsys):
    assert cli.main(["check", f"--{kind}", file(text)]) == cli.FAILED
    out = capsys.readouterr().out
    assert "FAIL runs" in out and "nothing" in out and "mine.py:" in out


def test_nothing_to_check_is_bad_usage(capsys):
    assert cli.main(["check"]) == cli.USAGE
    assert "--purifier, --classifier or --attack" in capsys.readouterr().err


ROUNDS = GOOD.replace("class Mine(Purifier):", "class Mine(Purifier):\n    differentiable = False").replace(
    "return x +", "return (32 * x).round() / 32 +"
)


def test_what_rounds_and_says_so_is_attacked_through_the_identity_and_passes(file, capsys):
    assert cli.main(["check", "--purifier", file(ROUNDS), "--json"]) == cli.DONE
    (checks,) = json.loads(capsys.readouterr().out).values()
    found = {c["id"]: c for c in checks}
    assert found["view"]["value"] == "bpda" and found["rounds-as-declared"]["status"] == "pass"
    assert found["gradient-climbs"]["status"] == "pass" and "planned-cost" in found
    assert cli.main(["audit", "--only", "gradients", "--purifier", file(ROUNDS), "--n-examples", "2"]) == cli.DONE
    assert "exact-says-something: **n/a** (zero)" in capsys.readouterr().out, "and no traceback"


def test_what_runs_more_often_than_its_nfe_says_is_told(file, capsys):
    """A loop inside ``finish`` around a network, which a table would print as one evaluation."""
    body = """
import torch
from purifiers import Purifier
class Mine(Purifier):
    stochastic = False
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        torch.nn.init.dirac_(self.net.weight)
    def start(self, x, noise): return x, None
    def finish(self, state, context):
        for _ in range(7):
            state = self.net(state)
        return state.clamp(0, 1)
"""
    honest = body + "    @property\n    def nfe(self): return 7\n"
    for text, status in ((body, "warn"), (honest, "pass")):
        assert cli.main(["check", "--purifier", file(text), "--json"]) == cli.DONE
        (checks,) = json.loads(capsys.readouterr().out).values()
        (counted,) = [c for c in checks if c["id"] == "evaluations"]
        assert counted["status"] == status and counted["value"] == "7 per image"


@pytest.mark.parametrize("name", ["diffpure", "latent", "map:steps=3", "nvae", "vqvae:resample=0.5"])
def test_the_shipped_purifiers_say_how_often_their_networks_run(name, capsys):
    assert cli.main(["check", "--purifier", name, "--json"]) == cli.DONE
    (checks,) = json.loads(capsys.readouterr().out).values()
    (counted,) = [c for c in checks if c["id"] == "evaluations"]
    assert counted["status"] == "pass"
