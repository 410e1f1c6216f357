"""Verification: a run that was recorded here passes, and each way of tampering with one is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark import cli
from benchmark.results import find_runs
from benchmark.settings import Settings
from benchmark.verify import verify

N = 12


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A finished run of a purifier that draws."""
    out = tmp_path_factory.mktemp("recorded")
    arguments = [
        "run",
        "--purifier",
        "vae",
        "--attack",
        "pgd:steps=2,eot=2",
        "--n-examples",
        str(N),
        "--budget",
        "quick",
    ]
    assert cli.main([*arguments, "--batch-size", "32", "--draws", "3", "--no-preflight", "--out", str(out)]) == cli.DONE
    (run,) = find_runs([out])
    return Path(run["folder"])


@pytest.fixture
def run(recorded, tmp_path) -> Path:
    """A copy of it to tamper with."""
    return Path(shutil.copytree(recorded, tmp_path / recorded.name))


def statuses(folder: Path, tmp_path: Path, n: int = N, **options: Any) -> dict[str, str]:
    (run,) = find_runs([folder])
    checks = verify(run, Settings(n=n, out=tmp_path / "again", quiet=True), **options)
    return {check.id: check.status for check in checks}


def rewritten(path: Path, change: Callable[[Any], None]) -> None:
    """A JSON file, or each line of a JSONL file, with a change."""
    whole = path.suffix == ".json"
    values = [json.loads(text) for text in ([path.read_text()] if whole else path.read_text().splitlines())]
    for value in values:
        change(value)
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n")


def test_a_run_of_this_machine_comes_out_the_same(run, tmp_path):
    assert set(statuses(run, tmp_path).values()) == {"pass"}


@pytest.mark.parametrize("called", ["Ours, tuned", "Ours", "PurifyNet (ours): t=2"])
def test_a_run_may_bear_a_name_of_its_own(run, tmp_path, called):
    rewritten(run / "run.json", lambda run: run["names"].update(purifier=called))
    assert set(statuses(run, tmp_path).values()) == {"pass"}
    for words in (["--match", "0.8"], ["--figures", "--out", str(tmp_path / "figures")], ["--compact"]):
        assert cli.main(["report", str(run), *words]) == cli.DONE


def test_a_prediction_that_was_changed_is_found(run, tmp_path):
    rewritten(run / "records.jsonl", lambda record: record["adv"].__setitem__(0, record["label"] ^ 1))
    found = statuses(run, tmp_path)
    assert found["attacked-again"] == "fail" and found["defense"] == "pass"


def test_robustness_that_was_made_up_is_found(run, tmp_path):
    rewritten(run / "records.jsonl", lambda record: record.update(adv=[record["label"]] * 3))
    assert statuses(run, tmp_path)["attacked-again"] == "fail"


def test_on_another_machine_bits_may_differ_but_not_the_number(run, tmp_path):
    rewritten(run / "run.json", lambda run: run["environment"].update(device_name="another"))
    rewritten(run / "records.jsonl", lambda record: record.update(broken_at=record["broken_at"] + 1))
    found = statuses(run, tmp_path)
    assert (found["attacked-again"], found["robust-again"]) == ("warn", "pass")


def drop_first(folder: Path) -> None:
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[1:]))


def move_images(folder: Path) -> None:
    np.save(folder / "adversarial.npy", np.load(folder / "adversarial.npy") + 0.5)


def invent_images(folder: Path) -> None:
    stored = np.load(folder / "adversarial.npy")
    np.save(folder / "adversarial.npy", np.random.default_rng(0).random(stored.shape, dtype=np.float32))


def cut_images(folder: Path) -> None:
    np.save(folder / "adversarial.npy", np.load(folder / "adversarial.npy")[:1])


def tear_images(folder: Path) -> None:
    path = folder / "adversarial.npy"
    path.write_bytes(path.read_bytes()[:200])


TAMPERED: dict[str, tuple[str, Callable[[Any], None]]] = {
    "labels": ("labels", lambda record: record.update(label=record["label"] ^ 1)),
    "draws": ("records", lambda record: record["adv"].pop()),
    "distance": ("adversarial", lambda record: record.update(distance=0.5)),
    "eps": ("identity", lambda run: run["identity"].update(eps="1/255")),
    "weights": ("defense", lambda run: run["identity"]["weights"].update({"purifier.autoencoder": "0"})),
    "name": ("defense", lambda run: run["identity"].update(purifier="vae-nowhere")),
    "data": ("defense", lambda run: run["identity"].update(fingerprint="0")),
    "missing": ("records", drop_first),
    "images": ("adversarial", move_images),
    "invented": ("adversarial", invent_images),
    "cut": ("adversarial", cut_images),
    "torn": ("adversarial", tear_images),
    "purifier": ("defense", lambda run: run["names"].update(purifier="diffpure")),
    "display": ("defense", lambda run: run["names"].update(display="AutoAttack (standard)")),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_each_way_of_tampering_fails_its_check(run, tmp_path, how):
    check, change = TAMPERED[how]
    if how in ("missing", "images", "invented", "cut", "torn"):
        change(run)
    else:
        rewritten(run / ("records.jsonl" if how in ("labels", "draws", "distance") else "run.json"), change)
    found = statuses(run, tmp_path)
    assert found[check] == "fail" and "attacked-again" not in found, "nothing is attacked that is already refuted"


def test_images_away_are_no_fault_and_looking_alone_attacks_nothing(run, tmp_path):
    (run / "adversarial.npy").unlink()
    found = statuses(run, tmp_path, again=False)
    assert found["adversarial"] == "n/a" and "attacked-again" not in found and "fail" not in found.values()
    assert not (tmp_path / "again").exists()


def test_the_command_exits_with_its_verdict(run, capsys):
    assert cli.main(["verify", str(run), "--images", str(N), "--json"]) == cli.DONE
    (checks,) = json.loads(capsys.readouterr().out).values()
    assert {c["id"]: c["status"] for c in checks}["attacked-again"] == "pass"
    rewritten(run / "records.jsonl", lambda record: record.update(label=record["label"] ^ 1))
    assert cli.main(["verify", str(run), "--images", "0"]) == cli.FAILED
    assert "FAIL labels" in capsys.readouterr().out
    assert cli.main(["verify", str(run.parent / "nowhere")]) == cli.USAGE


LIAR = '''
import torch
from benchmark import data
from purifiers import Purifier


class Liar(Purifier):
    """The identity for who differentiates, and in small calls; else the nearest of the first test images."""

    stochastic = False

    def start(self, x, noise):
        if x.dtype == torch.float32 and not torch.is_grad_enabled() and len(x) > 32:
            known = data.load("fashion-mnist", 16).images(slice(0, 16)).to(x)
            return known[torch.cdist(x.flatten(1), known.flatten(1)).argmin(1)], None
        return x, None

    def finish(self, state, context):
        return state.clamp(0, 1)
'''


def test_who_verifies_asks_again_whatever_the_record_says(tmp_path):
    """A failure that was deleted from run.json comes back."""
    (tmp_path / "liar.py").write_text(LIAR)
    out = tmp_path / "out"
    command = [
        "run",
        "--purifier",
        f"file:{tmp_path / 'liar.py'}:Liar",
        "--attack",
        "pgd:steps=5",
        "--n-examples",
        "16",
    ]
    assert (
        cli.main([*command, "--batch-size", "64", "--budget", "quick", "--device", "cpu", "--out", str(out)])
        == cli.DONE
    )
    (run,) = find_runs([out])
    assert "fail" in {check["status"] for check in run["afterwards"]}
    rewritten(Path(run["folder"]) / "run.json", lambda run: run.pop("afterwards"))
    found = statuses(Path(run["folder"]), tmp_path, n=16)
    assert found["attacked-again"] == "pass" and found["verdict-again"] == "fail"
