"""Evaluation end to end, where the right number is known: a Gaussian victim, a coin, and the records themselves."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor, nn

from attacks import NORMS
from benchmark import (
    cli,
    config,
    data,
    defenses,
    evaluate,
    evidence,
    grades,
    load,
    loaders,
    report,
    stats,
    writers,
)  # fmt: skip
from benchmark.cell import Incomplete, Result
from benchmark.dataset import Dataset, Form
from benchmark.errors import RunError, UsageError
from benchmark.results import find_runs, read_run
from classifiers import Classifier
from classifiers.resnet import ResNet
from purifiers import Defense, Noise, Purifier, Tape
from purifiers.diffpure import DiffPure
from purifiers.identity import Identity

HERE = Path(__file__)
DIMENSIONS, MU, S = 64, 0.02, 0.05
W = torch.tensor([(-1.0) ** i * (0.5 + i / DIMENSIONS) for i in range(DIMENSIONS)], dtype=torch.float64)
RADII = {"Linf": "1/64", "L2": "1/8"}


class OneStage(Purifier):
    """A one-shot purifier of one map; the whole of what these tests need of the contract."""

    def start(self, x: Tensor, noise: Noise) -> tuple[Tensor, None]:
        return self.clean(x, noise), None

    def finish(self, state: Tensor, context: None) -> Tensor:
        return state

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        raise NotImplementedError


class Linear(OneStage):
    """g(x) = 0.5 + shrink (x + sigma n - 0.5): noise, then the linear denoiser of a Gaussian."""

    def __init__(self, *, sigma: float = 0.05, shrink: float = 0.5):
        super().__init__()
        self.sigma, self.shrink, self.stochastic = sigma, shrink, sigma > 0

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        noisy = x + self.sigma * noise.normal("noise", like=x) if self.stochastic else x
        return 0.5 + self.shrink * (noisy - 0.5)


class TwoLogits(Classifier):
    """(-w·(x - 0.5), w·(x - 0.5), -10): the third is there for DLR, which needs three classes, and never wins."""

    def forward(self, x: Tensor) -> Tensor:
        score = (x - 0.5).flatten(1) @ W.to(x)
        return torch.stack((-score, score, torch.full_like(score, -10.0)), 1)


def gaussian(n: int = 1000) -> tuple[Tensor, Tensor]:
    """x ~ N(0.5 + y mu, s² I) with y = ±1 and mu = MU sign(w); labels 0 and 1.

    On a grid of 2^-20, so that x ± eps has no rounding and a known adversarial image is known to the bit.
    """
    y = torch.arange(n) % 2
    noise = torch.randn(n, DIMENSIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = 0.5 + (2 * y - 1)[:, None] * MU * W.sign() + S * noise
    return ((x * 2**20).round() / 2**20).float().view(n, 1, 8, 8), y


def gaussian_accuracy(name: str, eps: float, sigma: float) -> float:
    """Phi((w·mu - eps ‖w‖*) / (‖w‖_2 sqrt(s² + sigma²))), ‖·‖* the dual of the threat's norm."""
    dual = W.abs().sum() if name == "Linf" else W.norm()
    return float(norm.cdf((MU * W.abs().sum() - eps * dual) / (W.norm() * (S**2 + sigma**2) ** 0.5)))


def attack_on_gaussian(name: str) -> str:
    # towards an L2 optimum a random start only turns slowly; from x the first step points there
    return "pgd:steps=5" if name == "Linf" else "pgd:steps=5,random_start=false"


def contains(records: list[dict], key: str, expected: float) -> bool:
    """Whether the 99.9 % interval of the mean accuracy holds ``expected``."""
    interval = stats.accuracy(evidence.shares(records, key), len(records[0][key]), confidence=0.999)
    return interval.low <= expected <= interval.high


# --- the Gaussian known answer


@pytest.mark.parametrize("sigma", [0.0, 0.05], ids=["deterministic", "stochastic"])
@pytest.mark.parametrize("name", ["Linf", "L2"])
def test_gaussian_known_answer(tmp_path, name, sigma):
    x, y = gaussian()
    purifier, eps = Linear(sigma=sigma), RADII[name]
    result = evaluate(
        Defense(purifier, TwoLogits()), (x, y), attack_on_gaussian(name), norm=name, eps=eps, n=len(x), out=tmp_path,
        quiet=True,
    )  # fmt: skip

    x_adv = torch.from_numpy(np.load(result.folder / "adversarial.npy"))
    towards = (1 - 2 * y).view(-1, 1, 1, 1) * W.view(1, 1, 8, 8)  # where the true class loses most
    radius = float(Fraction(eps))
    if name == "Linf":
        assert torch.equal(x_adv, (x + radius * towards.sign()).float())
    else:
        torch.testing.assert_close(x_adv, (x + radius * towards / W.norm()).float(), atol=1e-6, rtol=0)
    assert (NORMS[name](Fraction(eps)).distance(x_adv, x) <= radius).all()

    purified = purifier(x_adv, Tape(0, "verdict", torch.arange(len(x))))
    assert x_adv.min() > 0 and x_adv.max() < 1 and purified.min() > 0 and purified.max() < 1, "a clamp acted"

    robust, clean = (gaussian_accuracy(name, radius * attacked, sigma) for attacked in (1, 0))
    assert 0.5 < robust < 0.9 < clean
    assert contains(result.records, "adv", robust)
    assert contains(result.records, "clean", clean)
    (row,) = result.rows
    assert row["robust"] == pytest.approx(float(evidence.shares(result.records).mean()))
    assert row["n"] == 1000 and row["draws"] == (9 if sigma else 1)


def test_gaussian_known_answer_by_the_command(tmp_path, monkeypatch, capsys):
    """The same number from ``run`` and ``report`` as a user gives them, the Gaussian being a data set by name."""
    x, y = gaussian()
    form = Form("gaussian", tuple(x.shape[1:]), 2)
    known = Dataset("gaussian", x, y, torch.arange(len(y)), "gaussian", form)
    monkeypatch.setitem(loaders.LOADERS, "gaussian", lambda request, *, split="test": known)
    command = [
        "run", "--dataset", "gaussian", "--purifier", f"file:{HERE}:Linear,sigma=0.05",
        "--classifier", f"file:{HERE}:TwoLogits", "--attack", attack_on_gaussian("Linf"), "--eps", RADII["Linf"],
        "--n-examples", "1000", "--device", "cpu", "--out", str(tmp_path),
    ]  # fmt: skip
    assert cli.main(command) == 0
    assert "| 1000 | 9 |" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path), "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (run,) = find_runs([tmp_path])

    expected = gaussian_accuracy("Linf", 1 / 64, 0.05)
    assert contains(run["records"], "adv", expected)
    assert row["robust"] == pytest.approx(float(evidence.shares(run["records"]).mean()))
    x_adv = np.load(Path(row["run"]) / "adversarial.npy")
    assert np.array_equal(x_adv, (x + (1 - 2 * y).view(-1, 1, 1, 1) / 64 * W.sign().view(1, 1, 8, 8)).numpy())


# --- the null defense


class Coin(OneStage):
    """Writes heads (probability 0.9) or tails into the first pixel, whatever the image.

    Draws are keyed, so two attacks are judged by one tape; the image turns a dial, so that they still see other coins.
    """

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        dial = 200 * x.flatten(1)[:, 1:].mean(1).view(-1, 1, 1, 1)
        heads = ((noise.uniform("coin", like=x[:, :1, :1, :1]) + dial) % 1 < 0.9).to(x)
        first = torch.zeros_like(x[:1])
        first[..., 0, 0] = 1
        return x * (1 - first) + heads * first


class ReadsTheCoin(Classifier):
    """Class 0 on heads, else class 1; the image moves the logits, so that gradients exist, and never the class."""

    def forward(self, x: Tensor) -> Tensor:
        heads, rest = x[:, 0, 0, 0], x.flatten(1)[:, 1:].mean(1)
        return torch.stack((10 * heads + rest, 5 - rest, torch.zeros_like(rest)), 1)


NULL_ATTACKS = [
    "pgd:steps=2,eot=2,step=0.3", "apgd:steps=2,eot=2", "autoattack:steps=2,eot=2", "square:queries=12,eot=2,refresh=6",
    "diffattack:steps=2,eot=2,step=0.5", "lf:steps=2,eot=2,block=2,step=0.7", "transfer:steps=2,eot=2,step=0.9",
    "uniform:queries=6,eot=2",
]  # fmt: skip
IN_LOOP = {"pgd": 4, "apgd": 6, "autoattack": 12, "diffattack": 4, "lf": 4}
"""Draws that an attack looks at once each, in the loop."""


@pytest.fixture(scope="module")
def null_runs(tmp_path_factory) -> list[dict]:
    """A defense that is right with probability 0.9 whatever the input, under eight attacks: n = 256, 9 draws."""
    out = tmp_path_factory.mktemp("null")
    x, y = torch.rand(256, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(256, dtype=torch.long)
    for attack in NULL_ATTACKS:
        evaluate(Defense(Coin(), ReadsTheCoin()), (x, y), attack, eps="16/255", n=256, out=out, quiet=True)
    return find_runs([out])


def test_null_defense_reads_its_accuracy_under_every_attack(null_runs):
    assert len(null_runs) == len(NULL_ATTACKS)
    for run in null_runs:
        for key in ("clean", "adv", "random"):
            assert contains(run["records"], key, 0.9), (run["names"]["attack"], key)


def test_null_defense_reads_its_accuracy_in_the_worst_case_row(null_runs):
    *_, worst = report.rows(null_runs, worst_case=True)
    assert worst["attack"] == "worst-case" and worst["n"] == 256
    per_attack = np.stack([evidence.shares(run["records"]) for run in null_runs])
    assert per_attack.min(0).mean() < 0.8, "the minimum over verdict draws should be far below, or this test is blind"
    # images and draws of a coin are all independent: 256 · 9 tosses
    low, high = binom.interval(0.999, 256 * 9, 0.9)
    assert low <= worst["robust"] * 256 * 9 <= high


def test_null_defense_breaks_in_the_loop_no_more_than_at_its_floor(null_runs):
    for run, row in zip(null_runs, report.rows(null_runs), strict=True):
        if (seen := IN_LOOP.get(run["names"]["attack"].split(":")[0])) is None:
            continue
        assert contains([{"label": 1, "hit": [int(r["broken_at"] < 0)]} for r in run["records"]], "hit", 0.9**seen)
        assert contains([{"label": 1, "hit": [int(r["null_wrong"] == 0)]} for r in run["records"]], "hit", 0.9**seen)
        assert row["robust_any_iteration"] < 0.8 and abs(row["robust_any_iteration"] - row["null_floor"]) < 0.15


@pytest.mark.parametrize("attack, draws", [
    ("square:queries=30,eot=2,refresh=10", 6), ("uniform:queries=12,eot=2,refresh=1", 24), ("identity", 0),
    ("transfer:steps=2,eot=2", 0), ("apgd:steps=2,eot=2,restarts=2", 12),
    ("torchattacks:PGD,steps=2", 0), ("torchattacks:Square,queries=5", 0),
])  # fmt: skip
def test_null_defense_reads_its_accuracy_under_the_other_attacks(attack, draws, tmp_path):
    """And its floor is measured with as many draws as the attack's are different: square asks its own again."""
    x, y = torch.rand(256, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(256, dtype=torch.long)
    result = evaluate(Defense(Coin(), ReadsTheCoin()), (x, y), attack, eps="16/255", n=256, out=tmp_path, quiet=True)
    for key in ("clean", "adv", "random"):
        assert contains(result.records, key, 0.9), key
    floors = [{"label": 1, "hit": [int(r["null_wrong"] == 0)]} for r in result.records]
    assert contains(floors, "hit", 0.9**draws) if draws else all(f["hit"] == [1] for f in floors)


def test_a_packages_own_verdict_stands_beside_ours_with_its_own_floor(tmp_path, capsys):
    """Three single draws decide the package's: it reads 0.9³ = 73 % where nothing can be gained, and ours 90 %."""
    x, y = torch.rand(256, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(256, dtype=torch.long)
    attack = "autoattack:version=rand,backend=pyautoattack,steps=2,eot=2"
    result = evaluate(Defense(Coin(), ReadsTheCoin()), (x, y), attack, eps="16/255", n=256, out=tmp_path)
    assert contains(result.records, "adv", 0.9)
    for key in ("package_verdict", "package_null"):
        assert contains([{"label": 1, "hit": [int(r[key])]} for r in result.records], "hit", 0.9**3), key
    (row,) = result.rows
    assert (
        row["display"].startswith("APGD-CE+DLR (2 it, EOT 2, pyautoattack 0.") and "[noise: stream]" in row["display"]
    )
    assert "made for deterministic" not in capsys.readouterr().err
    standard = "autoattack:version=standard,backend=native,steps=2,eot=2,queries=3"
    with pytest.raises(UsageError, match="at least 10 classes"):
        evaluate(Defense(Coin(), ReadsTheCoin()), (x, y), standard, eps="16/255", n=32, out=tmp_path)


def test_worst_case_takes_each_image_from_the_attack_with_the_fewest_correct_select_draws(null_runs):
    *_, worst = report.rows(null_runs, worst_case=True)
    select = np.stack([evidence.shares(run["records"], "select") for run in null_runs])
    verdict = np.stack([evidence.shares(run["records"], "adv") for run in null_runs])
    least = select == select.min(0)
    lowest, highest = np.where(least, verdict, 2).min(0), np.where(least, verdict, -1).max(0)
    assert (least.sum(0) == 1).sum() > 10, "some images must have one attack that select decides for"
    assert lowest.mean() - 1e-9 <= worst["robust"] <= highest.mean() + 1e-9
    # with one possible choice per image the row is known exactly
    single = [i for i in range(256) if least[:, i].sum() == 1]
    only = [run | {"records": [run["records"][i] for i in single]} for run in null_runs]
    *_, worst = report.rows(only, worst_case=True)
    assert worst["robust"] == pytest.approx(lowest[single].mean())


# --- records, rows and formats


@pytest.fixture(scope="module")
def lively() -> Defense:
    """Untrained tiny DiffPure and ResNet on 8×8 images, with a head loud enough that predictions differ."""
    torch.manual_seed(0)
    parts = ResNet.parts((1, 8, 8))
    classifier = ResNet(*parts.values())
    classifier.eval()
    with torch.no_grad():
        classifier.net[-1].weight.mul_(30)
        classifier.net[-1].bias.sub_(classifier(torch.rand(64, 1, 8, 8)).mean(0))
    return Defense(DiffPure(*DiffPure.parts((1, 8, 8)).values(), t_star=0.3, steps=2, rule="eta"), classifier)


@pytest.fixture(scope="module")
def images(lively) -> tuple[Tensor, Tensor]:
    """48 noise images; three of four labels are what the defense says."""
    x = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = lively(x, Tape(9, "labels", torch.arange(48))).argmax(1)
    return x, torch.where(torch.arange(48) % 4 == 0, (y + 1) % 10, y)


def run_lively(defense: Defense, images: tuple[Tensor, Tensor], out: Path, **settings) -> Result:
    usual = {"attack": "pgd:steps=3,eot=2", "eps": "32/255", "draws": 5, "quiet": True, "preflight": False}
    return evaluate(defense, images, out=out, **usual | settings)


def same_files(a: Result, b: Result) -> bool:
    return all((a.folder / f).read_bytes() == (b.folder / f).read_bytes() for f in ("records.jsonl", "adversarial.npy"))


def test_row_count_changes_no_byte(tmp_path, lively, images):
    few, many = (run_lively(lively, images, tmp_path / str(rows), n=40, rows=rows) for rows in (32, 64))
    assert len({c for r in few.records for c in r["adv"]}) > 1, "predictions must differ for this to say anything"
    assert same_files(few, many)
    a, b = (np.load(result.folder / "logits.npz") for result in (few, many))
    assert set(a) == {"id", "clean", "adv", "select", "random"}
    assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("attack", ["pgd:steps=3,eot=2", "autoattack:steps=2,eot=2"])
def test_extending_a_run_changes_no_byte(tmp_path, lively, images, attack):
    first = run_lively(lively, images, tmp_path / "extended", n=8, attack=attack)
    assert len(first.records) == 8
    extended = run_lively(lively, images, tmp_path / "extended", n=40, attack=attack)
    at_once = run_lively(lively, images, tmp_path / "at once", n=40, attack=attack)
    assert extended.folder == first.folder
    assert extended.records[:8] == first.records
    assert same_files(extended, at_once)


def test_packages_autoattack_extends_byte_by_byte(tmp_path):
    """The package searches whole blocks; an extension must not see other blocks."""
    torch.manual_seed(0)
    x, y = gaussian(40)
    defense = Defense(Identity(), TwoLogitsOfFive())
    extended = [
        evaluate(defense, (x, y), "autoattack", eps="1/16", n=n, out=tmp_path / "a", quiet=True) for n in (8, 40)
    ]
    at_once = evaluate(defense, (x, y), "autoattack", eps="1/16", n=40, out=tmp_path / "b", quiet=True)
    assert extended[1].records[:8] == extended[0].records
    assert same_files(extended[1], at_once)
    stopped = {"eps": "1/16", "out": tmp_path / "c", "quiet": True}
    with pytest.raises(Incomplete):
        evaluate(defense, (x, y), "autoattack", n=32, stop_after=0, **stopped)
    (state,) = (tmp_path / "c").rglob("state.pt")
    saved = state.read_bytes()
    evaluate(defense, (x, y), "autoattack", n=32, **stopped)
    state.write_bytes(saved)  # as a kill leaves it when the group that was under way has ended since
    assert same_files(evaluate(defense, (x, y), "autoattack", n=40, **stopped), at_once)
    (row,) = at_once.rows
    assert row["display"].startswith("AutoAttack (standard, pyautoattack ")
    assert {r["package_verdict"] for r in at_once.records} <= {True, False}


class TwoLogitsOfFive(TwoLogits):
    """The package's targeted attacks want more classes than targets."""

    def forward(self, x: Tensor) -> Tensor:
        two = super().forward(x)[:, :2]
        return torch.cat((two, (0.1 * two[:, :1] - torch.arange(10.0, 18.0))), 1)


def test_records_hold_the_facts_of_each_image(tmp_path, lively, images):
    x, y = images
    result = run_lively(lively, images, tmp_path, n=8, draws=5)
    lines = (result.folder / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.records
    x_adv = torch.from_numpy(np.load(result.folder / "adversarial.npy"))
    threat = NORMS["Linf"](Fraction("32/255"))
    logits = np.load(result.folder / "logits.npz")
    for i, record in enumerate(result.records):
        assert set(record) == {
            "id", "label", "clean", "adv", "select", "random", "distance", "broken_at", "null_wrong", "fallback",
            "package_verdict", "package_null", "code_flips", "forwards", "backwards", "blank",
        }  # fmt: skip
        assert record["id"] == i and record["label"] == y[i]
        assert [len(record[k]) for k in ("clean", "adv", "random", "select")] == [5, 5, 5, 8]
        assert all(record[k] == logits[k][i].argmax(-1).tolist() for k in ("clean", "adv", "random", "select"))
        assert record["distance"] == float(threat.distance(x_adv[i : i + 1], x[i : i + 1])) <= 32 / 255
        assert record["fallback"] is (record["distance"] == 0)
        assert -1 <= record["broken_at"] < 3 and 0 <= record["null_wrong"] <= 6
        # 3 iterations of 2 draws, as many at x for the null floor, three verdicts of 5, 8 select draws
        # of the one candidate, and 8 of the chosen
        assert (record["forwards"], record["backwards"]) == (6 + 6 + 15 + 16, 6)
    # the verdict is the defense's word on what lies on disk, on draws of the role of that name
    with torch.no_grad():
        tape = Tape(0, "verdict", torch.arange(8)).draws(5)
        verdict = lively(x_adv.repeat_interleave(5, 0), tape).argmax(1).view(8, 5)
    assert verdict.tolist() == [r["adv"] for r in result.records]


def test_rows_are_the_same_in_every_format(null_runs):
    rows = report.rows(null_runs, worst_case=True)
    assert all(list(row) == report.COLUMNS for row in rows)
    assert json.loads(writers.render(report.Table(rows), "json")) == rows

    table = list(csv.DictReader(io.StringIO(writers.render(report.Table(rows), "csv"))))
    assert list(table[0]) == report.COLUMNS and len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        for column, value in row.items():
            if value is None:
                assert line[column] == ""
            else:
                assert type(value)(line[column]) == value, column

    head, _, *lines = writers.render(report.Table(rows), "md").split("\n\n")[1].splitlines()
    names = [cell.strip() for cell in head.strip("|").split(" | ")]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        cells = dict(zip(names, (cell.strip() for cell in line.strip("|").split(" | ")), strict=True))
        percent = [f"{100 * row[k]:.1f}" for k in ("robust", "robust_low", "robust_high")]
        assert cells["robust % [95 %]"] == "{} [{}, {}]".format(*percent)
        assert (cells["attack"], cells["n"], cells["draws"]) == (row["display"], str(row["n"]), str(row["draws"]))


# --- preflight


class Probabilities(TwoLogits):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Infinite(TwoLogits):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0.0


class Detached(OneStage):
    stochastic = False

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        return x.detach()


class StraightThrough(OneStage):
    stochastic = False

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        return x + (x.square() - x).detach()


class Rounds(OneStage):
    stochastic = False

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        return (255 * x).round() / 255


class OutOfRange(OneStage):
    stochastic = False

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        return 2 * x


class BatchMean(OneStage):
    stochastic = False

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        return 0.5 + 0.5 * (x - x.mean(0, keepdim=True))


class ClaimsToBeDeterministic(Linear):
    def __init__(self):
        super().__init__()
        self.stochastic = False

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        return x + 0.05 * noise.normal("noise", like=x)


class ClaimsToBeStochastic(OneStage):
    stochastic = True

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        return x


class GlobalNoise(OneStage):
    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        return x + 0.05 * torch.randn_like(x)


class Trains(TwoLogits):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.dropout.train()
        return super().forward(self.dropout(x))


class Remembers(OneStage):
    """A query near an earlier one is answered as the earlier one was."""

    def __init__(self):
        super().__init__()
        self.seen: list[Tensor] = []

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        answers = []
        for row in x.detach():
            near = [old for old in self.seen if (old - row).abs().max() < 0.1]
            self.seen += [] if near else [row]
            answers.append(near[0] if near else row)
        return torch.stack(answers) + 0.01 * x - 0.01 * x.detach()


class Locked(Identity):
    """Can't be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class KeepsActivations(Linear):
    """As published modules do, with their graph: in an attribute, in a list; and a weight that each call norms."""

    def __init__(self):
        super().__init__()
        self.all: list[Tensor] = []
        self.scale = nn.utils.weight_norm(nn.Linear(1, 1))

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        self.last = 1.0 * x
        self.all.append(self.last)
        return super().clean(self.last + 0.0 * self.scale(x[..., :1]), noise)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_defense_that_keeps_its_last_activations_is_evaluated(tmp_path):
    settings = {"attack": "pgd:steps=2", "eps": "1/64", "n": 4, "quiet": True}
    plain = evaluate(Defense(Linear(), TwoLogits()), gaussian(8), out=tmp_path / "plain", **settings)
    kept = evaluate(Defense(KeepsActivations(), TwoLogits()), gaussian(8), out=tmp_path / "kept", **settings)
    assert [r["adv"] for r in kept.records] == [r["adv"] for r in plain.records]


class MasksOffClean(OneStage):
    """The identity on the images themselves, and without a gradient anywhere else."""

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        away = torch.cdist(x.flatten(1), gaussian(8)[0].to(x).flatten(1)).amin(1)
        return torch.where((away < 1e-3).view(-1, 1, 1, 1), x, x.detach())


@pytest.mark.parametrize(
    ("purifier", "classifier", "check"),
    [
        (Remembers, TwoLogits, "stateless"),
        (Locked, TwoLogits, "copyable"),
        (MasksOffClean, TwoLogits, "zero-gradients"),
        (Identity, Probabilities, "logits-not-probabilities"),
        (Identity, Infinite, "finite-logits"),
        (Identity, Trains, "eval-mode"),
        (Detached, TwoLogits, "zero-gradients"),
        (Rounds, TwoLogits, "zero-gradients"),
        (StraightThrough, TwoLogits, "finite-differences"),
        (OutOfRange, TwoLogits, "range"),
        (BatchMean, TwoLogits, "row-position"),
        (ClaimsToBeDeterministic, TwoLogits, "stochastic-as-declared"),
        (ClaimsToBeStochastic, TwoLogits, "stochastic-as-declared"),
        (GlobalNoise, TwoLogits, "repeatable"),
    ],
)
def test_preflight_stops_a_defense_that_would_be_measured_wrongly(tmp_path, purifier, classifier, check):
    defense = Defense(purifier(), classifier())
    with pytest.raises(RunError, match=rf"nothing was run[\s\S]*\n  {check}: "):
        evaluate(defense, gaussian(8), "pgd:steps=1", eps="1/64", n=8, out=tmp_path, quiet=True)
    assert not list(tmp_path.rglob("journal.jsonl"))


class DecidesAside(OneStage):
    """A class is decided where no gradient sees it; what passes by it is smooth, and says little."""

    stochastic = False

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        bright = (x.flatten(1).mean(1).detach() > 0.5).to(x.dtype).view(-1, 1, 1, 1)
        return 0.5 + (bright - 0.5) * 0.2 + 0.01 * (x - 0.5)


class DecidesSmoothly(DecidesAside):
    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        bright = (200 * (x.flatten(1).mean(1) - 0.5)).sigmoid().view(-1, 1, 1, 1)
        return 0.5 + (bright - 0.5) * 0.2 + 0.01 * (x - 0.5)


class Above(nn.Module):
    """Class 1 for images whose mean brightness is above a half."""

    def forward(self, x: Tensor) -> Tensor:
        bright = 100 * (x.flatten(1).mean(1, keepdim=True) - 0.5)
        return torch.cat([-bright, bright, 0 * bright - 9], 1)


@pytest.mark.parametrize("combine", ["logits", "vote"])
@pytest.mark.parametrize(("purifier", "warned"), [(DecidesAside, True), (DecidesSmoothly, False)])
def test_a_gradient_that_passes_a_decision_by_is_warned_of(tmp_path, capsys, purifier, warned, combine):
    """It is right almost everywhere, so that no derivative gives it away: its integral does."""
    x = torch.linspace(0.3, 0.7, 8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    defense = Defense(purifier(), Above(), copies=2 if combine == "vote" else 1, combine=combine)
    y = defense(x).argmax(1)
    settings = {"eps": "1/64", "n": 8, "out": tmp_path, "quiet": False}
    result = evaluate(defense, (x, y), "pgd:steps=20", **settings)
    assert ("gradient-integral is" in capsys.readouterr().err) == warned
    run = read_run(result.folder)
    assert run["warnings"] == ["gradient-integral"] * warned
    (grade,) = grades.grades([(run, result.records, [run])], [run])
    assert (("gradient-integral", "warn") in [check[:2] for check in grade.checks]) == warned


class Smoothed(TwoLogits):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_a_classifier_that_draws_is_told_where_its_noise_belongs(tmp_path):
    with pytest.raises(RunError, match=r"repeatable: .*--purifier noise:sigma=0.1 --copies 10 --combine vote"):
        evaluate(Defense(Identity(), Smoothed()), gaussian(8), "pgd", eps="1/64", n=8, out=tmp_path, quiet=True)


def test_a_search_that_has_broken_an_image_and_stands_still_is_not_a_weak_one(tmp_path, capsys):
    """The ratio of logits is flat once two classes stand before the label's: it has nothing left to find."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    result = evaluate(
        Defense(Identity(), net), (x, y), "pgd:steps=20,loss=dlr", eps="0.3", n=16, out=tmp_path, quiet=False,
        preflight=False,
    )  # fmt: skip
    assert result.rows[0]["robust"] == 0 and all(r["blank"] < 2 for r in result.records)
    assert "led nowhere" not in capsys.readouterr().err


def test_what_a_package_saw_of_gradients_is_not_known(tmp_path):
    x, y = gaussian(4)
    result = evaluate(
        Defense(Identity(), TwoLogits()), (x, y), "torchattacks:PGD,steps=2", eps="1/64", n=4, out=tmp_path, quiet=True
    )
    assert [r["blank"] for r in result.records] == [None] * 4
    assert evidence.led(read_run(result.folder)) is None


class Saturated(TwoLogits):
    """So sure that the softmax is 1 in float32, and cross-entropy's gradient 0."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + 200 * (logits.detach().sign())


@pytest.mark.parametrize(("loss", "led"), [("ce", False), ("margin", True)])
def test_an_attack_whose_gradients_vanish_says_so_and_does_not_count(tmp_path, capsys, loss, led):
    x, _ = gaussian(32)
    defense = Defense(Identity(), Saturated())
    y = defense(x).argmax(1)
    result = evaluate(
        defense, (x, y), f"pgd:steps=20,loss={loss}", eps="1/64", n=32, out=tmp_path, quiet=False, preflight=False
    )
    assert ("gradients led nowhere" in capsys.readouterr().err) == (not led)
    assert all(r["blank"] == (0 if led else r["backwards"]) for r in result.records)
    run = read_run(result.folder)
    (grade,) = grades.grades([(run, result.records, [run])], [run])
    assert {c.id: c.status for c in grade.checks}["gradients"] == ("pass" if led else "not run")


def test_without_preflight_the_run_goes_on_and_the_table_says_so(tmp_path):
    result = evaluate(
        Defense(GlobalNoise(), TwoLogits()), gaussian(8), "pgd:steps=1", eps="1/64", n=8, out=tmp_path, quiet=True,
        preflight=False,
    )  # fmt: skip
    assert "[no preflight]" in writers.render(report.Table(result.rows), "md")


# --- identity


def test_a_defense_built_by_hand_with_other_options_is_another_run(tmp_path):
    settings = {"attack": "pgd:steps=1", "eps": "1/64", "n": 4, "out": tmp_path, "quiet": True}
    quiet, loud = (
        evaluate(Defense(Linear(sigma=sigma), TwoLogits()), gaussian(4), **settings) for sigma in (1e-3, 0.2)
    )
    assert quiet.folder != loud.folder, "the second evaluation must not be answered with the first one's records"


class Counts(Linear):
    """Keeps an account of its calls, as published purifiers do: in an attribute, a list and buffers."""

    def __init__(self):
        super().__init__()
        self.calls, self.log = 0, ["begun"]
        self.register_buffer("counter", torch.zeros(1))
        self.register_buffer("other", torch.zeros(1))
        self.register_buffer("repeated", torch.full((1, 1), 0.5).expand(1, 8))
        self.register_buffer("unknown", torch.full((1, 1), torch.nan).expand(1, 8))
        self.register_buffer("seen", torch.zeros(0))

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        self.calls += 1
        self.log.append(len(x))
        self.last = x.detach()
        self.counter += 1
        self.other = self.other + self.repeated.sum()
        self.seen.data = x.new_ones(len(x))  # as lazy buffers are filled
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(1))
        return super().clean(x, noise)


def test_an_option_that_came_later_leaves_the_identity_of_older_runs_alone(tmp_path):
    settings = {"eps": "1/64", "n": 4, "out": tmp_path, "quiet": True}
    plain = evaluate(Defense(Identity(), TwoLogits()), gaussian(4), "pgd:steps=1", **settings)
    zero = evaluate(Defense(Identity(), TwoLogits()), gaussian(4), "pgd:steps=1,momentum=0.0", **settings)
    other = evaluate(Defense(Identity(), TwoLogits()), gaussian(4), "pgd:steps=1,momentum=0.5", **settings)
    told = [json.loads((r.folder / "run.json").read_text())["identity"]["attack"] for r in (plain, other)]
    assert "momentum" not in told[0] and "momentum=0.5" in told[1]
    assert plain.folder == zero.folder != other.folder


def test_a_defense_that_counts_its_calls_is_the_same_at_the_next_evaluation(tmp_path, capsys):
    defense = Defense(Counts(), TwoLogits())
    settings = {"attack": "pgd:steps=1", "eps": "1/64", "out": tmp_path}
    first = evaluate(defense, gaussian(8), n=4, quiet=True, **settings)
    assert (defense.purifier.calls, defense.purifier.log, float(defense.purifier.counter)) == (0, ["begun"], 0)
    assert float(defense.purifier.other) == 0 and defense.purifier.repeated.shape == (1, 8)
    assert defense.purifier.seen.shape == (0,) and defense.purifier.unknown.isnan().all()
    assert not hasattr(defense.purifier, "last") and not hasattr(defense.purifier, "late"), "given back as it was"
    more = evaluate(defense, gaussian(8), n=8, quiet=True, **settings)
    assert more.folder == first.folder and len(more.records) == 8
    again = evaluate(defense, gaussian(8), n=8, quiet=False, **settings)
    assert again.folder == first.folder and "nothing to compute" in capsys.readouterr().err


def test_a_loaded_defense_that_was_changed_is_no_longer_the_one_that_was_loaded(tmp_path):
    def loaded() -> Defense:
        return load("vae", classifier="resnet", dataset="fashion-mnist")

    described = defenses.describe(loaded())
    assert defenses.describe(loaded().to(torch.float64))["purifier"] == described["purifier"], "only moved"
    for change in (
        lambda d: next(d.classifier.parameters()).zero_(),
        lambda d: setattr(d, "classifier", loaded().classifier),
        lambda d: setattr(d.purifier, "temperature", 3.0),
        lambda d: next(d.classifier.buffers()).normal_(),
    ):
        defense = loaded()
        change(defense)
        assert defenses.describe(defense)["weights"] != described["weights"]


@pytest.mark.parametrize("choices", [{}, {"channels_last": True}])
def test_a_defense_whose_weights_change_between_two_evaluations_is_judged_anew(tmp_path, choices):
    """A training loop that evaluates: neither draws at x nor a copy with channels last outlive the weights."""
    layer = nn.Linear(DIMENSIONS, 3)
    layer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    defense = Defense(Linear(sigma=1e-3), nn.Sequential(nn.Flatten(), layer))
    settings = {"attack": "identity", "eps": "1/640", "n": 8, "out": tmp_path, "quiet": True} | choices
    x, _ = gaussian(8)
    y = defense.classifier(x).argmax(1)
    before = evaluate(defense, (x, y), **settings).rows[0]
    defense.classifier.load_state_dict({k: -v for k, v in defense.classifier.state_dict().items()})
    after = evaluate(defense, (x, y), **settings).rows[0]
    for key in ("clean", "robust", "random_control"):
        assert before[key] > 0.9 and after[key] < 0.1, key


class Says(nn.Module):
    """A classifier that returns something."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize(
    "what, said",
    [
        (lambda x: (x.flatten(1),), "the classifier returned tuple; it has to return logits"),
        (lambda x: x.flatten(), r"the classifier returned shape \(64,\)"),
        (lambda x: {}["logits"], "takes no images of shape .*KeyError: 'logits'"),
    ],
)
def test_a_classifier_that_gives_no_logits_is_said(tmp_path, what, said):
    with pytest.raises(UsageError, match=said):
        evaluate(Defense(Identity(), Says(what)), gaussian(4), "pgd:steps=1", eps="1/64", n=4, out=tmp_path, quiet=True)


@pytest.mark.parametrize("attack", ["pgd:steps=1,apgd", ["pgd", "apgd"], None])
def test_several_attacks_at_once_are_told_how(tmp_path, attack):
    with pytest.raises(UsageError, match="one spec at a time; evaluate each with the same out"):
        evaluate(Defense(Identity(), TwoLogits()), gaussian(4), attack, eps="1/64", n=4, out=tmp_path, quiet=True)


BAD = {
    "one tensor": (lambda x, y: x, "a data set's name or (images, labels), not Tensor"),
    "a number": (lambda x, y: 3, "a data set's name or (images, labels), not int"),
    "words": (lambda x, y: (x, ["a"] * len(y)), "a data set's name or (images, labels), not tuple"),
    "fewer labels": (lambda x, y: (x, y[:-1]), "labels (N,), N at least 1; got (4, 1, 8, 8) and (3,)"),
    "label columns": (lambda x, y: (x, y[:, None]), "got (4, 1, 8, 8) and (4, 1)"),
    "one image": (lambda x, y: (x[0], y[:1]), "got (1, 8, 8) and (1,)"),
    "none": (lambda x, y: (x[:0], y[:0]), "N at least 1; got (0, 1, 8, 8)"),
    "float labels": (lambda x, y: (x, y / 2), "labels are class numbers from 0 on, got torch.float32"),
    "negative labels": (lambda x, y: (x, y - 1), "labels are class numbers from 0 on, got torch.int64 from -1"),
    "levels": (lambda x, y: (255 * x, y), "images are in [0, 1], got "),
    "whole levels": (
        lambda x, y: ((255 * x).long(), y),
        "floats in [0, 1], or uint8 in levels of 255; got",
    ),
    "not a number": (lambda x, y: (x.clone().fill_(torch.nan), y), "images are in [0, 1], got nan to nan"),
}


@pytest.mark.parametrize("change, said", BAD.values(), ids=BAD)
def test_images_and_labels_that_cannot_be_meant_are_said(tmp_path, change, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        evaluate(Defense(Identity(), TwoLogits()), change(*gaussian(4)), "pgd:steps=1", eps="1/64", n=4, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_arrays_and_other_precisions_are_the_same_images(tmp_path):
    x, y = gaussian(4)
    x = (255 * x).round().clamp(0, 255)
    same = {
        "float32": (x / 255, y), "arrays": ((x / 255).numpy(), y.numpy()), "levels": (x.byte(), y.to(torch.int32)),
        "float64": ((x.double() / 255).float().double(), y), "lists": ((x / 255).tolist(), y.tolist()),
    }  # fmt: skip
    settings = {"attack": "pgd:steps=2", "eps": "1/64", "n": 4, "quiet": True}
    found = {
        k: evaluate(Defense(Identity(), TwoLogits()), v, out=tmp_path / k, **settings).records for k, v in same.items()
    }
    assert all(records == found["float32"] for records in found.values())


def test_a_model_that_is_no_defense_is_said(tmp_path):
    for model in (nn.Sequential(Identity(), TwoLogits()), TwoLogits(), "diffpure"):
        with pytest.raises(UsageError, match=r"wrap a purifier and a classifier, any two modules, in Defense"):
            evaluate(model, gaussian(4), "pgd:steps=1", eps="1/64", n=4, out=tmp_path)


class Loud(nn.Module):
    """An own purifier; what it does stands in a file that it reads, which no fingerprint sees."""

    def __init__(self, path, gain=1.0, kind="plain"):
        super().__init__()
        self.path, self.gain, self.kind = path, gain, kind

    def forward(self, x):
        return (0.5 + self.gain * float(self.path.read_text()) * (x - 0.5)).clamp(0, 1)


@pytest.mark.parametrize("logits", [True, False])
def test_a_number_on_disk_is_not_given_for_a_defense_that_says_something_else(tmp_path, logits):
    (path := tmp_path / "gain").write_text("1.0")
    settings = {"attack": "pgd:steps=1", "eps": "1/64", "n": 8, "out": tmp_path / "out", "quiet": True}
    result = evaluate(Defense(Loud(path), TwoLogits()), gaussian(8), **settings)
    if not logits:  # as of a run that came with its records alone
        (result.folder / "logits.npz").unlink()
    assert evaluate(Defense(Loud(path), TwoLogits()), gaussian(8), **settings).records == result.records
    path.write_text("-1.0")
    with pytest.raises(UsageError, match="though its fingerprint is the same"):
        evaluate(Defense(Loud(path), TwoLogits()), gaussian(8), **settings)
    path.write_text("1.05")
    if logits:
        with pytest.raises(UsageError, match="of 8 recorded images the defense now answers differently"):
            evaluate(Defense(Loud(path), TwoLogits()), gaussian(8), **settings)


def test_defenses_of_other_options_have_other_names(tmp_path):
    (path := tmp_path / "gain").write_text("1.0")
    settings = {"attack": "pgd:steps=1", "eps": "1/64", "n": 8, "out": tmp_path / "out", "quiet": True}
    rows = [
        evaluate(Defense(Loud(path, gain), TwoLogits()), gaussian(8), name=name, **settings).rows[0]
        for gain, name in ((1.0, None), (0.5, None), (0.25, "mine"))
    ]
    assert [row["purifier"] for row in rows] == ["Loud:gain=1.0,kind=plain", "Loud:gain=0.5,kind=plain", "mine"]


def test_adversarial_images_are_those_of_the_records(tmp_path):
    x, y = gaussian(40)
    result = evaluate(
        Defense(Identity(), TwoLogits()), (x, y), "pgd:steps=2", eps="1/64", n=40, out=tmp_path, quiet=True
    )
    distance = NORMS["Linf"](Fraction(1, 64)).distance(result.adversarial, x)
    assert distance.tolist() == [r["distance"] for r in result.records]


def test_own_images_that_are_few_are_all_attacked(tmp_path):
    result = evaluate(
        Defense(Identity(), TwoLogits()), gaussian(5), "pgd:steps=1", eps="1/64", out=tmp_path, quiet=True
    )
    assert len(result.records) == 5


@pytest.mark.parametrize("settings, said", [
    ({"seed": "a"}, "seed='a': expected int"), ({"n": "4"}, "n='4': expected int or None"),
    ({"n": 4.5}, "n=4.5: expected int or None"), ({"eps": float("nan")}, "--eps nan: expected a number"),
    ({"norm": 2.0}, "norm=2.0: expected str or None"), ({"stop_after": "soon"}, "stop_after='soon': expected float"),
    ({"stop_after": -1}, "--stop-after -1: expected seconds, 0 or more"), ({"epss": 1}, "did you mean eps"),
    ({"quiet": 1}, "quiet=1: expected bool"),
], ids=str)  # fmt: skip
def test_a_setting_of_another_type_is_said(tmp_path, settings, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        evaluate(Defense(Identity(), TwoLogits()), gaussian(4), "pgd:steps=1",
                 **{"eps": "1/64", "n": 4, "out": tmp_path} | settings)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_numbers(tmp_path):
    evaluate(Defense(Identity(), TwoLogits()), gaussian(4), "pgd:steps=1", eps=np.float64(0.1), n=np.int64(4),
             seed=np.int32(2), out=tmp_path, quiet=True)  # fmt: skip
    (run,) = find_runs([tmp_path])
    assert run["identity"]["seed"] == 2 and run["n"] == 4 and run["identity"]["eps"] == "0.1"


@pytest.mark.parametrize("squash", [torch.sigmoid, lambda z: 0.9 * z.softmax(1), lambda z: z.softmax(1)])
def test_probabilities_for_logits_are_refused(tmp_path, squash):
    with pytest.raises(RunError, match="return logits, not what a softmax or sigmoid made of them"):
        evaluate(Defense(Identity(), nn.Sequential(TwoLogits(), Says(squash))), gaussian(8), "pgd:steps=1",
                 eps="1/64", n=8, out=tmp_path, quiet=True)  # fmt: skip


@pytest.mark.parametrize("part", ["purifier", "classifier"])
def test_a_part_of_a_defense_that_is_no_module_is_said(tmp_path, part):
    defense = Defense(Identity(), TwoLogits())
    delattr(defense, part)
    setattr(defense, part, lambda x: x)
    with pytest.raises(UsageError, match=f"the {part} of a Defense is a torch.nn.Module, got function"):
        evaluate(defense, gaussian(4), "pgd:steps=1", eps="1/64", n=4, out=tmp_path)


def test_who_asks_for_fewer_images_gets_those(tmp_path):
    settings = {"attack": "pgd:steps=1", "eps": "1/64", "out": tmp_path, "quiet": True}
    whole = evaluate(Defense(Identity(), TwoLogits()), gaussian(8), n=8, **settings)
    some = evaluate(Defense(Identity(), TwoLogits()), gaussian(8), n=3, **settings)
    assert some.folder == whole.folder and some.records == whole.records[:3]
    assert [row["n"] for row in (*some.rows, *whole.rows)] == [3, 8]


@pytest.mark.parametrize("name", ["logits.npz", "audit.json", "adversarial.npy"])
def test_a_torn_file_is_named_by_who_reads_it(tmp_path, capsys, name):
    result = evaluate(
        Defense(Identity(), TwoLogits()), gaussian(40), "pgd:steps=1", eps="1/64", n=40, out=tmp_path, quiet=True
    )
    path = result.folder / name
    path.write_bytes(path.read_bytes()[:90] if path.exists() else b'{"gradients": [{}]}')
    command = {"logits.npz": ["report", "--rule", "mean-logits"], "audit.json": ["audit", "--only", "grades"],
               "adversarial.npy": ["report", "--gallery", str(tmp_path / "g.png")]}[name]  # fmt: skip
    if name == "adversarial.npy":  # of images that a name finds again
        result = evaluate(load("identity"), attack="pgd:steps=1", n=2, out=tmp_path / "named", quiet=True)
        path = result.folder / name
        path.write_bytes(path.read_bytes()[:90])
    assert cli.main([command[0], str(result.folder), *command[1:]]) == cli.USAGE
    said = capsys.readouterr().err
    assert str(path) in said and "is damaged" in said


def test_a_radius_computed_in_a_program_is_the_fraction_that_was_meant():
    for value, meant in ((16 / 255, "16/255"), (8 / 255, "8/255"), (0.1, "1/10"), (0.5, "1/2"), (0.06, "6/100")):
        assert config.radius(value, "Linf", "cifar10") == Fraction(meant)


@pytest.mark.parametrize("name", ["run.json", "records.jsonl"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, capsys, name):
    result = evaluate(
        Defense(Identity(), TwoLogits()), gaussian(4), "pgd:steps=1", eps="1/64", n=4, out=tmp_path, quiet=True
    )
    path = result.folder / name
    path.write_text("{torn\n" + path.read_text())
    for command in (["report"], ["verify"], ["audit", "--only", "grades"]):
        assert cli.main([command[0], str(tmp_path), *command[1:]]) == cli.USAGE
        said = capsys.readouterr().err
        assert str(path) in said and "is damaged" in said and f"delete {result.folder} and run again" in said


def test_the_documented_import_gives_the_functions():
    from benchmark import evaluate as documented

    assert isinstance(load("identity", classifier=f"file:{HERE}:TwoLogits"), Defense)
    x, y = gaussian(4)
    with pytest.raises(UsageError, match="has 4 examples, --n-examples asked for 5"):
        documented(Defense(Identity(), TwoLogits()), data=(x, y), attack="pgd", eps="1/64", n=5)


# --- modules that know nothing of tapes, and attackers that differentiate something else


class Foreign(nn.Module):
    """The Gaussian victim's purifier as anybody would write it, drawing from torch's global generator."""

    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        noisy = x + self.sigma * torch.randn_like(x) if self.sigma else x
        return 0.5 + 0.5 * (noisy - 0.5)


@pytest.mark.parametrize("sigma", [0.0, 0.05], ids=["deterministic", "stochastic"])
def test_a_foreign_module_is_measured_marked_and_judged_rightly(tmp_path, sigma):
    before = torch.get_rng_state()
    result = evaluate(
        Defense(Foreign(sigma), TwoLogits()), gaussian(), attack_on_gaussian("Linf"), eps=RADII["Linf"], n=512,
        out=tmp_path, quiet=True,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    assert len(result.records[0]["adv"]) == (9 if sigma else 1), "its stochasticity is measured"
    assert ("noise: global" in result.rows[0]["display"]) == bool(sigma)
    assert contains(result.records, "adv", gaussian_accuracy("Linf", float(Fraction(RADII["Linf"])), sigma))


def test_an_attacker_differentiates_another_purifier_and_the_verdict_does_not(tmp_path):
    """The images are those found against the attacker's purifier; the predictions are the defense's own."""

    def run(out: str, *arguments: str) -> dict:
        command = ["run", "--classifier", f"file:{HERE}:Brightness", "--attack", "pgd:steps=3", "--n-examples", "16"]
        assert cli.main([*command, "--no-preflight", "--out", str(tmp_path / out), *arguments]) == 0
        return find_runs([tmp_path / out])[0]

    mirror = f"file:{HERE}:Mirror"
    surrogate = run("surrogate", "--purifier", mirror, "--attacker", "identity")
    attacked, exact = run("identity", "--purifier", "identity"), run("exact", "--purifier", mirror)
    images = [np.load(r["folder"] / "adversarial.npy") for r in (surrogate, attacked, exact)]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert [r["clean"] for r in surrogate["records"]] == [r["clean"] for r in exact["records"]]
    assert [r["adv"] for r in surrogate["records"]] != [r["adv"] for r in attacked["records"]]
    assert "@identity" in report.rows([surrogate])[0]["view"]


class Mirror(OneStage):
    """g(x) = 1 - x."""

    stochastic = False

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        return 1 - x


class Brightness(Classifier):
    """Class k for images of mean brightness about k / 9."""

    def forward(self, x: Tensor) -> Tensor:
        return -((9 * x.flatten(1).mean(1, keepdim=True) - torch.arange(10.0, dtype=x.dtype)) ** 2)


# --- few classes, and others than the data set's


def test_a_classifier_of_another_data_set_is_refused(tmp_path):

    images = data.load("fashion-mnist")
    for classes, message in ((20, "fashion-mnist has 10 classes, the classifier has 20 outputs"), (7, "has 7 outputs")):
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, classes))
        with pytest.raises(UsageError, match=message):
            evaluate(Defense(Identity(), net), data=images, attack="pgd:steps=1", n=4, out=tmp_path, quiet=True)
    colour = nn.Sequential(nn.Conv2d(3, 10, 28), nn.Flatten())
    with pytest.raises(UsageError, match=r"takes no images of shape \(1, 28, 28\)"):
        evaluate(Defense(Identity(), colour), data=images, attack="pgd:steps=1", n=4, out=tmp_path, quiet=True)


class Threshold(nn.Module):
    """Logits of ``classes`` linear scores of the mean over bands of rows: a deterministic victim with few classes."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        bands = x.flatten(1).unflatten(1, (self.classes, -1)).mean(2)
        return 20 * bands


@pytest.mark.parametrize("classes", [2, 4])
def test_few_classes(classes, tmp_path):
    """The DLR loss needs three classes, its targeted form four: below, an error; from there, all others as targets."""
    x = Tape(11, "images", torch.arange(8)).uniform("pixels", like=torch.empty(8, 1, 8, 8))
    defense = Defense(Identity(), Threshold(classes))
    y = defense(x).argmax(1)
    settings = dict(data=(x, y), eps="0.2", n=8, out=tmp_path, quiet=True)
    result = evaluate(defense, attack="pgd:steps=2", **settings)
    assert result.rows[0]["clean"] == 1 and result.rows[0]["robust"] < 1
    if classes == 2:
        with pytest.raises(UsageError, match="need at least 4 classes, the classifier has 2; aim at fewer"):
            evaluate(defense, attack="autoattack", **settings)
    else:
        result = evaluate(defense, attack="autoattack", **settings)
        assert result.rows[0]["robust"] == 0


# What an attacker may know


class Compass(OneStage):
    """Its first pixel is 0.6 + ⟨n, x - 1/2⟩ / 8: every draw n is pushed by another perturbation."""

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        turned = 0.6 + (noise.normal("north", like=x) * (x - 0.5)).flatten(1).sum(1) / 8
        return torch.cat((turned.view(-1, 1), torch.full_like(x.flatten(1)[:, 1:], 0.5)), 1).view_as(x).clamp(0, 1)


class ReadsTheCompass(Classifier):
    """Class 0 where the first pixel is above 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        north = 20 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack((north, -north, 0 * north - 50), 1)


def test_an_attacker_who_knows_the_draws_that_judge_finds_more_and_is_marked(tmp_path):
    x, y = 0.5 + 1e-3 * torch.rand(32, 1, 8, 8), torch.zeros(32, dtype=torch.long)
    rows, records = {}, {}
    settings = {"eps": "0.1", "n": 32, "budget": "quick", "out": tmp_path, "quiet": True}
    for view in ("exact", "exact:noise=verdict"):
        result = evaluate(Defense(Compass(), ReadsTheCompass()), (x, y), "pgd:loss=margin", view=view, **settings)
        rows[view], records[view] = result.rows[0], result.records
    known, fresh = rows["exact:noise=verdict"], rows["exact"]
    assert known["display"] == "PGD-MARGIN (20 it, EOT 9) [knows the verdict's draws]" and known["draws"] == 9
    assert known["view"] == "exact:noise=verdict" and "unless its row says so" in writers.render(
        report.Table([known]), "md"
    )
    assert known["robust"] < 0.3 and fresh["robust"] > 0.7
    # it looked at nine draws, again and again
    assert known["null_floor"] >= fresh["null_floor"]
    assert all(0 <= r["null_wrong"] <= 9 for r in records["exact:noise=verdict"])
    # draws that it didn't know are none the worse for it
    select = {view: evidence.shares(r, "select").mean() for view, r in records.items()}
    assert abs(select["exact:noise=verdict"] - select["exact"]) < 0.1
    with pytest.raises(UsageError, match="draws its own noise"):
        evaluate(Defense(Compass(), ReadsTheCompass()), (x, y), "autoattack:version=rand,backend=pyautoattack",
                 view="exact:noise=verdict", **settings)  # fmt: skip


# --- attackers


def test_an_attacker_that_draws_globally_is_seeded_and_said(tmp_path):
    """Another purifier's gradient: its draws repeat, and the run says that they depend on their places in a batch."""
    file = tmp_path / "noisy.py"
    file.write_text(
        "import torch\n\n\nclass Noisy(torch.nn.Module):\n    def forward(self, x):\n"
        "        return (x + 0.3 * torch.randn_like(x)).clamp(0, 1)\n\n\ndef make():\n    return Noisy()\n"
    )
    settings = {"eps": "1/64", "n": 8, "quiet": True, "view": "bpda", "attacker": f"file:{file}:make"}
    defense = Defense(Linear(sigma=0), TwoLogits())
    first, second = (evaluate(defense, gaussian(8), "pgd:steps=2", out=tmp_path / k, **settings) for k in "ab")
    assert torch.equal(first.adversarial, second.adversarial)
    assert json.loads((first.folder / "run.json").read_text())["noise"] == "global"
    assert "EOT" in first.rows[0]["display"]


def test_the_encoder_is_attacked_in_float64_too(tmp_path):
    result = evaluate(
        load("vae"), attack="encoder:steps=2,eot=1", n=2, eps="8/255", precision="float64", out=tmp_path, quiet=True,
        draws=2, preflight=False,
    )  # fmt: skip
    assert 0 < result.records[0]["distance"] <= 8 / 255


def test_mean_logits_are_unknown_where_some_are_missing(tmp_path):
    defense = Defense(Linear(sigma=1e-3), TwoLogits())
    settings = {"attack": "pgd:steps=1", "eps": "1/64", "quiet": True, "out": tmp_path, "draws": 2}
    folder = evaluate(defense, gaussian(8), n=4, **settings).folder
    some = (folder / "logits.npz").read_bytes()
    evaluate(defense, gaussian(8), n=8, **settings)
    run = read_run(folder)
    assert report.rows([run], rule="mean-logits")[0]["robust"] is not None
    (folder / "logits.npz").write_bytes(some)
    assert report.rows([run], rule="mean-logits")[0]["robust"] is None
