"""What looks at runs and weights: galleries, diagnoses, matched settings, purified files, views, cards, recipes."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import benchmark
from benchmark import checkpoints, cli, data, load, loaders, registry
from benchmark import recipes as recipe_book
from benchmark.dataset import FORMS
from benchmark.errors import UsageError
from benchmark.gallery import gallery
from benchmark.measure import measure
from benchmark.recipes import recipes
from benchmark.replay import replay
from benchmark.results import find_runs
from benchmark.spectra import draw, spectrum
from benchmark.train import train
from purifiers import Tape
from purifiers._base import call
from tests.test_train import needs_full

DATASET = "fashion-mnist"
NEED = checkpoints.Need(FORMS[DATASET])
CARDS = checkpoints.cards(DATASET)
KINDS = {name: json.loads(card.read_text())["kind"] for name, card in CARDS.items()}
FULL_PRECISION = {"vae", "diffpure", "resnet", "resnet-at"}
"""The cards from before weights were written in half precision."""
RECIPES = """
[fashion-mnist.judged]
kind = "purifiers"
component = "vae"
size = "tiny"
epochs = 8
batch_size = 32
lr = 5e-3
weight_decay = 0.0
ema = 0.9
augment = []
critics = ["image_critic", "code_critic"]
objective = { features = 0.1, adversarial = 0.02, correlation = 1.0 }

[fashion-mnist.still]
kind = "purifiers"
component = "vae"
size = "small"
init = "vae"
judge = "resnet-at"
skip_above = 1e-12
epochs = 1
batch_size = 32
lr = 1e-2
weight_decay = 0.1
ema = 0.5
augment = []
objective = { features = 0.1 }

[fashion-mnist.begun]
kind = "purifiers"
component = "map"
size = "mixture"
init = "vae"
settle = 64
epochs = 0
batch_size = 32
lr = 0.0
weight_decay = 0.0
ema = 0.0
augment = []

[fashion-mnist.orphan]
kind = "purifiers"
component = "vae"
size = "small"
init = "judged"
epochs = 0
batch_size = 32
lr = 0.0
weight_decay = 0.0
ema = 0.0
augment = []
"""


def attacked(out: Path, purifiers: str, *arguments: str) -> int:
    """``run`` on three images without preflight; arguments are added to it and win over its own."""
    return cli.main(
        ["run", "--purifier", purifiers, "--attack", "pgd:steps=2,eot=1", "--n-examples", "3", "--draws", "2",
         "--budget", "quick", "--device", "cpu", "--offline", "--no-preflight", "--out", str(out), *arguments]
    )  # fmt: skip


def strict(text: str):
    """JSON as its standard has it: NaN and infinities are none."""

    def refuse(word: str):
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def of(folder: Path, purifier: str) -> dict:
    """The one run of a purifier below a folder."""
    (found,) = [run for run in find_runs([folder]) if run["names"]["purifier"] == purifier]
    return found


@pytest.fixture(scope="module", autouse=True)
def decoded_once():
    """The full data set is decompressed once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "_read_idx", functools.cache(loaders._read_idx))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Five purifiers on the same three images, attacked through the view that fits each."""
    out = tmp_path_factory.mktemp("runs")
    assert attacked(out, "vae,vqvae,jpeg,identity,blur:sigma=2") == cli.DONE
    return out


@pytest.fixture(scope="module")
def dials(tmp_path_factory) -> Path:
    """Three settings of one family and two of another on 16 images, not attacked."""
    out = tmp_path_factory.mktemp("dials")
    specs = "blur:sigma={0.5,2,4},bitdepth:bits={1,8}"
    assert attacked(out, specs, "--attack", "identity", "--n-examples", "16") == cli.DONE
    return out


@pytest.fixture(scope="module")
def guesses(tmp_path_factory) -> Path:
    """A purifier that rounds, attacked through each of its surrogates, and beside them by a blind attacker."""
    out = tmp_path_factory.mktemp("guesses")
    few = ("--n-examples", "2", "--attack", "pgd:steps=1")
    assert attacked(out / "told", "vqvae", *few, "--view", "surrogate:gradient={ste,soft,bypass}") == cli.DONE
    assert attacked(out / "blind", "vqvae", *few, "--view", "blind") == cli.DONE
    return out


# --- replays and galleries


@pytest.mark.parametrize("key", ["clean", "adv"])
@pytest.mark.parametrize("purifier", ["vae", "vqvae", "jpeg", "identity", "blur:sigma=2"])
def test_a_replay_is_the_first_draw_of_the_records(runs, purifier, key):
    run = of(runs, purifier)
    replayed = replay(run, 3)
    images = {"clean": replayed.purified, "adv": replayed.purified_adv}[key]
    with torch.no_grad():
        logits = checkpoints.build("classifiers", "resnet", NEED).module(images)
    assert logits.argmax(1).tolist() == [record[key][0] for record in run["records"]]
    # few images are read otherwise by another draw: the logits tell draws apart
    stored = torch.tensor(np.load(Path(run["folder"]) / "logits.npz")[key])
    assert torch.allclose(logits, stored[:, 0], atol=1e-3)
    assert not run["stochastic"] or not torch.allclose(stored[:, 0], stored[:, 1], atol=1e-2)


def test_a_replay_of_copies_is_their_first(tmp_path):
    assert attacked(tmp_path, "vae", "--n-examples", "2", "--attack", "pgd:steps=1", "--copies", "3") == cli.DONE
    (run,) = find_runs([tmp_path])
    replayed, seen = replay(run, 2), []

    def purify(purifier, images, noise):
        seen.append(call(purifier, images, noise))
        return seen[-1]

    tape = Tape(0, "clean", torch.arange(2)).draws(1)
    load("vae", classifier="resnet", dataset=DATASET, copies=3)(replayed.x, tape, purify)
    assert torch.allclose(replayed.purified, seen[0][::3], atol=1e-6)
    assert not torch.allclose(replayed.purified, seen[0][1::3], atol=1e-2)


def test_a_replay_holds_the_images_that_were_attacked(runs):
    run = of(runs, "jpeg")
    replayed = replay(run, 2)
    assert torch.equal(replayed.x, data.load(DATASET).images(slice(0, 2))) and len(replayed.records) == 2
    distance = (replayed.x_adv - replayed.x).flatten(1).abs().amax(1)
    assert distance.tolist() == pytest.approx([record["distance"] for record in run["records"][:2]], abs=1e-6)
    assert distance.min() > 0.01


def test_a_gallery_is_a_figure_in_two_formats(runs, tmp_path, capsys):
    folders = [str(of(runs, name)["folder"]) for name in ("vae", "vqvae", "jpeg")]
    sizes = {}
    for rows, images in ((3, 1), (1, 2)):
        target = tmp_path / "figures" / f"{rows}.png"
        assert cli.main(["report", *folders[:rows], "--gallery", str(target), "--images", str(images)]) == cli.DONE
        assert capsys.readouterr().out.splitlines() == [str(target.with_suffix(".pdf")), str(target)]
        assert target.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        with Image.open(target) as picture:
            assert picture.format == "PNG" and len(picture.convert("L").getcolors()) > 50
            sizes[rows] = picture.size
    (narrow, tall), (wide, low) = sizes[3], sizes[1]
    # five pictures of an image side by side, of more dots than it has pixels
    assert wide > 1.5 * narrow > 1.5 * 5 * 28 and tall > 2 * low > 2 * 28


def test_a_gallery_takes_runs_of_other_lengths_on_the_same_images(runs, dials, tmp_path):
    folders = [str(of(runs, "jpeg")["folder"]), str(of(dials, "blur:sigma=4")["folder"])]
    assert cli.main(["report", *folders, "--gallery", str(tmp_path / "g.png"), "--images", "1"]) == cli.DONE


@needs_full
@pytest.mark.parametrize("split", ["validation", "train"])
def test_a_gallery_of_different_images_is_refused(runs, tmp_path, capsys, split):
    """The first training image has the number and the label of the first test image."""
    few = ("--dataset", f"{DATASET}:split={split}", "--n-examples", "1", "--attack", "identity")
    assert attacked(tmp_path / "other", "identity", *few) == cli.DONE
    folders, target = [str(of(runs, "jpeg")["folder"]), str(tmp_path / "other")], tmp_path / "g.png"
    capsys.readouterr()
    assert cli.main(["report", *folders, "--gallery", str(target), "--images", "1"]) == cli.USAGE
    assert "the runs attacked different ones" in capsys.readouterr().err
    assert not target.exists() and not target.with_suffix(".pdf").exists()
    with pytest.raises(UsageError, match="same images"):
        gallery([replay(run, 1) for run in find_runs(folders)], target)


def test_what_a_gallery_lacks_is_named(runs, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(of(runs, "vae")["folder"], folder)
    command = ["report", str(folder), "--gallery", str(tmp_path / "g.png")]
    for count, expected in (("0", "at least one image is needed, got 0"), ("9", "has 3 images, 9 were asked for")):
        assert cli.main([*command, "--images", count]) == cli.USAGE
        assert expected in capsys.readouterr().err
    settings = json.loads((folder / "run.json").read_text())
    settings["identity"]["weights"]["purifier.autoencoder"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(settings))
    assert cli.main(command) == cli.USAGE
    assert "autoencoder of vae" in (message := capsys.readouterr().err) and "other weights" in message
    (folder / "adversarial.npy").unlink()
    assert cli.main(command) == cli.USAGE
    message = capsys.readouterr().err
    assert f"{folder / 'adversarial.npy'}: no such file" in message and "repeat it with another --out" in message
    assert not (tmp_path / "g.png").exists()


def test_images_of_ones_own_are_found_where_they_are_said_to_be(tmp_path, capsys, monkeypatch):
    few = data.load("fashion-mnist", 30)
    for k, (pixels, label) in enumerate(zip(few.pixels, few.labels, strict=False)):
        (kind := tmp_path / "mine" / f"kind{int(label)}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(kind / f"{k}.png")
    source, out = f"folder:{tmp_path / 'mine'},family=fashion-mnist", tmp_path / "out"
    assert attacked(out, "blur:sigma=2", "--dataset", source) == cli.DONE
    monkeypatch.chdir(tmp_path / "out")
    gallery, diagnosed = ["report", str(out), "--gallery", str(tmp_path / "g.png")], ["diagnose", str(out), "--json"]
    for command in (gallery, diagnosed):
        capsys.readouterr()
        assert cli.main(command) == cli.USAGE
        assert "folder:mine: no such folder" in (said := capsys.readouterr().err) and "--dataset" in said
        assert cli.main([*command, "--dataset", source]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["runs"][0]["n"] == 3
    other = f"folder:{tmp_path / 'other'},family=fashion-mnist"
    shutil.copytree(tmp_path / "mine", tmp_path / "other")
    next((tmp_path / "other" / "kind0").iterdir()).unlink()
    assert cli.main([*diagnosed, "--dataset", other]) == cli.USAGE
    assert "attacked other images of folder:mine" in capsys.readouterr().err


# --- diagnoses


@pytest.fixture(scope="module")
def diagnosed(runs) -> dict[str, dict]:
    """What the runs are diagnosed with, by purifier."""
    from benchmark.diagnose import diagnosis

    return {run["names"]["purifier"]: diagnosis(replay(run, 3)) for run in find_runs([runs])}


def test_doing_nothing_loses_nothing_and_stops_nothing(diagnosed):
    found = diagnosed["identity"]
    assert found["moved"] == 0 and found["n"] == 3
    ratios = ("fine_kept_ratio", "variety_ratio", "passed_ratio", "aligned")
    assert [found[key] for key in ratios] == pytest.approx([1, 1, 1, 1], abs=1e-9)


def test_spectra_hold_all_power_and_know_a_frequency():
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    rings = spectrum(x)
    assert (
        rings.shape == (14,) and torch.allclose(spectrum(2 * x), 4 * rings) and torch.allclose(spectrum(x + 1), rings)
    )
    wave = torch.sin(2 * torch.pi * 5 / 28 * torch.arange(28, dtype=torch.float64)).expand(1, 1, 28, 28)
    shares = spectrum(wave) / (wave.square().sum() * 28 * 28)  # Parseval
    assert shares[4] == pytest.approx(1) and shares.sum() == pytest.approx(1)


def test_a_blur_passes_low_frequencies_and_doing_nothing_passes_all(diagnosed, tmp_path):
    still, blurred = diagnosed["identity"], diagnosed["blur:sigma=2"]
    assert still["kept_by_frequency"] == still["passed_by_frequency"] == [1.0] * 14
    for key in ("kept_by_frequency", "passed_by_frequency"):
        assert blurred[key][0] > 0.5 and blurred[key][-1] < 0.05
    drawn = draw([still, blurred], tmp_path / "spectra.png")
    table = pd.read_csv(tmp_path / "spectra.csv")
    assert {p.suffix for p in drawn} == {".pdf", ".png", ".csv"} and all(p.stat().st_size > 500 for p in drawn)
    assert list(table.loc[table["purifier"] == "blur:sigma=2", "kept"]) == blurred["kept_by_frequency"]
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps({"runs": [still, blurred]}))
    command = ["diagnose", str(saved), "--spectra", str(tmp_path / "one.png")]
    assert cli.main([*command, "--only", "blur:sigma=2"]) == cli.DONE
    assert set(pd.read_csv(tmp_path / "one.csv")["purifier"]) == {"blur:sigma=2"}
    assert cli.main([*command, "--only", "blurr"]) == cli.USAGE
    with pytest.raises(UsageError, match="diagnose the runs again"):
        draw([{"purifier": "old"}], tmp_path / "old.png")


def test_a_heavy_blur_loses_what_is_fine(diagnosed):
    found, images = diagnosed["blur:sigma=2"], data.load(DATASET).images(slice(0, 3))
    assert 0 < found["fine_kept_ratio"] < 0.5
    assert found["fine_kept_ratio"] < diagnosed["jpeg"]["fine_kept_ratio"]
    assert found["variety_ratio"] < 1 and found["passed_ratio"] < 1
    blur = benchmark.load("blur:sigma=2").purifier
    moved = (blur(images, Tape(0, "verdict", torch.arange(3))) - images).square().mean().sqrt()
    assert found["moved"] == pytest.approx(float(moved), rel=1e-5)


def test_codes_are_counted_where_there_is_a_codebook(diagnosed):
    used = {name: found["codes_used"] for name, found in diagnosed.items()}
    size = len(checkpoints.build("purifiers", "vqvae", NEED).module.codec.embedding)
    assert 1 < used.pop("vqvae") <= size
    assert set(used.values()) == {None}


def test_a_diagnosis_is_printed_for_readers_and_for_machines(runs, diagnosed, capsys):
    assert cli.main(["diagnose", str(runs), "--n-examples", "3", "--json"]) == cli.DONE
    document = strict(capsys.readouterr().out)
    assert {found["purifier"]: found for found in document["runs"]} == diagnosed
    assert cli.main(["diagnose", str(runs), "--n-examples", "3"]) == cli.DONE
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(diagnosed) and {line.count("|") for line in lines} == {12}
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {found['purifier']}" for found in document["runs"]]


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_diagnosis_without_a_perturbation_or_of_one_image_is_json_too(dials, capsys, count):
    folder = str(of(dials, "blur:sigma=2")["folder"])
    assert cli.main(["diagnose", folder, "--n-examples", count, "--json"]) == cli.DONE
    (found,) = strict(capsys.readouterr().out)["runs"]
    assert found["passed_ratio"] is None and found["aligned"] is None and found["moved"] > 0
    assert (found["variety_ratio"] is None) == (count == "1")


# --- matched settings


def clean_accuracy(run: dict) -> float:
    return float(np.mean([[c == r["label"] for c in r["clean"]] for r in run["records"]]))


def test_the_setting_of_closest_clean_accuracy_is_chosen(dials, capsys):
    assert cli.main(["report", str(dials), "--match", "0.9,0.3"]) == cli.DONE
    head, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in head.strip("|").split("|")]
    found = [dict(zip(names, (c.strip() for c in line.strip("|").split("|")), strict=True)) for line in lines]
    clean = {run["names"]["purifier"]: clean_accuracy(run) for run in find_runs([dials])}
    assert len(set(clean.values())) > 2, "settings that are all alike would show nothing"
    keys = [(f["family"], f["target clean %"]) for f in found]
    assert sorted(keys) == [("bitdepth", "30"), ("bitdepth", "90"), ("blur", "30"), ("blur", "90")]
    for f in found:
        target = float(f["target clean %"]) / 100
        settings = {name: abs(value - target) for name, value in clean.items() if name.startswith(f["family"])}
        assert settings[f["setting"]] == min(settings.values())
        assert f["clean % [95 %]"].startswith(f"{100 * clean[f['setting']]:.1f} [")
        assert (f["n"], f["settings tried"]) == ("16", str(len(settings)))
    assert len({f["setting"] for f in found if f["family"] == "blur"}) == 2


def test_a_setting_that_met_two_attacks_was_tried_once(runs, dials, capsys):
    assert cli.main(["report", str(dials), str(of(runs, "blur:sigma=2")["folder"]), "--match", "0.9"]) == cli.DONE
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| blur ")]
    assert line.split("|")[-2].strip() == "3"


@pytest.mark.parametrize("value", ["often", "0", "1.5", "85", "-0.5", "nan", "inf", "0.8,", "0.8,x", ","])
def test_targets_are_fractions(dials, capsys, value):
    assert cli.main(["report", str(dials), f"--match={value}"]) == cli.USAGE
    output = capsys.readouterr()
    assert output.out == "" and f"--match {value}: expected fractions with commas" in output.err


def test_no_target_at_all_is_no_report(dials, capsys):
    assert cli.main(["report", str(dials), "--match", ""]) == cli.USAGE
    assert capsys.readouterr().out == ""


# --- image files


@pytest.fixture
def photo(tmp_path) -> Path:
    """The first test image as a file."""
    path = tmp_path / "photo.png"
    Image.fromarray(data.load(DATASET).pixels[0, 0].numpy()).save(path)
    return path


def purified(source: Path, target: Path, *arguments: str) -> int:
    return cli.main(["purify", str(source), "--out", str(target), "--purifier", "vae", "--offline", *arguments])


def test_a_file_is_purified_by_the_purifier_named(photo, tmp_path, capsys):
    target, before = tmp_path / "clean.png", photo.read_bytes()
    assert purified(photo, target, "--purifier", "blur:sigma=2") == cli.DONE
    output = capsys.readouterr()
    assert output.out == f"{target}\n" and "blur:rounds=1,sigma=2.0" in output.err
    expected = benchmark.load("blur:sigma=2").purifier(data.load(DATASET).images(slice(0, 1)))
    with Image.open(target) as image:
        assert image.size == (28, 28) and image.mode == "L"
        assert np.array_equal(np.asarray(image), (255 * expected[0, 0]).round().byte().numpy())
    assert photo.read_bytes() == before


def test_the_seed_decides_the_draw(photo, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert purified(photo, tmp_path / f"{name}.png", "--seed", seed) == cli.DONE
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_nothing_is_overwritten(photo, tmp_path, capsys):
    target = tmp_path / "clean.png"
    target.write_text("precious")
    assert purified(photo, target) == cli.USAGE
    assert f"{target} exists" in capsys.readouterr().err
    assert target.read_text() == "precious"
    before = photo.read_bytes()
    assert purified(photo, photo) == cli.USAGE
    assert photo.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.png", "no such file"),
        ("text.png", "isn't an image"),
        ("folder.png", "isn't an image"),
        ("torn.png", "isn't an image"),
        ("wide.png", "--resize"),
    ],
)
def test_what_cannot_be_purified_is_named(photo, tmp_path, capsys, name, expected):
    source, target = tmp_path / name, tmp_path / "clean.png"
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "torn.png").write_bytes(photo.read_bytes()[:200])
    Image.new("RGB", (40, 28)).save(tmp_path / "wide.png")
    assert purified(source, target) == cli.USAGE
    message = capsys.readouterr().err
    assert str(source) in message and expected in message
    assert not target.exists()


@pytest.mark.parametrize("name", ["nowhere/clean.png", "clean.unknown", "clean"])
def test_a_target_that_cannot_be_written_is_named(photo, tmp_path, capsys, name):
    assert purified(photo, tmp_path / name) == cli.USAGE
    assert f"--out {tmp_path / name}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_an_image_of_another_size_and_colour_is_scaled_on_request(photo, tmp_path):
    colour, target = tmp_path / "colour.png", tmp_path / "clean.png"
    with Image.open(photo) as image:
        image.convert("RGB").resize((56, 84)).save(colour)
    assert purified(colour, target, "--purifier", "identity", "--resize") == cli.DONE
    with Image.open(target) as image, Image.open(photo) as original:
        assert image.size == (28, 28) and image.mode == "L"
        assert np.abs(np.asarray(image, dtype=float) - np.asarray(original)).mean() < 10


# --- views


def test_the_view_is_the_one_that_fits_the_purifier(runs):
    views = {run["names"]["purifier"]: run["identity"]["view"] for run in find_runs([runs])}
    ste = "surrogate:gradient=ste"
    soft = "surrogate:gradient=soft"
    assert views == {"vae": "exact", "vqvae": soft, "jpeg": ste, "identity": "exact", "blur:sigma=2": "exact"}


def test_a_cell_that_fails_preflight_stops_no_other(tmp_path, capsys):
    """The exact gradient of a purifier that rounds is zero; that of a blur isn't."""
    command = ["run", "--attack", "pgd:steps=1", "--n-examples", "2", "--budget", "quick", "--device", "cpu",
               "--offline", "--view", "exact"]  # fmt: skip
    assert cli.main([*command, "--purifier", "jpeg", "--out", str(tmp_path / "one")]) == cli.FAILED
    output = capsys.readouterr()
    assert output.out == "" and "nothing was measured" in output.err
    assert "zero-gradients" in output.err and "--view surrogate:gradient=" in output.err
    assert not [path for path in tmp_path.rglob("*") if path.name in ("records.jsonl", "journal.jsonl")]

    assert cli.main([*command, "--purifier", "jpeg,blur", "--out", str(tmp_path / "two")]) == cli.FAILED
    output = capsys.readouterr()
    rows = [line for line in output.out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 1 and rows[0].startswith("| blur |")
    _, _, left_out = output.err.partition("not in the table: ")
    assert "zero-gradients" in left_out
    assert [len(run["records"]) for run in find_runs([tmp_path / "two"])] == [2]  # the jpeg's left no folder


def test_surrogates_are_one_attacker_and_a_blind_one_is_another(guesses, capsys):
    names = [f"surrogate:gradient={name}" for name in ("bypass", "soft", "ste")]
    told = find_runs([guesses / "told"])
    assert sorted(run["identity"]["view"] for run in told) == names
    assert cli.main(["report", str(guesses), "--worst-case", "--format", "json"]) == cli.DONE
    rows = strict(capsys.readouterr().out)
    assert sorted(row["view"] for row in rows if row["attack"] != "worst-case") == ["blind", *names]
    (worst,) = [row for row in rows if row["attack"] == "worst-case"]
    assert worst["view"].split(", ") == names
    assert set(worst["run"].split(" + ")) == {str(run["folder"]) for run in told}
    # no draw differs from another: the worst case is the minimum over views, image by image
    correct = [[np.mean(np.array(r["adv"]) == r["label"]) for r in run["records"]] for run in told]
    assert worst["robust"] == pytest.approx(np.min(correct, axis=0).mean())


def test_surrogates_share_a_line_of_the_compact_report(guesses, capsys):
    for folder, lines in (("told", 1), ("blind", 1), ("", 2)):
        assert cli.main(["report", str(guesses / folder), "--compact"]) == cli.DONE
        found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vqvae")]
        assert len(found) == lines
        if folder == "told":
            assert all(name in found[0].split("|")[1] for name in ("bypass", "soft", "ste"))
        elif not folder:
            assert sum("blind" in line for line in found) == 1


# --- names and weights


@pytest.fixture(scope="module")
def listed() -> dict[str, dict]:
    """The entries of ``list purifiers --json`` by name."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["list", "purifiers", "--json"]) == cli.DONE
    return {entry["name"]: entry for entry in strict(out.getvalue())}


def test_the_list_says_what_purifiers_cost_and_how_they_are_attacked(listed):
    expected = {"parameters": int, "nfe": int, "stochastic": bool, "differentiable": bool, "surrogates": str}
    for name, entry in listed.items():
        assert {key: type(entry[key]) for key in expected} == expected, name
        assert entry["dial"] is None or entry["dial"] in entry["options"], name
        assert (entry["parameters"] > 0) == entry["weights"], name
        assert entry["nfe"] >= 1 and (entry["differentiable"] or entry["surrogates"]), name
    assert listed["vqvae"]["surrogates"] == "soft, ste, bypass" and listed["vqvae"]["dial"] == "codes"
    rounding = {name for name, entry in listed.items() if not entry["differentiable"]}
    assert rounding >= {"vqvae", "jpeg", "bitdepth"} and not rounding & {"identity", "blur", "vae", "diffpure"}
    assert listed["vae"]["stochastic"] and not listed["blur"]["stochastic"]
    assert listed["diffpure"]["nfe"] == int(listed["diffpure"]["options"]["steps"])


def test_weights_are_chosen_by_an_option(capsys):
    short = checkpoints.build("purifiers", "vae:weights=beta4,temperature=0", NEED)
    card = checkpoints.build("purifiers", "vae-beta4:temperature=0", NEED)
    assert short.weights == card.weights != checkpoints.build("purifiers", "vae", NEED).weights
    assert short.spec == card.spec and str(short.spec).startswith("vae-beta4:") and not short.module.stochastic
    assert cli.main(["plan", "--purifier", "vae:weights=beta5", "--attack", "identity", "--offline"]) == cli.USAGE
    output = capsys.readouterr()
    assert output.out == "" and "'vae-beta5'; did you mean vae-beta4" in output.err


def test_an_option_called_weights_is_still_a_zoos_own():
    need = checkpoints.Need(FORMS["imagenet"], offline=True)
    with pytest.raises(UsageError, match="unknown weights of resnet18 'NOPE'.*IMAGENET1K_V1"):
        checkpoints.build("classifiers", "torchvision:resnet18,weights=NOPE", need)


# --- cards


def dtypes(file: Path) -> set[str]:
    """The number types in a safetensors file, as its header says."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_card_is_true(name):
    card = strict(CARDS[name].read_text())
    assert checkpoints.check_files(CARDS[name]) == len(card["files"]) > 0
    for entry in card["files"].values():
        if "of" in entry:
            owner = strict(CARDS[entry["of"]].read_text())["files"]
            assert entry["sha256"] in {e["sha256"] for e in owner.values() if "of" not in e}
            continue
        floats = {kind for kind in dtypes(CARDS[name].parent / entry["file"]) if kind.startswith(("F", "BF"))}
        assert floats == {"F32" if name in FULL_PRECISION else "F16"}


def test_the_command_of_a_card_makes_its_weights():
    commands = {name: strict(card.read_text())["command"] for name, card in CARDS.items()}
    assert commands == {name: f"python -m benchmark train {name} --dataset {DATASET}" for name in CARDS}
    assert set(CARDS) <= set(recipes(DATASET))


def test_no_weights_lie_twice():
    found: dict[str, str] = {}
    for name, card in CARDS.items():
        for part, entry in strict(card.read_text())["files"].items():
            if "of" not in entry:
                assert found.setdefault(entry["sha256"], name) == name, f"{part} of {name}: say which card it is of"
    on_disk = {path for card in CARDS.values() for path in card.parent.rglob("*.safetensors")}
    assert len(on_disk) == len(found), "a file that no card names"


def test_purifiers_are_small(listed):
    named = {name for name, kind in KINDS.items() if kind == "purifiers"}
    assert named <= set(listed)
    need = checkpoints.Need(data.form("fashion-mnist"))
    for name in named:
        networks = dict(checkpoints.build("purifiers", name, need).module.named_children())
        sizes = {k: sum(p.numel() for p in network.parameters()) for k, network in networks.items()}
        assert max(sizes.values()) < 800_000, f"{name}: {sizes}"
    stated = {name: strict(CARDS[name].read_text())["parameters"] for name in named}
    assert stated == {name: listed[name]["parameters"] for name in named}


# --- training


@pytest.fixture(scope="module")
def own_recipes(tmp_path_factory):
    """``RECIPES`` in place of the shipped ones."""
    path = tmp_path_factory.mktemp("recipes") / "recipes.toml"
    path.write_text(RECIPES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_book, "RECIPES", path)
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory, own_recipes) -> Path:
    """What a training without a step wrote."""
    return train("begun", DATASET, tmp_path_factory.mktemp("begun"), limit=64)


def state(part: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(part.state_dict())


@needs_full
def test_critics_train_along_and_are_thrown_away(tmp_path, own_recipes):
    folder = train("judged", DATASET, tmp_path, limit=64)
    card = strict((folder / "card.json").read_text())
    for facts in card["measured"].values():
        losses = {key for key in facts if key.startswith("objective of ")}
        assert losses == {f"objective of {key}" for key in ("autoencoder", "image_critic", "code_critic")}
        # one that has learned nothing says 2 log 2 = 1.386
        assert 0 < facts["objective of image_critic"] < 1.3
    assert list(card["files"]) == ["autoencoder"] and card["skipped_steps"] == 0
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["autoencoder"]
    parts = registry.load("purifiers", "vae").parts((1, 28, 28), "tiny")
    assert card["parameters"] == sum(p.numel() for p in parts["autoencoder"].parameters())


@needs_full
def test_training_starts_from_the_weights_named(begun):
    card = strict((begun / "card.json").read_text())
    source = strict(CARDS["vae"].read_text())["files"]["autoencoder"]
    assert card["files"]["autoencoder"] == {"of": "vae"} | source and "of" not in card["files"]["prior"]
    assert [path.name for path in begun.iterdir() if path.is_dir()] == ["prior"], "what wasn't moved isn't copied"

    need = checkpoints.Need(FORMS[DATASET], roots=(begun.parents[1],))
    built, vae = (checkpoints.build("purifiers", name, need).module for name in ("begun", "vae"))
    ours, theirs = state(built.autoencoder), state(vae.autoencoder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # and what has a closed form was set from training images
    fresh = registry.load("purifiers", "map").parts((1, 28, 28), "mixture")["prior"]
    assert any(not torch.equal(value, state(fresh)[key]) for key, value in state(built.prior).items())


@needs_full
def test_the_command_of_a_card_is_the_one_that_trained_it(begun):
    """Whatever the network is called."""
    card = strict((begun / "card.json").read_text())
    assert card["command"] == f"python -m benchmark train begun --dataset {DATASET}"


@needs_full
def test_training_from_weights_that_are_not_there_is_refused(tmp_path, own_recipes):
    with pytest.raises(UsageError, match="starts from judged, which has no weights; train it first"):
        train("orphan", DATASET, tmp_path, limit=64)
    assert not list(tmp_path.rglob("card.json"))


@needs_full
def test_steps_with_a_long_gradient_move_nothing(tmp_path, own_recipes):
    folder = train("still", DATASET, tmp_path, limit=64)
    card = strict((folder / "card.json").read_text())
    assert card["skipped_steps"] == 2
    need = checkpoints.Need(FORMS[DATASET], roots=(tmp_path,))
    still, vae = (checkpoints.build("purifiers", name, need).module for name in ("still", "vae"))
    ours, theirs = state(still.autoencoder), state(vae.autoencoder)
    assert all(torch.equal(ours[key], theirs[key].half().float()) for key in ours)
    assert dtypes(folder / card["files"]["autoencoder"]["file"]) == {"F16"}
    # the judge's features are part of what is minimised: without them it is less
    plain = recipe_book.Recipe(**card["recipe"] | {"judge": None, "objective": {}})
    alone = measure(still.train(), plain, {"test": data.load(DATASET)}, limit=64)["test"]["objective of autoencoder"]
    assert card["measured"]["test"]["objective of autoencoder"] > alone + 1


@pytest.mark.parametrize(("purifier", "view"), [("jpeg", "surrogate:gradient=ste"), ("blur", "exact")])
def test_check_takes_the_gradient_that_a_purifier_has(purifier, view, capsys):
    """Whoever ships a purifier that rounds passes; an audit of its exact gradient says that there is none."""
    assert cli.main(["check", "--purifier", purifier, "--json"]) == cli.DONE
    (checks,) = strict(capsys.readouterr().out).values()
    assert {c["id"]: c["value"] for c in checks}["view"] == view
    code = cli.main(["audit", "--only", "gradients", "--purifier", purifier, "--n-examples", "2", "--device", "cpu",
                     "--budget", "quick", "--attack", "pgd:steps=1", "--json"])  # fmt: skip
    (audit,) = strict(capsys.readouterr().out)["gradients"]
    status = {c["id"]: c["status"] for c in audit["checks"]}["exact-says-something"]
    assert (code, status) == (cli.DONE, "pass" if view == "exact" else "n/a")
