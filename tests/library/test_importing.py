from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from localllm.errors import DoesNotFit, LocalLLMError, ModelError, NotFound, UsageError
from localllm.library import Library
from localllm.library.importing import How, default_repo, import_file

from .conftest import Put, model, part


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "down loads" / "My.Model-1B-Q4_K_M.gguf"
    path.parent.mkdir()
    path.write_bytes(model(name="mine"))
    return path


def no_remains(library: Library) -> bool:
    return not [path for path in library.root.rglob("*") if path.is_file() and path.suffix != ".gguf"]


@pytest.mark.parametrize(
    "how", ["copy", "move", "link", pytest.param("symlink", marks=pytest.mark.skipif(os.name == "nt", reason="rights"))]
)
def test_every_way_brings_the_file(library: Library, source: Path, how: How) -> None:
    data = source.read_bytes()
    imported = import_file(library, source, how)
    assert imported.name == "local/My.Model-1B:Q4_K_M"
    assert imported.path == library.root / "local" / "My.Model-1B" / source.name
    assert imported.path.read_bytes() == data
    assert (imported.how, imported.problem) == ("imported", "")
    assert source.exists() == (how != "move")
    if how != "move":
        assert imported.path.samefile(source) == (how != "copy")
    assert imported.path.is_symlink() == (how == "symlink")
    assert no_remains(library)
    assert library.find("my.model-1b") == imported


def test_a_copy_is_independent_and_its_hash_is_known_or_recorded_later(
    library: Library, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a file system that cannot share blocks.
    monkeypatch.setattr("localllm.library.importing._clone", lambda *_: False)
    data = source.read_bytes()
    progress: list[int] = []
    imported = import_file(library, source, "copy", "me/mine", progress.append)
    assert imported.sha256s == (hashlib.sha256(data).hexdigest(),)
    assert sum(progress) == len(data)
    source.write_bytes(b"overwritten")
    assert imported.path.read_bytes() == data


@pytest.mark.skipif(sys.platform != "linux", reason="an ioctl of Linux")
def test_a_clone_that_fails_leaves_nothing(library: Library, source: Path) -> None:
    from localllm.library.importing import _clone  # pyright: ignore[reportPrivateUsage]

    target = source.with_name("clone.gguf")
    if _clone(source, target):
        assert target.read_bytes() == source.read_bytes()
    else:
        assert not target.exists()


@pytest.mark.parametrize("how", ["copy", "move", "link"])
def test_all_parts_of_a_split_model_come(library: Library, tmp_path: Path, how: How) -> None:
    parts = [tmp_path / f"big-Q8_0-0000{n + 1}-of-00003.gguf" for n in range(3)]
    for n, path in enumerate(parts):
        path.write_bytes(part(n, 3))
    imported = import_file(library, parts[1], how, "me/big")
    assert imported.name == "me/big:Q8_0"
    assert [path.name for path in imported.files] == [path.name for path in parts]
    assert [path.exists() for path in parts] == [how != "move"] * 3


def test_a_move_across_disks_copies_then_deletes(library: Library, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localllm.library.importing._same_device", lambda *_: False)
    data = source.read_bytes()
    imported = import_file(library, source, "move")
    assert imported.path.read_bytes() == data
    assert not source.exists()


def test_the_header_is_read_first(library: Library, tmp_path: Path) -> None:
    bad = tmp_path / "m.gguf"
    bad.write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(ModelError):
        import_file(library, bad)
    with pytest.raises(NotFound, match="is no file"):
        import_file(library, tmp_path)
    with pytest.raises(NotFound, match="is no file"):
        import_file(library, tmp_path / "nothing.gguf")
    assert not library.root.exists()


def test_what_is_there_is_never_replaced(library: Library, source: Path) -> None:
    imported = import_file(library, source)
    source.write_bytes(model(name="another"))
    for how in ("copy", "move", "link", "symlink"):
        with pytest.raises(UsageError, match="is in the library already"):
            import_file(library, source, how)
    assert library.find("my.model-1b") == imported
    assert import_file(library, source, "copy", "me/second").name == "me/second:Q4_K_M"


@pytest.mark.parametrize("name", ["../x", "a/../b", "x", "a/b/c", "/abs/x", "a b/c", "con/x", "a/b.git"])
def test_names_that_cannot_be(library: Library, source: Path, name: str) -> None:
    with pytest.raises(UsageError):
        import_file(library, source, "copy", name)
    assert not library.root.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("filename", [".hidden.gguf", "a:b.gguf", "nul.gguf", "x\x1b[31m.gguf"])
def test_file_names_that_cannot_be_everywhere(library: Library, tmp_path: Path, filename: str) -> None:
    path = tmp_path / filename
    path.write_bytes(model())
    with pytest.raises(UsageError, match="cannot be a file name"):
        import_file(library, path)


def test_a_file_without_the_suffix_is_named_after_what_it_is(library: Library, tmp_path: Path, demo_small: Path) -> None:
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(demo_small.read_bytes())
    assert import_file(library, blob, "copy", "me/small").path.name == "small-Q8_0.gguf"


def test_too_little_room(library: Library, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr("shutil.disk_usage", lambda path: real(path)._replace(free=10))
    with pytest.raises(DoesNotFit, match="importing My.Model-1B-Q4_K_M.gguf needs"):
        import_file(library, source)
    assert import_file(library, source, "link").path.exists(), "a link needs no room"


def test_a_copy_that_fails_leaves_nothing(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [tmp_path / f"big-Q8_0-0000{n + 1}-of-00002.gguf" for n in range(2)]
    for n, path in enumerate(parts):
        path.write_bytes(part(n, 2))
    done: list[Path] = []

    def copy(source: Path, target: Path, *_: object) -> str:
        target.write_bytes(source.read_bytes()[:100])
        if done:
            raise OSError(28, "No space left on device")
        done.append(target)
        return "0" * 64

    monkeypatch.setattr("localllm.library.importing._clone", lambda *_: False)
    monkeypatch.setattr("localllm.library.importing._copy", copy)
    with pytest.raises(DoesNotFit, match="is full"):
        import_file(library, parts[0])
    assert not [path for path in library.root.rglob("*") if path.is_file()]
    assert all(path.exists() for path in parts)


def test_two_at_once_do_not_mix(library: Library, source: Path) -> None:
    target = library.root / "local" / "My.Model-1B" / source.name
    target.parent.mkdir(parents=True)
    with FileLock(f"{target}.lock"), pytest.raises(LocalLLMError, match="another localllm is fetching"):
        import_file(library, source)
    assert not target.exists()


def test_the_models_folder_itself_may_hold_the_file(library: Library, put: Put) -> None:
    path = put("loose-Q8_0.gguf")
    assert import_file(library, path, "move", "me/loose").name == "me/loose:Q8_0"
    assert not path.exists()


@pytest.mark.parametrize(
    "filename, repo",
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "local/Llama-3.2-1B-Instruct"),
        ("thing.UD-Q2_K_XL-00001-of-00004.gguf", "local/thing"),
        ("My model (v2).gguf", "local/My-model-v2"),
        ("Q8_0.gguf", "local/model"),
        ("..--..gguf", "local/model"),
        ("x" * 150 + ".gguf", "local/" + "x" * 96),
        ("模型.gguf", "local/model"),
    ],
)
def test_default_names(filename: str, repo: str) -> None:
    assert default_repo(filename) == repo


def test_a_models_folder_that_cannot_be_made_is_said_to_be_so(library: Library, source: Path) -> None:
    library.root.parent.mkdir(parents=True)
    library.root.write_text("a file")
    with pytest.raises(UsageError, match="cannot write"):
        import_file(library, source)


def test_a_name_that_no_file_may_have_has_a_next_step(library: Library, source: Path) -> None:
    for name, why in ((".hidden.gguf", "begins with a dot"), ("con.gguf", "Windows reserves it")):
        source = source.rename(source.with_name(name))
        with pytest.raises(UsageError, match=why) as caught:
            import_file(library, source)
        assert caught.value.hint == "rename the file, then import it"


def test_a_failed_import_leaves_no_folder(library: Library, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("localllm.library.importing._clone", lambda *_: False)
    monkeypatch.setattr("localllm.library.importing._copy", full)
    with pytest.raises(DoesNotFit):
        import_file(library, source)
    assert not list(library.root.iterdir())
