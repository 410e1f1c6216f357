"""The audit: it must notice a masked gradient, a wrong one, and an attack that looking alone beats."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmark import audit, cli, evaluate, evidence, stats
from benchmark.cell import Cell
from benchmark.results import find_runs
from benchmark.settings import Settings
from purifiers import Defense, Purifier, Tape
from tests.conftest import Linear, images


class Rounds(Purifier):
    """Waves on the pixels: the exact gradient is wild, and that without the waves the better guide."""

    stochastic = False
    surrogates = ("smooth",)

    def __init__(self, *, steep: bool = True, rounds: int = 1):
        super().__init__(rounds=rounds)
        self.steep = steep

    def start(self, x: Tensor, noise) -> tuple[Tensor, None]:
        wave = torch.sin(4000 * x) / 400 if self.steep else 0 * x
        return x + wave, None

    def finish(self, state: Tensor, context: None) -> Tensor:
        return state

    def surrogate(self, name: str) -> Purifier:
        return Rounds(steep=False)


class Cut(Rounds):
    """The exact forward pass with the gradient of another function."""

    def start(self, x: Tensor, noise) -> tuple[Tensor, None]:
        return x.detach() + 2 * (x - x.detach()), None


def model() -> Linear:
    w = Tape(4, "images", torch.arange(1)).normal("w", like=torch.empty(1, 64))
    return Linear(torch.cat([w, -w, torch.zeros(8, 64)]), torch.tensor([0.0, 0.0] + [-50.0] * 8))


def cell(purifier: Purifier, tmp_path, attack: str = "pgd:steps=20", **settings) -> Cell:
    x = 0.3 + 0.4 * images(16, dtype=torch.float32)
    y = model()(x).argmax(1)
    chosen = Settings(budget="quick", n=16, eps="1/32", out=tmp_path, quiet=True, **settings)
    return Cell(Defense(purifier, model()), (x, y), attack, chosen)


def by_view(found: dict) -> dict[str, dict]:
    return {row["view"]: row for row in found["rows"]}


def test_a_masked_gradient_is_found_out_by_a_smoother_view(tmp_path):
    found = audit.gradients(cell(Rounds(), tmp_path))
    rows = by_view(found)
    assert rows["exact"]["cosine"] == pytest.approx(1) and rows["exact"]["norm_ratio"] == pytest.approx(1)
    assert rows["exact"]["difference"] == 0
    assert rows["surrogate:gradient=smooth"]["robust"] < rows["exact"]["robust"] - 0.2
    assert rows["adjoint"]["status"] == "n/a" and "SDE" in rows["adjoint"]["why"]
    checks = {c["id"]: c for c in found["checks"]}
    assert checks["finite-differences"]["status"] == "pass"  # the gradient is right, and useless
    assert checks["exact-is-strongest"]["status"] == "fail"
    assert "surrogate:gradient=smooth" in checks["exact-is-strongest"]["value"]
    assert audit.failed({"gradients": [found]}) and "**fail**" in audit.render({"gradients": [found]})


class Steps(Rounds):
    """Rounds, and offers a way to differentiate it that leads astray."""

    differentiable = False
    surrogates = ("astray",)

    def start(self, x: Tensor, noise) -> tuple[Tensor, None]:
        return (64 * x).round() / 64, None

    def surrogate(self, name: str) -> Purifier:
        return Backwards()


class Backwards(Rounds):
    def start(self, x: Tensor, noise) -> tuple[Tensor, None]:
        return 1 - x, None


def test_a_surrogate_that_leads_astray_is_not_the_strongest_view(tmp_path):
    """Its exact gradient is zero, which every view beats; what counts is the view that an attack takes by default."""
    found = audit.gradients(cell(Steps(), tmp_path, view="exact"))
    statuses = {c["id"]: c["status"] for c in found["checks"]}
    assert statuses["exact-says-something"] == "n/a" and statuses["default-is-strongest"] == "fail"
    (check,) = [c for c in found["checks"] if c["id"] == "default-is-strongest"]
    assert "bpda" in check["value"]


def test_a_wrong_gradient_fails_the_finite_differences(tmp_path):
    found = audit.gradients(cell(Cut(), tmp_path))
    assert {c["id"]: c["status"] for c in found["checks"]}["finite-differences"] == "fail"
    rows = by_view(found)
    assert rows["bpda"]["norm_ratio"] == pytest.approx(0.5) and rows["bpda"]["cosine"] == pytest.approx(1)
    assert not np.isnan([r["robust"] for r in found["rows"] if r["status"] == "pass"]).any()


def test_looking_that_beats_gradients_fails_the_audit(tmp_path):
    """A gradient attack too weak to move is weaker than random search, and the reverse is no failure."""
    for attack in ("pgd:steps=1,step=0.001,random_start=false", "pgd:steps=40", "square:queries=200", "identity",
                   "transfer:steps=40"):  # fmt: skip
        cell(Rounds(steep=False), tmp_path, attack).run()
    document = audit.black_box(find_runs([tmp_path]))
    assert {p["black_box"] for p in document["pairs"]} == {"Square (200 queries)", "PGD-CE (40 it) from identity"}
    by = {(p["white_box"], p["black_box"].split()[0]): p for p in document["pairs"]}
    weak, strong = by["PGD-CE (1 it) [step=0.001, random_start=false]", "Square"], by["PGD-CE (40 it)", "Square"]
    assert weak["p"] < 0.01 and weak["difference"] > 0 and strong["p"] > 0.4 and strong["difference"] <= 0
    assert weak["n"] == 16 and weak["white"] - weak["black"] == pytest.approx(weak["difference"])
    shares = _shares(tmp_path, "pgd:steps=1", "square")
    assert weak["detectable"] == pytest.approx(stats.detectable(*shares, tests=4, one_sided=True))
    (check,) = document["checks"]
    assert check["status"] == "fail" and "random_start=false] than Square (200 queries)" in check["value"]
    assert "PGD-CE (40 it) than" not in check["value"]
    assert "| p (white weaker) | detectable |" in audit.render(document)


def _shares(path, *attacks: str) -> list[np.ndarray]:

    runs = find_runs([path])
    return [evidence.shares(next(r for r in runs if r["names"]["attack"].startswith(a))["records"]) for a in attacks]


def test_the_command_prints_a_table_or_one_object(tmp_path, capsys):
    command = ["audit", "--only", "gradients", "--purifier", "vae", "--attack", "pgd:steps=2", "--n-examples", "2"]
    assert cli.main([*command, "--json"]) in (cli.DONE, cli.FAILED)
    (found,) = json.loads(capsys.readouterr().out)["gradients"]
    assert [r["view"] for r in found["rows"]] == ["exact", "surrogate:gradient=mean", "adjoint", "bpda", "blind"]
    checks = {"finite-differences", "exact-says-something", "exact-is-strongest"}
    assert found["n"] == 2 and {c["id"] for c in found["checks"]} == checks
    (tmp_path / "saved.json").write_text(json.dumps({"gradients": [found]}))
    assert cli.main(["audit", str(tmp_path / "saved.json")]) in (cli.DONE, cli.FAILED)
    assert "| exact | 1.000 (1.000) | 1 |" in capsys.readouterr().out
    (tmp_path / "other.json").write_text("{}")
    assert cli.main(["audit", str(tmp_path / "other.json")]) == cli.USAGE
    assert "is no audit" in capsys.readouterr().err
    assert cli.main(["audit", "--only", "gradients", str(tmp_path)]) == cli.USAGE
    assert "takes no folders" in capsys.readouterr().err
    for useless in (["--view", "bpda"], ["--attacker", "identity"], ["--attack", "transfer"]):
        assert (
            cli.main(["audit", "--only", "gradients", "--purifier", "vae", "--n-examples", "2", *useless]) == cli.USAGE
        )
        assert "tries every view itself" in capsys.readouterr().err
    x = 0.3 + 0.4 * images(4, dtype=torch.float32)
    evaluate(Defense(Rounds(), model()), (x, torch.zeros(4).long()), "pgd:steps=1", eps="1/32", n=4, out=tmp_path,
             quiet=True)  # fmt: skip
    assert cli.main(["audit", str(tmp_path), "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["checks"][0]["status"] == "n/a"  # nothing to hold it against


# The statistics behind it


def test_one_sided_p_counts_one_side():
    rng = np.random.default_rng(0)
    b = rng.random(60)
    a = b + rng.normal(0.05, 0.2, 60)
    two, up, down = stats.compare(a, b), stats.compare(a, b, one_sided=True), stats.compare(b, a, one_sided=True)
    assert up.p == pytest.approx(two.p / 2, abs=0.01) and up.p + down.p == pytest.approx(1, abs=0.02)
    same = stats.compare(a, a, one_sided=True)
    assert same.p == 1


def test_a_difference_of_the_detectable_size_is_noticed_in_four_of_five_cases():
    rng, noticed, sizes = np.random.default_rng(0), [], []
    for _ in range(200):
        b = rng.random(64)
        a = b + rng.normal(0, 0.2, 64)
        size = 2.4865 * 0.2 / 8  # (z_0.95 + z_0.80) sd / sqrt(n)
        sizes.append(stats.detectable(a, b, one_sided=True))
        noticed.append(stats.compare(a + size, b, one_sided=True, flips=500).p < 0.05)
    assert np.mean(sizes) == pytest.approx(size, rel=0.03)
    assert 0.72 < np.mean(noticed) < 0.88
    assert stats.detectable(np.ones(1), np.zeros(1)) is None and stats.detectable(np.ones(9), np.zeros(9)) is None
    assert (
        stats.detectable(a, b, tests=30) > 1.3 * stats.detectable(a, b) > 1.4 * stats.detectable(a, b, one_sided=True)
    )


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


def test_an_audit_of_runs_without_a_grade_fails_nothing():
    assert not audit.failed({"grades": []}) and not audit.failed({"gradients": []})
    assert audit.failed({"grades": [{"checks": [{"status": "fail"}]}]})
