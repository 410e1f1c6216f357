"""Runs made by hand, as ``results.read_run`` gives them: what writers and grades are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ATTACKS = {
    "pgd": ("pgd:eot=4,steps=20", "PGD-CE (20 it, EOT 4)"),
    "autoattack": ("autoattack:eot=4,steps=20", "APGD-CE+DLR (20 it, EOT 4)"),
    "square": ("square:queries=500", "Square (500 queries, EOT 4)"),
    "identity": ("identity", "no attack"),
    "transfer": ("transfer:steps=20", "PGD-CE (20 it) from identity"),
    "uniform": ("uniform:queries=100", "Uniform (100 queries, EOT 4)"),
}


def made(
    right: float,
    *,
    purifier: str = "vae",
    attack: str = "pgd",
    n: int = 40,
    draws: int = 9,
    clean: float = 0.9,
    random: float = 0.85,
    gradients: float = 80.0,
    weights: str = "w",
    spec: str | None = None,
    **changed: Any,
) -> dict[str, Any]:
    """A run in which the first share ``right`` of n images is right in every draw, the rest wrong in every one.

    Args:
        right, clean, random: shares of images that are right under the attack, at x, and under random noise.
        gradients: backward draws per image.
        spec: the attack's, other than usual.
        changed: parts of its identity, and of what is known beside it.
    """
    usual, display = ATTACKS[attack]

    def classes(share: float, k: int, count: int) -> list[int]:
        return [k % 10 if k < share * n else (k + 1) % 10] * count

    records = [
        {
            "id": k, "label": k % 10, "clean": classes(clean, k, draws), "adv": classes(right, k, draws),
            "select": classes(right, k, 8), "random": classes(random, k, draws), "distance": 0.0625,
            "broken_at": -1 if k < right * n else k % 3, "null_wrong": int(k >= clean * n), "fallback": False,
            "package_verdict": None, "forwards": 200.0, "backwards": gradients,
        }
        for k in range(n)
    ]  # fmt: skip
    identity = {
        "attack": spec or usual, "attacker": None, "budget": "quick", "classifier": "resnet", "combine": "logits",
        "copies": 1, "dataset": "fashion-mnist", "draws": draws, "eps": "16/255", "fingerprint": "f", "norm": "Linf",
        "precision": "float32", "protocol": 1, "purifier": f"{purifier}:rounds=1", "seed": 0, "select": 8,
        "view": "exact", "weights": {"purifier.autoencoder": weights, "classifier.net": "c"},
    }  # fmt: skip
    known = {
        "environment": {"commit": "0123456789ab", "packages": {"torch": "2.15.0"}, "device_name": "cpu"},
        "mixed_environment": False, "n": n, "nfe": 1, "noise": "keyed", "preflight": True, "stochastic": draws > 1,
        "complete": True, "seconds": 0.5 * n,
    }  # fmt: skip
    identity |= {key: value for key, value in changed.items() if key in identity}
    names = {"attack": attack, "classifier": identity["classifier"], "display": display, "purifier": purifier}
    keys = ("attack", "view", "budget", "seed", "eps", "precision", "protocol")
    folder = "-".join(["results/made", purifier, attack, *(str(identity[key]) for key in keys)])
    return {
        **known,
        **{key: value for key, value in changed.items() if key in known},
        "identity": identity,
        "names": names,
        "records": records,
        "folder": Path(f"{folder.replace('/255', '')}-n{n}-{right}"),
    }
