"""The SHA-256 of a file too large for memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 4 << 20
Progress = Callable[[int], None]
"""Called with how many more bytes are done."""


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """The file's hash in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if progress:
                progress(count)
    return digest.hexdigest()
