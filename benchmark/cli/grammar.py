"""The grammar of the command line: every command, every option, and nothing that takes time to import."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

KINDS = ("purifiers", "attacks", "classifiers", "datasets", "budgets")
"""What ``list`` lists."""
AUDITS = ("gradients", "black-box", "grades")
"""What ``audit`` looks at."""


COMMENT = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?<!\S)\#[^\n]*""", re.S)
"""A comment; or what is quoted or escaped, where none begins."""


class Grammar(argparse.ArgumentParser):
    """A parser that reads a file of options as a shell would: quotes, a backslash at a line's end, comments after #."""

    def _read_args_from_files(self, arg_strings: list[str]) -> list[str]:
        return [word for given in arg_strings for word in self._words(given, ())]

    def _words(self, given: str, inside: tuple[Path, ...]) -> list[str]:
        """A word of the command line; for @FILE those of the file, which may name others."""
        if not given.startswith("@"):
            return [given]
        path = Path(given[1:])
        if path.absolute() in inside:
            self.error(f"{given} names itself")
        try:
            text = COMMENT.sub(_kept, path.read_text(encoding="utf-8-sig"))
            return [w for word in shlex.split(text) for w in self._words(word, (*inside, path.absolute()))]
        except (OSError, ValueError) as error:
            self.error(f"{given} can't be read: {error}")


def _kept(found: re.Match[str]) -> str:
    """What a shell keeps of what is quoted or escaped, or a comment: no line's end after a backslash, if not quoted."""
    text = found[1] or ""
    return text if text.startswith("'") else text.replace("\\\n", "")


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    top = Grammar(
        prog="python -m benchmark",
        description="Clean and robust accuracy of adversarial purification, under attacks on the whole defense.",
        epilog="Example: python -m benchmark run --purifier diffpure --attack autoattack. @FILE stands for the options "
        "in a file. Of an option given twice the last one wins; --eps, --where, --beside and --against accumulate.",
        fromfile_prefix_chars="@",
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = _command(commands, "run", "attack defenses and print their table")
    _what(run)
    _how(run)

    plan = _command(commands, "plan", "print what a run would cost, from one timed batch, and run nothing")
    _what(plan)
    _how(plan)
    plan.add_argument("--devices", type=int, default=4, metavar="N", help="state the hours on N such devices, too (4)")
    plan.add_argument("--json", action="store_true", help="one object: the cells, and hours in all")

    status = _command(commands, "status", "how far the runs below some folders are")
    status.add_argument("paths", nargs="*", default=["results/run"], metavar="FOLDER")

    _report(commands)

    audit = _command(
        commands, "audit", "compare gradients, hold white-box against black-box attacks, or explain grades"
    )
    audit.add_argument("paths", nargs="*", metavar="PATH", help="folders with runs, for black-box; or a saved --json")
    audit.add_argument(
        "--only", choices=AUDITS, help="gradients without folders, else black-box; grades: what a grade rests on"
    )
    audit.add_argument(
        "--beside",
        action="append",
        metavar="FOLDER",
        help="its runs are further evidence for the grades, and get none of their own; repeatable",
    )
    _what(audit)
    audit.set_defaults(attack="pgd", n_examples=8, view="exact")
    audit.add_argument("--json", action="store_true", help="one object")

    diagnose = _command(commands, "diagnose", "what the purifiers of runs lose and let through")
    diagnose.add_argument(
        "paths", nargs="*", default=["results/run"], metavar="PATH", help="folders with runs; or a saved --json"
    )
    diagnose.add_argument("--n-examples", type=int, default=32, metavar="N", help="images of each run, at most (32)")
    diagnose.add_argument("--dataset", metavar="DATASET", help="where the images lie, for runs on files: parquet:PATH")
    diagnose.add_argument("--weights", metavar="FOLDER", help="a folder with further cards")
    diagnose.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie")
    diagnose.add_argument("--json", action="store_true", help="one object: a list under runs")
    diagnose.add_argument("--only", metavar="SPECS", help="these purifiers, in this order; all by default")
    diagnose.add_argument(
        "--spectra",
        metavar="FILE",
        help="draw what is kept and let through by frequency (FILE.png, .pdf, .csv), no table",
    )

    purify = _command(commands, "purify", "clean an image file")
    purify.add_argument("image", type=Path, metavar="IMAGE", help="any format that Pillow reads")
    purify.add_argument(
        "--purifier", default="diffpure", metavar="SPEC", help="e.g. vae, diffpure:t_star=0.1 (diffpure)"
    )
    purify.add_argument("--out", type=Path, required=True, metavar="FILE", help="e.g. clean.png; must not exist")
    purify.add_argument("--resize", action="store_true", help="scale an image of another size to the data set's")
    purify.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    _device(purify)
    _files(purify)

    sample = _command(commands, "sample", "draw images from a purifier's own model, as a grid")
    sample.add_argument("--purifier", required=True, metavar="SPEC", help="e.g. diffpure, vae, latent, diffusevae")
    sample.add_argument("--count", type=int, default=64, metavar="N", help="images (64)")
    sample.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="must not exist")
    sample.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    _device(sample)
    _files(sample)

    tables = _command(commands, "tables", "make the generated tables of Markdown files anew")
    tables.add_argument("files", nargs="+", type=Path, metavar="FILE", help="with <!-- table: COMMAND --> blocks")
    tables.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is stale")

    check = _command(commands, "check", "check that a component keeps its contract, in seconds")
    check.add_argument("--purifier", metavar="SPEC", help="e.g. file:mine.py:Mine")
    check.add_argument(
        "--classifier", metavar="SPEC", help="e.g. robustbench:Carmon2019Unlabeled; it judges the purifier, too"
    )
    check.add_argument("--attack", metavar="SPEC", help="e.g. file:mine.py:MyAttack")
    _device(check)
    _files(check)
    check.add_argument("--json", action="store_true", help="one object: specs to their checks")

    verify = _command(commands, "verify", "check recorded runs for consistency, and attack their first images again")
    verify.add_argument("paths", nargs="+", metavar="FOLDER", help="runs, or folders with runs")
    verify.add_argument(
        "--images",
        type=int,
        default=32,
        metavar="N",
        help="attack so many again; 0 checks the records alone (32)",
    )
    verify.add_argument("--dataset", metavar="DATASET", help="where the images lie, for runs on files: parquet:PATH")
    _device(verify)
    _sources(verify)
    verify.add_argument("--json", action="store_true", help="one object: folders to their checks")

    fetch = _command(commands, "fetch", "download all that a run needs: data, checkpoints")
    fetch.add_argument("specs", nargs="*", metavar="SPEC", help="purifiers, classifiers, e.g. robustbench:Standard")
    _files(fetch)
    fetch.add_argument("--list", action="store_true", help="fetch nothing; print address, path, size and sha256")

    bench = _command(commands, "bench", "time gradients and attacks against their networks alone; a minute or two")
    bench.add_argument("path", nargs="?", metavar="FILE.json", help="measure nothing, print what was saved there")
    bench.add_argument("--purifier", default="diffpure", metavar="SPEC", help="with an option steps (diffpure)")
    bench.add_argument("--classifier", default="resnet", metavar="SPEC", help="(resnet)")
    bench.add_argument("--dataset", default="fashion-mnist", help="a data set's spec (fashion-mnist)")
    _device(bench)
    bench.add_argument("--weights", metavar="FOLDER", help="a folder with further cards and checkpoints")
    bench.add_argument("--batch-size", type=int, default=8, metavar="ROWS", help="rows of each timed call (8)")
    bench.add_argument("--repetitions", type=int, default=2, metavar="N", help="of each measurement (2)")
    bench.add_argument("--compile", action="store_true", help="time compiled networks, too; minutes more")
    bench.add_argument("--out", metavar="FOLDER", help="write Markdown and JSON there, named after the device")
    bench.add_argument("--json", action="store_true", help="one object")

    doctor = _command(commands, "doctor", "look for what is missing or broken, and say what mends it")
    doctor.add_argument("--out", default="results/run", metavar="FOLDER", help="where runs would go (results/run)")
    doctor.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie")
    doctor.add_argument("--json", action="store_true", help="one object")

    names = _command(commands, "list", "what can be named, and what each option means")
    names.add_argument("kind", nargs="?", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    names.add_argument("name", nargs="?", metavar="NAME", help="one of them in full, e.g. list purifiers diffpure")
    names.add_argument("--dataset", default="fashion-mnist", help="whose weights (fashion-mnist)")
    names.add_argument("--weights", metavar="FOLDER", help="a folder with further cards")
    names.add_argument("--json", action="store_true")

    train = _command(commands, "train", "train the weights of a component by its recipe")
    train.add_argument(
        "names", metavar="NAME[,NAME…]",
        help="recipes, e.g. diffpure, nvae or resnet, or all; of several, those already trained in --out are skipped",
    )  # fmt: skip
    train.add_argument("--dataset", default="fashion-mnist", help="a name or parquet:FOLDER (fashion-mnist)")
    train.add_argument("--finish", metavar="DATASET", help="what the last steps see, e.g. parquet:FOLDER,only=exact")
    train.add_argument(
        "--stop-steps", type=int, metavar="N", help="leave after so many steps, and say how long the whole takes"
    )
    train.add_argument("--out", default="weights", metavar="FOLDER", help="written to FOLDER/DATASET/NAME (weights)")
    train.add_argument("--data-dir", metavar="FOLDER", help="where the data set lies or goes")
    train.add_argument("--epochs", type=int, help="other than the recipe's; the card says so")
    _device(train)
    return top


def _report(commands: Any) -> None:
    """The command that reads records; what is printed is one of several, and each says which options it takes."""
    sub = _command(commands, "report", "tables, figures and a page from recorded runs")
    sub.add_argument("paths", nargs="*", metavar="FOLDER", help="folders with runs (results)")
    what = sub.add_argument_group("what is made, if not a table of all runs").add_mutually_exclusive_group()
    what.add_argument("--compact", action="store_true", help="a line per defense: its attacks, worst case, rank")
    what.add_argument(
        "--against", action="append", metavar="NAME=VALUE",
        help="paired differences of each defense's worst case to that of the one so named, e.g. purifier=identity",
    )  # fmt: skip
    what.add_argument(
        "--compare", nargs="+", metavar="FOLDER",
        help="paired differences to the first, which holds one run, on the images that both have",
    )  # fmt: skip
    what.add_argument(
        "--match", metavar="SHARES",
        help="per purifier the setting of closest clean accuracy, e.g. 0.85,0.80; with --columns purifier as a list",
    )  # fmt: skip
    what.add_argument(
        "--figures", nargs="?", const="", metavar="KINDS",
        help="draw into --out (figures): PDF, PNG and CSV; all, or those whose names begin so: dials,t_star",
    )  # fmt: skip
    what.add_argument(
        "--gallery", nargs="?", const="", metavar="FILE",
        help="draw images of the runs, attacked and purified, into FILE.png and .pdf; without a FILE each run's beside "
        "its records, where the page finds it",
    )  # fmt: skip
    what.add_argument("--bibtex", action="store_true", help="the references of the components used")
    how = sub.add_argument_group("how")
    how.add_argument("--format", choices=("md", "csv", "latex", "html", "json"), help="of a table or comparison (md)")
    how.add_argument("--rule", help="what an accuracy is: mean, majority, worst, any or mean-logits (mean)")
    how.add_argument(
        "--worst-case", action=argparse.BooleanOptionalAction, help="the row over attacks (default: in md and latex)"
    )
    how.add_argument("--under", metavar="ATTACK", help="with --against: under this attack alone, not the worst case")
    how.add_argument("--columns", metavar="NAMES", help="only these, e.g. purifier,attack,robust")
    how.add_argument("--sort", metavar="COLUMN", help="order rows by a column, descending with a - before it")
    how.add_argument(
        "--with-published", nargs="?", const="results/published.csv", metavar="CSV",
        help="add numbers from papers, set apart (results/published.csv); Markdown only",
    )  # fmt: skip
    how.add_argument(
        "--beside",
        action="append",
        metavar="FOLDER",
        help="its runs are further evidence for the grades, and get no row; repeatable",
    )
    how.add_argument(
        "--where", action="append", metavar="NAME=VALUE",
        help="rows of these runs only, e.g. eps=8/255; repeatable: values of one name are alternatives, several names "
        "must all hold; runs left out still count in the grades",
    )  # fmt: skip
    how.add_argument("--out", metavar="FOLDER", help="html is written to FOLDER/index.html; figures go here")
    how.add_argument("--images", type=int, metavar="N", help="images in a gallery (2 with a FILE, else 8)")
    how.add_argument("--dataset", metavar="DATASET", help="where the images lie, for galleries of runs on files")
    how.add_argument("--weights", metavar="FOLDER", help="a folder with further cards, for galleries")
    how.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie, for galleries")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.set_defaults(command=name)
    return sub


def _what(sub: argparse.ArgumentParser) -> None:
    """The options that say what is attacked and how hard; the same in every command."""
    what = sub.add_argument_group("what (specs: name[:argument][,key=value...], lists, {a,b} grids, or all)")
    what.add_argument("--purifier", default="diffpure", metavar="SPECS", help="e.g. identity,vae,diffpure (diffpure)")
    what.add_argument("--classifier", default="resnet", metavar="SPECS", help="e.g. resnet,resnet-at (resnet)")
    what.add_argument(
        "--attack",
        default="autoattack",
        metavar="SPECS",
        help="e.g. pgd,autoattack, or graded: all that a grade A asks for (autoattack)",
    )
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
        "--eps",
        action="append",
        metavar="RADIUS",
        help="radius, e.g. 16/255 or 0.1,16/255: of Linf and L2 for pixels in [0, 1], of StAdv in half image widths",
    )
    threat.add_argument(
        "--view",
        default="auto",
        metavar="SPECS",
        help="what is differentiated: exact, bpda, blind, surrogate:gradient=NAME, adjoint, or auto: exact, or, if the "
        "purifier rounds, its first surrogate; with noise=verdict the attacker knows the draws that judge (auto)",
    )
    threat.add_argument(
        "--attacker", metavar="SPEC", help="purifier whose gradients are taken; the verdict is the defense's"
    )
    effort = sub.add_argument_group("effort")
    effort.add_argument("--budget", default="auto", help="quick, standard, paper or auto (auto: by device)")
    effort.add_argument("--n-examples", type=int, metavar="N", help="the first N images of the fixed order")
    effort.add_argument("--draws", type=int, help="verdict draws of a stochastic defense")
    effort.add_argument("--seed", type=int, default=0, help="of all draws: the attack's, the verdict's (0)")
    effort.add_argument("--seeds", metavar="LIST", help="several in turn, e.g. 0,1,2; the table states their spread")
    machine = sub.add_argument_group("machine and files")
    machine.add_argument("--batch-size", type=int, metavar="ROWS", help="rows of every network call, a multiple of 32")
    _device(machine)
    machine.add_argument(
        "--precision",
        default="float32",
        help="of the attacker's gradients: float32, float64, bf16 or tf32; verdicts are float32 (float32)",
    )
    machine.add_argument("--compile", action="store_true", help="compile the networks; pays off in long runs")
    machine.add_argument("--channels-last", action="store_true", help="lay out weights with channels last")
    machine.add_argument("--threads", type=int, metavar="N", help="threads of a CPU (torch's own choice)")
    _sources(machine)
    machine.add_argument("--out", default="results/run", metavar="FOLDER", help="root of the runs (results/run)")


def _how(sub: argparse.ArgumentParser) -> None:
    """The options that say how a run proceeds; plan takes them, too, so that a command can be planned as it stands."""
    how = sub.add_argument_group("progress and safety")
    how.add_argument("--name", help="what tables and figures call the purifier, of which there is one (its spec)")
    how.add_argument("--stop-after", type=float, metavar="SECONDS", help="stop, save and exit with 75 after so long")
    how.add_argument("--no-preflight", action="store_true", help="skip the checks of the defense; the table says so")
    how.add_argument("--mixed-environment", action="store_true", help="continue a run begun in another environment")
    how.add_argument(
        "--max-hours", type=float, metavar="H", help="refuse what would take longer (8 on a CPU, no limit on a GPU)"
    )
    how.add_argument("--yes", action="store_true", help="run it however long it takes")
    how.add_argument(
        "--shard",
        metavar="I/N",
        help="do every N-th group of 32 images; N such commands with the same --out share a run",
    )


def _device(group: Any) -> None:
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (auto)")


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
