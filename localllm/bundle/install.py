"""Models from a bundle into the library: assembled from their chunks, checked, then known by name.

Nothing is written before the whole bundle was looked at, and no model has its name before its hash was right.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from localllm.bundle.manifest import BundledModel, ModelFile, Piece, Refused
from localllm.bundle.verify import BUFFER_BYTES, Bundle, blocks, hash_problems, no_progress
from localllm.download.partial import Partial, check_space, disk_error
from localllm.errors import DoesNotFit, LocalLLMError, NotFound, UsageError, VerificationFailed
from localllm.files import write_atomic
from localllm.gguf import read_header
from localllm.library.hashing import sha256_of
from localllm.library.library import Library
from localllm.library.model import IMPORTED, LocalModel
from localllm.reference import safe_parts

if TYPE_CHECKING:
    from _hashlib import HASH

    from localllm.bundle.verify import OnProgress

KINDS: dict[int, type[LocalLLMError]] = {2: UsageError, 3: NotFound, 4: DoesNotFit, 6: VerificationFailed}
"""The stick's programs have no error classes of ours, but their exit codes."""


@dataclass(frozen=True, slots=True)
class Step:
    """One file to put in place; `there` when the right one is."""

    model: BundledModel
    file: ModelFile
    target: Path
    there: bool


@contextlib.contextmanager
def explained() -> Generator[None]:
    """Turn what the stick's programs refuse into our errors."""
    try:
        yield
    except Refused as refused:
        raise KINDS.get(refused.exit_code, LocalLLMError)("; ".join(refused.problems), hint=refused.hint) from refused


def plan(bundle: Bundle, library: Library) -> list[Step]:
    """What installing would do; writes nothing. Raises UsageError where another file has the place, DoesNotFit."""
    steps: list[Step] = []
    for model in bundle.manifest.models:
        for file in model.files:
            parts = file.path.split("/")
            target = library.root.joinpath(*safe_parts("/".join(parts[:2]), "/".join(parts[2:])))
            steps.append(Step(model, file, target, _is_there(target, file)))
    missing = [step for step in steps if not step.there]
    check_space(library.root, sum(step.file.size_bytes - _partly_there(step.target) for step in missing), "installing the bundle's models")
    return steps


def install_models(bundle: Bundle, library: Library, steps: list[Step], on_progress: OnProgress = no_progress) -> list[LocalModel]:
    """Follow a plan; what an interrupted run did is not done again. Raises LocalLLMError."""
    total = sum(step.file.size_bytes for step in steps if not step.there)
    done = 0
    for step in steps:
        if not step.there:
            with _explained(step.target):
                assemble(bundle, step.file, step.target, partial(_report, on_progress, step.file.path, done, total))
            done += step.file.size_bytes
    return [_record(library, model, [step for step in steps if step.model is model]) for model in bundle.manifest.models]


def _report(on_progress: OnProgress, what: str, before: int, total: int, count: int) -> None:
    on_progress(what, before + count, total)


def assemble(bundle: Bundle, file: ModelFile, target: Path, on_bytes: Callable[[int], object]) -> None:
    """Put one model file in place through `<target>.part`, whose right chunks are kept. Raises LocalLLMError or OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Partial(target)
    with _alone(target):
        # A download of the same file may have left both; its bytes are as good as any, its record is not true any more.
        unfinished.record.unlink(missing_ok=True)
        if unfinished.data.is_symlink():
            unfinished.data.unlink()
        whole = hashlib.sha256()
        start = 0
        with open(os.open(unfinished.data, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as sink:
            for chunk in file.chunks:
                whole = _kept(sink, start, chunk, whole) or _copied(bundle, chunk, sink, start, whole)
                start += chunk.size_bytes
                on_bytes(start)
            sink.truncate(start)
            sink.flush()
            os.fsync(sink.fileno())
        if whole.hexdigest() != file.sha256:
            unfinished.discard()
            raise VerificationFailed(f"{file.path} is not the file that was bundled", hint="copy or make the bundle again")
        try:
            read_header(unfinished.data)
        except LocalLLMError:
            unfinished.discard()
            raise
        os.replace(unfinished.data, target)


def install_config(bundle: Bundle, config_file: Path) -> bool:
    """Take over the bundle's settings where this user has none; whether that was so. Raises VerificationFailed."""
    piece = next((piece for piece in bundle.manifest.others if piece.file == "config.toml"), None)
    if piece is None or config_file.exists():
        return False
    data = b"".join(bytes(block) for block in blocks(bundle.root, piece))
    if hashlib.sha256(data).hexdigest() != piece.sha256:
        raise VerificationFailed("config.toml of the bundle is damaged", hint="copy or make the bundle again")
    write_atomic(config_file, data)
    return True


def _is_there(target: Path, file: ModelFile) -> bool:
    if not os.path.lexists(target):
        return False
    if target.is_file() and target.stat().st_size == file.size_bytes and sha256_of(target) == file.sha256:
        return True
    raise UsageError(f"{target} is there already, and is another file", hint="remove it first: localllm rm")


def _partly_there(target: Path) -> int:
    return Partial(target).allocated_bytes()


def _kept(sink: io.BufferedRandom, start: int, chunk: Piece, before: HASH) -> HASH | None:
    """The whole file's hash after a chunk that is in the file already; None where it is not."""
    digest, whole = hashlib.sha256(), before.copy()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    left = chunk.size_bytes
    sink.seek(start)
    while left and (count := sink.readinto(buffer[: min(left, BUFFER_BYTES)])):
        digest.update(buffer[:count])
        whole.update(buffer[:count])
        left -= count
    return whole if digest.hexdigest() == chunk.sha256 else None


def _copied(bundle: Bundle, chunk: Piece, sink: io.BufferedRandom, start: int, before: HASH) -> HASH:
    """The same, after copying the chunk from the bundle. Raises VerificationFailed: the bytes that count are those copied."""
    whole = before.copy()

    def take(block: memoryview) -> None:
        sink.write(block)
        whole.update(block)

    sink.seek(start)
    if problems := hash_problems(bundle.root, chunk, take):
        raise VerificationFailed(problems[0], hint="copy the bundle again, or make it again: localllm bundle create")
    return whole


def _record(library: Library, model: BundledModel, steps: list[Step]) -> LocalModel:
    sha256s = {step.target: step.file.sha256 for step in steps}
    return library.record(steps[0].target, how=IMPORTED, sha256s=sha256s, repo=model.repo, commit=model.commit)


@contextlib.contextmanager
def _alone(target: Path) -> Generator[None]:
    """Hold the lock that downloads and imports of the same file hold; it goes when the file is whole."""
    lock = Path(f"{target}.lock")
    try:
        with FileLock(lock, timeout=0):
            yield
            if os.name != "nt":
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise UsageError(f"another localllm is writing {target}", hint="wait until it is done, then try again") from error


@contextlib.contextmanager
def _explained(target: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(target, error) from error
