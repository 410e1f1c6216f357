"""Asked again once the attack is over, a defense says what the verdict heard; one that doesn't gets an F."""

from __future__ import annotations

import pytest
import torch

from attacks import NORMS
from attacks._views import Exact
from benchmark import evaluate, grades
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
    assert {c["status"] for c in run["afterwards"]} <= {"pass", "fail"}
    assert result.rows[0]["robust"] == (1.0 if failed else 0.0), "the number is what was measured"
    (grade,) = grades.grades([(run, run["records"], [run])], [run])
    assert (grade.letter == "F") == bool(failed)
    assert ("its grade is F" in capsys.readouterr().err) == bool(failed)


def test_shards_ask_again_of_what_is_recorded(tmp_path):
    x, y = torch.cat([X, X]), torch.cat([Y, Y])
    for shard in ("1/2", "2/2"):
        result = evaluate(
            Defense(Plain(), Bright()), (x, y), "pgd:steps=2", eps="0.1", out=tmp_path, shard=shard, quiet=True,
            device="cpu",
        )  # fmt: skip
    assert [c["status"] for c in read_run(result.folder)["afterwards"]] == ["pass", "pass"]


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
    assert climb_check(defense, Exact(), X, Y, tape, threat, rows=64).status == status
    assert climb_check(defense, Exact(), X[:5], Y[:5], tape[:5], threat, rows=64).status == "n/a"


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


def test_who_has_a_gradient_may_not_choose_the_attackers(tmp_path):
    tape = Tape(0, "preflight", torch.arange(4))
    for purifier, status in ((Plain, "n/a"), (Steps, "pass"), (Claims, "fail")):
        assert declared_check(Defense(purifier(), Bright()), X[:4], Y[:4], tape).status == status
    settings = {"eps": "0.1", "quiet": True, "device": "cpu"}
    evaluate(Defense(Steps(), Bright()), (X, Y), "pgd:steps=1", out=tmp_path / "steps", **settings)
    with pytest.raises(RunError, match="rounds-as-declared.*its gradient is right: leave that out"):
        evaluate(Defense(Claims(), Bright()), (X, Y), "pgd:steps=1", out=tmp_path / "claims", **settings)


class Sharp(torch.nn.Module):
    """Bends within 1e-5: central differences need a smaller step."""

    def forward(self, x):
        return (torch.sin(1e5 * x) / 1e5).flatten(1).sum(1)


def test_a_gradient_that_bends_sharply_is_right_in_the_small():
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    errors = [finite_difference_error(lambda module, z: module(z), Sharp(), x, h=h) for h in (1e-5, 1e-7)]
    assert errors[0] > 1e-2 > errors[1]
