"""One cell of a table: a defense to be attacked on a data set, what identifies it, and what it will cost."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from attacks import NORMS, PRECISIONS, Attack, NotApplicable, ThreatModel
from attacks._copies import copied
from attacks._recompute import ROWS, Footprint, footprint
from benchmark import checkpoints, config, constructors, defenses, evidence, memory, registry, report, specs
from benchmark.dataset import Dataset
from benchmark.engine import BLOCK, Engine, Incomplete
from benchmark.environment import environment
from benchmark.errors import NotApplicableError, RunError, UsageError, raised, unknown
from benchmark.gate import check_afterwards, check_defense, check_past, check_shapes
from benchmark.plan import Plan, plan
from benchmark.repeatable import make_repeatable
from benchmark.results import Run, read_run
from benchmark.settings import Settings
from benchmark.views import View
from purifiers import Defense, Purifier, Tape

__all__ = ["Cell", "Incomplete", "Result"]

FULL = 128
"""Rows that fill a device, so that more of them are no faster."""
MOST_ROWS = {"cpu": 128, "cuda": 2048}
"""Rows of a network call, unless told otherwise or memory is short."""


class Result(NamedTuple):
    """What a run gave: the rows of ``report --format json``, the records, and the folder they are in."""

    rows: list[dict[str, Any]]
    records: list[dict[str, Any]]
    folder: Path

    @property
    def adversarial(self) -> Tensor:
        """The adversarial images of a whole run's records, float32 in [0, 1], shape (N, C, H, W), from its folder."""
        return torch.from_numpy(np.load(self.folder / "adversarial.npy")[: len(self.records)])


class Cell:
    """One cell of a table, ready to run: components, identity, plan and folder."""

    def __init__(self, defense: Defense, images: str | tuple[Any, Any] | Dataset, attack: str,
                 settings: Settings):  # fmt: skip
        self.settings = s = settings
        self.device = torch.device(s.device)
        chosen = config.budget(s.budget, self.device.type)
        self.view = View(s.view)
        _check(s, self.device)
        self.shard = s.part
        self.data = s.examples(images)
        self.n = s.images
        described = defenses.describe(defense)
        self.told = defenses.told(described)
        self.need: checkpoints.Need | None = getattr(defense, "need", None)  # of one that was built by specs
        given, self.defense = defense, self._readied(defense, described["names"]["purifier"])
        self.stochastic = self.defense.stochastic
        spec = specs.parse(attack)
        component: Any = registry.load("attacks", spec.name, spec.argument)
        spec = replace(spec, argument=getattr(component, "name", None) or spec.argument)
        self.select = chosen.select if self.stochastic else 1
        self.draws = (chosen.draws if s.draws is None else s.draws) if self.stochastic else 1
        if self.draws < 1:
            raise UsageError(f"--draws {self.draws}: at least one draw is needed")
        self.threat = self._threat(attack, component)
        source = constructors.resolve(component, spec).get("source")  # an attack that transfers names its attacker
        g = self._other(source or s.attacker)
        self.attacker = self._attacking(given, g) if g else self.defense
        self.drawing = self.stochastic or self.attacker.stochastic  # whether draws differ in the attack's loop
        eot = self.draws if self.view.foreknown else None  # who knows the draws that judge averages over all of them
        options, untouched = config.attack_options(spec, component, chosen, self.drawing, eot)
        self.attack = self._searching(attack, spec, component, options)
        self.package = self.attack.package(self.drawing)
        if self.view.foreknown and self.package:
            raise UsageError(f"--view {s.view}: {attack} draws its own noise and can't be told the verdict's")
        custom = not untouched or (s.draws is not None and s.draws != chosen.draws)
        # whether the loop sees the defense itself, so that a rule may speak of what it saw
        self.watched = self.attacker is self.defense and self.view.spec.name != "blind" and not self.package
        self.distinct = 0
        if self.stochastic and self.watched:
            self.distinct = eot if self.view.foreknown and eot else self.attack.distinct(True)
        weights = described["weights"] | {f"attack.{k}": v for k, v in registry.source(spec).items()}
        if g:
            weights |= {f"attack{'.source' if source else 'er'}.{k}": v for k, v in g.weights.items()}
            weights |= {"attack.source": str(g.spec)} if source else {}
        self.identity = config.Identity(
            dataset=self.data.name,
            fingerprint=self.data.fingerprint,
            purifier=described["purifier"],
            classifier=described["classifier"],
            weights=weights,
            copies=self.defense.copies,
            combine=self.defense.combine,
            attack=str(replace(spec, options=_named(component, options))),
            norm=self.threat.norm,
            eps=config.eps_text(self.threat.eps),
            view=str(self.view),
            attacker=str(g.spec) if g and not source else None,
            budget="custom" if custom else chosen.name,
            select=self.select,
            draws=self.draws,
            seed=s.seed,
            precision=s.precision if self.attack.gradients(self.drawing) and not self.package else "float32",
        )
        self.plan: Plan = plan(
            self.attack, stochastic=self.drawing, nfe=self.defense.nfe, n=self.n, select=self.select, draws=self.draws,
            null=max(self.distinct, self.attack.looks(self.drawing) if self.stochastic else 0),
        )  # fmt: skip
        shown = self._display({k: options[k] for k in spec.options})
        names = self.names = described["names"] | {"attack": attack, "display": shown}
        names |= {"purifier": s.name} if s.name else {}
        self.folder = Run(
            Path(s.out), self.identity, names,
            {"environment": environment(s.device, compile=s.compile, channels_last=s.channels_last),
             "stochastic": self.stochastic, "nfe": self.defense.nfe,
             "parameters": sum(p.numel() for p in self.defense.purifier.parameters()),
             "preflight": s.preflight, "noise": self._noise(),
             "watched": self.watched} | ({"afterwards": None} if s.preflight else {}),
            s.shard,
        )  # fmt: skip

    def _readied(self, given: Defense, name: str) -> Defense:
        """The defense on its device, with a purifier that obeys tapes, laid out as the settings ask."""
        try:
            tame = defenses.tamed(given.to(self.device), self.data.images(slice(0, 8)).to(self.device))
        except Exception as error:  # whatever a module raises that is called for the first time
            raise UsageError(f"the purifier {name} raised {raised(error)}") from error
        return _laid_out(tame.to(self.device), self.settings, given, "", self.told)

    def _threat(self, attack: str, component: Any) -> ThreatModel:
        """The ball that is searched: of the norm and radius that were asked for, or are usual."""
        s = self.settings
        norm = component.norms[0] if s.norm is None else s.norm
        if norm not in component.norms:
            raise UsageError(f"{attack} searches under {' or '.join(component.norms)}, not under {norm}")
        eps = config.radius(s.eps, norm, self.data.family)
        try:
            threat = NORMS[norm](eps)
        except ValueError as error:
            raise UsageError(f"{attack}: {error}") from error
        if eps > (widest := threat.widest(self.data.shape)):
            raise UsageError(
                f"--eps {eps}: no two images of shape {self.data.shape} are further apart than {widest:.4g} in {norm}; "
                f"radii are in [0, 1] pixel units: for {eps} in 255 levels write {eps}/255"
            )
        return threat

    def _other(self, purifier: str | None) -> checkpoints.Component | None:
        """The purifier that the attacker differentiates in place of the defense's own, if one is named."""
        s = self.settings
        roots = (Path(s.weights),) if s.weights else ()
        need = checkpoints.Need(self.data.form, self.threat.norm, roots, s.offline, s.trust)
        return s.shelf.build("purifiers", purifier, need) if purifier else None

    def _attacking(self, given: Defense, other: checkpoints.Component) -> Defense:
        """What the attacker differentiates: another purifier before the defense's classifier."""
        own = self.defense
        attacker = Defense(other.module, given.classifier, copies=own.copies, combine=own.combine)
        attacker = defenses.tamed(attacker, self.data.images(slice(0, 8)).to(self.device))
        told = f"{self.told} {other.weights}"
        return _laid_out(attacker.to(self.device), self.settings, given, str(other.spec), told)

    def _searching(self, text: str, spec: specs.Spec, component: Any, options: dict[str, Any]) -> Attack:
        """The attack; one that takes a gradient makes the view one that fits the attacker."""
        try:
            attack: Attack = component(**options)
        except ValueError as error:
            raise UsageError(f"{spec.name}: {error}") from error
        if useless := sorted(set(spec.options) & set(attack.ignored(self.drawing))):
            raise UsageError(f"{text}: {', '.join(useless)} would have no effect: {attack.display(self.drawing)}")
        if attack.gradients(self.drawing):
            self.view = self.view.fitting(self.attacker.purifier)
        return attack

    def _display(self, told: dict[str, Any]) -> str:
        """The attack's full name: with the options that were told and it doesn't show, and what else isn't usual."""
        display = self.attack.display(self.drawing)
        if hidden := {k: v for k, v in told.items() if k not in self.attack.shown}:
            display += f" [{', '.join(f'{k}={specs.show(v)}' for k, v in hidden.items())}]"
        if self.package:
            display = display.replace(self.package, f"{self.package} {version(self.package)}")
        if self.identity.precision != "float32":
            display += f" [gradients in {self.identity.precision}]"
        return display + " [knows the verdict's draws]" * self.view.foreknown

    def _noise(self) -> str:
        """How far the noise is decided by seed and image: keyed, by a package's calls, or by the place in a batch."""
        if defenses.is_foreign(self.defense) or defenses.is_foreign(self.attacker):
            return "global"
        return "stream" if self.package and self.drawing else "keyed"

    def __str__(self) -> str:
        i, names = self.identity, self.names
        copies = "" if i.copies == 1 else f" × {i.copies} ({i.combine})"
        view = evidence.view({"view": i.view, "attacker": i.attacker})
        return (
            f"{names['purifier']}{copies} + {names['classifier']} under {names['display']}, {i.norm} {i.eps}, "
            f"view {view}, {i.dataset} n={self.n}, seed {i.seed}"
        )

    def result(self) -> Result:
        """Run, and read what is on disk."""
        folder = self.run()
        found = self.recorded(folder)
        return Result(report.rows([found]), found["records"], folder) if found else Result([], [], folder)

    def recorded(self, folder: Path) -> dict[str, Any] | None:
        """What a folder holds of the images that were asked for, as ``read_run``; None of a shard without any."""
        if not (folder / "run.json").exists():
            return None
        found, asked = read_run(folder), set(self.data.ids[: self.n].tolist())
        kept = [record for record in found["records"] if record["id"] in asked]
        share = len(kept) / max(len(found["records"]), 1)
        return found | {
            "n": self.n, "records": kept, "complete": len(kept) == self.n, "seconds": share * found["seconds"]
        }  # fmt: skip

    @property
    def mixes(self) -> bool:
        """Whether searches may share calls: a package draws from global generators, and so does a foreign module."""
        return not self.package and self.folder.settings["noise"] == "keyed"

    @cached_property
    def footprint(self) -> Footprint:
        """What a gradient stores per row, measured on one image; nothing if the attack takes none."""
        if not self.attack.gradients(self.drawing):
            return Footprint()
        tape = Tape(self.settings.seed, "preflight", self.data.ids[:1]).to(self.device)
        x, exact = self.data.images(slice(0, 1)).to(self.device), self.view.spec.name == "exact"
        staged = exact and isinstance(self.attacker.purifier, Purifier)
        found = footprint(self.attacker, x, tape, self.view(keep=None), staged=staged)
        wide = PRECISIONS[self.identity.precision].dtype == torch.float64
        return Footprint(tuple(2 * g for g in found.graphs), 2 * found.inputs, 2 * found.rest) if wide else found

    @cached_property
    def rows(self) -> int:
        """Rows of every network call: as the run began, or as told, or the most that fits into memory.

        Raises:
            NotApplicableError: if not even 32 rows fit.
        """
        if (begun := self.folder.begun_rows(halved=self.settings.rows is not None)) is not None:
            return begun
        if self.settings.rows is not None:
            return self.settings.rows
        if self.fitting == 0:
            raise NotApplicableError(
                f"{self}: the gradient of 32 rows needs {memory.size(self.footprint.least * ROWS)} even where every "
                f"step is recomputed, and {memory.size(self.budget)} may be used here: take a device with more memory"
            )
        return self.fitting

    @cached_property
    def fitting(self) -> int:
        """The most rows that fit into memory, up to ``most_rows``; 0 if not even 32 do.

        Fewer, but a full call, where that keeps all graphs: to recompute costs a forward pass more.
        """
        budget = self.budget
        most = self.footprint.rows(self.most_rows, budget)
        fewer = (r for r in range(most, FULL - 1, -ROWS) if self.footprint.keep(r, budget) is None)
        return most if self.settings.rows is not None else next(fewer, most)

    @property
    def most_rows(self) -> int:
        """Rows as told, else what is taken where memory is plenty: on a GPU what fills it, on a CPU one group's.

        Few images take no more rows than they fill.
        """
        if self.settings.rows is not None:
            return self.settings.rows
        eot, device = getattr(self.attack, "eot", 1), self.device.type
        images = min(self.n, BLOCK) if device == "cpu" else self.n
        return max(min(MOST_ROWS.get(device, 128), images * eot // ROWS * ROWS), ROWS)

    @cached_property
    def keep(self) -> int | None:
        """How many of a purification's last stages keep their graphs; None for all. It changes no number."""
        return self.footprint.keep(self.rows, self.budget)

    @property
    def budget(self) -> int:
        """Bytes that the graphs of a call may take."""
        return memory.budget(self.device, ROWS * self.footprint.least)

    def run(self) -> Path:
        """Attack every example that isn't recorded yet; returns the folder."""
        with defenses.as_it_was(self.defense, self.attacker):
            return self._run()

    def _run(self) -> Path:
        s, began = self.settings, time.monotonic()
        self.folder.check_identity()
        check_past(self)
        if not self.left():
            if not s.quiet:
                of = f"shard {s.shard} has" if s.shard else "there is"
                which = f"all {self.n} images" if self.shard == (0, 1) else f"the images of shard {s.shard}"
                what = f"{which} are recorded in {self.folder.folder}"
                what = what if self.folder.done() else f"{of} no image among the first {self.n}"
                print(f"{what}: nothing to compute", file=sys.stderr)
            if s.name:
                self.folder.rename(s.name)
            if s.preflight and self.folder.pending():
                self.prepare()
                with self.folder.at_work():
                    check_afterwards(self)
            return self.folder.finish(self.n if s.shard is None else None)
        check_shapes(self)
        if (caveat := self.attack.caveat(self.drawing)) and not s.quiet:
            print(f"note: {caveat}", file=sys.stderr)
        self.prepare()
        with ExitStack() as work:
            while True:
                try:
                    rows = self.rows  # before the folder is made: what doesn't fit leaves none
                    work.close()
                    work.enter_context(self.folder.at_work())
                    self.folder.open(self.n, self.data.shape, rows=rows, mixed_environment=s.mixed_environment)
                    check_defense(self)
                    Engine(self).run(began)
                    self._note_blank()
                    check_afterwards(self)
                    return self.folder.finish()
                except NotApplicable as error:
                    self.folder.discard()
                    raise NotApplicableError(f"{self}: not applicable: {error}") from error
                except torch.cuda.OutOfMemoryError:
                    pass  # the error holds on to the failed call's tensors: it must be gone before they are given back
                self.halve()

    def _note_blank(self) -> None:
        """Say it where many gradients led nowhere: the attack was weaker than its name."""
        led = evidence.led({"records": list(self.folder.done().values())})
        if led is not None and led < 0.9 and not self.settings.quiet:
            print(
                f"note: {1 - led:.0%} of the gradients led nowhere, being not finite, or zero where the defense was "
                "still right: the attack is weaker than its name; attack with another loss (pgd:loss=margin), with "
                "square, or through another --view, too",
                file=sys.stderr,
            )

    def left(self) -> list[int]:
        """The positions of the images that this process has yet to do."""
        done, (number, of) = self.folder.done(), self.shard
        mine = (p for p in range(self.n) if p // BLOCK % of == number)
        return [p for p in mine if int(self.data.ids[p]) not in done]

    def searched(self) -> int:
        """How many images that takes: a package's attack searches whole groups."""
        if not self.package:
            return len(self.left())
        groups = {p // BLOCK for p in self.left()}
        return sum(min(BLOCK, len(self.data) - g * BLOCK) for g in groups)

    def prepare(self) -> None:
        """Make the machine ready: arithmetic that repeats, an allocator that keeps what it has, networks compiled."""
        make_repeatable(self.device)
        memory.keep_freed()
        for defense in {self.defense, self.attacker}:
            if self.settings.compile:
                for network in _networks(defense):
                    if network._compiled_call_impl is None:
                        network.compile(dynamic=False)

    def halve(self) -> None:
        """Halve the rows after memory ran out; searches under way begin again, for bytes may depend on rows.

        Raises:
            RunError: at 32 rows, or before any number of rows was chosen.
        """
        rows = self.__dict__.get("rows")  # a cached property: not asked for, which would choose it
        if rows is None:
            raise RunError(f"{self}: memory ran out at one image: take a device with more of it")
        if rows <= ROWS:
            raise RunError(f"{self}: memory ran out at 32 rows: take a device with more of it")
        self.rows = max(rows // 2 // ROWS * ROWS, ROWS)  # type: ignore[misc]
        self.__dict__.pop("keep", None)
        print(f"note: memory ran out at {rows} rows; going on with {self.rows}", file=sys.stderr)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.folder.halved(self.rows)


def _named(component: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an attack that its identity names."""
    usual, later = constructors.options(component), getattr(component, "later", ())
    quiet = [name for name in later if name in options and options[name] == usual[name].default]
    return {name: value for name, value in options.items() if name not in quiet}


LAID_OUT: WeakKeyDictionary[Defense, dict[tuple, tuple[str, Defense]]] = WeakKeyDictionary()
"""By the caller's defense, copies that are compiled or have channels last, and what they were made of: the caller's own
stays as it is."""


def _check(settings: Settings, device: torch.device) -> None:
    """Whether a run of such settings makes sense, whatever is attacked.

    Raises:
        UsageError: for a norm or precision that isn't one, or not on this device; for rows of no whole groups.
    """
    if settings.norm is not None and settings.norm not in NORMS:
        raise UsageError(unknown("norm", settings.norm, sorted(NORMS)))
    if settings.precision not in PRECISIONS:
        raise UsageError(unknown("precision", settings.precision, list(PRECISIONS)))
    try:
        PRECISIONS[settings.precision]().context(device.type)
    except ValueError as error:
        raise UsageError(f"--precision {settings.precision}: {error}") from error
    if settings.rows is not None and (settings.rows < 1 or settings.rows % ROWS):
        raise UsageError(
            f"--batch-size {settings.rows}: take a multiple of 32; with other counts a row's result depends on its "
            "place"
        )


def _laid_out(defense: Defense, settings: Settings, given: Defense, role: str, told: str) -> Defense:
    """The defense, or, where it is to be changed for speed, one copy of it for all cells of what the caller gave.

    Args:
        role: what the defense is to the one that was given: itself, or an attacker's.
        told: what both are made of now; a copy of what they were is replaced.
    """
    if not (settings.compile or settings.channels_last):
        return defense
    copies, key = LAID_OUT.setdefault(given, {}), (role, settings.compile, settings.channels_last)
    if key not in copies or copies[key][0] != told:
        made = copied(defense)
        if settings.channels_last:
            made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        copies[key] = told, made
    return copies[key][1]


def _networks(defense: Defense) -> list[nn.Module]:
    """What is compiled: the classifier, and the networks of the purifier; its own steps stay as they are."""
    purifier = defense.purifier
    parts = list(purifier.children()) if isinstance(purifier, Purifier) else [purifier]
    return [*parts, defense.classifier]
