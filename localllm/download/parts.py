"""Who fetches which bytes of a file: the missing ranges, handed out in ascending order to any number of threads.

A thread that finds nothing left takes over most of what the slowest of the others still has before it, so that one slow
connection never holds up the end. Knows no network and no disk.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from localllm.download.spans import Span, Spans

MIB = 1 << 20
SLOW_S = 1.0
"""Only from a part that has run and will run for longer is something taken: a request and a closed connection have their price."""
LOOK_S = 0.2
HASH_STEP_BYTES = MIB
"""How far the contiguous part grows before whoever waits for it is woken."""


@dataclass(slots=True)
class Part:
    """A range that one thread fetches; its end moves when another takes the rest."""

    position: int
    """Everything before it is in the file."""
    end: int
    start: int
    began: float
    claimed: int
    """Everything before it is in the file or being written to it."""

    @property
    def left_bytes(self) -> int:
        return self.end - self.position

    def bytes_per_second(self, now: float) -> float:
        """So far, waits for the server included."""
        return (self.position - self.start) / (now - self.began)

    def left_s(self, now: float) -> float:
        """How long the rest takes at that speed."""
        speed = self.bytes_per_second(now)
        return self.left_bytes / speed if speed else float("inf")


class Parts:
    """What is there, what is on its way and what is free; every method may be called from any thread."""

    def __init__(
        self, size_bytes: int, done: Spans, chunk_bytes: int, unsaved_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.size_bytes = size_bytes
        self.received_bytes = 0
        """Over the network, by all."""
        self._clock = clock
        self._changed = threading.Condition()
        self._done = done
        self._free: deque[Span] = deque()
        for start, end in done.missing(size_bytes):
            self._free.extend((position, min(position + chunk_bytes, end)) for position in range(start, end, chunk_bytes))
        self._busy: list[Part] = []
        self._saved_bytes = done.total_bytes
        self._unsaved_limit_bytes = unsaved_bytes
        self._told = done.frontier()
        self._stopped = False

    # -- for the threads that fetch

    def take(self) -> Part | None:
        """A range to fetch, waiting for one where that may help; None when there is nothing more to do."""
        with self._changed:
            while not self._stopped and (self._free or self._busy):
                now = self._clock()
                if self._free:
                    start, end = self._free.popleft()
                elif (rest := self._share(now)) is not None:
                    start, end = rest
                else:
                    self._changed.wait(LOOK_S)
                    continue
                part = Part(start, end, start, now, start)
                self._busy.append(part)
                return part
        return None

    def claim(self, part: Part, n_bytes: int) -> int:
        """How many of the `n_bytes` that came may be written: no more than to the end, which may just have moved.

        What is claimed nobody else gets, so no byte is written twice, least of all after it was hashed.
        """
        with self._changed:
            self.received_bytes += n_bytes
            part.claimed = min(part.position + n_bytes, part.end)
            return part.claimed - part.position

    def wrote(self, part: Part) -> None:
        """Note that what was claimed is in the file; waits while too much is there that no record speaks of."""
        with self._changed:
            self._done.add(part.position, part.claimed)
            part.position = part.claimed
            frontier = self._done.frontier()
            if frontier - self._told >= HASH_STEP_BYTES or self.save_due or not part.left_bytes:
                self._told = frontier
                self._changed.notify_all()
            while self.unsaved_bytes > self._unsaved_limit_bytes and not self._stopped:
                self._changed.wait(LOOK_S)

    def finish(self, part: Part) -> None:
        """`part` has nothing left."""
        with self._changed:
            self._busy.remove(part)
            self._changed.notify_all()

    # -- for those who follow

    def wait(self, timeout_s: float) -> None:
        """Until something has happened, or not for so long."""
        with self._changed:
            if not self._stopped and not self.complete:
                self._changed.wait(timeout_s)

    def wait_frontier(self, position: int) -> int:
        """The end of the contiguous range from 0, as soon as it has reached `position` or everything has stopped."""
        with self._changed:
            while not self._stopped and self._done.frontier() < min(position, self.size_bytes):
                self._changed.wait()
            return self._done.frontier()

    def snapshot(self) -> Spans:
        with self._changed:
            return self._done.copy()

    def saved(self, done: Spans) -> None:
        """A snapshot has been recorded."""
        with self._changed:
            self._saved_bytes = done.total_bytes
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake everyone; nobody gets anything more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def done_bytes(self) -> int:
        return self._done.total_bytes

    @property
    def complete(self) -> bool:
        return self._done.total_bytes == self.size_bytes

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def unsaved_bytes(self) -> int:
        return self._done.total_bytes - self._saved_bytes

    @property
    def save_due(self) -> bool:
        """Half of what may be there unrecorded is; the other half comes while the record is written."""
        return self.unsaved_bytes * 2 >= self._unsaved_limit_bytes

    def _share(self, now: float) -> Span | None:
        """The rest of the slowest part, cut so that both ends are reached at about the same time: half of an average one,
        all of one that stands still, which nobody need wait for then.
        """
        known = [part for part in self._busy if now - part.began > SLOW_S and part.claimed < part.end]
        slow = max(known, key=lambda part: part.left_s(now), default=None)
        if slow is None or slow.left_s(now) <= SLOW_S:
            return None
        speed = slow.bytes_per_second(now)
        mean = sum(part.bytes_per_second(now) for part in known) / len(known)
        kept = int((slow.end - slow.claimed) * speed / (speed + mean)) if speed else 0
        rest = slow.claimed + kept, slow.end
        slow.end = rest[0]
        return rest
