"""Which device does the work: a name that torch knows, checked before anything is loaded."""

from __future__ import annotations

import torch

from benchmark.errors import UsageError


def device_named(name: str) -> str:
    """A device by name; "auto" is the first GPU where torch sees one, else the CPU.

    Raises:
        UsageError: for what is neither the CPU nor a CUDA device that is here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: the benchmark runs on cpu, cuda or cuda:N; auto takes a GPU if one is here")
    if device.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= there:
            seen = f"torch sees {there} CUDA devices here" if there else "torch sees no CUDA device here"
            raise UsageError(f"--device {name}: {seen}; use --device {'cuda' if there else 'cpu'}")
    return name
