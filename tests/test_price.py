"""What a run costs and what it runs on: priced before it begins, within memory, in a chosen arithmetic, and timed."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import benchmark
from attacks import PRECISIONS, Calls
from attacks._calls import Request
from attacks._gradient import ce
from attacks._recompute import ROWS
from attacks._views import Exact
from benchmark import bench, checkpoints, cli, data, evaluate, memory
from benchmark import cell as cells
from benchmark.cell import Cell, Incomplete
from benchmark.errors import RunError
from benchmark.price import Price, duration, price
from benchmark.results import find_runs, read_run
from benchmark.settings import Settings
from purifiers import Defense, Noise, Purifier, Tape
from tests import pretend
from tests.conftest import classifier, images, smooth
from tests.test_cli import tiny_cards
from tests.test_evaluate import Linear, TwoLogits, gaussian

PLENTY = 1 << 40
QUICK = ("--attack", "pgd:steps=1,eot=2", "--batch-size", "32", "--no-preflight")
"""Arguments of a run that is only looked at."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_cards(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def command(tmp_path, weights):
    """A command on tiny networks and four images; arguments are added to it and win over its own."""

    def call(name: str, *arguments: str) -> int:
        return cli.main(
            [name, "--purifier", "diffpure", "--attack", "pgd:steps=2,eot=4", "--n-examples", "4", "--draws", "3",
             "--device", "cpu", "--offline", "--weights", str(weights), "--out", str(tmp_path / "out"), *arguments]
        )  # fmt: skip

    return call


@pytest.fixture
def plan(command, tmp_path, capsys):
    """The object that ``plan --json`` prints, read as strictly as the standard is."""

    def call(*arguments: str) -> dict[str, Any]:
        assert command("plan", "--json", *arguments) == cli.DONE
        assert not (tmp_path / "out").exists(), "plan writes nothing"
        return strictly(capsys.readouterr().out)

    return call


@pytest.fixture
def cell(tmp_path, weights):
    """The cell of ``command``."""

    def build(**settings: Any) -> Cell:
        defense = benchmark.load("diffpure", weights=str(weights), offline=True)
        settings = {"n": 4, "draws": 3, "out": tmp_path / "out", "quiet": True} | settings
        return Cell(defense, "fashion-mnist", "pgd:steps=2,eot=4", Settings(**settings))

    return build


@pytest.fixture
def budget(monkeypatch):
    """Sets the bytes that graphs may take."""
    return lambda count: monkeypatch.setattr(memory, "budget", lambda device, least=0: count)


@pytest.fixture
def floor(cell) -> float:
    """Bytes of a gradient of 32 rows where every stage is recomputed: less, and nothing fits."""
    return ROWS * cell().footprint.least


def strictly(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} isn't JSON")

    return json.loads(text, parse_constant=refuse)


def only_run(folder: Path) -> dict[str, Any]:
    (run,) = find_runs([folder])
    return run


def timing(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]


# --- plan


def test_plan_prices_every_cell_and_sums_them_up(plan):
    found = plan("--purifier", "identity,diffpure", "--devices", "3")
    assert [c["cell"].split()[0] for c in found["cells"]] == ["identity", "diffpure"]
    for priced in found["cells"]:
        assert min(priced["hours"], priced["forward"], priced["gradient"]) > 0
        assert priced["rows"] % ROWS == 0 and priced["fits"] == "fits" and priced["keep"] is None
        a_row = priced["forward"] * (priced["forwards"] - priced["backwards"])
        a_row += priced["gradient"] * priced["backwards"]
        assert priced["hours"] == pytest.approx(4 * a_row / priced["rows"] / 3600)
    assert found["cells"][1]["disk_bytes"] == 4 * 4 * (28 * 28 + 10 * (3 * 3 + 8)), (
        "pixels; 3 × 3 draws and 8 of select"
    )
    assert found["disk_bytes"] == sum(c["disk_bytes"] for c in found["cells"])
    assert found["hours"] == pytest.approx(sum(c["hours"] for c in found["cells"]))
    assert found["devices"] == 3 and found["hours_on_devices"] == pytest.approx(found["hours"] / 3)


def test_plan_says_it_in_words(command, tmp_path, capsys):
    assert command("plan", "--devices", "3") == cli.DONE
    output = capsys.readouterr().out
    assert " a call of 32 rows, " in output and " s with its gradient; fits, all graphs kept (" in output
    assert "KiB of disk" in output and "in all about 1 s on this device, 1 s on 3 such" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("devices", ["0", "-1"])
def test_no_device_is_bad_usage(command, capsys, devices):
    assert command("plan", f"--devices={devices}") == cli.USAGE
    output = capsys.readouterr()
    assert f"--devices {devices}: at least one is needed" in output.err and output.out == ""


def test_a_view_that_does_not_apply_is_named_and_the_other_cells_are_priced(command, plan, capsys):
    arguments = ("--purifier", "vae,diffpure:rule=sde", "--view", "adjoint")
    vae, diffpure = plan(*arguments)["cells"]
    assert "adjoint needs a purifier that integrates an SDE" in vae["not_applicable"] and "hours" not in vae
    assert diffpure["hours"] > 0 and "not_applicable" not in diffpure
    assert command("plan", *arguments) == cli.DONE
    assert "vae + resnet" in (output := capsys.readouterr().out) and "not applicable: adjoint needs" in output


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 s"),
        (5, "5 s"),
        (59, "59 s"),
        (60, "1.0 min"),
        (90, "1.5 min"),
        (1800, "30 min"),
        (3600, "1.0 h"),
        (4_444_200, "1,234 h"),
    ],
)
def test_hours_as_people_say_them(seconds, words):
    assert duration(seconds / 3600) == words


def test_a_price_in_words():
    price = Price(64, 0.5, 1.25, 2.5, 3, "fits with 64 rows", 3 << 30, 5 << 20)
    assert str(price).strip() == (
        "about 2.5 h: 0.5 s a call of 64 rows, 1.2 s with its gradient; fits with 64 rows, "
        "graphs of the last 3 stages kept (3.0 GiB); 5.0 MiB of disk"
    )
    assert "gradient" not in str(price._replace(gradient=0.0)), "of an attack that takes none"
    assert "e+" not in str(price._replace(forward=123.4, gradient=456.7)), "seconds, not powers of ten"
    unfit = str(price._replace(fits="doesn't fit", hours=None))
    assert "doesn't fit" in unfit and "3.0 GiB" in unfit and "inf" not in unfit


class Starting(Linear):
    """Takes a third of a second the first time that it is called in a way, as what is compiled takes minutes."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: set[tuple[int, bool]] = set()

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        if (way := (len(x), torch.is_grad_enabled())) not in self._begun:
            self._begun.add(way)
            time.sleep(0.3)
        return super().clean(x, noise)


def test_what_only_the_first_call_takes_is_not_taken_for_the_price_of_every_call(tmp_path):
    starting = Cell(
        Defense(Starting(), TwoLogits()),
        gaussian(4),
        "pgd",
        Settings(n=4, eps="1/64", rows=64, out=tmp_path, quiet=True),
    )
    found = price(starting)
    assert max(found.forward, found.gradient) < 0.15


# --- memory


@pytest.mark.parametrize("rows", [32, 64, 96])
def test_where_memory_is_short_fewer_rows_are_taken(plan, command, floor, budget, capsys, rows):
    budget(floor * (rows / ROWS + 0.5))
    (priced,) = plan("--n-examples", "32")["cells"]
    assert priced["fits"] == f"fits with {rows} rows" and priced["rows"] == rows and priced["keep"] is not None
    assert command("plan", "--n-examples", "32") == cli.DONE
    assert f"; fits with {rows} rows, graphs of the last {priced['keep']} stages kept" in capsys.readouterr().out


def test_rows_that_were_asked_for_and_do_not_fit_are_not_said_to(plan, floor, budget):
    budget(2.5 * floor)
    (asked,) = plan("--batch-size", "128")["cells"]
    assert asked["fits"] != "fits"


def test_a_large_network_may_take_more_of_a_cpus_memory_than_a_small_one(monkeypatch):
    cpu, free = torch.device("cpu"), 20 << 30
    monkeypatch.setattr(memory, "free", lambda: free)
    assert memory.budget(cpu) == memory.budget(cpu, 1 << 30) == memory.CPU_BUDGET < 5 << 30
    assert memory.budget(cpu, 5 << 30) == 5 << 30, "there is room for its smallest call"
    assert memory.budget(cpu, 15 << 30) == free // 2, "there isn't"


def test_a_network_takes_the_memory_that_its_smallest_call_needs(cell, floor, monkeypatch):
    monkeypatch.setattr(memory, "CPU_BUDGET", int(floor / 2))
    assert cell().fitting == ROWS and cell().keep == 0
    monkeypatch.setattr(memory, "free", lambda: int(1.9 * floor))
    assert cell().fitting == 0


def test_what_does_not_fit_has_no_price_and_the_document_stays_json(plan, floor, budget):
    budget(0.9 * floor)
    found = plan("--purifier", "identity,diffpure")
    identity, diffpure = found["cells"]
    assert diffpure["fits"] == "doesn't fit" and diffpure["graph_bytes"] == pytest.approx(floor)
    assert diffpure["hours"] is None and found["hours"] == identity["hours"] > 0, "the sum is of what can run"


@pytest.mark.parametrize("more", [[], ["--yes"]], ids=["", "yes"])
def test_what_does_not_fit_is_not_run_and_the_memory_it_takes_is_named(command, floor, budget, tmp_path, capsys, more):
    budget(floor / 2)
    assert command("run", *more) == cli.USAGE
    message = capsys.readouterr().err
    assert (
        "the gradient of 32 rows needs" in message
        and "iB may be used here" in message
        and "a device with more memory" in message
    )
    assert "inf h" not in message
    assert not (tmp_path / "out").exists()


def test_a_cell_that_does_not_fit_costs_no_other_cell_its_row(command, floor, budget, tmp_path, capsys):
    budget(0.9 * floor)
    assert command("run", *QUICK[:2], "--no-preflight", "--purifier", "identity,diffpure") != cli.INCOMPLETE
    output = capsys.readouterr()
    assert "diffpure" in output.err and "iB may be used here" in output.err
    assert "| identity |" in output.out, "hours of work without a table"


def test_graphs_are_kept_as_far_as_memory_goes(cell, floor, budget):
    whole = ROWS * cell().footprint.stored(None)
    kept = []
    for count in (PLENTY, whole, 0.9 * whole, 0.7 * whole, 1.1 * floor, 0.9 * floor, 0):
        budget(count)
        kept.append(cell(rows=ROWS).keep)
    assert kept[:2] == [None, None] and None not in kept[2:]
    assert kept[2:] == sorted(kept[2:], reverse=True) and kept[2] > kept[-1] == 0


def test_copies_of_an_image_take_the_memory_of_so_many_images(plan):
    one, two = (plan("--copies", n, "--batch-size", "32")["cells"][0]["graph_bytes"] for n in "12")
    assert two == pytest.approx(2 * one, rel=0.01)


@pytest.mark.parametrize("view", ["blind", "bpda"])
def test_a_view_that_keeps_no_graph_of_the_purifier_is_not_charged_for_it(plan, view):
    charged, exact = (plan("--view", v, "--batch-size", "32")["cells"][0]["graph_bytes"] for v in (view, "exact"))
    assert charged < exact


def test_the_graph_of_the_classifier_counts_too(plan):
    assert plan("--purifier", "identity", "--batch-size", "32")["cells"][0]["graph_bytes"] > 0


def test_what_memory_there_is_changes_no_byte_of_the_records(command, floor, budget, tmp_path):
    records, kept = [], []
    for count in (PLENTY, 1.1 * floor):
        budget(count)
        out = tmp_path / str(int(count))
        assert command("run", *QUICK, "--out", str(out)) == cli.DONE
        folder = only_run(out)["folder"]
        records.append((folder / "records.jsonl").read_bytes())
        kept += [line["keep"] for line in timing(folder)]
    assert kept[0] is None and kept[1] is not None, "or this test is blind"
    assert records[0] == records[1]


# --- what was agreed to


def test_what_takes_longer_than_agreed_is_not_begun(command, tmp_path, capsys):
    assert command("run", "--max-hours", "0") == cli.USAGE
    output = capsys.readouterr()
    assert "this takes about 1 s here, and --max-hours is 0: nothing was run. --yes runs it" in output.err
    assert output.out == "" and not (tmp_path / "out").exists()

    assert command("run", *QUICK, "--max-hours", "0", "--yes") == cli.DONE
    table = capsys.readouterr().out
    assert len(only_run(tmp_path / "out")["records"]) == 4

    assert command("run", *QUICK, "--max-hours", "0") == cli.DONE, "all is recorded: nothing is left to agree to"
    assert capsys.readouterr().out == table
    assert command("plan", "--attack", "pgd:steps=1,eot=2", "--json") == cli.DONE
    assert strictly(capsys.readouterr().out)["hours"] == 0


# --- arithmetic


def test_precision_is_of_the_gradient_alone_and_part_of_the_identity(command, tmp_path):
    clean = {}
    for precision in ("float32", "float64", "bf16"):
        assert command("run", *QUICK, "--precision", precision) == cli.DONE
    for run in find_runs([tmp_path / "out"]):
        with np.load(run["folder"] / "logits.npz") as logits:
            clean[run["identity"]["precision"]] = logits["clean"]
    assert sorted(clean) == ["bf16", "float32", "float64"]
    assert clean["float32"].dtype == np.float32
    assert np.array_equal(clean["bf16"], clean["float32"]) and np.array_equal(clean["float64"], clean["float32"])


def test_gradients_in_another_arithmetic_are_marked_in_the_table(command, capsys):
    assert command("run", *QUICK, "--precision", "bf16") == cli.DONE
    assert "bf16" in capsys.readouterr().out, "a reader would take it for an attack in float32"


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("tf32", "--precision tf32: tf32 is arithmetic of NVIDIA GPUs, not of cpu"), ("float46", "did you mean float64")],
)
def test_an_arithmetic_that_there_is_not(command, tmp_path, capsys, precision, expected):
    assert command("run", "--precision", precision) == cli.USAGE
    message = capsys.readouterr().err
    assert expected in message and "bf16" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_a_gradient_in_another_arithmetic_is_near_and_its_verdict_is_the_same(make, precision):
    defense = Defense(smooth(make(("diffpure", {}))), classifier()).float()
    x, y, tape = images(8, dtype=torch.float32), torch.arange(8), Tape(0, "attack", torch.arange(8))

    def ask(precision: str, gradient: bool = True):
        return Calls(32, PRECISIONS[precision]()).ask(Request(defense, Exact(), x, tape, 1, ce, (y,), gradient))

    found, single = ask(precision).gradients, ask("float32").gradients
    assert found.dtype == torch.float32 and not torch.equal(found, single)
    if precision == "float64":
        exact = copy.deepcopy(defense).double()
        z = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(ce(exact(z, tape), y).sum(), z)
        assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (torch.cosine_similarity(found.flatten(1), single.flatten(1)) > 0.9).all()
    assert torch.equal(ask(precision, gradient=False).logits, ask("float32", gradient=False).logits)
    assert all(p.dtype == torch.float32 for p in defense.parameters()), "the defense itself stays as it was"


# --- threads and layout


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_are_set_and_recorded(command, tmp_path, two_threads):
    assert command("run", *QUICK, "--threads", "1") == cli.DONE
    assert torch.get_num_threads() == 1
    assert only_run(tmp_path / "out")["environment"]["threads"] == 1


def test_no_thread_is_bad_usage(command, capsys, two_threads):
    assert command("run", "--threads", "0") == cli.USAGE
    assert "--threads 0: at least one is needed" in capsys.readouterr().err and torch.get_num_threads() == 2


def test_another_layout_is_recorded_and_hardly_changes_a_class(command, tmp_path):
    runs = []
    for name, more in (("plain", []), ("last", ["--channels-last"])):
        assert command("run", *QUICK, "--n-examples", "10", "--out", str(tmp_path / name), *more) == cli.DONE
        runs.append(only_run(tmp_path / name))
    plain, last = runs
    assert last["environment"]["channels_last"] is True and "channels_last" not in plain["environment"]
    assert last["identity"] == plain["identity"]
    drawn = [[c for r in run["records"] for k in ("clean", "adv", "random") for c in r[k]] for run in runs]
    assert len(drawn[0]) == 10 * 9 and np.mean(np.equal(*drawn)) > 0.95


def test_a_run_begun_in_another_layout_is_not_continued_in_the_plain_one(command, capsys):
    assert command("run", *QUICK, "--channels-last", "--stop-after", "0") == cli.INCOMPLETE
    capsys.readouterr()
    assert command("run", *QUICK) == cli.USAGE
    assert "begun in another environment (channels_last" in capsys.readouterr().err


# --- networks are loaded once


def test_a_command_loads_each_network_once(command, monkeypatch):
    built = []
    build = checkpoints.build

    def counting(kind: str, text: str, need: Any):
        built.append((kind, text))
        return build(kind, text, need)

    monkeypatch.setattr(checkpoints, "build", counting)
    assert command(
        "run", *QUICK, "--purifier", "vae,diffpure", "--attack", "pgd:steps=1,eot=1,uniform:queries=1",
        "--seeds", "0,1", "--n-examples", "1", "--draws", "1",
    ) == cli.DONE  # fmt: skip
    assert sorted(built) == [("classifiers", "resnet"), ("purifiers", "diffpure"), ("purifiers", "vae")]


def test_the_shelf_forgets_what_was_not_asked_for_longest(weights, monkeypatch):
    shelf, need = checkpoints.Shelf(), checkpoints.Need(data.form("fashion-mnist"), roots=(weights,))

    def ask(name: str) -> checkpoints.Component:
        return shelf.build("classifiers" if name.startswith("resnet") else "purifiers", name, need)

    def held() -> list[str]:
        return [text for _, text, _ in shelf.built]

    diffpure, resnet = ask("diffpure"), ask("resnet")
    room = sum(t.numel() * t.element_size() for c in (diffpure, resnet) for t in c.module.state_dict().values())
    monkeypatch.setattr(checkpoints.Shelf, "LIMIT", room)
    assert ask("diffpure") is diffpure
    ask("resnet-at")  # as large as resnet, whose place it takes
    assert held() == ["diffpure", "resnet-at"] and ask("diffpure") is diffpure
    again = ask("resnet")
    assert again is not resnet and again.weights == resnet.weights and held() == ["diffpure", "resnet"]
    monkeypatch.setattr(checkpoints.Shelf, "LIMIT", 0)
    for name in ("vae", "resnet", "vae"):
        assert str(ask(name).spec).startswith(name) and held() == [name], "the one that was asked for stays"


# --- memory that runs out all the same


class Cramped(Linear):
    """Has memory for so many rows and no more."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def clean(self, x: Tensor, noise: Noise) -> Tensor:
        if len(x) > self.most:
            raise torch.cuda.OutOfMemoryError(f"out of memory at {len(x)} rows")
        return super().clean(x, noise)


@pytest.fixture
def cramped(tmp_path):
    """Evaluate ``Cramped``, by default with memory for 64 rows, into a folder of that name."""

    def call(name: str, most: int = 64, n: int = 64, **settings: Any) -> dict[str, Any]:
        settings = {"eps": "1/64", "draws": 3, "quiet": True} | settings
        defense = Defense(Cramped(most), TwoLogits())
        result = evaluate(defense, gaussian(96), "pgd:steps=3,eot=4", n=n, out=tmp_path / name, **settings)
        return read_run(result.folder)

    return call


@pytest.mark.parametrize(("rows", "halved"), [(128, [64]), (None, [64]), (256, [128, 64])])
def test_a_run_out_of_memory_goes_on_with_half_the_rows_and_ends_in_the_same_bytes(cramped, rows, halved, capsys):
    run, roomy = cramped("halved", rows=rows), cramped("begun with 64", rows=64)
    assert run["halved_to"] == halved and run["environment"]["rows"] == 64 and "halved_to" not in roomy
    assert "memory ran out at 128 rows; going on with 64" in capsys.readouterr().err
    assert {line["batch"] for line in timing(run["folder"])} == {64}
    for name in ("records.jsonl", "adversarial.npy"):
        assert (run["folder"] / name).read_bytes() == (roomy["folder"] / name).read_bytes()


@pytest.mark.parametrize("rows", [None, 128])
def test_a_run_that_was_halved_and_stopped_is_continued_by_the_same_command(cramped, rows):
    with pytest.raises(Incomplete):
        cramped("stopped", rows=rows, stop_after=0)
    run = cramped("stopped", rows=rows)
    assert run["complete"] and run["environment"]["rows"] == 64
    assert run["halved_to"] == [64], "what happened to a run stays written down"


@pytest.mark.parametrize("preflight", [True, False], ids=["preflight", "no-preflight"])
@pytest.mark.parametrize(("most", "rows"), [(0, None), (0, 64), (16, None)])
def test_memory_that_never_suffices_is_an_error_that_says_so(cramped, most, rows, preflight):
    with pytest.raises(RunError, match=r"memory ran out[\s\S]*take a device with more"):
        cramped("hopeless", most=most, rows=rows, preflight=preflight)


# --- bench


class Bare(Purifier):
    """z_{k+1} = z_k + 0.01 n: a purifier with steps and no network."""

    def __init__(self, *, steps: int = 2, rule: str = "sde"):
        super().__init__()
        self.steps, self.rule = steps, rule

    def start(self, x: Tensor, noise: Noise) -> tuple[Tensor, None]:
        return x, None

    def step(self, k: int, state: Tensor, context: None, noise: Noise) -> Tensor:
        return state + 0.01 * noise.normal("step", k, like=state)

    def finish(self, state: Tensor, context: None) -> Tensor:
        return state.clamp(0, 1)


class Steps(Bare):
    """z_{k+1} = z_k + 0.1 c(z_k) + 0.01 n: one with a network of one convolution."""

    def __init__(self, *, steps: int = 2, rule: str = "sde"):
        super().__init__(steps=steps, rule=rule)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Conv2d(1, 1, 3, padding=1)

    def step(self, k: int, state: Tensor, context: None, noise: Noise) -> Tensor:
        return super().step(k, state, context, noise) + 0.1 * self.net(state)


class Ten(nn.Sequential):
    """Ten linear scores of an image."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Flatten(), nn.Linear(28 * 28, 10))


@pytest.fixture
def timed(monkeypatch):
    """``bench`` of small networks, in few calls."""
    monkeypatch.setitem(cells.MOST_ROWS, "cpu", 32)
    for name, value in {"LENGTHS": (1, 2), "ATTACKED": 3, "ITERATIONS": 1, "RETIRED": 4, "RETIRE": 1}.items():
        monkeypatch.setattr(bench, name, value)
    command = ["bench", "--classifier", f"file:{__file__}:Ten", "--repetitions", "1", "--batch-size", "2"]
    return lambda *arguments: cli.main([*command, "--device", "cpu", *arguments])


def test_bench_prints_one_object_and_writes_it_under_the_name_of_the_device(timed, tmp_path, capsys):
    assert timed("--purifier", f"file:{__file__}:Steps", "--json", "--out", str(tmp_path / "bench")) == cli.DONE
    printed = capsys.readouterr().out
    found = strictly(printed)

    assert [length["steps"] for length in found["lengths"]] == [1, 2] == [c["network_calls"] for c in found["lengths"]]
    for of in (*found["lengths"], found["attack"], found["network"], *found["precision"]):
        ratios = {name: spread for name, spread in of.items() if name.endswith("_ratio")}
        assert ratios and all(0 < r["low"] <= r["median"] <= r["high"] for r in ratios.values())
    assert [p["precision"] for p in found["precision"]] == ["float32", "float64", "bf16"]
    assert found["precision"][0]["cosine"] == pytest.approx(1) and found["precision"][0]["sign_agreement"] == 1
    assert 0 < found["attack"]["occupancy"]["median"] <= 1 and found["retire"]["time_ratio"] > 0
    assert len(found["checks"]) == 3 * 2 + 3
    for check in found["checks"]:
        assert set(check) == {"id", "status", "value", "threshold", "advice", "low", "high"}
        met = (
            check["value"] >= check["threshold"] if check["id"] == "occupancy" else check["value"] <= check["threshold"]
        )
        assert check["status"] == ("pass" if met else "warn")

    ((page,), (document,)) = ([*(tmp_path / "bench").glob(f"*.{kind}")] for kind in ("md", "json"))
    assert page.stem == document.stem
    assert page.stem.endswith(f"-{torch.get_num_threads()}-threads")
    assert document.read_text() == printed
    text = page.read_text()
    assert timed(str(document)) == cli.DONE
    assert capsys.readouterr().out == text, "a saved measurement is printed again as it was"
    (tmp_path / "other.json").write_text("[]")
    assert timed(str(tmp_path / "other.json")) == cli.USAGE
    assert "isn't what bench --json prints" in capsys.readouterr().err
    assert "2 rows, 1 repetitions" in text and "| occupancy | " in text and "| float64 | 1.000000" in text


def test_bench_on_a_gpu(timed, monkeypatch, capsys):
    monkeypatch.setattr(bench.Bench, "_profile", lambda self: "")  # torch's profiler looks for memory that isn't there
    with pretend.device():
        assert timed("--purifier", f"file:{__file__}:Steps", "--device", "cuda", "--json") == cli.DONE
    found = strictly(capsys.readouterr().out)
    assert found["environment"]["device_name"] == "Pretended"
    assert [p["precision"] for p in found["precision"]] == ["float32", "float64", "tf32", "bf16"]


@pytest.mark.parametrize("purifier", ["vae", "identity"])
def test_bench_of_a_purifier_without_steps_is_bad_usage(timed, capsys, purifier):
    assert timed("--purifier", purifier) == cli.USAGE
    output = capsys.readouterr()
    assert purifier in output.err and "steps" in output.err and output.out == ""


def test_bench_of_a_purifier_without_a_network_is_bad_usage(timed, capsys):
    assert timed("--purifier", f"file:{__file__}:Bare") == cli.USAGE
    assert "network" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch-size", "--repetitions"])
def test_bench_of_nothing_is_bad_usage(timed, capsys, option):
    assert timed(option, "0") == cli.USAGE
    assert "at least 1" in capsys.readouterr().err
