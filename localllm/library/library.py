"""The models of this machine: the files below `models/`, those adopted in place elsewhere, and the two built in.

The files are the truth; the ledger adds what they cannot say. Nothing here touches the network, and only `verify` reads weights.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from localllm.demo import demo_models
from localllm.errors import LocalLLMError, ModelError, NotFound, UsageError
from localllm.library.hashing import Progress, sha256_of
from localllm.library.ledger import Facts, FileNote, Ledger, LedgerFile, Origin
from localllm.library.model import ADOPTED, BUILT_IN, FOUND, LocalModel, unique_names
from localllm.library.names import one_of
from localllm.library.scan import Group, entries, group_of, groups
from localllm.paths import Directories, directories
from localllm.quant import quant_of
from localllm.reference import NameReference, PathReference, parse


@dataclass(frozen=True, slots=True)
class Removed:
    """What removing a model did."""

    name: str
    freed_bytes: int
    """0 for what was only forgotten, and for files that another name still holds."""
    deleted: tuple[Path, ...]
    forgotten: tuple[Path, ...]
    """Adopted files: they stay, the library no longer shows them."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One file's verification."""

    model: str
    path: Path
    state: str
    """`ok`, `recorded` (no hash was known; it is now), `mismatch` or `unreadable`."""
    expected: str
    sha256: str = ""
    detail: str = ""
    """Why it is unreadable."""


class Library:
    """The library of one user; every method reads the disk anew."""

    def __init__(self, dirs: Directories | None = None) -> None:
        """That of these directories, or of the user who runs this, whose setting `models_dir` counts."""
        self.directories = dirs or directories()
        self.root = self.directories.models if dirs else _models_folder(self.directories)
        self.ledger_file = LedgerFile(self.directories.data / "library.json")

    def models(self) -> list[LocalModel]:
        """All models, sorted by name. Headers are read only of files that are new or changed; a broken file has its `problem`."""
        ledger = self.ledger_file.read()
        found = [(group, ledger.origins.get(group.key)) for group in groups(entries(self.root))]
        # One below the models folder is there already, by whatever way that became so.
        found += [
            (group_of(Path(key), key), origin) for key, origin in ledger.origins.items() if origin.how == ADOPTED and self._outside(key)
        ]
        for name, path in demo_models().items():
            if name != "demo":  # the same file as demo-large
                found.append((group_of(path, str(path)), Origin(BUILT_IN, "", name=name)))
        read: dict[str, Facts] = {}
        models: list[LocalModel] = []
        for group, origin in found:
            facts = ledger.facts.get(group.key)
            if facts is None or facts.stamp != group.stamp:
                facts = read[group.key] = _facts(group)
            models.append(_model(group, origin, facts, ledger))
        if read:
            self.ledger_file.remember(read)
        return unique_names(models)

    def find(self, name: str) -> LocalModel:
        """The one model that `name` means; raises NotFound, listing candidates when there are several."""
        ledger = self.ledger_file.read()
        name = _follow(name, ledger.aliases)
        return one_of(self.models(), "demo-large" if name == "demo" else name, self.directories.catalog_file, ledger.aliases)

    def describe(self, path: Path) -> LocalModel:
        """The model in a file that is not in the library, as if it were."""
        group = group_of(path.absolute(), str(path.absolute()))
        return _model(group, Origin(FOUND, _changed_at(group), name=str(path)), _facts(group), self.ledger_file.read())

    def record(
        self,
        path: Path,
        *,
        how: str,
        sha256s: Mapping[Path, str] | None = None,
        name: str = "",
        repo: str = "",
        revision: str = "",
        commit: str = "",
        catalog_name: str = "",
    ) -> LocalModel:
        """Note how the model whose first file is `path` came here, and the hashes of its files where they are known."""
        key = self.key_of(path)
        added = datetime.now(UTC).isoformat(timespec="seconds")
        notes = {self.key_of(file): note_of(file, sha256) for file, sha256 in (sha256s or {}).items()}
        with self.ledger_file.edit() as ledger:
            ledger.origins[key] = Origin(how, added, name, repo, revision, commit, catalog_name)
            ledger.files.update(notes)
        # A folder that is in the library by two names is listed under one of them.
        return next((model for model in self.models() if model.key == key), None) or self.describe(path)

    def remove(self, model: LocalModel) -> Removed:
        """Delete the model's files; an adopted one is forgotten and its files stay. Raises UsageError for a built-in one."""
        if model.how == BUILT_IN:
            raise UsageError(f"{model.name} is built in", hint="it goes with the package: pip uninstall localllm")
        freed = 0
        deleted: list[Path] = []
        if model.how != ADOPTED:
            for file in model.files:
                freed += _freed_bytes(file)
                unlink(file)
                deleted.append(file)
            self.remove_empty_folders(model.path.parent)
        with self.ledger_file.edit() as ledger:
            ledger.forget([self.key_of(file) for file in model.files] + [model.key])
        return Removed(model.name, freed, tuple(deleted), () if deleted else model.files)

    def verify(self, model: LocalModel, progress: Progress | None = None) -> list[Checked]:
        """Hash the model's files again; one whose hash nobody knew gets it recorded."""
        ledger = self.ledger_file.read()
        checked: list[Checked] = []
        for file in model.files:
            known = ledger.files.get(self.key_of(file))
            expected = known.sha256 if known else ""
            try:
                note = note_of(file, sha256_of(file, progress))
            except OSError as error:
                checked.append(Checked(model.name, file, "unreadable", expected, detail=error.strerror or str(error)))
                continue
            state = "recorded" if not expected else "ok" if note.sha256 == expected else "mismatch"
            if state != "mismatch" and note != known:
                with self.ledger_file.edit() as changed:
                    changed.files[self.key_of(file)] = note
            checked.append(Checked(model.name, file, state, expected, note.sha256))
        return checked

    def aliases(self) -> dict[str, str]:
        """Alias -> what it stands for."""
        return dict(sorted(self.ledger_file.read().aliases.items()))

    def set_alias(self, alias: str, target: str) -> None:
        """Let `alias` stand for `target`, which need not be here yet. Raises UsageError."""
        if not isinstance(parse(alias), NameReference):
            raise UsageError(f"{alias!r} cannot be an alias", hint="use letters, digits and . _ - between them, and no slash")
        if alias in demo_models():
            raise UsageError(f"{alias} is a built-in model", hint="choose another name")
        reference = parse(target)
        if isinstance(reference, PathReference):
            target = str(reference.path.absolute())
        with self.ledger_file.edit() as ledger:
            ledger.aliases[alias] = target
            if _follow(alias, ledger.aliases) == alias:
                raise UsageError(f"{alias} would stand for itself", hint="localllm alias shows what each stands for")

    def remove_alias(self, alias: str) -> None:
        """Raises NotFound."""
        with self.ledger_file.edit() as ledger:
            if ledger.aliases.pop(alias, None) is None:
                raise NotFound(f"no alias is called {alias!r}", hint="localllm alias lists them")

    def expand(self, name: str) -> str:
        """What `name` stands for if it is an alias, else itself."""
        return _follow(name, self.ledger_file.read().aliases)

    def key_of(self, path: Path) -> str:
        """The ledger's key of a file: relative to the models folder, or its absolute path."""
        path = path.absolute()
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def _outside(self, key: str) -> bool:
        return os.path.isabs(key) and not Path(key).is_relative_to(self.root)

    def remove_empty_folders(self, folder: Path) -> None:
        """Remove `folder` and those above it, as far as they are empty and below the models folder."""
        while folder != self.root and folder.is_relative_to(self.root):
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


def _models_folder(dirs: Directories) -> Path:
    from localllm.settings import load_settings

    chosen = load_settings().models_dir
    return Path(chosen).expanduser().absolute() if chosen else dirs.models


def note_of(path: Path, sha256: str) -> FileNote:
    """`sha256` as the hash of the file in its present state. Raises OSError."""
    status = path.stat()
    return FileNote(sha256, status.st_size, status.st_mtime_ns)


def _facts(group: Group) -> Facts:
    from localllm.gguf import read_model

    if group.files[0].stat is None:
        return Facts(group.stamp, problem="the file is gone")
    if group.n_missing:
        return Facts(group.stamp, problem=f"{group.n_missing} of its {len(group.files) + group.n_missing} parts are missing")
    try:
        header = read_model(group.files[0].path)
    except ModelError as error:
        return Facts(group.stamp, problem=error.message)
    return Facts(group.stamp, header.architecture, header.quant, header.n_params, header.n_ctx_train)


def _model(group: Group, origin: Origin | None, facts: Facts, ledger: Ledger) -> LocalModel:
    publisher, repo, inside, *_ = [*group.key.split("/", 2), "", ""]
    # In some repositories only the folder says which quantisation it is.
    quant = quant_of(inside or group.files[0].path.name) or facts.quant
    origin = origin or Origin(FOUND, _changed_at(group))
    notes = [ledger.files.get(file.key) for file in group.files]
    current = [note if note and file.stat and note.fits(file.stat) else None for note, file in zip(notes, group.files, strict=True)]
    return LocalModel(
        name=origin.name or (f"{publisher}/{repo}:{quant}" if inside and quant and not group.is_side_file else group.key),
        key=group.key,
        path=group.files[0].path,
        files=tuple(file.path for file in group.files),
        size_bytes=group.size_bytes,
        how=origin.how,
        quant=quant,
        architecture=facts.architecture,
        n_params=facts.n_params,
        n_ctx_train=facts.n_ctx_train,
        sha256s=tuple(note.sha256 if note else "" for note in current),
        repo=origin.repo,
        revision=origin.revision,
        commit=origin.commit,
        catalog_name=origin.catalog_name,
        added=origin.added,
        problem=facts.problem,
        changed=any(note and not now for note, now in zip(notes, current, strict=True)),
        is_side_file=group.is_side_file,
    )


def _changed_at(group: Group) -> str:
    status = group.files[0].stat
    return datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="seconds") if status else ""


def _follow(name: str, aliases: Mapping[str, str]) -> str:
    """The end of a chain of aliases; a circle ends where it began."""
    seen: set[str] = set()
    while name in aliases and name not in seen:
        seen.add(name)
        name = aliases[name]
    return name


def _freed_bytes(path: Path) -> int:
    """What deleting this name gives back: nothing while a link or another name holds the content."""
    status = path.lstat()
    return status.st_size if not path.is_symlink() and status.st_nlink == 1 else 0


def unlink(path: Path) -> None:
    """Delete a file, or do nothing where there is none. Raises LocalLLMError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        refused = error.errno in (errno.EROFS, errno.EPERM, errno.EACCES) and os.name != "nt"
        hint = "check the folder and its permissions" if refused else "it may be in use: close what uses it, then try again"
        raise LocalLLMError(f"cannot delete {path}: {error.strerror}", hint=hint) from error
