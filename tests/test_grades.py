"""Grades: a number that something recorded contradicts is withheld; what nothing tried to contradict is no A."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmark import audit, cells, cli, config, evidence, grades, report, specs, stats
from benchmark.compact import compact
from benchmark.settings import Settings
from tests.synthetic import made

ROOT = Path(__file__).resolve().parents[1]


def graded(run: dict, *others: dict) -> grades.Grade:
    """The grade of one run beside others."""
    return grades.grades([(run, run["records"], [run])], [run, *others])[0]


def status(grade: grades.Grade, name: str) -> str:
    return next(check.status for check in grade.checks if check.id == name)


ALL = (
    made(0.5, attack="autoattack"),
    made(0.6, attack="square", gradients=0.0),
    made(0.6, attack="transfer"),
    made(0.5, budget="standard", gradients=500.0),
)
"""What an A asks for beside PGD at 50 %: AutoAttack, a search that only looks, what fools the classifier alone, and a
longer one; none of them stronger."""


def test_an_a_needs_all_that_could_have_contradicted_it():
    run = made(0.5)
    assert graded(run, *ALL).letter == "A"
    for k, name in {0: "headline", 1: "looking", 2: "transferred"}.items():
        grade = graded(run, *(one for j, one in enumerate(ALL) if j != k))
        assert grade.letter == "C" and status(grade, name) == "not run"
    grade = graded(run, *ALL[:3])
    assert grade.letter == "B" and status(grade, "longer") == "warn", "of AutoAttack's steps none is more than PGD's"
    twice = made(0.5, budget="custom", spec="pgd:eot=8,steps=20")
    assert graded(run, *ALL[:3], twice).letter == "A"
    assert graded(run | {"preflight": False}, *ALL).letter == "B"
    assert graded(run | {"mixed_environment": True}, *ALL).letter == "B"
    assert graded(made(0.5, noise="stream"), *ALL).letter == "B"
    assert status(graded(made(0.5, n=31), *ALL), "images") == "not run"


def test_what_hardly_tried_confirms_nothing():
    """One step, one query, one image, another's gradients: none of it counts as tried."""
    run = made(0.5)
    for k, weak, name in (
        (0, made(0.5, attack="autoattack", spec="autoattack:eot=1,steps=1"), "headline"),
        (0, made(1.0, attack="autoattack", n=20), "headline"),
        (1, made(0.6, attack="square", gradients=0.0, spec="square:queries=1"), "looking"),
        (1, made(0.6, attack="transfer", gradients=0.0), "looking"),
        (2, made(0.6, attack="transfer", spec="transfer:steps=10"), "transferred"),
        (2, made(0.6, attack="transfer", spec="transfer:step_size=0.001,steps=20"), "transferred"),
        (2, made(0.6, seed=1), "transferred"),
    ):
        grade = graded(run, *(one for j, one in enumerate(ALL) if j != k), weak)
        assert grade.letter == "C" and status(grade, name) == "not run", weak["identity"]["attack"]
    assert status(graded(made(0.5, attack="transfer", gradients=80.0)), "gradients") == "not run"
    crawls = made(0.5, attack="uniform", spec="torchattacks:BIM,alpha=1e-09,steps=20", gradients=20.0)
    assert status(graded(crawls), "gradients") == "not run", "20 steps that reach nothing"
    for name, spec, display in (
        (
            "autoattack",
            "autoattack:version=rand,backend=pyautoattack,steps=20",
            "APGD-CE+DLR (20 it, pyautoattack)",
        ),
        ("autoattack", "autoattack:version=standard", "AutoAttack (standard, pyautoattack 0.2.0)"),
        ("pgd", "pgd:loss=dlr,steps=20,eot=4", "PGD-DLR (20 it, EOT 4)"),
    ):
        other = made(0.5, attack="pgd" if name == "autoattack" else "autoattack")
        stand_in = made(0.5, attack=name, spec=spec)
        stand_in["names"]["display"] = display
        check = next(c for c in graded(other, stand_in).checks if c.id == "headline")
        assert check.status == "not run" and name in check.value, spec
    short = graded(made(0.5, spec="pgd:eot=1,steps=1"))
    assert status(short, "gradients") == "not run"
    assert next(c.value for c in short.checks if c.id == "gradients").startswith(
        "too short, not of the whole ball, or led by no gradient: PGD"
    )


def test_padding_with_weak_attacks_hides_no_strong_one():
    strong = made(0.3, seed=1)
    weak = [made(0.9, seed=k, attack="uniform", gradients=0.0) for k in range(2, 40)]
    assert graded(made(0.5), strong, *weak).letter == graded(made(0.5), strong).letter == "F"


def test_many_strong_rivals_hide_each_other_no_more_than_weak_ones_do():
    rivals = [
        made(0.3, n=120, seed=k) for k in range(1, 131)
    ]  # flips count no p below 1/4001, and 1/4001 × 130 > 0.025
    assert graded(made(0.6, n=120), *rivals).letter == graded(made(0.6, n=120), rivals[0]).letter == "F"


def test_the_identity_stands_for_a_purifier_that_rounds_and_offers_nothing_better(tmp_path):
    """Else its author could do nothing to leave grade C."""
    mine = tmp_path / "mine.py"
    mine.write_text("from purifiers import Purifier\n\nclass Rounds(Purifier):\n    differentiable = False\n")
    for purifier, view, counts in (
        (f"file:{mine}:Rounds", "bpda", True), (f"file:{mine}:Rounds", "blind", False),
        ("jpeg", "bpda", False), ("vae", "bpda", False), ("file:elsewhere.py:Mine", "bpda", False),
    ):  # fmt: skip
        assert evidence.own(view, purifier) == counts, (purifier, view)


def test_a_surrogate_stands_for_no_attack_where_there_is_an_exact_gradient():
    for purifier, gradient, counts in (
        ("vqvae", "soft", True), ("latent-vq", "ste", True), ("jpeg", "soft", True),
        ("diffusevae-nvae", "structure", False), ("map", "identity", False), ("vae", "mean", False),
        ("file:elsewhere.py:Mine", "soft", False),
    ):  # fmt: skip
        view = f"surrogate:gradient={gradient}"
        assert evidence.own(view, purifier) == counts, purifier
        run = made(0.5, purifier=purifier, view=view)
        assert (status(graded(run), "gradients") == "pass") == counts
        table = report.table([run, made(0.4, purifier=purifier, classifier="resnet-at", view=view)])
        assert (report.ranked(table) != [None, None]) == counts
    copied = [made(right, purifier="jpeg", view="surrogate:gradient=soft", copies=3) for right in (0.5, 0.4)]
    copied[1]["names"]["purifier"] = "Our JPEG, tuned"
    copied[1]["identity"]["classifier"] = "resnet-at"
    assert None not in report.ranked(report.table(copied)), "copies or a name of one's own change no view"
    with_, without = made(0.5, view="surrogate:gradient=mean"), made(0.6)
    row = (*evidence.worst_of([with_, without]), [with_, without])
    table = report.assembled([row, (without, without["records"], [without])], [with_, without])
    assert None not in report.ranked(table), "beside the exact gradient a surrogate only makes the worst case worse"


def test_steps_that_cannot_reach_the_radius_are_no_search():
    for spec, counts in (
        ("pgd:eot=4,step_size=0.000001,steps=20", False), ("pgd:eot=4,step_size=0.1,steps=20", True),
        ("pgd:eot=4,step=0.5,steps=20", False),
    ):  # fmt: skip
        assert (status(graded(made(0.5, spec=spec)), "gradients") == "pass") == counts, spec


def test_halved_steps_reach_as_far_as_they_go():
    for spec, reaches in (
        ("pgd:halving=true,step_size=0.0032,steps=20", False),
        ("pgd:halving=true,step_size=0.01,steps=20", True),
        ("pgd:halving=true,steps=20", True),
        ("pgd:loss=error,steps=20", True),
    ):
        assert grades._searches(made(0.3, spec=spec)) == reaches, spec


def test_a_search_that_images_leave_early_is_no_longer_one():
    run = made(0.5)
    for retire, letter in ((0, "A"), (16, "B")):
        longer = made(0.5, budget="custom", spec=f"pgd:eot=8,retire={retire},steps=20")
        assert graded(run, *ALL[:3], longer).letter == letter


def test_spsa_looks_as_often_as_it_asks():
    for samples, counts in ((1, False), (32, True)):
        spsa = made(0.6, attack="square", gradients=0.0, spec=f"spsa:samples={samples},steps=20")
        assert (status(graded(made(0.5), spsa), "looking") == "pass") == counts


def test_verdict_draws_choose_no_headline():
    weak, strong = made(0.4, view="bpda", draws=9), made(0.5, draws=9)
    for run, select in ((weak, 0.9), (strong, 0.1)):  # by the draws that may choose, the other one is stronger
        for k, record in enumerate(run["records"]):
            record["select"] = [record["label"] if k < select * len(run["records"]) else -1]
    ((run, _, _),) = evidence.headline([weak, strong])
    assert run["identity"]["view"] == "exact"


@pytest.mark.parametrize(
    "rival",
    [
        made(0.2, view="bpda"), made(0.2, attack="square", gradients=0.0), made(0.2, seed=3), made(0.2, budget="paper"),
        made(0.2, attacker="vae:rounds=2"), made(0.2, attack="autoattack"),
    ],
    ids=["view", "looking", "seed", "budget", "attacker", "attack"],
)  # fmt: skip
def test_whatever_is_stronger_beyond_the_interval_withholds_a_number(rival):
    grade = graded(made(0.5), rival)
    assert grade.letter == "F" and status(grade, "nothing-stronger") == "fail"
    assert "leaves 30.0 points fewer" in grade.checks[0].value
    assert graded(rival, made(0.5)).letter != "F"


@pytest.mark.parametrize(
    "other",
    [
        made(0.2, eps="32/255"), made(0.2, norm="L2"), made(0.2, weights="other"), made(0.2, classifier="resnet-at"),
        made(0.2, fingerprint="g"), made(0.2, copies=2), made(0.2, view="exact:noise=verdict"),
        made(0.2, purifier="diffpure"),
    ],
    ids=["radius", "norm", "weights", "classifier", "images", "copies", "foreknown", "purifier"],
)  # fmt: skip
def test_another_threat_or_defense_is_no_rival(other):
    assert status(graded(made(0.5), other), "nothing-stronger") == "pass"


def test_what_is_stronger_by_little_is_a_warning():
    assert status(graded(made(0.5, n=200), made(0.46, n=200, seed=1)), "nothing-stronger") == "warn"
    assert status(graded(made(0.5, n=200), made(0.44, n=200, seed=1)), "nothing-stronger") == "fail"
    grade = graded(made(0.5), made(0.475, seed=1))
    assert (
        status(grade, "nothing-stronger") == "pass" and "2.5 points fewer, which may be chance" in grade.checks[0].value
    )


def test_random_noise_is_a_rival():
    assert graded(made(0.6, random=0.3)).letter == "F"
    assert graded(made(0.6, random=0.85)).letter == "C"


def test_equals_seldom_contradict_each_other():
    """Twenty attacks of one strength on coins: at most 5 % of numbers are warned of, corrected for the twenty."""
    rng = np.random.default_rng(0)
    flagged, tries = 0, 60
    for _ in range(tries):
        runs = [made(0.5, seed=k, random=1.0) for k in range(20)]
        for run in runs:
            for record in run["records"]:
                record["adv"] = [record["label"] if rng.random() < 0.6 else -1 for _ in record["adv"]]
        flagged += status(graded(runs[0], *runs[1:]), "nothing-stronger") != "pass"
    assert flagged <= 9, "of 60 with probability 0.05 each, more than 9 has probability 0.001"


def test_what_attacks_nothing_has_no_grade_and_no_place():
    table = report.table([made(0.9, attack="identity", gradients=0.0), made(0.9, purifier="jpeg", attack="identity")])
    assert [row["grade"] for row in table.rows] == [None, None] and report.ranked(table) == [None, None]


def test_who_knew_the_verdicts_draws_leads_only_alone():
    known = made(0.1, view="exact:noise=verdict")
    ((run, _, _),) = evidence.headline([made(0.5), known])
    assert run["identity"]["view"] == "exact"
    ((run, _, _),) = evidence.headline([known])
    assert run["identity"]["view"] == "exact:noise=verdict"


def test_no_protocol_is_merged_with_another():
    runs = [
        made(0.5), made(0.5, attack="autoattack"), made(0.4, budget="standard"), made(0.5, n=64), made(0.5, eps="0.1"),
        made(0.5, precision="bf16"), made(0.5, protocol=2),
    ]  # fmt: skip
    table = report.table(runs, worst_case=True)
    keys = ("dataset", "norm", "eps", "budget", "n", "precision", "protocol")
    for part in table.parts():
        assert len({tuple(table.rows[k][key] for key in keys) for k in part}) == 1
    assert len(table.parts()) == 6 and sum(row["attack"] == evidence.WORST for row in table.rows) == 1


def test_a_worst_case_is_held_against_what_it_isnt_made_of():
    runs = [made(0.5), made(0.45, attack="autoattack")]
    worst = (*evidence.worst_of(runs), runs)
    (grade,) = grades.grades([worst], [*runs, made(0.1, view="bpda")])
    assert grade.letter == "F"
    (grade,) = grades.grades([worst], runs)
    assert status(grade, "nothing-stronger") == "pass" and status(grade, "headline") == "pass"


def test_a_deterministic_defense_needs_autoattack_which_also_looks():
    run = made(0.5, draws=1)
    auto = made(0.5, draws=1, attack="autoattack", gradients=900.0)
    auto["names"]["display"] = "AutoAttack (standard, pyautoattack 0.2.0)"
    transfer = made(0.6, draws=1, attack="transfer")
    assert graded(run, auto, transfer).letter == graded(auto, transfer).letter == "A"
    assert graded(run, transfer).letter == graded(run, auto).letter == "C"


def test_what_fools_another_defense_is_tried_where_there_is_a_purifier():
    blind, other = made(0.6, view="blind"), made(0.6, attacker="vae:rounds=1")
    for run in (blind, other):
        assert graded(made(0.5), *ALL[:2], run, ALL[3]).letter == "A"
    bare = [made(0.5, purifier="identity", attack=attack) for attack in ("pgd", "autoattack", "square")]
    assert "transferred" not in {check.id for check in graded(*bare).checks}


def test_an_audit_beside_the_records_counts(tmp_path):
    run = made(0.5) | {"folder": tmp_path}
    failed = {"id": "finite-differences", "status": "fail", "value": 0.3, "threshold": 0.01, "advice": "look"}
    (tmp_path / "audit.json").write_text(json.dumps({"gradients": [{"checks": [failed]}]}))
    assert graded(run, *ALL).letter == "F"
    failed["status"] = "pass"
    (tmp_path / "audit.json").write_text(json.dumps({"gradients": [{"checks": [failed]}]}))
    assert graded(run, *ALL).letter == "A"


def test_rows_carry_the_letter_and_no_ranking_counts_an_f():
    runs = [made(0.5), *ALL, made(0.4, purifier="diffpure"), made(0.9, purifier="jpeg", view="blind"),
            made(0.2, purifier="jpeg")]  # fmt: skip
    rows = {(r["purifier"], r["view"], r["budget"], r["attack"]): r["grade"] for r in report.rows(runs)}
    assert rows["vae", "exact", "quick", "pgd"] == "A" and rows["jpeg", "blind", "quick", "pgd"] == "F"
    table = report.table([made(0.5), made(0.4, purifier="diffpure"), made(0.9, purifier="jpeg", random=0.1)])
    assert report.ranked(table) == [1, 2, None] or report.ranked(table) == [1, 1, None]
    assert "jpeg" in compact(runs)


def test_a_run_that_is_named_twice_speaks_once():
    runs = [made(0.5), made(0.45, attack="square"), made(0.4, attack="autoattack")]
    rows = [(runs[0], runs[0]["records"], [runs[0]])]
    assert grades.grades(rows, [*runs, *runs]) == grades.grades(rows, runs)


def test_an_attack_with_options_of_its_own_is_in_the_worst_case_of_the_budget_beside_it():
    aside = made(0.3, spec="pgd:eot=4,steps=50", budget="custom")
    runs = [made(0.5), made(0.4, attack="autoattack"), aside, made(0.35, budget="standard")]
    worst = {row["budget"]: row for row in report.rows(runs, worst_case=True) if row["attack"] == evidence.WORST}
    assert {budget: row["robust"] for budget, row in worst.items()} == {"quick": 0.3, "standard": 0.3}
    assert worst["quick"]["run"].count(evidence.JOIN) == 2
    other = made(0.2, spec="pgd:eot=4,steps=9", budget="custom", draws=5)
    assert len(report.rows([made(0.5), other], worst_case=True)) == 2, "judged by other draws"
    assert [run["identity"]["budget"] for run, *_ in evidence.headline([aside])] == ["custom"]


def test_ranks_are_shared_by_what_a_test_cannot_tell_apart():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    strong, like, weak = base * 0.2 + 0.8, base * 0.2 + 0.8 + rng.normal(0, 0.01, 200), base * 0.2 + 0.3
    assert stats.ranks(np.stack([weak, strong, like])) == [3, 1, 1]
    assert stats.ranks(np.stack([strong])) == [1]
    assert stats.ranks(np.stack([strong, strong, strong])) == [1, 1, 1]


def test_sign_flips_are_those_of_the_paired_comparison():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 50))
    p = stats.sign_flips(np.stack([a - b, b - a]))
    for value, (x, y) in zip(p, ((a, b), (b, a)), strict=True):
        assert value == pytest.approx(stats.compare(x, y, one_sided=True).p, abs=0.02)
    assert stats.sign_flips(np.zeros((1, 5)))[0] == 1


def test_the_audit_says_what_a_grade_rests_on(capsys):
    recorded = ROOT / "results" / "headline"
    assert cli.main(["audit", str(recorded), "--only", "grades"]) in (cli.DONE, cli.FAILED)
    shown = capsys.readouterr().out
    assert (
        "nothing-stronger" in shown
        and "attack with --attack square, too" in shown
        and "F: something recorded is" in shown
    )
    code = cli.main(["audit", str(recorded), "--only", "grades", "--json"])
    found = json.loads(capsys.readouterr().out)["grades"]
    assert {one["grade"] for one in found} <= set(grades.MEANING)
    assert code == (cli.FAILED if any(one["grade"] == "F" for one in found) else cli.DONE)
    assert audit.failed({"grades": [{"checks": [{"status": "fail"}]}]})


def test_rows_that_are_left_out_still_speak_in_the_grades(capsys):
    recorded = str(ROOT / "results" / "headline")

    def shown(*arguments: str) -> str:
        assert cli.main(["report", recorded, *arguments]) == cli.DONE
        return capsys.readouterr().out

    every, few = (
        json.loads(shown("--format", "json", *words))
        for words in ([], ["--where", "eps=0.10", "--where", "classifier=resnet_at"])
    )
    assert few == [r for r in every if (r["eps"], r["classifier"]) == ("0.1", "resnet-at")]
    assert "F" in {row["grade"] for row in few}, "AutoAttack is stronger than this PGD"
    both = ["--where", "eps=0.1", "--where", "eps=16/255"]
    assert shown("--compact", *both) == shown("--compact")
    (line,) = (one for one in shown("--compact").splitlines() if one.startswith("| diffpure | resnet | Linf | 0.1 |"))
    (same,) = (one for one in shown("--compact", "--where", "eps=0.1", "--where", "purifier=diffpure").splitlines()
               if one.startswith("| diffpure | resnet | Linf | 0.1 |"))  # fmt: skip
    same, line = same.replace("*", ""), line.replace("*", "")  # marks are of a table's own first search
    assert same.split(" | ")[:-2] == line.split(" | ")[:-2] and same.split(" | ")[-1] == line.split(" | ")[-1]


def test_a_figure_and_the_page_show_a_part_with_the_grades_of_all(tmp_path, capsys):
    """The eight attacks, on fewer images, speak in a grade and draw no point."""
    recorded, beside = (str(ROOT / "results" / name) for name in ("headline", "eight"))
    part = ["--where", "eps=16/255", "--where", "purifier=vae", "--beside", beside]
    told = ["report", recorded, *part, "--format", "html", "--out", str(tmp_path)]
    drawn = ["report", recorded, *part, "--figures", "clean-robust,cost", "--out", str(tmp_path)]
    assert cli.main(told) == cli.main(drawn) == cli.DONE
    (csv,) = tmp_path.glob("clean-robust*.csv")
    points = pd.read_csv(csv)
    assert set(points["purifier"]) == {"vae"} and set(points["eps"]) == {"16/255"}
    text = (tmp_path / "index.html").read_text()
    rows = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["rows"]
    assert {(row["purifier"], row["threat"]) for row in rows} == {("vae", "Linf 16/255")}
    assert cli.main(["report", recorded, *part, "--compact"]) == cli.DONE
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vae ")]
    letters = {line.split(" | ")[1]: line.rstrip(" |")[-1] for line in table}
    assert letters == {"resnet": "B", "resnet-at": "C"}, "B for the search without gradients that is recorded beside"
    assert letters == dict(zip(points["classifier"], points["grade"], strict=True))
    assert letters == {row["classifier"]: row["grade"] for row in rows if row["leading"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "eps=1/255"], "there are 0.1, 16/255"),
        (["--where", "attack=pgd"], "attacks can't be left out of a worst case"),
        (["--where", "eps"], "expected NAME=VALUE"),
        (["--compare", "a", "b", "--where", "eps=0.1"], "--compare takes no --where"),
        (["--format", "html", "--where", "attack=pgd"], "attacks can't be left out of a worst case"),
    ],
)
def test_no_condition_leaves_out_what_a_defense_met(words, message, capsys):
    assert cli.main(["report", str(ROOT / "results" / "headline"), *words]) == cli.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("budget", config.BUDGETS)
def test_the_attacks_called_graded_are_all_that_an_a_asks_for(budget, tmp_path):
    """Each cell as it would run; without one of them the letter is another, but for plain PGD, that others publish."""
    settings = Settings(budget=budget, n=32, out=tmp_path)
    grid = cells.grid("identity,vae", "resnet", "graded,pgd", "fashion-mnist", [None], settings)
    met: dict[str, list[dict]] = {"identity": [], "vae": []}
    for cell in grid:
        i, name = cell.identity, cell.names["purifier"]
        met[name].append(
            made(
                0.5, purifier=name, attack=specs.parse(i.attack).name, spec=i.attack, budget=i.budget,
                draws=9 if cell.stochastic else 1, gradients=float(cell.attack.gradients(cell.drawing)),
            )
        )  # fmt: skip
        met[name][-1]["names"] |= {"display": cell.names["display"], "attack": i.attack}
    assert {name: len(runs) for name, runs in met.items()} == {"identity": 2, "vae": 5}, "pgd is named twice, met once"
    for runs in met.values():
        (row,) = evidence.headline(runs)
        (whole,) = grades.grades([row], runs)
        assert whole.letter == "A" and not grades.untried(whole)
    for k in {1, 2, 4} | ({3} if budget == "quick" else set()):
        without = [run for j, run in enumerate(met["vae"]) if j != k]
        (less,) = grades.grades(evidence.headline(without), without)
        assert less.letter in "BC" and grades.untried(less), met["vae"][k]["identity"]["attack"]


def test_a_longer_attack_within_a_worst_case_counts_as_longer():
    longer = made(0.5, budget="custom", spec="pgd:eot=8,steps=20")
    runs = [made(0.5), *ALL[:3], longer]
    (row,) = evidence.headline(runs)
    assert longer in row[2] and grades.grades([row], runs)[0].letter == "A"
    (row,) = evidence.headline(runs[:3])
    assert status(grades.grades([row], runs[:3])[0], "longer") == "warn"


def test_what_takes_the_steps_of_a_larger_budget_is_long_enough():
    """Whatever its budget is called: with verdict draws of one's own it is "custom"."""
    long = {"budget": "custom", "gradients": 500.0}
    runs = [made(0.5, spec="pgd:eot=10,steps=50", **long), *ALL[:3]]
    assert graded(*runs).letter == "A"
    short = made(0.5, spec="pgd:eot=10,steps=30", **long)
    assert status(graded(short, *ALL[:3]), "longer") == "warn"


def test_under_a_norm_that_autoattack_does_not_know_pgd_is_the_headline():
    moved = {"norm": "StAdv"}
    looks = made(0.6, attack="square", gradients=0.0, spec="spsa:samples=64,steps=20", **moved)
    longer = made(0.5, budget="standard", gradients=500.0, **moved)
    grade = graded(made(0.5, **moved), looks, longer, made(0.6, attack="transfer", **moved))
    assert grade.letter == "A" and not grades.untried(grade)
    assert grades.untried(graded(made(0.5, **moved), longer)) and grades.untried(graded(made(0.5), *ALL[:3]))
    assert not grades.untried(graded(made(0.5), *ALL))
    longest = "pgd:momentum=0.75,halving=true"
    assert grades.asked(False, "standard", "StAdv") == ["pgd", "spsa", longest, "transfer"]
    assert grades.asked(False, "standard", "StAdv", bare=True) == ["pgd", "spsa", longest]
