"""Small bundles for tests: a model of a few kilobytes in many chunks, and ways to tamper with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localllm.bundle.create import create
from localllm.bundle.manifest import MANIFEST, Manifest
from localllm.bundle.sources import Source, SourceFile
from localllm.bundle.stick import Contents
from tests import gguf_file as raw

CHUNK_BYTES = 1000


def model_bytes(seed: int = 0, size_bytes: int = 6400) -> bytes:
    """A GGUF file whose header is sound and whose weights are noise that `seed` makes."""
    count = size_bytes // 4
    noise = b"".join(hashlib.sha256(f"{seed} {n}".encode()).digest() for n in range(count * 4 // 32))
    return raw.gguf([raw.string("general.architecture", "llama"), raw.string("general.license", "mit")], [raw.tensor("w", [count])], noise)


def source(folder: Path, name: str = "one", seed: int = 0, sha256: str = "") -> Source:
    """A model file below `folder`, ready to be bundled."""
    path = folder / f"{name}-Q4_0.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model_bytes(seed))
    file = SourceFile(path, f"pub/{name}/{path.name}", path.stat().st_size, sha256)
    return Source(f"pub/{name}:Q4_0", "pub/name", "0" * 40, "mit", (file,), ())


def make(out: Path, *sources: Source, **options: Any) -> Manifest:
    return create(out, Contents(sources), **{"chunk_bytes": CHUNK_BYTES, **options})


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of the bundle at `root`."""
    raw_manifest = json.loads((root / MANIFEST).read_bytes())
    change(raw_manifest)
    (root / MANIFEST).write_text(json.dumps(raw_manifest), encoding="utf-8")


def chunk(root: Path, number: int = 1) -> Path:
    """One of the bundle's chunks, in the order of their names."""
    return sorted((root / "weights").iterdir())[number]


def flip(root: Path) -> None:
    """Flip one bit of a chunk; twice is as before."""
    data = bytearray(chunk(root).read_bytes())
    data[500] ^= 1
    chunk(root).write_bytes(data)


def content(root: Path) -> dict[str, bytes]:
    """Every file below `root` by its path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
