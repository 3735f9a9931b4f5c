"""The bandwidth measurement by a clock of our own, and the file that keeps it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from localllm.hardware.bandwidth import Measured, array_bytes, key, measure, recall, remember
from tests.hardware.recorded import GIB, MIB

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def clock(*steps_s: float) -> Callable[[], float]:
    """Moments that lie `steps_s` apart, over and over."""
    return itertools.accumulate(itertools.chain([100.0], itertools.cycle(steps_s))).__next__


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_best_pass_counts(threads: int) -> None:
    # passes of 4, 2 and 1 s, with no time in between
    rate = measure(threads, 6 * MIB, budget_s=0, clock=clock(0, 4, 0, 2, 0, 1))
    assert rate == 6 * MIB / 1


def test_passes_go_on_for_the_budget() -> None:
    moments = clock(0, 1)
    measure(1, MIB, budget_s=10, clock=moments)
    assert moments() == 100 + 10, "ten passes of a second each"


def test_every_byte_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    reads: list[tuple[int, int]] = []

    class Spy:
        @staticmethod
        def reduce(part: np.ndarray) -> int:
            reads.append((part.nbytes, np.count_nonzero(part) * part.itemsize))
            return 1

    monkeypatch.setattr(np, "maximum", Spy)
    measure(2, 2 * MIB, budget_s=0, clock=clock(1))
    assert reads == [(MIB, MIB)] * 6, "two threads, three passes, and no page that was never written"


def test_a_real_measurement_is_a_rate() -> None:
    assert measure(1, 8 * MIB, budget_s=0) > 0


@pytest.mark.parametrize(
    "cache, available, expected",
    [
        (0, None, 256 * MIB),
        (8 * MIB, None, 128 * MIB),
        (64 * MIB, None, 256 * MIB),
        (768 * MIB, None, GIB),
        (64 * MIB, 400 * MIB, 100 * MIB),
        (64 * MIB, 64 * GIB, 256 * MIB),
    ],
)
def test_the_array_outgrows_the_caches_but_not_the_machine(cache: int, available: int | None, expected: int) -> None:
    assert array_bytes(cache, available) == expected


def test_machines_are_kept_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "state" / "bandwidth.json"
    assert recall(file, key("M3", 12)) is None
    remember(file, key("M3", 12), 310e9, NOON)
    remember(file, key("M3", 4), 120e9, NOON)
    assert recall(file, key("M3", 12)) == Measured(310e9, "2026-11-23T12:00:00+00:00")
    assert recall(file, key("M3", 4)) == Measured(120e9, "2026-11-23T12:00:00+00:00")
    remember(file, key("M3", 4), 130e9, NOON)
    assert json.loads(file.read_text()) == {
        "schema": 1,
        "machines": {
            "M3 x 12": {"bytes_per_s": 310e9, "date": "2026-11-23T12:00:00+00:00"},
            "M3 x 4": {"bytes_per_s": 130e9, "date": "2026-11-23T12:00:00+00:00"},
        },
    }


@pytest.mark.parametrize(
    "content",
    [
        "",
        "rubbish",
        "[]",
        "\xff",
        '{"schema": 2, "machines": {"x": {"bytes_per_s": 1e9, "date": ""}}}',
        '{"schema": 1}',
        '{"schema": 1, "machines": []}',
        '{"schema": 1, "machines": {"x": {"bytes_per_s": 0, "date": ""}}}',
        '{"schema": 1, "machines": {"x": {"bytes_per_s": Infinity, "date": ""}}}',
        '{"schema": 1, "machines": {"x": {"bytes_per_s": NaN, "date": ""}}}',
        '{"schema": 1, "machines": {"x": {"bytes_per_s": 1e9}}}',
        '{"schema": 1, "machines": {"x": 1e9}}',
    ],
)
def test_a_file_that_cannot_be_used_is_measured_again(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bandwidth.json"
    file.write_bytes(content.encode("latin-1"))
    assert recall(file, "x") is None
    remember(file, "x", 5e9, NOON)
    assert recall(file, "x") == Measured(5e9, "2026-11-23T12:00:00+00:00")
