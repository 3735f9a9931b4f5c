"""Where other programs keep their GGUF files, and what they call them. Reads folders and small manifests, no model.

Hugging Face  models--user--repo/snapshots/COMMIT/file.gguf, links into blobs/ whose names are the files' SHA-256
LM Studio     publisher/repo/file.gguf
Ollama        manifests/HOST/NAMESPACE/NAME/TAG, JSON whose layers name blobs/sha256-…
Jan           llamacpp/models/ID/model.yml, which names a file below Jan's folder or anywhere
llama.cpp     user_repo_file.gguf, with manifest=user=repo=tag.json beside

A manifest is somebody else's text: what it names must be a plain hash or lie where that program keeps its models.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from localllm.errors import UsageError
from localllm.library.scan import Entry, Group, entries, groups, stem_of
from localllm.quant import quant_of
from localllm.reference import check_repo

HUGGING_FACE, LM_STUDIO, OLLAMA, JAN, LLAMA_CPP = "Hugging Face", "LM Studio", "Ollama", "Jan", "llama.cpp"
MAX_MANIFEST_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_WEIGHTS = "application/vnd.ollama.image.model"
_MODEL_PATH = re.compile(r"""^model_path:[ \t]*(["']?)(.+?)\1[ \t]*$""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Found:
    """A model that another program keeps."""

    app: str
    name: str
    path: Path
    files: tuple[Path, ...]
    size_bytes: int
    sha256s: tuple[str, ...]
    """Of each file, where its name tells; else empty."""
    repo: str = ""
    commit: str = ""
    problem: str = ""
    """Why it cannot be adopted."""


def stores(env: Mapping[str, str] = os.environ) -> list[tuple[str, Path]]:
    """The folders where the known programs keep models on this machine, whether they exist or not."""
    home = Path(env.get("HOME") or env.get("USERPROFILE") or Path.home())
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    support = home / "Library" / "Application Support"
    roaming = Path(env.get("APPDATA") or home / "AppData" / "Roaming")
    hf_home = Path(env.get("HF_HOME") or cache / "huggingface").expanduser()
    caches = home / "Library" / "Caches" if sys.platform == "darwin" else cache
    found = [
        (HUGGING_FACE, Path(env.get("HF_HUB_CACHE") or hf_home / "hub").expanduser()),
        (LM_STUDIO, home / ".lmstudio" / "models"),
        (LM_STUDIO, home / ".cache" / "lm-studio" / "models"),
        (OLLAMA, Path(env.get("OLLAMA_MODELS") or home / ".ollama" / "models").expanduser()),
        (OLLAMA, Path("/usr/share/ollama/.ollama/models")),
        (JAN, home / "jan"),
        (JAN, Path(env.get("XDG_DATA_HOME") or home / ".local" / "share") / "Jan" / "data"),
        (JAN, support / "Jan" / "data"),
        (JAN, roaming / "Jan" / "data"),
        (LLAMA_CPP, Path(env.get("LLAMA_CACHE") or caches / "llama.cpp").expanduser()),
    ]
    return list(dict.fromkeys(found))


def kept_in(app: str, folder: Path) -> list[Found]:
    """The models that `app` keeps in `folder`; for an unknown `app` all GGUF files, named by their place."""
    return sorted(_READERS.get(app, _plain)(app, folder), key=lambda found: found.name.casefold())


def _plain(app: str, folder: Path) -> Iterator[Found]:
    for group in groups(entries(folder)):
        folders = group.key.split("/")[:-1]
        repo = _repo("/".join(folders[:2])) if len(folders) >= 2 else ""
        yield _found(app, repo or f"{_slug(app)}/{stem_of(group.files[0].path.name)}", group, repo=repo)


def _hugging_face(app: str, folder: Path) -> Iterator[Found]:
    for cached in _folders(folder):
        repo = _repo(cached.name.removeprefix("models--").replace("--", "/")) if cached.name.startswith("models--") else ""
        if not repo:
            continue
        seen: set[tuple[Path, ...]] = set()
        # What a branch points to comes first: an older snapshot often holds the same files.
        current = {_text(ref).strip() for ref in (cached / "refs").glob("*") if os.path.isfile(ref)}
        for snapshot in sorted(_folders(cached / "snapshots"), key=lambda path: (path.name not in current, path.name)):
            for group in groups(entries(snapshot)):
                blobs = tuple(Path(os.path.realpath(entry.path)) for entry in group.files)
                if blobs in seen:
                    continue
                seen.add(blobs)
                inside = all(blob.is_relative_to(os.path.realpath(cached)) for blob in blobs)
                commit = snapshot.name if _COMMIT.fullmatch(snapshot.name) else ""
                hashes = tuple(blob.name if _SHA256.fullmatch(blob.name) else "" for blob in blobs)
                problem = "" if inside else "a link leads out of the cache"
                yield _found(app, repo, group, hashes, repo=repo, commit=commit, problem=problem)


def _ollama(app: str, folder: Path) -> Iterator[Found]:
    for manifest in entries(folder / "manifests"):
        host, *path = manifest.key.split("/")
        if len(path) < 2 or not manifest.stat or path[-1].startswith("."):
            continue
        *names, tag = path
        name = "/".join(["ollama", *names[1:]] if names[0] == "library" else names) + f":{tag}"
        repo = _repo("/".join(names)) if host in ("hf.co", "huggingface.co") else ""
        try:
            layers = cast(list[Any], json.loads(_text(manifest.path))["layers"])
            digests = [_DIGEST.fullmatch(str(layer["digest"])) for layer in layers if layer["mediaType"] == _WEIGHTS]
        except (ValueError, TypeError, KeyError, RecursionError):
            yield Found(app, name, manifest.path, (), 0, (), problem="its manifest is broken")
            continue
        if not digests:
            continue
        if len(digests) > 1 or digests[0] is None:
            yield Found(app, name, manifest.path, (), 0, (), problem="its manifest names no single file of weights")
            continue
        sha256 = digests[0][1]
        blob = folder / "blobs" / f"sha256-{sha256}"
        problem = "" if os.path.isfile(blob) and not blob.is_symlink() else "its blob is missing"
        size_bytes = blob.stat().st_size if not problem else 0
        yield Found(app, name, blob, (blob,), size_bytes, (sha256,), repo, problem=problem)


def _jan(app: str, folder: Path) -> Iterator[Found]:
    root = folder / "llamacpp" / "models"
    for entry in entries(root):
        if entry.path.name != "model.yml":
            continue
        name = f"jan/{entry.key.removesuffix('/model.yml')}"
        match = _MODEL_PATH.search(_text(entry.path))
        if not match:
            continue
        path = folder / match[2]
        # Jan also uses files where the user keeps them, by an absolute path; a relative one must not climb out.
        climbs = not Path(match[2]).is_absolute() and not Path(os.path.normpath(path)).is_relative_to(folder)
        if climbs or not os.path.isfile(path):
            yield Found(app, name, path, (), 0, (), problem="it names a file outside of Jan's folder" if climbs else "its file is missing")
            continue
        yield _found(app, name, Group((Entry(path, path.name, path.stat()),)))


def _llama_cpp(app: str, folder: Path) -> Iterator[Found]:
    repos: dict[str, str] = {}
    for manifest in folder.glob("manifest=*=*=*.json"):
        _, user, name, _ = manifest.name.split("=", 3)
        if repo := _repo(f"{user}/{name}"):
            repos[f"{user}_{name}_"] = repo
    for group in groups(entries(folder)):
        name = group.files[0].path.name
        prefix = max((prefix for prefix in repos if name.startswith(prefix)), key=len, default="")
        repo = repos.get(prefix, "")
        yield _found(app, repo or f"{_slug(app)}/{stem_of(name)}", group, repo=repo)


_READERS: dict[str, Callable[[str, Path], Iterator[Found]]] = {
    HUGGING_FACE: _hugging_face,
    OLLAMA: _ollama,
    JAN: _jan,
    LLAMA_CPP: _llama_cpp,
}


def _found(
    app: str, name: str, group: Group, sha256s: tuple[str, ...] = (), *, repo: str = "", commit: str = "", problem: str = ""
) -> Found:
    if group.n_missing:
        problem = f"{group.n_missing} of its parts are missing"
    if any(entry.stat is None for entry in group.files):
        problem = "a link to nothing"
    filename = group.files[0].path.name
    # Two models of one repository differ in their quantisation, or else in their file.
    quant = quant_of(group.key)
    label = f"{name}:{quant}" if repo and quant and not group.is_side_file else f"{name}/{filename}" if repo else name
    files = tuple(entry.path for entry in group.files)
    return Found(app, label, files[0], files, group.size_bytes, sha256s or ("",) * len(files), repo, commit, problem)


def _repo(text: str) -> str:
    """`text`, if it can be a repository, else nothing."""
    try:
        return check_repo(text)
    except UsageError:
        return ""


def _slug(app: str) -> str:
    return app.casefold().replace(" ", "-")


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if os.path.isdir(path))
    except OSError:
        return []


def _text(path: Path) -> str:
    """A small text file; empty where it cannot be read or is too large to be one."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError:
        return ""
    return data.decode("utf-8", "replace") if len(data) <= MAX_MANIFEST_BYTES else ""
