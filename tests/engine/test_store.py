"""States in RAM stay under the cap; states on disk are whole, private, and never trusted."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.engine import store as module
from localllm.engine.store import Checkpoint, Entry, StateStore

CHAT = Entry([1, 2, 3, 4], b"state" * 100, (Checkpoint(2, b"two"), Checkpoint(3, b"three")))


def disk_store(folder: Path, key: str = "model", **sizes: int) -> StateStore:
    return StateStore(key, ram_bytes=sizes.get("ram", 1 << 20), directory=folder, disk_bytes=sizes.get("disk", 1 << 20))


def loaded(store: StateStore, session: str, tokens: list[int]) -> Entry | None:
    store.load_session(session)
    return next((entry for entry, _ in store.matches(tokens)), None)


def test_a_session_comes_back_in_a_new_process(tmp_path: Path) -> None:
    assert disk_store(tmp_path).save_session("chat", CHAT)
    assert loaded(disk_store(tmp_path), "chat", CHAT.tokens) == CHAT


def test_another_model_or_setting_does_not_see_the_session(tmp_path: Path) -> None:
    disk_store(tmp_path).save_session("chat", CHAT)
    assert loaded(disk_store(tmp_path, key="other"), "chat", CHAT.tokens) is None


def test_a_file_of_another_model_moved_here_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk_store(tmp_path, key="other").save_session("chat", CHAT)
    (tmp_path / "other").rename(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "localllm.engine"):
        assert loaded(disk_store(tmp_path), "chat", CHAT.tokens) is None
    assert "another model" in caplog.text


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d[:20], lambda d: b"", lambda d: d[:-5] + b"XXXXX"])
def test_a_damaged_file_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    disk_store(tmp_path).save_session("chat", CHAT)
    (path,) = tmp_path.glob("*/*.kv")
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, "localllm.engine"):
        assert loaded(disk_store(tmp_path), "chat", CHAT.tokens) is None
    assert str(path) in caplog.text


@given(st.binary(max_size=300))
def test_no_bytes_at_all_crash_the_reader(data: bytes) -> None:
    for candidate in (data, module.MAGIC + data, module.MAGIC + b'{"key": "k", "n_tokens": 1' + data):
        with pytest.raises(ValueError, match=r"not a state file|damaged|incomplete|another model"):
            module._decode("k", candidate)


def test_a_full_disk_leaves_the_old_state_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_store(tmp_path).save_session("chat", CHAT)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_atomic", full)
    with caplog.at_level(logging.WARNING, "localllm.engine"):
        assert not disk_store(tmp_path).save_session("chat", Entry([9], b"new"))
    assert "No space left" in caplog.text
    assert loaded(disk_store(tmp_path), "chat", CHAT.tokens) == CHAT


def test_state_files_are_private(tmp_path: Path) -> None:
    disk_store(tmp_path).save_session("chat", CHAT)
    (path,) = tmp_path.glob("*/*.kv")
    assert path.stat().st_mode & 0o077 == 0
    assert "chat" not in path.name


def test_the_disk_cap_drops_the_oldest_session(tmp_path: Path) -> None:
    store = disk_store(tmp_path, disk=1500)
    for i, name in enumerate("abc"):
        store.save_session(name, CHAT)
        path = store._path(name)
        assert path is not None
        if path.exists():
            import os

            os.utime(path, (i, i))
    assert loaded(disk_store(tmp_path), "a", CHAT.tokens) is None
    assert loaded(disk_store(tmp_path), "c", CHAT.tokens) == CHAT
    assert sum(p.stat().st_size for p in tmp_path.glob("*/*.kv")) <= 1500 + 1024


def test_without_a_directory_nothing_is_written(tmp_path: Path) -> None:
    store = StateStore("model", ram_bytes=1 << 20)
    assert not store.save_session("chat", CHAT)
    assert loaded(store, "chat", CHAT.tokens) is None


def test_ram_holds_the_most_recent_under_its_cap() -> None:
    store = StateStore("model", ram_bytes=250)
    for first in range(5):
        store.put(Entry([first], b"x" * 96))
    assert store.used_bytes <= 250
    assert [list(store.matches([first])) != [] for first in range(5)] == [False, False, False, True, True]


def test_a_longer_state_replaces_its_own_beginning() -> None:
    store = StateStore("model", ram_bytes=1000)
    store.put(Entry([1, 2], b"ab"))
    store.put(Entry([1, 2, 3], b"abc"))
    assert [(e.tokens, n) for e, n in store.matches([1, 2, 3, 4])] == [([1, 2, 3], 3)]


def test_a_state_larger_than_the_cap_is_not_kept() -> None:
    store = StateStore("model", ram_bytes=10)
    store.put(Entry([1], b"x" * 100))
    assert store.used_bytes == 0
