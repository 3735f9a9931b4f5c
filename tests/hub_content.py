"""What the tests' Hub holds and how it can misbehave: repos, files, requests as they came, faults. See hub_server."""

from __future__ import annotations

import fnmatch
import hashlib
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

TOKEN = "hf_testtoken"
TOKEN_WITHOUT_ACCESS = "hf_testtokenwithoutaccess"
CHUNK_BYTES = 1 << 20
DATE = "2026-05-04T03:02:01.000Z"

Kind = Literal[
    "rate_limit",  # seconds=7: 429 with Retry-After
    "status",  # code=500
    "latency",  # ms=30, before the answer
    "drop",  # the connection is closed without an answer
    "redirect_loop",  # answers 302 to itself for ever
    "redirect",  # to="http://…": 302 to that very URL
    "body",  # data=b"…", headers={…}: 200 with something else, as a captive portal does
    "stall",  # after=N bytes of the body: silence, the connection stays open
    "truncate",  # after=N bytes of the body: the connection is closed
    "slow",  # per_connection=bytes/s and/or total=bytes/s over all connections that this fault touches
    "change",  # after=N answered reads: the file becomes data=b"…", with a new ETag and sha256, under the same commit
    "wrong_hash",  # tree, model info and X-Linked-Etag give another sha256 than the bytes have
    "no_ranges",  # Range is ignored: 200 and the whole file
    "oversize",  # extra=N: Content-Length, Content-Range and the body are N bytes longer than announced before
]
Port = Literal["hub", "cdn"]


@dataclass
class Request:
    """One request as it arrived, and what was answered."""

    port: Port
    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    target: str
    """`user/repo`, `user/repo/file` or `search`: what faults match."""
    status: int = 0
    body_bytes: int = 0
    """Bytes of the body handed to the socket so far."""

    def header(self, name: str) -> str | None:
        return self.headers.get(name.lower())


@dataclass
class Fault:
    """One way to misbehave; `hits` counts how often it did."""

    pattern: str
    kind: Kind
    port: Port | None
    times: int | None
    args: dict[str, Any]
    hits: int = 0
    pace: Pace | None = None

    def matches(self, request: Request) -> bool:
        if self.port not in {None, request.port}:
            return False
        return any(fnmatch.fnmatchcase(name, self.pattern) for name in (request.target, request.target.rpartition("/")[2]))


class Pace:
    """A rate in bytes per second, shared by whoever waits on it; half a tenth of a second may be caught up."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self.lock = threading.Lock()
        self.free_at = 0.0

    def reserve(self, n_bytes: int) -> float:
        """Seconds to wait before `n_bytes` more may go out."""
        with self.lock:
            now = time.monotonic()
            start = max(self.free_at, now - 0.05)
            self.free_at = start + n_bytes / self.bytes_per_second
            return max(0.0, self.free_at - now)


@dataclass
class File:
    """The content of one file of a repo: bytes, or a file on disk that is never read whole."""

    content: bytes | Path
    lfs: bool
    generation: int = 0

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        if isinstance(self.content, bytes):
            digest.update(self.content)
        else:
            with self.content.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """A git object id: of the content where git holds it, made up where LFS does."""
        if self.lfs or isinstance(self.content, Path):
            return hashlib.sha1(f"{self.generation} {self.content!r}".encode()).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def cdn_etag(self) -> str:
        return f'"{hashlib.md5(self.blob_id.encode()).hexdigest()}"'


@dataclass
class Repo:
    """One model repo: commits, newest last, and what its page says."""

    name: str
    commits: dict[str, dict[str, File]]
    gated: Literal["auto", "manual", False] = False
    private: bool = False
    disabled: bool = False
    licence: str | None = "mit"
    downloads: int = 0
    likes: int = 0
    tags: tuple[str, ...] = ("gguf",)
    branches: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        return self.branches.get(revision) or next((commit for commit in self.commits if commit == revision), None)
