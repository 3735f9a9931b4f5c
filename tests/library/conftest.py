"""A library of the test's own, and models to put into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from localllm.library import Library
from tests import gguf_file as raw

Put = Callable[..., Path]


def model(**texts: str) -> bytes:
    """A small whole model with these `general.*` texts."""
    keys = [raw.string(f"general.{key}", value) for key, value in {"architecture": "llama", **texts}.items()]
    return raw.gguf([*keys, raw.number("llama.context_length", 512)], [raw.tensor("a.weight", [32])], bytes(128))


def part(no: int, count: int) -> bytes:
    """One part of a split model."""
    keys = [raw.string("general.architecture", "llama")] if no == 0 else []
    split = [raw.number("split.no", no, raw.UINT16), raw.number("split.count", count, raw.UINT16)]
    split.append(raw.number("split.tensors.count", count, raw.INT32))
    return raw.gguf([*keys, *split], [raw.tensor(f"a.{no}", [32])], bytes(128))


@pytest.fixture
def library(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """An empty library, and no other program's models."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "APPDATA", "OLLAMA_MODELS", "LLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return Library()


@pytest.fixture
def put(library: Library) -> Put:
    """Write a file below the models folder: `put("user/repo/m-Q8_0.gguf")`, with other content if given."""

    def write(key: str, data: bytes | None = None) -> Path:
        path = library.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model(name=key) if data is None else data)
        return path

    return write
