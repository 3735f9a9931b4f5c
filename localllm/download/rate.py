"""How fast bytes may come, and how fast they do. Knows nothing of what they are."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

BURST_S = 0.25
"""What may be caught up after a pause: short enough that a limit is kept from one second to the next."""
LOOK_S = 0.1
WINDOW_S = 5.0

Clock = Callable[[], float]


class RateLimit:
    """A token bucket that any number of threads draw from; 0 means no limit, and it may be changed at any time."""

    def __init__(self, bytes_per_second: int = 0, clock: Clock = time.monotonic) -> None:
        self._changed = threading.Condition()
        self._clock = clock
        self._rate = bytes_per_second
        self._tokens = 0.0
        self._at = clock()

    @property
    def bytes_per_second(self) -> int:
        return self._rate

    def set(self, bytes_per_second: int) -> None:
        """Change the limit for everyone, also for those who wait."""
        with self._changed:
            self._refill()
            self._rate = bytes_per_second
            # A debt made at the old rate would take for ever at a lower one.
            self._tokens = 0.0
            self._changed.notify_all()

    def take(self, n_bytes: int, stop: threading.Event) -> None:
        """Account for `n_bytes` that came, then wait until the limit allows more, or `stop`."""
        if not self._rate:
            return
        with self._changed:
            self._refill()
            self._tokens -= n_bytes
            while self._rate and self._tokens < 0 and not stop.is_set():
                self._changed.wait(min(-self._tokens / self._rate, LOOK_S))
                self._refill()

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self._tokens + (now - self._at) * self._rate, self._rate * BURST_S)
        self._at = now


SHARED = RateLimit()
"""The limit of this process: every download draws from it unless told otherwise."""


class Speed:
    """Bytes per second over the last five seconds, from readings of a growing count."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._readings: deque[tuple[float, int]] = deque()

    def read(self, count_bytes: int) -> float:
        """Note that the count stands at `count_bytes` now; the rate since the oldest reading in the window."""
        now = self._clock()
        self._readings.append((now, count_bytes))
        while len(self._readings) > 2 and now - self._readings[0][0] > WINDOW_S:
            self._readings.popleft()
        then, before = self._readings[0]
        return (count_bytes - before) / (now - then) if now > then else 0.0
