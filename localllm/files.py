"""Writing a file so that a reader sees the old content or the new, whatever happens in between. Knows no formats."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

PRIVATE = 0o600


def write_atomic(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Replace the content of `path` by `data`, durably; raises OSError and then leaves the old file and no other.

    A symbolic link is followed, an existing file keeps its mode, a new one is private to the user.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else PRIVATE
    # In the same directory: only there is the rename atomic.
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut; a file system or OS that cannot is left alone."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
