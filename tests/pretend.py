"""A second device on a machine without one: tensors that say they are on cuda:0 and are computed on the CPU.

``with device():`` makes torch see one GPU. What is moved or made there holds a CPU tensor out of sight, and behaves to
Python as a tensor on a GPU does: an operation that mixes the two devices is refused, so is a CPU's generator, and so is
NumPy. So most that forgets to move a tensor fails here as it would there, and all else must end in the CPU's bytes.
Kernels, their rounding, autocast, streams and memory are not pretended.

Below Python such a tensor is on the CPU, for autograd starts no thread for a device that isn't there. Where an
operation or its derivative asks there for the device of its input, to make a constant, ``_dispatch`` corrects the
answer: it knows from ``_Calls`` whether Python asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

CPU, THERE = torch.device("cpu"), torch.device("cuda", 0)
MEMORY = 64 << 30

aten = torch.ops.aten
MOVES = {aten.copy_.default, aten._to_copy.default}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations that take tensors of both devices: a tensor that is there may be indexed from here."""
JOINS = {aten.cat.default, aten.stack.default, aten.index_select.default, aten.gather.default}
"""Operations that don't take even a number, a tensor without dimensions, from here; most do."""


class Pretended(Tensor):
    """A tensor that is there; ``held`` has its values here."""

    held: Tensor
    device = property(lambda self: THERE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=CPU, **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(a.device if isinstance(a, Tensor) else a for a in args)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        goal = {"dtype": dtype, "memory_format": layout}
        if device is not None and device.type == "cpu":
            return aten._to_copy(self, device=device, **goal)
        same = dtype in (None, self.dtype) and layout is None and not kwargs.get("copy")
        return self if same else aten._to_copy(self, **goal)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else str(self.held), spec)

    def __repr__(self) -> str:
        return f"Pretended({self.held})"

    def __deepcopy__(self, memo: dict) -> Pretended:
        copy = memo[id(self)] = Pretended(self.held.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        return copy

    def __reduce_ex__(self, protocol: int) -> tuple:
        known = (self.detach().held, self.dtype, str(THERE), self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, known


def _dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    """Refuse to mix devices; else compute here, and return what belongs there as being there."""
    flat, spec = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, Pretended)]
    goal = kwargs.get("device")
    derivative = _calls.task != _backward()  # the backward pass asks, no call of Python's within it
    if goal is not None and (derivative or (_calls.there and not tensors)):
        goal = THERE  # torch's own question, answered wrongly below Python
    on_device = there if goal is None else goal.type == "cuda"
    if there and func not in MOVES:
        ends = [tensors[0], *([tensors[-1]] if "put" in str(func) else [])] if func in INDEXES else tensors
        least = 0 if func in JOINS else 1
        if any(not isinstance(t, Pretended) and t.ndim >= least for t in ends):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} got cuda:0 and cpu")
    if on_device and any(isinstance(g, torch.Generator) for g in flat):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")

    real = [t.held if isinstance(t, Pretended) else CPU if isinstance(t, torch.device) else t for t in flat]
    args_here, kwargs_here = tree_unflatten(real, spec)
    found = func(*args_here, **kwargs_here)
    if func is aten.copy_.default:
        return args[0]
    if not on_device:
        return found
    found = tree_map_only(Tensor, Pretended, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if there else found


class _Made(TorchDispatchMode):
    """What is made or moved there without a tensor that already is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _backward() -> int:
    """The number of the backward pass under way; -1 without one."""
    return torch._C._current_graph_task_id()


class _Calls(TorchFunctionMode):
    """Python's call of torch under way: the backward pass it is part of, and whether a tensor of it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.task = False, -1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Pretended):
            args = (first, args[1].device, args[1].dtype, *args[2:])
        if func is Tensor.new_tensor and isinstance(first, Pretended):
            return torch.tensor(*args[1:], **{"dtype": first.dtype, "device": THERE} | kwargs)
        before = self.there, self.task
        self.there = "device" not in kwargs and any(isinstance(t, Pretended) for t in tree_leaves((args, kwargs)))
        self.task = _backward()
        try:
            return func(*args, **kwargs)
        finally:
            self.there, self.task = before


_calls = _Calls()
_run_backward = torch.autograd._engine_run_backward


def _differentiated(*args: Any, **kwargs: Any) -> Any:
    """The backward pass, in which Python's own calls are noticed again."""
    with _calls:
        return _run_backward(*args, **kwargs)


SAYS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1, "current_device": lambda: 0,
    "get_device_name": lambda *_: "Pretended", "is_bf16_supported": lambda *_, **__: True,
    "mem_get_info": lambda *_: (MEMORY, MEMORY), "memory_reserved": lambda *_: 0, "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": lambda *_: None, "synchronize": lambda *_: None,
    "empty_cache": lambda: None, "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
}  # fmt: skip
"""What torch.cuda says of the device."""


@contextmanager
def device() -> Iterator[None]:
    """Within, there is a GPU."""
    torch._C._ensureCUDADeviceGuardSet()
    future = torch.__future__
    with ExitStack() as stack:
        for name, says in SAYS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, says))
        for get, put, wanted in (
            (future.get_overwrite_module_params_on_conversion, future.set_overwrite_module_params_on_conversion, True),
            (torch._C._only_lift_cpu_tensors, torch._C._set_only_lift_cpu_tensors, True),
        ):
            stack.callback(put, get())
            put(wanted)
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _differentiated))
        stack.enter_context(_calls)
        stack.enter_context(_Made())
        yield
