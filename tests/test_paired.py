"""Paired differences: of runs, and of worst cases against the one that is meant."""

from __future__ import annotations

import csv
import io

import pytest

from benchmark import paired, writers
from benchmark.errors import UsageError
from tests.synthetic import made

BARE = [made(0.4, purifier="identity", draws=1), made(0.3, purifier="identity", attack="autoattack", draws=1)]
VAE = [made(0.5, purifier="vae"), made(0.55, purifier="vae", attack="autoattack")]
ELSEWHERE = [
    made(0.6, purifier="identity", classifier="resnet-at", draws=1),
    made(0.8, purifier="vae", classifier="resnet-at"),
]


def named(run: dict) -> tuple[str, str]:
    return run["identity"]["purifier"].split(":")[0], run["identity"]["classifier"]


def test_worst_cases_are_held_against_the_one_that_is_meant_before_the_same_classifier():
    pairs = list(paired.against([*VAE, *BARE, *ELSEWHERE], ["purifier=identity"]))
    assert [(named(one), [named(other) for other in others]) for one, others in pairs] == [
        (("identity", "resnet"), [("vae", "resnet")]),
        (("identity", "resnet-at"), [("vae", "resnet-at")]),
    ]
    (here,), (there,) = (paired.comparison(one, others) for one, others in pairs)
    # the worst case of each: 12 of 40 images against 20, and 24 against 32
    assert (here["reference"], here["robust"], here["difference"]) == (0.3, 0.5, pytest.approx(0.2))
    assert (there["reference"], there["robust"], there["n"]) == (0.6, 0.8, 40)
    assert 0 < here["low"] < 0.2 < here["high"] and here["p"] < 0.05


def test_one_reference_may_be_meant_for_all():
    ((one, others),) = paired.against(
        [*VAE, *BARE, *ELSEWHERE], ["purifier=identity", "classifier=resnet"]
    )  # fmt: skip
    assert named(one) == ("identity", "resnet") and len(others) == 3
    text = writers.comparison([(one, paired.comparison(one, others))])
    assert text.count("Reference: identity + resnet under worst case of") == 1 and "theirs as much" in text
    rows = list(csv.DictReader(io.StringIO(writers.comparison([(one, paired.comparison(one, others))], "csv"))))
    assert {row["against"] for row in rows} == {"identity + resnet"} and len(rows) == 3


def test_defenses_may_be_held_against_each_other_under_one_attack():
    ((one, others),) = paired.against([*VAE, *BARE], ["purifier=identity"], "autoattack")
    assert [run["names"]["attack"] for run in (one, *others)] == ["autoattack"] * 2
    (row,) = paired.comparison(one, others)
    assert (row["reference"], row["robust"]) == (0.3, 0.55)
    with pytest.raises(UsageError, match="--under square: no such run; there are autoattack, pgd"):
        list(paired.against([*VAE, *BARE], ["purifier=identity"], "square"))


def test_older_records_that_name_fewer_options_are_held_against_newer_ones():
    """Under their full names they are one purifier: no row may drop out."""
    newer = made(0.6, purifier="vae", classifier="resnet-at")
    newer["identity"]["purifier"] = "vae:code=0,likelihood=gaussian,rounds=1,temperature=1.0"
    ((one, others),) = paired.against([VAE[0], newer], ["classifier=resnet"])
    assert named(one) == ("vae", "resnet") and others[0]["identity"]["classifier"] == "resnet-at"


def test_of_references_on_other_images_the_one_that_shares_most_is_meant():
    few = made(0.5, purifier="identity", draws=1, n=8)
    ((one, _),) = paired.against([*VAE, *BARE, few], ["purifier=identity"])
    assert one["n"] == 40


def test_other_radii_budgets_and_copies_stand_apart():
    others = [made(0.7, purifier="vae", eps="8/255"), made(0.7, purifier="vae", budget="standard")]
    ((_, held),) = paired.against([*VAE, *BARE, *others], ["purifier=identity"])
    assert [run["identity"]["eps"] for run in held] == ["16/255"]
    voted = made(0.6, purifier="identity", copies=10)
    with pytest.raises(UsageError, match=r"means .* and .*: name more of .*copies"):
        list(paired.against([*VAE, *BARE, voted], ["purifier=identity"]))
    ((one, held),) = paired.against([*VAE, *BARE, voted], ["purifier=identity", "copies=1"])
    assert one["identity"]["copies"] == 1 and [named(run)[0] for run in held] == ["identity", "vae"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["purifier=nvae"], "no such row; there are purifier=identity, purifier=vae"),
        (["attack=pgd"], "--against attack=pgd: expected NAME=VALUE with a name of"),
        (["norm=Linf"], "nothing else is recorded"),
    ],
)
def test_what_nothing_or_several_are_meant_by_is_refused(wanted, message):
    with pytest.raises(UsageError, match=message):
        list(paired.against([*VAE, *BARE], wanted))
    with pytest.raises(UsageError, match="nothing else is recorded"):
        list(paired.against(BARE, ["purifier=identity"]))


def test_a_rule_that_records_cannot_tell_is_refused():
    with pytest.raises(UsageError, match="can't tell mean-logits: take another --rule"):
        paired.comparison(BARE[0], VAE, "mean-logits")
    (row, _) = paired.comparison(BARE[0], VAE, "majority")
    assert row["difference"] == pytest.approx(0.1)


def _of(run: dict, **weights: str) -> dict:
    """A run as it would be with other weights: in a folder of its own."""
    identity = run["identity"] | {"weights": run["identity"]["weights"] | weights}
    return run | {"identity": identity, "folder": f"{run['folder']}-{'-'.join(weights.values())}"}


def test_a_reference_has_the_same_weights():
    """However many images another one shares; a classifier that has been trained anew is another classifier."""
    old = _of(made(0.9, purifier="identity", draws=1), **{"classifier.net": "old"})
    new, vae = (
        _of(run, **{"classifier.net": "new"})
        for run in (made(0.3, purifier="identity", draws=1, n=20), made(0.5, purifier="vae"))
    )
    ((one, others),) = paired.against([old, new, vae], ["purifier=identity"])
    assert (one["folder"], others[0]["folder"]) == (new["folder"], vae["folder"])
    with pytest.raises(UsageError, match="nothing else is recorded"):
        list(paired.against([old, vae], ["purifier=identity"]))


def test_images_choose_between_references_of_one_kind_alone(capsys):
    shifted = made(0.5, purifier="vae", classifier="resnet-at", n=20)
    shifted["records"] = [record | {"id": record["id"] + 100} for record in shifted["records"]]
    twenty = made(0.7, purifier="identity", draws=20, n=20)
    with pytest.raises(UsageError, match=r"means .* and .*-n20-0.7"):
        list(paired.against([*VAE, *BARE, twenty], ["purifier=identity"]))
    ((_, others),) = paired.against([*VAE, *BARE, ELSEWHERE[0], shifted], ["purifier=identity"])
    assert [named(other) for other in others] == [("vae", "resnet")]
    assert "1 of 4 rows have none of the same classifier" in capsys.readouterr().err
