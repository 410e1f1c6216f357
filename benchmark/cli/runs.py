"""The commands that attack, or say what that would cost and how far it is."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from benchmark import specs
from benchmark.cli.common import DONE, FAILED, INCOMPLETE, complain
from benchmark.errors import NotApplicableError, RunError, UsageError


def settings_of(arguments: argparse.Namespace) -> Any:
    """How a command line evaluates, apart from what."""
    import torch

    from benchmark.settings import Settings

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads {arguments.threads}: at least one is needed")
        torch.set_num_threads(arguments.threads)
    return Settings(
        budget=arguments.budget, n=arguments.n_examples, norm=arguments.norm,
        attacker=arguments.attacker, draws=arguments.draws, seed=arguments.seed, rows=arguments.batch_size,
        device=arguments.device, out=arguments.out, data_dir=arguments.data_dir,
        weights=arguments.weights, offline=arguments.offline, trust=arguments.trust_checkpoint,
        preflight=not getattr(arguments, "no_preflight", False),
        mixed_environment=getattr(arguments, "mixed_environment", False),
        stop_after=getattr(arguments, "stop_after", None), precision=arguments.precision, compile=arguments.compile,
        channels_last=arguments.channels_last, shard=getattr(arguments, "shard", None),
        name=getattr(arguments, "name", None),
    )  # fmt: skip


def cells_of(arguments: argparse.Namespace, settings: Any = None) -> Iterator[Any]:
    """The cells of a command line."""
    from benchmark.cells import grid

    views = [view for item in specs.expand(arguments.view) for view in specs.split(item)]
    return grid(
        arguments.purifier, arguments.classifier, arguments.attack, arguments.dataset,
        [eps for text in arguments.eps for eps in text.split(",")] if arguments.eps else [None],
        settings or settings_of(arguments), arguments.copies, arguments.combine, _seeds(arguments), views,
    )  # fmt: skip


def _seeds(arguments: argparse.Namespace) -> list[int]:
    """The seeds of a command line, each once."""
    if arguments.seeds is None:
        return [arguments.seed]
    if arguments.seed:
        raise UsageError(f"--seed {arguments.seed} and --seeds {arguments.seeds}: give one of them")
    try:
        return list(dict.fromkeys(int(word) for word in arguments.seeds.split(",")))
    except ValueError:
        raise UsageError(f"--seeds {arguments.seeds}: expected whole numbers with commas, e.g. 0,1,2") from None


def _interrupt(*_: Any) -> None:
    """A request to end is treated as Ctrl-C is."""
    raise KeyboardInterrupt


def run(arguments: argparse.Namespace) -> int:
    from benchmark import evidence, report, writers
    from benchmark.cell import Incomplete
    from benchmark.fetch import NetworkForbidden
    from benchmark.grades import EVERYTHING, grades, untried

    signal.signal(signal.SIGTERM, _interrupt)
    settings, began = settings_of(arguments), time.monotonic()
    print("timing a batch of each defense", file=sys.stderr, flush=True)
    # a slip in the last spec shows now, not after the hours that the first cells take; so does what they will take
    prices = {cell.identity.hash8: _price(cell) for cell in cells_of(arguments, settings)}
    _agree(sum(p.hours or 0 for p in prices.values() if p), arguments, settings.device)
    runs, unfit, failed = {}, [], False
    for cell in cells_of(arguments, settings):
        if arguments.stop_after is not None:
            cell.settings.stop_after = arguments.stop_after - (time.monotonic() - began)
        print(f"{cell}\n{cell.plan}", file=sys.stderr, flush=True)
        if cost := prices.get(cell.identity.hash8):
            print(cost, file=sys.stderr, flush=True)
        try:
            if (found := cell.recorded(cell.run())) is not None:
                runs[found["folder"]] = found
        except (NotApplicableError, RunError) as error:  # the other cells have their numbers
            unfit.append(str(error))
            failed |= isinstance(error, RunError)
            print(f"benchmark: {error}", file=sys.stderr)
        except Incomplete:
            return complain(f"stopped after {arguments.stop_after:g} s; the same command continues", INCOMPLETE)
        except (UsageError, NetworkForbidden):
            raise
        except Exception as error:  # a component's own: what it said, and the other cells have their numbers
            traceback.print_exc()
            unfit.append(f"{cell}: {type(error).__name__}: {error}")
            failed = True
    if not runs and unfit:
        raise (RunError if failed else UsageError)(
            "nothing was measured: each defense and attack failed or doesn't apply, for the reasons above"
        )
    if whole := [run for run in runs.values() if run["complete"] or not arguments.shard]:
        beside = _beside(arguments.out)
        print(writers.render(report.table(whole, worst_case=True, beside=beside), "md"), end="")
        chosen = evidence.headline(whole)
        if EVERYTHING not in arguments.attack and any(untried(grade) for grade in grades(chosen, [*beside, *whole])):
            print(
                f"not all that could contradict these numbers was tried: --attack {EVERYTHING} does, and audit --only "
                f"grades {arguments.out} says what that is",
                file=sys.stderr,
            )
    if len(whole) < len(runs):
        print(
            f"{len(runs) - len(whole)} of {len(runs)} runs still need images from other shards, and are not in the "
            f"table: status {arguments.out} says how far they are",
            file=sys.stderr,
        )
    print("".join(f"not in the table: {line}\n" for line in unfit) + f"records: {arguments.out}", file=sys.stderr)
    return FAILED if failed else DONE


def _beside(out: str) -> list[dict[str, Any]]:
    """What was recorded before in a folder, which speaks in the grades of what is recorded there now."""
    from benchmark.results import find_runs

    try:
        return find_runs([out])
    except UsageError as error:
        print(f"note: {error}; grades are of this command's runs alone", file=sys.stderr)
        return []


def _price(cell: Any) -> Any:
    """What a cell costs; None where nothing is left of it, or where it can't run, which shows when its turn comes."""
    from benchmark.price import price

    try:
        return price(cell)
    except Exception:  # whatever a component of the user's raises
        return None


def _agree(hours: float, arguments: argparse.Namespace, device: str) -> None:
    """Refuse to begin what takes longer than was agreed to."""
    from benchmark.price import duration

    most = arguments.max_hours
    if most is not None and not most >= 0:
        raise UsageError(f"--max-hours {most:g}: expected hours, 0 or more")
    if most is None:
        most = 8.0 if device == "cpu" else float("inf")
    if not hours <= most and not arguments.yes:
        raise UsageError(
            f"this takes about {duration(hours)} here, and --max-hours is {most:g}: nothing was run. --yes runs it "
            "anyway (it can be stopped and continued); plan shows each cell; fewer --n-examples, a smaller --budget, "
            "--shard on several machines or a GPU make it shorter"
        )


def plan(arguments: argparse.Namespace) -> int:
    from benchmark.price import duration, price, total

    if arguments.devices < 1:
        raise UsageError(f"--devices {arguments.devices}: at least one is needed")
    fields = ("n", "nfe", "forwards", "backwards", "passes", "upper_bound")
    cells, prices = [], []
    for cell in cells_of(arguments):
        try:
            prices.append(price(cell))
        except NotApplicableError as error:
            cells.append({"cell": str(cell), "not_applicable": str(error)})
            print(f"{error}", file=sys.stderr if arguments.json else sys.stdout)
            continue
        cells.append({"cell": str(cell)} | {f: getattr(cell.plan, f) for f in fields} | prices[-1]._asdict())
        if not arguments.json:
            print(f"{cell}\n{cell.plan}\n{prices[-1]}", flush=True)
    whole = total(prices, arguments.devices)
    if arguments.json:
        print(json.dumps({"cells": cells} | whole, indent=2))
    else:
        large = sum(one.hours is None for one in prices)
        if large < len(prices):
            print(
                f"in all about {duration(whole['hours'])} on this device, {duration(whole['hours_on_devices'])} on "
                f"{arguments.devices} such; draws at x that cells of a defense share are counted in each"
                + f"; without the {large} that don't fit"
                * bool(large)
            )
    return DONE


def status(arguments: argparse.Namespace) -> int:
    from benchmark import report
    from benchmark.results import find_runs

    for run in find_runs(arguments.paths):
        state, accuracy = "complete" if run["complete"] else "incomplete", ""
        if run["records"]:
            one = report.row(run, run["records"])
            low, high = 100 * one["robust_low"], 100 * one["robust_high"]
            accuracy = f"robust {one['robust']:.1%} [{low:.1f}, {high:.1f}], "
        identity, names = run["identity"], run["names"]
        print(
            f"{state} {len(run['records'])}/{run['n']} {accuracy}{names['purifier']} + {names['classifier']} under "
            f"{names['display']}, {identity['norm']} {identity['eps']}, seed {identity['seed']}, {run['folder']}"
        )
    return DONE
