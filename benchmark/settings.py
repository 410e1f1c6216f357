"""How to evaluate, apart from what: the choices of a command line or a program, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from benchmark import checkpoints, config, data
from benchmark.dataset import Dataset
from benchmark.device import device_named
from benchmark.errors import UsageError

KNOWN = 64
"""Images on which a classifier is held against its stated accuracy."""


@dataclass
class Settings:
    """How to evaluate, apart from what: see ``python -m benchmark run --help`` for each."""

    budget: str = "auto"
    n: int | None = None
    """Images; the budget's default if None."""
    norm: str | None = None
    """Of the threat model; the attack's first if None: Linf, but for stadv."""
    eps: str | float | Fraction | None = None
    view: str = "auto"
    attacker: str | None = None
    draws: int | None = None
    seed: int = 0
    rows: int | None = None
    """Of every network call; what fits if None."""
    precision: str = "float32"
    """Of the attacker's gradients."""
    compile: bool = False
    """Compile the networks for the fixed shape of their calls."""
    channels_last: bool = False
    """Lay out weights with channels last; what they are given follows."""
    shard: str | None = None
    """"I/N": only every N-th group of images, from the I-th on; processes with the same ``out`` share the work."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:N", or "auto": a GPU where there is one."""
    out: str | Path = "results/run"
    data_dir: str | None = None
    weights: str | None = None
    shelf: checkpoints.Shelf = field(default_factory=checkpoints.Shelf, repr=False)
    """Where networks stand that several cells share."""
    offline: bool = False
    trust: bool = False
    """Load checkpoints that execute code."""
    preflight: bool = True
    mixed_environment: bool = False
    stop_after: float | None = None
    quiet: bool = False
    name: str | None = None
    """What tables call the purifier; its spec, or its class and options, if None. No run is another by it."""

    def __post_init__(self) -> None:
        for key, hint in get_type_hints(type(self)).items():
            value: Any = getattr(self, key)
            kinds = get_args(hint) or (hint,)
            if int in kinds and isinstance(value, Integral) and value is not True and value is not False:
                setattr(self, key, int(value))  # numpy's
            elif not (isinstance(value, Real) and float in kinds) and not isinstance(value, kinds):
                wanted = " or ".join(kind.__name__.replace("NoneType", "None") for kind in kinds)
                raise UsageError(f"{key}={value!r}: expected {wanted}")
        if self.stop_after is not None and not self.stop_after >= 0:
            raise UsageError(f"--stop-after {self.stop_after:g}: expected seconds, 0 or more")
        self.device = device_named(self.device)

    @property
    def part(self) -> tuple[int, int]:
        """The number of this process's shard, from 0, and how many there are.

        Raises:
            UsageError: if ``shard`` isn't I/N.
        """
        if self.shard is None:
            return 0, 1
        number, _, of = self.shard.partition("/")
        if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
            raise UsageError(f"--shard {self.shard}: expected I/N with 1 <= I <= N, e.g. 1/4")
        return int(number) - 1, int(of)

    @property
    def images(self) -> int:
        """How many images are evaluated."""
        n = config.budget(self.budget, torch.device(self.device).type).n if self.n is None else self.n
        if n < 1:
            raise UsageError(f"--n-examples {n}: at least one image is needed")
        return n

    def examples(self, source: str | tuple[Any, Any] | Dataset) -> Dataset:
        """At least as many examples, by name or from tensors or arrays; an error if there are fewer."""
        if isinstance(source, str):
            source = data.load(source, max(self.images, KNOWN), data_dir=self.data_dir, offline=self.offline)
        elif not isinstance(source, Dataset):
            source = data.from_arrays(source)
            if self.n is None:  # the caller's own, which may be few
                self.n = min(self.images, len(source))
        source.first(self.images)
        return source
