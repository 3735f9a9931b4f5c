"""Text that arrives in pieces: bytes to code points, and stop strings that span pieces. Knows no tokens."""

from __future__ import annotations

import codecs


class Utf8Stream:
    """Bytes in, text out: holds an unfinished code point back, turns invalid bytes into U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """The text that is certain after `data`."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished code point, else nothing."""
        return self._decoder.decode(b"", final=True)

    @property
    def pending(self) -> bytes:
        """The bytes of a code point not finished yet, at most three."""
        return self._decoder.getstate()[0]


class StopMatcher:
    """Finds the first of several stop strings in a stream and never emits a part of it.

    The stop that begins earliest wins; of those that begin together, the one given first.
    The result does not depend on how the text is cut, and each character is looked at once.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(dict.fromkeys(s for s in stops if s))
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._links = [_failure_links(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        """How many characters of each stop the stream ends with."""
        self._held = ""
        self._found: tuple[int, int] | None = None
        """(start in `_held`, number of the stop) of a match that an earlier start may still beat."""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is safe to show, and the stop string if one is complete; text after it is dropped."""
        if not self._held and self._firsts.isdisjoint(text):
            return text, None
        base = len(self._held)
        self._held += text
        for offset, char in enumerate(text, base + 1):
            for n, stop in enumerate(self._stops):
                state = self._advance(n, char)
                if state == len(stop):
                    found = (offset - state, n)
                    self._found = found if self._found is None else min(self._found, found)
                    self._matched[n] = self._links[n][state]
            if self._found is not None and not self._can_beat(self._found, offset):
                return self._stop()
        return self._release(len(self._held) - max(self._matched))

    def flush(self) -> tuple[str, str | None]:
        """The end of the stream: everything held back, or the match that was waiting for a better one."""
        if self._found is not None:
            return self._stop()
        text, self._held = self._held, ""
        return text, None

    def _advance(self, n: int, char: str) -> int:
        stop, links, state = self._stops[n], self._links[n], self._matched[n]
        while state and stop[state] != char:
            state = links[state]
        if stop[state] == char:
            state += 1
        self._matched[n] = state
        return state

    def _can_beat(self, found: tuple[int, int], offset: int) -> bool:
        """Whether a stop in progress began before `found`, or with it and ranks first."""
        return any(m and (offset - m, n) < found for n, m in enumerate(self._matched))

    def _release(self, length: int) -> tuple[str, str | None]:
        text, self._held = self._held[:length], self._held[length:]
        if self._found is not None:
            self._found = (self._found[0] - length, self._found[1])
        return text, None

    def _stop(self) -> tuple[str, str | None]:
        assert self._found is not None
        start, n = self._found
        text, self._held, self._found = self._held[:start], "", None
        self._matched = [0] * len(self._stops)
        return text, self._stops[n]


def _failure_links(pattern: str) -> list[int]:
    """For each prefix length, the longest shorter prefix that is also its suffix (Knuth, Morris, Pratt)."""
    links = [0] * (len(pattern) + 1)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = links[length]
        if pattern[i] == pattern[length]:
            length += 1
        links[i + 1] = length
    return links
