"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmark.errors import NotApplicableError, RunError, UsageError

KINDS = ("purifiers", "attacks", "classifiers", "datasets", "budgets")
DONE, FAILED, USAGE, INCOMPLETE = 0, 1, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 a run failed, 2 bad usage, 75 incomplete."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    from benchmark.fetch import NetworkForbidden, network

    try:
        with network(allowed=not getattr(arguments, "offline", False)):
            return arguments.command(arguments) or DONE
    except UsageError as error:
        return _complain(error, USAGE)
    except RunError as error:
        return _complain(error, FAILED)
    except NetworkForbidden as error:
        return _complain(f"{error}; run without --offline once, or bring the file by hand (fetch --list)", USAGE)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command continues", INCOMPLETE)
    except BrokenPipeError:
        return DONE


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    top = argparse.ArgumentParser(
        prog="python -m benchmark",
        description="Clean and robust accuracy of adversarial purification, under attacks on the whole defense.",
        epilog="Example: python -m benchmark run --purifier diffpure --attack autoattack",
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "attack defenses and print their table")
    _what(run)
    run.add_argument("--stop-after", type=float, metavar="SECONDS", help="stop, save and exit with 75 after so long")
    run.add_argument("--no-preflight", action="store_true", help="skip the checks of the defense; the table says so")
    run.add_argument("--mixed-environment", action="store_true", help="continue a run begun in another environment")

    plan = _command(commands, "plan", _plan, "print what a run would cost, and run nothing")
    _what(plan)
    plan.add_argument("--json", action="store_true", help="one object per cell, as a list")

    status = _command(commands, "status", _status, "how far the runs below some folders are")
    status.add_argument("paths", nargs="*", default=["results/run"], metavar="FOLDER")

    report = _command(commands, "report", _report, "tables from recorded runs")
    report.add_argument("paths", nargs="*", default=["results"], metavar="FOLDER", help="folders with runs (results)")
    report.add_argument("--format", choices=("md", "csv", "latex", "json", "html"), default="md")
    report.add_argument(
        "--rule", default="mean", help="what an accuracy is: mean, majority, worst, any or mean-logits (mean)"
    )
    report.add_argument(
        "--bibtex", action="store_true", help="print the references of the components used, and no table"
    )
    report.add_argument(
        "--with-published", nargs="?", const="results/published.csv", metavar="CSV",
        help="add numbers from papers, set apart (results/published.csv); Markdown only",
    )  # fmt: skip
    report.add_argument("--columns", metavar="NAMES", help="only these, e.g. purifier,attack,robust; not in latex")
    report.add_argument("--out", metavar="FOLDER", help="html is written to FOLDER/index.html; figures go here")
    report.add_argument("--figures", action="store_true", help="draw figures into --out (figures): PDF, PNG and CSV")
    report.add_argument(
        "--gallery", nargs="?", const="gallery.png", metavar="FILE",
        help="draw images of the runs, attacked and purified (gallery.png and .pdf), and print no table",
    )  # fmt: skip
    report.add_argument("--images", type=int, default=2, metavar="N", help="images of a gallery (2)")
    report.add_argument(
        "--match", metavar="SHARES", help="per purifier the setting of closest clean accuracy, e.g. 0.85,0.80"
    )
    report.add_argument("--weights", metavar="FOLDER", help="a folder with further cards, for galleries")
    report.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie, for galleries")
    report.add_argument("--sort", metavar="COLUMN", help="order rows by a column; descending as --sort=-COLUMN")
    report.add_argument(
        "--worst-case", action=argparse.BooleanOptionalAction, help="the row over attacks (default: in md and latex)"
    )

    report.add_argument("--compact", action="store_true", help="Markdown, a line per defense and radius")

    compare = _command(commands, "compare", _compare, "paired differences of runs on the same images")
    compare.add_argument("reference", metavar="RUN", help="folder of the run that the others are compared with")
    compare.add_argument("others", nargs="+", metavar="OTHER", help="folders of runs; differences are OTHER - RUN")
    compare.add_argument("--json", action="store_true", help="one object per other run, as a list")

    audit = _command(commands, "audit", _audit, "gradients held against each other, attacks against looking only")
    audit.add_argument("paths", nargs="*", metavar="PATH", help="folders with runs, for black-box; or a saved --json")
    audit.add_argument("--only", choices=("gradients", "black-box"), help="gradients without folders, else black-box")
    _what(audit)
    audit.set_defaults(attack="pgd", n_examples=8, view="exact")
    audit.add_argument("--json", action="store_true", help="one object")

    diagnose = _command(commands, "diagnose", _diagnose, "what the purifiers of runs lose and let through")
    diagnose.add_argument("paths", nargs="*", default=["results/run"], metavar="FOLDER", help="folders with runs")
    diagnose.add_argument("--n-examples", type=int, default=32, metavar="N", help="images of each run (32)")
    diagnose.add_argument("--weights", metavar="FOLDER", help="a folder with further cards")
    diagnose.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie")
    diagnose.add_argument("--json", action="store_true", help="one object: a list under runs")

    purify = _command(commands, "purify", _purify, "clean an image file")
    purify.add_argument("image", type=Path, metavar="IMAGE", help="any format that Pillow reads")
    purify.add_argument(
        "--purifier", default="diffpure", metavar="SPEC", help="e.g. vae, diffpure:t_star=0.1 (diffpure)"
    )
    purify.add_argument("--out", type=Path, required=True, metavar="FILE", help="e.g. clean.png; must not exist")
    purify.add_argument("--resize", action="store_true", help="scale an image of another size to the data set's")
    purify.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    _files(purify)

    tables = _command(commands, "tables", _tables, "make the generated tables of Markdown files anew")
    tables.add_argument("files", nargs="+", type=Path, metavar="FILE", help="with <!-- table: COMMAND --> blocks")
    tables.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is stale")

    check = _command(commands, "check", _check, "check that a component keeps its contract, in seconds")
    check.add_argument("--purifier", metavar="SPEC", help="e.g. file:mine.py:Mine")
    check.add_argument("--classifier", metavar="SPEC", help="e.g. robustbench:Carmon2019Unlabeled")
    check.add_argument("--attack", metavar="SPEC", help="e.g. file:mine.py:MyAttack")
    _files(check)
    check.add_argument("--json", action="store_true", help="one object: specs to their checks")

    fetch = _command(commands, "fetch", _fetch, "bring all that a run needs: data, checkpoints")
    fetch.add_argument("specs", nargs="*", metavar="SPEC", help="classifiers, e.g. robustbench:Carmon2019Unlabeled")
    _files(fetch)
    fetch.add_argument("--list", action="store_true", help="fetch nothing; print address, path, size and sha256")

    doctor = _command(commands, "doctor", _doctor, "look for what is missing or broken, and say what mends it")
    doctor.add_argument("--out", default="results/run", metavar="FOLDER", help="where runs would go (results/run)")
    doctor.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie")
    doctor.add_argument("--json", action="store_true", help="one object")

    names = _command(commands, "list", _list, "what can be named")
    names.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    names.add_argument("--dataset", default="fashion-mnist", help="whose weights (fashion-mnist)")
    names.add_argument("--weights", metavar="FOLDER", help="a folder with further cards")
    names.add_argument("--json", action="store_true")

    train = _command(commands, "train", _train, "train the weights of a component by its recipe")
    train.add_argument("name", help="diffpure, vae, resnet or resnet-at")
    train.add_argument("--dataset", default="fashion-mnist")
    train.add_argument("--out", default="weights", metavar="FOLDER", help="written to FOLDER/DATASET/NAME (weights)")
    train.add_argument("--data-dir", metavar="FOLDER", help="where the data set lies or goes")
    train.add_argument("--epochs", type=int, help="other than the recipe's; the card says so")
    train.add_argument("--device", default="auto", help="cpu, cuda or auto (auto)")
    return top


def _command(commands: Any, name: str, function: Callable, text: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.set_defaults(command=function)
    return sub


def _what(sub: argparse.ArgumentParser) -> None:
    """The options that say what is attacked and how hard; the same in every command."""
    what = sub.add_argument_group("what (specs: name[:argument][,key=value...], lists, {a,b} grids, or all)")
    what.add_argument("--purifier", default="diffpure", metavar="SPECS", help="e.g. identity,vae,diffpure (diffpure)")
    what.add_argument("--classifier", default="resnet", metavar="SPECS", help="e.g. resnet,resnet-at (resnet)")
    what.add_argument("--attack", default="autoattack", metavar="SPECS", help="e.g. pgd,autoattack (autoattack)")
    what.add_argument(
        "--dataset",
        default="fashion-mnist",
        help="a name, name:split=validation, parquet:PATH, folder:PATH (fashion-mnist)",
    )
    what.add_argument("--copies", type=int, default=1, help="purified copies per image, part of the defense (1)")
    what.add_argument("--combine", default="logits", help="of the copies: logits, probabilities or vote (logits)")
    threat = sub.add_argument_group("threat and attacker")
    threat.add_argument("--norm", help="Linf, L2 or StAdv (the attack's own: Linf, but for stadv)")
    threat.add_argument(
        "--eps", action="append", metavar="RADIUS", help="radius in [0, 1] pixel units, e.g. 16/255; may be repeated"
    )
    threat.add_argument(
        "--view",
        default="auto",
        metavar="SPECS",
        help="what is differentiated: exact, bpda, blind, surrogate:gradient=NAME, adjoint, or auto: exact, but for a "
        "purifier that rounds its first surrogate; with noise=verdict the attacker knows the draws that judge (auto)",
    )
    threat.add_argument("--attacker", metavar="SPEC", help="differentiate this purifier instead; the verdict doesn't")
    effort = sub.add_argument_group("effort")
    effort.add_argument("--budget", default="auto", help="quick, standard, paper or auto (auto: by device)")
    effort.add_argument("--n-examples", type=int, metavar="N", help="the first N images of the fixed order")
    effort.add_argument("--draws", type=int, help="verdict draws of a stochastic defense")
    effort.add_argument("--seed", type=int, default=0, help="of all draws: the attack's, the verdict's (0)")
    effort.add_argument("--seeds", metavar="LIST", help="several in turn, e.g. 0,1,2; the table states their spread")
    machine = sub.add_argument_group("machine and files")
    machine.add_argument("--batch-size", type=int, metavar="ROWS", help="rows of every network call, a multiple of 32")
    machine.add_argument("--device", default="auto", help="cpu, cuda or auto (auto)")
    _sources(machine)
    machine.add_argument("--out", default="results/run", metavar="FOLDER", help="root of the runs (results/run)")


def _sources(group: Any) -> None:
    """Where data and weights lie, and what may be done to get them."""
    group.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie or go")
    group.add_argument("--weights", metavar="FOLDER", help="a folder with further cards and checkpoints")
    group.add_argument("--offline", action="store_true", help="open no socket")
    group.add_argument("--trust-checkpoint", action="store_true", help="load checkpoints whose pickles execute code")


def _files(sub: argparse.ArgumentParser) -> None:
    """For which data set and threat model, and from where."""
    sub.add_argument("--dataset", default="fashion-mnist", help="a data set's spec (fashion-mnist)")
    sub.add_argument("--norm", default="Linf", help="threat model of RobustBench's classifiers (Linf)")
    _sources(sub)


def _need(arguments: argparse.Namespace) -> Any:
    from benchmark import data
    from benchmark.checkpoints import Need

    form = data.form(arguments.dataset, data_dir=arguments.data_dir, offline=arguments.offline)
    roots = (Path(arguments.weights),) if arguments.weights else ()
    return Need(form, arguments.norm, roots, arguments.offline, arguments.trust_checkpoint)


def _cells(arguments: argparse.Namespace) -> Iterator[Any]:
    """The cells of a command line."""
    from benchmark import registry
    from benchmark.cell import Settings
    from benchmark.defenses import grid

    settings = Settings(
        budget=arguments.budget, n=arguments.n_examples, norm=arguments.norm,
        attacker=arguments.attacker, draws=arguments.draws, seed=arguments.seed, rows=arguments.batch_size,
        device=_device(arguments.device), out=arguments.out, data_dir=arguments.data_dir,
        weights=arguments.weights, offline=arguments.offline, trust=arguments.trust_checkpoint,
        preflight=not getattr(arguments, "no_preflight", False),
        mixed_environment=getattr(arguments, "mixed_environment", False),
        stop_after=getattr(arguments, "stop_after", None),
    )  # fmt: skip
    views = [view for item in registry.expand(arguments.view) for view in registry.split(item)]
    for seed, view in itertools.product(_seeds(arguments), views):
        yield from grid(
            arguments.purifier, arguments.classifier, arguments.attack, arguments.dataset, arguments.eps or [None],
            dataclasses.replace(settings, seed=seed, view=view), arguments.copies, arguments.combine,
        )  # fmt: skip


def _seeds(arguments: argparse.Namespace) -> list[int]:
    """The seeds of a command line, each once."""
    if arguments.seeds is None:
        return [arguments.seed]
    try:
        return list(dict.fromkeys(int(word) for word in arguments.seeds.split(",")))
    except ValueError:
        raise UsageError(f"--seeds {arguments.seeds}: expected whole numbers with commas, e.g. 0,1,2") from None


def _run(arguments: argparse.Namespace) -> int:
    from benchmark import report, writers
    from benchmark.cell import Incomplete
    from benchmark.results import read_run

    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    for _ in _cells(arguments):  # a slip in the last spec shows now, not after the hours that the first cells take
        pass
    folders, unfit, failed, began = [], [], False, time.monotonic()
    for cell in _cells(arguments):
        if arguments.stop_after is not None:
            cell.settings.stop_after = arguments.stop_after - (time.monotonic() - began)
        print(f"{cell}\n{cell.plan}", file=sys.stderr, flush=True)
        try:
            folders.append(cell.run())
        except (NotApplicableError, RunError) as error:  # the other cells have their numbers
            unfit.append(str(error))
            failed |= isinstance(error, RunError)
            print(f"benchmark: {error}", file=sys.stderr)
        except Incomplete:
            return _complain(f"stopped after {arguments.stop_after:g} s; the same command continues", INCOMPLETE)
    if not folders:
        raise (RunError if failed else UsageError)("no cell of this command has a number: see above")
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    print(writers.render(report.table(runs, worst_case=True), "md"), end="")
    print("".join(f"not in the table: {line}\n" for line in unfit) + f"records: {arguments.out}", file=sys.stderr)
    return FAILED if failed else DONE


def _plan(arguments: argparse.Namespace) -> int:
    cells = list(_cells(arguments))
    if arguments.json:
        fields = ("n", "nfe", "forwards", "backwards", "passes", "upper_bound")
        print(json.dumps([{"cell": str(c)} | {f: getattr(c.plan, f) for f in fields} for c in cells], indent=2))
    else:
        for cell in cells:
            print(f"{cell}\n{cell.plan}")
    return DONE


def _status(arguments: argparse.Namespace) -> int:
    from benchmark.results import find_runs

    for run in find_runs(arguments.paths):
        state = "complete" if run["complete"] else "incomplete"
        print(f"{state} {len(run['records'])}/{run['n']} {run['folder']}")
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from benchmark import report, writers
    from benchmark.results import find_runs

    if arguments.compact:
        print(writers.compact(find_runs(arguments.paths)), end="")
        return DONE
    if arguments.gallery:
        return _gallery(arguments)
    if arguments.match:
        print(writers.matches(report.matched(find_runs(arguments.paths), _shares(arguments.match))), end="")
        return DONE
    if arguments.bibtex:
        from benchmark.references import bibtex

        print(bibtex(find_runs(arguments.paths)), end="")
        return DONE
    if arguments.figures:
        from benchmark.plots import figures

        print("\n".join(map(str, figures(find_runs(arguments.paths), Path(arguments.out or "figures")))))
        return DONE
    if arguments.format == "html":
        return _page(find_runs(arguments.paths), arguments.out)
    worst = arguments.format in ("md", "latex") if arguments.worst_case is None else arguments.worst_case
    runs = find_runs(arguments.paths)
    table = report.table(runs, worst_case=worst, rule=arguments.rule)
    columns = arguments.columns.split(",") if arguments.columns else ()
    text = writers.render(table, arguments.format, columns=columns, sort=arguments.sort)
    if arguments.with_published:
        from benchmark.references import published

        if arguments.format != "md":
            raise UsageError("--with-published is for Markdown: a machine's table never mixes protocols")
        text += published(Path(arguments.with_published))
    print(text, end="")
    return DONE


def _shares(text: str) -> list[float]:
    """Accuracies as fractions of a comma-separated list."""
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError(f"--match {text}: expected fractions with commas, e.g. 0.85,0.80")
    return shares


def _gallery(arguments: argparse.Namespace) -> int:
    from benchmark.gallery import gallery

    print("\n".join(map(str, gallery(_replays(arguments, arguments.images), Path(arguments.gallery)))))
    return DONE


def _replays(arguments: argparse.Namespace, count: int) -> list[Any]:
    """The images of the runs below some folders."""
    from benchmark.replay import replay
    from benchmark.results import find_runs

    if count < 1:
        raise UsageError(f"at least one image is needed, got {count}")
    weights = [Path(arguments.weights)] if arguments.weights else []
    runs = find_runs(arguments.paths)
    return [replay(run, count, weights=weights, data_dir=arguments.data_dir) for run in runs]


def _diagnose(arguments: argparse.Namespace) -> int:
    from benchmark.diagnose import diagnosis, render

    found = [diagnosis(replayed) for replayed in _replays(arguments, arguments.n_examples)]
    print(
        json.dumps({"runs": found}, indent=2) if arguments.json else render(found), end="\n" if arguments.json else ""
    )
    return DONE


def _purify(arguments: argparse.Namespace) -> int:
    from benchmark.purify import purify

    spec = purify(
        arguments.image, arguments.out, arguments.purifier, _need(arguments), resize=arguments.resize,
        seed=arguments.seed,
    )  # fmt: skip
    print(f"purified by {spec}", file=sys.stderr)
    print(arguments.out)
    return DONE


def _page(runs: Sequence[dict[str, Any]], out: str | None) -> int:
    from benchmark.page import page
    from benchmark.results import replace

    if out is None:
        print(page(runs), end="")
        return DONE
    target = Path(out) / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, page(runs))
    print(target)
    return DONE


def _compare(arguments: argparse.Namespace) -> int:
    from benchmark import report, writers
    from benchmark.results import find_runs

    reference, *more = find_runs([arguments.reference])
    if more:
        raise UsageError(f"{arguments.reference} holds {1 + len(more)} runs: name the folder of one")
    table = report.comparison(reference, find_runs(arguments.others))
    print(json.dumps(table, indent=2) + "\n" if arguments.json else writers.comparison(table), end="")
    return DONE


def _audit(arguments: argparse.Namespace) -> int:
    from benchmark import audit
    from benchmark.results import find_runs

    saved = [Path(path) for path in arguments.paths if path.endswith(".json")]
    if saved:
        document = audit.saved(saved[0]) if len(arguments.paths) == 1 else {}
        if not document:
            raise UsageError("one saved audit at a time: python -m benchmark audit FILE.json")
    elif arguments.paths or arguments.only == "black-box":
        if arguments.only == "gradients":
            raise UsageError("--only gradients takes no folders: it builds the defense itself, with --purifier SPEC")
        document = audit.black_box(find_runs(arguments.paths or ["results/run"]))
    else:
        document = {"gradients": [audit.gradients(cell) for cell in _cells(arguments)]}
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        print(audit.render(document))
    return FAILED if audit.failed(document) else DONE


def _tables(arguments: argparse.Namespace) -> int:
    from benchmark import tables
    from benchmark.results import replace

    for path in arguments.files:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        if not arguments.check:
            replace(path, tables.render(path.read_text()))
        elif tables.stale(path):
            raise RunError(f"{path}: a table isn't what its command prints; python -m benchmark tables {path}")
    return DONE


def _list(arguments: argparse.Namespace) -> int:
    from benchmark import checkpoints, config, data, registry, zoo

    roots = [Path(arguments.weights)] if arguments.weights else []
    if arguments.kind == "datasets":
        entries: list[dict[str, Any]] = [
            {"name": name, "about": data.about(name), "radii": config.RADII.get(name, {})} for name in data.names()
        ]
    elif arguments.kind == "budgets":
        entries = [
            {"name": b.name, "n": b.n, "select": b.select, "draws": b.draws, "attacks": b.attacks}
            for b in config.BUDGETS.values()
        ]
    elif arguments.kind == "attacks":
        entries = [_describe("attacks", name, {}) for name in registry.names("attacks")]
    else:
        family = data.form(arguments.dataset).family
        cards = checkpoints.cards(family, roots)
        entries = [
            _describe(arguments.kind, name, json.loads(cards[name].read_text()) if name in cards else {})
            for name in checkpoints.names(arguments.kind, family, roots)
        ]
        if arguments.kind == "purifiers":
            need = checkpoints.Need(data.form(arguments.dataset), roots=tuple(roots))
            entries = [entry | _abilities(checkpoints.build("purifiers", entry["name"], need)) for entry in entries]
    if arguments.kind == "classifiers":
        entries += zoo.listing(family)
    if arguments.json:
        print(json.dumps(entries, indent=2))
    else:
        width = max((len(entry["name"]) for entry in entries), default=0)
        print("" if entries else f"no {arguments.kind} with weights for {arguments.dataset}", end="", file=sys.stderr)
        for entry in entries:
            rest = [f"{k}: {_in_words(v)}" for k, v in entry.items() if k != "name" and v not in (None, {}, "")]
            print(f"{entry['name']:<{width}}  " + "; ".join(rest))
    return DONE


def _in_words(value: Any) -> str:
    """A value of ``list`` on the terminal."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_in_words(v)}" for k, v in value.items())
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _describe(kind: str, name: str, card: dict[str, Any]) -> dict[str, Any]:
    from benchmark import registry

    component = registry.load(kind, card.get("component", name))
    options = registry.resolve(component, registry.Spec(name), card.get("options"))
    about = (component.__doc__ or "").strip().split("\n")[0]
    name += f":{component.argument}" if hasattr(component, "argument") else ""
    entry = {"name": name, "about": about, "options": {k: registry.show(v) for k, v in options.items()}}
    return entry if kind == "attacks" else entry | {"weights": bool(card.get("files"))}


def _abilities(built: Any) -> dict[str, Any]:
    """What a purifier costs and how it is set and attacked."""
    g = built.module
    return {
        "parameters": sum(p.numel() for p in g.parameters()),
        "nfe": g.nfe,
        "stochastic": g.stochastic,
        "dial": g.dial,
        "differentiable": g.differentiable,
        "surrogates": ", ".join(g.surrogates),
    }


def _check(arguments: argparse.Namespace) -> int:
    from benchmark import check, data

    wanted = {kind: getattr(arguments, kind) for kind in ("purifier", "classifier", "attack")}
    wanted = {kind: spec for kind, spec in wanted.items() if spec}
    if not wanted:
        raise UsageError("name what to check: --purifier, --classifier or --attack SPEC")
    need = _need(arguments)
    images = data.load(arguments.dataset, 64, data_dir=arguments.data_dir, offline=arguments.offline)
    checks = {spec: check.component(kind, spec, need, images) for kind, spec in wanted.items()}
    if arguments.json:
        texts = {spec: [c._asdict() | {"value": str(c.value)} for c in found] for spec, found in checks.items()}
        print(json.dumps(texts, indent=2))
    else:
        for spec, found in checks.items():
            print(spec)
            _print_findings(found)
    return FAILED if any(c.status == "fail" for found in checks.values() for c in found) else DONE


def _fetch(arguments: argparse.Namespace) -> int:
    from benchmark import checkpoints, data, registry
    from benchmark.fetch import obtain

    if arguments.weights:
        Path(arguments.weights).mkdir(parents=True, exist_ok=True)
    need = _need(arguments)
    remotes = []
    for text in [s for item in arguments.specs for e in registry.expand(item) for s in registry.split(e)]:
        remotes += checkpoints.remotes(text, need)
    if arguments.list:
        print("\n".join(map(str, remotes)) or "no file to fetch: all weights named are shipped")
        return DONE
    # more than the embedded excerpt holds; of a folder no more than that is decoded
    images = data.load(arguments.dataset, 1_001, data_dir=arguments.data_dir, offline=arguments.offline)
    print(f"{images.name}: {len(images):,} images or more are at hand")
    for remote in remotes:
        path = obtain(remote, offline=arguments.offline)
        print(f"{path}: sha256 {checkpoints.sha256(path)}, {path.stat().st_size:,} bytes")
    return DONE


def _doctor(arguments: argparse.Namespace) -> int:
    from benchmark.doctor import findings

    found = findings(arguments.out, arguments.data_dir)
    if arguments.json:
        print(json.dumps({"findings": [f._asdict() for f in found]}, indent=2))
    else:
        _print_findings(found)
    broken = any(f.status == "fail" for f in found)
    print("the main job can't run" if broken else "the main job can run", file=sys.stderr)
    return FAILED if broken else DONE


def _print_findings(found: Sequence[Any]) -> None:
    """A line per check or finding, and what to do about it."""
    marks = {"pass": "OK  ", "warn": "WARN", "fail": "FAIL", "n/a": "–   "}
    for f in found:
        expected = f" (expected {f.threshold})" if getattr(f, "threshold", "") != "" and f.status == "fail" else ""
        value = f"{f.value:.3g}" if isinstance(f.value, float) else f.value
        print(f"{marks[f.status]} {f.id:<24} {value}{expected}")
        if f.advice and f.status in ("warn", "fail"):
            print(f"     → {f.advice}")


def _train(arguments: argparse.Namespace) -> int:
    from benchmark.train import train

    folder = train(
        arguments.name, arguments.dataset, Path(arguments.out), device=_device(arguments.device),
        data_dir=arguments.data_dir, epochs=arguments.epochs,
    )  # fmt: skip
    print(folder)
    return DONE


def _device(name: str) -> str:
    import torch

    if name != "auto":
        try:
            torch.device(name)
        except RuntimeError as error:
            raise UsageError(f"--device {name}: {error}") from error
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _complain(message: object, code: int) -> int:
    print(f"benchmark: {message}", file=sys.stderr)
    return code
