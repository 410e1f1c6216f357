"""The command line, called in process: bad input is named with its remedy, and documents are only documents."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmark import checkpoints, cli, data, loaders, registry, report
from benchmark.cli import grammar
from benchmark.report import COLUMNS
from benchmark.results import find_runs

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {
    "diffpure": ("purifiers", "diffpure"),
    "vae": ("purifiers", "vae"),
    "resnet": ("classifiers", "resnet"),
    "resnet-at": ("classifiers", "resnet"),
}


def tiny_cards(root: Path, shape: tuple[int, int, int] = (1, 28, 28)) -> Path:
    """Untrained tiny networks for Fashion-MNIST with cards, as ``train`` writes them; gives the --weights folder."""
    torch.manual_seed(0)
    for name, (kind, component) in NETWORKS.items():
        folder = root / "fashion-mnist" / name
        parts = registry.load(kind, component).parts(shape, "tiny")
        options = {"t_star": 0.15, "steps": 2, "rule": "eta"} if name == "diffpure" else {}
        card = {"kind": kind, "component": component, "size": "tiny", "options": options}
        card["files"] = checkpoints.save(folder, parts)
        (folder / "card.json").write_text(json.dumps(card))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_cards(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def own_weights(tmp_path) -> Path:
    """Cards that a test may spoil."""
    return tiny_cards(tmp_path / "weights")


@pytest.fixture
def run(tmp_path, weights):
    """``run`` of tiny networks on four images; arguments are added to it and win over its own."""

    def call(*arguments: str) -> int:
        return cli.main(
            ["run", "--purifier", "diffpure", "--attack", "pgd:steps=2,eot=2", "--n-examples", "4", "--draws", "3",
             "--device", "cpu", "--offline", "--weights", str(weights), "--out", str(tmp_path / "out"), *arguments]
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, weights) -> Path:
    """A folder with two finished runs, identity and diffpure, for the commands that only read."""
    out = tmp_path_factory.mktemp("recorded")
    assert cli.main(
        ["run", "--purifier", "identity,diffpure", "--attack", "pgd:steps=2,eot=2", "--n-examples", "4", "--draws", "3",
         "--device", "cpu", "--weights", str(weights), "--out", str(out)]
    ) == 0  # fmt: skip
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- unknown names


@pytest.mark.parametrize(
    ("option", "value", "nearest", "known"),
    [
        ("--purifier", "difpure", "diffpure", ["diffpure", "identity", "vae"]),
        ("--classifier", "resnett", "resnet", ["resnet"]),
        ("--attack", "pdg", "pgd", ["apgd", "autoattack", "pgd"]),
        ("--dataset", "fashion-mnst", "fashion-mnist", ["fashion-mnist"]),
        ("--norm", "Linff", "Linf", ["L2", "Linf"]),
        ("--view", "exakt", "exact", ["blind", "bpda", "exact"]),
        ("--budget", "quik", "quick", ["auto", "quick", "standard", "paper"]),
        ("--attacker", "diffpur", "diffpure", ["diffpure", "identity", "vae"]),
        ("--purifier", "diffpure:t_stra=0.1", "t_star", ["eta", "rule", "steps", "t_star"]),
        ("--attack", "pgd:stepps=3", "steps", ["eot", "loss", "steps"]),
    ],
)
def test_an_unknown_name_gives_the_nearest_and_the_whole_list(run, tmp_path, capsys, option, value, nearest, known):
    assert run(option, value) == cli.USAGE
    output = capsys.readouterr()
    assert output.out == ""
    _, _, message = output.err.partition("benchmark: ")
    hint, _, listed = message.partition("known: ")
    wrong = value.partition(":")[2].partition("=")[0] or value
    assert f"unknown {'option' if ':' in value else ''}" in hint and repr(wrong) in hint
    assert "did you mean" in hint and nearest in hint.split("did you mean")[1]
    assert set(known) <= set(listed.strip().split(", "))
    assert not (tmp_path / "out").exists()


def test_a_name_like_no_other_still_gives_the_list(run, capsys):
    assert run("--purifier", "zzz") == cli.USAGE
    message = capsys.readouterr().err
    assert "did you mean" not in message and "known: bitdepth, " in message


@pytest.mark.parametrize(
    "words, said",
    [
        ("run --purifeir vae", "run takes no --purifeir; did you mean --purifier? run --help"),
        ("run --sed=3", "run takes no --sed=3; did you mean --seed?"),
        ("status a --zzz", "status takes no --zzz; status --help"),
        ("run vae", "run takes no vae; run --help"),
    ],
)
def test_an_unknown_option_gives_the_nearest(capsys, words, said):
    assert cli.main(words.split()) == cli.USAGE
    assert said in capsys.readouterr().err


def test_a_component_of_another_kind_is_called_that(run, capsys):
    assert run("--purifier", "resnet") == cli.USAGE
    assert "resnet is one of the classifiers, not of the purifiers" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["file:nowhere.py:Mine", "file:", f"file:{__file__}:NoSuchClass"])
def test_a_file_that_defines_no_such_purifier(run, capsys, spec):
    assert run("--purifier", spec) == cli.USAGE
    assert spec in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["list", "purifierz"], ["report", "--format", "xml"], ["rum"], []])
def test_bad_grammar_is_bad_usage(capsys, arguments):
    assert cli.main(arguments) == cli.USAGE
    assert "usage: python -m benchmark" in capsys.readouterr().err


# --- values out of range


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--eps", "8"], "write 8/255"),
        (["--eps", "abc"], "expected a number or a fraction in [0, 1] pixel units, e.g. 8/255"),
        (["--eps", "1/0"], "expected a number or a fraction"),
        (["--eps", "nan"], "expected a number or a fraction"),
        (["--eps", "inf"], "expected a number or a fraction"),
        (["--eps=-1/255"], "isn't negative"),
        (["--n-examples", "0"], "at least one image"),
        (["--n-examples", "-3"], "at least one image"),
        (["--draws", "0"], "at least one draw"),
        (["--seeds", "0,one"], "expected whole numbers with commas"),
        (["--seeds", "0,1", "--seed", "3"], "--seed 3 and --seeds 0,1: give one of them"),
        (["--combine", "vote"], "--combine vote would have no effect on one copy: add --copies N"),
        (["--stop-after", "-5"], "--stop-after -5: expected seconds, 0 or more"),
        (["--max-hours", "-1"], "--max-hours -1: expected hours, 0 or more"),
        (["--eps", "8/255,8"], "write 8/255"),
        (["--dataset", "parquet:"], "'parquet:' names no place: write parquet:PATH"),
        (["--batch-size", "33"], "multiple of 32"),
        (["--batch-size", "0"], "multiple of 32"),
        (["--copies", "0"], "copies must be at least 1, got 0"),
        (["--combine", "mean"], "logits, probabilities, vote"),
        (["--device", "abacus"], "--device abacus: the benchmark runs on cpu, cuda or cuda:N"),
        (["--device", "mps"], "--device mps: the benchmark runs on cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device meta: the benchmark runs on cpu, cuda or cuda:N"),
        (["--device", "cuda"], "torch sees no CUDA device here; use --device cpu"),
        (["--norm", "L2", "--eps", "128"], "further apart than 28 in L2; radii are in [0, 1] pixel units: for 128 in"),
        (["--dataset", "fashion-mnist:split=dev"], "split=test, split=validation or split=train"),
        (["--purifier", "diffpure:t_star=2"], "t_star must lie in (0, 1], or be 0 for no diffusion, got 2.0"),
        (["--purifier", "diffpure:t_star=often"], "diffpure: t_star takes float or list, got 'often'"),
        (["--purifier", "diffpure:t_star"], "diffpure takes no argument"),
        (["--purifier", "diffpure:t_star=,steps=1"], "expected key=value, got 't_star='"),
        (["--attack", "pgd:5"], "pgd takes no argument"),
        (["--attack", "pgd:steps=0"], "steps, eot, restarts and step must be positive, got 0.0, 0 and 0, 4"),
        (["--attack", "pgd:steps=1.5"], "pgd: steps takes int, got '1.5'"),
        (["--attack", "pgd:loss=l1"], "loss must be one of ce, dlr, margin, error, got 'l1'"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_expected(run, tmp_path, capsys, arguments, expected):
    assert run(*arguments) == cli.USAGE
    output = capsys.readouterr()
    assert expected in output.err and output.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--purifier", "identity,difpure"], ["--attack", "pgd:steps=2,pdg"], ["--eps", "1/255", "--eps", "8"]],
)
def test_a_slip_in_the_last_cell_shows_before_the_first_runs(run, tmp_path, capsys, arguments):
    assert run(*arguments) == cli.USAGE
    assert not (tmp_path / "out").exists()


def test_options_may_stand_in_a_file(tmp_path, capsys):
    """As a shell reads them; what stands behind on the command line counts."""
    table = tmp_path / "table.txt"
    table.write_text(
        '# table 1\n--purifier vae,"diffpure:t_star={0.1,0.2}"  # two families\n--eps 8/255 --n-examples 64\n'
    )
    arguments = grammar.parser().parse_args(["run", f"@{table}", "--n-examples", "8"])
    assert (arguments.purifier, arguments.eps, arguments.n_examples) == ("vae,diffpure:t_star={0.1,0.2}", ["8/255"], 8)
    assert cli.main(["run", "@nowhere.txt"]) == cli.USAGE and "nowhere.txt" in capsys.readouterr().err
    table.write_text(
        "--out results/run#1  # it's the first\n--purifier \\\n  vae --attack \\\npgd\n#--seed 3\n--eps '0.1'"
    )
    words = ["run", "--eps", "8/255", f"@{table}"]
    arguments = grammar.parser().parse_args(words)
    assert (arguments.out, arguments.purifier, arguments.attack) == ("results/run#1", "vae", "pgd")
    assert arguments.eps == ["8/255", "0.1"] and arguments.seed != 3, "what may be given several times adds up"
    table.write_bytes(b"\xef\xbb\xbf--out 'a\\\nb'")  # as Windows begins a file; a backslash in single quotes is one
    assert grammar.parser().parse_args(["run", f"@{table}"]).out == "a\\\nb"
    table.write_text("--out results/run#1")
    (tmp_path / "outer.txt").write_text(f"--n-examples 4 @{table}")
    assert grammar.parser().parse_args(["run", f"@{tmp_path / 'outer.txt'}"]).out == "results/run#1"


@pytest.mark.parametrize("text", ["--out 'results", "--out \\", b"--out \xff", "@{path}"])
def test_a_file_of_options_that_cannot_be_read_is_told_in_a_line(tmp_path, capsys, text):
    path = tmp_path / "options.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.format(path=path).encode())
    assert cli.main(["run", f"@{path}"]) == cli.USAGE
    message = capsys.readouterr().err
    assert str(path) in message and "Traceback" not in message


def test_radii_may_be_a_list(run, tmp_path):
    assert run("--eps", "1/255,2/255", "--eps", "0.1") == cli.DONE
    assert {one["identity"]["eps"] for one in find_runs([tmp_path / "out"])} == {"1/255", "2/255", "0.1"}


def test_an_l2_radius_may_exceed_one(run):
    assert run("--norm", "L2", "--eps", "1.5") == cli.DONE


def test_more_examples_than_there_are(run, tmp_path, capsys, monkeypatch):
    assert run("--n-examples", "5000000") == cli.USAGE
    message = capsys.readouterr().err
    assert "5,000,000" in message and "10,000" in message
    monkeypatch.setattr(loaders, "SYSTEM", tmp_path)
    assert run("--n-examples", "2000", "--data-dir", str(tmp_path)) == cli.USAGE
    message = capsys.readouterr().err
    assert "apt install dataset-fashion-mnist" in message and "--n-examples up to 1000" in message


@pytest.mark.skipif(
    not (loaders.SYSTEM / "fashion-mnist" / "train-images-idx3-ubyte.gz").exists(),
    reason="needs the full Fashion-MNIST",
)
def test_a_split_is_read_from_the_data_folder(run, tmp_path, monkeypatch):
    folder = loaders.SYSTEM / "fashion-mnist"
    monkeypatch.setattr(loaders, "SYSTEM", tmp_path / "nowhere")
    assert run("--dataset", "fashion-mnist:split=validation", "--data-dir", str(folder)) == cli.DONE
    (done,) = find_runs([tmp_path / "out"])
    assert [r["id"] for r in done["records"]] == [55_000, 55_001, 55_002, 55_003]


# --- weights


def spoil_missing(file: Path) -> None:
    file.unlink()


def spoil_truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def spoil_altered(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_truncated, spoil_altered])
@pytest.mark.parametrize("name", ["diffpure", "resnet"])
def test_spoilt_weights_are_never_used(run, tmp_path, own_weights, capsys, name, spoil):
    folder = own_weights / "fashion-mnist" / name
    (entry,) = json.loads((folder / "card.json").read_text())["files"].values()
    spoil(folder / entry["file"])
    found = "no such file" if spoil is spoil_missing else checkpoints.sha256(folder / entry["file"])
    assert run("--weights", str(own_weights)) == cli.USAGE
    message = capsys.readouterr().err
    assert str(folder / entry["file"]) in message
    assert f"expected sha256 {entry['sha256']}, found {found}" in message
    assert f"python -m benchmark train {name} --dataset fashion-mnist" in message
    assert not (tmp_path / "out").exists()


def test_a_card_that_is_no_json_is_named(run, own_weights, capsys):
    card = own_weights / "fashion-mnist" / "diffpure" / "card.json"
    card.write_text(card.read_text()[:40])
    assert run("--weights", str(own_weights)) == cli.USAGE
    assert str(card) in capsys.readouterr().err


def test_a_weights_folder_that_does_not_exist_is_named(run, tmp_path, capsys):
    assert run("--weights", str(tmp_path / "nowhere")) == cli.USAGE
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_without_weights_there_is_no_random_network(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert run("--weights", str(tmp_path / "empty")) == cli.USAGE
    message = capsys.readouterr().err
    assert "no weights for diffpure on fashion-mnist" in message and "benchmark train diffpure" in message


def test_shipped_weights_are_what_their_cards_say():
    for kind in ("purifiers", "classifiers"):
        for name, card in checkpoints.cards("fashion-mnist").items():
            if json.loads(card.read_text())["kind"] == kind:
                assert checkpoints.build(kind, name, checkpoints.Need(data.form("fashion-mnist"))).weights


# --- the folder of a run


def test_the_same_command_again_computes_nothing(run, tmp_path, capsys):
    assert run() == cli.DONE
    table, before = capsys.readouterr().out, files(tmp_path / "out")
    assert run() == cli.DONE
    assert capsys.readouterr().out == table
    assert files(tmp_path / "out") == before


def test_another_spelling_is_the_same_run(run, tmp_path, capsys):
    assert run() == cli.DONE
    table, before = capsys.readouterr().out, files(tmp_path / "out")
    others = ("diffpure:rounds=1", "pgd:eot=2,steps=2"), ("diffpure", "pgd:steps=2,eot=2,restarts=1")
    for purifier, attack in others:
        assert run("--purifier", purifier, "--attack", attack) == cli.DONE
        assert capsys.readouterr().out == table
    assert files(tmp_path / "out") == before
    twice = ["--purifier", "vae,vae:rounds=1", "--attack", "pgd:steps=2,eot=2,pgd:eot=2,steps=2"]
    assert run(*twice) == cli.DONE
    assert len(find_runs([tmp_path / "out"])) == 2
    assert "worst-case" not in capsys.readouterr().out


def test_a_copy_of_a_run_is_no_other_attack(recorded, tmp_path, capsys):
    shutil.copytree(recorded, tmp_path / "copy")
    for command in (["report", "--format", "json", "--worst-case"], ["report"], ["report", "--compact"]):
        assert cli.main([*command, str(recorded)]) == cli.DONE
        alone = capsys.readouterr().out
        assert cli.main([*command, str(recorded), str(tmp_path / "copy")]) == cli.DONE
        both = capsys.readouterr()
        assert both.out == alone and both.err.count("a copy of a run that is here already") == 2
    assert cli.main(["verify", str(recorded), str(tmp_path / "copy"), "--images", "0", "--json"]) in (0, cli.FAILED)
    assert len(json.loads(capsys.readouterr().out)) == 4, "each folder is doubted on its own"


def test_who_asks_for_fewer_images_gets_those(run, tmp_path, capsys):
    assert run() == cli.DONE
    capsys.readouterr()
    assert run("--n-examples", "2") == cli.DONE
    told = capsys.readouterr()
    assert "n 2;" in told.out and "all 2 images are recorded" in told.err
    assert [len(one["records"]) for one in find_runs([tmp_path / "out"])] == [4]


@pytest.mark.parametrize("field", ["seed", "eps", "weights", "protocol"])
def test_a_cell_that_holds_another_configuration_is_refused(run, tmp_path, capsys, field):
    assert run() == cli.DONE
    (path,) = (tmp_path / "out").rglob("run.json")
    settings = json.loads(path.read_text())
    settings["identity"][field] = "another"
    path.write_text(json.dumps(settings))
    before = files(tmp_path / "out")
    capsys.readouterr()
    assert run() == cli.USAGE
    message = capsys.readouterr().err
    assert f"{path.parent} holds another configuration ({field} differ)" in message
    assert "choose another --out or delete the folder" in message
    assert files(tmp_path / "out") == before


def test_an_edited_file_is_another_run(run, tmp_path, capsys):
    """A purifier outside the repository has no commit: its text must tell its runs apart."""
    path = tmp_path / "mine.py"
    for gain in (0.5, 0.25):
        path.write_text(
            "from purifiers import Purifier\n\n\nclass Mine(Purifier):\n    stochastic = False\n\n"
            f"    def start(self, x, noise):\n        return {gain} * x, None\n\n"
            "    def finish(self, state, context):\n        return state\n"
        )
        assert run("--purifier", f"file:{path}:Mine") == cli.DONE
    assert len(find_runs([tmp_path / "out"])) == 2


def test_out_that_is_a_file_is_an_error_and_stays_as_it_is(run, tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    assert run() == cli.FAILED
    message = capsys.readouterr().err
    assert str(tmp_path / "out") in message and "can't write" in message and "choose a writable --out" in message
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("arguments", [
    ["report", "--format", "html", "--out"], ["report", "--figures", "--out"], ["report", "--gallery"],
    ["train", "vae", "--out"],
], ids=lambda words: words[0] + words[1])  # fmt: skip
def test_what_cannot_be_written_is_an_error_without_a_traceback(recorded, tmp_path, capsys, arguments):
    (tmp_path / "file").write_text("precious")
    target = str(tmp_path / "file" / "inside" / "gallery.png")
    folder = [str(recorded / "fashion-mnist" / "identity")] if arguments[0] == "report" else []
    assert cli.main([arguments[0], *folder, *arguments[1:], target]) in (cli.USAGE, cli.FAILED)
    message = capsys.readouterr().err
    assert str(tmp_path / "file") in message and "Traceback" not in message
    assert (tmp_path / "file").read_text() == "precious"


# --- commands that read


def test_plan_runs_nothing_and_counts_what_run_records(weights, recorded, tmp_path, capsys):
    command = ["--purifier", "identity,diffpure", "--attack", "pgd:steps=2,eot=2", "--n-examples", "4", "--draws", "3",
               "--device", "cpu", "--weights", str(weights), "--out", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(["plan", *command, "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert not (tmp_path / "out").exists()
    assert cli.main(["plan", *command]) == 0
    assert all(f"{cell['passes']:,} image passes" in capsys.readouterr().out for cell in cells[:1])
    runs = {run["names"]["purifier"]: run for run in find_runs([recorded])}
    for cell, name in zip(cells, ("identity", "diffpure"), strict=True):
        assert name in cell["cell"]
        record = runs[name]["records"][0]
        assert (cell["forwards"], cell["backwards"]) == (record["forwards"], record["backwards"])
        assert cell["passes"] == 4 * cell["nfe"] * (cell["forwards"] + cell["backwards"])


def test_the_main_job_is_planned_within_its_limit(weights, capsys):
    """At most 100,000 passes of the U-Net, whatever the machine: 5 reverse steps as the shipped card has."""
    command = ["plan", "--purifier", "diffpure:steps=5", "--attack", "autoattack", "--device", "cpu", "--json"]
    assert cli.main([*command, "--weights", str(weights)]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["n"] == 32 and cell["nfe"] == 5
    assert cell["passes"] <= 100_000


def test_status(run, tmp_path, capsys):
    assert run("--stop-after", "0") == cli.INCOMPLETE
    assert "the same command continues" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("incomplete 0/4 ")
    assert run() == cli.DONE
    capsys.readouterr()
    assert cli.main(["status", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("complete 4/4 ")


def test_events_say_what_the_records_say(run, tmp_path, capsys):
    assert run("--stop-after", "0") == cli.INCOMPLETE
    assert run() == cli.DONE and run() == cli.DONE  # the third has nothing to do, and nothing to say
    told = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in told] == ["begin", "pause", "begin", "progress", "end"]
    assert told[0]["identity"]["seed"] == 0 and told[0]["done"] == 0 and "robust" not in told[0]
    (row,) = report.rows(find_runs([tmp_path / "out"]))
    for key in ("robust", "robust_low", "robust_high", "n", "purifier", "classifier", "attack", "display"):
        assert told[-1][key] == row[key]
    assert told[-1]["done"] == row["n"] and 1 - told[-1]["broken"] == pytest.approx(row["robust_any_iteration"])


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_folder_without_a_run_is_named(tmp_path, capsys, command):
    assert cli.main([command, str(tmp_path)]) == cli.USAGE
    assert f"{tmp_path}: no run below this folder" in capsys.readouterr().err


def test_the_report_is_only_the_document(recorded, capsys):
    assert cli.main(["report", str(recorded), "--format", "json"]) == 0
    output = capsys.readouterr()
    rows = json.loads(output.out)
    assert output.err == "" and [list(row) for row in rows] == [list(COLUMNS)] * 2

    assert cli.main(["report", str(recorded), "--format", "csv"]) == 0
    output = capsys.readouterr()
    assert output.err == "" and output.out.splitlines()[0] == ",".join(COLUMNS)
    assert len(output.out.splitlines()) == 3

    assert cli.main(["report", str(recorded)]) == 0
    output = capsys.readouterr()
    assert output.err == "" and output.out.splitlines()[2].startswith("| purifier |")
    assert sum(line.startswith("|") for line in output.out.splitlines()) == 4


def test_run_prints_the_table_on_stdout_and_the_plan_on_stderr(run, tmp_path, capsys):
    assert run() == cli.DONE
    output = capsys.readouterr()
    assert "image passes" in output.err and "image passes" not in output.out
    assert "--attack graded does" in output.err, "what could contradict the number wasn't tried"
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == output.out


def test_a_purifier_may_have_a_name_in_tables(run, tmp_path, capsys):
    """Before the run or after it: the run is the same."""
    assert run() == cli.DONE
    (before,) = find_runs([tmp_path / "out"])
    capsys.readouterr()
    assert run("--name", "Ours") == cli.DONE
    output = capsys.readouterr()
    assert "| Ours |" in output.out and "nothing to compute" in output.err
    (after,) = find_runs([tmp_path / "out"])
    assert after["names"]["purifier"] == "Ours"
    assert after | {"names": before["names"]} == before
    assert after["names"] | {"purifier": before["names"]["purifier"]} == before["names"]
    assert run("--shard", "2/2", "--name", "Ours", "--out", str(tmp_path / "empty")) == cli.DONE
    assert not (tmp_path / "empty").exists(), "a shard without images names nothing"
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "out"), "--compact", "--format", "latex"]) == cli.DONE
    assert "Ours" in capsys.readouterr().out
    assert run("--purifier", "identity,vae", "--name", "Ours") == cli.USAGE
    assert "--name Ours: one purifier at a time, got identity, vae" in capsys.readouterr().err


def test_a_grid_is_every_combination(run, tmp_path):
    assert run("--purifier", "vae:temperature={0,1},identity", "--attack", "pgd:steps=1,apgd:steps=1",
               "--eps", "1/255", "--eps", "2/255", "--n-examples", "1", "--no-preflight") == cli.DONE  # fmt: skip
    runs = find_runs([tmp_path / "out"])
    cells = {(r["names"]["purifier"], r["names"]["attack"], r["identity"]["eps"]) for r in runs}
    assert len(runs) == len(cells) == 3 * 2 * 2


def test_compare_gives_an_object_per_other_run(recorded, capsys):
    a, b = (str(run["folder"]) for run in find_runs([recorded]))
    assert cli.main(["report", "--compare", a, b, a, "--format", "json"]) == 0
    other, same = json.loads(capsys.readouterr().out)
    assert other["n"] == 4 and other["low"] <= other["difference"] <= other["high"] and 0 < other["p"] <= 1
    assert other["difference"] == pytest.approx(other["robust"] - other["reference"])
    assert same["difference"] == 0 and same["p"] == 1
    assert cli.main(["report", "--compare", a, b]) == 0
    shown = capsys.readouterr().out
    assert sum(line.startswith("|") for line in shown.splitlines()) == 3 and "Reference: diffpure + resnet" in shown


def test_what_isnt_comparable_is_refused(recorded, tmp_path, capsys):
    a, b = (run["folder"] for run in find_runs([recorded]))
    other = tmp_path / "other"
    shutil.copytree(b, other)
    settings = json.loads((other / "run.json").read_text())
    settings["identity"]["eps"] = "32/255"
    (other / "run.json").write_text(json.dumps(settings))
    begun = tmp_path / "begun"
    shutil.copytree(b, begun)
    (begun / "records.jsonl").unlink()
    for words, said in (
        (["--compare", a, begun], "begun has no finished image yet"),
        (["--compare", a, other], "accuracies under different threat models aren't compared"),
        (["--compare", a], "name what"),
        (["--compare", recorded, a], "holds 2 runs"),
        ([a, "--compare", a, b], "name every folder behind --compare"),
        (["--compare", a, b, "--format", "html"], "a comparison is md, csv, json or latex"),
    ):
        assert cli.main(["report", *map(str, words)]) == cli.USAGE
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--compact", "--sort", "robust"], "--compact takes no --sort"),
        (["--compact", "--format", "html"], "a line per defense is md, csv, json or latex"),
        (["--figures", "--rule", "worst"], "--figures takes no --rule"),
        (["--bibtex", "--format", "json"], "--bibtex takes no --format"),
        (["--match", "0.9", "--columns", "attack"], "--match takes --columns purifier or none"),
        (["--images", "3"], "a table takes no --images"),
        (["--out", "site"], "--out is for html and figures"),
        (["--format", "html", "--rule", "worst"], "leave out --rule"),
        (["--format", "csv", "--with-published"], "--with-published is for Markdown"),
        (["--compact", "--bibtex"], "not allowed with"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(words, said, recorded, capsys):
    assert cli.main(["report", str(recorded), *words]) == cli.USAGE
    assert said in capsys.readouterr().err


def test_a_column_after_a_minus_sorts_downwards(recorded, capsys):
    shown = []
    for order in (["--sort", "-nfe"], ["--sort=-nfe"], ["--sort", "nfe"]):
        assert cli.main(["report", str(recorded), "--format", "json", *order]) == 0
        shown.append([row["nfe"] for row in json.loads(capsys.readouterr().out)])
    assert shown[0] == shown[1] == shown[2][::-1] == sorted(shown[0], reverse=True)


# --- speed of --help


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom benchmark.cli import main\nassert main(['run', '--help']) == 0\n"
        "heavy = {'torch', 'diffusers', 'pandas', 'scipy', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'--help imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--n-examples" in done.stdout


OWN = """
import torch
from torch import nn


class Late(nn.Module):
    def __init__(self, sigma=0.1):
        super().__init__()
        self.sigma = sigma

    def forward(self, x):
        return (x + self.sigma * torch.randn_like(x)).clamp(0, 1)


class Other(Late):
    def __init__(self, *, sigma: float = 0.1):
        super().__init__(sigma)


class Tuple(nn.Module):
    def forward(self, x):
        return (x.flatten(1)[:, :10],)


class Nothing(nn.Module):
    def forward(self, x):
        pass


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False))
"""


def test_what_is_of_ones_own_is_named_by_file_and_class(run, tmp_path, capsys):
    (path := tmp_path / "own.py").write_text(OWN)
    assert run("--purifier", f"file:{path}:Late,sigma=0.3") == cli.USAGE
    said = capsys.readouterr().err
    assert f"file:{path}:Late: unknown option 'sigma'" in said and "options are keyword-only: write a *" in said
    assert cli.main(["check", "--classifier", f"file:{path}:Tuple"]) == cli.FAILED
    assert "FAIL classes" in (said := capsys.readouterr().out) and "return logits, a tensor of shape" in said
    assert cli.main(["check", "--purifier", f"file:{path}:Nothing"]) == cli.FAILED
    assert "the purifier returned NoneType; it has to return images" in capsys.readouterr().out
    assert cli.main(["check", "--classifier", f"file:{path}:linear"]) in (cli.DONE, cli.FAILED)
    assert "of 64 images, and neither a card nor a leaderboard says how many to expect" in capsys.readouterr().out
    assert run(
        "--classifier", f"file:{path}:linear", "--purifier", f"file:{path}:Other,sigma={{0.05,0.2}}",
        "--no-preflight") == cli.DONE  # fmt: skip
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "out"), "--match", "0.5"]) == cli.DONE
    assert f"| file:{path}:Other |" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "out"), "--bibtex"]) == cli.DONE


def test_a_purifier_with_numbers_of_its_own_is_seeded_too(tmp_path, capsys):
    from PIL import Image

    (path := tmp_path / "own.py").write_text(OWN)
    Image.new("L", (28, 28), 128).save(tmp_path / "grey.png")
    made = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert cli.main(["purify", str(tmp_path / "grey.png"), "--purifier", f"file:{path}:Other", "--seed", seed,
                         "--out", str(tmp_path / f"{name}.png")]) == cli.DONE  # fmt: skip
        made.append((tmp_path / f"{name}.png").read_bytes())
    assert made[0] == made[1] != made[2]


def test_runs_of_defenses_built_in_python_say_why_no_command_repeats_them(tmp_path, capsys):
    from benchmark import evaluate, load

    defense = load("identity")
    defense.purifier.extra = 3
    evaluate(defense, attack="pgd:steps=1", n=2, budget="quick", out=tmp_path, quiet=True, device="cpu")
    for command in (["verify"], ["diagnose"], ["report", "--gallery", str(tmp_path / "g.png")]):
        assert cli.main([command[0], str(tmp_path), *command[1:]]) in (cli.USAGE, cli.FAILED)
        said = capsys.readouterr()
        assert "was built in Python" in said.out + said.err and "say where" not in said.out + said.err
