from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from localllm.demo import demo_models
from localllm.errors import NotFound, UsageError
from localllm.library import Library, LocalModel
from localllm.library.model import IMPORTED, PULLED

from .conftest import Put, model, part


def listed(library: Library) -> dict[str, LocalModel]:
    return {model.name: model for model in library.models() if model.how != "built-in"}


def test_an_empty_library_has_the_built_in_models_and_writes_no_model_folder(library: Library, home: Path) -> None:
    models = library.models()
    assert [(model.name, model.how, model.quant) for model in models] == [
        ("demo-large", "built-in", "Q8_0"),
        ("demo-small", "built-in", "Q8_0"),
    ]
    assert models[0].path == demo_models()["demo"]
    assert not (home / "models").exists()


def test_a_file_put_there_by_hand_is_listed(library: Library, put: Put, demo_small: Path) -> None:
    path = put("user/repo/thing-Q8_0.gguf", demo_small.read_bytes())
    [found] = listed(library).values()
    assert (found.name, found.path, found.files, found.how) == ("user/repo:Q8_0", path, (path,), "found")
    assert (found.quant, found.architecture, found.n_params, found.n_ctx_train) == ("Q8_0", "llama", 885504, 1024)
    assert found.size_bytes == demo_small.stat().st_size
    assert found.sha256s == ("",)
    assert not found.problem


def test_the_name_says_the_quantisation_of_the_file_name_of_the_folder_or_of_the_header(
    library: Library, put: Put, demo_small: Path
) -> None:
    put("u/a/x.UD-Q4_K_XL.gguf")
    put("u/b/Q6_K/x.gguf")
    put("u/c/x.gguf", demo_small.read_bytes())
    assert set(listed(library)) == {"u/a:UD-Q4_K_XL", "u/b:Q6_K", "u/c:Q8_0"}


def test_models_that_would_share_a_name_are_named_by_their_path(library: Library, put: Put) -> None:
    put("u/r/one-Q8_0.gguf")
    put("u/r/two-Q8_0.gguf")
    put("u/r/two-Q4_0.gguf")
    put("loose-Q8_0.gguf")
    assert set(listed(library)) == {"u/r/one-Q8_0.gguf", "u/r/two-Q8_0.gguf", "u/r:Q4_0", "loose-Q8_0.gguf"}


def test_a_split_model_is_one_entry(library: Library, put: Put) -> None:
    paths = [put(f"u/r/m-Q8_0-0000{n + 1}-of-00003.gguf", part(n, 3)) for n in range(3)]
    put("u/r/half-Q4_0-00001-of-00002.gguf", part(0, 2))
    models = listed(library)
    whole = models["u/r:Q8_0"]
    assert whole.files == tuple(paths)
    assert whole.size_bytes == sum(path.stat().st_size for path in paths)
    assert not whole.problem
    assert models["u/r:Q4_0"].problem == "1 of its 2 parts are missing"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(100), bytes(range(256)) * 4], ids=["empty", "magic", "zeros", "noise"])
def test_a_broken_file_is_listed_with_its_problem(library: Library, put: Put, content: bytes) -> None:
    put("u/good/m-Q8_0.gguf")
    put("u/bad/m-Q8_0.gguf", content)
    models = listed(library)
    assert models["u/bad:Q8_0"].problem
    assert not models["u/good:Q8_0"].problem


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
def test_links_are_followed_and_dead_ones_are_listed(library: Library, put: Put, tmp_path: Path, demo_small: Path) -> None:
    (library.root / "u").mkdir(parents=True)
    elsewhere = tmp_path / "disk" / "repo"
    elsewhere.mkdir(parents=True)
    (elsewhere / "m-Q8_0.gguf").write_bytes(demo_small.read_bytes())
    (elsewhere / "loop").symlink_to(library.root)
    (library.root / "u" / "repo").symlink_to(elsewhere)
    (library.root / "u" / "gone-Q8_0.gguf").symlink_to(tmp_path / "nothing")
    models = listed(library)
    assert set(models) == {"u/repo:Q8_0", "u/gone-Q8_0.gguf"}
    assert models["u/gone-Q8_0.gguf"].problem == "the file is gone"


def test_hidden_and_unfinished_files_are_no_models(library: Library, put: Put) -> None:
    for key in ("u/r/.m.gguf", "u/r/m.gguf.part", "u/r/m.gguf.part.json", "u/r/m.gguf.lock", "u/r/README.md"):
        put(key)
    assert not listed(library)


def test_side_files_are_named_by_path_and_marked(library: Library, put: Put) -> None:
    put("u/r/m-F16.gguf")
    put("u/r/mmproj-m-F16.gguf")
    models = listed(library)
    assert set(models) == {"u/r:F16", "u/r/mmproj-m-F16.gguf"}
    assert models["u/r/mmproj-m-F16.gguf"].is_side_file
    assert library.find("u/r").name == "u/r:F16"


def test_headers_are_read_once(library: Library, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(100):
        put(f"u/r{n}/m-Q8_0.gguf")
    first = library.models()

    def unexpected(path: Path) -> None:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("localllm.gguf.read_model", unexpected)
    assert library.models() == first
    (library.root / "u/r7/m-Q8_0.gguf").write_bytes(model(name="another"))
    with pytest.raises(AssertionError, match="r7"):
        library.models()


def test_a_ledger_that_cannot_be_written_does_not_stop_a_list(library: Library, put: Put, home: Path) -> None:
    put("u/r/m-Q8_0.gguf")
    (home / "library.json.lock").mkdir()
    assert "u/r:Q8_0" in listed(library)


def test_record_keeps_what_the_file_cannot_say(library: Library, put: Put) -> None:
    path = put("user/repo/m-Q4_K_M.gguf")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    recorded = library.record(
        path, how=PULLED, sha256s={path: sha256}, repo="user/repo", revision="main", commit="c" * 40, catalog_name="thing:1b"
    )
    again = Library().find("thing:1b")
    assert again == recorded
    assert (again.how, again.sha256s, again.repo, again.commit, again.catalog_name) == (
        "pulled",
        (sha256,),
        "user/repo",
        "c" * 40,
        "thing:1b",
    )
    assert again.added.endswith("+00:00")


def test_a_changed_file_is_noticed(library: Library, put: Put) -> None:
    path = put("u/r/m-Q8_0.gguf")
    library.verify(library.find("u/r"))
    assert library.find("u/r").sha256s[0]
    path.write_bytes(model(name="something longer than it was"))
    changed = library.find("u/r")
    assert changed.changed
    assert changed.sha256s == ("",)


def test_verify_records_then_confirms_then_finds_damage(library: Library, put: Put) -> None:
    path = put("u/r/m-Q8_0.gguf")
    data = path.read_bytes()
    progress: list[int] = []
    [first] = library.verify(library.find("u/r"), progress.append)
    assert (first.state, first.sha256, first.expected) == ("recorded", hashlib.sha256(data).hexdigest(), "")
    assert sum(progress) == len(data)
    assert [one.state for one in library.verify(library.find("u/r"))] == ["ok"]

    # Damage that leaves size and time as they were, as a failing disk does.
    status = path.stat()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    [damaged] = library.verify(library.find("u/r"))
    assert (damaged.state, damaged.expected) == ("mismatch", first.sha256)
    [still] = library.verify(library.find("u/r"))
    assert still.state == "mismatch", "a wrong hash is never recorded"

    # Restored from a backup: another time, the same content.
    path.write_bytes(data)
    assert library.find("u/r").changed
    assert [one.state for one in library.verify(library.find("u/r"))] == ["ok"]
    assert not library.find("u/r").changed


def test_verify_hashes_every_part(library: Library, put: Put) -> None:
    for n in range(2):
        put(f"u/r/m-Q8_0-0000{n + 1}-of-00002.gguf", part(n, 2))
    assert [one.state for one in library.verify(library.find("u/r"))] == ["recorded", "recorded"]
    assert all(library.find("u/r").sha256s)


def test_verify_of_a_file_that_cannot_be_read(library: Library, put: Put) -> None:
    path = put("u/r/m-Q8_0.gguf")
    model = library.find("u/r")
    path.unlink()
    [one] = library.verify(model)
    assert (one.state, one.detail) == ("unreadable", "No such file or directory")


def test_remove_deletes_the_files_their_notes_and_empty_folders(library: Library, put: Put, home: Path) -> None:
    paths = [put(f"u/r/m-Q8_0-0000{n + 1}-of-00002.gguf", part(n, 2)) for n in range(2)]
    put("u/other/m-Q8_0.gguf")
    size = sum(path.stat().st_size for path in paths)
    library.verify(library.find("u/r"))
    removed = library.remove(library.find("u/r"))
    assert (removed.name, removed.freed_bytes, removed.deleted, removed.forgotten) == ("u/r:Q8_0", size, tuple(paths), ())
    assert sorted(path.name for path in (home / "models" / "u").iterdir()) == ["other"]
    assert "m-Q8_0-0000" not in (home / "library.json").read_text()


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
def test_remove_never_deletes_what_a_link_leads_to(library: Library, put: Put, tmp_path: Path, demo_small: Path) -> None:
    original = tmp_path / "m-Q8_0.gguf"
    original.write_bytes(demo_small.read_bytes())
    link = library.root / "u/r/m-Q8_0.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(original)
    second = library.root / "u/s/m-Q8_0.gguf"
    second.parent.mkdir(parents=True)
    os.link(original, second)
    assert library.remove(library.find("u/r")).freed_bytes == 0
    assert library.remove(library.find("u/s")).freed_bytes == 0
    assert original.read_bytes() == demo_small.read_bytes()
    assert not list(library.root.rglob("*.gguf"))


def test_a_built_in_model_is_not_removed(library: Library) -> None:
    with pytest.raises(UsageError, match="demo-large is built in"):
        library.remove(library.find("demo"))
    assert demo_models()["demo"].exists()


def test_aliases(library: Library, put: Put) -> None:
    put("u/r/m-Q8_0.gguf")
    library.set_alias("mine", "u/r")
    library.set_alias("later", "llama3.3:70b")
    library.set_alias("chain", "mine")
    assert library.aliases() == {"chain": "mine", "later": "llama3.3:70b", "mine": "u/r"}
    assert library.find("chain").name == "u/r:Q8_0"
    library.remove_alias("mine")
    assert "mine" not in library.aliases()
    with pytest.raises(NotFound, match="no alias is called 'mine'"):
        library.remove_alias("mine")


def test_an_alias_of_a_path_does_not_depend_on_where_one_is(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    library.set_alias("mine", "./m.gguf")
    assert library.aliases() == {"mine": str(tmp_path / "m.gguf")}


@pytest.mark.parametrize(
    "alias, target, match",
    [
        ("a/b", "demo", "cannot be an alias"),
        ("../x", "demo", "cannot be an alias"),
        ("x.gguf", "demo", "cannot be an alias"),
        ("a\x1b", "demo", "no model reference"),
        ("demo", "u/r", "is a built-in model"),
        ("same", "same", "would stand for itself"),
        ("one", "two", "would stand for itself"),
        ("new", "a b", "no model name"),
    ],
)
def test_aliases_that_make_no_sense(library: Library, alias: str, target: str, match: str) -> None:
    library.set_alias("two", "one")
    with pytest.raises(UsageError, match=match):
        library.set_alias(alias, target)
    assert library.aliases() == {"two": "one"}


def test_models_dir_moves_the_folder(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALLLM_MODELS_DIR", str(tmp_path / "big disk"))
    moved = Library()
    assert moved.root == tmp_path / "big disk"
    (moved.root / "u/r").mkdir(parents=True)
    (moved.root / "u/r/m-Q8_0.gguf").write_bytes(model())
    assert moved.find("u/r").path == moved.root / "u/r/m-Q8_0.gguf"


def test_json_keys_are_fixed(library: Library, put: Put) -> None:
    put("u/r/m-Q8_0.gguf")
    library.record(library.find("u/r").path, how=IMPORTED)
    assert " ".join(library.find("u/r").to_json()) == (
        "name path files size_bytes quant architecture n_params n_ctx_train sha256s repo revision commit catalog_name "
        "added how problem changed is_side_file"
    )


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights")
def test_a_model_in_a_folder_with_two_names_can_be_recorded(library: Library, put: Put) -> None:
    put("a/r/m-Q8_0.gguf")
    (library.root / "b").symlink_to(library.root / "a")
    path = library.root / "b" / "r" / "m-Q8_0.gguf"
    assert library.record(path, how=IMPORTED).path == path
