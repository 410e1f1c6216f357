"""The engine: how searches are grouped changes no record, what it does is what was planned, and who retires is lost."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks import NORMS, Calls, Victim
from attacks._views import Exact
from attacks.apgd import APGD
from attacks.autoattack import AutoAttack
from attacks.pgd import PGD
from benchmark import engine, evaluate
from benchmark.cell import Cell, Incomplete
from benchmark.settings import Settings
from benchmark.verdict import Judge
from purifiers import Defense, Purifier, Tape
from purifiers.diffpure import DiffPure
from tests.conftest import Linear, images, undefended
from tests.test_black_box import Noisy

ATTACKS = [
    "pgd:steps=3,eot=3",
    "apgd:steps=2,eot=3,targets=2",
    "autoattack:steps=2,eot=2",
    "square:queries=4,eot=3",
    "diffattack:steps=2,eot=2",
]
SETTINGS = {"eps": "32/255", "draws": 3, "quiet": True, "preflight": False}


def outcome(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("records.jsonl", "adversarial.npy")}


@pytest.mark.parametrize("attack", ATTACKS)
def test_how_images_are_grouped_changes_no_byte(tmp_path, monkeypatch, tiny_defense, tiny_images, attack):
    """One group after another in padded calls, several that share them, and odd groups: the same records."""

    def run(name: str) -> dict[str, bytes]:
        return outcome(
            evaluate(tiny_defense, tiny_images, attack, n=40, out=tmp_path / name, rows=64, **SETTINGS).folder
        )

    shared = run("shared")
    monkeypatch.setattr(engine.Engine, "_capacity", lambda self: 1)
    assert run("apart") == shared
    monkeypatch.setattr(engine, "BLOCK", 7)
    monkeypatch.setattr(engine.Engine, "_capacity", lambda self: 23)
    assert run("odd") == shared


def test_every_call_but_the_last_is_full(tmp_path, tiny_defense, tiny_images):
    """Three draws of a group of 32 images fill no whole calls of 64 rows; 80 images end in half a group."""
    fresh = Defense(tiny_defense.purifier, tiny_defense.classifier)  # nobody has asked it yet
    folder = evaluate(fresh, tiny_images, "pgd:steps=8,eot=3", n=80, out=tmp_path, rows=64, **SETTINGS).folder
    notes = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    real, rows = sum(note["real"] for note in notes), sum(note["rows"] for note in notes)
    # apart, 96 rows would take two calls of 64: 75 %
    assert real / rows > 0.9 and rows == 64 * sum(note["calls"] for note in notes)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert real == sum(r["forwards"] for r in records), "every row was asked for, and every one is recorded"


@pytest.mark.parametrize("attack", [*ATTACKS, "pgd:steps=6,eot=2,retire=2", "torchattacks:MIFGSM,steps=2"])
@pytest.mark.parametrize("stopped", [False, True], ids=["at once", "stopped"])
def test_the_bar_ends_with_the_last_verdict(tmp_path, monkeypatch, tiny_defense, tiny_images, attack, stopped):
    bars, before = [], []

    class Bar(engine.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    judged = Judge.verdict
    monkeypatch.setattr(engine, "tqdm", Bar)
    monkeypatch.setattr(Judge, "verdict", lambda *a: (before.append(bars[-1].n < bars[-1].total), judged(*a))[1])
    search = partial(evaluate, tiny_defense, tiny_images, attack, n=40, out=tmp_path, **SETTINGS | {"quiet": False})
    if stopped:
        with suppress(Incomplete):
            search(stop_after=0)
    search()
    assert bars[-1].n == bars[-1].total and all(before)


class Passes:
    """Counts rows of whole calls through the networks of a defense, there and back."""

    def __init__(self, defense: Defense, rows: int):
        self.rows = rows
        self.there = {"unet": 0, "classifier": 0}
        self.back = dict(self.there)
        for name, module in (("unet", defense.purifier.unet), ("classifier", defense.classifier)):
            module.register_forward_hook(lambda _, given, out, name=name: self.forward(name, given, out))

    def forward(self, name: str, given: tuple, out) -> None:
        if len(given[0]) != self.rows:
            return  # a look at one image, before the run
        self.there[name] += len(given[0])
        out = out if isinstance(out, Tensor) else out.sample
        if out.requires_grad:
            out.register_hook(lambda gradient: self.backward(name, gradient))

    def backward(self, name: str, gradient: Tensor) -> None:
        self.back[name] += len(gradient)


@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_planned_passes_are_those_that_the_networks_see(tmp_path, monkeypatch, tiny_defense, tiny_images, attack, keep):
    """Exactly: with rows that every number of draws fills, whatever is kept; what is recomputed comes on top."""
    defense = Defense(tiny_defense.purifier, tiny_defense.classifier)
    if keep == "none":
        monkeypatch.setattr("benchmark.memory.budget", lambda device, least=0: 0)
    counted = Passes(defense, 32)
    cell = Cell(defense, tiny_images, attack, Settings(n=32, out=tmp_path, rows=32, **SETTINGS))
    cell.run()
    planned, n, nfe = cell.plan, 32, defense.nfe
    again = n * nfe * planned.backwards if cell.keep == 0 else 0
    assert (cell.keep == 0) == (keep == "none" and planned.backwards > 0) and not planned.upper_bound
    assert counted.there == {"unet": n * nfe * planned.forwards + again, "classifier": n * planned.forwards}
    assert counted.back == {"unet": n * nfe * planned.backwards, "classifier": n * planned.backwards}
    assert planned.passes == n * nfe * (planned.forwards + planned.backwards)


def test_cells_of_one_defense_share_their_draws_at_x(tmp_path, tiny_defense, tiny_images):
    defense = Defense(tiny_defense.purifier, tiny_defense.classifier)
    counted = Passes(defense, 32)
    costs = []
    for attack, eps in (("pgd:steps=1,eot=1", "8/255"), ("pgd:steps=2,eot=1", "8/255"), ("pgd:steps=1,eot=1", "9/255")):
        before = counted.there["classifier"]
        cell = Cell(defense, tiny_images, attack, Settings(n=32, out=tmp_path, rows=32, **SETTINGS | {"eps": eps}))
        cell.run()
        costs.append((counted.there["classifier"] - before) // 32 - cell.plan.forwards)
    clean = random = 3
    # the null floor's draws are shared, too, as far as another attack has asked for them
    assert costs == [0, -clean - random, -clean - 1]


# --- retirement


class Margin(torch.nn.Module):
    """Class 0 where the mean pixel is above a half."""

    def forward(self, x: Tensor) -> Tensor:
        z = 40 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack((z, -z, torch.full_like(z, -9.0), torch.full_like(z, -9.0)), 1)


def columns(*levels: float) -> tuple[Tensor, Tensor]:
    """Images of one grey each, of class 0."""
    x = torch.stack([torch.full((1, 8, 8), level) for level in levels])
    return x, torch.zeros(len(levels), dtype=torch.long)


RETIRING = ["pgd:steps=20,eot=4,retire=16", "apgd:steps=20,eot=4,retire=16", "autoattack:steps=20,eot=4,retire=16"]


@pytest.mark.parametrize("attack", RETIRING)
def test_the_lost_retire_and_the_others_go_on(tmp_path, attack):
    """Of three images one is lost at once, one is safe, one is at the boundary: it is often, not always wrong."""
    defense = Defense(Noisy(sigma=0.05), Margin())
    result = evaluate(
        defense, columns(0.52, 0.9, 0.633), attack, n=3, eps="1/8", out=tmp_path, quiet=True, draws=8, preflight=False
    )
    cost = [r["forwards"] for r in result.records]
    whole = Cell(
        defense, columns(0.52, 0.9, 0.633), attack, Settings(n=3, eps="1/8", out=tmp_path / "other", draws=8)
    ).plan
    assert whole.upper_bound
    lost, safe, between = result.records
    assert cost[0] < cost[1] and max(cost[1:]) <= whole.forwards + 16 * 4 * 2
    assert set(lost["adv"]) == {1} and lost["broken_at"] >= 0
    assert set(safe["adv"]) == {0} and safe["forwards"] == whole.forwards
    assert "retire 16" in result.rows[0]["display"]


@pytest.mark.parametrize("attack", RETIRING)
def test_a_search_stopped_where_it_would_retire_retires_when_it_goes_on(tmp_path, attack):
    def run(out: str, **more):
        return evaluate(
            Defense(Noisy(sigma=0.05), Margin()), columns(0.52, 0.9, 0.633), attack, n=3, eps="1/8", out=tmp_path / out,
            quiet=True, draws=8, preflight=False, **more,
        )  # fmt: skip

    while True:
        try:
            stopped = run("stopped", stop_after=0)
            break
        except Incomplete:
            pass
    whole = run("at once")
    assert [r["forwards"] for r in stopped.records] == [r["forwards"] for r in whole.records]
    assert stopped.records == whole.records
    assert np.array_equal(*(np.load(r.folder / "adversarial.npy") for r in (stopped, whole)))


def test_an_image_that_did_not_retire_is_attacked_as_if_none_could(tmp_path):
    defense, x = Defense(Noisy(sigma=0.05), Margin()), columns(0.52, 0.9, 0.64)
    with_, without = (
        evaluate(defense, x, f"pgd:steps=20,eot=4,iterate=best,retire={retire}", n=3, eps="1/8", out=tmp_path,
                 quiet=True, draws=8, preflight=False)
        for retire in (16, 0)
    )  # fmt: skip
    kept, whole = (np.load(result.folder / "adversarial.npy")[1:] for result in (with_, without))
    assert np.array_equal(kept, whole)
    assert with_.records[1] == without.records[1]
    assert "retire" not in without.rows[0]["display"]


def test_nothing_retires_unless_it_is_asked_to(tmp_path):
    cell = Cell(
        Defense(Noisy(sigma=0.05), Margin()),
        columns(0.52),
        "pgd:steps=20,eot=4",
        Settings(n=1, eps="1/8", out=tmp_path, preflight=False, quiet=True),
    )
    cell.run()
    (line,) = (cell.folder.folder / "records.jsonl").read_text().splitlines()
    assert json.loads(line)["forwards"] == cell.plan.forwards and "retire=0" in cell.identity.attack


def test_a_package_and_a_search_by_looking_retire_nobody(tmp_path):
    from benchmark.errors import UsageError

    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    model = Linear(w, torch.zeros(4))
    with pytest.raises(UsageError, match="retire would have no effect"):
        Cell(undefended(model), (images(4, dtype=torch.float32), torch.arange(4)), "autoattack:retire=8",
             Settings(n=4, eps="1/8", out=tmp_path))  # fmt: skip
    with pytest.raises(UsageError, match="retire"):
        Cell(undefended(model), (images(4, dtype=torch.float32), torch.arange(4)), "square:retire=8",
             Settings(n=4, eps="1/8", out=tmp_path))  # fmt: skip


@pytest.mark.parametrize("n, rows", [(1, 32), (16, 64), (31, 96), (32, 128), (64, 128)])
def test_few_images_take_no_more_rows_than_they_fill(tmp_path, n, rows):
    """Of 4 draws each, in whole groups of 32; on a CPU never more than 32 images fill."""
    settings = Settings(n=n, eps="1/8", out=tmp_path, preflight=False, quiet=True, device="cpu")
    cell = Cell(Defense(Noisy(sigma=0.05), Margin()), columns(*[0.5] * n), "pgd:steps=1,eot=4", settings)
    assert cell.most_rows == rows


@pytest.mark.parametrize("make_attack", [PGD, APGD, AutoAttack])
def test_a_negative_retire_is_refused(make_attack):
    with pytest.raises(ValueError, match="retire"):
        make_attack(retire=-1)


def test_an_ensemble_that_retires_in_its_first_member_keeps_that_members_find():
    x, y = columns(0.52)
    victim = Victim(
        Defense(Noisy(sigma=0.05), Margin()), Exact(), Tape(0, "attack", torch.arange(1)), Calls(32), stochastic=True
    )
    threat = NORMS["Linf"](0.125)
    attack = AutoAttack(steps=20, eot=4, retire=16)
    found = attack.perturb(x, y, victim, threat)
    assert victim.forwards < attack.evaluations(True) / 3, "the second member was never begun"
    assert (
        len(found.candidates) == 2 and not torch.equal(found.candidates[0], x) and torch.equal(found.candidates[1], x)
    )
    assert found.broken_at.item() >= 0


# --- states and contexts of any build


class Boxed(Purifier):
    """A purifier whose state is a dataclass and whose context is a dict of tensors and other things."""

    steps = 2
    stochastic = False

    def start(self, x, noise):
        from dataclasses import make_dataclass

        state = make_dataclass("Pair", ["a", "b", "name"])(x, [x**2, 3], "pair")
        return state, {"x": x, "size": x.shape[-2:], "none": None}

    def step(self, k, state, context, noise):
        return type(state)(state.a * state.b[0] + context["x"], [state.a, state.b[1]], state.name)

    def finish(self, state, context):
        assert state.name == "pair" and state.b[1] == 3 and isinstance(context["size"], torch.Size)
        return (state.a + state.b[0]) * context["x"]


def test_gradients_reach_through_dataclasses_dicts_and_lists():
    x = images(3)
    gradients = []
    for keep in (0, 2, None):
        z = x.clone().requires_grad_()
        gradients += torch.autograd.grad(Exact(keep)(Boxed(), z, Tape(0, "attack", torch.arange(3))).sum(), z)
    z = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(Boxed()(z, Tape(0, "attack", torch.arange(3))).sum(), z)
    assert all(torch.equal(g, gradients[0]) for g in gradients)
    assert torch.allclose(gradients[0], plain, rtol=1e-12, atol=1e-12)


def test_nothing_is_differentiated_twice(make):
    purifier: DiffPure = make(("diffpure", {}))
    x = images(2).requires_grad_()
    purified = Exact(0)(purifier, x, Tape(0, "attack", torch.arange(2)))
    (gradient,) = torch.autograd.grad(purified.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.slow
def test_compiled_networks_find_what_plain_ones_find(tmp_path, tiny_defense, tiny_images):
    """In the last digits they may differ, and say so: another environment, which a plain run doesn't continue."""
    runs = {}
    for compiled in (False, True):
        fresh = Defense(copy.deepcopy(tiny_defense.purifier), copy.deepcopy(tiny_defense.classifier))
        settings = SETTINGS | {"n": 32, "rows": 32, "out": tmp_path / str(compiled), "compile": compiled}
        runs[compiled] = evaluate(fresh, tiny_images, ATTACKS[0], **settings)
    plain, fused = ([r["adv"] + r["clean"] for r in runs[compiled].records] for compiled in (False, True))
    assert np.mean(np.array(plain) == np.array(fused)) > 0.97
    environment = json.loads((runs[True].folder / "run.json").read_text())["environment"]
    assert environment["compile"] is True


class Average(torch.nn.Module):
    """A plain module that knows no tape."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1)


def test_a_module_that_knows_no_tape_retires_image_by_image(tmp_path):
    defense, x = Defense(Average(), Margin()), columns(0.52, 0.9, 0.64)
    settings = {"eps": "1/8", "quiet": True, "preflight": False}
    attack = "pgd:steps=20,eot=1,retire=4"
    one = evaluate(defense, x, attack, n=1, out=tmp_path / "grown", **settings)
    assert one.records[0]["forwards"] < 20
    grown = evaluate(defense, x, attack, n=3, out=tmp_path / "grown", **settings)
    assert grown.records == evaluate(defense, x, attack, n=3, out=tmp_path / "at once", **settings).records


def test_what_is_changed_for_speed_is_a_copy(tmp_path, tiny_defense, tiny_images):
    fresh = Defense(copy.deepcopy(tiny_defense.purifier), copy.deepcopy(tiny_defense.classifier))
    weights = [w for w in fresh.parameters() if w.ndim == 4 and w.shape[1] > 1 and w.shape[-1] > 1]
    evaluate(fresh, tiny_images, "identity", n=2, out=tmp_path, channels_last=True, **SETTINGS)
    assert weights and all(w.is_contiguous() for w in weights)
