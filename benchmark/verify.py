"""Records doubted: a run held against its own words, and its first images attacked again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark import config, defenses, evidence, registry, specs, stats
from benchmark.afterwards import afterwards
from benchmark.cell import Cell
from benchmark.checks import Check, failures
from benchmark.dataset import Dataset
from benchmark.engine import BLOCK
from benchmark.environment import environment
from benchmark.errors import RunError, UsageError
from benchmark.settings import Settings

AGAIN = ("clean", "adv", "select", "random", "distance", "broken_at", "null_wrong", "package_verdict")
"""What of a record has to come out the same."""
MACHINE = ("python", "packages", "device", "device_name")
"""What of the environment bytes may depend on."""


def verify(run: dict[str, Any], settings: Settings, *, dataset: str | None = None, again: bool = True) -> list[Check]:
    """The checks of one run.

    - ``identity``: run.json is what its folder's name is the hash of.
    - ``records``: one per image, of the numbers of draws that run.json states.
    - ``adversarial``: the adversarial images, if they are at hand, are in [0, 1] and within eps, and of those that
      the data set gives here as far from them as recorded.
    - ``defense``: what is at hand by the names in run.json has the same weights, images, options and protocol, and is
      what a table calls it.
    - ``labels``: the records' labels are the data set's.
    - ``attacked-again``: the first ``settings.n`` images give the same records, draw by draw; where the machine or the
      versions are others, bits may differ, and a warning says in how many.
    - ``robust-again``: their robust accuracy by the new records doesn't differ from that by the old ones.

    Args:
        run: as ``results.read_run`` gives it.
        settings: how many images, on which device, and where data and weights are.
        dataset: where the data set is, if it came from files.
        again: attack, or only look.
    """
    checks = [_identity(run), _records(run)]
    try:
        cell = rebuilt(run, settings, dataset)
    except (UsageError, RunError) as error:
        advice = "say where things are: --dataset, --weights, --data-dir"
        if defenses.built_by_hand(run["identity"]):
            advice = "evaluate it again with another out, and hold the records against these"
        return [*checks, _adversarial(run, None), Check("defense", "fail", str(error), "can be built here", advice)]
    checks.append(_adversarial(run, cell))
    checks += [_defense(run, cell), _labels(run, cell.data)]
    if again and not failures(checks):
        checks += _again(run, cell)
    return checks


def rebuilt(run: dict[str, Any], settings: Settings, dataset: str | None = None) -> Cell:
    """The cell that a run's identity describes, of its first images, with its rows, writing to ``settings.out``.

    Raises:
        UsageError: if something that it names can't be built here.
    """
    identity = run["identity"]
    if defenses.built_by_hand(identity):
        raise UsageError(
            f"{identity['purifier']} + {identity['classifier']} was built in Python: no command can build it again"
        )
    n = min(settings.n or BLOCK, len(run["records"]))
    known = dataclasses.replace(
        settings, n=n, norm=identity["norm"], eps=identity["eps"], view=identity["view"], attacker=identity["attacker"],
        draws=identity["draws"], seed=identity["seed"], precision=identity["precision"],
        rows=run["environment"]["rows"], preflight=False, quiet=True,
    )  # fmt: skip
    source = known.examples(dataset or identity["dataset"])
    defense = defenses.load(
        identity["purifier"], identity["classifier"], source.form, copies=identity["copies"],
        combine=identity["combine"], norm=identity["norm"], weights=settings.weights, offline=settings.offline,
        trust=settings.trust,
    )  # fmt: skip
    cells = [
        Cell(defense, source, run["names"]["attack"], dataclasses.replace(known, budget=budget))
        for budget in config.BUDGETS
    ]
    return min(cells, key=lambda cell: len(_differing(run, cell)))


def _identity(run: dict[str, Any]) -> Check:
    digest = hashlib.sha256(json.dumps(run["identity"], sort_keys=True).encode()).hexdigest()[:8]
    same = Path(run["folder"]).resolve().name.endswith(f"-{digest}")
    advice = "run.json or the folder's name was changed after the run: attack again"
    return Check.of("identity", same, digest, "as the folder's name ends", advice)


def _records(run: dict[str, Any]) -> Check:
    identity, records = run["identity"], run["records"]
    draws = {
        "clean": identity["draws"],
        "adv": identity["draws"],
        "random": identity["draws"],
        "select": identity["select"],
    }
    wrong = [r["id"] for r in records if any(len(r[key]) != count for key, count in draws.items())]
    found = f"{len(records)} of {run['n']}" + (f", wrong draws in {len(wrong)}" if wrong else "")
    good = run["complete"] and not wrong and len(records) > 0
    advice = "continue the run (the same command), or attack again"
    return Check.of("records", good, found, f"{run['n']} of {run['n']}", advice)


def _adversarial(run: dict[str, Any], cell: Cell | None) -> Check:
    """The stored images: as many as there are records, in the ball, and, of the images at hand, as far as recorded."""
    path, identity = Path(run["folder"]) / "adversarial.npy", run["identity"]
    if not path.is_file() or identity["norm"] not in ("Linf", "L2"):
        return Check("adversarial", "n/a", "not at hand" if not path.is_file() else identity["norm"], "", "")
    expected = f"within {identity['eps']}, in [0, 1], as recorded"
    try:
        stored = np.load(path, mmap_mode="r")
    except (ValueError, OSError) as error:
        return Check("adversarial", "fail", str(error), expected, f"{path} is damaged: attack again")
    by_id = {r["id"]: r for r in run["records"]}
    farthest = max((r["distance"] for r in by_id.values()), default=0.0)
    good = len(stored) >= len(by_id) and Fraction(farthest) <= Fraction(identity["eps"])
    if good and cell is not None:
        rows = [k for k, i in enumerate(cell.data.ids.tolist()[: len(stored)]) if i in by_id]
        x_adv, x = torch.from_numpy(np.array(stored[rows])), cell.data.images(torch.tensor(rows, dtype=torch.long))
        recorded = torch.tensor([by_id[int(i)]["distance"] for i in cell.data.ids[rows]], dtype=torch.float64)
        inside = bool(x_adv.isfinite().all()) and bool((x_adv >= 0).all()) and bool((x_adv <= 1).all())
        good = inside and torch.allclose(cell.threat.distance(x_adv, x), recorded, rtol=1e-5, atol=1e-7)
    elif good:
        good = bool(np.isfinite(stored).all() and stored.min() >= 0 and stored.max() <= 1)
    advice = "an attack left its threat model, or the images aren't the recorded ones: attack again"
    return Check.of("adversarial", good, farthest, expected, advice)


def _differing(run: dict[str, Any], cell: Cell) -> list[str]:
    """The fields of the identity that differ from the cell's; options that a component gained since are none."""
    recorded, here = dict(run["identity"]), dataclasses.asdict(cell.identity)
    for identity in (recorded, here):
        identity["purifier"] = registry.completed("purifiers", identity["purifier"])
        identity["attack"] = registry.completed("attacks", identity["attack"])
    return [key for key in here if key not in ("budget", "dataset") and recorded.get(key) != here[key]]


def _defense(run: dict[str, Any], cell: Cell) -> Check:
    differing = _differing(run, cell)
    names, identity = run["names"], run["identity"]
    for kind in ("purifier", "classifier"):
        # its author may call it as they like, but by no other's name
        called = names[kind].partition(":")[0].partition(",")[0]
        if called in registry.names(f"{kind}s") and called != specs.parse(identity[kind]).name:
            differing.append(f"names.{kind}")
    if _unversioned(names["display"]) != _unversioned(cell.names["display"]):
        differing.append("names.display")
    advice = "what is at hand isn't what was attacked: the same weights, files and version of this benchmark are needed"
    return Check.of("defense", not differing, ", ".join(differing), "nothing differs", advice)


def _unversioned(display: str) -> str:
    """What a table calls an attack, whichever version of a package ran it."""
    return re.sub(r" \d+(\.\d+)+", "", display)


def _labels(run: dict[str, Any], images: Dataset) -> Check:
    at_hand = dict(zip(images.ids.tolist(), images.labels.tolist(), strict=True))
    wrong = [r["id"] for r in run["records"] if r["id"] in at_hand and at_hand[r["id"]] != r["label"]]
    advice = "the records are of other labels than the data set's: attack again"
    return Check.of("labels", not wrong, f"{len(wrong)} wrong", "0 wrong", advice)


def _again(run: dict[str, Any], cell: Cell) -> list[Check]:
    """Attack the first images again and hold the records against those of the run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(run["environment"]["threads"])  # sums are split by them
    try:
        new = {r["id"]: r for r in cell.result().records}
    finally:
        torch.set_num_threads(threads)
    old = [r for r in run["records"] if r["id"] in new]
    changed = [r["id"] for r in old if any(r.get(key) != new[r["id"]].get(key) for key in AGAIN)]
    here = environment(cell.settings.device)
    moved = [key for key in MACHINE if here[key] != run["environment"].get(key)]
    status = "pass" if not changed else "warn" if moved or cell.device.type == "cuda" else "fail"
    advice = "the run can't be repeated: ask why"
    if cell.device.type == "cuda":
        advice = "some backward passes have no repeatable kernel on a GPU"
    if moved:
        advice = f"{', '.join(moved)} differ from the run's: bits may"
    value, wanted = f"{len(changed)} of {len(old)} images differ", f"0 of {len(old)}"
    checks = [Check("attacked-again", status, value, wanted, advice)]
    if changed:
        found = stats.compare(evidence.shares(list(new.values())), evidence.shares(old))
        points = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}] points, n={len(old)}"
        apart = found.p < 0.05
        advice = "the recorded accuracy doesn't come out again"
        checks.append(Check.of("robust-again", not apart, points, "no difference", advice))
    return [*checks, *afterwards(cell)]


def each(runs: Sequence[dict[str, Any]], settings: Settings, **options: Any) -> Iterator[tuple[str, list[Check]]]:
    """``verify`` of several runs, each with its folder; what is attacked again is written to a temporary one."""
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            yield str(run["folder"]), verify(run, dataclasses.replace(settings, out=folder), **options)
