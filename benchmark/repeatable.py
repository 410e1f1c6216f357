"""Arithmetic that repeats: float32 as it is written, and convolutions that sum in one order."""

from __future__ import annotations

import torch

from attacks._precision import set_tf32


def make_repeatable(device: torch.device) -> None:
    """Set torch, for the rest of the process, so that the same call gives the same numbers where kernels allow it.

    Products and convolutions in float32, whatever a caller asked of ``torch.set_float32_matmul_precision``; no TF32,
    which torch allows in convolutions unless told. On a GPU cuDNN's deterministic kernels, chosen by rule: its
    benchmark takes whichever was fastest that time. Backward passes that have no such kernel everywhere, of attention,
    interpolation and ``grid_sample``, may still differ in the last bits there; on a CPU nothing does.

    Reference: PyTorch documentation, *Reproducibility*.
    """
    torch.set_float32_matmul_precision("highest")  # on a CPU, too, where lower may be bfloat16
    set_tf32(False, False)
    if hasattr(torch.backends.mkldnn, "conv"):  # since torch 2.9
        torch.backends.mkldnn.conv.fp32_precision = "ieee"
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
