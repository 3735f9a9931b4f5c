"""Reading model output that arrives in pieces: a cursor and generators that read as if it were all there.

A generator here yields text that is certain, or None to ask for more input; the caller resumes it once there
is more or the source is closed. So a grammar reads top to bottom, and how the text was cut cannot matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from functools import lru_cache
from typing import Any

Chunks = Generator[str | None, None, Any]
"""Yields text as it becomes certain, None for more input."""
Wait = Generator[None, None, Any]
"""Yields None for more input."""

_SPACE = " \t\r\n"
_OUTSIDE_STRINGS = frozenset('{}[],:"0123456789+-.eE truefalsnN\t\r\n') | frozenset("NaInity")
_CLOSES = {"}": "{", "]": "["}


class Source:
    """Text with a read position; `close` says that no more will come."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._keep: int | None = None
        self.closed = False

    def feed(self, text: str) -> None:
        cut = self._at if self._keep is None else self._keep
        self._text = self._text[cut:] + text
        self._at -= cut
        if self._keep is not None:
            self._keep = 0

    def close(self) -> None:
        self.closed = True

    @property
    def ahead(self) -> str:
        """What is there and unread."""
        return self._text[self._at :]

    def take(self, n: int) -> str:
        """Read `n` characters that are there."""
        self._at += n
        return self._text[self._at - n : self._at]

    def give_back(self, n: int) -> None:
        """Unread the last `n` characters, read just now."""
        self._at -= n

    def mark(self) -> None:
        """Remember this place for `rewind`."""
        self._keep = self._at

    def rewind(self) -> None:
        """Back to `mark`."""
        assert self._keep is not None
        self._at, self._keep = self._keep, None

    def forget(self) -> None:
        """Drop the mark."""
        self._keep = None


@lru_cache(maxsize=64)
def _compiled(marks: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], frozenset[str], int]:
    """(finds a mark, first characters, proper prefixes, length of the longest)."""
    pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
    heads = frozenset(m[:n] for m in marks for n in range(1, len(m)))
    return pattern, frozenset(m[0] for m in marks), heads, max(map(len, marks))


def until(source: Source, *marks: str) -> Chunks:
    """Yield the text before the first of `marks` and read that mark; returns it, "" if the text ended first."""
    pattern, firsts, heads, longest = _compiled(marks)
    while True:
        ahead = source.ahead
        if ahead and firsts.isdisjoint(ahead):  # the usual case, kept short
            yield source.take(len(ahead))
            ahead = ""
        if match := pattern.search(ahead):
            if match.start():
                yield source.take(match.start())
            return source.take(len(match[0]))
        hold = 0
        if not source.closed:
            hold = next((n for n in range(min(longest - 1, len(ahead)), 0, -1) if ahead[-n:] in heads), 0)
        if len(ahead) > hold:
            yield source.take(len(ahead) - hold)
        if source.closed:
            return ""
        yield None


def rest(source: Source) -> Chunks:
    """Yield all text that is left."""
    while True:
        if ahead := source.ahead:
            yield source.take(len(ahead))
        if source.closed:
            return
        yield None


def collect(chunks: Chunks) -> Generator[None, None, tuple[str, Any]]:
    """Run `chunks` to its end; returns (all its text, what it returned)."""
    parts: list[str] = []
    while True:
        try:
            chunk = next(chunks)
        except StopIteration as end:
            return "".join(parts), end.value
        if chunk is None:
            yield None
        else:
            parts.append(chunk)


def peek(source: Source) -> Generator[None, None, str]:
    """The next character, "" at the end."""
    while not source.ahead and not source.closed:
        yield None
    return source.ahead[:1]


def space(source: Source) -> Generator[None, None, str]:
    """Read white space; returns it."""
    parts: list[str] = []
    while (char := (yield from peek(source))) and char in _SPACE:
        parts.append(source.take(1))
    return "".join(parts)


def word(source: Source) -> Generator[None, None, str]:
    """Read a function's name, "" if none stands here."""
    parts: list[str] = []
    while (char := (yield from peek(source))) and (char.isalnum() or char in "_-./:") and len(parts) < 256:
        parts.append(source.take(1))
    return "".join(parts)


def literal(source: Source, *choices: str) -> Generator[None, None, str]:
    """Read one of `choices` if the text goes on with it; returns it, or "" with nothing read."""
    while True:
        ahead = source.ahead
        found = next((choice for choice in choices if ahead.startswith(choice)), "")
        longer = any(choice.startswith(ahead) for choice in choices if len(choice) > len(ahead) and len(choice) > len(found))
        if not longer or source.closed:
            return source.take(len(found))
        yield None


def json_string(source: Source) -> Generator[None, None, str | None]:
    """Read a JSON string; returns what it says, None (with some of it read) if it is none."""
    if (yield from peek(source)) != '"':
        return None
    text, complete = yield from collect(json_value(source))
    try:
        return json.loads(text, strict=False) if complete else None
    except ValueError:
        return None


def json_value(source: Source) -> Chunks:
    """Yield one JSON value as it is written; returns whether it is complete.

    Checks brackets, strings and the alphabet, which is enough to find the end, and stops before what cannot belong to it.
    """
    open_brackets: list[str] = []
    quoted = escaped = False
    begun = False
    while True:
        ahead = source.ahead
        for i, char in enumerate(ahead):
            if quoted:
                if escaped:
                    escaped = False
                elif char == "\\":
                    escaped = True
                elif char == '"':
                    quoted = False
                    if not open_brackets:
                        yield source.take(i + 1)
                        return True
                continue
            if not open_brackets and begun and char in ",}] \t\r\n":  # the end of a number or word
                if i:
                    yield source.take(i)
                return True
            wrong = char not in _OUTSIDE_STRINGS or (char in _CLOSES and (not open_brackets or open_brackets[-1] != _CLOSES[char]))
            if wrong:
                if i:
                    yield source.take(i)
                return False
            begun = True
            if char == '"':
                quoted = True
            elif char in "{[":
                open_brackets.append(char)
            elif char in _CLOSES:
                open_brackets.pop()
                if not open_brackets:
                    yield source.take(i + 1)
                    return True
        if ahead:
            yield source.take(len(ahead))
        if source.closed:
            return begun and not quoted and not open_brackets
        yield None
