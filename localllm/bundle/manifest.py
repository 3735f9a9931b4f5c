"""What a bundle says it holds: frozen values, and reading them with suspicion. Opens no file.

Travels on the stick: standard library only, Python 3.8 (hence no slots).
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SCHEMA = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
UNFINISHED = "UNFINISHED.txt"
"""There while a bundle is being written, and instead of a manifest."""

MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 10_000
MAX_CHUNK_BYTES = (4 << 30) - 1
"""FAT32 holds no larger file."""
MAX_MODEL_BYTES = 1 << 43
MAX_TEXT = 2_000
MAX_PART_BYTES = 200
"""File systems take 255; `.part.json` and the like must still fit behind it."""
MAX_PARTS = 8
MAX_STICK_PATH = 240
"""Windows' 260 less a drive and a folder."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_FORBIDDEN = frozenset('<>:"|?*\\')
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|clock\$|(com|lpt)[0-9¹²³])", re.IGNORECASE)


class Refused(Exception):
    """A bundle that is not used. `problems` are sentences for a person; `exit_code` means what it means in localllm.errors."""

    def __init__(self, problems: list[str], hint: str = "", exit_code: int = 6) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
        self.hint = hint
        self.exit_code = exit_code


@dataclass(frozen=True)
class Piece:
    """One file on the stick; `file` is its path there, with forward slashes."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ModelFile:
    """One file of a model; `path` is where it goes below the models folder. Its chunks in order are its content."""

    path: str
    size_bytes: int
    sha256: str
    chunks: tuple[Piece, ...]


@dataclass(frozen=True)
class BundledModel:
    name: str
    repo: str
    commit: str
    licence: str
    files: tuple[ModelFile, ...]


@dataclass(frozen=True)
class Platform:
    """What a machine is, or what wheels need of one; `cpu_features` is None where they cannot be told."""

    os: str
    arch: str
    libc: str
    libc_version: str
    python: str
    cpu_features: tuple[str, ...] | None


@dataclass(frozen=True)
class Manifest:
    """`platform` is None without wheels: models run anywhere. `others` are licences, settings and the stick's own programs."""

    created_by: str
    created: str
    platform: Platform | None
    models: tuple[BundledModel, ...]
    wheels: tuple[Piece, ...]
    others: tuple[Piece, ...]

    @property
    def chunks(self) -> Iterator[Piece]:
        for model in self.models:
            for file in model.files:
                yield from file.chunks

    @property
    def pieces(self) -> Iterator[Piece]:
        """Every file on the stick, the small ones first."""
        yield from self.others
        yield from self.wheels
        yield from self.chunks

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)

    def to_bytes(self) -> bytes:
        return (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def parse(data: bytes) -> Manifest:
    """The manifest in `data`. Raises Refused for anything malformed, unsafe, doubled or out of proportion."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise Refused([f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES:,} bytes"])
    try:
        raw: Any = json.loads(data.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise Refused([f"{MANIFEST} is not readable: {error}"]) from error
    if (schema := _value(raw, "schema")) != SCHEMA:
        raise Refused(
            [f"{MANIFEST} has schema {schema!r:.40}, this program reads {SCHEMA}"], "use the bundle's own verify.py and install.py"
        )
    manifest = Manifest(
        created_by=_text(raw, "created_by"),
        created=_text(raw, "created"),
        platform=None if _value(raw, "platform") is None else _platform(raw["platform"]),
        models=tuple(_model(item) for item in _list(raw, "models")),
        wheels=tuple(_piece(item) for item in _list(raw, "wheels")),
        others=tuple(_piece(item) for item in _list(raw, "others")),
    )
    if problems := list(_problems(manifest)):
        raise Refused(problems[:20])
    return manifest


def unsafe(path: str) -> str:
    """Why `path` must not name a file below a folder of ours, on any system; empty when it may."""
    parts = path.split("/")
    if len(parts) > MAX_PARTS:
        return "lies too deep"
    for part in parts:
        if part in ("", ".", ".."):
            return "leaves its folder, or is not relative"
        if part[0] in ". " or part[-1] in ". ":
            return "has a part that begins or ends with a dot or a space"
        if len(part.encode("utf-8", "replace")) > MAX_PART_BYTES:
            return f"has a part longer than {MAX_PART_BYTES} bytes"
        if any(c in _FORBIDDEN or unicodedata.category(c) in _UNSEEN for c in part):
            return "has a character that a file system, or a terminal, takes amiss"
        if _RESERVED.fullmatch(part.split(".")[0].strip()):
            return "has a part that is a device on Windows"
    return ""


def folded(path: str) -> str:
    """`path` as a file system sees it that ignores case and normalises letters: two such names are one file there."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _problems(manifest: Manifest) -> Iterator[str]:
    pieces = list(manifest.pieces)
    files = [file for model in manifest.models for file in model.files]
    if len(pieces) > MAX_FILES:
        yield f"it lists {len(pieces):,} files, more than {MAX_FILES:,}"
        return
    yield from (f"the path {_shown(piece.file)} is too long" for piece in pieces if len(piece.file) > MAX_STICK_PATH)
    yield from _bad_names(piece.file for piece in pieces)
    yield from _bad_names(file.path for file in files)
    for chunk in manifest.chunks:
        if not chunk.file.startswith("weights/"):
            yield f"{_shown(chunk.file)} is a chunk outside weights/"
        if not 0 < chunk.size_bytes <= MAX_CHUNK_BYTES:
            yield f"{_shown(chunk.file)} is empty, or larger than FAT32 allows"
    for wheel in manifest.wheels:
        if not re.fullmatch(r"wheels/[^/]+\.whl", wheel.file):
            yield f"{_shown(wheel.file)} is not a wheel in wheels/"
    for other in manifest.others:
        if other.file.split("/")[0].lower() in ("weights", "wheels", MANIFEST, SIGNATURE):
            yield f"{_shown(other.file)} is no place for such a file"
    for file in files:
        if not re.fullmatch(r"[^/]+/[^/]+/(?:[^/]+/)*[^/]+\.gguf", file.path):
            yield f"{_shown(file.path)} is not publisher/repo/file.gguf"
        if file.size_bytes > MAX_MODEL_BYTES or file.size_bytes != sum(chunk.size_bytes for chunk in file.chunks):
            yield f"{_shown(file.path)} is said to have {file.size_bytes:,} bytes, its chunks have others"
        if not file.chunks or (len(file.chunks) == 1 and file.chunks[0].sha256 != file.sha256):
            yield f"{_shown(file.path)} is not what its chunks make"
    if any(not model.files for model in manifest.models):
        yield "a model has no files"
    if manifest.wheels and manifest.platform is None:
        yield "there are wheels, but not for which platform"


def _bad_names(names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    folders: set[str] = set()
    for name in names:
        if reason := unsafe(name):
            yield f"the path {_shown(name)} {reason}"
        key = folded(name)
        if key in seen:
            yield f"{_shown(name)} is listed twice"
        seen.add(key)
        parts = key.split("/")
        folders.update("/".join(parts[:n]) for n in range(1, len(parts)))
    for name in sorted(seen & folders):
        yield f"{_shown(name)} is both a file and a folder"


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _model(raw: Any) -> BundledModel:
    return BundledModel(
        name=_text(raw, "name"),
        repo=_text(raw, "repo"),
        commit=_text(raw, "commit"),
        licence=_text(raw, "licence"),
        files=tuple(
            ModelFile(
                path=_text(item, "path"),
                size_bytes=_size(item),
                sha256=_sha256(item),
                chunks=tuple(_piece(chunk) for chunk in _list(item, "chunks")),
            )
            for item in _list(raw, "files")
        ),
    )


def _platform(raw: Any) -> Platform:
    words = {key: _text(raw, key) for key in ("os", "arch", "libc", "libc_version", "python")}
    if _value(raw, "cpu_features") is None:
        return Platform(**words, cpu_features=None)
    features = _list(raw, "cpu_features")
    return Platform(**words, cpu_features=tuple(_text({"cpu_features": item}, "cpu_features") for item in features))


def _piece(raw: Any) -> Piece:
    return Piece(file=_text(raw, "file"), size_bytes=_size(raw), sha256=_sha256(raw))


def _value(raw: Any, key: str) -> Any:
    if not isinstance(raw, dict) or key not in raw:
        raise Refused([f"{MANIFEST}: {key} is missing"])
    return raw[key]  # pyright: ignore[reportUnknownVariableType]


def _text(raw: Any, key: str) -> str:
    value = _value(raw, key)
    if not isinstance(value, str) or len(value) > MAX_TEXT or any(unicodedata.category(c) in _UNSEEN for c in value):
        raise Refused([f"{MANIFEST}: {key} is not a short text"])
    return value


def _size(raw: Any) -> int:
    value = _value(raw, "size_bytes")
    # True is an int in Python, and no size.
    if type(value) is not int or not 0 <= value <= MAX_MODEL_BYTES:
        raise Refused([f"{MANIFEST}: size_bytes is no size"])
    return value


def _sha256(raw: Any) -> str:
    value = _text(raw, "sha256")
    if not _SHA256.fullmatch(value):
        raise Refused([f"{MANIFEST}: sha256 is not 64 hex digits"])
    return value


def _list(raw: Any, key: str) -> list[Any]:
    value = _value(raw, key)
    if not isinstance(value, list):
        raise Refused([f"{MANIFEST}: {key} is not a list"])
    return value  # pyright: ignore[reportUnknownVariableType]
