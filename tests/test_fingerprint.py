"""What a module without a name holds and reaches decides its fingerprint, in every process the same."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmark.fingerprint import fingerprint

ROOT = Path(__file__).parents[1]


class Scaled(nn.Module):
    """What it does stands in an attribute of a kind that no state_dict knows."""

    def __init__(self, held, scale):
        super().__init__()
        self.held, self.scale = held, scale

    def forward(self, x):
        return self.scale(self.held, x)


def grown(held, x):
    return x + 1


HELD = {
    "tensor": (torch.tensor(0.5), torch.tensor(0.9)), "array": (np.ones(2), np.zeros(2)), "dict": ({"k": 1}, {"k": 9}),
    "nested": ([{"k": (1, None)}], [{"k": (2, None)}]), "object": (Fraction(1, 3), Fraction(1, 4)),
    "closure": (lambda: 1, lambda: 2), "type": (np.float32, np.float64),
}  # fmt: skip


@pytest.mark.parametrize("first, second", HELD.values(), ids=HELD)
def test_what_a_module_holds_decides_its_fingerprint(first, second):
    def scale(held, x):
        return x

    one, same, other = (fingerprint(Scaled(held, scale)) for held in (first, copy.deepcopy(first), second))
    assert one == same != other
    assert fingerprint(Scaled(first, grown)) != one
    inner = [nn.Sequential(Scaled(first, f), nn.ReLU()) for f in (scale, scale, grown)]
    assert fingerprint(inner[0]) == fingerprint(inner[1]) != fingerprint(inner[2])


SCRIPT = """
import argparse
import dataclasses
import logging
import types

import torch

import beside

OPTIONS = argparse.Namespace(gain={gain})
LOOSE = types.SimpleNamespace(gain={loose})


@dataclasses.dataclass
class Told:
    gain: float


TOLD = Told({told})


class Config:
    gain = {config}


AMOUNT = {amount}
TABLE = torch.tensor([{entry}])
UNUSED = {unused}
NET = torch.nn.Linear(1, 1)
NET.load_state_dict(dict(weight=torch.tensor([[{weight}]]), bias=torch.zeros(1)))
LOG = logging.getLogger(__name__)


def amount():
    return {factor} * AMOUNT


class Base(torch.nn.Module):
    unused = 0

    def moved(self, x):
        return x + {shift}


class Smooth(Base):
    own = {own}

    def forward(self, x):
        LOG.debug("seen")
        gain = OPTIONS.gain * LOOSE.gain * TOLD.gain * Config.gain * beside.GAIN * self.own
        return gain * NET(TABLE * amount() * self.moved(x)) + self.unused


NET.owner = [Smooth]
again = Smooth()
"""
USUAL = {"amount": 0.1, "entry": 1.0, "unused": 0, "weight": 2.0, "factor": 3, "shift": 0.0, "gain": 1,
         "loose": 1, "told": 1, "config": 1, "own": 1, "beside": 1}  # fmt: skip


def written(folder: Path, **changed) -> Path:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(**USUAL | changed))
    (folder / "beside.py").write_text(f"GAIN = {(USUAL | changed)['beside']}\n")
    return path


def in_another_process(path: Path) -> str:
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(path.parent)!r}]; import {path.stem}; "
    code += f"from benchmark.fingerprint import fingerprint; print(fingerprint({path.stem}.Smooth()))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def here(path: Path, monkeypatch) -> str:
    monkeypatch.syspath_prepend(path.parent)
    importlib.invalidate_caches()
    module = importlib.import_module(path.stem)
    try:
        return fingerprint(module.Smooth())
    finally:
        del sys.modules[path.stem], sys.modules["beside"]


@pytest.mark.parametrize("name, value, moves", [
    ("amount", 0.2, True), ("entry", 5.0, True), ("weight", 7.0, True), ("factor", 4, True), ("shift", 0.5, True),
    ("gain", 2, True), ("loose", 2, True), ("told", 2, True), ("config", 2, True), ("own", 2, True),
    ("beside", 2, True), ("unused", 1, False),
])  # fmt: skip
def test_what_a_module_reaches_by_a_global_name_decides_it_too(tmp_path, monkeypatch, name, value, moves):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir(), after.mkdir()
    one = here(written(before), monkeypatch)
    assert (here(written(after, **{name: value}), monkeypatch) != one) == moves


def test_it_is_the_same_in_another_process(tmp_path, monkeypatch):
    path = written(tmp_path)
    assert in_another_process(path) == here(path, monkeypatch)


def test_a_hook_that_counts_changes_nothing_and_another_one_does():
    seen, module = [], Scaled(0, grown)
    module.register_forward_hook(lambda *given: seen.append(1))
    before = fingerprint(module)
    module(torch.zeros(1))
    assert seen and fingerprint(module) == before != fingerprint(Scaled(0, grown))


def test_modules_that_know_each_other_end(monkeypatch):
    one, other = Scaled(0, grown), Scaled(0, grown)
    one.held, other.held = [other], [one]
    assert len(fingerprint(one)) == 64


def test_an_attribute_set_on_a_class_and_code_without_a_file_count(monkeypatch):
    before = fingerprint(Scaled(0, grown))
    monkeypatch.setattr(Scaled, "gain", 2.0, raising=False)
    assert fingerprint(Scaled(0, grown)) != before
    typed = []
    for gain in (0.5, 0.9):
        exec(f"class Typed(Module):\n    def forward(self, x): return {gain} * x", space := {"Module": nn.Module})
        typed.append(fingerprint(space["Typed"]()))
    assert typed[0] != typed[1]
