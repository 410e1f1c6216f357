"""Training: every recipe writes a card that builds, overwrites nothing, and survives being stopped."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest, uniform
from torchvision.transforms.functional import to_pil_image

from benchmark import checkpoints, cli, data, loaders, registry
from benchmark import recipes as recipe_book
from benchmark import train as training
from benchmark.errors import RunError, UsageError
from benchmark.measure import frechet, last_features, measure
from benchmark.recipes import ordered, recipes
from benchmark.results import sole
from benchmark.train import train
from purifiers import Batch, Defense, Tape

DATASET = "fashion-mnist"
NAMES = sorted(recipes(DATASET))
QUICK = ("resnet-at", "vae", "vae-gan", "vae-perceptual", "vqvae", "nvae")
"""One recipe of every kind; the others are like them."""
needs_full = pytest.mark.skipif(
    not (loaders.SYSTEM / DATASET / "train-images-idx3-ubyte.gz").exists(),
    reason=f"training needs the full Fashion-MNIST in {loaders.SYSTEM / DATASET}",
)


def write(path: Path, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    """A Parquet file of images in the hubs' layout."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for image in pixels:
        to_pil_image(image).save(buffer := io.BytesIO(), "png")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"img": rows, "label": labels.tolist()}), path)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> None:
    """The recipes with tiny networks and small batches, for what doesn't depend on size."""
    text = re.sub(r'size = "small-(\w+)"', r'size = "tiny-\1"', recipe_book.RECIPES.read_text())
    text = re.sub(r'size = "\w+"', 'size = "tiny"', text)
    (tmp_path / "recipes.toml").write_text(text.replace("batch_size = 128", "batch_size = 32"))
    monkeypatch.setattr(recipe_book, "RECIPES", tmp_path / "recipes.toml")
    assert {(r.size.partition("-")[0], r.batch_size) for r in recipes(DATASET).values()} == {("tiny", 32)}


def test_there_is_a_recipe_for_all_that_ships_with_weights():
    assert {"resnet", "resnet-at", "vae", "diffpure"} <= set(NAMES)
    trained = [n for n in registry.names("purifiers") if registry.load("purifiers", n).parts((1, 28, 28), "tiny")]
    assert set(trained) <= set(NAMES), "a component with networks needs a recipe, or nobody can make its weights"


@needs_full
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NAMES], ids=str
)
def test_every_recipe_writes_a_card_that_builds(tmp_path, name):
    recipe = recipes(DATASET)[name]
    folder = train(name, DATASET, tmp_path, epochs=1, limit=256)
    assert folder == tmp_path / DATASET / name
    assert not (folder / "state.pt").exists()
    assert (folder / "samples.png").exists() == (recipe.kind == "purifiers" and recipe.component != "elbo")

    card = json.loads((folder / "card.json").read_text())
    assert (card["kind"], card["component"], card["size"]) == (recipe.kind, recipe.component, recipe.size)
    assert card["recipe"]["epochs"] == 1 and card["data"]["training_images"] == 256
    assert card["data"]["sha256"] == loaders.FASHION_SHA256["train"]
    assert card["files"] and all(
        checkpoints.sha256(folder / entry["file"]) == entry["sha256"] for entry in card["files"].values()
    )
    assert {split: facts["n"] for split, facts in card["measured"].items()} == {"validation": 256, "test": 256}

    built = checkpoints.build(recipe.kind, name, checkpoints.Need(data.form(DATASET), roots=(tmp_path,)))
    assert built.weights == {part: entry["sha256"] for part, entry in card["files"].items()}
    assert built.spec.options.items() >= recipe.options.items()
    assert sum(p.numel() for p in built.module.parameters()) == card["parameters"]
    assert not built.module.training and not any(p.requires_grad for p in built.module.parameters())

    if recipe.critics:
        return  # they are thrown away after training: nobody can measure again what they measured
    # what the card says of the weights is true of what was built from them
    images = data.load(f"{DATASET}:split=validation").first(250)
    batch, tape = Batch(images.images(slice(None)), images.labels), Tape(recipe.seed, "measure", images.ids)
    with torch.no_grad():
        aside = training._aside(recipe, type(built.module), images, tmp_path, "cpu")
        losses = built.module.objectives(batch, tape, **recipe.objective, **aside)
    for key, loss in losses.items():
        # the card's is over 256 images
        assert float(loss) == pytest.approx(card["measured"]["validation"][f"objective of {key}"], rel=0.05)


@needs_full
@pytest.mark.parametrize("name", ["resnet-at", "vae"])
def test_stopped_and_continued_gives_the_weights_of_a_training_that_was_not(tmp_path, tiny, monkeypatch, name):
    whole = train(name, DATASET, tmp_path / "whole", epochs=2, limit=64)

    class Stop(Exception):
        pass

    batch_of, asked = training._batch, []

    def stopping(images, recipe, step, *rest):
        asked.append(step)
        if stop_at is not None and len(asked) > 1 and step == stop_at:
            raise Stop
        return batch_of(images, recipe, step, *rest)

    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(training, "_batch", stopping)
    for stop_at in (1, 3, None):  # in the first epoch, in the second, to the end
        asked.clear()
        if stop_at is None:
            resumed = train(name, DATASET, tmp_path / "stopped", epochs=2, limit=64)
        else:
            with pytest.raises(Stop):
                train(name, DATASET, tmp_path / "stopped", epochs=2, limit=64)
    assert asked == [0, 3], "after the probe, the last training must begin where the one before it was stopped"
    assert weights(resumed) == weights(whole)
    assert (resumed / "card.json").read_text() == (whole / "card.json").read_text()


@needs_full
def test_a_state_of_another_length_is_refused(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(training, "measure", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train("vae", DATASET, tmp_path, epochs=1, limit=32)
    with pytest.raises(UsageError, match="is of a training of 1 steps, not 2"):
        train("vae", DATASET, tmp_path, epochs=2, limit=32)


@needs_full
def test_a_state_of_another_recipe_is_refused(tmp_path, tiny):
    train("vae", DATASET, tmp_path, epochs=1, limit=64, stop_steps=1)
    text = recipe_book.RECIPES.read_text()
    recipe_book.RECIPES.write_text(text.replace("objective = { sigma_x = 0.1,", "objective = { sigma_x = 0.2,"))
    assert recipe_book.RECIPES.read_text() != text
    with pytest.raises(UsageError, match="of another recipe, other images or other weights to start from; delete it"):
        train("vae", DATASET, tmp_path, epochs=1, limit=64)


@needs_full
def test_a_training_left_early_says_what_is_left_and_goes_on(tmp_path, tiny):
    whole = train("vae", DATASET, tmp_path / "whole", epochs=2, limit=64)
    assert training.paused(whole) is None
    for done in (1, 3):
        part = train("vae", DATASET, tmp_path / "part", epochs=2, limit=64, stop_steps=done - (done > 1))
        left = training.paused(part)
        assert left and (left["step"], left["total"]) == (done, 4) and left["seconds"] > 0
        assert not (part / "card.json").exists()
    train("vae", DATASET, tmp_path / "part", epochs=2, limit=64, stop_steps=7)  # more than are left
    assert training.paused(part) is None and weights(part) == weights(whole)


@needs_full
def test_the_last_steps_see_the_finishing_images(tmp_path, tiny, monkeypatch):
    text = recipe_book.RECIPES.read_text()
    recipe_book.RECIPES.write_text(
        text.replace("objective = { sigma_x = 0.1,", "finish = 0.4\nobjective = { sigma_x = 0.1,")
    )
    batch_of, seen = training._batch, []

    def watching(images, recipe, step, total, device, began=0):
        batch, tape = batch_of(images, recipe, step, total, device, began)
        seen.append((step, began, len(batch.y), images.name))
        return batch, tape

    monkeypatch.setattr(training, "_batch", watching)
    pixels = data.load(DATASET).first(32)
    source = tmp_path / "good" / "fashion-mnist"
    source.mkdir(parents=True)
    write(source / "train-0.parquet", pixels.pixels[:16], pixels.labels[:16])
    write(source / "test-0.parquet", pixels.pixels[16:], pixels.labels[16:])
    folder = train("vae", DATASET, tmp_path, epochs=5, limit=32, finish=f"parquet:{source}")
    assert [s[:2] for s in seen[1:]] == [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3)]
    assert [s[3].split(":")[0] for s in seen[1:]] == [DATASET] * 3 + ["parquet"] * 2
    card = json.loads((folder / "card.json").read_text())
    assert card["data"]["finish"] == "parquet:fashion-mnist,family=fashion-mnist" and "--finish" in card["command"]
    assert (card["data"]["finishing_images"], card["data"]["finishing_steps"]) == (15, 2)
    assert card["measured"]["validation"]["n"] == 1 and card["command"].endswith("--epochs 5")
    for steps in (4, 1):  # the second begins where the last images are already shown
        train("vae", DATASET, tmp_path / "parts", epochs=5, limit=32, finish=f"parquet:{source}", stop_steps=steps)
    assert weights(tmp_path / "parts" / DATASET / "vae") == weights(folder)


@needs_full
def test_images_that_are_both_trained_on_and_held_out_are_refused(tmp_path):
    source = tmp_path / "fashion-mnist"
    source.mkdir()
    pixels = data.load(data.part(DATASET, "train")).first(40)  # every tenth for validation, which the main set shows
    write(source / "train-0.parquet", pixels.pixels, pixels.labels)
    write(source / "test-0.parquet", 255 - pixels.pixels, pixels.labels)
    with pytest.raises(UsageError, match="4 of 4 images of validation are among the training images"):
        train("vae", DATASET, tmp_path / "out", finish=f"parquet:{source}")


@needs_full
def test_a_missing_split_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_fit", lambda *a: pytest.fail("a step was taken"))
    source = tmp_path / "fashion-mnist"
    source.mkdir()
    images = data.load(DATASET).first(16)
    write(source / "train-0.parquet", images.pixels, images.labels)
    with pytest.raises(UsageError, match="no file of the split 'test'"):
        train("vae", DATASET, tmp_path / "out", finish=f"parquet:{source}")


@needs_full
def test_weights_to_start_from_that_were_made_anew_are_another_training(tmp_path, tiny):
    train("vae", DATASET, tmp_path, epochs=1, limit=32)
    train("vae-beta4", DATASET, tmp_path, epochs=2, limit=32, stop_steps=1)
    shutil.rmtree(tmp_path / DATASET / "vae")
    train("vae", DATASET, tmp_path, epochs=2, limit=32)
    with pytest.raises(UsageError, match="other weights to start from"):
        train("vae-beta4", DATASET, tmp_path, epochs=2, limit=32)


@needs_full
def test_an_unreadable_state_is_said(tmp_path, tiny):
    train("vae", DATASET, tmp_path, epochs=2, limit=32, stop_steps=1)
    (tmp_path / DATASET / "vae" / "state.pt").write_bytes(b"torn")
    with pytest.raises(UsageError, match="state.pt can't be read .*; delete it"):
        train("vae", DATASET, tmp_path, epochs=2, limit=32)


@needs_full
def test_two_processes_dont_make_the_same_weights(tmp_path, tiny):
    folder = train("vae", DATASET, tmp_path, epochs=2, limit=32, stop_steps=1)
    with sole(folder / ".work.lock", ""), pytest.raises(RunError, match="another process .* choose another --out"):
        train("vae", DATASET, tmp_path, epochs=2, limit=32)
    train("vae", DATASET, tmp_path, epochs=2, limit=32)


@pytest.mark.parametrize("adversary, start, step, ball", [("rs-fgsm", 1, 1.25, 1), ("n-fgsm", 2, 1, math.inf)])
def test_an_adversary_takes_the_step_its_paper_says(adversary, start, step, ball):
    eps, sign = 8 / 255, torch.tensor([1.0, -1.0]).repeat(1, 1, 16, 8)
    recipe = replace(recipes("cifar10")["resnet-at"], adversarial_eps="8/255", adversary=adversary)
    x, y = torch.full((64, 1, 16, 16), 0.5), torch.zeros(64, dtype=torch.long)

    def classifier(images):  # its loss on label 0 grows along ``sign``
        logit = (images * sign).sum((1, 2, 3))
        return torch.stack([-logit, logit], 1) / 100

    tape = Tape(0, "train", torch.arange(64), torch.zeros(64, dtype=torch.long))
    batch = training._adversarial(classifier, Batch(x, y, 0.0), tape, recipe)
    moved = ((batch.x - x) * sign).flatten() / eps
    drawn = (moved - step).double()
    assert torch.equal(batch.y, y) and moved.abs().max() <= ball + 1e-4
    if ball == math.inf:  # nothing of the uniform start is cut off
        assert kstest(drawn, uniform(-start, 2 * start).cdf).pvalue > 0.001
    else:  # what went over the edge lies on it: where the start was above ball - step
        assert moved.min() >= step - start - 1e-4
        assert (moved > ball - 1e-4).double().mean() == pytest.approx((start - ball + step) / (2 * start), abs=0.02)


def test_an_unknown_adversary_is_refused():
    with pytest.raises(ValueError, match="adversary must be one of rs-fgsm, n-fgsm, got 'fgsm'"):
        replace(recipes("cifar10")["resnet-at"], adversary="fgsm")


@needs_full
def test_training_moves_the_objective_down(tmp_path, tiny):
    recipe = recipes(DATASET)["vae"]
    folder = train("vae", DATASET, tmp_path, epochs=10, limit=256)
    key = "objective of autoencoder"
    after = json.loads((folder / "card.json").read_text())["measured"]["test"][key]
    component = registry.load(recipe.kind, recipe.component)
    torch.manual_seed(recipe.seed)
    fresh = component(*component.parts((1, 28, 28), recipe.size).values(), **recipe.options)
    before = measure(fresh, recipe, {"test": data.load(DATASET)}, limit=256)["test"][key]
    assert after < 0.8 * before


def test_finished_weights_are_never_overwritten(tmp_path, capsys):
    card = tmp_path / DATASET / "vae" / "card.json"
    card.parent.mkdir(parents=True)
    card.write_text("precious")
    assert cli.main(["train", "vae", "--dataset", DATASET, "--out", str(tmp_path)]) == cli.USAGE
    message = capsys.readouterr().err
    assert str(card) in message and "choose another --out or delete the folder" in message
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["precious"]


def test_an_unknown_recipe_gives_the_nearest_and_the_whole_list(tmp_path, capsys):
    assert cli.main(["train", "resnet-att", "--out", str(tmp_path)]) == cli.USAGE
    message = capsys.readouterr().err
    assert "did you mean resnet-at" in message and all(name in message for name in NAMES)


def test_training_without_the_data_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    import torchvision

    def unreachable(*arguments, **keywords):
        raise RuntimeError("no network")

    monkeypatch.setattr(loaders, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", unreachable)
    assert cli.main(["train", "vae", "--out", str(tmp_path), "--data-dir", str(tmp_path)]) == cli.USAGE
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err


@needs_full
def test_trained_weights_defend(tmp_path, tiny):
    """A card of ``train`` is all that ``--weights`` needs."""
    from benchmark import load

    for name in ("vae", "resnet"):
        train(name, DATASET, tmp_path, epochs=1, limit=64)
    defense = load("vae", "resnet", DATASET, weights=str(tmp_path))
    assert isinstance(defense, Defense)
    x = data.load(DATASET).images(slice(0, 4))
    assert defense(x, Tape(0, "verdict", torch.arange(4))).shape == (4, 10)


def test_recipes_come_behind_what_they_start_from():
    for family in (DATASET, LARGE):
        known = recipes(family)
        order = ordered(family, reversed(known))
        assert sorted(order) == sorted(known)
        for name in order:
            assert known[name].needs <= set(order[: order.index(name)]), name
    with pytest.raises(UsageError, match="did you mean vqvae"):
        ordered(LARGE, ["vqvaee"])
    with pytest.raises(UsageError, match="no recipes for svhn"):
        ordered("svhn")


@pytest.mark.parametrize("option", ["--epochs", "--stop-steps"])
def test_numbers_below_one_are_refused(tmp_path, capsys, option):
    assert cli.main(["train", "vae", option, "0", "--out", str(tmp_path)]) == cli.USAGE
    assert "are at least 1" in capsys.readouterr().err and not list(tmp_path.rglob("card.json"))


@needs_full
def test_what_starts_from_an_unfinished_training_waits(tmp_path, tiny, capsys):
    arguments = ["train", "vae-ae,vae", "--stop-steps", "1", "--out", str(tmp_path)]
    assert cli.main(arguments) == cli.INCOMPLETE
    printed = capsys.readouterr()
    assert "stopped after 1 of " in printed.out and "vae-ae waits for vae" in printed.out
    assert "vae, vae-ae: unfinished; the same command continues" in printed.err


def test_all_trains_what_has_no_weights_yet(tmp_path, monkeypatch, capsys):
    missing, begun = {"diffusevae-nvae", "nvae", "elbo"}, []
    for name in set(NAMES) - missing:
        (tmp_path / DATASET / name).mkdir(parents=True)
        (tmp_path / DATASET / name / "card.json").write_text("precious")
    monkeypatch.setattr(training, "train", lambda name, *a, **k: begun.append(name) or tmp_path / DATASET / name)
    assert cli.main(["train", "all", "--out", str(tmp_path)]) == cli.DONE
    assert set(begun) == missing and begun.index("nvae") < begun.index("diffusevae-nvae")
    assert capsys.readouterr().out.count(" stands\n") == len(NAMES) - len(missing)
    assert {p.read_text() for p in tmp_path.rglob("card.json")} == {"precious"}


def test_the_frechet_distance_of_what_is_known():
    a = np.random.default_rng(0).normal(size=(200, 5))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    shift = ((a.mean(0) + 3) ** 2).sum()  # of 2 a + 3: mean 2 m + 3, covariance 4 S
    assert frechet(a, 2 * a + 3) == pytest.approx(shift + np.trace(np.cov(a, rowvar=False)))
    turned = np.random.default_rng(1).normal(size=(5, 5))
    s_a, s_b = np.cov(a, rowvar=False), np.cov(a @ turned, rowvar=False)  # these don't commute
    values, vectors = np.linalg.eigh(s_a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s_b @ root)).sum()
    expected = ((a.mean(0) - (a @ turned).mean(0)) ** 2).sum() + np.trace(s_a + s_b) - 2 * cross
    assert frechet(a, a @ turned) == pytest.approx(expected)
    dead = np.concatenate([a, np.zeros((200, 2))], 1)
    assert frechet(dead, 2 * dead + 3) == pytest.approx(frechet(a, 2 * a + 3) + 2 * 9), "features that never fire"


def test_features_are_what_the_last_layer_takes():
    net = checkpoints.build("classifiers", "resnet", checkpoints.Need(data.form(DATASET))).module
    features, logits = last_features(net, data.load(DATASET).images(slice(0, 4)))
    *_, last = (layer for layer in net.modules() if isinstance(layer, torch.nn.Linear))
    assert torch.equal(last(features), logits) and features.shape == (4, last.in_features)


LARGE = "cifar10"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(recipes(LARGE)))
def test_every_recipe_for_a_gpu_has_a_finite_objective_that_falls(name):
    """Networks of the large size on four random images, a few steps; the judge that no data set has yet is our own."""
    recipe, form = recipes(LARGE)[name], data.form(LARGE)
    component = registry.load(recipe.kind, recipe.component)
    classes = (form.classes,) if recipe.kind == "classifiers" else ()
    torch.manual_seed(0)
    module = component(*component.parts(form.shape, recipe.size, *classes).values(), **recipe.options).train()
    aside = {critic: component.critics(form.shape, recipe.size)[critic] for critic in recipe.critics}
    if recipe.judge:
        seen = registry.load("classifiers", "resnet").parts(form.shape, "tiny")["net"][0]
        aside["judge"] = lambda x: [seen(2 * x - 1)]
    batch, tape = Batch(torch.rand(4, *form.shape), torch.arange(4)), Tape(0, "train", torch.arange(4))
    key, *_ = losses = module.objectives(batch, tape, **recipe.objective, **aside) or {"": None}
    if not key:
        assert recipe.epochs == 0 and recipe.init  # nothing is trained
        return
    optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.lr / 10)
    before = float(losses[key].detach())
    for _ in range(5):
        optimiser.zero_grad()
        module.objectives(batch, tape, **recipe.objective, **aside)[key].backward()
        optimiser.step()
    after = float(module.objectives(batch, tape, **recipe.objective, **aside)[key].detach())
    assert torch.isfinite(torch.tensor([before, after])).all() and after < before


@pytest.mark.slow
def test_every_recipe_for_a_gpu_trains_resumes_and_builds(tmp_path, monkeypatch):
    """Twenty steps each of the large networks on pairs of images, one from what the other made; nothing is measured."""
    text = re.sub(r"batch_size = \d+", "batch_size = 2", recipe_book.RECIPES.read_text())
    (tmp_path / "recipes.toml").write_text(re.sub(r"settle = \d+", "settle = 20", text))
    monkeypatch.setattr(recipe_book, "RECIPES", tmp_path / "recipes.toml")
    for after in ("measure", "samples"):
        monkeypatch.setattr(training, after, lambda *arguments, **options: {})
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (45, 3, 32, 32), np.uint8))
    (tmp_path / LARGE).mkdir()
    for split, shown in (("train", pixels), ("test", 255 - pixels)):
        write(tmp_path / LARGE / f"{split}-0.parquet", shown, torch.arange(45) % 10)
    known, source = recipes(LARGE), f"parquet:{tmp_path / LARGE}"
    for name in ordered(LARGE):
        if known[name].component == "map" and known[name].size.endswith("mixture"):
            continue  # a mixture of more codes than there are images
        options = {"epochs": 1} if known[name].epochs else {}
        if options:
            folder = train(name, source, tmp_path, limit=40, stop_steps=10, **options)
            left = training.paused(folder)
            assert left and (left["step"], left["total"]) == (10, 20), name
        folder = train(name, source, tmp_path, limit=40, **options)
        built = checkpoints.build(known[name].kind, name, checkpoints.Need(data.form(LARGE), roots=(tmp_path,)))
        assert all(t.isfinite().all() for t in built.module.state_dict().values() if t.is_floating_point()), name


def test_a_file_of_ones_own_has_no_recipe(tmp_path, capsys):
    assert cli.main(["train", "file:mine.py:Mine", "--out", str(tmp_path)]) == cli.USAGE
    assert "recipes are for components that are shipped" in capsys.readouterr().err
