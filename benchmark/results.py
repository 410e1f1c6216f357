"""Runs on disk: records are facts about one image each, written once, readable at any moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from benchmark.config import Identity, slug
from benchmark.environment import commit
from benchmark.errors import UsageError
from benchmark.files import read_json, read_lines, reading, replace, sole, writing


class Run:
    """The folder of one cell: ``<out>/<dataset>/<purifier>/<attack>-<hash8>``.

    ``run.json`` (identity, environment, names), ``journal.jsonl`` (a line per finished example), ``adversarial.npy`` (a
    row is on disk before its line), ``logits/`` (a file per group, one ``logits.npz`` at the end), ``state.pt``
    (searches under way), ``timing.jsonl`` (never in records), ``records.jsonl`` (what the journal becomes, sorted).
    Processes that share the work each have a journal and a state of their own; who ends last puts them together.

    Args:
        out: root of the runs.
        identity: what decides the numbers.
        names: as the user wrote them.
        settings: what else ``run.json`` says.
        shard: the part of the images that this process does, e.g. "2/4"; None for all.

    Raises:
        UsageError: if the folder holds another configuration or environment.
        RunError: if it can't be written.
    """

    def __init__(
        self,
        out: Path,
        identity: Identity,
        names: dict[str, str],
        settings: dict[str, Any],
        shard: str | None = None,
    ):
        self.identity = identity
        part = f".{shard.replace('/', '-of-')}" if shard else ""
        self.shared = shard is not None
        self.journal, self.state = f"journal{part}.jsonl", f"state{part}.pt"
        self.folder = _home(out / slug(identity.dataset), identity, names)
        self.lock = f".work{part}.lock"
        self.settings = settings | {"identity": asdict(identity), "names": names, "mixed_environment": False}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The folder, made if it isn't there; meanwhile no other process does the same images again.

        Raises:
            RunError: if one is doing them.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with sole(self.folder / self.lock, "divide the images between processes: --shard 1/2 and --shard 2/2"):
            yield

    def open(self, n: int, shape: tuple[int, int, int], *, rows: int, mixed_environment: bool = False) -> None:
        """Begin, or check that the folder holds this very run, and make room for n examples."""
        self.settings["environment"]["rows"] = rows
        with self._alone(), writing(self.folder):
            self._mend()
            self.check_identity()
            path = self.folder / "run.json"
            if path.exists():
                found = read_json(path)
                self._check_environment(found, mixed_environment)
                if "afterwards" in found:  # what a defense answered once, a run that doesn't ask leaves as it is
                    self.settings.setdefault("afterwards", found["afterwards"])
            replace(path, json.dumps(self.settings | {"n": n}, indent=2, sort_keys=True) + "\n")
            self._room(n, shape)

    def pending(self) -> bool:
        """Whether all that is left to do is to ask the defense again: the process ended before, or none answered."""
        path = self.folder / "run.json"
        found = read_json(path) if path.exists() and (self.folder / "adversarial.npy").exists() else {}
        asked = found.get("afterwards", ())
        return (asked is None or any(one["status"] == "not run" for one in asked)) and bool(self.done())

    def discard(self) -> None:
        """Remove what was opened, holds no finished example, and is no other process's place of work."""
        if any(any(self.folder.glob(kind)) for kind in ("journal*.jsonl", "records.jsonl", "state*.pt")):
            return
        with ExitStack() as held, suppress(Timeout):
            for lock in self.folder.glob(".work*.lock"):
                if lock.name != self.lock:
                    held.enter_context(FileLock(lock, timeout=0))
            shutil.rmtree(self.folder, ignore_errors=True)

    def done(self) -> dict[int, dict[str, Any]]:
        """The finished examples by id."""
        return _records(self.folder)

    def write(self, rows: list[int], records: list[dict[str, Any]], x_adv: np.ndarray, logits: dict) -> None:
        """Finish the examples at positions ``rows``: images and logits first, then their lines, flushed to disk."""
        with writing(self.folder):
            images = np.lib.format.open_memmap(self.folder / "adversarial.npy", mode="r+")
            images[rows] = x_adv
            images.flush()
            (self.folder / "logits").mkdir(exist_ok=True)
            ids = np.array([r["id"] for r in records])
            target = self.folder / "logits" / f"{ids.min():09d}.npz"
            with target.with_suffix(".new").open("wb") as file:
                np.savez_compressed(file, id=ids, **logits)
            target.with_suffix(".new").replace(target)
            with (self.folder / self.journal).open("a") as journal:
                journal.writelines(json.dumps(r) + "\n" for r in records)
                journal.flush()
                os.fsync(journal.fileno())

    def note_time(self, entry: dict[str, Any]) -> None:
        """Seconds and memory of a piece of work, and the commit that did it."""
        entry = entry | {"commit": commit()}
        with writing(self.folder), (self.folder / "timing.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def save_state(self, lanes: list[dict[str, Any]]) -> None:
        """The searches under way: the positions of each one's images, and its state."""
        with writing(self.folder):
            new = self.folder / f"{self.state}.new"
            torch.save({"lanes": lanes}, new)
            new.replace(self.folder / self.state)

    def load_state(self, device: torch.device) -> list[dict[str, Any]]:
        """The searches that were under way, moved to ``device`` from whichever they were saved on."""
        path = self.folder / self.state
        if not path.exists():
            return []
        try:
            lanes = torch.load(path, map_location="cpu", weights_only=True).get("lanes", [])
        except Exception as error:  # torch raises what its reader does
            raise UsageError(
                f"{path} can't be read ({error}); delete it, and what was under way begins anew"
            ) from error
        return [lane | {"state": {k: v.to(device) for k, v in lane["state"].items()}} for lane in lanes]

    def begun_rows(self, *, halved: bool = False) -> int | None:
        """The row count that the run has, by this process or one it shares it with; None if it may still choose.

        With ``halved`` only a count that memory forced upon it.
        """
        path = self.folder / "run.json"
        found = read_json(path) if path.exists() else {}
        if not found or not ("halved_to" in found if halved else self._begun() or self.shared or "halved_to" in found):
            return None
        return found["environment"].get("rows")

    def halved(self, rows: int) -> None:
        """Memory ran out: forget what was under way, and note the new row count beside the one it began with."""
        if not (self.folder / "run.json").exists():
            return  # a batch that was timed
        with self._alone(), writing(self.folder):
            (self.folder / self.state).unlink(missing_ok=True)
        environment = self.settings["environment"] | {"rows": rows}
        self.note(environment=environment, halved_to=[*self.settings.get("halved_to", ()), rows])

    def note(self, **facts: Any) -> None:
        """Write facts into ``run.json``."""
        self.settings |= facts
        with self._alone(), writing(self.folder):
            found = read_json(self.folder / "run.json")
            replace(self.folder / "run.json", json.dumps(found | facts, indent=2, sort_keys=True) + "\n")

    def rename(self, purifier: str) -> None:
        """What the run's purifier is called from now on; all else stays as it is."""
        if not (self.folder / "run.json").exists():
            return
        with self._alone(), writing(self.folder):
            found = read_json(self.folder / "run.json")
            found["names"]["purifier"] = purifier
            replace(self.folder / "run.json", json.dumps(found, indent=2, sort_keys=True) + "\n")

    def finish(self, n: int | None = None) -> Path:
        """Turn the journals, sorted, into ``records.jsonl`` and gather the logits; both renamed into place.

        While fewer than ``n`` images are recorded, or than the run was opened for, nothing: other processes have some.
        """
        if not any(self.folder.glob("journal*.jsonl")):
            return self.folder
        with self._alone(), writing(self.folder):
            records = [record for _, record in sorted(self.done().items())]
            whole = read_json(self.folder / "run.json")["n"]
            if len(records) < (n or whole):
                return self.folder
            blocks = sorted((self.folder / "logits").glob("*.npz"))
            if blocks:
                self._gather(blocks)
            replace(self.folder / "records.jsonl", "".join(json.dumps(r) + "\n" for r in records))
            for path in self.folder.glob("journal*.jsonl"):
                path.unlink()
            for path in self.folder.glob("state*.pt") if len(records) >= whole else ():
                path.unlink()
        return self.folder

    def _alone(self) -> FileLock:
        """No other process opens or ends the run meanwhile."""
        return FileLock(self.folder / ".lock")

    def _mend(self) -> None:
        """Cut off what a kill left of a last line in this process's journal, so that the next begins on its own."""
        path = self.folder / self.journal
        raw = path.read_bytes() if path.exists() else b""
        if raw and not raw.endswith(b"\n"):
            replace(path, raw[: raw.rfind(b"\n") + 1].decode())

    def _begun(self) -> bool:
        """Whether anything was found or is under way."""
        return bool(self.done()) or any(self.folder.glob("state*.pt"))

    def _gather(self, blocks: list[Path]) -> None:
        target = self.folder / "logits.npz"
        pieces: list[dict[str, np.ndarray]] = []
        for path in [*([target] if target.exists() else []), *blocks]:
            with reading(path), np.load(path) as piece:
                pieces.append(dict(piece))
        joined = {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
        _, order = np.unique(joined["id"], return_index=True)
        temporary = self.folder / "logits.new.npz"
        np.savez_compressed(temporary, **{k: v[order] for k, v in joined.items()})  # type: ignore[arg-type]
        temporary.replace(target)
        shutil.rmtree(self.folder / "logits")  # with what a kill left half-written

    def check_identity(self) -> None:
        """Refuse a folder that holds another run."""
        path = self.folder / "run.json"
        theirs = read_json(path)["identity"] if path.exists() else self.settings["identity"]
        ours = self.settings["identity"]
        if theirs != ours:
            differ = [k for k in ours if theirs.get(k) != ours[k]]
            raise UsageError(
                f"{self.folder} holds another configuration ({', '.join(differ)} differ): nothing was overwritten; "
                "choose another --out or delete the folder"
            )

    def _check_environment(self, found: dict[str, Any], mixed: bool) -> None:
        """Refuse to continue where other versions or another machine began, or without the images found so far."""
        old, new = (dict(s["environment"]) for s in (found, self.settings))
        differ = [k for k in {**old, **new} if k != "commit" and old.get(k) != new.get(k)]
        begun = self._begun() or self.shared  # who shares a run and opened it first has decided, whatever it has done
        if self._begun() and not (self.folder / "adversarial.npy").exists():
            raise UsageError(
                f"{self.folder} has records but no adversarial.npy, so it can't be continued (a repository keeps "
                "records only): choose another --out to measure anew"
            )
        if differ and not mixed and begun:
            changes = ", ".join(f"{k}: {old.get(k)} → {new.get(k)}" for k in differ)
            raise UsageError(
                f"{self.folder} was begun in another environment ({changes}); "
                "continue it there, or pass --mixed-environment, which the table will say"
            )
        if begun:  # the commit that began the run; timing.jsonl has one per block
            self.settings["environment"] = new | {"commit": old.get("commit")}
        if "halved_to" in found:
            self.settings["halved_to"] = found["halved_to"]
        self.settings["mixed_environment"] = bool(differ and begun) or found.get("mixed_environment", False)

    def _room(self, n: int, shape: tuple[int, int, int]) -> None:
        path, new = self.folder / "adversarial.npy", self.folder / "adversarial.new"
        with reading(path):
            old = np.load(path, mmap_mode="r") if path.exists() else np.empty((0, *shape), np.float32)
        if len(old) >= n:
            return
        larger = np.lib.format.open_memmap(new, "w+", np.float32, (n, *shape))
        if hasattr(os, "posix_fallocate"):  # a hole would be filled through the map, where a full disk is a SIGBUS
            with new.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, new.stat().st_size)
        larger[: len(old)] = old
        larger.flush()
        new.replace(path)


def _home(root: Path, identity: Identity, names: dict[str, str]) -> Path:
    """The folder of an identity: named as it is spelled now, unless another spelling of the same run has one."""
    spelled = root / slug(names["purifier"]) / f"{slug(names['attack'])}-{identity.hash8}"
    others = sorted(path.parent for path in root.glob(f"*/*-{identity.hash8}/run.json"))
    same = (folder for folder in others if read_json(folder / "run.json").get("identity") == asdict(identity))
    return spelled if spelled.exists() else next(same, spelled)


def distinct(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run once: of copies in several folders the one with the most images, or the first."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        key = json.dumps(run["identity"], sort_keys=True)
        if key not in found or len(run["records"]) > len(found[key]["records"]):
            found[key] = run
    return list(found.values())


def logits(folder: Path, key: str) -> dict[int, np.ndarray]:
    """A run's logits of some draws by example, as far as they are at hand: "clean", "adv", "select" or "random"."""
    found: dict[int, np.ndarray] = {}
    for path in (folder / "logits.npz", *sorted((folder / "logits").glob("*.npz"))):
        if path.is_file():
            with reading(path), np.load(path) as piece:
                found.update(zip(piece["id"].tolist(), piece[key], strict=True))
    return found


def read_run(folder: Path) -> dict[str, Any]:
    """The settings of a run, with its finished records as "records" and its seconds as "seconds"."""
    settings = read_json(folder / "run.json")
    if missing := [key for key in ("identity", "names", "environment", "n", "stochastic") if key not in settings]:
        raise UsageError(f"{folder / 'run.json'} has no {missing[0]}: restore it, or delete {folder} and run again")
    records = _records(folder)
    timing = folder / "timing.jsonl"
    times = read_lines(timing) if timing.exists() else []
    return settings | {
        "records": [records[k] for k in sorted(records)],
        "complete": (folder / "records.jsonl").exists() and len(records) >= settings["n"],
        "seconds": sum(t["seconds"] for t in times),
        "folder": folder,
    }


def _records(folder: Path) -> dict[int, dict[str, Any]]:
    """Finished examples by id: those of ``records.jsonl``, and a later journal's whole lines."""
    records: dict[int, dict[str, Any]] = {}
    finished = folder / "records.jsonl"
    if finished.exists():
        state = finished.stat()
        records.update({r["id"]: dict(r) for r in _finished(finished.absolute(), state.st_mtime_ns, state.st_size)})
    for journal in sorted(folder.glob("journal*.jsonl")):
        records.update({r["id"]: r for r in read_lines(journal)})
    return records


@lru_cache(maxsize=1024)
def _finished(path: Path, changed: int, size: int) -> list[dict[str, Any]]:
    """``read_lines``, anew only when the file changes: a document's tables ask for the same runs again and again."""
    return read_lines(path)


def find_runs(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """All runs below some folders, in a stable order.

    Raises:
        UsageError: if a path doesn't exist or holds no run.
    """
    runs = []
    for path in map(Path, paths):
        found = sorted(p.parent for p in path.rglob("run.json")) if path.is_dir() else []
        if not found:
            raise UsageError(f"{path}: no run below this folder; python -m benchmark run --out {path} makes one")
        runs += [read_run(folder) for folder in found]
    return runs


WHERE = "dataset purifier classifier copies norm eps budget precision protocol".split()
"""What ``where`` chooses by: never by what a defense met, for its worst case is one of all attacks."""
NAMED = ("identity", "names")
"""The two ways in which a run says what it is: canonical specs, and as they were given."""


def conditions(texts: Iterable[str], option: str) -> dict[str, set[str]]:
    """What conditions NAME=VALUE ask for: names and the values of which one has to hold.

    Raises:
        UsageError: for a name that isn't one of ``WHERE``.
    """
    wanted: dict[str, set[str]] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in WHERE or not value:
            raise UsageError(
                f"{option} {text}: expected NAME=VALUE with a name of {', '.join(WHERE)}; attacks can't be left "
                "out of a worst case"
            )
        wanted.setdefault(name, set()).add(_plain(value))
    return wanted


def meant(run: dict[str, Any], wanted: dict[str, set[str]]) -> bool:
    """Whether a run's identity, or its specs as they were given, are as conditions ask."""
    return all(
        values & {_plain(str(run[of][name])) for of in NAMED if name in run[of]} for name, values in wanted.items()
    )


def where(runs: list[dict[str, Any]], texts: Iterable[str]) -> list[dict[str, Any]]:
    """The runs that are as conditions NAME=VALUE say: of those with one name one has to hold, of several names all.

    Raises:
        UsageError: for a name that isn't one of ``WHERE``, or if none is left.
    """
    for name, values in conditions(texts, "--where").items():
        left = [run for run in runs if meant(run, {name: values})]
        if not left:
            known = sorted({str(run["names"].get(name, run["identity"][name])) for run in runs})
            raise UsageError(f"--where {name}={' or '.join(sorted(values))}: no such run; there are {', '.join(known)}")
        runs = left
    return runs


def _plain(value: str) -> str:
    """A value as it is compared: numbers as numbers, - and _ the same."""
    try:
        return str(Fraction(value))
    except ValueError:
        return value.replace("_", "-")
