"""Arithmetic that repeats: float32 as it is written, and convolutions that sum in one order."""

from __future__ import annotations

import torch


def make_repeatable(device: torch.device) -> None:
    """Set torch, for the rest of the process, so that the same call gives the same numbers where kernels allow it.

    No TF32, which torch allows in convolutions unless told. On a GPU cuDNN's deterministic kernels, chosen by rule: its
    benchmark takes whichever was fastest that time. Backward passes that have no such kernel everywhere, of attention,
    interpolation and ``grid_sample``, may still differ in the last bits there; on a CPU nothing does.

    Reference: PyTorch documentation, *Reproducibility*.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
