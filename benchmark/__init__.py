"""The benchmark: all input and output, all policy. In Python: ``from benchmark import evaluate, load``."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load":
        from benchmark.evaluate import load  # heavy: ``--help`` must not wait for torch

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
