"""Sets of byte ranges: which parts of a file are there, which are missing. Pure arithmetic on half-open `(start, end)` pairs."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Span = tuple[int, int]


class Spans:
    """Disjoint ranges in ascending order; ranges that touch are one."""

    __slots__ = ("_ends", "_starts", "total_bytes")

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total_bytes = 0
        for start, end in spans:
            self.add(start, end)

    def __iter__(self) -> Iterator[Span]:
        return zip(self._starts, self._ends, strict=True)

    def add(self, start: int, end: int) -> None:
        """Include `[start, end)`, overlapping or not; an empty range changes nothing."""
        if start >= end:
            return
        # All ranges from `first` to before `last` touch or overlap the new one and melt into it.
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self.total_bytes += end - start - sum(self._ends[first:last]) + sum(self._starts[first:last])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def frontier(self) -> int:
        """The end of the range that begins at 0: everything before it is there."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    def missing(self, size: int) -> Iterator[Span]:
        """The ranges of `[0, size)` that are not included, in ascending order."""
        position = 0
        for start, end in self:
            if position < start:
                yield position, min(start, size)
            position = end
        if position < size:
            yield position, size

    def copy(self) -> Spans:
        new = Spans()
        new._starts, new._ends, new.total_bytes = self._starts.copy(), self._ends.copy(), self.total_bytes
        return new
