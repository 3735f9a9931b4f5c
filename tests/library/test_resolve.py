from __future__ import annotations

from pathlib import Path

import pytest

from localllm.catalog import load_catalog
from localllm.demo import demo_models
from localllm.errors import ModelError, NotFound
from localllm.library import Library, resolve_model

from .conftest import Put, part


@pytest.mark.parametrize("name", ["demo", "demo-large", "demo-small"])
def test_built_in_names_are_gguf_files(name: str) -> None:
    assert resolve_model(name).read_bytes()[:4] == b"GGUF"


def test_demo_is_the_large_one() -> None:
    assert resolve_model("demo") == resolve_model("demo-large") != resolve_model("demo-small")


def test_a_path_becomes_absolute(demo_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.gguf").write_bytes(demo_small.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert resolve_model("mine.gguf") == tmp_path / "mine.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve_model("~/mine.gguf") == tmp_path / "mine.gguf"


def test_a_name_wins_over_a_file_and_a_path_does_not(demo_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_bytes(demo_small.read_bytes())
    assert resolve_model("demo") == demo_models()["demo"]
    assert resolve_model("./demo") == tmp_path / "demo"


def test_any_part_of_a_split_model_means_the_first(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-0000{n + 1}-of-00002.gguf" for n in range(2)]
    for n, path in enumerate(paths):
        path.write_bytes(part(n, 2))
    assert resolve_model(str(paths[1])) == paths[0]


def test_library_alias_and_catalogue_names(library: Library, put: Put) -> None:
    path = put("user/repo/m-Q8_0.gguf")
    assert resolve_model("user/repo:Q8_0") == resolve_model("repo") == path
    library.set_alias("mine", "user/repo")
    library.set_alias("other", "demo-small")
    assert resolve_model("mine") == path
    assert resolve_model("other") == demo_models()["demo-small"]


def test_a_catalogue_name_means_the_file_of_its_repository_however_it_came(library: Library, put: Put) -> None:
    spec = next(spec for spec in load_catalog().models if not spec.built_in and spec.tag)
    pattern = spec.files["Q8_0"]
    path = put(f"{spec.repo}/{pattern.replace('*', 'x').replace('[0-9]', '1').replace('?', '1')}")
    assert resolve_model(spec.key) == path
    put(f"{spec.repo}/something-else.gguf")
    assert resolve_model(spec.key) == path, "another model of the repository is not meant"


def test_a_file_in_the_working_directory_wins_over_the_library(
    library: Library, put: Put, demo_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = put("m.gguf")
    assert resolve_model("m.gguf") == inside
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(demo_small.read_bytes())
    assert resolve_model("m.gguf") == tmp_path / "m.gguf"


def test_a_bare_name_of_the_catalogue_means_its_default_tag(library: Library, put: Put) -> None:
    catalog = load_catalog()
    name, default = next((name, tag) for name, tag in catalog.default_tags.items() if len(catalog.tags(name)) > 1)
    other = next(tag for tag in catalog.tags(name) if tag != default)
    paths = {}
    for tag in (default, other):
        paths[tag] = put(f"user/{tag}/m-Q8_0.gguf")
        library.record(paths[tag], how="pulled", catalog_name=f"{name}:{tag}")
    assert resolve_model(f"{name}:{other}") == paths[other]
    assert resolve_model(name) == paths[default]
    paths[default].unlink()
    spec = catalog.find(name)
    assert resolve_model(name) == paths[other], "there is no other"
    by_hand = put(f"{spec.repo}/{spec.files['Q8_0'].replace('*', 'x')}")
    assert resolve_model(name) == by_hand


@pytest.mark.parametrize(
    "name, hint", [("dmeo", "demo"), ("demo-smal", "demo-small"), ("llama3.3:70b", "localllm pull llama3.3:70b"), ("", "use demo")]
)
def test_an_unknown_name_gets_neighbours(name: str, hint: str) -> None:
    with pytest.raises(NotFound) as caught:
        resolve_model(name)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "~no-such-user/x", "a\x1b[31m", "../../../etc/passwd/x", "http://[", "\udcff"])
def test_odd_names_are_not_found(name: str) -> None:
    with pytest.raises(NotFound):
        resolve_model(name)


def test_a_mistyped_path_gets_the_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "qwen-7b.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotFound, match=r"qwen-7b\.gguf"):
        resolve_model(str(tmp_path / "qwen7b.gguf"))
    with pytest.raises(NotFound, match="is a directory") as caught:
        resolve_model(str(tmp_path))
    assert "qwen-7b.gguf" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04", b"ggjt1234"])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve_model(str(file))


def test_a_broken_file_is_refused_before_it_reaches_llama_cpp(library: Library, put: Put, tmp_path: Path) -> None:
    broken = put("u/r/m-Q8_0.gguf").read_bytes()[:-64]
    put("u/r/m-Q8_0.gguf", broken)
    with pytest.raises(ModelError, match="u/r:Q8_0 cannot be used") as caught:
        resolve_model("u/r")
    assert "localllm rm u/r:Q8_0" in caught.value.hint
    (tmp_path / "m.gguf").write_bytes(broken)
    with pytest.raises(ModelError):
        resolve_model(str(tmp_path / "m.gguf"))
