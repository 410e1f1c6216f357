"""The commands around runs: what can be named, checked, fetched, trained, timed and verified."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmark import specs
from benchmark.cli.common import DONE, FAILED, INCOMPLETE, complain, needed, print_findings
from benchmark.cli.grammar import KINDS
from benchmark.errors import UsageError


def purify(arguments: argparse.Namespace) -> int:
    from benchmark.device import device_named
    from benchmark.purify import purify

    spec = purify(
        arguments.image, arguments.out, arguments.purifier, needed(arguments), resize=arguments.resize,
        seed=arguments.seed, device=device_named(arguments.device),
    )  # fmt: skip
    print(f"purified by {spec}", file=sys.stderr)
    print(arguments.out)
    return DONE


def sample(arguments: argparse.Namespace) -> int:
    import torch

    from benchmark import checkpoints
    from benchmark.device import device_named
    from benchmark.repeatable import make_repeatable
    from benchmark.samples import samples
    from purifiers import Purifier

    need, out = needed(arguments), arguments.out
    if out.exists():
        raise UsageError(f"--out {out} exists; nothing was overwritten")
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UsageError(f"--out {out}: name a PNG file in a folder that exists, e.g. samples.png")
    if arguments.count < 1:
        raise UsageError(f"--count must be at least 1, got {arguments.count}")
    spec = specs.parse(arguments.purifier)
    if ignored := sorted(spec.options.keys() - {"weights"}) if spec.name != "file" else []:
        raise UsageError(f"{spec}: a sample shows the model, not how it purifies: leave out {', '.join(ignored)}")
    built = checkpoints.build("purifiers", spec, need)
    device = device_named(arguments.device)
    make_repeatable(torch.device(device))
    module = built.module.to(device)
    if not isinstance(module, Purifier) or not samples(
        module, need.form, out, count=arguments.count, seed=arguments.seed
    ):
        raise UsageError(f"{spec} has no model of images to draw from; take e.g. diffpure, vae, nvae or latent")
    print(f"drawn from {spec}, seed {arguments.seed}", file=sys.stderr)
    print(out)
    return DONE


def listed(arguments: argparse.Namespace) -> int:
    import shutil
    import textwrap

    from benchmark import catalogue, data
    from benchmark.checkpoints import Need

    roots = (Path(arguments.weights),) if arguments.weights else ()
    need = Need(data.form(arguments.dataset), roots=roots)
    shown = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    if arguments.name:
        found = catalogue.entry(arguments.kind, arguments.name, need)
        print(json.dumps(found, indent=2) if arguments.json else "\n".join(catalogue.page(found, min(shown, 120))))
        return DONE
    kinds = {kind: catalogue.entries(kind, need) for kind in ([arguments.kind] if arguments.kind else KINDS)}
    if arguments.json:
        print(json.dumps(kinds if arguments.kind is None else kinds[arguments.kind], indent=2))
        return DONE
    for kind, entries in kinds.items():
        if arguments.kind is None:
            names = f"{kind}: {', '.join(entry['name'] for entry in entries)}"
            print("\n".join(textwrap.wrap(names, min(shown, 120), subsequent_indent="  ", break_on_hyphens=False)))
        elif not entries:
            complain(f"no {kind} with weights for {arguments.dataset}", DONE)
        else:
            for line in catalogue.table(kind, entries):
                print(line if len(line) <= shown else line[: shown - 1] + "…")
    if any(kinds.values()):
        print(f"list {arguments.kind or 'KIND'} NAME says all about one", file=sys.stderr)
    return DONE


def check(arguments: argparse.Namespace) -> int:
    from benchmark import check, data
    from benchmark.device import device_named

    wanted = {kind: getattr(arguments, kind) for kind in ("purifier", "classifier", "attack")}
    wanted = {kind: spec for kind, spec in wanted.items() if spec}
    if not wanted:
        raise UsageError("name what to check: --purifier, --classifier or --attack SPEC")
    need = needed(arguments)
    images = data.load(arguments.dataset, 64, data_dir=arguments.data_dir, offline=arguments.offline)
    images = images.first(min(64, len(images))).to(device_named(arguments.device))
    judge = arguments.classifier
    checks = {spec: check.component(kind, spec, need, images, judge) for kind, spec in wanted.items()}
    if arguments.json:
        texts = {spec: [c._asdict() | {"value": str(c.value)} for c in found] for spec, found in checks.items()}
        print(json.dumps(texts, indent=2))
    else:
        for spec, found in checks.items():
            print(spec)
            print_findings(found)
    return FAILED if any(c.status == "fail" for found in checks.values() for c in found) else DONE


def verify(arguments: argparse.Namespace) -> int:
    from benchmark.results import find_runs
    from benchmark.settings import Settings
    from benchmark.verify import each

    if arguments.images < 0:
        raise UsageError(f"--images {arguments.images}: how many are attacked again, or 0 to only look")
    runs, again = find_runs(arguments.paths), arguments.images > 0
    settings = Settings(
        n=max(arguments.images, 1), device=arguments.device, data_dir=arguments.data_dir,
        weights=arguments.weights, offline=arguments.offline, trust=arguments.trust_checkpoint,
    )  # fmt: skip
    found = {}
    for run, checks in each(runs, settings, dataset=arguments.dataset, again=again):
        found[run] = checks
        if not arguments.json:
            print(run)
            print_findings(checks)
    if arguments.json:
        print(json.dumps({run: [c._asdict() for c in checks] for run, checks in found.items()}, indent=2))
    return FAILED if any(c.status == "fail" for checks in found.values() for c in checks) else DONE


def fetch(arguments: argparse.Namespace) -> int:
    from benchmark import checkpoints, data
    from benchmark.fetch import obtain

    if arguments.weights:
        Path(arguments.weights).mkdir(parents=True, exist_ok=True)
    need = needed(arguments)
    remotes = []
    for text in [s for item in arguments.specs for e in specs.expand(item) for s in specs.split(e)]:
        remotes += checkpoints.remotes(text, need)
    if arguments.list:
        print("\n".join(map(str, remotes)) or "no file to fetch: all weights named are shipped")
        return DONE
    for remote in remotes:
        path = obtain(remote, offline=arguments.offline)
        print(f"{path}: sha256 {checkpoints.sha256(path)}, {path.stat().st_size:,} bytes")
    # more than the embedded excerpt holds; of a folder no more than that is decoded
    images = data.load(arguments.dataset, 1_001, data_dir=arguments.data_dir, offline=arguments.offline)
    print(f"{images.name}: {len(images):,} images or more are at hand")
    return DONE


def doctor(arguments: argparse.Namespace) -> int:
    from benchmark.doctor import findings

    found = findings(arguments.out, arguments.data_dir)
    if arguments.json:
        print(json.dumps({"findings": [f._asdict() for f in found]}, indent=2))
    else:
        print_findings(found)
    broken = any(f.status == "fail" for f in found)
    print("the main job can't run" if broken else "the main job can run", file=sys.stderr)
    return FAILED if broken else DONE


def train(arguments: argparse.Namespace) -> int:
    from benchmark import data
    from benchmark.device import device_named
    from benchmark.price import duration
    from benchmark.recipes import ordered, recipes
    from benchmark.train import paused, train

    out, device = Path(arguments.out), device_named(arguments.device)
    family = data.form(arguments.dataset, data_dir=arguments.data_dir).family
    names = ordered(family, None if arguments.names == "all" else specs.split(arguments.names))
    known, unfinished = recipes(family), set[str]()
    for name in names:
        if len(names) > 1 and (out / family / name / "card.json").is_file():
            print(f"{out / family / name} stands")
            continue
        if waiting := known[name].needs & unfinished:
            print(f"{name} waits for {', '.join(sorted(waiting))}")
            unfinished.add(name)
            continue
        folder = train(
            name, arguments.dataset, out, device=device, data_dir=arguments.data_dir, epochs=arguments.epochs,
            finish=arguments.finish, stop_steps=arguments.stop_steps,
        )  # fmt: skip
        print(folder)
        if left := paused(folder):
            unfinished.add(name)
            print(
                f"stopped after {left['step']:,} of {left['total']:,} steps of {left['seconds']:.2g} s: in all about "
                f"{duration(left['total'] * left['seconds'] / 3600)} on this device"
            )
    if unfinished:
        return complain(f"{', '.join(sorted(unfinished))}: unfinished; the same command continues", INCOMPLETE)
    return DONE


def bench(arguments: argparse.Namespace) -> int:
    from benchmark import bench
    from benchmark.config import slug
    from benchmark.device import device_named
    from benchmark.files import replace

    if arguments.path:
        print(bench.render(bench.saved(Path(arguments.path))), end="")
        return DONE
    measured = bench.Bench(
        arguments.purifier, arguments.classifier, arguments.dataset, device_named(arguments.device),
        arguments.batch_size, arguments.repetitions, arguments.weights,
    ).run(compiled=arguments.compile)  # fmt: skip
    document, text = json.dumps(measured, indent=2) + "\n", bench.render(measured)
    if arguments.out:
        e = measured["environment"]
        stem = slug(e["device_name"] if e["device"].startswith("cuda") else f"{e['processor']}-{e['threads']}-threads")
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        for ending, content in (("json", document), ("md", text), ("profile.txt", measured["profile"])):
            replace(folder / f"{stem}.{ending}", content)
        print(f"{folder / stem}.json, .md and .profile.txt", file=sys.stderr)
    print(document if arguments.json else text, end="")
    return DONE
