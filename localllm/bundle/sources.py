"""Which files of the library go into a bundle, and where they go on the other machine. Copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localllm.errors import ModelError, UsageError
from localllm.gguf import read_header
from localllm.library.library import Library
from localllm.library.model import BUILT_IN, LocalModel
from localllm.reference import safe_parts

MAX_NOTICE_BYTES = 1 << 20
UNKNOWN_LICENCE = "not recorded"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to carry; `target` is its place below the models folder, `sha256` empty where nobody knows it."""

    path: Path
    target: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """A model to carry, with the licence and notice files that lie beside it."""

    name: str
    repo: str
    commit: str
    licence: str
    files: tuple[SourceFile, ...]
    notices: tuple[Path, ...]


def sources(library: Library, names: Sequence[str]) -> list[Source]:
    """The models that `names` mean, each once. Raises NotFound, ModelError for one that cannot be used, UsageError."""
    found = {model.key: model for model in map(library.find, names)}
    made = [_source(library, model) for model in found.values()]
    targets = [file.target.casefold() for source in made for file in source.files]
    if doubled := sorted({target for target in targets if targets.count(target) > 1}):
        raise UsageError(f"two models would become the same file {doubled[0]}", hint="bundle them apart")
    return made


def _source(library: Library, model: LocalModel) -> Source:
    if model.problem:
        raise ModelError(f"{model.name} cannot be bundled: {model.problem}", hint="localllm verify looks closer")
    folder, licence = _folder(model), UNKNOWN_LICENCE
    files: list[SourceFile] = []
    for number, path in enumerate(model.files):
        metadata = read_header(path).metadata
        for key in ("general.license.name", "general.license"):
            if number == 0 and isinstance(text := metadata.get(key), str) and text.strip():
                licence = "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]
        key = library.key_of(path)
        inside = not Path(key).is_absolute() and key.count("/") >= 2
        target = key if inside else f"{folder}/{_filename(model, path)}"
        repo = "/".join(target.split("/")[:2])
        safe_parts(repo, "/".join(target.split("/")[2:]))
        sha256 = model.sha256s[number] if number < len(model.sha256s) else ""
        files.append(SourceFile(path, target, path.stat().st_size, sha256))
    notices = tuple(sorted(path for path in model.path.parent.iterdir() if _is_notice(path)))
    name = "/".join(files[0].target.split("/")[:2]) + (f":{model.quant}" if model.quant else "")
    return Source(name, model.repo, model.commit, licence, tuple(files), notices)


def _folder(model: LocalModel) -> str:
    """`publisher/repo` on the other machine, also for models that lie outside the models folder."""
    if model.how == BUILT_IN:
        return f"localllm/{model.name}"
    place = model.name.partition(":")[0]
    return place if place.count("/") == 1 else f"local/{model.path.stem}"


def _filename(model: LocalModel, path: Path) -> str:
    """Ollama's blobs are named by their hash; elsewhere a model's file ends in .gguf."""
    return path.name if path.suffix.lower() == ".gguf" else f"{_folder(model).partition('/')[2]}-{model.quant or 'model'}.gguf"


def _is_notice(path: Path) -> bool:
    return (
        path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING"))
        and path.is_file()
        and path.stat().st_size <= MAX_NOTICE_BYTES
    )
