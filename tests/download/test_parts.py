from __future__ import annotations

import random
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.download.parts import MIB, Part, Parts
from localllm.download.spans import Spans


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def write(parts: Parts, part: Part, n_bytes: int) -> int:
    """As a thread that fetches does it: how much of it was wanted."""
    claimed = parts.claim(part, n_bytes)
    parts.wrote(part)
    return claimed


def taken(parts: Parts) -> Part:
    part = parts.take()
    assert part is not None
    return part


def test_parts_come_in_order_and_skip_what_is_there() -> None:
    parts = Parts(100, Spans([(0, 10), (35, 50)]), 20, 1000)
    spans = [(part.position, part.end) for part in (taken(parts) for _ in range(5))]
    assert spans == [(10, 30), (30, 35), (50, 70), (70, 90), (90, 100)]


def test_nothing_is_left_of_a_whole_file() -> None:
    parts = Parts(100, Spans([(0, 100)]), 20, 1000)
    assert parts.complete
    assert parts.take() is None


def test_an_idle_thread_takes_half_of_what_an_average_part_has_left() -> None:
    clock = Clock()
    parts = Parts(100 * MIB, Spans(), 100 * MIB, 1 << 40, clock)
    slow = taken(parts)
    clock.now = 2.0
    write(parts, slow, 20 * MIB)
    rest = taken(parts)
    assert (slow.position, slow.end, rest.position, rest.end) == (20 * MIB, 60 * MIB, 60 * MIB, 100 * MIB)


def test_a_part_that_stands_still_is_taken_over_whole() -> None:
    clock = Clock()
    parts = Parts(2000, Spans(), 1000, 1 << 40, clock)
    stuck, other = taken(parts), taken(parts)
    clock.now = 3.0
    write(parts, other, 1000)
    parts.finish(other)
    rest = taken(parts)
    assert (rest.position, rest.end) == (0, 1000)
    write(parts, rest, 1000)
    assert parts.complete  # without the one that hangs
    assert write(parts, stuck, 500) == 0  # what it was sent late is not written
    assert list(parts.snapshot()) == [(0, 2000)]
    assert parts.received_bytes == 2500


def test_what_is_being_written_is_not_given_away() -> None:
    clock = Clock()
    parts = Parts(1000, Spans(), 1000, 1 << 40, clock)
    slow = taken(parts)
    assert parts.claim(slow, 300) == 300
    clock.now = 3.0
    rest = taken(parts)
    assert (rest.position, rest.end) == (300, 1000)
    parts.wrote(slow)
    assert list(parts.snapshot()) == [(0, 300)]


def test_an_idle_thread_waits_while_the_others_are_about_to_finish() -> None:
    parts = Parts(1000, Spans(), 1000, 1 << 40)
    only = taken(parts)
    results: list[Part | None] = []
    idle = threading.Thread(target=lambda: results.append(parts.take()))
    idle.start()
    write(parts, only, 1000)
    parts.finish(only)
    idle.join(20)
    assert results == [None]


def test_stop_wakes_all_who_wait() -> None:
    parts = Parts(1000, Spans(), 1000, 10)
    only = taken(parts)
    waiting = [
        threading.Thread(target=parts.take),
        threading.Thread(target=parts.wait_frontier, args=(1000,)),
        threading.Thread(target=write, args=(parts, only, 500)),  # too much that nothing was saved of
    ]
    for thread in waiting:
        thread.start()
    parts.stop()
    for thread in waiting:
        thread.join(20)
    assert not any(thread.is_alive() for thread in waiting)
    assert parts.take() is None


def test_writers_wait_until_the_record_speaks_of_what_they_wrote() -> None:
    parts = Parts(1000, Spans(), 1000, 100)
    part = taken(parts)
    write(parts, part, 100)
    assert parts.save_due
    writer = threading.Thread(target=write, args=(parts, part, 100))
    writer.start()
    writer.join(0.05)
    assert writer.is_alive()
    parts.saved(parts.snapshot())
    writer.join(20)
    assert not writer.is_alive()
    assert parts.unsaved_bytes == 0 or not parts.save_due


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 700), st.integers(0, 2**32))
def test_many_threads_write_every_missing_byte_once(size: int, chunk: int, seed: int) -> None:
    luck = random.Random(seed)
    done = Spans((start, start + luck.randrange(1, 50)) for start in luck.sample(range(size), min(3, size)))
    done = Spans((start, min(end, size)) for start, end in done)
    missing = size - done.total_bytes
    clock = Clock()
    parts = Parts(size, done, chunk, 1 << 40, clock)
    written = [bytearray(size) for _ in range(4)]

    def work(mine: bytearray) -> None:
        while part := parts.take():
            while part.left_bytes:
                n = min(part.left_bytes, 37)
                n = parts.claim(part, n)
                for position in range(part.position, part.position + n):
                    mine[position] += 1
                clock.now += 0.3
                parts.wrote(part)
            parts.finish(part)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in written]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert parts.complete
    assert parts.wait_frontier(size) == size
    times = [sum(mine[position] for mine in written) for position in range(size)]
    assert sum(times) == missing
    assert max(times) <= 1
