"""What memory there is for graphs, and that the allocator keeps what it was given."""

from __future__ import annotations

import ctypes
import math
import os
import sys

import torch

CPU_BUDGET = 3 << 30
"""Bytes for stored graphs on a CPU, unless the smallest call needs more: other processes want memory, too."""


def budget(device: torch.device, least: float = 0) -> int:
    """Bytes that graphs may take: half of what is free, on a CPU no more than ``CPU_BUDGET`` or, if more, ``least``."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) // 2
    return min(max(CPU_BUDGET, math.ceil(least)), free() // 2)


def size(count: float) -> str:
    """Bytes in a unit that fits."""
    for unit, of in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= of:
            return f"{count / of:.1f} {unit}"
    return f"{count:.0f} bytes"


def free() -> int:
    """Bytes of main memory that are free or can be freed at once, within what a container allows."""
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
        return min(int(found["MemAvailable"].split()[0]) << 10, _allowed())
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 * CPU_BUDGET


def _allowed() -> int:
    """Bytes that a container still allows; more than there are where it allows all."""
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            return int(most.read()) - int(now.read())
    except (OSError, ValueError):  # no container, or "max"
        return sys.maxsize


def keep_freed() -> bool:
    """Tell glibc to keep freed memory for the next allocation instead of giving it back; whether it was told.

    A kept graph is gigabytes of fresh tensors each iteration, whose pages would be faulted in anew.
    """
    libc = _libc()
    if libc is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    return bool(libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_threshold, 32 << 20))


def give_back() -> None:
    """Give freed memory back after all, so that a peak can be read."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
