"""The README: its code runs, and its tables are what their commands print."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmark import cli, report, results, tables

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = ["python", "-m", "benchmark"]


class Block(NamedTuple):
    """A fenced block: its language, the file it stands for, its text."""

    language: str
    file: str | None
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of every line of a shell block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


BLOCKS = [Block(*match.groups()) for match in FENCE.finditer(README.read_text())]
SHELL = [words for block in BLOCKS if block.language == "bash" for words in block.commands]
DOCUMENTS = sorted(path for path in [README, *ROOT.glob("results/**/*.md")] if tables.BLOCK.search(path.read_text()))


def test_there_are_blocks_and_none_escapes_these_tests():
    assert {block.language for block in BLOCKS} <= {"bash", "python", "text", "bibtex"}
    assert README.read_text().count("\n```") == 2 * len(BLOCKS), "a fence that the pattern doesn't match"
    assert SHELL and any(block.language == "python" for block in BLOCKS)


def test_it_is_short_and_opens_with_the_two_commands():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert [words[:2] for words in BLOCKS[0].commands] == [["make", "run"], ["make", "test"]]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in SHELL if words[0] == "make"} <= targets


@pytest.mark.parametrize("words", [words for words in SHELL if words[0] != "make"], ids=" ".join)
def test_commands_are_of_the_grammar(words):
    assert words[:3] == RUN
    cli.parser().parse_args(words[3:])


def test_there_is_nothing_left_to_fill_in():
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME|XXX", README.read_text())


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert re.match("https?://", target) or (ROOT / target).exists(), target


@pytest.mark.skipif(not DOCUMENTS, reason="no Markdown file holds a generated table yet")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_what_their_commands_print(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert not tables.stale(path), f"python -m benchmark tables {path.relative_to(ROOT)}"


def test_a_stale_table_is_noticed_and_made_anew(tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- table: python -m benchmark list budgets -->\nold\n<!-- /table -->\nafter\n")
    assert cli.main(["tables", "--check", str(path)]) == cli.FAILED
    assert "old" in path.read_text() and f"python -m benchmark tables {path}" in capsys.readouterr().err
    assert cli.main(["tables", str(path)]) == cli.DONE
    lines = path.read_text().splitlines()
    assert lines[0] == "before" and lines[3].startswith("quick") and lines[-1] == "after"
    assert cli.main(["tables", "--check", str(path)]) == cli.DONE


def test_a_note_stands_below_the_first_table_that_has_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = "report results/seeds --no-worst-case --columns purifier,seed,robust"
    block = f"<!-- table: python -m benchmark {command} -->\n<!-- /table -->\n"
    first, second = tables.render(f"{block}between\n{block}").split("between\n")
    (note,) = [line for line in first.splitlines() if line.startswith("Accuracy is")]
    assert note not in second
    rows = [line for line in first.splitlines() if line.startswith(("|", "fashion-mnist"))]
    assert len(rows) > 3 and rows == [line for line in second.splitlines() if line.startswith(("|", "fashion-mnist"))]
    assert tables.render(block) == first, "another document has it again"


@pytest.mark.parametrize(
    ("attacks", "purifiers"), [("pgd", ["identity"]), ("pgd,autoattack", ["vae", "diffpure"])], ids=["one", "both"]
)
def test_the_compact_table_says_what_the_rows_say(tmp_path, capsys, attacks, purifiers):
    """The generator of the headline table, on runs of tiny networks: a line per purifier, numbers as in the rows."""
    from tests.test_cli import tiny_cards

    weights = tiny_cards(tmp_path / "weights")
    specs = ",".join(
        {"pgd": "pgd:steps=1,eot=1", "autoattack": "autoattack:steps=1,eot=1"}[a] for a in attacks.split(",")
    )
    assert cli.main(
        ["run", "--purifier", ",".join(reversed(purifiers)), "--attack", specs, "--n-examples", "2", "--draws", "2",
         "--eps", "64/255", "--device", "cpu", "--weights", str(weights), "--out", str(tmp_path / "out")]
    ) == 0  # fmt: skip
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "out"), "--compact"]) == 0
    head, _, *lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    cells = [dict(zip(head.split(" | "), line.split(" | "), strict=True)) for line in lines]
    assert [line["| purifier"].strip("| ") for line in cells] == purifiers
    runs = results.find_runs([tmp_path / "out"])
    for line, name in zip(cells, purifiers, strict=True):
        rows = report.rows([run for run in runs if run["names"]["purifier"] == name], worst_case=True)
        for row in rows[:-1] if len(rows) > 1 else rows:
            assert line[f"{row['attack']} %"] == f"{100 * row['robust']:.1f}"
        assert line["clean % [95 %]"].startswith(f"{100 * rows[-1]['clean']:.1f} [")
        assert line["worst case % [95 %]"].startswith(f"{100 * rows[-1]['robust']:.1f} [")


@pytest.mark.slow
def test_every_block_runs_in_order(tmp_path, monkeypatch):
    """As a reader would: one folder, block after block; runs on four images only, make left to CI."""
    (tmp_path / "results").mkdir()
    for recorded in (ROOT / "results").glob("*"):
        if recorded.name not in ("run", "try"):
            (tmp_path / "results" / recorded.name).symlink_to(recorded)
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        if block.language == "python":
            if block.file:
                Path(block.file).write_text(block.text)
            exec(compile(block.text, block.file or "README.md", "exec"), {"__name__": "__readme__"})
        if block.language == "bash":
            for words in block.commands:
                if words[0] != "make" and not needs_the_reader(words):
                    in_process(words)


def needs_the_reader(words: list[str]) -> bool:
    """Whether a command wants a network, or data that only the reader has."""
    elsewhere = "run" in words and any(w.startswith(("cifar10", "parquet:")) for w in words)
    return elsewhere or "fetch" in words or "purify" in words


def in_process(words: list[str]) -> None:
    """``python -m benchmark …``, with a redirection to a file if there is one."""
    arguments = words[3:]
    with contextlib.ExitStack() as stack:
        if ">" in arguments:
            arguments, (_, target) = arguments[:-2], arguments[-2:]
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(target, "w"))))
        if arguments[0] == "run":  # a later option wins; calls are padded to whole rows, so few images want few rows
            arguments = [*arguments, "--n-examples", "4", "--batch-size", "32"]
        if arguments[0] == "train" and "--epochs" not in arguments:
            pytest.skip("training as the README shows it takes minutes: tests/test_train.py covers every recipe")
        assert cli.main(arguments) == 0, shlex.join(words)
