"""What lies in a folder of models: whole models, and what interrupted work left behind. Reads names and sizes, no content."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 8
PART = ".part"
"""Suffix of a download or import under way; `.part.json` holds the state of one, `.lock` the lock of who works on it."""
_REMAINS = re.compile(r"(.+\.gguf)(?:\.part|\.part\.json|\.lock)|\.(.+\.gguf)\.part\.json\.[^.]+\.tmp", re.IGNORECASE | re.DOTALL)
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE | re.DOTALL)
_SIDE = re.compile(r"(?:^|[._-])(?:mmproj|imatrix)(?:[._-]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file below the folder."""

    path: Path
    key: str
    """Its path relative to the folder, with `/`."""
    stat: os.stat_result | None
    """None: a link to nothing."""


@dataclass(frozen=True, slots=True)
class Group:
    """The files of one model, in order."""

    files: tuple[Entry, ...]
    n_missing: int = 0
    """Parts of a split model that are not there."""

    @property
    def key(self) -> str:
        return self.files[0].key

    @property
    def size_bytes(self) -> int:
        return sum(file.stat.st_size for file in self.files if file.stat)

    @property
    def stamp(self) -> str:
        """Changes when a file does."""
        return ",".join(f"{f.stat.st_size}:{f.stat.st_mtime_ns}" if f.stat else "-" for f in self.files)

    @property
    def is_side_file(self) -> bool:
        """A vision projector or an importance matrix: goes with a model, is none."""
        return bool(_SIDE.search(self.files[0].path.name))


@dataclass(frozen=True, slots=True)
class Remains:
    """What an interrupted download or import left: a partial file, its state, its lock."""

    target: str
    """Key of the file that it was to become."""
    files: tuple[Entry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(disk_bytes(file.stat) for file in self.files if file.stat)


def entries(root: Path) -> list[Entry]:
    """Every file below `root`, sorted; links are followed, a folder met twice is not entered again. No folder: no files."""
    return sorted(_walk(root, "", set()), key=lambda entry: entry.key)


def groups(files: Iterable[Entry]) -> list[Group]:
    """The models among `files`; hidden files are none."""
    found: dict[tuple[str, ...], dict[int, Entry]] = {}
    for entry in files:
        name = entry.path.name
        if name.startswith(".") or not name.lower().endswith(".gguf"):
            continue
        folder = entry.key.removesuffix(name)
        if match := _SPLIT.fullmatch(name):
            found.setdefault((folder, match["stem"], match["total"]), {})[int(match["number"])] = entry
        else:
            found[folder, name] = {1: entry}
    return [
        Group(tuple(parts[number] for number in sorted(parts)), (int(key[2]) if len(key) == 3 else 1) - len(parts))
        for key, parts in found.items()
    ]


def group_of(path: Path, key: str) -> Group:
    """The model whose first file is `path`, with the parts beside it."""
    match = _SPLIT.fullmatch(path.name)
    if not match:
        return Group((Entry(path, key, _stat(path)),))
    total = int(match["total"])
    paths = [path.with_name(f"{match['stem']}-{n:05}-of-{match['total']}{match['suffix']}") for n in range(1, min(total, 1000) + 1)]
    parts = [Entry(part, str(part), status) for part in paths if (status := _stat(part))]
    return Group(tuple(parts) or (Entry(path, key, None),), total - len(parts))


def remains(files: Iterable[Entry]) -> list[Remains]:
    """What interrupted work left, by the file it was to become."""
    found: dict[str, list[Entry]] = {}
    for entry in files:
        name = entry.path.name
        if match := _REMAINS.fullmatch(name):
            found.setdefault(entry.key.removesuffix(name) + (match[1] or match[2]), []).append(entry)
    return [Remains(target, tuple(left)) for target, left in found.items()]


def stem_of(filename: str) -> str:
    """The file's name without `.gguf` and the number of its part."""
    match = _SPLIT.fullmatch(filename)
    return match["stem"] if match else re.sub(r"\.gguf$", "", filename, flags=re.IGNORECASE)


def disk_bytes(status: os.stat_result) -> int:
    """What a file takes on disk: a partial file may be sparse."""
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else min(status.st_size, blocks * 512)


def _walk(folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[Entry]:
    status = _stat(folder)
    if not status or (status.st_dev, status.st_ino) in seen or prefix.count("/") > MAX_DEPTH:
        return
    seen.add((status.st_dev, status.st_ino))
    try:
        children = sorted(os.listdir(folder))
    except OSError:
        return
    for child in children:
        path = folder / child
        status = _stat(path)
        if status and stat.S_ISDIR(status.st_mode):
            yield from _walk(path, f"{prefix}{child}/", seen)
        elif not status or stat.S_ISREG(status.st_mode):
            yield Entry(path, prefix + child, status)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
