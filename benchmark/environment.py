"""What a run is made with and on."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmark.registry import OWN

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "diffusers", "pyautoattack", "numpy", "scipy")


def environment(device: str, **choices: bool) -> dict[str, Any]:
    """What a run was made with and on: recorded, not hashed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        **{name: True for name, chosen in choices.items() if chosen},
        "engine": "local",
        "commit": commit(),
    }


@lru_cache
def commit() -> str | None:
    """The commit that was checked out when this process first asked; with a "+" if its code was changed since."""
    found = _head()
    return f"{found}+" if found and _changed() else found


def _changed() -> bool:
    """Whether git, where it is at hand, knows of changes in the code."""
    status = ["git", "-C", str(ROOT), "status", "--porcelain", "--", *OWN]
    try:
        return bool(subprocess.run(status, capture_output=True, timeout=30, check=True).stdout)
    except (OSError, subprocess.SubprocessError):
        return False


def _head() -> str | None:
    """The checked-out commit, read from .git without running git."""
    git = ROOT / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:12]
        ref = git / head.removeprefix("ref: ")
        if ref.exists():
            return ref.read_text().strip()[:12]
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line[:12] for line in packed if line.endswith(head.removeprefix("ref: "))), None)
    except OSError:
        return None
