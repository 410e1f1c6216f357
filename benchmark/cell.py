"""One cell of a table: a defense attacked on a data set, and what happened recorded. The loop behind every number."""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attacks import NORMS, Attack, AttackError, NotApplicable, ThreatModel, Victim
from attacks._gradient import blocks
from attacks._views import affordable
from benchmark import checkpoints, config, data, defenses, registry, report
from benchmark.errors import NotApplicableError, RunError, UsageError
from benchmark.plan import Plan, plan
from benchmark.preflight import accuracy_check, failures, preflight
from benchmark.results import Run, environment, read_run
from benchmark.views import View
from purifiers import Defense, Purifier, Tape

BLOCK = 32
"""Images that are attacked together, and the unit in which a third-party attack runs and resumes."""
SAVE_EVERY = 120.0
"""Seconds between saves of an attack under way."""
KNOWN = 64
"""Images on which a classifier is held against its stated accuracy."""
GRAPH_BUDGET = 3 << 30
"""Bytes for stored graphs on a CPU; half of the free memory on a GPU."""


AT_X: WeakKeyDictionary[Defense, dict[tuple, Tensor]] = WeakKeyDictionary()
"""Logits at the unperturbed images, by defense."""


class Incomplete(Exception):
    """Stopped on request before the end; the same command continues (exit code 75)."""


class Result(NamedTuple):
    """What a run gave: the rows of ``report --format json``, the records, and the folder they are in."""

    rows: list[dict[str, Any]]
    records: list[dict[str, Any]]
    folder: Path


@dataclass
class Settings:
    """How to evaluate, apart from what: see ``python -m benchmark run --help`` for each."""

    budget: str = "auto"
    n: int | None = None
    """Images; the budget's default if None."""
    norm: str | None = None
    """Of the threat model; the attack's first if None: Linf, but for stadv."""
    eps: str | float | Fraction | None = None
    view: str = "auto"
    attacker: str | None = None
    draws: int | None = None
    seed: int = 0
    rows: int | None = None
    device: str = "cpu"
    out: str | Path = "results/run"
    data_dir: str | None = None
    weights: str | None = None
    offline: bool = False
    trust: bool = False
    """Load checkpoints that execute code."""
    preflight: bool = True
    mixed_environment: bool = False
    stop_after: float | None = None
    quiet: bool = False

    @property
    def images(self) -> int:
        """How many images are evaluated."""
        n = config.budget(self.budget, torch.device(self.device).type).n if self.n is None else self.n
        if n < 1:
            raise UsageError(f"--n-examples {n}: at least one image is needed")
        return n

    def examples(self, source: str | tuple[Tensor, Tensor] | data.Dataset) -> data.Dataset:
        """At least as many examples, by name or from tensors; an error if there are fewer."""
        if isinstance(source, str):
            source = data.load(source, max(self.images, KNOWN), data_dir=self.data_dir, offline=self.offline)
        elif not isinstance(source, data.Dataset):
            source = _from_tensors(*source)
        source.first(self.images)
        return source


class Cell:
    """One cell of a table, ready to run: components, identity, plan and folder."""

    def __init__(self, defense: Defense, source: str | tuple[Tensor, Tensor] | data.Dataset, attack: str,
                 settings: Settings):  # fmt: skip
        self.settings = s = settings
        self.device = torch.device(s.device)
        chosen = config.budget(s.budget, self.device.type)
        if s.norm is not None and s.norm not in NORMS:
            raise UsageError(registry.unknown("norm", s.norm, sorted(NORMS)))
        self.view = View(s.view)
        self.n, self.data = s.images, s.examples(source)
        described = defenses.describe(defense)
        defense = self.defense = defenses.tamed(defense, self.data.images(slice(0, 8))).to(self.device)
        self.stochastic = defense.stochastic
        spec = registry.parse(attack)
        component = registry.load("attacks", spec.name, spec.argument)
        spec = registry.Spec(spec.name, getattr(component, "name", None) or spec.argument, spec.options)
        self.select = chosen.select if self.stochastic else 1
        self.draws = (chosen.draws if s.draws is None else s.draws) if self.stochastic else 1
        if self.draws < 1:
            raise UsageError(f"--draws {self.draws}: at least one draw is needed")
        norm = component.norms[0] if s.norm is None else s.norm  # type: ignore[attr-defined]
        if norm not in component.norms:  # type: ignore[attr-defined]
            raise UsageError(f"{attack} searches under {' or '.join(component.norms)}, not under {norm}")  # type: ignore
        eps = config.radius(s.eps, norm, self.data.family)
        try:
            self.threat: ThreatModel = NORMS[norm](eps)
        except ValueError as error:
            raise UsageError(f"{attack}: {error}") from error
        # an attack that transfers names its attacker itself
        named = registry.resolve(component, spec).get("source")
        other = named or s.attacker
        self.attacker, g = defense, None
        if other:
            roots = (Path(s.weights),) if s.weights else ()
            need = checkpoints.Need(self.data.form, norm, roots, s.offline, s.trust)
            g = checkpoints.build("purifiers", other, need)
            self.attacker = Defense(
                g.module, defense.classifier, copies=defense.copies, combine=defense.combine
            ).to(self.device)  # fmt: skip
        self.drawing = defense.stochastic or self.attacker.stochastic  # whether draws differ in the attack's loop
        # who knows the draws that judge averages over all of them
        eot = self.draws if self.view.foreknown else None
        options, untouched = config.attack_options(spec, component, chosen, self.drawing, eot)
        try:
            self.attack: Attack = component(**options)
        except ValueError as error:
            raise UsageError(f"{spec.name}: {error}") from error
        if useless := sorted(set(spec.options) & set(self.attack.ignored(self.drawing))):
            raise UsageError(
                f"{attack}: {', '.join(useless)} would have no effect: {self.attack.display(self.drawing)}"
            )
        if self.attack.gradients(self.drawing):
            self.view = self.view.fitting(self.attacker.purifier)
        self.package = self.attack.package(self.drawing)
        if self.view.foreknown and self.package:
            raise UsageError(f"--view {s.view}: {attack} draws its own noise and can't be told the verdict's")
        custom = not untouched or (s.draws is not None and s.draws != chosen.draws)
        # whether the loop sees the defense itself, so that a rule may speak of what it saw
        self.watched = self.attacker is defense and self.view.spec.name != "blind" and not self.package
        self.distinct = 0
        if self.stochastic and self.watched:
            self.distinct = eot if self.view.foreknown and eot else self.attack.distinct(True)
        self.identity = config.Identity(
            dataset=self.data.name,
            fingerprint=self.data.fingerprint,
            purifier=described["purifier"],
            classifier=described["classifier"],
            weights=described["weights"]
            | {f"attack.{k}": v for k, v in registry.source(spec).items()}
            | ({f"attack{'.source' if named else 'er'}.{k}": v for k, v in g.weights.items()} if g else {})
            | ({"attack.source": str(g.spec)} if g and named else {}),
            copies=defense.copies,
            combine=defense.combine,
            attack=str(registry.Spec(spec.name, spec.argument, options)),
            norm=norm,
            eps=config.eps_text(eps),
            view=str(self.view),
            attacker=str(g.spec) if g and not named else None,
            budget="custom" if custom else chosen.name,
            select=self.select,
            draws=self.draws,
            seed=s.seed,
            precision="float32",
        )
        eot = options.get("eot", 1)
        self.rows = min(128 if self.device.type == "cpu" else 2048, BLOCK * eot) if s.rows is None else s.rows
        if self.rows < 1 or self.rows % 32:
            raise UsageError(f"--batch-size {self.rows}: row counts are multiples of 32, so that no row sees its place")
        self.plan: Plan = plan(
            self.attack, stochastic=self.drawing, nfe=defense.nfe, n=self.n, select=self.select, draws=self.draws,
            null=max(self.distinct, self.attack.looks(self.drawing) if self.stochastic else 0),
        )  # fmt: skip
        display = self.attack.display(self.drawing)
        hidden = {k: options[k] for k in spec.options if k not in self.attack.shown}
        if hidden:
            display += f" [{', '.join(f'{k}={registry.show(v)}' for k, v in hidden.items())}]"
        if self.package:
            display = display.replace(self.package, f"{self.package} {version(self.package)}")
        if self.view.foreknown:
            display += " [knows the verdict's draws]"
        names = described["names"] | {"attack": attack, "display": display}
        self.folder = Run(
            Path(s.out), self.identity, names,
            {"environment": environment(s.device, self.rows), "stochastic": self.stochastic, "nfe": defense.nfe,
             "parameters": sum(p.numel() for p in defense.purifier.parameters()),
             "preflight": s.preflight, "noise": self._noise(),
             "watched": self.watched},
        )  # fmt: skip

    def _noise(self) -> str:
        """How far the noise is decided by seed and image: keyed, by a package's calls, or by the place in a batch."""
        if defenses.is_foreign(self.defense):
            return "global"
        return "stream" if self.package and self.drawing else "keyed"

    def __str__(self) -> str:
        i, names = self.identity, self.folder.settings["names"]
        return (
            f"{names['purifier']} + {names['classifier']} under {names['display']}, {i.norm} {i.eps}, view {i.view}, "
            f"{i.dataset} n={self.n}, seed {i.seed}"
        )

    def result(self) -> Result:
        """Run, and read what is on disk."""
        finished = read_run(self.run())
        return Result(report.rows([finished]), finished["records"], finished["folder"])

    def run(self) -> Path:
        """Attack every example that isn't recorded yet; returns the folder."""
        s, began = self.settings, time.monotonic()
        self.folder.check_identity()
        done = self.folder.done()
        starts = [
            first
            for first in range(0, self.n, BLOCK)
            if any(int(i) not in done for i in self.data.ids[first : min(first + BLOCK, self.n)])
        ]
        if not starts:
            if not s.quiet:
                print(f"all {self.n} images are recorded in {self.folder.folder}: nothing to compute", file=sys.stderr)
            return self.folder.finish()
        self.check_classes()
        if (caveat := self.attack.caveat(self.drawing)) and not s.quiet:
            print(f"note: {caveat}", file=sys.stderr)
        self.folder.open(self.n, self.data.shape, mixed_environment=s.mixed_environment)
        self._preflight()
        length = self.attack.length(self.drawing)
        with tqdm(
            total=len(starts) * length, unit="it", disable=s.quiet, mininterval=0.5 if sys.stderr.isatty() else 20,
            desc=f"{self.folder.settings['names']['display']}",
        ) as bar:  # fmt: skip
            for first in starts:
                try:
                    self._block(first, done, bar, began)
                except NotApplicable as error:
                    self.folder.discard()
                    raise NotApplicableError(f"{self}: not applicable: {error}") from error
                shown = [r for r in self.folder.done().values()]
                robust = np.mean([np.mean(np.array(r["adv"]) == r["label"]) for r in shown])
                bar.set_postfix_str(f"robust {robust:.1%} of {len(shown)}")
        return self.folder.finish()

    def check_classes(self) -> None:
        """Whether the classifier's outputs fit the images, the labels and the attack's losses."""
        x = self.data.images(slice(0, 1)).to(self.device)
        try:
            with torch.no_grad():
                classes = self.defense.classifier(x).shape[1]
        except RuntimeError as error:  # torch's own, of shapes that don't fit
            raise UsageError(
                f"{self}: the classifier takes no images of shape {tuple(x.shape[1:])}: {error}"
            ) from error
        form, least = self.data.form, self.attack.least_classes(self.drawing)
        if form.family in data.FORMS and classes != form.classes:
            raise UsageError(f"{self}: {form.family} has {form.classes} classes, the classifier has {classes} outputs")
        highest = int(self.data.labels[: self.n].max())
        if highest >= classes:
            raise UsageError(f"{self}: labels go up to {highest}, the classifier has {classes} outputs")
        if classes < least:
            raise UsageError(
                f"{self}: the attack's losses need at least {least} classes, the classifier has {classes}; "
                "aim at fewer targets, or use pgd, whose cross-entropy needs two"
            )

    def _preflight(self) -> None:
        if not self.settings.preflight:
            return
        few = slice(0, min(8, len(self.data)))
        try:
            checks = preflight(
                self.defense, self.view(keep=1) if self.attack.gradients(self.drawing) else None,
                self.data.images(few).to(self.device), self.data.labels[few].to(self.device), self.data.ids[few],
                seed=self.settings.seed, rows=32, attacker=self.attacker,
            )  # fmt: skip
        except NotApplicable as error:
            self.folder.discard()
            raise NotApplicableError(f"{self}: not applicable: {error}") from error
        if (expected := getattr(self.defense, "accuracy", None)) is not None:
            few = slice(0, min(KNOWN, len(self.data)))
            x, y = self.data.images(few).to(self.device), self.data.labels[few].to(self.device)
            checks.append(accuracy_check(self.defense.classifier, x, y, expected, rows=32))
        if failed := failures(checks):
            self.folder.discard()
            lines = "\n".join(f"  {c.id}: {c.value} (expected {c.threshold}): {c.advice}" for c in failed)
            raise RunError(
                f"preflight failed, nothing was run (--no-preflight runs anyway, and the table says so):\n{lines}"
            )

    def _block(self, first: int, done: dict[int, dict], bar: tqdm, began: float) -> None:
        """Attack and judge the images from position ``first`` on, and record those that weren't."""
        s, started = self.settings, time.monotonic()
        # a package's search depends on its whole block: so that raising n extends the run, a block is never cut short
        last = min(first + BLOCK, len(self.data) if self.package else self.n)
        x = self.data.images(slice(first, last)).to(self.device)
        y = self.data.labels[first:last].to(self.device)
        ids = self.data.ids[first:last]
        tape = Tape(s.seed, "verdict" if self.view.foreknown else "attack", ids)
        view = self.view(keep=self._keep(x, tape))
        victim = Victim(
            self.attacker, view, tape, rows=self.rows, stochastic=self.drawing, foreknown=self.view.foreknown
        )
        saved = time.monotonic()
        state = self.folder.load_state(first)
        if state is not None and len(state["broken_at"]) != len(ids):
            state = None  # stopped at another n: the block holds other images
        if state is not None:
            bar.update(int(state["done"]))

        def watch(k: int, state: dict[str, Tensor]) -> None:
            nonlocal saved
            bar.update(1)
            over = s.stop_after is not None and time.monotonic() - began > s.stop_after
            if over or time.monotonic() - saved > SAVE_EVERY:
                self.folder.save_state(first, state)
                saved = time.monotonic()
            if over:
                raise Incomplete

        try:
            found = self.attack.perturb(x, y, victim, self.threat, state=state, watch=watch)
        except AttackError as error:
            raise RunError(f"{self}: {error}") from error
        version, select = self._chosen(found.candidates, y, ids)
        x_adv, distance = (
            of[version, torch.arange(len(y), device=y.device)] for of in (found.candidates, found.distances)
        )
        logits = {
            "select": select,
            "clean": self._at_x(x, ids, "clean", self.draws),
            "adv": self._draws(x_adv, ids, "verdict", self.draws),
            "random": self._draws(x, ids, "random", self.draws, control=True),
        }
        null = self._null(x, y, ids)
        predicted = {k: _classes(v) for k, v in logits.items()}
        package_null, flips = self._package_null(x, y, ids), self._flips(x_adv, x, ids)
        extra = 3 * self.draws + (len(found.candidates) + 1) * self.select
        records = [
            {
                "id": int(ids[i]),
                "label": int(y[i]),
                **{k: predicted[k][i].tolist() for k in ("clean", "adv", "select", "random")},
                "distance": float(distance[i]),
                "broken_at": int(found.broken_at[i]),
                "null_wrong": int(null[i]),
                "fallback": bool(distance[i] == 0),
                "package_verdict": None if found.package_correct is None else bool(found.package_correct[i]),
                "package_null": None if package_null is None else bool(package_null[i]),
                "code_flips": None if flips is None else float(flips[i]),
                "forwards": found.forwards + extra + self.distinct,
                "backwards": found.backwards,
            }
            for i in range(len(ids))
        ]
        new = [i for i in range(min(last, self.n) - first) if int(ids[i]) not in done]
        self.folder.write(
            [first + i for i in new], [records[i] for i in new], x_adv.cpu().numpy()[new],
            {k: v.cpu().numpy()[new] for k, v in logits.items()},
        )  # fmt: skip
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        self.folder.note_time(
            {"first": first, "images": len(new), "seconds": time.monotonic() - started, "peak_bytes": peak}
        )

    def _keep(self, x: Tensor, tape: Tape) -> int | None:
        """How many stages' graphs fit into memory, found out once."""
        if not hasattr(self, "_kept"):
            budget = torch.cuda.mem_get_info()[0] // 2 if self.device.type == "cuda" else GRAPH_BUDGET
            self._kept = affordable(self.attacker.purifier, x[:1], tape[:1], self.rows, budget)
        return self._kept

    def _chosen(self, candidates: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Per image the number of the candidate with the fewest correct ``select`` draws, and logits of further draws.

        The draws that chose would flatter the chosen; attacks are compared by draws that chose nothing yet. An attacker
        who knows the draws that judge chooses by those.
        """
        if self.view.foreknown:
            logits = [self._draws(c, ids, "verdict", self.draws) for c in candidates]
        else:
            logits = [self._draws(c, ids, "select", self.select, "candidate", v) for v, c in enumerate(candidates)]
        correct = (_classes(torch.stack(logits)) == y[:, None]).sum(-1)
        version = correct.argmin(0)
        return version, self._draws(
            candidates[version, torch.arange(len(y), device=y.device)], ids, "select", self.select
        )

    def judged(self, candidates: Tensor, y: Tensor, ids: Tensor, draws: int) -> np.ndarray:
        """The share of correct ``select`` draws per image, of the candidate that other draws found the strongest."""
        version, _ = self._chosen(candidates, y, ids)
        chosen = candidates[version, torch.arange(len(y), device=y.device)]
        return (
            (_classes(self._draws(chosen, ids, "select", draws, "judge")) == y[:, None]).double().mean(1).cpu().numpy()
        )

    def _draws(self, x: Tensor, ids: Tensor, role: str, count: int, *site: str | int, control: bool = False) -> Tensor:
        """Logits of ``count`` keyed draws per image, shape (B, count, K), if asked each under a random perturbation."""
        tape = Tape(self.settings.seed, role, ids).fold(*site)
        parts = []
        with torch.no_grad():
            for inputs, noise, real in blocks(self.rows, (x,), tape, count):
                inputs = self.threat.control(inputs, noise) if control else inputs
                parts.append(self.defense(inputs, noise)[:real])
        return torch.cat(parts).unflatten(0, (-1, count))

    def _at_x(self, x: Tensor, ids: Tensor, role: str, count: int) -> Tensor:
        """``_draws`` at x itself: keyed noise makes them the same in every cell of a defense, so they are kept."""
        kept = AT_X.setdefault(self.defense, {})
        key = (self.identity.fingerprint, self.settings.seed, self.rows, role, tuple(ids.tolist()))
        if key not in kept or kept[key].shape[1] < count:
            kept[key] = self._draws(x, ids, role, count)
        return kept[key][:, :count]

    def _null(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Of as many different draws as the attack sees in its loop, how many are wrong at x itself."""
        if self.distinct == 0:
            return torch.zeros(len(x), dtype=torch.long)
        predicted = _classes(self._at_x(x, ids, "null", self.distinct))
        return (predicted != y[:, None]).sum(1)

    def _flips(self, x_adv: Tensor, x: Tensor, ids: Tensor) -> Tensor | None:
        """The share of an image's discrete codes that the attack changed, under one verdict draw."""
        purifier = self.defense.purifier
        if not isinstance(purifier, Purifier) or type(purifier).codes is Purifier.codes:
            return None  # no codebook
        noise = Tape(self.settings.seed, "verdict", ids).fold("round", 0)
        with torch.no_grad():
            before, after = (purifier.codes(purifier.start(z, noise)[0]) for z in (x, x_adv))
        return None if before is None or after is None else before.ne(after).flatten(1).double().mean(1)

    def _package_null(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor | None:
        """The package's own verdict, were x never moved: its rule, single draws all right, played on ``null`` draws."""
        looks = self.attack.looks(self.drawing)
        if not (self.stochastic and looks):
            return None
        return (_classes(self._at_x(x, ids, "null", looks)) == y[:, None]).all(1)


def _from_tensors(images: Tensor, labels: Tensor) -> data.Dataset:
    """The caller's own images and labels."""
    if images.ndim != 4 or len(images) != len(labels) or images.min() < 0 or images.max() > 1:
        raise UsageError("data tensors are (images in [0, 1] of shape (N, C, H, W), labels of shape (N,))")
    digest = hashlib.sha256(images.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()).hexdigest()
    form = data.Form("tensors", tuple(images.shape[1:]), int(labels.max()) + 1)  # type: ignore[arg-type]
    return data.Dataset("tensors", images, labels.long(), torch.arange(len(labels)), digest, form)


def _classes(logits: Tensor) -> Tensor:
    """Predicted classes; -1 where a row isn't finite."""
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)
