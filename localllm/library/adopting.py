"""Using other programs' model files where they are: which there are, which are twice on the disk, and taking them in by name."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localllm.errors import LocalLLMError, NotFound, UsageError
from localllm.gguf import read_model
from localllm.library.hashing import Progress, sha256_of
from localllm.library.library import Library, note_of
from localllm.library.model import ADOPTED, LocalModel
from localllm.library.names import ambiguous
from localllm.library.stores import Found, kept_in, stores


@dataclass(frozen=True, slots=True)
class Adoptable:
    """A model of another program, seen beside everything else on this machine."""

    found: Found
    adopted: bool
    copies: tuple[str, ...]
    """What else holds the same bytes in other files, as `Ollama ollama/llama3.2:3b`."""

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it; the keys stay."""
        return {
            "app": self.found.app,
            "name": self.found.name,
            "path": str(self.found.path),
            "files": [str(path) for path in self.found.files],
            "size_bytes": self.found.size_bytes,
            "sha256s": list(self.found.sha256s),
            "repo": self.found.repo,
            "commit": self.found.commit,
            "adopted": self.adopted,
            "copies": list(self.copies),
            "problem": self.found.problem,
        }


@dataclass(frozen=True, slots=True)
class _Copy:
    """One model's files, wherever they are."""

    label: str
    files: tuple[Path, ...]
    sha256s: tuple[str, ...]
    size_bytes: int


def find_others(folders: Sequence[Path] = (), env: Mapping[str, str] = os.environ) -> list[Found]:
    """The models of all known programs, or those in `folders`."""
    places = [(str(folder), folder.absolute()) for folder in folders] or stores(env)
    return [found for app, folder in places for found in kept_in(app, folder)]


def candidates(library: Library, found: Iterable[Found]) -> list[list[Path]]:
    """The files that must be hashed to know which of `found` and of the library are the same: those of equal size and unknown hash."""
    return [[path for path, sha256 in zip(copy.files, copy.sha256s, strict=True) if not sha256] for copy in _same_size(library, found)]


def adoptable(library: Library, found: Sequence[Found], progress: Progress | None = None) -> list[Adoptable]:
    """`found`, with which are adopted already and which lie on the disk several times.

    Hashes the `candidates`, and remembers their hashes until they change.
    """
    hashes: dict[str, tuple[str, ...]] = {}
    twins: defaultdict[tuple[str, ...], list[_Copy]] = defaultdict(list)
    for copy in _same_size(library, found):
        hashes[copy.label] = _hashes(library, copy, progress)
        twins[hashes[copy.label]].append(copy)
    adopted = {model.path for model in library.models() if model.how == ADOPTED}
    result: list[Adoptable] = []
    for item in found:
        label = _label(item)
        copies = [
            copy.label for copy in twins.get(hashes.get(label, ()), ()) if copy.label != label and not _same_file(copy.files, item.files)
        ]
        result.append(Adoptable(item, item.path in adopted, tuple(copies)))
    return result


def adopt(library: Library, found: Found) -> LocalModel:
    """Use `found` in place from now on. Raises LocalLLMError for one that cannot be, ModelError for one that is no model."""
    if found.problem:
        raise LocalLLMError(f"{found.name} of {found.app} cannot be adopted: {found.problem}", hint="see to it in that program")
    if found.path.is_relative_to(library.root):
        raise UsageError(f"{found.path} is in the models folder", hint="it needs no adopting: localllm list shows it")
    read_model(found.path)
    hashes = {path: sha256 for path, sha256 in zip(found.files, found.sha256s, strict=True) if sha256}
    return library.record(found.path, how=ADOPTED, sha256s=hashes, name=found.name, repo=found.repo, commit=found.commit)


def choose(found: Iterable[Found], name: str) -> Found:
    """The one that `name` means: its name, or its path. Raises NotFound."""
    wanted = name.casefold()
    fitting = [item for item in found if wanted in (item.name.casefold(), str(item.path).casefold())]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ambiguous(name, [str(item.path) for item in fitting])
    raise NotFound(f"no other program keeps a model named {name!r}", hint="localllm adopt lists them")


def _same_size(library: Library, found: Iterable[Found]) -> list[_Copy]:
    """Everything on this machine whose size something else shares."""
    copies = [_Copy(_label(item), item.files, item.sha256s, item.size_bytes) for item in found if not item.problem]
    known = {copy.files[0] for copy in copies}
    ledger = library.ledger_file.read()
    for model in library.models():
        if not model.problem and model.path not in known:
            copies.append(_Copy(f"localllm {model.name}", model.files, model.sha256s, model.size_bytes))
    sizes: defaultdict[int, list[_Copy]] = defaultdict(list)
    for copy in copies:
        notes = [ledger.files.get(library.key_of(path)) for path in copy.files]
        hashes = [
            sha256 or (note.sha256 if note and note.fits(path.stat()) else "")
            for sha256, note, path in zip(copy.sha256s, notes, copy.files, strict=True)
        ]
        sizes[copy.size_bytes].append(_Copy(copy.label, copy.files, tuple(hashes), copy.size_bytes))
    return [copy for group in sizes.values() if len(group) > 1 for copy in group]


def _hashes(library: Library, copy: _Copy, progress: Progress | None) -> tuple[str, ...]:
    """The hash of each file, computed where it is not known; a file that cannot be read equals no other."""
    hashes: list[str] = []
    for path, sha256 in zip(copy.files, copy.sha256s, strict=True):
        if not sha256:
            try:
                note = note_of(path, sha256_of(path, progress))
            except OSError:
                sha256 = str(path)
            else:
                sha256 = note.sha256
                with library.ledger_file.edit() as ledger:
                    ledger.files[library.key_of(path)] = note
        hashes.append(sha256)
    return tuple(hashes)


def _label(found: Found) -> str:
    return f"{found.app} {found.name}"


def _same_file(left: Sequence[Path], right: Sequence[Path]) -> bool:
    """Whether they are one file under two names, which takes its space once."""
    try:
        return len(left) == len(right) and all(os.path.samefile(a, b) for a, b in zip(left, right, strict=True))
    except OSError:
        return False
