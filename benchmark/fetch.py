"""Files from elsewhere: where they belong, whence they come, and whether they are what they should be."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from benchmark.errors import RunError, UsageError


@dataclass(frozen=True)
class Remote:
    """A file that a component needs.

    Args:
        path: where it belongs.
        url: where it comes from; a Google Drive address is fetched with gdown.
        sha256: its sha256 or the start of it, where its publisher says it.
        size: its bytes, where its publisher says them.
    """

    path: Path
    url: str
    sha256: str | None = None
    size: int | None = None

    def __str__(self) -> str:
        size = "size not published" if self.size is None else f"about {self.size / 1e6:,.0f} MB"
        digest = "sha256 not published" if self.sha256 is None else f"sha256 {self.sha256}"
        return f"{self.url} → {self.path} ({size}, {digest}{'…' if self.sha256 and len(self.sha256) < 64 else ''})"


def obtain(remote: Remote, *, offline: bool) -> Path:
    """The file, fetched if it isn't there; written aside and renamed, so that a broken download leaves nothing.

    Proxies by the usual variables (HTTPS_PROXY and so on).

    Raises:
        UsageError: if it is missing and may not be fetched, or isn't what it should be; the message says what to do.
        RunError: if the download fails.
    """
    if not remote.path.is_file():
        if offline:
            raise UsageError(f"{remote.path} is missing, and --offline forbids its download. By hand:\n  {remote}")
        aside = remote.path.with_name(remote.path.name + ".part")
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            print(f"fetching {remote}", file=sys.stderr)
            _download(remote.url, aside)
            if fault := _fault(remote, aside):
                raise RunError(f"what came is {fault}")
            aside.replace(remote.path)
        except Exception as error:  # gdown, urllib and the file system, each with errors of their own
            raise RunError(f"{remote.path}: the download failed: {error}. By hand:\n  {remote}") from error
        finally:
            aside.unlink(missing_ok=True)
    if fault := _fault(remote, remote.path):
        raise UsageError(f"{remote.path} is {fault}; delete it and fetch it again:\n  {remote}")
    return remote.path


def _download(url: str, path: Path) -> None:
    if urlparse(url).hostname == "drive.google.com":
        try:
            import gdown
        except ImportError as error:
            raise UsageError("Google Drive needs gdown: python -m pip install gdown") from error
        gdown.download(url, str(path), quiet=False)
        if not path.is_file():
            raise RunError("Google Drive gave no file (often a quota; try again later)")
        return
    import torch

    torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())


def _fault(remote: Remote, path: Path) -> str | None:
    """What a file is in place of what it should be, or None if it is right as far as can be told."""
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a checkpoint (Google Drive serves one when a quota is used up)"
    if remote.sha256 and not (found := sha256(path)).startswith(remote.sha256):
        return f"another file: its sha256 is {found}, expected {remote.sha256}"
    return None


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_forbidden = False


class NetworkForbidden(OSError):
    """Something opened a socket under --offline."""


def _hook(event: str, arguments: tuple) -> None:
    if _forbidden and event.startswith("socket.") and event != "socket.gethostname":
        raise NetworkForbidden("--offline: the network is off limits")


@contextmanager
def network(allowed: bool) -> Iterator[None]:
    """Whether sockets may be opened in this process, by whatever library; hubs are told so in their own words."""
    global _forbidden
    if allowed:
        yield
        return
    if not hasattr(_hook, "installed"):
        sys.addaudithook(_hook)  # for good: it can only be told to let pass
        _hook.installed = True  # type: ignore[attr-defined]
    before, _forbidden = _forbidden, True
    kept = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        _forbidden = before
        if kept is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = kept
