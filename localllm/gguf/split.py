"""Model files on disk: one file, or the parts of a split model (`name-00001-of-00003.gguf`) as one."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from localllm.errors import ModelError
from localllm.gguf.cursor import Budget, Cursor
from localllm.gguf.header import Header, Tensor
from localllm.gguf.parser import parse

MAX_PARTS = 1024
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


def read_header(path: Path) -> Header:
    """The header of this one file. Raises ModelError."""
    return _read(path, Budget())


def read_model(path: Path) -> Header:
    """The header of the whole model that the file is, or is a part of; `files` has all its parts. Raises ModelError."""
    budget = Budget()
    given = _read(path, budget)
    n_parts = _split(given, "count")
    if n_parts in (None, 1):
        return given
    paths = _parts(path, n_parts)
    index = _split(given, "no")
    if index is None or index >= n_parts or paths[index].name != path.name:
        raise _broken(path.name, f"its name does not fit its header, which says part {(index or 0) + 1} of {n_parts}")
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more of the {n_parts} parts are" if len(missing) > 1 else f", one of {n_parts} parts, is"
        raise ModelError(f"{_printable(missing[0])}{more} missing in {_printable(str(path.parent))}", hint="pull the model again")
    return joined([given if i == index else _read(part, budget) for i, part in enumerate(paths)])


def _read(path: Path, budget: Budget) -> Header:
    # a pipe or a device would never end
    if not path.is_file():
        raise ModelError(f"no file at {_printable(str(path))}", hint="check the path")
    try:
        with path.open("rb") as file:

            def read(offset: int, n: int) -> bytes:
                file.seek(offset)
                return file.read(n)

            header = parse(Cursor(read, os.fstat(file.fileno()).st_size, path.name, budget))
    except OSError as error:
        raise ModelError(f"{_printable(str(path))} cannot be read: {error.strerror}", hint="check its permissions and the disk") from error
    return replace(header, files=(path,))


def _parts(path: Path, n_parts: int) -> list[Path]:
    """The paths of all parts, from the name of one."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != n_parts:
        raise ModelError(
            f"{_printable(path.name)} is one of {n_parts} parts, but its name does not end in -0000N-of-{n_parts:05}.gguf",
            hint="give the parts the names that they were published under",
        )
    return [path.with_name(f"{match[1]}-{i:05}-of-{n_parts:05}.gguf") for i in range(1, n_parts + 1)]


def joined(parts: list[Header]) -> Header:
    """The headers of all parts, in order and each with its file, as one model; raises ModelError when they do not belong together."""
    first = parts[0]
    tensors: list[Tensor] = []
    for i, part in enumerate(parts):
        if (_split(part, "no"), _split(part, "count")) != (i, len(parts)):
            raise _broken(part.files[0].name, f"it is not part {i + 1} of {len(parts)} of this model")
        if _split(part, "tensors.count") != _split(first, "tensors.count"):
            raise _broken(part.files[0].name, "it belongs to another model than the first part")
        tensors += (replace(tensor, file=i) for tensor in part.tensors) if i else part.tensors
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise _broken(first.files[0].name, "two of its parts hold the same tensor")
    promised = _split(first, "tensors.count")
    if promised is not None and promised != len(tensors):
        raise _broken(first.files[0].name, f"its parts hold {len(tensors):,} tensors of {promised:,}")
    return replace(
        first,
        tensors=tuple(tensors),
        file_bytes=sum(part.file_bytes for part in parts),
        files=tuple(part.files[0] for part in parts),
    )


def _split(header: Header, key: str) -> int | None:
    """A number of the split, None when it is absent. Raises ModelError."""
    value = header.metadata.get(f"split.{key}")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (key == "count" and not 1 <= value <= MAX_PARTS):
        raise _broken(header.files[0].name, f"split.{key} makes no sense")
    return value


def _broken(name: str, what: str) -> ModelError:
    return ModelError(f"{_printable(name)} is damaged: {what}", hint="pull the model again")


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)
