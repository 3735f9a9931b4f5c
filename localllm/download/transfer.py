"""Fetch one file from the Hub: several connections at once, resumable after anything, verified before it gets its name.

`X` grows as `X.part` (partial.py) under the lock `X.lock`; only a whole file with the right hash, and a sound header if it is a
GGUF, is renamed to `X`. The hash is computed while the bytes come, by a thread that follows the contiguous part and reads it back
from the page cache; its inner state cannot be stored, so what an earlier run left is read once more on resume.
Knows one file; download.py knows models and queues.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from localllm.amounts import amount
from localllm.download.connection import Connection
from localllm.download.digest import Follower, Hashes
from localllm.download.partial import Identity, Partial, Record, check_space, disk_error
from localllm.download.parts import LOOK_S, MIB, Part, Parts
from localllm.download.rate import SHARED, RateLimit, Speed
from localllm.download.source import Restart, Retry, Source
from localllm.download.spans import Spans
from localllm.errors import LocalLLMError, ModelError, NetworkError, VerificationFailed
from localllm.files import sync_directory

if TYPE_CHECKING:
    from localllm.hub import Hub, RepoFile

State = Literal["queued", "running", "paused", "verifying", "done", "failed", "cancelled"]
RESTARTS = 4
MAX_WAIT_S = 120.0
"""A server that wants more patience than this is given up; what is there is kept."""
MAX_BACKOFF_S = 15.0
SAVE_S = 5.0
LINGER_S = 2.0
"""How long a stopped thread may take; one that hangs in a name lookup writes nothing any more and is left to itself."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to fetch."""

    parts: int = 8
    """Connections at once."""
    stall_s: float = 20.0
    """A connection that brings nothing for so long is made anew."""
    attempts: int = 8
    """Failures in a row, without a byte from any connection in between, after which it is given up."""
    backoff_s: float = 0.5
    """Wait after the first failure; it doubles with each."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a download stands."""

    name: str
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    state: State


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is whole and verified."""

    path: Path
    size_bytes: int
    sha256: str
    resumed_bytes: int
    """There before this call."""
    fetched_bytes: int
    """Received by this call."""


class Stopped(Exception):
    """The caller's `cancel` was set; what was fetched is kept."""


OnProgress = Callable[[Progress], None]
OnMessage = Callable[[str], None]


def fetch(
    hub: Hub,
    file: RepoFile,
    repo: str,
    commit: str,
    target: Path,
    *,
    options: Options | None = None,
    limit: RateLimit = SHARED,
    on_progress: OnProgress | None = None,
    on_message: OnMessage | None = None,
    cancel: threading.Event | None = None,
    recorded_sha256: str | None = None,
) -> Fetched:
    """`file` of `repo` at `commit` as `target`, going on from what an earlier run left; a target that is right already is left alone.

    `recorded_sha256` is what the library knows of an existing target, which is read and hashed otherwise. The callbacks run in
    this thread, `on_progress` about five times a second. Raises Stopped, or an error of errors.py; then nothing is at `target`
    that was not there before, and what was fetched is kept unless it proved wrong.
    """
    stop = cancel or threading.Event()
    job = _Job(hub, file, repo, commit, target, options or Options(), limit, on_progress or _ignore, on_message or _ignore, stop)
    partial = Partial(target)
    with partial.locked(job.wait_turn):
        whole = False
        for _ in range(RESTARTS):
            try:
                return _attempt(job, partial, recorded_sha256, whole)
            except Restart as change:
                whole |= change.whole
                job.say(f"{target.name}: {change}; starting again")
                partial.discard()
    raise NetworkError(f"{file.path} of {repo} could not be fetched in one go {RESTARTS} times", hint="try again later")


def discard(target: Path) -> None:
    """Remove what an unfinished download of `target` left, unless another process is at it."""

    def give_up(_: float) -> None:
        raise Stopped

    if target.parent.is_dir():
        partial = Partial(target)
        with contextlib.suppress(Stopped), partial.locked(give_up):
            partial.discard()


def _ignore(_: object) -> None:
    """For a callback that nobody gave."""


@dataclass(frozen=True, slots=True)
class _Job:
    """The arguments of `fetch`."""

    hub: Hub
    file: RepoFile
    repo: str
    commit: str
    target: Path
    options: Options
    limit: RateLimit
    show: OnProgress
    say: OnMessage
    cancel: threading.Event

    def check(self) -> None:
        if self.cancel.is_set():
            raise Stopped

    def wait_turn(self, waited_s: float) -> None:
        self.check()
        if not waited_s:
            self.say(f"{self.target.name}: another download of it is running; waiting for that")
        self.show(Progress(self.target.name, 0, self.file.size_bytes, 0.0, "queued"))


def _attempt(job: _Job, partial: Partial, recorded_sha256: str | None, whole: bool) -> Fetched:
    """One go at it; raises Restart where the bytes so far are of no use."""
    job.check()
    target = job.target
    source = Source(job.hub, job.repo, job.commit, job.file.path)
    identity = source.identity
    if job.file.sha256 and identity.sha256 and job.file.sha256 != identity.sha256:
        job.say(f"{target.name}: it has changed on the Hub since it was listed")
    if (sha256 := _present(job, identity, recorded_sha256)) is not None:
        partial.discard()
        return Fetched(target, identity.size_bytes, sha256, identity.size_bytes, 0)
    done = _resume(job, partial, source)
    resumed_bytes = done.total_bytes
    run = _Run(job, source, partial, done, whole)
    hashes = run.run()
    if not hashes.fit(identity):
        if resumed_bytes:
            raise Restart("what an earlier run left is damaged")
        partial.discard()
        raise VerificationFailed(
            f"{job.file.path} from {job.repo} is not the file it should be: sha256 {hashes.sha256}, and the Hub says "
            f"{identity.sha256 or identity.etag}; it was removed",
            hint="start again; if that does not help, the file on the Hub or a proxy on the way is broken",
        )
    _finish(partial, target)
    return Fetched(target, identity.size_bytes, hashes.sha256, resumed_bytes, run.parts.received_bytes)


def _present(job: _Job, identity: Identity, recorded_sha256: str | None) -> str | None:
    """The sha256 of the target if it is the file already, else None."""
    target, size = job.target, identity.size_bytes
    if not target.is_file() or target.stat().st_size != size:
        return None
    if recorded_sha256 and recorded_sha256 == identity.sha256:
        return recorded_sha256
    parts = Parts(size, Spans([(0, size)]), MIB, MIB)
    follower = Follower(parts, target)
    follower.start()
    try:
        while follower.is_alive():
            job.check()
            job.show(Progress(target.name, follower.position, size, 0.0, "verifying"))
            follower.join(LOOK_S)
    finally:
        parts.stop()
    hashes = follower.result()
    if hashes.fit(identity):
        return hashes.sha256
    job.say(f"{target.name}: another file of that name is there; it is replaced when the new one is complete")
    return None


def _resume(job: _Job, partial: Partial, source: Source) -> Spans:
    """What is there already of the file that `source` has; else an empty file to begin with."""
    record, size = partial.read(), source.identity.size_bytes
    if record and record.identity.same_content(source.identity):
        source.validator = record.validator
        check_space(job.target.parent, max(0, size - partial.allocated_bytes()), job.target.name)
        if record.done.total_bytes:
            job.say(f"{job.target.name}: going on, {amount(record.done.total_bytes)} of {amount(size)} are there")
        return record.done
    if record:
        job.say(f"{job.target.name}: the file on the Hub has changed; starting again")
    partial.discard()
    check_space(job.target.parent, size, job.target.name)
    partial.begin(size)
    return Spans()


def _finish(partial: Partial, target: Path) -> None:
    """Check the header of a GGUF, then give the file its name, durably."""
    if target.suffix.lower() == ".gguf":
        from localllm.gguf import read_header

        try:
            read_header(partial.data)
        except LocalLLMError as error:
            partial.discard()
            # the hash was right, so fetching it again would bring the same
            why = error.message.replace(partial.data.name, target.name)
            raise ModelError(f"{why}; it came whole, and is removed again", hint="choose another quantisation or repository") from error
    with partial.explained():
        partial.flush()
        os.replace(partial.data, target)
        sync_directory(target.parent)
        partial.discard()


class _Run:
    """The threads that fetch and hash one file, and the thread that minds them."""

    def __init__(self, job: _Job, source: Source, partial: Partial, done: Spans, whole: bool) -> None:
        size = source.identity.size_bytes
        chunk = size if whole else min(max(size // 128, 4 * MIB), 32 * MIB)
        self.parts = Parts(size, done, max(1, chunk), min(max(size // 100, 4 * MIB), 128 * MIB))
        self._job = job
        self._source = source
        self._partial = partial
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self._error: Exception | None = None
        self._speed = Speed()
        self._saved_at = time.monotonic()
        self._shown_at = 0.0
        missing = size - done.total_bytes
        count = 1 if whole else min(job.options.parts, -(-missing // MIB))
        self._fetchers = [threading.Thread(target=self._fetch_parts, name=f"fetch {n}", daemon=True) for n in range(count)]
        self._follower = Follower(self.parts, partial.data)

    def run(self) -> Hashes:
        """Fetch what is missing; the hashes of the whole. Raises Restart, Stopped or an error, and has saved what there is."""
        for thread in (*self._fetchers, self._follower):
            thread.start()
        try:
            while not self.parts.complete:
                self._mind("running")
                self.parts.wait(LOOK_S)
            self._save()
            while self._follower.is_alive():
                self._mind("verifying")
                self._follower.join(LOOK_S)
            self._mind("verifying")
            return self._follower.result()
        finally:
            self._halt()

    def _mind(self, state: State) -> None:
        """What is to be done between two looks."""
        self._job.check()
        if self._error:
            raise self._error
        if self.parts.stopped:
            self._follower.join()
            self._follower.result()
        now = time.monotonic()
        if self.parts.save_due or (self.parts.unsaved_bytes and now - self._saved_at > SAVE_S):
            self._save()
        if now - self._shown_at >= LOOK_S:
            self._shown_at = now
            done = self.parts.done_bytes if state == "running" else self._follower.position
            speed = self._speed.read(self.parts.received_bytes) if state == "running" else 0.0
            self._job.show(Progress(self._job.target.name, done, self.parts.size_bytes, speed, state))

    def _save(self) -> None:
        done = self.parts.snapshot()
        self._partial.save(Record(self._source.identity, self._source.validator, done))
        self.parts.saved(done)
        self._saved_at = time.monotonic()

    def _halt(self) -> None:
        """Stop all threads, then record what is there."""
        self._stop.set()
        self.parts.stop()
        with self._lock:
            for connection in self._connections:
                connection.hang_up()
        deadline = time.monotonic() + LINGER_S
        for thread in (*self._fetchers, self._follower):
            thread.join(max(0.0, deadline - time.monotonic()))
        if self.parts.unsaved_bytes:
            with contextlib.suppress(LocalLLMError):
                self._save()

    # -- the threads that fetch

    def _fetch_parts(self) -> None:
        connection = Connection(self._job.options.stall_s)
        with self._lock:
            self._connections.append(connection)
        try:
            with contextlib.closing(connection), self._partial.data.open("r+b", buffering=0) as file:
                while part := self.parts.take():
                    self._fetch_part(part, file, connection)
                    self.parts.finish(part)
        except Exception as error:
            if not self._stop.is_set():
                self._error = self._error or (disk_error(self._partial.data, error) if isinstance(error, OSError) else error)
            self.parts.stop()

    def _fetch_part(self, part: Part, file: FileIO, connection: Connection) -> None:
        """All of `part`, in as many attempts as it takes."""
        failures, received = 0, -1
        while part.left_bytes and not self._stop.is_set():
            try:
                self._receive(part, file, connection)
            except Retry as error:
                # A failure counts only if nobody got anything since the one before.
                failures = failures + 1 if received == self.parts.received_bytes else 1
                received = self.parts.received_bytes
                if part.left_bytes and not self._stop.is_set():
                    self._stop.wait(self._patience(error, failures))

    def _patience(self, error: Retry, failures: int) -> float:
        """Seconds to wait before the next attempt; raises NetworkError when there shall be none."""
        options = self._job.options
        wait = min(options.backoff_s * 2 ** (failures - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)
        if error.after_s is not None:
            wait = max(wait, error.after_s)
        if failures < options.attempts and wait <= MAX_WAIT_S:
            return wait
        reason = f"{error}, {failures} times in a row" if wait <= MAX_WAIT_S else f"{error} and asks to wait {wait:.0f} s"
        kept = f"{amount(self.parts.done_bytes)} of {amount(self.parts.size_bytes)} are kept"
        raise NetworkError(f"fetching {self._job.file.path} failed: {reason}; {kept}", hint="the same command goes on from there")

    def _receive(self, part: Part, file: FileIO, connection: Connection) -> None:
        """One request for what is left of `part`; ends early when another thread has taken the rest."""
        asked = part.end
        file.seek(part.position)
        for data in self._source.read(connection, part.position, asked):
            _write(file, memoryview(data)[: self.parts.claim(part, len(data))])
            self.parts.wrote(part)
            if self._stop.is_set() or (not part.left_bytes and part.end < asked):
                return
            self._job.limit.take(len(data), self._stop)


def _write(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
