from __future__ import annotations

import contextlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.errors import LocalLLMError
from localllm.library.ledger import Facts, FileNote, Ledger, LedgerFile, Origin


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path / "new" / "library.json")
    with file.edit() as ledger:
        ledger.files["a"] = FileNote("f" * 64, 5, 7)
        ledger.facts["a"] = Facts("5:7", "llama", "Q8_0", 9, 11, "")
        ledger.origins["a"] = Origin("pulled", "2026-01-01T00:00:00+00:00", repo="u/r")
        ledger.aliases["x"] = "u/r"
    assert LedgerFile(file.path).read() == ledger
    assert json.loads(file.path.read_bytes())["schema"] == 1


def test_an_error_inside_an_edit_writes_nothing(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path / "library.json")
    with contextlib.suppress(KeyError), file.edit() as ledger:
        ledger.aliases["x"] = "y"
        raise KeyError
    assert file.read() == Ledger()


def test_edits_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    def add(n: int) -> None:
        with LedgerFile(tmp_path / "library.json").edit() as ledger:
            ledger.aliases[f"a{n}"] = "demo"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert len(LedgerFile(tmp_path / "library.json").read().aliases) == 40


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"schema": 2, "aliases": {"a": "b"}}', b"[" * 100_000])
def test_an_unreadable_ledger_is_ignored_with_a_warning_and_kept(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "library.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert LedgerFile(path).read() == Ledger()
    assert str(path) in caplog.text
    with LedgerFile(path).edit() as ledger:
        ledger.aliases["x"] = "y"
    assert LedgerFile(path).read().aliases == {"x": "y"}
    assert (tmp_path / "library.json.bak").read_bytes() == content


def test_an_unreadable_ledger_is_not_set_aside_for_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "library.json"
    path.write_text('{"schema": 2}')
    LedgerFile(path).remember({"a": Facts("1:2")})
    assert path.read_text() == '{"schema": 2}'


def test_a_second_unreadable_ledger_does_not_replace_the_first(tmp_path: Path) -> None:
    path = tmp_path / "library.json"
    for content in ("{1", "{2", "{3"):
        path.write_text(content)
        with LedgerFile(path).edit():
            pass
    assert [(tmp_path / f"library.json.bak{n}").read_text() for n in ("", ".2", ".3")] == ["{1", "{2", "{3"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["sha256", "size_bytes", "mtime_ns", "how", "added", "stamp", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["files", "facts", "origins", "aliases", "other"]), VALUES | st.dictionaries(st.text(max_size=3), VALUES)
    )
)
def test_a_spoilt_ledger_reads_as_what_is_sound_in_it(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("spoilt") / "library.json"
    path.write_text(json.dumps({"schema": 1, **data}))
    ledger = LedgerFile(path).read()
    assert all(isinstance(note.sha256, str) and type(note.size_bytes) is int for note in ledger.files.values())
    assert all(isinstance(origin.how, str) for origin in ledger.origins.values())
    assert all(isinstance(target, str) for target in ledger.aliases.values())


def test_sound_notes_survive_spoilt_ones(tmp_path: Path) -> None:
    path = tmp_path / "library.json"
    good = {"sha256": "a", "size_bytes": 1, "mtime_ns": 2, "of a later version": True}
    path.write_text(json.dumps({"schema": 1, "files": {"good": good, "bad": {"sha256": 1}, "worse": []}, "aliases": {"a": "b", "c": 1}}))
    ledger = LedgerFile(path).read()
    assert ledger.files == {"good": FileNote("a", 1, 2)}
    assert ledger.aliases == {"a": "b"}


def test_a_folder_in_its_place_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalLLMError, match="cannot write"), LedgerFile(tmp_path / "file" / "library.json").edit():
        pass
