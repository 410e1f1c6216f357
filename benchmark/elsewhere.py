"""A defense built anew, and asked, in a process of its own: what it was asked before isn't there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attacks import Calls
from attacks._calls import Request
from attacks._recompute import ROWS
from benchmark import defenses, registry, specs
from benchmark.checkpoints import Need, Shelf
from benchmark.dataset import Form
from benchmark.errors import RunError, UsageError
from benchmark.fetch import network
from benchmark.repeatable import make_repeatable
from purifiers import Tape

if TYPE_CHECKING:
    from benchmark.cell import Cell

LIBRARIES = ("torch", "torchvision", "diffusers", "timm", "robustbench")
"""The packages whose networks the benchmark loads."""


def others_code(cell: Cell) -> bool:
    """Whether a part of the defense was written elsewhere: built in Python, of a file, or of a package unknown here."""
    identity = cell.identity
    if cell.need is None or defenses.built_by_hand(asdict(identity)):
        return True
    of_a_file = any(specs.parse(text).name == "file" for text in (identity.purifier, identity.classifier))
    packages = {type(module).__module__.partition(".")[0] for module in cell.defense.modules()}
    return of_a_file or not packages <= {*registry.OWN, *LIBRARIES}


def logits(cell: Cell, x: Tensor, ids: Tensor) -> Tensor:
    """What the defense of a cell, built there by its specs, says in the draws of the verdict.

    Args:
        cell: its defense was built by specs; ``defenses.built_by_hand`` tells.
        x: images in [0, 1], shape (B, C, H, W).
        ids: of these examples, shape (B,).

    Returns:
        Logits on the CPU, shape (B · draws, classes).

    Raises:
        RunError: with the last words of the process, if it failed.
    """
    identity = cell.identity
    assert cell.need is not None
    question = {
        "purifier": identity.purifier, "classifier": identity.classifier, "need": asdict(cell.need),
        "copies": identity.copies, "combine": identity.combine, "device": str(cell.device),
        "threads": torch.get_num_threads(), "seed": identity.seed, "draws": cell.draws,
    }  # fmt: skip
    if cell.device.type == "cuda":
        torch.cuda.empty_cache()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "question.json").write_text(json.dumps(question, default=str))
        np.savez(Path(folder) / "images.npz", x=x.cpu().numpy(), ids=ids.cpu().numpy())
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-m", "benchmark.elsewhere", folder],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        answer = Path(folder) / "answer.npy"
        if done.returncode or not answer.is_file():
            raise RunError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])
        return torch.from_numpy(np.load(answer))


def _answer(folder: Path) -> None:
    """The other process: build, ask, and write down."""
    question: dict[str, Any] = json.loads((folder / "question.json").read_text())
    torch.set_num_threads(question["threads"])
    device = torch.device(question["device"])
    make_repeatable(device)
    (family, shape, classes), roots = question["need"]["form"], question["need"]["roots"]
    typed = {"form": Form(family, tuple(shape), classes), "roots": tuple(map(Path, roots))}
    need = Need(**question["need"] | typed)
    with np.load(folder / "images.npz") as stored:
        x, ids = (torch.from_numpy(stored[key]).to(device) for key in ("x", "ids"))
    with network(not need.offline):
        defense = defenses.made(
            Shelf(), question["purifier"], question["classifier"], need, question["copies"], question["combine"]
        ).to(device)
    defense = defenses.tamed(defense, x[:8])
    tape = Tape(question["seed"], "verdict", ids)
    said = Calls(ROWS).ask(Request(defense, None, x, tape, question["draws"])).logits
    np.save(folder / "answer.npy", said.cpu().numpy())


if __name__ == "__main__":
    try:
        _answer(Path(sys.argv[1]))
    except (UsageError, RunError) as error:
        sys.exit(str(error))
