"""A file on its way: `X.part` holds the bytes, `X.part.json` says what it will become and which of its bytes are there.

A range is recorded only after its bytes were flushed, so the record is true after a crash or a power cut. `X.lock` keeps all
other processes away meanwhile. Knows no network.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

from localllm.amounts import amount
from localllm.download.spans import Spans
from localllm.errors import DoesNotFit, LocalLLMError, UsageError
from localllm.files import write_atomic

FORMAT = 1
LOOK_S = 0.2
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_flush = getattr(os, "fdatasync", os.fsync)  # macOS and Windows have only fsync


@dataclass(frozen=True, slots=True)
class Identity:
    """Which file it is: where from, and what its content must be."""

    repo: str
    commit: str
    path: str
    size_bytes: int
    sha256: str | None
    etag: str
    """The Hub's own: for a file outside LFS, the hash of its git object."""

    def same_content(self, other: Identity) -> bool:
        """Whether bytes of one are bytes of the other; content is what counts, a new commit may leave a file as it was."""
        if self.size_bytes != other.size_bytes:
            return False
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return bool(self.etag) and self.etag == other.etag


@dataclass(frozen=True, slots=True)
class Record:
    """What `X.part.json` says."""

    identity: Identity
    validator: str
    """The storage server's own ETag, for If-Range; empty if it gave none."""
    done: Spans


class Partial:
    """The files beside `target`; only who holds the lock may change them."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.data = target.with_name(f"{target.name}.part")
        self.record = target.with_name(f"{target.name}.part.json")
        self._lock = target.with_name(f"{target.name}.lock")

    @contextlib.contextmanager
    def locked(self, waiting: Callable[[float], None]) -> Generator[None]:
        """Alone with the target. While another has the lock, `waiting` gets the seconds waited so far, often; it may raise to give up."""
        from filelock import FileLock, Timeout

        with self.explained():
            self.target.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._lock)
            waited_s = 0.0
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=LOOK_S if waited_s else 0.0)
                except Timeout:
                    waiting(waited_s)
                    waited_s += LOOK_S
        try:
            yield
        finally:
            # Whoever waits notices that the file it opened has lost its name, and makes another; Windows refuses while it is open.
            with contextlib.suppress(OSError):
                self._lock.unlink(missing_ok=True)
            lock.release()

    def read(self) -> Record | None:
        """What is there of which file; None where nothing usable is."""
        try:
            raw: dict[str, Any] = json.loads(self.record.read_bytes())
            if raw["format"] != FORMAT:
                return None
            identity = Identity(**raw["identity"])
            spans = [(int(start), int(end)) for start, end in raw["done"]]
            size = self.data.stat().st_size
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if size != identity.size_bytes or any(not 0 <= start < end <= size for start, end in spans):
            return None
        return Record(identity, str(raw.get("validator") or ""), Spans(spans))

    def begin(self, size_bytes: int) -> None:
        """An empty file of the full size, sparse where the file system can; what was there is dropped. Raises DoesNotFit."""
        with self.explained():
            self.discard()
            self.data.parent.mkdir(parents=True, exist_ok=True)
            with self.data.open("xb") as file:
                file.truncate(size_bytes)

    def save(self, record: Record) -> None:
        """Flush the data, then write the record, which must speak of no byte that was written after this call began."""
        with self.explained():
            self.flush()
            spans = [list(span) for span in record.done]
            state = {"format": FORMAT, "identity": asdict(record.identity), "validator": record.validator, "done": spans}
            write_atomic(self.record, json.dumps(state).encode())

    def flush(self) -> None:
        # Through a descriptor of its own: flushing is about the file, whoever wrote to it.
        descriptor = os.open(self.data, os.O_RDWR)
        try:
            _flush(descriptor)
        finally:
            os.close(descriptor)

    def discard(self) -> None:
        """Remove both files, if there; the record first, for without it the data means nothing."""
        self.record.unlink(missing_ok=True)
        self.data.unlink(missing_ok=True)
        # What `write_atomic` leaves when it is killed.
        for left in self.record.parent.glob(f".{escape(self.record.name)}.*.tmp"):
            left.unlink(missing_ok=True)

    def allocated_bytes(self) -> int:
        """Disk that the data takes already."""
        try:
            stat = self.data.stat()
        except FileNotFoundError:
            return 0
        # Windows does not tell, and gives a plain file its whole size at once.
        blocks = getattr(stat, "st_blocks", None)
        return stat.st_size if blocks is None else min(stat.st_size, blocks * 512)

    @contextlib.contextmanager
    def explained(self) -> Generator[None]:
        """Turn an OSError about the target's disk into an error of ours."""
        try:
            yield
        except OSError as error:
            raise disk_error(self.data, error) from error


def disk_error(path: Path, error: OSError) -> LocalLLMError:
    """What to tell when `path` cannot be written."""
    if error.errno == errno.EFBIG:
        return DoesNotFit(
            f"the file system of {path.parent} does not take a file as large as {path.stem}",
            hint="FAT32 ends at 4 GB: use another disk; or a limit is set (ulimit -f)",
        )
    if error.errno in FULL:
        return DoesNotFit(f"the disk of {path.parent} is full; what was fetched is kept", hint="free some space and start again")
    return UsageError(f"cannot write {path}: {error.strerror or error}", hint="check the folder and its permissions")


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DoesNotFit unless `needed_bytes` more fit on the disk of `folder`, which need not exist yet."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise DoesNotFit(
            f"{what} needs {amount(needed_bytes)} on the disk of {folder}, and {amount(free)} are free",
            hint=f"free {amount(needed_bytes - free)}; localllm df and localllm prune help",
            needed_bytes=needed_bytes,
            free_bytes=free,
        )
