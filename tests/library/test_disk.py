from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from localllm.library import Library
from localllm.library.disk import prunable, prune, usage

from .conftest import Put


def prunable_names(library: Library) -> set[tuple[str, str]]:
    return {(item.what, item.name) for item in prunable(library)}


def test_usage_counts_every_byte_once(library: Library, put: Put) -> None:
    whole = put("u/r/m-Q8_0.gguf")
    put("u/r/other-Q8_0.gguf.part", os.urandom(5000))
    put("u/r/notes.txt", os.urandom(7000))
    states = library.directories.kv_states
    states.mkdir(parents=True)
    (states / "one").write_bytes(os.urandom(9000))
    used = usage(library)
    assert [model.name for model in used.models] == ["u/r:Q8_0"]
    assert used.models_bytes == whole.stat().st_size
    assert (used.partial_bytes, used.other_bytes, used.kv_states_bytes, used.adopted_bytes) == (5000, 7000, 9000, 0)
    assert 0 < used.disk_free_bytes < used.disk_total_bytes


def test_usage_of_nothing(library: Library) -> None:
    used = usage(library)
    assert (used.models, used.models_bytes, used.partial_bytes, used.other_bytes) == ((), 0, 0, 0)


@pytest.mark.skipif(os.name == "nt", reason="sparse files")
def test_a_sparse_partial_file_counts_what_it_takes(library: Library, put: Put) -> None:
    part = put("u/r/m.gguf.part", os.urandom(8192))
    with part.open("r+b") as file:
        file.truncate(1 << 30)
    assert usage(library).partial_bytes < 100_000


def test_prune_takes_remains_and_leaves_models_and_unknown_files(library: Library, put: Put) -> None:
    kept = [put("u/r/m-Q8_0.gguf"), *map(put, ("u/r/notes.txt", "u/poetry.lock", "u/film.part"))]
    for name in ("a.gguf.part", "a.gguf.part.json", "a.gguf.lock", ".a.gguf.part.json.x1y2.tmp", "m-Q8_0.gguf.lock"):
        put(f"u/r/{name}", b"12345")
    put("v/s/b.gguf.part", b"123")
    (library.root / "empty" / "er").mkdir(parents=True)
    assert prunable_names(library) == {
        ("partial", "u/r/a.gguf"),
        ("lock", "u/r/m-Q8_0.gguf"),
        ("partial", "v/s/b.gguf"),
        ("empty folder", "empty/er"),
    }
    assert prune(library, prunable(library)) == 4 * 5 + 5 + 3
    assert sorted(path for path in library.root.rglob("*") if path.is_file()) == sorted(kept)
    assert [path.name for path in library.root.iterdir()] == ["u"]
    assert prunable(library) == []


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights")
def test_what_lies_behind_a_link_is_not_pruned(library: Library, put: Put, tmp_path: Path) -> None:
    put("u/r/m-Q8_0.gguf")
    theirs = tmp_path / "theirs" / "deep"
    theirs.mkdir(parents=True)
    (theirs / "dead").symlink_to("nowhere")
    (theirs / "x.gguf.part").write_bytes(b"theirs")
    (library.root / "linked").symlink_to(theirs.parent)
    assert prunable(library) == []
    (library.root / "dead").symlink_to("nowhere")
    assert prunable_names(library) == {("dead link", "dead")}
    prune(library, prunable(library))
    assert {path.name for path in theirs.iterdir()} == {"dead", "x.gguf.part"}


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights")
def test_a_models_folder_that_is_a_link_is_pruned(library: Library, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    library.root.parent.mkdir(parents=True, exist_ok=True)
    library.root.symlink_to(tmp_path / "big")
    (tmp_path / "big" / "x.gguf.part").write_bytes(b"ours")
    assert prune(library, prunable(library)) == 4


def test_looking_for_remains_leaves_no_traces(library: Library, put: Put) -> None:
    put("u/r/a.gguf.part")
    before = sorted(library.root.rglob("*"))
    prunable(library)
    assert sorted(library.root.rglob("*")) == before


def test_prune_never_takes_what_is_being_downloaded(library: Library, put: Put) -> None:
    part = put("u/r/a.gguf.part")
    put("u/r/a.gguf.part.json")
    before = prunable(library)
    with FileLock(f"{library.root / 'u/r/a.gguf'}.lock"):
        assert prunable(library) == []
        # Taken up again between looking and deleting.
        assert prune(library, before) == 0
        assert part.exists()
    assert prune(library, before) == before[0].size_bytes > 0
    assert not part.exists()


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
def test_prune_takes_dead_links(library: Library, put: Put, tmp_path: Path) -> None:
    put("u/r/m-Q8_0.gguf")
    link = library.root / "u" / "dead-Q8_0.gguf"
    link.symlink_to(tmp_path / "nothing")
    assert prunable_names(library) == {("dead link", "u/dead-Q8_0.gguf")}
    prune(library, prunable(library))
    assert not link.is_symlink()


def test_prune_forgets_files_that_are_gone(library: Library, put: Put, home: Path) -> None:
    path = put("u/r/m-Q8_0.gguf")
    put("u/s/m-Q8_0.gguf")
    for model in library.models():
        library.verify(model)
    path.unlink()
    assert prunable_names(library) == {("note", "u/r/m-Q8_0.gguf"), ("empty folder", "u/r")}
    prune(library, prunable(library))
    data = json.loads((home / "library.json").read_bytes())
    assert "u/r/m-Q8_0.gguf" not in {*data["files"], *data["facts"], *data["origins"]}
    assert "u/s/m-Q8_0.gguf" in data["files"]


def test_a_disk_that_is_not_mounted_loses_no_notes(library: Library, put: Put, tmp_path: Path) -> None:
    put("u/r/m-Q8_0.gguf")
    library.verify(library.find("u/r"))
    library.root.rename(tmp_path / "unmounted")
    assert prunable(library) == []
    prune(library, prunable(library))
    (tmp_path / "unmounted").rename(library.root)
    assert library.find("u/r").sha256s[0]
