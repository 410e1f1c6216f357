"""How near to the floor it runs: purification, exact gradients and whole attacks against their networks alone.

An exact gradient through T steps costs at least T (f + b) with all graphs kept, T (2 f + b) with all recomputed, where
f is a forward pass of the network alone and b its backward pass. Ratios are taken within a repetition, the floors
before and after what is held against them, and their median is stated with the smallest and the largest.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks import PRECISIONS, Batcher, Calls, Victim
from attacks._calls import Request, Search
from attacks._gradient import ce
from attacks._recompute import footprint
from attacks._views import Exact, View
from benchmark import checkpoints, data, evidence, memory, specs, stats
from benchmark.alone import Alone, Network
from benchmark.cell import Cell
from benchmark.checks import Check
from benchmark.environment import environment
from benchmark.errors import UsageError
from benchmark.repeatable import make_repeatable
from benchmark.settings import Settings
from purifiers import Defense, Tape

LENGTHS = (5, 20, 100)
"""Steps of a purification."""
BARS = {"purification": 1.05, "gradient": 1.10, "attack": 1.10, "occupancy": 0.90, "outside": 0.05}
"""What this code asks of itself."""
ATTACKED, ITERATIONS = 72, 5
"""Images and iterations of the attack that is timed: not a multiple of what a call holds."""
RETIRED, RETIRE, LONG = 16, 32, "apgd:steps=40,eot=4"
"""Images that may leave early, how many further draws must all be wrong for it, and an attack long enough to gain."""


class Bench:
    """All measurements of one defense on one device.

    Args:
        purifier: a spec of a purifier with ``steps``.
        classifier: a spec.
        dataset: whose weights and images.
        device: cpu or cuda.
        rows: of the calls that are held against the floors.
        repetitions: of each measurement.
    """

    def __init__(
        self, purifier: str, classifier: str, dataset: str, device: str, rows: int, repetitions: int,
        weights: str | None = None,
    ):  # fmt: skip
        if rows < 1 or repetitions < 1:
            raise UsageError(f"--batch-size and --repetitions are at least 1, got {rows} and {repetitions}")
        self.purifier, self.classifier, self.rows, self.repetitions = purifier, classifier, rows, repetitions
        self.device, self.dataset = torch.device(device), dataset
        spec = specs.parse(purifier)
        if "steps" in spec.options:
            raise UsageError(f"--purifier {purifier}: bench sets steps itself, to {', '.join(map(str, LENGTHS))}")
        roots = (Path(weights),) if weights else ()
        self.need, self.shelf = checkpoints.Need(data.form(dataset), roots=roots), checkpoints.Shelf()
        images = data.load(dataset, max(rows, ATTACKED, 128))
        self.x, self.y = images.images(slice(0, rows)).to(self.device), images.labels[:rows].to(self.device)
        self.images = images
        known = self.shelf.build("purifiers", purifier, self.need).spec.options
        if "steps" not in known:
            raise UsageError(f"--purifier {purifier}: bench needs a purifier with steps, e.g. diffpure or map")
        # of DiffPure's rules Euler-Maruyama's, unless told: what papers attack
        self.long = {"rule": "sde"} if "rule" in known and "rule" not in spec.options else {}
        self.tape = Tape(0, "attack", images.ids[:rows]).to(self.device)
        make_repeatable(self.device)
        memory.keep_freed()

    def run(self, *, compiled: bool = False) -> dict[str, Any]:
        """Everything; with ``compiled`` also compiled networks, which takes minutes."""
        began = time.monotonic()
        lengths = [self._length(steps) for steps in tqdm(LENGTHS, desc="gradients", unit="length")]
        print("attacks, precisions, the network alone", file=sys.stderr, flush=True)
        attack, retire = self._attack(), self._retire()
        found = {
            "environment": environment(str(self.device)) | {"processor": _processor(), "rows": self.rows},
            "defense": {"purifier": self.purifier, "classifier": self.classifier, "dataset": self.dataset},
            "repetitions": self.repetitions,
            "network": self._network(compiled),
            "lengths": lengths,
            "attack": attack,
            "precision": self._precisions(),
            "retire": retire,
            "profile": self._profile(),
        }
        found["checks"] = _checks(found)
        found["seconds"] = time.monotonic() - began
        return found

    def defense(self, **options: Any) -> Defense:
        """The defense with some options of the purifier set."""
        spec = specs.parse(self.purifier)
        text = str(replace(spec, options={**spec.options, **options}))
        g = self.shelf.build("purifiers", text, self.need)
        f = self.shelf.build("classifiers", self.classifier, self.need)
        return Defense(g.module, f.module).to(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long something takes, all kernels included."""
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _length(self, steps: int) -> dict[str, Any]:
        """Purification and its gradient through so many steps, against the network alone."""
        purifier = self.defense(steps=steps, **self.long).purifier
        network = Alone(purifier, self.x, self.tape)
        times = network.calls
        bare = Defense(purifier, nn.Flatten())
        feet = footprint(bare, self.x[:1], self.tape[:1], Exact(), staged=True)
        limit = feet.keep(self.rows, memory.budget(self.device))

        def purify() -> None:
            with torch.no_grad():
                purifier(self.x, self.tape)

        # where not all graphs fit, "kept" is as many as do
        works = {
            "forwards": lambda: network.forward(times),
            "gradients": lambda: network.gradient(times),
            "purification": purify,
            "kept": lambda: _differentiate(Exact(limit), purifier, self.x, self.tape),
            "recomputed": lambda: _differentiate(Exact(0), purifier, self.x, self.tape),
        }
        peaks = {name: self._peak(works[name]) for name in ("purification", "kept", "recomputed")}
        works["kept"]()  # what the peaks gave back to the system is faulted in again before the clock runs
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.repetitions):
            once = {name: self.seconds(work) for name, work in works.items()}
            for name in ("gradients", "forwards"):  # before and after: a machine that slows down slows the floor, too
                once[name] = (once[name] + self.seconds(works[name])) / 2
            for name, value in once.items():
                seconds[name].append(value)
        f, fb = seconds["forwards"], seconds["gradients"]
        floors = {"purification": f, "kept": fb, "recomputed": [a + b for a, b in zip(f, fb, strict=True)]}
        ratios = {
            name: _spread([a / b for a, b in zip(seconds[name], floor, strict=True)]) for name, floor in floors.items()
        }
        return {
            "steps": steps,
            "network_calls": times,
            "seconds": {name: _spread(values) for name, values in seconds.items()},
            **{f"{name}_ratio": ratio for name, ratio in ratios.items()},
            "peak_bytes": peaks,
            "kept_stages_within_budget": limit,
        }

    def _peak(self, work: Callable[[], Any]) -> int | None:
        """The most memory that something takes beyond what was in use; None where it can't be read."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            work()
            return torch.cuda.max_memory_allocated(self.device) - before
        memory.give_back()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark to where memory stands
            before = _status("VmRSS")
            work()
            return _status("VmHWM") - before
        except OSError:
            work()
            return None

    def _attack(self) -> dict[str, Any]:
        """A PGD on images that don't fill whole calls, against one full call that does nothing else."""
        with tempfile.TemporaryDirectory() as folder:
            cell = self._cell(self.defense(), f"pgd:steps={ITERATIONS},eot=4", ATTACKED, folder)
            rows, view = cell.rows, cell.view(keep=cell.keep)
        index = torch.arange(rows) % len(self.images)
        x, y = self.images.images(index).to(self.device), self.images.labels[index].to(self.device)
        tape = Tape(0, "attack", index).to(self.device)
        full = Request(cell.defense, view, x, tape, 1, ce, (y,), gradient=True)
        network, classifier = Alone(cell.defense.purifier, x, tape), Network(cell.defense.classifier, x)
        ratios, shares, rates, occupancies = [], [], [], []
        Calls(rows).ask(full)
        for _ in range(self.repetitions):
            batcher = Batcher(rows)
            call = self.seconds(partial(Calls(rows).ask, full))
            alone = self.seconds(partial(network.gradient, network.calls)) + self.seconds(classifier.gradient)
            attacked = self.seconds(partial(self._search, cell, batcher, view))
            calls = batcher.count.rows / rows
            rates.append(ATTACKED * ITERATIONS / attacked)
            occupancies.append(batcher.count.real / batcher.count.rows)
            ratios.append(attacked * batcher.count.rows / batcher.count.real / (calls * call))
            shares.append(1 - calls * alone / attacked)
        return {
            "spec": cell.names["attack"], "purifier": self.purifier, "images": ATTACKED, "rows": rows,
            "image_iterations_per_second": _spread(rates), "occupancy": _spread(occupancies),
            "full_batch_ratio": _spread(ratios), "outside_network_share": _spread(shares),
        }  # fmt: skip

    def _search(self, cell: Cell, batcher: Batcher, view: View) -> None:
        """The attack alone, without verdicts, in groups of 32 images."""

        def group(first: int) -> Search:
            rows = slice(first, min(first + 32, ATTACKED))
            x, y = self.images.images(rows).to(self.device), self.images.labels[rows].to(self.device)
            tape = Tape(0, "attack", self.images.ids[rows]).to(self.device)
            victim = Victim(cell.defense, view, tape, batcher, stochastic=True)
            return Search(lambda: cell.attack.perturb(x, y, victim, cell.threat), len(x))

        for _ in batcher.run((group(first) for first in range(0, ATTACKED, 32)), 2 * ATTACKED):
            pass

    def _cell(self, defense: Defense, attack: str, n: int, folder: str, **settings: Any) -> Cell:
        chosen = Settings(n=n, device=str(self.device), out=folder, quiet=True, preflight=False, **settings)
        return Cell(defense, self.images, attack, chosen)

    def _precisions(self) -> list[dict[str, Any]]:
        """Gradients of other arithmetics beside that of float32: their directions, and what they cost."""
        defense, found = self.defense(), []
        feet = footprint(defense, self.x[:1], self.tape[:1], Exact(), staged=True)
        keep = feet.keep(2 * self.rows, memory.budget(self.device))  # float64 takes twice as much
        reference: Tensor | None = None
        for name, precision in PRECISIONS.items():
            calls = Calls(self.rows, precision())
            request = Request(defense, Exact(keep), self.x, self.tape, 1, ce, (self.y,), gradient=True)
            try:
                precision().context(self.device.type)
            except ValueError:
                continue  # not this device's
            gradient = calls.ask(request).gradients.flatten(1).double()
            reference = gradient if reference is None else reference
            cosine = torch.nn.functional.cosine_similarity(gradient, reference)
            signs = (gradient.sign() == reference.sign()).double().mean(1)
            ratios = []
            for _ in range(self.repetitions):
                base = self.seconds(partial(Calls(self.rows).ask, request))
                ratios.append(self.seconds(partial(calls.ask, request)) / base)
            found.append(
                {
                    "precision": name, "cosine": float(cosine.mean()), "cosine_low": float(cosine.min()),
                    "sign_agreement": float(signs.mean()), "time_ratio": _spread(ratios),
                }
            )  # fmt: skip
        return found

    def _network(self, compiled: bool) -> dict[str, Any]:
        """The network alone, and in other layouts and thread counts."""
        network = Alone(self.defense().purifier, self.x, self.tape)
        network.gradient()
        variants: dict[str, Callable[[], Any]] = {}
        if self.device.type == "cpu" and torch.get_num_threads() > 1:
            variants["one_thread"] = lambda: _on_threads(1, network.gradient)
        last = network.channels_last()
        variants["channels_last"] = last.gradient
        if compiled:
            fused = network.compiled()
            fused.gradient()
            variants["compiled"] = fused.gradient
        last.gradient()
        ratios: dict[str, list[float]] = {name: [] for name in variants}
        forward, gradient = [], []
        for _ in range(3 * self.repetitions):
            forward.append(self.seconds(network.forward))
            gradient.append(self.seconds(network.gradient))
            for name, work in variants.items():
                ratios[name].append(self.seconds(work) / gradient[-1])
        return {
            "parameters": sum(p.numel() for p in network.module.parameters()),
            "forward_seconds": _spread(forward),
            "gradient_seconds": _spread(gradient),
            **{f"{name}_ratio": _spread(values) for name, values in ratios.items()},
        }

    def _profile(self) -> str:
        """Where the time of one exact gradient goes, operation by operation, as torch's profiler sees it."""
        purifier = self.defense(steps=LENGTHS[1], **self.long).purifier
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with torch.profiler.profile(activities=kinds) as profiler:
            _differentiate(Exact(None), purifier, self.x, self.tape)
            self._wait()
        key = f"self_{self.device.type}_time_total"
        return profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40)

    def _retire(self) -> dict[str, Any]:
        """What leaving lost images early saves, and by how much it reads too high: a weak defense, most are lost."""
        shares, seconds, passes, n = {}, {}, {}, RETIRED
        for retire in (0, RETIRE):
            attack = f"{LONG},retire={retire}"
            with tempfile.TemporaryDirectory() as folder:
                cell = self._cell(self.defense(steps=1), attack, n, folder, eps="0.2", rows=32)
                seconds[retire] = self.seconds(cell.run)
                lines = (cell.folder.folder / "records.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            shares[retire] = evidence.shares(records)
            passes[retire] = sum(r["forwards"] + r["backwards"] for r in records)
        paired = stats.compare(shares[RETIRE], shares[0])
        return {
            "attack": f"{LONG} at eps 0.2 on one step, retire={RETIRE} against 0", "n": n,
            "time_ratio": seconds[RETIRE] / seconds[0], "passes_ratio": passes[RETIRE] / passes[0],
            "robust": float(shares[0].mean()), "robust_retired": float(shares[RETIRE].mean()),
            "difference": paired.difference, "low": paired.low, "high": paired.high,
        }  # fmt: skip


def _differentiate(view: View, purifier: nn.Module, x: Tensor, tape: Tape) -> None:
    x = x.clone().requires_grad_()
    purified = view(purifier, x, tape)
    torch.autograd.grad(purified, x, torch.ones_like(purified))


def _on_threads(count: int, work: Callable[[], Any]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        work()
    finally:
        torch.set_num_threads(before)


def _spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _status(key: str) -> int:
    """Bytes of this process by the kernel's count."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) << 10


def _processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def _checks(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars, by the median; on a machine that others use, too, a missed one says little."""
    checks = []

    def judge(name: str, spread: dict[str, float], bar: str, advice: str = "repeat on an idle machine") -> None:
        value = spread["median"]
        good = value >= BARS[bar] if bar == "occupancy" else value <= BARS[bar]
        check = Check.of(name, good, value, BARS[bar], advice, bad="warn")
        checks.append(check._asdict() | {"low": spread["low"], "high": spread["high"]})

    for length in found["lengths"]:
        judge(f"purification-{length['steps']}", length["purification_ratio"], "purification")
        judge(f"gradient-kept-{length['steps']}", length["kept_ratio"], "gradient")
        judge(f"gradient-recomputed-{length['steps']}", length["recomputed_ratio"], "gradient")
    judge("attack-to-full-batch", found["attack"]["full_batch_ratio"], "attack")
    judge("outside-network", found["attack"]["outside_network_share"], "outside")
    judge("occupancy", found["attack"]["occupancy"], "occupancy", "attack more images at a time")
    return checks


def saved(path: Path) -> dict[str, Any]:
    """What ``bench --out`` or ``--json`` wrote."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no saved measurement ({error})") from error
    if not isinstance(found, dict) or "lengths" not in found:
        raise UsageError(f"{path}: this isn't what bench --json prints")
    return found


def render(found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    e, d, network, attack = found["environment"], found["defense"], found["network"], found["attack"]
    retire = found["retire"]
    ms, share = (lambda s: _text(s, 1e3, ".1f")), (lambda s: _text(s, 100, ".1f"))
    device = e["device_name"] if e["device"].startswith("cuda") else f"{e['processor']}, {e['threads']} threads"
    lines = [
        f"{d['purifier']} + {d['classifier']} on {d['dataset']}; {device}; torch {e['packages']['torch']}; "
        f"{e['rows']} rows, {found['repetitions']} repetitions; median [smallest, largest]; commit {e['commit']}",
        "",
        f"The network alone, {network['parameters']:,} parameters: {ms(network['forward_seconds'])} ms forward, "
        f"{ms(network['gradient_seconds'])} ms with its gradient.",
        "",
        "| steps T | purification s | / T forwards | gradient, graphs kept s | / T (f + b) | gradient, recomputed s | "
        "/ T (2 f + b) | peak MiB: purification | kept | recomputed | stages kept within budget |",
        "|" + "---|" * 11,
    ]
    for r in found["lengths"]:
        s = r["seconds"]
        lines.append(
            f"| {r['steps']} | {_text(s['purification'])} | {_text(r['purification_ratio'])} | {_text(s['kept'])} | "
            f"{_text(r['kept_ratio'])} | {_text(s['recomputed'])} | {_text(r['recomputed_ratio'])} | "
            + " | ".join(
                "–" if r["peak_bytes"][k] is None else f"{r['peak_bytes'][k] / 2**20:,.0f}"
                for k in ("purification", "kept", "recomputed")
            )
            + f" | {'all' if r['kept_stages_within_budget'] is None else r['kept_stages_within_budget']} |"
        )
    variants = {k.removesuffix("_ratio"): v for k, v in network.items() if k.endswith("_ratio")}
    lines += [
        "",
        f"The searches of a whole attack, without verdicts: {attack['spec']} on {attack['purifier']}, "
        f"{attack['images']} images in calls of {attack['rows']} rows: "
        f"{_text(attack['image_iterations_per_second'], 1, '.1f')} images × iterations per second; occupancy "
        f"{share(attack['occupancy'])} %; time per row {_text(attack['full_batch_ratio'])} of a full call's; "
        f"{share(attack['outside_network_share'])} % of the time outside of networks.",
        "",
        "| gradient in | cosine with float32: mean (smallest) | same sign % | time / float32 |",
        "|---|---|---|---|",
        *(
            f"| {p['precision']} | {p['cosine']:.6f} ({p['cosine_low']:.6f}) | {100 * p['sign_agreement']:.2f} | "
            f"{_text(p['time_ratio'])} |"
            for p in found["precision"]
        ),
        "",
        "The network's gradient, time against the above: "
        + "; ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in variants.items())
        + ".",
        "",
        f"Leaving early, {retire['attack']}, n={retire['n']}: {retire['passes_ratio']:.2f} of the passes, "
        f"{retire['time_ratio']:.2f} of the time; robust "
        f"{100 * retire['robust_retired']:.1f} % instead of {100 * retire['robust']:.1f} %, difference "
        f"{100 * retire['difference']:+.1f} [{100 * retire['low']:+.1f}, {100 * retire['high']:+.1f}] points.",
        "",
        "| bar | measured | at most (occupancy: at least) | |",
        "|---|---|---|---|",
        *(f"| {c['id']} | {c['value']:.3f} | {c['threshold']} | {_verdict(c)} |" for c in found["checks"]),
    ]
    return "\n".join(lines) + "\n"


def _verdict(check: dict[str, Any]) -> str:
    """Whether the median meets its bar, and whether the bar lies within the spread."""
    word = "met" if check["status"] == "pass" else "missed"
    return word + (", within the spread" if check["low"] <= check["threshold"] <= check["high"] else "")


def _text(spread: dict[str, float], scale: float = 1, form: str = ".3f") -> str:
    median, low, high = (format(scale * spread[k], form) for k in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"
