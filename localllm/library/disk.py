"""What the models folder takes on disk, and what of it nobody needs any more."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from localllm.library.ledger import Ledger
from localllm.library.library import Library, unlink
from localllm.library.model import ADOPTED, BUILT_IN, LocalModel
from localllm.library.scan import disk_bytes, entries, remains


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the disk's bytes went."""

    models: tuple[LocalModel, ...]
    """Those below the models folder."""
    partial_bytes: int
    other_bytes: int
    """Other files in the models folder."""
    kv_states_bytes: int
    adopted_bytes: int
    """Other programs' files, used in place."""
    disk_free_bytes: int
    disk_total_bytes: int

    @property
    def models_bytes(self) -> int:
        return sum(model.size_bytes for model in self.models)


@dataclass(frozen=True, slots=True)
class Prunable:
    """Something that nobody needs any more."""

    what: str
    """`partial`, `lock`, `dead link`, `empty folder` or `note`."""
    name: str
    """Below the models folder; of a partial file, what it was to become."""
    size_bytes: int
    paths: tuple[Path, ...]
    """None for a note in the ledger."""


def usage(library: Library) -> Usage:
    """Bytes per model, of partial downloads and saved KV states, and what the disk has left."""
    files = entries(library.root)
    models = library.models()
    ours = tuple(model for model in models if model.how not in (ADOPTED, BUILT_IN))
    unfinished = remains(files)
    counted = {path for model in ours for path in model.files} | {entry.path for left in unfinished for entry in left.files}
    disk = shutil.disk_usage(_existing(library.root))
    return Usage(
        models=ours,
        partial_bytes=sum(left.size_bytes for left in unfinished),
        other_bytes=sum(disk_bytes(entry.stat) for entry in files if entry.stat and entry.path not in counted),
        kv_states_bytes=sum(disk_bytes(entry.stat) for entry in entries(library.directories.kv_states) if entry.stat),
        adopted_bytes=sum(model.size_bytes for model in models if model.how == ADOPTED),
        disk_free_bytes=disk.free,
        disk_total_bytes=disk.total,
    )


def prunable(library: Library) -> list[Prunable]:
    """Remains of downloads that nobody works on, dead links, empty folders, and notes on files that are gone.

    Nothing behind a link to another folder: what lies there is not ours to delete.
    """
    root = os.path.realpath(library.root)
    files = [entry for entry in entries(library.root) if Path(os.path.realpath(entry.path.parent)).is_relative_to(root)]
    found: list[Prunable] = []
    for left in remains(files):
        # Without a lock file nobody works on it; and looking must not make one.
        locked = any(entry.path.name.endswith(".lock") for entry in left.files)
        with _alone(library.root / left.target) if locked else contextlib.nullcontext(True) as free:
            if free:
                what = "partial" if any(entry.path.name.endswith(".part") for entry in left.files) else "lock"
                found.append(Prunable(what, left.target, left.size_bytes, tuple(entry.path for entry in left.files)))
    found += [Prunable("dead link", entry.key, 0, (entry.path,)) for entry in files if not entry.stat]
    found += [
        Prunable("empty folder", folder.relative_to(library.root).as_posix(), 0, (folder,)) for folder in _empty_folders(library.root)
    ]
    return found + [Prunable("note", key, 0, ()) for key in sorted(_stale_keys(library, library.ledger_file.read()))]


def prune(library: Library, wanted: Iterable[Prunable]) -> int:
    """Delete these, but nothing that somebody took up again in the meantime. Returns the bytes freed."""
    freed = 0
    for item in wanted:
        target = library.root / item.name
        with _alone(target) if item.what in ("partial", "lock") else contextlib.nullcontext(True) as free:
            if not free:
                continue
            for path in item.paths:
                if item.what == "empty folder":
                    library.remove_empty_folders(path)
                elif not (os.name == "nt" and path.name.endswith(".lock")):
                    unlink(path)
            if item.what in ("partial", "lock") and os.name != "nt":
                unlink(_lock_path(target))
            freed += item.size_bytes
        if os.name == "nt":
            # Only here: Windows deletes no open file, and none that another process holds.
            with contextlib.suppress(OSError):
                _lock_path(target).unlink(missing_ok=True)
        library.remove_empty_folders(target.parent)
    if _stale_keys(library, library.ledger_file.read()):
        with library.ledger_file.edit() as ledger:
            ledger.forget(list(_stale_keys(library, ledger)))
    return freed


@contextlib.contextmanager
def _alone(target: Path) -> Generator[bool]:
    """Whether nobody downloads or imports `target`; while the block runs, nobody can begin to."""
    lock = FileLock(_lock_path(target), timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _lock_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


def _stale_keys(library: Library, ledger: Ledger) -> set[str]:
    keys = {*ledger.files, *ledger.facts, *ledger.origins}
    # Where the whole folder is away, a disk is not mounted, and its files will be back.
    return {key for key in keys if not (library.root / key).exists() and (library.root.is_dir() or Path(key).is_absolute())}


def _empty_folders(root: Path) -> list[Path]:
    return [Path(folder) for folder, folders, files in os.walk(root) if not folders and not files and Path(folder) != root]


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
