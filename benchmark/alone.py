"""Networks by themselves, on the very inputs that a purification gives them: the floor of every timing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attacks._copies import copied
from benchmark.errors import UsageError
from purifiers import Tape


class Network:
    """A module on an input.

    Args:
        module: gives a tensor or an object with ``sample``.
        inputs, named: what it is called with; it is differentiated by the first.
    """

    def __init__(self, module: nn.Module, *inputs: Any, **named: Any):
        self.module, self.inputs, self.named = module, inputs, named

    def forward(self, times: int = 1) -> None:
        """Run it."""
        with torch.no_grad():
            for _ in range(times):
                self.module(*self.inputs, **self.named)

    def gradient(self, times: int = 1) -> None:
        """Run it and differentiate."""
        for _ in range(times):
            first = self.inputs[0].detach().requires_grad_()
            output = self.module(first, *self.inputs[1:], **self.named)
            output = output if isinstance(output, Tensor) else output.sample
            torch.autograd.grad(output, first, torch.ones_like(output))


class Alone(Network):
    """The network that a purification calls, on the input that it is called with, and how often it is.

    Args:
        purifier: whose largest part is the network.
        x: images.
        tape: their noise.
    """

    def __init__(self, purifier: nn.Module, x: Tensor, tape: Tape):
        parts = list(purifier.children())
        if not parts:
            raise UsageError(f"bench: {type(purifier).__name__} has no network")
        part = max(parts, key=lambda m: sum(p.numel() for p in m.parameters()))
        seen: list[tuple[tuple, dict]] = []
        hook = part.register_forward_pre_hook(lambda _, given, named: seen.append((given, named)), with_kwargs=True)
        with hook, torch.no_grad():
            purifier(x, tape)
        if not seen:
            raise UsageError(f"bench: {type(purifier).__name__} doesn't call its largest part as a module")
        given, named = seen[0]
        super().__init__(part, *given, **named)
        self.calls = len(seen)

    def channels_last(self) -> Network:
        """The same in the other layout."""
        module = copied(self.module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        first = self.inputs[0].contiguous(memory_format=torch.channels_last)
        return Network(module, first, *self.inputs[1:], **self.named)

    def compiled(self) -> Network:
        """The same, compiled for this shape."""
        module = copied(self.module)
        module.compile(dynamic=False)
        return Network(module, *self.inputs, **self.named)
