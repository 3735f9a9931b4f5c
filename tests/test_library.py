from __future__ import annotations

from pathlib import Path

import pytest

from localllm.demo import demo_models
from localllm.errors import ModelError, NotFound
from localllm.library import resolve_model


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


def test_a_name_wins_over_a_file_and_a_path_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_bytes(b"GGUF")
    assert resolve_model("demo") == demo_models()["demo"]
    assert resolve_model("./demo") == tmp_path / "demo"


@pytest.mark.parametrize("name, hint", [("dmeo", "demo"), ("demo-smal", "demo-small"), ("llama3.3:70b", "use demo"), ("", "use demo")])
def test_an_unknown_name_gets_neighbours(name: str, hint: str) -> None:
    with pytest.raises(NotFound) as caught:
        resolve_model(name)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 3


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
