"""`library.json`: what a model file cannot say itself. Its hash, where it came from, the names people gave it.

The files on disk are the truth: a note about a file that is gone or has changed counts for nothing, and a lost ledger costs a
re-hash and the aliases. Knows no models, only the notes under their keys.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock, Timeout

from localllm.errors import LocalLLMError
from localllm.files import write_atomic

SCHEMA = 1
LOCK_TIMEOUT_S = 20.0
_TYPES: dict[str, type] = {"int": int, "str": str, "bool": bool}
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileNote:
    """The hash of a file's content, as of a size and a time of change."""

    sha256: str
    size_bytes: int
    mtime_ns: int

    def fits(self, stat: os.stat_result) -> bool:
        """Whether the file looks untouched since."""
        return (self.size_bytes, self.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the header said, so that a list reads no headers; `stamp` says of which state of the files."""

    stamp: str
    architecture: str = ""
    quant: str = ""
    n_params: int = 0
    n_ctx_train: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """How a model came here."""

    how: str
    added: str
    """ISO 8601, UTC."""
    name: str = ""
    """Its name, where the path does not give one (adopted models)."""
    repo: str = ""
    revision: str = ""
    """What was asked for, as `main`."""
    commit: str = ""
    catalog_name: str = ""
    """The catalogue's name it was pulled by, as `llama3.3:70b`."""


@dataclass(slots=True)
class Ledger:
    """A working copy. Keys are paths: relative to the models folder with `/`, absolute where the file lies elsewhere."""

    files: dict[str, FileNote] = field(default_factory=dict[str, FileNote])
    facts: dict[str, Facts] = field(default_factory=dict[str, Facts])
    """Keyed by a model's first file, as `origins`."""
    origins: dict[str, Origin] = field(default_factory=dict[str, Origin])
    aliases: dict[str, str] = field(default_factory=dict[str, str])

    def forget(self, keys: Iterable[str]) -> None:
        """Drop every note on these keys."""
        for key in keys:
            for notes in (self.files, self.facts, self.origins):
                notes.pop(key, None)


class LedgerFile:
    """The ledger on disk, safe against other processes and against being cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Ledger:
        """What is noted; an empty ledger, with a warning, where the file is broken or of another schema."""
        return self._load()[0]

    @contextlib.contextmanager
    def edit(self) -> Generator[Ledger]:
        """A copy to change, written when the block ends without an error. Raises LocalLLMError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=LOCK_TIMEOUT_S):
                ledger, readable = self._load()
                yield ledger
                if not readable:
                    # Another version's, or damaged: it may still be of use to somebody.
                    aside = _free_name(f"{self.path}.bak")
                    os.replace(self.path, aside)
                    _log.warning("%s is set aside as %s", self.path, aside)
                write_atomic(self.path, json.dumps(_encode(ledger), indent=1).encode())
        except Timeout as error:
            raise LocalLLMError(f"{self.path} is locked by another localllm", hint="try again when that one is done") from error
        except OSError as error:
            raise LocalLLMError(
                f"cannot write {self.path}: {error.strerror or error}", hint="check the disk and its permissions"
            ) from error

    def remember(self, facts: dict[str, Facts]) -> None:
        """Keep what headers said, if that is possible now: it is only a cache, no reason to set aside a ledger that cannot be read."""
        if self._load()[1]:
            with contextlib.suppress(LocalLLMError), self.edit() as ledger:
                ledger.facts.update(facts)

    def _load(self) -> tuple[Ledger, bool]:
        """The ledger, and whether the file may be replaced without a loss."""
        try:
            data = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return Ledger(), True
        except (OSError, ValueError, RecursionError) as error:
            _log.warning("%s cannot be read and is ignored: %s", self.path, error)
            return Ledger(), False
        if not isinstance(data, dict) or cast(dict[str, Any], data).get("schema") != SCHEMA:
            _log.warning("%s is of another version of localllm and is ignored", self.path)
            return Ledger(), False
        return _decode(cast(dict[str, Any], data)), True


def _free_name(path: str) -> str:
    """`path`, or the first of `path.2`, `path.3`, … that nothing has."""
    return next(name for n in itertools.count(1) if not os.path.lexists(name := path if n == 1 else f"{path}.{n}"))


def _encode(ledger: Ledger) -> dict[str, Any]:
    return {"schema": SCHEMA, **asdict(ledger)}


def _decode(data: dict[str, Any]) -> Ledger:
    aliases = cast(dict[str, Any], data.get("aliases")) if isinstance(data.get("aliases"), dict) else {}
    return Ledger(
        files=_notes(FileNote, data.get("files")),
        facts=_notes(Facts, data.get("facts")),
        origins=_notes(Origin, data.get("origins")),
        aliases={name: target for name, target in aliases.items() if isinstance(target, str)},
    )


def _notes(kind: type[T], data: Any) -> dict[str, T]:
    """The notes of one kind; one that a hand has spoilt is left out."""
    notes: dict[str, T] = {}
    types = {f.name: _TYPES[cast(str, f.type)] for f in fields(cast(Any, kind))}
    for key, value in cast(dict[str, Any], data).items() if isinstance(data, dict) else ():
        if isinstance(value, dict):
            known = {name: item for name, item in cast(dict[str, Any], value).items() if name in types}
            with contextlib.suppress(TypeError):
                if all(type(item) is types[name] for name, item in known.items()):
                    notes[key] = kind(**known)
    return notes
