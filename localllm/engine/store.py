"""Sequence states outside the KV cache: least recently used in RAM, named sessions on disk.

An entry is a sequence's tokens with the state llama.cpp gave for them. Only a request that names a
session ever puts anything on disk. Files are written whole or not at all, carry a checksum, and are
ignored with a warning when they are damaged or belong to another model or other parameters.
"""

from __future__ import annotations

import array
import hashlib
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from localllm.engine.prefix import common_prefix
from localllm.files import write_atomic

logger = logging.getLogger("localllm.engine")

MAGIC = b"localllm-kv 1\n"
MAX_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a model that cannot drop a suffix needs to resume at `position`: llama.cpp's partial state."""

    position: int
    state: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """The full state of the first len(tokens) positions of a sequence."""

    tokens: list[int]
    state: bytes
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def size_bytes(self) -> int:
        return len(self.state) + 4 * len(self.tokens) + sum(len(c.state) for c in self.checkpoints)


class StateStore:
    """Saved states of one model under one set of parameters (`key`). Thread-safe."""

    def __init__(self, key: str, *, ram_bytes: int, directory: Path | None = None, disk_bytes: int = 0) -> None:
        self.key = key
        self.ram_bytes = ram_bytes
        self.disk_bytes = disk_bytes
        self.directory = directory / key if directory is not None else None
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._serial = 0
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used

    def put(self, entry: Entry) -> None:
        """Keep in RAM; older entries that the new one contains or that no longer fit are dropped."""
        if entry.size_bytes > self.ram_bytes:
            return
        with self._lock:
            for serial, old in list(self._entries.items()):
                if len(old.tokens) <= len(entry.tokens) and old.tokens == entry.tokens[: len(old.tokens)]:
                    self._drop(serial)
            while self._used + entry.size_bytes > self.ram_bytes:
                self._drop(next(iter(self._entries)))
            self._serial += 1
            self._entries[self._serial] = entry
            self._used += entry.size_bytes

    def matches(self, tokens: list[int]) -> Iterator[tuple[Entry, int]]:
        """Entries that begin as `tokens` does, with the number of tokens in common."""
        with self._lock:
            entries = list(self._entries.values())
        for entry in entries:
            if n := common_prefix(entry.tokens, 0, tokens, 0):
                yield entry, n

    def touch(self, entry: Entry) -> None:
        """Mark as just used."""
        with self._lock:
            for serial, known in self._entries.items():
                if known is entry:
                    self._entries.move_to_end(serial)
                    return

    def clear(self) -> None:
        """Drop everything in RAM; files stay."""
        with self._lock:
            self._entries.clear()
            self._used = 0

    def _drop(self, serial: int) -> None:
        self._used -= self._entries.pop(serial).size_bytes

    def save_session(self, session: str, entry: Entry) -> bool:
        """Write a session's state to disk, durably; False (and a warning) when that is not possible."""
        path = self._path(session)
        if path is None or entry.size_bytes > self.disk_bytes:
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make_room(entry.size_bytes, keep=path)
            write_atomic(path, _encode(self.key, entry))
        except OSError as error:
            logger.warning("the state of a session could not be saved to %s: %s", path, error)
            return False
        return True

    def load_session(self, session: str) -> None:
        """Bring a session's state from disk into RAM; nothing happens when there is none."""
        path = self._path(session)
        if path is None:
            return
        try:
            if path.stat().st_size > self.ram_bytes:
                logger.warning("the saved state %s is larger than the RAM store of %d bytes: ignored", path, self.ram_bytes)
                return
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("the saved state %s cannot be read: %s", path, error)
            return
        try:
            entry = _decode(self.key, data)
        except ValueError as error:
            logger.warning("the saved state %s is ignored: %s", path, error)
            return
        os.utime(path)
        self.put(entry)

    def _path(self, session: str) -> Path | None:
        if self.directory is None or not session:
            return None
        return self.directory / f"{hashlib.sha256(session.encode('utf-8', 'replace')).hexdigest()[:32]}.kv"

    def _make_room(self, need: int, *, keep: Path) -> None:
        """Delete the least recently used state files of every model until `need` more bytes fit the cap."""
        assert self.directory is not None
        files: list[tuple[float, int, Path]] = []
        for path in self.directory.parent.glob("*/*.kv"):
            try:
                info = path.stat()
            except OSError:
                continue
            if path != keep:
                files.append((info.st_mtime, info.st_size, path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used + need <= self.disk_bytes:
                return
            path.unlink(missing_ok=True)
            used -= size


def _encode(key: str, entry: Entry) -> bytes:
    tokens = array.array("i", entry.tokens).tobytes()
    body = b"".join((tokens, entry.state, *(c.state for c in entry.checkpoints)))
    header = {
        "key": key,
        "n_tokens": len(entry.tokens),
        "state_bytes": len(entry.state),
        "checkpoints": [[c.position, len(c.state)] for c in entry.checkpoints],
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    return b"".join((MAGIC, json.dumps(header).encode(), b"\n", body))


def _decode(key: str, data: bytes) -> Entry:
    """The entry in a state file; ValueError says what is wrong with it."""
    if not data.startswith(MAGIC):
        raise ValueError("not a state file of this version")
    end = data.find(b"\n", len(MAGIC), len(MAGIC) + MAX_HEADER_BYTES)
    if end < 0:
        raise ValueError("its header is damaged")
    try:
        header = json.loads(data[len(MAGIC) : end])
        n_tokens, state_bytes = int(header["n_tokens"]), int(header["state_bytes"])
        checkpoints = [(int(position), int(size)) for position, size in header["checkpoints"]]
        found, digest = header["key"], header["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError("its header is damaged") from error
    if found != key:
        raise ValueError("it belongs to another model, build or setting")
    body = memoryview(data)[end + 1 :]
    sizes = [n_tokens, state_bytes, *(size for _, size in checkpoints)]
    if min(sizes) < 0 or 4 * n_tokens + sum(sizes[1:]) != len(body) or hashlib.sha256(body).hexdigest() != digest:
        raise ValueError("it is damaged or incomplete")
    tokens = array.array("i")
    tokens.frombytes(body[: 4 * n_tokens])
    at = 4 * n_tokens + state_bytes
    saved: list[Checkpoint] = []
    for position, size in checkpoints:
        saved.append(Checkpoint(position, bytes(body[at : at + size])))
        at += size
    return Entry(tokens.tolist(), bytes(body[4 * n_tokens : 4 * n_tokens + state_bytes]), tuple(saved))
