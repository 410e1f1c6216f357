"""In which arithmetic the attacker computes gradients; the verdict's is float32 whatever it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from attacks._copies import copied


class Precision:
    """float32, the reference: what is evaluated is what is differentiated.

    Attributes:
        dtype: of the images that are differentiated; None for their own.
    """

    dtype: torch.dtype | None = None

    def context(self, device: str) -> AbstractContextManager:
        """What a gradient is computed in.

        Raises:
            ValueError: if the device (cpu, cuda) doesn't have this arithmetic.
        """
        return nullcontext()

    def defense(self, defense: nn.Module) -> nn.Module:
        """What is differentiated in place of a defense."""
        return defense


class Float64(Precision):
    """Weights and images in double precision, under the same draws, which are float32 numbers."""

    dtype = torch.float64

    def __init__(self) -> None:
        self.copies: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def defense(self, defense: nn.Module) -> nn.Module:
        if defense not in self.copies:
            self.copies[defense] = copied(defense).double()
        return self.copies[defense]


class BF16(Precision):
    """torch's autocast to bfloat16: convolutions and products in 8 bits of mantissa, norms and sums in float32."""

    def context(self, device: str) -> AbstractContextManager:
        return torch.autocast(device, torch.bfloat16)


class TF32(Precision):
    """Convolutions and products on the tensor cores of a GPU, with 10 bits of mantissa."""

    def context(self, device: str) -> AbstractContextManager:
        if device != "cuda":
            raise ValueError(f"tf32 is arithmetic of NVIDIA GPUs, not of {device}: use float32 or bf16")
        return _tensor_cores()


def get_tf32() -> tuple[bool, bool]:
    """Whether TF32 is allowed on a GPU: in products, in convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # since torch 2.9; the older switches can't be read where a caller has set these
        return matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
    return matmul.allow_tf32, cudnn.allow_tf32


def set_tf32(products: bool, convolutions: bool) -> None:
    """Allow TF32 on a GPU or forbid it, in both of torch's interfaces.

    The older alone, set to false, leaves convolutions to what a caller asked of the newer.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32, cudnn.allow_tf32 = products, convolutions
    if hasattr(cudnn, "conv"):
        parts: list[tuple[Any, bool]] = [(matmul, products), (cudnn.conv, convolutions), (cudnn.rnn, convolutions)]
        for part, on in parts:
            part.fp32_precision = "tf32" if on else "ieee"


@contextmanager
def _tensor_cores() -> Iterator[None]:
    before = get_tf32()
    set_tf32(True, True)
    try:
        yield
    finally:
        set_tf32(*before)


PRECISIONS: dict[str, type[Precision]] = {"float32": Precision, "float64": Float64, "tf32": TF32, "bf16": BF16}
