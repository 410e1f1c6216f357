"""What ``list`` says: every name, what it costs, and the meaning of each of its options."""

from __future__ import annotations

import inspect
import json
import re

import pytest

from benchmark import catalogue, checkpoints, cli, data
from benchmark.checkpoints import Need
from benchmark.cli import grammar
from benchmark.config import BUDGETS
from benchmark.errors import UsageError

NEED = Need(data.form("fashion-mnist"))
NAMED = [
    (kind, entry["name"])
    for kind in ("purifiers", "attacks", "classifiers", "datasets")
    for entry in catalogue.entries(kind, NEED)
]


def test_lists(capsys):
    expected = {
        "purifiers": {"identity", "vae", "diffpure"},
        "classifiers": {"resnet"},
        "attacks": {"pgd", "apgd", "autoattack"},
        "datasets": {"fashion-mnist"},
        "budgets": set(BUDGETS),
    }
    assert set(expected) == set(grammar.KINDS)
    for kind, names in expected.items():
        assert cli.main(["list", kind, "--json"]) == 0
        entries = json.loads(capsys.readouterr().out)
        assert names <= {entry["name"] for entry in entries}, kind
        assert cli.main(["list", kind]) == 0
        heading, *lines = capsys.readouterr().out.splitlines()
        assert heading.startswith(kind[:4]) and [line.split()[0] for line in lines] == [e["name"] for e in entries]


def test_attacks_say_what_they_search_and_need(capsys):
    assert cli.main(["list", "attacks", "--json"]) == 0
    known = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert (known["square"]["norms"], known["square"]["black_box"]) == ("Linf, L2", True)
    assert (known["stadv"]["norms"], known["stadv"]["black_box"]) == ("StAdv", False)
    assert "norms" not in known["torchattacks:NAME"], "each has its own"


def test_listed_options_are_those_of_the_card(capsys):
    assert cli.main(["list", "purifiers", "--json"]) == 0
    (diffpure,) = [entry for entry in json.loads(capsys.readouterr().out) if entry["name"] == "diffpure"]
    assert diffpure["weights"] and diffpure["about"]
    assert (diffpure["options"]["t_star"], diffpure["options"]["steps"]) == ("0.2", "3")


@pytest.mark.parametrize("kind, name", NAMED)
def test_every_option_of_everything_is_explained(kind, name):
    entry = catalogue.entry(kind, name.removesuffix(":NAME"), NEED)
    assert entry["documentation"].startswith(entry["about"].split(":")[0])
    assert set(entry["meanings"]) == set(entry.get("options", {}))
    assert [option for option, meaning in entry["meanings"].items() if len(meaning) < 5] == []
    assert not [m for m in entry["meanings"].values() if m.startswith("as for ") and len(m) < 20], (
        "of what it stands for"
    )
    lines = list(catalogue.page(entry, 100))
    assert lines[0].startswith(name) and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert all(f"  {option}={value}" in text for option, value in entry.get("options", {}).items())
    assert "``" not in text and "Args:" not in text and "Raises:" not in text


def test_an_option_that_refers_to_its_base_is_explained_as_there():
    meanings = catalogue.explained(type(checkpoints.build("purifiers", "diffpure", NEED).module))
    assert meanings["t_star"].startswith("time in [0, 1] to which the input is diffused")
    assert not any(meaning.startswith("as Diffusion") for meaning in meanings.values())


def test_a_variant_is_told_by_what_it_differs_in(capsys):
    assert cli.main(["list", "purifiers"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["diffpure-ddim"].endswith("diffpure with eta=0.0")
    assert lines["vae-beta4"].endswith("vae with beta=4.0"), "trained so"
    assert lines["latent-noisy"].endswith("latent with weights of its own")
    assert lines["vqvae"].split()[:5] == ["vqvae", "1", "502,932", "no", "soft,"]
    assert lines["diffpure"].endswith("g(x) = clamp((z_0 + 1) / 2)."), "whole where nobody looks"


def test_one_is_shown_with_the_values_of_its_spec(tmp_path, capsys):
    assert cli.main(["list", "purifiers", "vae:weights=gan,temperature=0"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("vae-gan: vae with temperature=0.0, ") and "  temperature=0.0  " in text
    assert "stochastic: no" in text
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from purifiers import Purifier\n\n\nclass Mine(Purifier):\n"
        '    """g(x) = x / 2.\n\n    Args:\n        depth: how deep.\n    """\n\n'
        "    def __init__(self, *, depth: int = 3, wide: bool = False, rounds: int = 1):\n"
        "        super().__init__(rounds=rounds)\n\n"
        "    def start(self, x, noise):\n        return x / 2, None\n\n"
        "    def finish(self, state, context):\n        return state\n"
    )
    assert cli.main(["list", "purifiers", f"file:{mine}:Mine,depth=4"]) == 0
    text = capsys.readouterr().out
    assert "g(x) = x / 2." in text and "  depth=4     how deep.\n" in text and "  wide=false\n" in text


@pytest.mark.parametrize(
    "words, said",
    [
        (["purifiers", "diffpur"], "did you mean diffpure"),
        (["purifiers", "vae:code=x"], "code takes int"),
        (["purifiers", "resnet"], "is one of the classifiers"),
        (["attacks", "pdg"], "did you mean pgd"),
        (["datasets", "cifar"], "did you mean cifar10"),
        (["budgets", "quik"], "did you mean quick"),
        (["classifiers", "robustbench:Carmon2019", "--dataset", "cifar10"], "robustbench:Carmon2019Unlabeled"),
    ],
)
def test_what_is_not_there_is_told_with_the_nearest(words, said, capsys):
    assert cli.main(["list", *words]) == cli.USAGE
    assert said in capsys.readouterr().err


def test_a_network_of_ones_own_shape_is_counted_as_it_is(tmp_path):
    """A checkpoint of diffusers with its config plugs in; what ``list`` says of it is of that network."""
    import diffusers

    shipped = checkpoints.SHIPPED / "fashion-mnist" / "diffpure"
    card = json.loads((shipped / "card.json").read_text())
    config = json.loads((shipped / "unet" / "config.json").read_text()) | {"layers_per_block": 2}
    net = diffusers.UNet2DModel.from_config(config)
    folder = tmp_path / "fashion-mnist" / "deep"
    card["files"] = checkpoints.save(folder, {"unet": net})
    (folder / "card.json").write_text(json.dumps(card))
    need = Need(NEED.form, roots=(tmp_path,))
    expected = sum(p.numel() for p in net.parameters())
    assert catalogue.entry("purifiers", "deep", need)["parameters"] == expected != card["parameters"]
    assert sum(p.numel() for p in checkpoints.build("purifiers", "deep", need).module.parameters()) == expected
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "UNet9D"))
    with pytest.raises(UsageError, match=r"diffusers .* has no UNet9D; install a version that has it"):
        checkpoints.build("purifiers", "deep", need)


def test_a_purifier_that_computes_with_its_weights_is_listed_with_them(monkeypatch):
    kind = type(checkpoints.build("purifiers", "diffpure", NEED).module)
    begin, sums = kind.__init__, []

    def reading(self, unet, **options):
        begin(self, unet, **options)
        sums.append(unet.conv_in.weight.sum().item())

    reading.__signature__ = inspect.signature(begin)
    monkeypatch.setattr(kind, "__init__", reading)
    assert catalogue.entry("purifiers", "diffpure", NEED)["parameters"] == 636004 and len(sums) == 1


def test_a_budget_says_what_a_spec_leaves_to_it(capsys):
    assert cli.main(["list", "attacks", "pgd:steps=5"]) == 0
    text = capsys.readouterr().out
    assert "  steps=5 " in text and "budgets: quick eot 4; standard eot 10; paper eot 20" in text


def test_an_attack_of_a_package_is_explained_in_its_words(capsys):
    assert cli.main(["list", "attacks", "torchattacks:mifgsm"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"  decay=1\.0 +momentum factor\.\n", text) and re.search(
        r"  steps=10 +number of iterations\.\n", text
    )
    assert cli.main(["list", "attacks", "autoattack"]) == 0
    assert "\n| standard | APGD-CE, targeted APGD-DLR, targeted FAB, Square |\n" in capsys.readouterr().out


def test_nothing_is_said_of_what_has_no_entries(capsys):
    assert cli.main(["list", "classifiers", "--dataset", "svhn"]) == 0
    said = capsys.readouterr()
    assert "no classifiers with weights for svhn" in said.err and "says all about one" not in said.err


def test_a_zoo_is_listed_and_nothing_of_it_is_fetched(capsys):
    assert cli.main(["list", "classifiers", "robustbench:Carmon2019Unlabeled", "--dataset", "cifar10"]) == 0
    assert "clean: 89.69" in capsys.readouterr().out


def test_without_a_kind_all_names_are_listed(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert [line.split(":")[0] for line in text.splitlines() if line[0] != " "] == list(grammar.KINDS)
    assert all(name in text for _, name in NAMED)
    assert cli.main(["list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(grammar.KINDS)
