"""Writing a bundle: plain files on a stick, the manifest last. Interrupted, it goes on where it was.

Knows files and their hashes; which models those are, and how wheels come about, others know.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from localllm import __version__
from localllm.bundle import manifest as form
from localllm.bundle.manifest import MANIFEST, SIGNATURE, UNFINISHED, BundledModel, Manifest, ModelFile, Piece
from localllm.bundle.sign import signature_file
from localllm.bundle.sources import Source, SourceFile
from localllm.bundle.stick import STICK_PACKAGE, Contents, small_files
from localllm.bundle.verify import BUFFER_BYTES, no_progress
from localllm.download.partial import check_space, disk_error
from localllm.errors import UsageError, VerificationFailed

if TYPE_CHECKING:
    from _hashlib import HASH

    from localllm.bundle.verify import OnProgress

CHUNK_BYTES = 2 << 30
"""Far from FAT32's 4 GiB, and little to copy again."""
_LITTER = ("system volume information", "$recycle.bin", "lost+found", "found.000", "desktop.ini", "thumbs.db")
"""What systems leave on a stick by themselves."""


def create(
    out: Path,
    contents: Contents,
    *,
    key: Path | None = None,
    force: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    on_progress: OnProgress = no_progress,
) -> Manifest:
    """Write the bundle into the folder `out`; chunks that are there and right stay. Raises LocalLLMError.

    Without its manifest a bundle is refused everywhere, and the manifest is written when all else is on the disk.
    """
    check(out, contents.sources, key=key, force=force, chunk_bytes=chunk_bytes)
    check_space(out, _missing_bytes(out, contents, chunk_bytes), f"the bundle in {out}")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    with _explained(out):
        out.mkdir(parents=True, exist_ok=True)
        _write(out / UNFINISHED, b"This bundle is not finished. Run the same localllm bundle create again.\n")
        for name in (MANIFEST, SIGNATURE):
            (out / name).unlink(missing_ok=True)
        total = sum(file.size_bytes for source in contents.sources for file in source.files)
        progress = _Progress(on_progress, total)
        models = tuple(_model(out, source, chunk_bytes, progress) for source in contents.sources)
        wheels = tuple(_copy(wheel, out, f"wheels/{wheel.name}") for wheel in contents.wheels)
        texts = small_files(contents, created)
        others = tuple(_text(out, name, data) for name, data in sorted(texts.items()))
        manifest = Manifest(f"localllm {__version__}", created, contents.platform, models, wheels, others)
        data = manifest.to_bytes()
        form.parse(data)  # what we write, we would accept
        _remove_strays(out, manifest)
        if key:
            _write(out / SIGNATURE, signature_file(data, key))
        _write(out / MANIFEST, data)
        (out / UNFINISHED).unlink()
    return manifest


def check(out: Path, sources: Sequence[Source], *, key: Path | None, force: bool, chunk_bytes: int) -> None:
    """Raise what `create` would raise of itself, before minutes of compiling or an hour of copying."""
    if not 0 < chunk_bytes <= form.MAX_CHUNK_BYTES:
        raise UsageError(f"a chunk cannot have {chunk_bytes:,} bytes", hint=f"at most {form.MAX_CHUNK_BYTES:,}, FAT32's limit")
    for file in (file for source in sources for file in source.files):
        if reason := form.unsafe(file.target):
            raise UsageError(f"{file.target!r} cannot be carried: it {reason}", hint="import it under another name")
    _check_folder(out, force)
    if not force and (lost := sorted(_models_on(out) - {source.name for source in sources})):
        raise UsageError(
            f"{out} holds a bundle with {', '.join(lost[:4])}, which a new one would drop",
            hint=f"carry it too (--model {lost[0]}), give another folder, or --force",
        )
    if key:
        signature_file(b"", key)


class _Progress:
    def __init__(self, report: OnProgress, total_bytes: int) -> None:
        self.report, self.total_bytes, self.done_bytes = report, total_bytes, 0

    def add(self, what: str, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        self.report(what, self.done_bytes, self.total_bytes)


def _check_folder(out: Path, force: bool) -> None:
    """Raises UsageError unless `out` is new, empty, or a bundle (finished or not)."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder", hint="give a folder, such as one on the stick")
    names = [name for name in os.listdir(out) if not name.startswith(".") and name.lower() not in _LITTER]
    if names and not force and not _is_bundle(out):
        raise UsageError(f"{out} is not empty, and no bundle", hint=f"give a folder of its own, such as {out / 'localllm'}, or --force")
    for name in ("weights", "wheels", "licences", STICK_PACKAGE):
        if (out / name).is_symlink():
            raise UsageError(f"{out / name} is a link", hint="a bundle holds none: remove it")


def _is_bundle(out: Path) -> bool:
    if (out / UNFINISHED).is_file():
        return True
    # Others write a manifest.json, too.
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        return str(json.loads((out / MANIFEST).read_bytes())["created_by"]).startswith("localllm")
    return False


def _models_on(out: Path) -> set[str]:
    """The names of the models that a finished bundle in `out` holds."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        return {str(model["name"]) for model in json.loads((out / MANIFEST).read_bytes())["models"]}
    return set()


def _missing_bytes(out: Path, contents: Contents, chunk_bytes: int) -> int:
    """What is still to be written, going by sizes."""
    wanted = [(f"wheels/{wheel.name}", wheel.stat().st_size) for wheel in contents.wheels]
    for file in (file for source in contents.sources for file in source.files):
        wanted += [(name, size) for name, _, size in _cuts(file, chunk_bytes)]
    total = 10_000_000  # manifest, licences and programs
    for name, size in wanted:
        with contextlib.suppress(OSError):
            if (out / name).stat().st_size == size:
                continue
        total += size
    return total


def _cuts(file: SourceFile, chunk_bytes: int) -> Iterator[tuple[str, int, int]]:
    """Name on the stick, start and size of each chunk. The name holds for a target, whatever else is in the bundle."""
    base = re.sub(r"[^A-Za-z0-9._-]", "_", file.target.rpartition("/")[2])[:80].strip("._") or "model"
    tag = hashlib.sha256(f"{file.target}\n{chunk_bytes}".encode()).hexdigest()[:8]
    for number, start in enumerate(range(0, file.size_bytes, chunk_bytes)):
        yield f"weights/{base}-{tag}.{number:03d}", start, min(chunk_bytes, file.size_bytes - start)


def _model(out: Path, source: Source, chunk_bytes: int, progress: _Progress) -> BundledModel:
    files = tuple(_model_file(out, file, chunk_bytes, progress) for file in source.files)
    return BundledModel(source.name, source.repo, source.commit, source.licence, files)


def _model_file(out: Path, file: SourceFile, chunk_bytes: int, progress: _Progress) -> ModelFile:
    whole = hashlib.sha256()
    chunks = tuple(_chunk(out, file, name, start, size, whole, progress) for name, start, size in _cuts(file, chunk_bytes))
    sha256 = whole.hexdigest()
    if file.sha256 and file.sha256 != sha256:
        raise VerificationFailed(
            f"{file.path} is damaged: its sha256 is not the one it was recorded with", hint="localllm verify; pull it again"
        )
    return ModelFile(file.target, file.size_bytes, sha256, chunks)


def _chunk(out: Path, file: SourceFile, name: str, start: int, size: int, whole: HASH, progress: _Progress) -> Piece:
    """One chunk on the stick. One of the right size may be there from an earlier run: then the source is hashed first."""
    target = out / name
    before = whole.copy()
    digest = hashlib.sha256()
    there = _sha256_of(target, size)
    with contextlib.ExitStack() as stack:
        sink = None if there else stack.enter_context(_new(target))
        for block in _region(file, start, size):
            digest.update(block)
            whole.update(block)
            if sink:
                sink.write(block)
            progress.add(name, len(block))
    piece = Piece(name, size, digest.hexdigest())
    if there and there != piece.sha256:
        target.unlink()
        progress.done_bytes -= size
        again = _chunk(out, file, name, start, size, before, progress)
        if again != piece:
            raise VerificationFailed(f"{file.path} changed while it was read", hint="let nothing write to it, then try again")
    return piece


def _region(file: SourceFile, start: int, size: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(BUFFER_BYTES, size)))
    with file.path.open("rb", buffering=0) as source:
        source.seek(start)
        while size:
            count = source.readinto(buffer[: min(size, len(buffer))])
            if not count:
                raise VerificationFailed(f"{file.path} became shorter while it was read", hint="let nothing write to it, then try again")
            size -= count
            yield buffer[:count]


def _sha256_of(path: Path, size_bytes: int) -> str:
    """The hash of a plain file of that size, empty where there is none."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size != size_bytes:
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: Path, out: Path, name: str) -> Piece:
    size = source.stat().st_size
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if _sha256_of(out / name, size) != sha256:
        with source.open("rb") as file, _new(out / name) as sink:
            shutil.copyfileobj(file, sink, BUFFER_BYTES)
    return Piece(name, size, sha256)


def _text(out: Path, name: str, data: bytes) -> Piece:
    _write(out / name, data)
    return Piece(name, len(data), hashlib.sha256(data).hexdigest())


def _write(path: Path, data: bytes) -> None:
    with _new(path) as sink:
        sink.write(data)


@contextlib.contextmanager
def _new(path: Path) -> Generator[io.BufferedWriter]:
    """A file that appears under its name when it is whole and on the disk: sticks are pulled out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("xb") as sink:
        yield sink
        sink.flush()
        os.fsync(sink.fileno())
    unfinished.replace(path)


def _remove_strays(out: Path, manifest: Manifest) -> None:
    """Delete what an earlier bundle left: only names that we give, for a stick may hold other things."""
    listed = {form.folded(piece.file) for piece in manifest.pieces}
    for pattern in ("weights/*-????????.[0-9][0-9][0-9]", "weights/*.part", "wheels/*.whl", "wheels/*.part", f"{STICK_PACKAGE}/*.py"):
        for path in out.glob(pattern):
            if form.folded(path.relative_to(out).as_posix()) not in listed:
                path.unlink()


@contextlib.contextmanager
def _explained(out: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(Path(error.filename or out), error) from error
