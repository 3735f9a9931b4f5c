from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from localllm.amounts import amount
from localllm.download.partial import Identity, Partial, Record, check_space, disk_error
from localllm.download.spans import Spans
from localllm.errors import DoesNotFit, UsageError

IDENTITY = Identity("user/repo", "c" * 40, "m.gguf", 1000, "a" * 64, "a" * 64)


@pytest.fixture
def partial(tmp_path: Path) -> Partial:
    return Partial(tmp_path / "m.gguf")


def test_a_record_is_read_back(partial: Partial) -> None:
    partial.begin(1000)
    partial.save(Record(IDENTITY, '"cdn"', Spans([(0, 10), (500, 600)])))
    record = partial.read()
    assert record is not None
    assert record.identity == IDENTITY
    assert record.validator == '"cdn"'
    assert list(record.done) == [(0, 10), (500, 600)]


def test_a_new_file_has_its_size_and_takes_no_space(partial: Partial) -> None:
    partial.begin(1 << 30)
    assert partial.data.stat().st_size == 1 << 30
    if hasattr(os.stat_result, "st_blocks"):
        assert partial.allocated_bytes() < 1 << 20


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: {},
        lambda raw: [],
        lambda raw: {**raw, "format": 2},
        lambda raw: {**raw, "done": [[0, 1001]]},
        lambda raw: {**raw, "done": [[-1, 5]]},
        lambda raw: {**raw, "done": [[5, 5]]},
        lambda raw: {**raw, "done": ["x"]},
        lambda raw: {**raw, "identity": {**raw["identity"], "size_bytes": 999}},
        lambda raw: {**raw, "identity": {"repo": "user/repo"}},
    ],
)
def test_a_record_that_makes_no_sense_is_no_record(partial: Partial, spoil) -> None:
    partial.begin(1000)
    partial.save(Record(IDENTITY, "", Spans([(0, 10)])))
    partial.record.write_text(json.dumps(spoil(json.loads(partial.record.read_text()))))
    assert partial.read() is None


def test_a_record_without_its_data_is_no_record(partial: Partial) -> None:
    assert partial.read() is None
    partial.begin(1000)
    partial.save(Record(IDENTITY, "", Spans([(0, 10)])))
    partial.data.unlink()
    assert partial.read() is None
    partial.record.write_bytes(b"\0" * 100)
    assert partial.read() is None


def test_discard_leaves_nothing_not_even_what_a_killed_save_left(partial: Partial) -> None:
    partial.begin(10)
    partial.save(Record(IDENTITY, "", Spans()))
    (partial.data.parent / ".m.gguf.part.json.abc123.tmp").write_text("{")
    partial.discard()
    assert list(partial.data.parent.iterdir()) == []


def test_the_data_is_flushed_before_the_record_is_written(partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    partial.begin(1000)
    order: list[str] = []
    monkeypatch.setattr("localllm.download.partial._flush", lambda descriptor: order.append("flush"))
    monkeypatch.setattr("localllm.download.partial.write_atomic", lambda path, data: order.append(path.name))
    partial.save(Record(IDENTITY, "", Spans([(0, 10)])))
    assert order == ["flush", "m.gguf.part.json"]


@pytest.mark.parametrize(
    "change, same",
    [
        ({"commit": "d" * 40, "repo": "other/mirror", "path": "n.gguf"}, True),
        ({"etag": "e" * 64}, True),
        ({"sha256": "b" * 64, "etag": "b" * 64}, False),
        ({"size_bytes": 1001}, False),
        ({"sha256": None}, True),
        ({"sha256": None, "etag": "b"}, False),
        ({"sha256": None, "etag": ""}, False),
    ],
)
def test_content_decides_whether_bytes_can_be_used(change: dict[str, object], same: bool) -> None:
    other = Identity(**{name: change.get(name, getattr(IDENTITY, name)) for name in Identity.__dataclass_fields__})
    assert IDENTITY.same_content(other) is same
    assert other.same_content(IDENTITY) is same


def test_only_one_has_the_lock_and_it_leaves_no_file(partial: Partial) -> None:
    waits: list[float] = []
    first_has_it, second_waits = threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        with Partial(partial.target).locked(waits.append):
            first_has_it.set()
            assert second_waits.wait(20)
            order.append("first")

    def waiting(waited_s: float) -> None:
        waits.append(waited_s)
        second_waits.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert first_has_it.wait(20)
    with partial.locked(waiting):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert waits[0] == 0.0
    assert list(partial.target.parent.iterdir()) == []


def test_too_little_space_is_said_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    check_space(tmp_path, 3 * 10**9, "m.gguf")
    with pytest.raises(DoesNotFit, match=r"m\.gguf needs 5\.0 GB on the disk of .*, and 3\.0 GB are free") as caught:
        check_space(tmp_path / "not" / "yet", 5 * 10**9, "m.gguf")
    assert "free 2.0 GB" in caught.value.hint


@pytest.mark.parametrize(
    "number, kind, words",
    [
        (errno.ENOSPC, DoesNotFit, "is full; what was fetched is kept"),
        (errno.EDQUOT, DoesNotFit, "is full"),
        (errno.EFBIG, DoesNotFit, "does not take a file as large as m.gguf"),
        (errno.EACCES, UsageError, "Permission denied"),
    ],
)
def test_disk_errors_are_explained(number: int, kind: type[Exception], words: str) -> None:
    error = disk_error(Path("/models/m.gguf.part"), OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert words in error.message
    assert error.hint


@pytest.mark.parametrize("n, text", [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (4.9e9, "4.9 GB"), (2e12, "2.0 TB")])
def test_amounts_read_as_on_the_hub(n: float, text: str) -> None:
    assert amount(n) == text
