"""The benchmark: all input and output, all policy. ``load`` a defense, ``evaluate`` it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from benchmark.cell import Result
    from purifiers import Defense

__all__ = ["evaluate", "load"]


def load(
    purifier: str,
    classifier: str = "resnet",
    dataset: str = "fashion-mnist",
    *,
    copies: int = 1,
    combine: str = "logits",
    norm: str = "Linf",
    weights: str | None = None,
    data_dir: str | None = None,
    offline: bool = False,
    trust: bool = False,
) -> Defense:
    """A defense by name, with the weights that its cards name: an ``nn.Module``, images in [0, 1] → logits.

    Args:
        purifier: a spec, e.g. "diffpure:t_star=0.1" or "file:mine.py:Mine".
        classifier: a spec.
        dataset: whose weights; a data set's spec, e.g. "cifar10".
        copies: purified copies per image.
        combine: what is averaged over them: "logits", "probabilities" or "vote".
        norm: for which threat model a classifier of RobustBench was made, unless its spec says so.
        weights: a folder with further cards and checkpoints.
        data_dir: where a data set lies whose form its name doesn't say.
        offline: open no socket.
        trust: load checkpoints that execute code.

    Raises:
        UsageError: for unknown names or options, or weights that are missing or altered.
    """
    from benchmark import defenses  # heavy: torch

    return defenses.load(
        purifier, classifier, dataset, copies=copies, combine=combine, norm=norm, weights=weights,
        data_dir=data_dir, offline=offline, trust=trust,
    )  # fmt: skip


def evaluate(
    defense: Defense, data: str | tuple[Tensor, Tensor] = "fashion-mnist", attack: str = "autoattack", **settings: Any
) -> Result:
    """Attack ``defense`` and return its rows and records; what is on disk already is not computed again.

    Args:
        defense: from ``load``, or ``purifiers.Defense(purifier, classifier)`` of any modules. It works on the device of
            the settings, a GPU where there is one, and is back where it was afterwards. ``Defense`` froze its modules:
            eval mode, no gradients of parameters; train a copy.
        data: a data set's name, or (images, labels), tensors or arrays: images in [0, 1], or uint8 in levels of 255, of
            shape (N, C, H, W); labels of shape (N,). Without ``n`` the budget's number, or all.
        attack: a spec, e.g. "pgd:steps=50".
        **settings: the fields of ``benchmark.settings.Settings``: norm, eps, n, budget, view, seed, out, and so on.

    Raises:
        UsageError: for settings that can't be met.
        RunError: if the defense fails a check, the attack leaves its threat model, or the disk fails.
        Incomplete: if ``stop_after`` seconds passed.
    """
    from dataclasses import fields

    from benchmark import defenses, specs  # heavy: torch
    from benchmark.cell import Cell
    from benchmark.errors import UsageError, unknown
    from benchmark.grades import EVERYTHING
    from benchmark.settings import Settings

    known = [field.name for field in fields(Settings)]
    if wrong := [key for key in settings if key not in known]:
        raise UsageError(unknown("setting", wrong[0], known))
    if attack == EVERYTHING:
        raise UsageError(
            f"attack={attack!r} stands for several: evaluate each of benchmark.grades.asked(stochastic, budget) with "
            "the same out, and python -m benchmark report OUT shows them together"
        )
    if not isinstance(attack, str) or len(specs.split(attack)) > 1:
        raise UsageError(
            f"attack={attack!r}: one spec at a time; evaluate each with the same out, and python -m benchmark report "
            "OUT gives their worst case"
        )
    with defenses.lent(defense):
        return Cell(defense, data, attack, Settings(**settings)).result()
