"""Figures: each with its data, drawn from nothing else, threat models apart."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmark import cli, evidence, plots, report, specs
from benchmark.config import slug
from benchmark.errors import UsageError
from benchmark.grids import UNSHARED, lines
from benchmark.plots import _over, _plane, figures
from benchmark.results import find_runs
from tests.synthetic import made

ROOT = Path(__file__).resolve().parents[1]


def names(paths: list[Path]) -> set[str]:
    return {path.stem for path in paths}


def test_every_figure_is_pdf_png_and_its_data(tmp_path):
    from matplotlib import image

    runs = find_runs([ROOT / "results" / "eight"])
    other = copy.deepcopy(runs[0])
    other["identity"] |= {"norm": "StAdv", "eps": "0.05"}
    written = figures([*runs, other], tmp_path / "figures")
    assert names(written) == {
        "clean-robust-fashion-mnist-linf-16-255-quick-n64", "clean-robust-fashion-mnist-stadv-0.05-quick-n64",
        "cost-fashion-mnist-linf-16-255-quick-n64", "cost-fashion-mnist-stadv-0.05-quick-n64",
        "attacks-fashion-mnist-diffpure-resnet-linf-16-255-quick-n64",
        "attacks-fashion-mnist-vae-resnet-linf-16-255-quick-n64",
    }  # fmt: skip
    assert sorted(written) == sorted((tmp_path / "figures").iterdir()) and len(written) == 18
    for path in written:
        if path.suffix == ".png":
            assert np.std(image.imread(path)) > 0.05, "a blank picture"
        if path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF")
        if path.suffix == ".csv":
            assert len(set(pd.read_csv(path)["norm"])) == 1
    attacks = pd.read_csv(tmp_path / "figures" / "attacks-fashion-mnist-vae-resnet-linf-16-255-quick-n64.csv")
    rows = [r for r in report.rows(runs, worst_case=True) if r["purifier"] == "vae"]
    assert sorted(attacks["robust"]) == pytest.approx(sorted(r["robust"] for r in rows))
    assert len(attacks) == 9 and attacks["attack"].iloc[-1] == evidence.WORST


def test_a_line_over_the_radius_where_there_are_several(tmp_path):
    written = figures(find_runs([ROOT / "results" / "headline"]), tmp_path, ["eps"])
    attacks = ("pgd", "pgd:momentum=0.75,halving=true", "autoattack", evidence.WORST)
    assert names(written) == {f"eps-fashion-mnist-linf-{slug(attack)}-n256" for attack in attacks}
    for attack in attacks:
        radius = pd.read_csv(tmp_path / f"eps-fashion-mnist-linf-{slug(attack)}-n256.csv")
        assert set(radius["eps"]) == {"16/255", "0.1"} and len(radius) == 12 and set(radius["attack"]) == {attack}


def grid() -> list[dict]:
    """A run of diffpure, as it would stand at other values of an option of its own and of the attack's."""
    (base,) = find_runs([ROOT / "results" / "families" / "fashion-mnist" / "diffpure-ddim"])

    def at(kind: str, option: str, value: object, **identity: object) -> dict:
        run = copy.deepcopy(base)
        spec = specs.parse(run["identity"][kind])
        run["identity"] |= {kind: str(replace(spec, options=spec.options | {option: value}))} | identity
        run["names"][kind] += f":{option}={value}"
        return run

    return [
        base,
        at("purifier", "t_star", 0.1, draws=17), at("purifier", "t_star", 0.3), at("purifier", "rule", "ode"),
        at("attack", "steps", 40), at("attack", "loss", "dlr"),
    ]  # fmt: skip


def test_lines_join_what_differs_in_one_number():
    found = {line.axis: line for line in lines(grid())}
    assert set(found) == {"t_star", "attack steps"}, "a word is no axis"
    dial, attack = found["t_star"], found["attack steps"]
    assert dial.values == (0.1, 0.2, 0.3) and dial.purifier == "diffpure-ddim" and dial.attack == "pgd" and dial.dial
    assert attack.values == (20, 40) and attack.attack == "pgd" and not attack.dial
    assert [row["purifier"] for _, row in dial.points] == [
        "diffpure-ddim:t_star=0.1", "diffpure-ddim", "diffpure-ddim:t_star=0.3"
    ]  # fmt: skip


OTHER = {
    "dataset": "mnist", "fingerprint": "0", "classifier": "resnet-at", "weights": {"purifier.unet": "0"}, "copies": 2,
    "combine": "vote", "norm": "L2", "eps": "8/255", "view": "bpda", "attacker": "vae", "seed": 7, "precision": "bf16",
    "protocol": 2,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_no_line_through_what_differs_in_more_than_its_number(key):
    base, other, *_ = copy.deepcopy(grid())
    assert [line.axis for line in lines([base, other])] == ["t_star"]
    other["identity"][key] = OTHER[key]
    assert lines([base, other]) == []


def test_a_point_that_something_recorded_contradicts_is_drawn_empty(tmp_path):
    """The stronger attack need not be drawn: it may stand beside."""
    runs = [made(0.8, eps=eps) for eps in ("8/255", "16/255")]
    stronger = made(0.2, attack="autoattack", eps="16/255")
    (line,) = lines(runs, [stronger])
    assert [row["grade"] for row in line.rows] == ["C", "F"]
    csv = next(path for path in figures(runs, tmp_path, ["eps"], [stronger]) if path.suffix == ".csv")
    assert [*pd.read_csv(csv)["grade"]] == ["C", "F"]

    from matplotlib import pyplot as plt

    for draw, several in ((_over, [line]), (_plane, [line._replace(axis="t_star")])):
        figure = draw(several, ["vae"], "title", plt)
        axes = figure.axes[0]
        empty = [drawn for drawn in axes.lines if drawn.get_markerfacecolor() == "white" and len(drawn.get_xdata())]
        assert [tuple(drawn.get_ydata()) for drawn in empty] == [(80.0,)]
        assert "empty: grade F" in [text.get_text() for text in axes.get_legend().get_texts()]
        plt.close(figure)


def test_every_part_of_a_cell_keeps_lines_apart():
    assert {*OTHER, *UNSHARED} == set(evidence.CELL)


def test_no_line_through_other_images_or_other_attacks():
    base, other, *_ = grid()
    fewer = other | {"records": other["records"][:8]}
    assert lines([base, fewer]) == []
    second = copy.deepcopy(base)
    second["identity"]["attack"], second["names"]["attack"] = "apgd:steps=20", "apgd"
    alone = lines([base, second, other])
    assert [(line.attack, len(line.rows)) for line in alone] == [("pgd", 2)], "no worst case of one attack beside two"


def test_a_zero_that_means_all_is_no_point_of_a_curve():
    runs = find_runs([ROOT / "results" / "dials"])
    found = {(line.axis, line.purifier): line.values for line in lines(runs)}
    assert {run["names"]["purifier"] for run in runs} >= {"vqvae:codes=0", "vae:temperature=0.0"}
    assert 0 not in found["codes", "vqvae"] and 0 in found["temperature", "vae"]


def test_of_two_runs_at_one_value_the_one_of_more_draws_counts():
    base, other, *_ = grid()
    more = copy.deepcopy(other)
    more["identity"]["draws"] = 18
    for record in more["records"]:
        record["adv"] = record["adv"] * 2
    for order in ([base, other, more], [more, base, other]):
        (line,) = lines(order)
        assert line.rows[0]["draws"] == 2 * line.rows[1]["draws"]


def test_copies_stand_in_the_label_of_a_line():
    runs = grid()[:2]
    for run in runs:
        run["identity"]["copies"] = 4
    (line,) = lines(runs)
    assert line.purifier == "diffpure-ddim × 4 (logits)"


def test_figures_of_one_name_are_both_kept(tmp_path):
    base, other, *_ = grid()
    wide = copy.deepcopy([base, other])
    for run in wide:
        run["identity"]["precision"] = "bf16"
    written = figures([base, other, *wide], tmp_path, ["t_star", ""])
    assert len(set(written)) == len(written)


def test_a_grid_of_a_dial_makes_its_curve_and_the_plane(tmp_path):
    written = figures(grid(), tmp_path, ["t_star", "dials", "attack-steps"])
    threat = "fashion-mnist-linf-16-255-pgd-n64"
    assert names(written) == {f"t-star-{threat}", f"dials-{threat}", f"attack-steps-{threat}"}
    assert list(pd.read_csv(tmp_path / f"dials-{threat}.csv")["purifier"]) == [
        "diffpure-ddim:t_star=0.1", "diffpure-ddim", "diffpure-ddim:t_star=0.3"
    ]  # fmt: skip


def test_nothing_to_draw_is_said(tmp_path, capsys):
    with pytest.raises(UsageError, match="no finished run"):
        figures([], tmp_path)
    with pytest.raises(UsageError, match="no finished run to draw as dials; there are clean-robust-"):
        figures(find_runs([ROOT / "results" / "headline"]), tmp_path, ["dials"])
    assert cli.main(["report", str(ROOT / "results" / "full"), "--figures", "--out", str(tmp_path / "f")]) == 0
    assert str(tmp_path / "f") in capsys.readouterr().out


def test_the_headline_of_a_defense_is_its_worst_case_under_each_protocol():
    found = {}
    for run, records, _ in evidence.headline(find_runs([ROOT / "results"])):
        row = report.row(run, records)
        key = tuple(row[k] for k in ("dataset", "purifier", "classifier", "norm", "eps", *report.PROTOCOL))
        assert key not in found
        found[key] = run
    for budget, n in (("quick", 256), ("quick", 64), ("paper", 64)):
        run = found["fashion-mnist", "diffpure", "resnet", "Linf", "16/255", budget, n, "float32", 1]
        assert run["names"]["attack"] == evidence.WORST and run["identity"]["view"] == "exact"


def test_what_a_grid_varied_without_a_number_stands_side_by_side(tmp_path):
    """Views, seeds and copies: a bar each, of one attack on one defense; what differs in two of them shares none."""
    runs = [
        made(0.5), made(0.7, view="bpda"), made(0.8, view="blind"), made(0.5, seed=1), made(0.6, copies=4),
        made(0.3, eps="32/255"), made(0.4, attack="autoattack"),
    ]  # fmt: skip
    written = figures(runs, tmp_path, ["views", "seeds", "copies"])
    stem = "fashion-mnist-vae-resnet-pgd-linf-16-255-n40"
    assert names(written) == {f"views-{stem}", f"seeds-{stem}", f"copies-{stem}"}
    shown = {kind: pd.read_csv(tmp_path / f"{kind}-{stem}.csv") for kind in ("views", "seeds", "copies")}
    assert list(shown["views"]["view"]) == ["exact", "bpda", "blind"] and list(shown["seeds"]["seed"]) == [0, 1]
    assert len(shown["copies"]) == 2 and set(shown["views"]["attack"]) == {"pgd"}


def test_what_another_dominates_is_on_no_front():
    def row(clean: float, robust: float) -> dict:
        return {"clean": clean, "robust": robust}

    one = row(0.9, 0.5)
    for other, dominated in (
        (row(0.9, 0.4), True), (row(0.8, 0.5), True), (row(0.8, 0.4), True), (row(0.9, 0.5), False),
        (row(0.8, 0.6), False), (row(0.95, 0.0), False),
    ):  # fmt: skip
        assert plots._dominates(one, other) == dominated, other


def test_what_a_grade_withholds_is_on_no_front(tmp_path):
    runs = [made(0.5), made(0.2, attack="square", gradients=0.0, budget="standard"), made(0.1, purifier="jpeg")]
    figures(runs, tmp_path, ["clean-robust", "cost"])
    shown = pd.read_csv(tmp_path / "clean-robust-fashion-mnist-linf-16-255-quick-n40.csv")
    assert dict(zip(shown["purifier"], shown["grade"], strict=True)) == {"vae": "F", "jpeg": "C"}
    assert len(pd.read_csv(tmp_path / "cost-fashion-mnist-linf-16-255-standard-n40.csv")) == 1
