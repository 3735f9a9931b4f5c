from __future__ import annotations

import threading

import pytest

from localllm.download.rate import BURST_S, RateLimit, Speed


class Clock:
    """Time that passes only when someone waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limited(clock: Clock, bytes_per_second: int) -> RateLimit:
    limit = RateLimit(bytes_per_second, clock)

    def wait(timeout: float | None = None) -> bool:
        assert timeout is not None
        clock.now += max(timeout, 1e-6)
        return True

    limit._changed.wait = wait  # type: ignore[method-assign]
    return limit


@pytest.mark.parametrize("piece", [1000, 64 << 10, 1 << 20])
def test_the_limit_holds_over_any_pieces(clock: Clock, piece: int) -> None:
    limit, stop, total = limited(clock, 1_000_000), threading.Event(), 0
    while total < 10_000_000:
        limit.take(piece, stop)
        total += piece
    seconds = clock.now - 100.0
    assert total / 1_000_000 - BURST_S <= seconds <= total / 1_000_000 + 0.01


def test_no_more_than_a_burst_is_caught_up(clock: Clock) -> None:
    limit, stop = limited(clock, 1_000_000), threading.Event()
    clock.now += 3600
    limit.take(2_000_000, stop)
    assert clock.now == pytest.approx(3700 + 2 - BURST_S)


def test_no_limit_does_not_wait(clock: Clock) -> None:
    limit = limited(clock, 0)
    limit.take(1 << 40, threading.Event())
    assert clock.now == 100.0


def test_a_stop_ends_the_wait(clock: Clock) -> None:
    limit, stop = limited(clock, 1), threading.Event()
    stop.set()
    limit.take(1 << 30, stop)
    assert clock.now == 100.0


@pytest.mark.parametrize("new", [0, 1 << 40])
def test_a_change_reaches_those_who_wait(new: int) -> None:
    limit = RateLimit(1)
    waiting = threading.Thread(target=limit.take, args=(1 << 30, threading.Event()))
    waiting.start()
    limit.set(new)
    waiting.join(20)
    assert not waiting.is_alive()
    assert limit.bytes_per_second == new


def test_a_lower_limit_does_not_stretch_old_debt(clock: Clock) -> None:
    limit, stop = limited(clock, 100_000_000), threading.Event()
    stop.set()
    limit.take(100_000_000, stop)
    limit.set(1000)
    stop.clear()
    limit.take(1000, stop)
    assert clock.now <= 101.1


def test_speed_looks_at_the_last_seconds_only(clock: Clock) -> None:
    speed = Speed(clock)
    assert speed.read(0) == 0.0
    for second in range(1, 21):
        clock.now += 1
        rate = speed.read(1000 * second if second <= 10 else 10_000 + 5000 * (second - 10))
    assert rate == pytest.approx(5000)


def test_speed_of_a_stall_falls_to_nothing(clock: Clock) -> None:
    speed = Speed(clock)
    speed.read(0)
    clock.now += 1
    assert speed.read(1000) == 1000
    for _ in range(10):
        clock.now += 1
        rate = speed.read(1000)
    assert rate == 0.0
