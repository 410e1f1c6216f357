"""What ``--view`` says."""

from __future__ import annotations

import inspect
from functools import partial

from attacks import VIEWS
from attacks import View as GradientView
from benchmark import registry
from benchmark.errors import UsageError


class View:
    """What ``--view`` says: a view of the defense with its options, e.g. "surrogate:gradient=mean".

    ``noise=verdict`` is an option of each: the attacker knows the draws that will judge, as no attacker can.

    Raises:
        UsageError: for an unknown view or option.
    """

    def __init__(self, text: str):
        spec = registry.parse(text)
        if spec.name not in VIEWS:
            raise UsageError(registry.unknown("view", spec.name, sorted(VIEWS)))
        noise = spec.options.pop("noise", "fresh")
        if noise not in ("fresh", "verdict"):
            raise UsageError(f"--view {text}: noise is fresh or verdict, got {noise!r}")
        self.foreknown = noise == "verdict"
        options = registry.resolve(VIEWS[spec.name], spec)
        if missing := [k for k, v in options.items() if v is inspect.Parameter.empty]:
            raise UsageError(f"--view {text} needs {', '.join(missing)}, e.g. {spec.name}:{missing[0]}=NAME")
        self.make = partial(VIEWS[spec.name], **options)
        self.spec = registry.Spec(spec.name, None, options | ({"noise": noise} if self.foreknown else {}))

    def __call__(self, keep: int | None) -> GradientView:
        return self.make(keep)

    def __str__(self) -> str:
        return str(self.spec)
