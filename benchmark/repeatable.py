"""Arithmetic that repeats: float32 as it is written, and on a GPU sums in one order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Within, the same call gives the same bytes; afterwards torch is set as it was.

    No TF32, which torch allows in convolutions unless told; on a GPU also no kernels whose threads add up in the order
    in which they come, and none chosen by a race. Where torch has no other kernel it goes on, and warns. cuBLAS needs a
    workspace of a fixed size for that, which is asked for unless the environment does (CUBLAS_WORKSPACE_CONFIG).

    Reference: PyTorch documentation, *Reproducibility*.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    fresh: Any = torch.utils.deterministic
    tf32 = matmul.allow_tf32, cudnn.allow_tf32
    chosen = cudnn.deterministic, cudnn.benchmark, fresh.fill_uninitialized_memory
    demanded = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        if device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            cudnn.deterministic, cudnn.benchmark, fresh.fill_uninitialized_memory = True, False, False
            if not demanded[0]:
                torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = tf32
        cudnn.deterministic, cudnn.benchmark, fresh.fill_uninitialized_memory = chosen
        torch.use_deterministic_algorithms(demanded[0], warn_only=demanded[1])
