"""What ``--view`` says."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial

from torch import nn

from attacks import VIEWS
from attacks import View as GradientView
from benchmark import constructors, specs
from benchmark.errors import UsageError, unknown


class View:
    """What ``--view`` says: a view of the defense with its options, e.g. "surrogate:gradient=mean".

    ``noise=verdict`` is an option of each: the attacker knows the draws that will judge, as no attacker can.
    "auto" is the exact gradient where a purifier has one, else its first surrogate; ``fitting`` decides.

    Raises:
        UsageError: for an unknown view or option.
    """

    def __init__(self, text: str):
        spec = specs.parse(text)
        self.auto = spec.name == "auto"
        if self.auto:
            spec = replace(spec, name="exact")
        if spec.name not in VIEWS:
            raise UsageError(unknown("view", spec.name, ["auto", *sorted(VIEWS)]))
        noise = spec.options.get("noise", "fresh")
        if noise not in ("fresh", "verdict"):
            raise UsageError(f"--view {text}: noise is fresh or verdict, got {noise!r}")
        self.foreknown = noise == "verdict"
        own = replace(spec, options={k: v for k, v in spec.options.items() if k != "noise"})
        options = constructors.resolve(VIEWS[spec.name], own)
        if missing := [k for k, v in options.items() if v is inspect.Parameter.empty]:
            raise UsageError(f"--view {text} needs {', '.join(missing)}, e.g. {spec.name}:{missing[0]}=NAME")
        self.make = partial(VIEWS[spec.name], **options)
        self.spec = specs.Spec(spec.name, None, options | ({"noise": noise} if self.foreknown else {}))

    def fitting(self, purifier: nn.Module) -> View:
        """The view that "auto" means for a purifier; any other is itself."""
        if not self.auto or getattr(purifier, "differentiable", True):
            return self
        surrogates = getattr(purifier, "surrogates", ())
        options = {"gradient": surrogates[0]} if surrogates else {}
        noise = {"noise": "verdict"} if self.foreknown else {}
        return View(str(specs.Spec("surrogate" if surrogates else "bpda", None, options | noise)))

    def __call__(self, keep: int | None) -> GradientView:
        return self.make(keep)

    def __str__(self) -> str:
        return str(self.spec)
