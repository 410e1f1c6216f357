"""Recovery: a run that was stopped, killed or torn ends in the bytes of one that wasn't."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmark import engine, evaluate, files, report, results, writers
from benchmark.cell import Cell, Incomplete
from benchmark.errors import RunError, UsageError
from benchmark.settings import Settings
from purifiers import Defense
from tests.test_evaluate import Linear, TwoLogits, gaussian

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ["pgd:steps=4,eot=2", "autoattack:steps=3,eot=2", "pgd:steps=2,eot=2,restarts=2"]


@pytest.fixture
def run(tmp_path, tiny_defense, tiny_images):
    """Evaluate into a folder of that name below the test's own; the checks of a defense aren't what is resumed."""

    def call(name: str, attack: str = NATIVE[0], n: int = 8, **settings) -> Path:
        settings = {"eps": "32/255", "draws": 3, "quiet": True, "preflight": False} | settings
        return evaluate(tiny_defense, tiny_images, attack, n=n, out=tmp_path / name, **settings).folder

    return call


def outcome(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("records.jsonl", "adversarial.npy")}


def folder_of(root: Path) -> Path:
    (path,) = root.rglob("run.json")
    return path.parent


# --- stopped


@pytest.mark.parametrize("attack", NATIVE)
def test_stopped_in_every_iteration_and_continued_changes_no_byte(tmp_path, run, attack):
    stops = 0
    while True:
        try:
            folder = run("stopped", attack, stop_after=0)
            break
        except Incomplete:
            stops += 1
            assert stops < 50, "no progress between stops"
            (lane,) = torch.load(folder_of(tmp_path / "stopped") / "state.pt", weights_only=True)["lanes"]
            assert lane["positions"].tolist() == list(range(8)) and int(lane["state"]["done"]) == stops
    assert stops == {NATIVE[0]: 4, NATIVE[1]: 6, NATIVE[2]: 4}[attack], "one iteration was done between two stops"
    assert not (folder / "state.pt").exists()
    assert outcome(folder) == outcome(run("at once", attack))


def test_stopped_between_blocks_and_continued_changes_no_byte(tmp_path, run):
    with pytest.raises(Incomplete):
        run("stopped", n=80, stop_after=0)
    seen = set()
    while True:
        try:
            folder = run("stopped", n=80, stop_after=0)
            break
        except Incomplete:
            seen.add(len(results.find_runs([tmp_path / "stopped"])[0]["records"]))
    assert 0 in seen <= {0, 32, 64}, "whole groups"
    assert len(seen) > 1, "what ended is recorded when the others stop; whether two end at once is a matter of speed"
    assert outcome(folder) == outcome(run("at once", n=80))


@pytest.mark.parametrize(("first", "then"), [(8, 16), (16, 8)])
def test_stopped_and_continued_with_another_n_changes_no_byte(run, first, then):
    with pytest.raises(Incomplete):
        run("stopped", n=first, stop_after=0, preflight=True)
    continued, whole = (run(name, n=then, preflight=True) for name in ("stopped", "at once"))
    assert outcome(continued)["records.jsonl"] == outcome(whole)["records.jsonl"]


def test_a_state_is_saved_at_its_interval(tmp_path, run, monkeypatch):
    """Without any stop: what a kill would leave behind."""
    saved = []
    keep = results.Run.save_state
    monkeypatch.setattr(results.Run, "save_state", lambda self, lanes: (saved.append(len(lanes)), keep(self, lanes))[1])
    run("never")
    assert saved == []
    monkeypatch.setattr(engine, "SAVE_EVERY", 0.0)
    run("always")
    assert saved == [1] * 4


# --- torn, and full


def test_a_torn_last_line_is_dropped_and_its_image_done_again(run):
    whole = run("at once", n=40)
    torn = run("torn", n=40)
    journal = torn / "journal.jsonl"
    (torn / "records.jsonl").rename(journal)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:35]) + lines[35][:20])

    (unfinished,) = results.find_runs([torn])
    assert len(unfinished["records"]) == 35 and not unfinished["complete"], "what is recorded stays readable"
    assert outcome(run("torn", n=40)) == outcome(whole)
    assert (torn / "records.jsonl").read_text().splitlines() == [line.rstrip("\n") for line in lines]


def test_the_room_for_images_is_taken_before_the_first(tmp_path, run):
    """A sparse file would be filled through a memory map, and a full disk would then kill the process by SIGBUS."""
    for n in (8, 40):
        with pytest.raises(Incomplete):
            run("stopped", n=n, stop_after=0)
        stat = (folder_of(tmp_path / "stopped") / "adversarial.npy").stat()
        assert stat.st_size >= n * 64 * 4 and stat.st_blocks * 512 >= stat.st_size


def test_a_full_disk_is_an_error_and_what_is_recorded_stays_readable(tmp_path, run, monkeypatch):
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # run.json, then a block's journal each
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(files.os, "fsync", full)
        with pytest.raises(RunError, match=r"No space left on device[\s\S]*what is recorded stays readable"):
            run("full", n=40)
    (unfinished,) = results.find_runs([tmp_path / "full"])
    assert len(unfinished["records"]) >= 32 and not unfinished["complete"]
    assert outcome(run("full", n=40)) == outcome(run("at once", n=40))


# --- another environment


def test_another_environment_is_refused_unless_mixed(tmp_path, run):
    with pytest.raises(Incomplete):
        run("mixed", n=40, stop_after=0)
    while not results.find_runs([tmp_path / "mixed"])[0]["records"]:
        with pytest.raises(Incomplete):
            run("mixed", n=40, stop_after=0)
    folder = folder_of(tmp_path / "mixed")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(UsageError, match=r"begun in another environment \(rows: 64 → 32\)[\s\S]*--mixed-environment"):
        run("mixed", n=40, rows=32)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before

    run("mixed", n=40, rows=32, mixed_environment=True)
    (done,) = results.find_runs([folder])
    assert done["mixed_environment"] and done["complete"]
    assert "[mixed environment]" in writers.render(report.table([done]), "md")


def test_an_attack_under_way_belongs_to_its_environment_too(tmp_path, run):
    """Before the first record there is a state; continuing it elsewhere mixes environments just as well."""
    with pytest.raises(Incomplete):
        run("mixed", stop_after=0)
    with pytest.raises(UsageError, match="begun in another environment"):
        run("mixed", rows=64)


def test_another_commit_alone_is_the_same_environment(tmp_path, run):
    with pytest.raises(Incomplete):
        run("stopped", stop_after=0)
    path = folder_of(tmp_path / "stopped") / "run.json"
    settings = json.loads(path.read_text())
    settings["environment"]["commit"] = "0123456789ab"
    path.write_text(json.dumps(settings))
    run("stopped")


# --- killed

KILLED = """
import sys
import torch
from benchmark import engine, evaluate
from purifiers import Defense
from tests.test_evaluate import Linear, TwoLogits, gaussian

torch.set_num_threads(1)  # as the tests do: another number is another environment
engine.SAVE_EVERY = 0.0
evaluate(Defense(Linear(), TwoLogits()), gaussian(96), "pgd:steps=400,eot=4", eps="1/64", n=96,
         out=sys.argv[1], quiet=True)
"""


@pytest.mark.slow
def test_killed_in_mid_attack_and_run_again_changes_no_byte(tmp_path):
    """A real SIGKILL, after some images are recorded, at an iteration that nothing chose."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "killed")], cwd=ROOT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list(tmp_path.rglob("journal.jsonl")) and list(tmp_path.rglob("state.pt")):
            try:
                state = torch.load(next(tmp_path.rglob("state.pt")), weights_only=True)
            except (EOFError, FileNotFoundError):
                continue
            if any(int(lane["state"]["done"]) > 20 for lane in state["lanes"]):
                break
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL

    (unfinished,) = results.find_runs([tmp_path / "killed"])
    assert unfinished["records"] and not unfinished["complete"]
    lanes = torch.load(unfinished["folder"] / "state.pt", weights_only=True)["lanes"]
    assert lanes and all(0 < int(lane["state"]["done"]) <= 400 for lane in lanes)

    settings = {"attack": "pgd:steps=400,eot=4", "eps": "1/64", "n": 96, "quiet": True}
    resumed, at_once = (
        evaluate(Defense(Linear(), TwoLogits()), gaussian(96), out=tmp_path / name, **settings)
        for name in ("killed", "at once")
    )
    assert resumed.folder == unfinished["folder"], "the run must be found again from another process"
    assert outcome(resumed.folder) == outcome(at_once.folder)


# --- shared


@pytest.mark.parametrize("attack", [NATIVE[0], "square:queries=3,eot=2"])
def test_shards_merged_are_the_run_that_was_not_shared(tmp_path, run, attack):
    whole = outcome(run("at once", attack, n=80))
    for shard in ("2/2", "1/2"):
        folder = run("shared", attack, n=80, shard=shard)
        (found,) = results.find_runs([folder])
        assert found["complete"] == (shard == "1/2"), "who ends last puts the parts together"
    assert outcome(folder) == whole and not list(folder.glob("journal*"))
    assert run("shared", attack, n=80, shard="2/2") == folder and outcome(folder) == whole


def test_a_shard_that_stopped_is_continued_by_itself_or_by_a_run_of_all(tmp_path, run):
    whole = outcome(run("at once", n=80))
    for then in (None, "2/3"):
        name = f"stopped {then}"
        run(name, n=80, shard="1/3")
        with pytest.raises(Incomplete):
            run(name, n=80, shard="2/3", stop_after=0)
        assert [p.name for p in folder_of(tmp_path / name).glob("state*")] == ["state.2-of-3.pt"]
        run(name, n=80, shard=then)
        assert outcome(run(name, n=80))["records.jsonl"] == whole["records.jsonl"]


def test_a_torn_line_of_another_shard_is_left_to_it(tmp_path, run):
    folder = run("shared", n=80, shard="1/3")
    journal = folder / "journal.1-of-3.jsonl"
    torn = journal.read_text()[:-20]
    journal.write_text(torn)
    run("shared", n=80, shard="2/3")
    assert journal.read_text() == torn, "its process may be writing it"
    run("shared", n=80, shard="1/3")
    assert outcome(run("shared", n=80, shard="3/3")) == outcome(run("at once", n=80))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_shard_that_is_none_is_refused(run, shard):
    with pytest.raises(UsageError, match="expected I/N"):
        run("none", shard=shard)


SHARD = """
import sys
import torch
from benchmark import evaluate
from purifiers import Defense
from tests.test_evaluate import Linear, TwoLogits, gaussian

torch.set_num_threads(1)
evaluate(Defense(Linear(), TwoLogits()), gaussian(200), "pgd:steps=60,eot=4", eps="1/64", n=200,
         out=sys.argv[1], shard=sys.argv[2], quiet=True)
"""


@pytest.mark.slow
def test_shards_that_run_at_the_same_time_end_in_one_run(tmp_path):
    """Real processes on one folder; nobody waits for anybody."""
    processes = [
        subprocess.Popen([sys.executable, "-c", SHARD, str(tmp_path / "shared"), f"{k}/3"], cwd=ROOT) for k in (1, 2, 3)
    ]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    whole = evaluate(
        Defense(Linear(), TwoLogits()), gaussian(200), "pgd:steps=60,eot=4", eps="1/64", n=200, out=tmp_path / "whole",
        quiet=True,
    )  # fmt: skip
    folder = tmp_path / "shared" / whole.folder.relative_to(tmp_path / "whole")
    assert outcome(folder) == outcome(whole.folder)
    assert not list(folder.glob("journal*")) and not (folder / "logits").exists()


def test_what_another_process_is_at_work_on_is_not_done_twice(tmp_path, run):
    with pytest.raises(Incomplete):
        run("out", stop_after=0)
    folder = folder_of(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
    with files.sole(folder / ".work.lock", ""), pytest.raises(RunError, match="another process .* --shard 1/2"):
        run("out")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"} == before
    with files.sole(folder / ".work.1-of-2.lock", ""), pytest.raises(RunError, match="another process"):
        run("out", shard="1/2")
    assert outcome(run("out")) == outcome(run("at once"))


def test_a_look_at_a_run_leaves_a_line_that_is_being_written(tmp_path, run, tiny_defense, tiny_images):
    folder = run("seen")
    lines = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").unlink()
    with (folder / "journal.jsonl").open("wb", buffering=0) as at_work:
        at_work.write(lines[:-40])
        looking = Settings(eps="32/255", draws=3, n=8, quiet=True, out=tmp_path / "seen")
        assert Cell(tiny_defense, tiny_images, NATIVE[0], looking).left() == [7]
        at_work.write(lines[-40:])
    assert outcome(run("seen"))["records.jsonl"] == lines


def test_what_is_discarded_is_no_place_where_another_shard_works(tmp_path, run, tiny_defense, tiny_images):
    settings = {"eps": "32/255", "draws": 3, "n": 64, "quiet": True, "out": tmp_path / "shared"}
    one, other = (
        Cell(tiny_defense, tiny_images, NATIVE[0], Settings(shard=f"{k}/2", **settings)).folder for k in (1, 2)
    )
    with one.at_work():
        one.open(64, (1, 28, 28), rows=32)
        with other.at_work():
            other.open(64, (1, 28, 28), rows=32)
            other.discard()
        assert (one.folder / "run.json").exists()
    with other.at_work():
        other.discard()
    assert not one.folder.exists()


def test_who_opens_a_shared_run_first_decides_its_rows_for_all(tmp_path, run):
    """Before anything is recorded: two machines would else merge numbers of two environments without a word."""
    with pytest.raises(Incomplete):
        run("shared", n=80, shard="1/2", rows=64, stop_after=0)
    for state in folder_of(tmp_path / "shared").glob("state*"):
        state.unlink()  # it has opened the run, and nothing else yet
    with pytest.raises(UsageError, match=r"another environment \(rows: 64 → 32\)"):
        run("shared", n=80, shard="2/2", rows=32)
    run("shared", n=80, shard="2/2")
    assert outcome(run("shared", n=80, shard="1/2")) == outcome(run("at once", n=80, rows=64))


def test_a_shard_without_images_is_none(tmp_path, run, capsys):
    folder = run("empty", n=32, shard="2/2", quiet=False)
    assert not folder.exists() and "shard 2/2 has no image among the first 32" in capsys.readouterr().err


def test_ctrl_c_saves_what_is_under_way(tmp_path, run, monkeypatch):
    whole = outcome(run("at once"))
    seen = []

    def interrupted(self) -> None:
        seen.append(0)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as pressed:
        pressed.setattr(engine.Engine, "_pause", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("pressed")
    (lane,) = torch.load(folder_of(tmp_path / "pressed") / "state.pt", weights_only=True)["lanes"]
    assert int(lane["state"]["done"]) == 3
    assert outcome(run("pressed")) == whole and not (folder_of(tmp_path / "pressed") / "state.pt").exists()


def test_fewer_images_of_an_unfinished_run_are_a_run_of_their_own_length(tmp_path, run):
    run("more", n=80, shard="1/2")
    folder = run("more", n=16)
    (found,) = results.find_runs([folder])
    assert len(found["records"]) == 48 and (folder / "records.jsonl").exists()
    assert outcome(run("more", n=80))["records.jsonl"] == outcome(run("at once", n=80))["records.jsonl"]
