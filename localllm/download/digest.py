"""The hash of a file while it grows: a thread that follows the contiguous part and reads it back from the page cache."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from localllm.download.partial import Identity, disk_error
from localllm.download.parts import MIB, Parts

GIT_BYTES = 64 * MIB
"""Files outside LFS are small; for a larger one git's hash is not computed."""
_GIT_OBJECT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Hashes:
    """Of a whole file."""

    sha256: str
    git: str
    """As git names the content, which is the Hub's ETag for a file outside LFS; empty for one too large for that."""

    def fit(self, identity: Identity) -> bool:
        """Whether it is the content that `identity` promises, as far as the Hub named one."""
        if identity.sha256:
            return self.sha256 == identity.sha256
        return not self.git or not _GIT_OBJECT.fullmatch(identity.etag) or self.git == identity.etag


class Follower(threading.Thread):
    """Hashes `path` from its beginning to the end of `parts`; stops when they stop, and stops them when it fails."""

    def __init__(self, parts: Parts, path: Path) -> None:
        super().__init__(name=f"hash {path.name}", daemon=True)
        self.position = 0
        """Everything before it is hashed."""
        self._parts = parts
        self._path = path
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % parts.size_bytes, usedforsecurity=False) if parts.size_bytes <= GIT_BYTES else None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            with self._path.open("rb", buffering=0) as file:
                self._follow(file)
        except Exception as error:
            self._error = disk_error(self._path, error) if isinstance(error, OSError) else error
            self._parts.stop()

    def result(self) -> Hashes:
        """The hashes, once the thread has ended; raises what it failed with."""
        if self._error:
            raise self._error
        return Hashes(self._sha256.hexdigest(), self._git.hexdigest() if self._git else "")

    def _follow(self, file: FileIO) -> None:
        buffer = memoryview(bytearray(MIB))
        while self.position < self._parts.size_bytes:
            frontier = self._parts.wait_frontier(self.position + MIB)
            while self.position < frontier:
                if self._parts.stopped:
                    return
                n = file.readinto(buffer[: min(MIB, frontier - self.position)])
                if not n:
                    raise OSError(f"it ends at {self.position} bytes")
                self._sha256.update(buffer[:n])
                if self._git:
                    self._git.update(buffer[:n])
                self.position += n
            if self._parts.stopped:
                return
