"""Taking a model file from elsewhere into the models folder: copied, moved or linked. The header is read first."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from localllm.download.partial import check_space, disk_error
from localllm.errors import LocalLLMError, NotFound, UsageError
from localllm.gguf import Header, read_model
from localllm.library.hashing import CHUNK_BYTES, Progress
from localllm.library.library import Library
from localllm.library.model import IMPORTED, LocalModel
from localllm.library.scan import PART, stem_of
from localllm.quant import quant_of
from localllm.reference import check_repo, safe_parts

How = Literal["copy", "move", "link", "symlink"]
PUBLISHER = "local"
"""Publisher of what nobody gave a name to."""
_FICLONE = 0x40049409
"""Linux: let one file share another's blocks until either is written to (btrfs, XFS)."""


def import_file(library: Library, path: Path, how: How = "copy", repo: str = "", progress: Progress | None = None) -> LocalModel:
    """Bring the model at `path`, with all its parts, into the library as `repo`, by default named after the file.

    A copy shares blocks with the original where the file system can, so it takes no space until one of them changes.
    Raises NotFound, ModelError, UsageError (the name is taken or cannot be one), DoesNotFit.
    """
    if not os.path.isfile(path):
        raise NotFound(f"{path} is no file", hint="give the path of a .gguf file; of a split model, the first part")
    header = read_model(path)
    sources = header.files
    if repo:
        check_repo(repo)
    try:
        repo = repo or check_repo(default_repo(sources[0].name))
        targets = [library.root.joinpath(*safe_parts(repo, _filename(source.name, repo, header))) for source in sources]
    except UsageError as error:
        raise UsageError(error.message, hint="rename the file, then import it") from error
    for target in targets:
        if target.exists() or target.is_symlink():
            raise UsageError(
                f"{library.key_of(target)} is in the library already",
                hint="remove it with localllm rm, or give another --name publisher/repo",
            )
    if how in ("copy", "move"):
        needed = sum(source.stat().st_size for source in sources if how == "copy" or not _same_device(source, library.root))
        check_space(library.root, needed, f"importing {path.name}")
    hashes: dict[Path, str] = {}
    with contextlib.ExitStack() as undo:
        undo.callback(library.remove_empty_folders, targets[0].parent)
        for source, target in zip(sources, targets, strict=True):
            with _alone(target):
                if sha256 := _bring(source, target, how, progress):
                    hashes[target] = sha256
            # A move is not undone: the parts that are here are whole, and the rest is where it was.
            if how != "move":
                undo.callback(target.unlink, missing_ok=True)
        undo.pop_all()
    return library.record(targets[0], how=IMPORTED, sha256s=hashes)


def default_repo(filename: str) -> str:
    """`local/NAME` from a file's name, without what says its quantisation."""
    stem = stem_of(filename)
    if quant := quant_of(filename):
        stem = re.sub(rf"[-._]*{re.escape(quant)}$", "", stem, flags=re.IGNORECASE)
    name = re.sub(r"[^A-Za-z0-9._]+|--+|\.\.+", "-", stem).strip("-._")[:96].rstrip("-._")
    return f"{PUBLISHER}/{name or 'model'}"


def _filename(name: str, repo: str, header: Header) -> str:
    """The name in the library: its own, or where that is not a model's (`sha256-…`), one made of what it is."""
    return name if name.lower().endswith(".gguf") else f"{repo.partition('/')[2]}-{header.quant or 'model'}.gguf"


def _bring(source: Path, target: Path, how: How, progress: Progress | None) -> str:
    """One file, whole or not at all; returns its hash where copying gave it anyway."""
    part = target.with_name(target.name + PART)
    part.unlink(missing_ok=True)
    sha256 = ""
    try:
        if how == "move" and _same_device(source, target.parent):
            os.rename(source, target)
            return ""
        if how == "link":
            _link(source, part)
        elif how == "symlink":
            os.symlink(source.resolve(), part)
        elif not _clone(source, part):
            sha256 = _copy(source, part, progress)
        os.replace(part, target)
        if how == "move":
            source.unlink()
    except OSError as error:
        raise disk_error(part, error) from error
    finally:
        part.unlink(missing_ok=True)
    return sha256


def _link(source: Path, part: Path) -> None:
    try:
        os.link(source.resolve(), part)
    except OSError as error:
        raise UsageError(
            f"cannot make a hard link to {source}: {error.strerror}",
            hint="it must be on the models folder's disk; --symlink works across disks",
        ) from error


def _clone(source: Path, part: Path) -> bool:
    """Copy without copying, where the file system can."""
    try:
        if sys.platform == "linux":
            import fcntl

            with source.open("rb") as old, part.open("wb") as new:
                fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return True
        if sys.platform == "darwin":
            import ctypes

            clone = ctypes.CDLL(None, use_errno=True).clonefile
            return clone(os.fsencode(source), os.fsencode(part), 0) == 0
    except (OSError, AttributeError):
        part.unlink(missing_ok=True)
    return False


def _copy(source: Path, part: Path, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with source.open("rb", buffering=0) as old, part.open("wb", buffering=0) as new:
        while count := old.readinto(buffer):
            digest.update(buffer[:count])
            written = 0
            while written < count:
                written += new.write(buffer[written:count])
            if progress:
                progress(count)
        os.fsync(new.fileno())
    return digest.hexdigest()


def _same_device(source: Path, folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return source.stat().st_dev == folder.stat().st_dev


@contextlib.contextmanager
def _alone(target: Path) -> Generator[None]:
    """Keep downloads, imports and `prune` off `target` while the block runs."""
    lock = target.with_name(f"{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                if os.name != "nt":
                    lock.unlink(missing_ok=True)
    except Timeout as error:
        raise LocalLLMError(f"another localllm is fetching {target.name}", hint="try again when it is done") from error
    except OSError as error:
        raise disk_error(target, error) from error
