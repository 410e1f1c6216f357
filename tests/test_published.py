"""Published checkpoints: the same function of diffusers' network as of the authors' own, from the file to the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmark import checkpoints, cli, layouts
from benchmark.checkpoints import Need
from benchmark.dataset import FORMS
from benchmark.errors import UsageError
from benchmark.layouts import LAYOUTS
from purifiers import _published
from tests import published

SHAPE = (3, 16, 16)
CARDS = sorted(p for p in checkpoints.SHIPPED.glob("*/*/card.json") if '"layout"' in p.read_text())
FORM = FORMS["cifar10"]


def song() -> tuple:
    theirs = published.Song((128, 160), 2)
    return theirs, _published.ddpmpp(SHAPE, (128, 160), 2), published.song_checkpoint(theirs), "score_sde"


def guided() -> tuple:
    theirs = published.Adm((64, 96, 128), 2, (1, 2), 32)
    ours = _published.adm(SHAPE, (64, 96, 128), 2, (1, 2), 32)
    return theirs, ours, theirs.state_dict(), "guided-diffusion"


@pytest.mark.parametrize("make", [song, guided])
@torch.no_grad()
def test_a_converted_network_computes_what_the_authors_does(make):
    torch.manual_seed(0)
    theirs, ours, checkpoint, layout = make()
    ours.load_state_dict(LAYOUTS[layout](checkpoint, ours))
    x, t = torch.randn(2, *SHAPE), torch.tensor([3.0, 871.5])
    expected, found = theirs.eval()(x, t), ours.eval()(x, t).sample
    assert expected.std() > 0.1 and expected[0].sub(expected[1]).abs().max() > 0.1
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@torch.no_grad()
def test_the_order_of_heads_and_kinds_matters():
    """The trap of that layout: rows in another order load without complaint."""
    torch.manual_seed(0)
    theirs, ours, checkpoint, layout = guided()
    state = LAYOUTS[layout](checkpoint, ours)
    wrong = {key: value for key, value in state.items()}
    for key in state:
        if key.endswith("to_q.weight"):
            rows = dict(checkpoint)[_their_name(checkpoint, state[key])].flatten(1)
            wrong[key] = rows.chunk(3)[0]
    x, t = torch.randn(2, *SHAPE), torch.tensor([3.0, 871.5])
    ours.load_state_dict(wrong)
    assert (ours.eval()(x, t).sample - theirs.eval()(x, t)).abs().max() > 1e-3


def _their_name(checkpoint: dict, queries: torch.Tensor) -> str:
    """The matrix that a head's queries were taken from."""
    for key, value in checkpoint.items():
        if key.endswith("qkv.weight") and torch.equal(value.flatten(1)[:32], queries[:32]):
            return key
    raise AssertionError("no matrix begins with these queries")


@torch.no_grad()
def test_old_names_of_attention_are_read():
    torch.manual_seed(0)
    net = _published.ddpm((3, 8, 8), (32, 64), 1)
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    old = net.state_dict()
    for new, once in names.items():
        old = {key.replace(new, once): value for key, value in old.items()}
    assert old.keys() != net.state_dict().keys()
    again = _published.ddpm((3, 8, 8), (32, 64), 1)
    again.load_state_dict(layouts.diffusers(old, again))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 871])
    assert torch.equal(again.eval()(x, t).sample, net.eval()(x, t).sample)


def test_the_autoencoder_of_stable_diffusion_reads_images_and_their_gradients(tmp_path):
    """In float32, at full size, under the old names of attention that its file has."""
    torch.manual_seed(0)
    net = _published.stable_diffusion((3, 224, 224))
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    state = net.state_dict()
    for new, once in names.items():
        state = {key.replace(new, once): value for key, value in state.items()}
    path = tmp_path / "imagenet" / "sd-vae-ft-mse" / "diffusion_pytorch_model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(state, path)
    need = Need(FORMS["imagenet"], roots=(tmp_path,), offline=True)
    vae = checkpoints.build("purifiers", "vae:weights=stable-diffusion,temperature=0", need).module
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    found = vae(x)
    expected = (net.eval().decode(net.encode(2 * x - 1).latent_dist.mean).sample + 1) / 2
    assert torch.equal(found, expected.clamp(0, 1))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.abs().max() > 0


# --- cards


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.parent.name)
def test_a_card_says_how_large_its_network_is_and_whence_it_comes(path):
    card = json.loads(path.read_text())
    need = Need(FORMS[path.parent.parent.name])
    built = checkpoints.build("purifiers", path.parent.name, need, hollow=True).module
    assert sum(p.numel() for p in built.parameters()) == card["parameters"]
    assert {p.device.type for p in built.parameters()} == {"meta"}
    (entry,) = card["files"].values()
    assert entry["layout"] in LAYOUTS and "arXiv" in card["source"]
    (remote,) = checkpoints.remotes(path.parent.name, need)
    assert remote.url.startswith("https://") and remote.path.name == Path(entry["file"]).name
    assert checkpoints.check_files(path) == 0


def test_diffpures_own_options_are_those_of_its_papers_networks():
    """Nie et al. 2022 (arXiv 2205.07460), section 5.1 and appendix C.2: t* of 0.1 and 0.15, and dt = 1e-3."""
    for name, form, t_star in (("score-sde", "cifar10", 0.1), ("guided-diffusion", "imagenet", 0.15)):
        spec = checkpoints.build("purifiers", f"diffpure:weights={name}", Need(FORMS[form]), hollow=True).spec
        assert (spec.options["rule"], spec.options["t_star"]) == ("sde", t_star)
        assert spec.options["steps"] == 1000 * t_star


def test_for_another_data_set_it_is_told_where_it_belongs():
    with pytest.raises(UsageError, match="diffpure-score-sde has weights for cifar10, not for fashion-mnist"):
        checkpoints.build("purifiers", "diffpure:weights=score-sde", Need(FORMS["fashion-mnist"]))


def test_all_leaves_out_what_was_not_fetched(tmp_path):
    need = Need(FORM, roots=(tmp_path,))
    assert "diffpure-score-sde" in checkpoints.names("purifiers", "cifar10")
    assert "diffpure-score-sde" not in checkpoints.at_hand("purifiers", need)
    place = tmp_path / "cifar10" / "score_sde" / "checkpoint_8.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"here")
    assert "diffpure-score-sde" in checkpoints.at_hand("purifiers", need)


# --- files


@pytest.fixture
def small(monkeypatch):
    """The published networks at a size for tests; DDPM++ as the reference builds it."""
    monkeypatch.setitem(_published.PUBLISHED, "ddpmpp", lambda shape: _published.ddpmpp(shape, (128, 128), 1))
    monkeypatch.setitem(_published.PUBLISHED, "ddpm", lambda shape: _published.ddpm(shape, (32, 32), 1))
    torch.manual_seed(0)
    return published.Song((128, 128), 1)


def put(root: Path, name: str, checkpoint: dict) -> Path:
    path = root / "cifar10" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint, path) if path.suffix == ".safetensors" else torch.save(checkpoint, path)
    return path


def test_a_published_checkpoint_purifies_as_the_authors_network_would(small, tmp_path):
    put(tmp_path, "score_sde/checkpoint_8.pth", published.song_checkpoint(small))
    need = Need(FORM, roots=(tmp_path,), offline=True)
    built = checkpoints.build("purifiers", "diffpure:weights=score-sde,steps=2", need)
    z = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        predicted = built.module.denoiser.noise(z, 0.1)
        expected = small.eval()(z, torch.full((2,), 99.9))  # 999 t
    assert (predicted - expected).abs().max() < 1e-4 * expected.abs().max()
    assert built.weights["unet"] == checkpoints.sha256(tmp_path / "cifar10" / "score_sde" / "checkpoint_8.pth")


def test_the_command_runs_on_a_published_checkpoint(tmp_path, monkeypatch, capsys):
    """Images in a folder per class, and the checkpoint in the layout of its authors."""
    from PIL import Image

    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\n"
        "def net():\n    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))\n"
    )
    monkeypatch.setitem(_published.PUBLISHED, "ddpmpp", lambda shape: _published.ddpmpp(shape, (32, 32), 1))
    weights, mine = tmp_path / "weights", f"file:{tmp_path / 'mine.py'}:net"
    put(weights, "score_sde/checkpoint_8.pth", published.song_checkpoint(published.Song((32, 32), 1)))
    for k in range(10):
        (tmp_path / "images" / str(k)).mkdir(parents=True)
        Image.new("RGB", (32, 32), (20 * k, 90, 255 - 20 * k)).save(tmp_path / "images" / str(k) / "0.png")
    command = ["run", "--dataset", f"folder:{tmp_path / 'images'},family=cifar10", "--classifier", mine,
               "--purifier", "diffpure:weights=score-sde,steps=2", "--attack", "pgd:steps=1", "--n-examples", "2",
               "--draws", "2", "--device", "cpu", "--weights", str(weights), "--offline", "--yes",
               "--out", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(command) == 0
    assert "diffpure-score-sde" in capsys.readouterr().out
    (record,) = (tmp_path / "out").rglob("run.json")
    assert "diffpure-score-sde:" in json.loads(record.read_text())["identity"]["purifier"]


def test_it_is_fetched_from_where_its_card_says(small, server, tmp_path, monkeypatch):
    served, address = server
    repository = served / "google" / "ddpm-cifar10-32" / "resolve" / "main"
    repository.mkdir(parents=True)
    net = _published.ddpm((3, 32, 32), (32, 32), 1)
    save_file(net.state_dict(), repository / "diffusion_pytorch_model.safetensors")
    monkeypatch.setenv("HF_ENDPOINT", address)
    (tmp_path / "weights").mkdir()
    need = Need(FORM, roots=(tmp_path / "weights",))
    with pytest.raises(UsageError, match="--offline forbids its download"):
        checkpoints.build("purifiers", "diffpure-ddpm", Need(FORM, roots=need.roots, offline=True))
    built = checkpoints.build("purifiers", "diffpure-ddpm:steps=2", need).module
    assert (tmp_path / "weights" / "cifar10" / "ddpm-cifar10-32" / "diffusion_pytorch_model.safetensors").is_file()
    assert torch.equal(built.unet.conv_in.weight, net.conv_in.weight)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda c: c["model"].pop("module.all_modules.0.bias"), "doesn't fit the network, or is damaged"),
        (lambda c: c["ema"]["shadow_params"].reverse(), "doesn't fit the network, or is damaged"),
        (lambda c: c.pop("ema"), "doesn't fit the network, or is damaged"),
        (lambda c: c.update(model=list(c["model"].values())), "isn't laid out as score_sde does: AttributeError"),
        (lambda c: c.update(ema=c["ema"]["shadow_params"]), "isn't laid out as score_sde does: TypeError"),
        (lambda c: c["ema"].update(shadow_params=None), "isn't laid out as score_sde does: TypeError"),
        (lambda c: c.update(extra=Path("x")), "--trust-checkpoint"),
    ],
)
def test_a_checkpoint_that_is_another_is_told(small, tmp_path, spoil, said):
    checkpoint = published.song_checkpoint(small)
    spoil(checkpoint)
    path = put(tmp_path, "score_sde/checkpoint_8.pth", checkpoint)
    with pytest.raises(UsageError, match=said) as raised:
        checkpoints.build("purifiers", "diffpure-score-sde", Need(FORM, roots=(tmp_path,), offline=True))
    assert str(path) in str(raised.value)


def test_a_trusted_checkpoint_may_hold_more_than_tensors(small, tmp_path):
    put(tmp_path, "score_sde/checkpoint_8.pth", published.song_checkpoint(small) | {"extra": Path("x")})
    need = Need(FORM, roots=(tmp_path,), offline=True, trust=True)
    built = checkpoints.build("purifiers", "diffpure-score-sde", need).module
    assert built.unet.conv_in.weight.isfinite().all()


def test_what_a_card_says_of_a_published_file_is_held_against_it(small, tmp_path, monkeypatch):
    """Its sha256, if its publisher says it; and of a hub's file the revision that is meant."""
    card = json.loads((checkpoints.SHIPPED / "cifar10" / "diffpure-ddpm" / "card.json").read_text())
    card["files"]["unet"] |= {"sha256": 64 * "0", "revision": "267b167"}
    (tmp_path / "cifar10" / "pinned").mkdir(parents=True)
    (tmp_path / "cifar10" / "pinned" / "card.json").write_text(json.dumps(card))
    need = Need(FORM, roots=(tmp_path,), offline=True)
    (remote,) = checkpoints.remotes("pinned", need)
    assert "/resolve/267b167/" in remote.url
    put(tmp_path, card["files"]["unet"]["file"], _published.ddpm((3, 32, 32), (32, 32), 1).state_dict())
    with pytest.raises(UsageError, match="another file: its sha256 is .*, expected 0000"):
        checkpoints.build("purifiers", "pinned", need)
