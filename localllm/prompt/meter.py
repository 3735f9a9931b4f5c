"""What one rendering of a template may cost, and the counting of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast


class LimitExceeded(Exception):
    """A template ran too long or made something too large."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rendering may cost."""

    seconds: float = 3.0
    """CPU time of the rendering thread, so that a busy machine does not fail a good template."""
    chars: int = 8_000_000
    """Largest text or container (counted with all it holds), and the whole output."""
    total_chars: int = 256_000_000
    """All text made on the way; bounds memory."""


class Meter:
    """Counts what one rendering has used; `clock` gives CPU seconds."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.thread_time) -> None:
        self._limits, self._clock = limits, clock
        self._deadline = clock() + limits.seconds
        self._left = limits.total_chars
        self._ticks = 0

    def tick(self, steps: int = 1) -> None:
        """Count work; one step is about a microsecond, and the clock is read every 64."""
        self._ticks += steps
        if self._ticks >= 64:
            self._ticks = 0
            if self._clock() > self._deadline:
                raise LimitExceeded(f"it ran longer than {self._limits.seconds:g} s")

    def need(self, chars: int) -> None:
        """Ask before making a value of `chars` characters."""
        if chars > self._limits.chars:
            raise LimitExceeded(f"it makes a value of more than {self._limits.chars:,} characters")

    def spend(self, chars: int) -> None:
        """Count text that was made."""
        self.tick(1 + (chars >> 12))
        self.need(chars)
        self._left -= chars
        if self._left < 0:
            raise LimitExceeded(f"it makes more than {self._limits.total_chars:,} characters on the way")

    def weigh(self, value: Any) -> int:
        """Characters in `value` and all it holds, as written out: shared parts count each time."""
        total, seen = 0, 0
        stack: list[Any] = [value]
        while stack:
            item = stack.pop()
            seen += 1
            total += 8
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, int):
                total += item.bit_length() >> 1
            elif isinstance(item, Mapping):
                entries = cast("Mapping[Any, Any]", item)
                stack.extend(entries)
                stack.extend(entries.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                stack.extend(cast("Iterable[Any]", item))
            if total > self._limits.chars:
                self.need(total)
        self.tick(seen >> 3)
        return total

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """`items`, counted as they are taken."""
        for item in items:
            self.tick()
            yield item
