"""Downloads of models: what an order needs, and a queue of them that survives a restart.

    queue = Queue(Hub(), directories().state / "downloads", on_change=show)
    id = queue.add(order_for(model, directories().models))
    queue.wait(id)                      # or pause, resume, cancel, from any thread

A download is the files of one model, one after the other; how one file is fetched knows transfer.py. Each download has a record
of its own in the folder, so several processes may keep theirs there; what one of them runs the others see as paused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from localllm.download.partial import Partial, check_space
from localllm.download.rate import SHARED, RateLimit
from localllm.download.transfer import Fetched, Options, Progress, State, Stopped, discard, fetch
from localllm.errors import LocalLLMError, NotFound
from localllm.files import write_atomic
from localllm.hub import RepoFile
from localllm.reference import safe_parts

if TYPE_CHECKING:
    from localllm.hub import Hub
    from localllm.quant import RemoteModel

FORMAT = 1
ENDED: frozenset[State] = frozenset({"paused", "done", "failed", "cancelled"})
LOOK_S = 0.2
LINGER_S = 4.0


@dataclass(frozen=True, slots=True)
class Order:
    """Files of a repository, and the models folder that they go to."""

    name: str
    """For people: `user/repo:Q4_K_M`."""
    repo: str
    commit: str
    files: tuple[RepoFile, ...]
    folder: Path

    @property
    def targets(self) -> tuple[Path, ...]:
        """Where each file goes: `<folder>/<publisher>/<repo>/<path>`. Raises UsageError for a name that could leave the folder."""
        return tuple(self.folder.joinpath(*safe_parts(self.repo, file.path)) for file in self.files)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def id(self) -> str:
        """The same for all orders of the same targets, at whatever commit."""
        return hashlib.sha256("\0".join(map(str, self.targets)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Planned:
    """One file of an order, and what of it is on disk."""

    file: RepoFile
    target: Path
    present_bytes: int
    state: Literal["new", "partial", "present"]


@dataclass(frozen=True, slots=True)
class Download:
    """An order as it stands."""

    id: str
    order: Order
    state: State
    done_bytes: int
    bytes_per_second: float = 0.0
    message: str = ""
    """The last thing that was worth saying."""
    error: LocalLLMError | None = None
    """Why it failed."""

    @property
    def progress(self) -> Progress:
        return Progress(self.order.name, self.done_bytes, self.order.size_bytes, self.bytes_per_second, self.state)


def order_for(model: RemoteModel, folder: Path, extra: Sequence[RepoFile] = ()) -> Order:
    """The order for `model`, with `extra` files such as its vision projector."""
    name = f"{model.repo}:{model.quant}" if model.quant else f"{model.repo}/{model.name}"
    return Order(name, model.repo, model.commit, (*model.files, *extra), folder)


def planned(order: Order) -> tuple[Planned, ...]:
    """What of `order` is there, going by names, sizes and records; nothing is read or changed."""
    return tuple(_planned(file, target) for file, target in zip(order.files, order.targets, strict=True))


def check_disk(order: Order) -> None:
    """Raise DoesNotFit unless what is missing of `order` fits on the disk."""
    missing = [each for each in planned(order) if each.state != "present"]
    needed = sum(each.file.size_bytes - min(each.file.size_bytes, Partial(each.target).allocated_bytes()) for each in missing)
    check_space(order.folder, needed, order.name)


def _planned(file: RepoFile, target: Path) -> Planned:
    if target.is_file() and target.stat().st_size == file.size_bytes:
        return Planned(file, target, file.size_bytes, "present")
    record = Partial(target).read()
    if record is None or record.identity.size_bytes != file.size_bytes or (file.sha256 and record.identity.sha256 != file.sha256):
        return Planned(file, target, 0, "new")
    return Planned(file, target, record.done.total_bytes, "partial")


class _Entry:
    """A download while the queue holds it; guarded by the queue's lock."""

    def __init__(self, order: Order, state: State, error: LocalLLMError | None = None) -> None:
        self.id = order.id
        self.order = order
        self.state: State = state
        self.error = error
        self.message = ""
        self.done_bytes = sum(each.present_bytes for each in planned(order))
        self.bytes_per_second = 0.0
        self.stop = threading.Event()
        self.wanted: State = "paused"
        """What becomes of it when it has stopped."""
        self.keep = False

    @property
    def running(self) -> bool:
        return self.state in {"running", "verifying"}

    def shown(self) -> Download:
        return Download(self.id, self.order, self.state, self.done_bytes, self.bytes_per_second, self.message, self.error)


class Queue:
    """Downloads in the order they were added, `at_once` of them running; every method may be called from any thread.

    `on_change` gets a download whenever its state or message changes and about five times a second while it runs; `on_done` gets
    the files of a finished one before it counts as done, and may raise to make it fail. Both run in the queue's threads.
    """

    def __init__(
        self,
        hub: Hub,
        folder: Path | None,
        *,
        at_once: int = 1,
        options: Options | None = None,
        limit: RateLimit = SHARED,
        on_change: Callable[[Download], None] | None = None,
        on_done: Callable[[Order, Sequence[Fetched]], None] | None = None,
    ) -> None:
        self._hub = hub
        self._folder = folder
        self._at_once = at_once
        self._options = options
        self._limit = limit
        self._on_change = on_change or _ignore
        self._on_done = on_done or _ignore
        self._changed = threading.Condition()
        self._entries: dict[str, _Entry] = {entry.id: entry for entry in _recorded(folder)}
        self._threads: list[threading.Thread] = []
        self._closed = False

    def add(self, order: Order) -> str:
        """Queue `order`; its id. What is known under that id already goes on, with this order's commit."""
        with self._changed:
            entry = self._entries.get(order.id)
            if entry is None or not entry.running:
                self._entries.pop(order.id, None)
                entry = self._entries[order.id] = _Entry(order, "queued")
        return self._requeue(entry)

    def resume(self, id: str) -> None:
        """Queue again what was paused, has failed or was cancelled."""
        self._requeue(self._entry(id))

    def pause(self, id: str) -> None:
        """Stop it and keep what it has."""
        self._halt(id, "paused", keep=True)

    def cancel(self, id: str, *, keep: bool = False) -> None:
        """Stop it for good; its unfinished file is removed unless `keep`. Files that are whole already stay."""
        self._halt(id, "cancelled", keep)

    def downloads(self) -> tuple[Download, ...]:
        with self._changed:
            return tuple(entry.shown() for entry in self._entries.values())

    def clear(self) -> None:
        """Forget what is done or cancelled."""
        with self._changed:
            self._entries = {id: entry for id, entry in self._entries.items() if entry.state not in {"done", "cancelled"}}

    def wait(self, id: str) -> Download:
        """Until it is done. Raises its error if it failed, Stopped if it was paused or cancelled."""
        entry = self._entry(id)
        with self._changed:
            while entry.state not in ENDED:
                # With a timeout, else Windows does not let Ctrl-C through.
                self._changed.wait(LOOK_S)
        if entry.error:
            raise entry.error
        if entry.state != "done":
            raise Stopped
        return entry.shown()

    def close(self) -> None:
        """Pause what runs or waits, and end the threads; the records stay for the next time.

        Returns within seconds: a thread that hangs in a name lookup is left to itself, it writes nothing any more.
        """
        with self._changed:
            self._closed = True
            active = [entry.id for entry in self._entries.values() if entry.state not in ENDED]
        for id in active:
            self.pause(id)
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + LINGER_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # -- states

    def _entry(self, id: str) -> _Entry:
        with self._changed:
            if (entry := self._entries.get(id)) is None:
                raise NotFound(f"no download {id}", hint="it may be done, or was cleared")
            return entry

    def _requeue(self, entry: _Entry) -> str:
        with self._changed:
            if entry.running:
                entry.wanted = "queued"
            else:
                self._set(entry, "queued")
            if len(self._threads) < self._at_once and not self._closed:
                self._threads.append(threading.Thread(target=self._work, name=f"download {len(self._threads)}", daemon=True))
                self._threads[-1].start()
        self._on_change(entry.shown())
        return entry.id

    def _halt(self, id: str, wanted: State, keep: bool) -> None:
        entry = self._entry(id)
        with self._changed:
            if entry.running:
                entry.wanted, entry.keep = wanted, keep
                entry.stop.set()
                return
            if entry.state == "done" or entry.state == wanted:
                return
            self._set(entry, wanted)
        self._settle(entry, keep)

    def _set(self, entry: _Entry, state: State, error: LocalLLMError | None = None) -> None:
        """Change the state and its record; the caller holds the lock."""
        entry.state, entry.error, entry.bytes_per_second = state, error, 0.0
        self._changed.notify_all()
        if self._folder:
            # A record that cannot be written must not stop the download.
            with contextlib.suppress(OSError):
                _record(self._folder, entry)

    def _settle(self, entry: _Entry, keep: bool) -> None:
        """After an entry has ended."""
        if entry.state == "cancelled" and not keep:
            for target in entry.order.targets:
                discard(target)
        self._on_change(entry.shown())

    # -- the threads

    def _work(self) -> None:
        while entry := self._next():
            error: LocalLLMError | None = None
            state: State = "done"
            try:
                self._run(entry)
            except Stopped:
                state = entry.wanted
            except LocalLLMError as reason:
                state, error = "failed", reason
            except Exception as reason:
                state, error = "failed", LocalLLMError(f"unexpected: {type(reason).__name__}: {reason}", hint="this is a bug")
            with self._changed:
                self._set(entry, state, error)
            self._settle(entry, entry.keep)

    def _next(self) -> _Entry | None:
        """The entry to run, waiting for one; None when the queue closes."""
        with self._changed:
            while not self._closed:
                if entry := next((entry for entry in self._entries.values() if entry.state == "queued"), None):
                    entry.stop, entry.wanted, entry.keep = threading.Event(), "paused", True
                    self._set(entry, "running")
                    return entry
                self._changed.wait()
        return None

    def _run(self, entry: _Entry) -> None:
        order = entry.order
        check_disk(order)
        before, fetched = 0, list[Fetched]()

        def show(progress: Progress) -> None:
            with self._changed:
                entry.state, entry.bytes_per_second = progress.state, progress.bytes_per_second
                entry.done_bytes = before + progress.done_bytes
            self._on_change(entry.shown())

        def say(message: str) -> None:
            entry.message = message
            self._on_change(entry.shown())

        for file, target in zip(order.files, order.targets, strict=True):
            fetched.append(
                fetch(
                    self._hub,
                    file,
                    order.repo,
                    order.commit,
                    target,
                    options=self._options,
                    limit=self._limit,
                    on_progress=show,
                    on_message=say,
                    cancel=entry.stop,
                )
            )
            before += fetched[-1].size_bytes
            entry.done_bytes = before
        self._on_done(order, fetched)


def _ignore(*_: object) -> None:
    """For a callback that nobody gave."""


def _record(folder: Path, entry: _Entry) -> None:
    """Write what a later run has to know of `entry`; nothing, once there is no more to do."""
    path = folder / f"{entry.id}.json"
    if entry.state in {"done", "cancelled"}:
        path.unlink(missing_ok=True)
        return
    order = entry.order
    data = {
        "format": FORMAT,
        "name": order.name,
        "repo": order.repo,
        "commit": order.commit,
        "files": [asdict(file) for file in order.files],
        "folder": str(order.folder),
        "state": entry.state,
        "error": entry.error.to_json() if entry.error else None,
    }
    write_atomic(path, json.dumps(data).encode())


def _recorded(folder: Path | None) -> Iterator[_Entry]:
    """The downloads of earlier runs, oldest first: those that had not failed are paused. A record that makes no sense is passed over."""
    paths: Iterable[Path] = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime) if folder else ()
    for path in paths:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, LocalLLMError):
            data: dict[str, Any] = json.loads(path.read_bytes())
            if data["format"] == FORMAT:
                files = tuple(RepoFile(**file) for file in data["files"])
                order = Order(data["name"], data["repo"], data["commit"], files, Path(data["folder"]))
                error = LocalLLMError.from_json(data["error"]) if data["error"] else None
                yield _Entry(order, "failed" if error else "paused", error)
