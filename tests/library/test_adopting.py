from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from localllm.errors import LocalLLMError, ModelError, NotFound, UsageError
from localllm.library import Library, resolve_model
from localllm.library.adopting import adopt, adoptable, candidates, choose, find_others
from localllm.library.disk import usage

from .conftest import Put, model, part


@pytest.fixture
def user(library: Library, tmp_path: Path) -> Path:
    """The home directory where other programs keep their files; the fixture `library` makes it this test's."""
    return tmp_path / "user"


def lm_studio(user: Path, name: str, data: bytes) -> Path:
    path = user / ".lmstudio" / "models" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def ollama(user: Path, name: str, data: bytes) -> Path:
    sha256 = hashlib.sha256(data).hexdigest()
    blob = user / ".ollama" / "models" / "blobs" / f"sha256-{sha256}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    manifest = user / ".ollama" / "models" / "manifests" / "registry.ollama.ai" / "library" / name.replace(":", "/")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{sha256}"}]}))
    return blob


def test_an_adopted_model_works_like_any_other_and_is_not_copied(library: Library, user: Path, demo_small: Path) -> None:
    blob = ollama(user, "tiny:1m", demo_small.read_bytes())
    [found] = find_others()
    adopted = adopt(library, found)
    assert (adopted.name, adopted.path, adopted.how) == ("ollama/tiny:1m", blob, "adopted")
    assert adopted.sha256s == (found.sha256s[0],)
    assert (adopted.quant, adopted.n_params) == ("Q8_0", 885504)
    assert Library().find("tiny:1m") == adopted
    assert resolve_model("tiny") == blob
    assert not library.root.exists()
    assert usage(library).adopted_bytes == demo_small.stat().st_size
    assert [one.state for one in library.verify(adopted)] == ["ok"]


def test_rm_forgets_an_adopted_model_and_keeps_its_files(library: Library, user: Path) -> None:
    blob = ollama(user, "tiny:1m", model())
    adopted = adopt(library, find_others()[0])
    removed = library.remove(adopted)
    assert (removed.freed_bytes, removed.deleted, removed.forgotten) == (0, (), (blob,))
    assert blob.exists()
    with pytest.raises(NotFound):
        library.find("ollama/tiny:1m")


def test_a_split_model_is_adopted_whole(library: Library, user: Path) -> None:
    paths = [lm_studio(user, f"u/r/m-Q8_0-0000{n + 1}-of-00002.gguf", part(n, 2)) for n in range(2)]
    adopted = adopt(library, find_others()[0])
    assert (adopted.name, adopted.files, adopted.problem) == ("u/r:Q8_0", tuple(paths), "")
    paths[1].unlink()
    assert library.find("u/r").problem == "1 of its 2 parts are missing"


def test_an_adopted_file_that_its_owner_deleted_is_listed_as_gone(library: Library, user: Path) -> None:
    path = lm_studio(user, "u/r/m-Q8_0.gguf", model())
    adopt(library, find_others()[0])
    path.unlink()
    assert library.find("u/r").problem == "the file is gone"
    with pytest.raises(ModelError, match="the file is gone"):
        resolve_model("u/r")


def test_what_cannot_be_adopted(library: Library, user: Path) -> None:
    ollama(user, "gone:1b", model()).unlink()
    lm_studio(user, "u/bad/m-Q8_0.gguf", b"GGUF" + bytes(64))
    found = find_others()
    with pytest.raises(LocalLLMError, match="its blob is missing"):
        adopt(library, choose(found, "ollama/gone:1b"))
    with pytest.raises(ModelError):
        adopt(library, choose(found, "u/bad:Q8_0"))
    assert [one.how for one in library.models()] == ["built-in", "built-in"]


def test_choose_is_exact(library: Library, user: Path) -> None:
    path = lm_studio(user, "u/r/one-Q8_0.gguf", model())
    lm_studio(user, "u/r/two-Q8_0.gguf", model())
    found = find_others()
    assert choose(found, str(path)).path == path
    with pytest.raises(NotFound, match="is ambiguous") as caught:
        choose(found, "U/R:q8_0")
    assert str(path) in caught.value.hint
    with pytest.raises(NotFound, match="no other program keeps"):
        choose(found, "u/r")


def test_copies_are_found_by_hash_and_only_files_of_equal_size_are_read(library: Library, user: Path, put: Put) -> None:
    same, other, alone = model(name="aaaa"), model(name="bbbb"), model(name="a name of another length, well beyond the alignment")
    blob = ollama(user, "same:1b", same)
    studio = lm_studio(user, "u/same/m-Q8_0.gguf", same)
    different = lm_studio(user, "u/other/m-Q8_0.gguf", other)
    lm_studio(user, "u/alone/m-Q8_0.gguf", alone)
    ours = put("me/same/m-Q8_0.gguf", same)
    found = find_others()
    assert {path for files in candidates(library, found) for path in files} == {studio, different, ours}
    seen = {one.found.name: one for one in adoptable(library, found)}
    assert seen["ollama/same:1b"].copies == ("LM Studio u/same:Q8_0", "localllm me/same:Q8_0")
    assert seen["u/same:Q8_0"].copies == ("Ollama ollama/same:1b", "localllm me/same:Q8_0")
    assert seen["u/other:Q8_0"].copies == seen["u/alone:Q8_0"].copies == ()
    assert not any(candidates(library, found)), "hashes are remembered"
    assert seen["ollama/same:1b"].to_json()["sha256s"] == [hashlib.sha256(blob.read_bytes()).hexdigest()]
    studio.write_bytes(other)
    assert {one.found.name: one.copies for one in adoptable(library, found)}["u/same:Q8_0"] == ("LM Studio u/other:Q8_0",)


def test_a_second_name_for_the_same_file_is_no_copy(library: Library, user: Path) -> None:
    path = lm_studio(user, "u/r/m-Q8_0.gguf", model())
    twin = lm_studio(user, "v/r/m-Q8_0.gguf", b"")
    twin.unlink()
    twin.hardlink_to(path)
    assert [one.copies for one in adoptable(library, find_others())] == [(), ()]


def test_split_copies_are_compared_part_by_part(library: Library, user: Path) -> None:
    for publisher in ("u", "v", "w"):
        for n in range(2):
            data = part(n, 2)
            lm_studio(user, f"{publisher}/r/m-Q8_0-0000{n + 1}-of-00002.gguf", data[:-1] + b"x" if (publisher, n) == ("w", 1) else data)
    copies = {one.found.name: one.copies for one in adoptable(library, find_others())}
    assert copies == {"u/r:Q8_0": ("LM Studio v/r:Q8_0",), "v/r:Q8_0": ("LM Studio u/r:Q8_0",), "w/r:Q8_0": ()}


def test_what_is_adopted_is_said(library: Library, user: Path) -> None:
    lm_studio(user, "u/r/m-Q8_0.gguf", model())
    assert [one.adopted for one in adoptable(library, find_others())] == [False]
    adopt(library, find_others()[0])
    [again] = adoptable(library, find_others())
    assert again.adopted
    assert again.copies == (), "it is no copy of itself"


def test_any_folder_can_be_looked_at(library: Library, user: Path, tmp_path: Path) -> None:
    lm_studio(user, "u/r/m-Q8_0.gguf", model())
    stick = tmp_path / "stick" / "a"
    stick.mkdir(parents=True)
    (stick / "m-Q4_0.gguf").write_bytes(model())
    [found] = find_others([tmp_path / "stick"])
    assert found.path == stick / "m-Q4_0.gguf"
    assert adopt(library, found).path == found.path


def test_an_adopted_model_and_one_of_ours_may_share_a_name(library: Library, user: Path, put: Put) -> None:
    theirs = lm_studio(user, "u/r/m-Q8_0.gguf", model())
    put("u/r/m-Q8_0.gguf")
    adopt(library, find_others()[0])
    with pytest.raises(NotFound, match="is ambiguous") as caught:
        library.find("u/r:Q8_0")
    assert str(theirs) in caught.value.hint
    assert library.find(str(theirs)).how == "adopted"
    assert library.find("u/r/m-Q8_0.gguf").how == "found"


def test_what_is_in_the_models_folder_is_not_adopted(library: Library, put: Put) -> None:
    put("user/repo/m-Q8_0.gguf")
    [found] = find_others([library.root])
    with pytest.raises(UsageError, match="is in the models folder"):
        adopt(library, found)
    assert library.find("user/repo").how == "found"


def test_an_adopted_folder_that_becomes_the_models_folder_is_listed_once(
    library: Library, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lm_studio(user, "user/repo/m-Q8_0.gguf", model())
    [found] = find_others()
    adopt(library, found)
    monkeypatch.setenv("LOCALLLM_MODELS_DIR", str(user / ".lmstudio" / "models"))
    assert [each.path for each in Library().models() if each.how != "built-in"] == [path]
