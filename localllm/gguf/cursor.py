"""A position in a source of bytes that is not trusted: every step is checked against the file's end and the limits.

It knows how numbers, texts and their bounds are read; what they mean, it does not.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Any

from localllm.errors import ModelError

Read = Callable[[int, int], bytes]
"""(offset, length) -> that many bytes, or fewer, or none at the end."""

MAX_HEADER_BYTES = 64 << 20
"""The largest headers there are, of 262,000 tokens and 515,000 merges, take 20 MB."""
MAX_STRING_BYTES = 16 << 20
MAX_ITEMS = 1 << 21
"""Texts and rows in a header, rows counting more: what bounds the time."""
MAX_KEPT_BYTES = 8 << 20
"""Of keys, names, texts and short arrays together: what bounds the memory, with MAX_HEADER_BYTES."""
FIRST_CHUNK_BYTES = 256 << 10
LAST_CHUNK_BYTES = 8 << 20

_NUMBER, _LENGTH = Struct("<I"), Struct("<Q")


@dataclass(slots=True)
class Budget:
    """What is left to spend on one model, whatever the number of its files."""

    items: int = MAX_ITEMS
    kept_bytes: int = MAX_KEPT_BYTES


class Cursor:
    """Reads forward from byte 0, fetching in growing chunks; all its errors are ModelErrors that name the file."""

    def __init__(self, read: Read, file_bytes: int, name: str, budget: Budget | None = None) -> None:
        self.file_bytes = file_bytes
        self.name = name if name.isprintable() else repr(name)
        self.position = 0
        self._read = read
        self._budget = budget or Budget()
        self._buffer = bytearray()
        self._chunk_bytes = FIRST_CHUNK_BYTES

    def peek(self, n: int) -> bytes:
        """The next `n` bytes, or as many as there are."""
        n = min(n, self.file_bytes - self.position)
        self._need(n)
        return self.slice(self.position, n)

    def back_to(self, position: int) -> None:
        """Return to bytes that were passed already."""
        self.position = position

    def skip(self, n: int) -> None:
        """Step over `n` bytes, which must be there."""
        self._need(n)
        self.position += n

    def unpack(self, layout: Struct) -> tuple[Any, ...]:
        """The next values, as `layout` describes them."""
        start = self.position
        self.skip(layout.size)
        return layout.unpack_from(self._buffer, start)

    def number(self) -> int:
        """The next 32-bit number."""
        (value,) = self.unpack(_NUMBER)
        return value

    def string(self) -> tuple[int, int]:
        """Step over a text; returns (offset, length) of its bytes."""
        (length,) = self.unpack(_LENGTH)
        if length > MAX_STRING_BYTES:
            raise self._long(length)
        start = self.position
        self.skip(length)
        return start, length

    def strings(self, count: int) -> None:
        """Step over `count` texts."""
        buffer, unpack = self._buffer, _LENGTH.unpack_from
        position, left = self.position, count
        while left:
            try:
                for ahead in range(left, 0, -1):
                    left = ahead
                    (length,) = unpack(buffer, position)
                    if length > MAX_STRING_BYTES:
                        raise self._long(length)
                    position += 8 + length
                left = 0
            except struct.error:  # the end of what was fetched so far
                self.position = position
                self._need(8)
        self.position = position
        self._need(0)

    def slice(self, start: int, n: int) -> bytes:
        """Bytes that were passed already."""
        with memoryview(self._buffer) as view, view[start : start + n] as part:
            return bytes(part)

    def sha256(self, start: int, n: int) -> str:
        """Of bytes that were passed already."""
        with memoryview(self._buffer) as view, view[start : start + n] as part:
            return hashlib.sha256(part).hexdigest()

    def expect(self, count: int, n_bytes: int) -> None:
        """Refuse at once a promise of `count` things of at least `n_bytes` each that the file cannot hold."""
        self._reach(self.position + count * n_bytes)

    def spend(self, *, items: int = 0, kept_bytes: int = 0) -> None:
        """Take from the budget."""
        self._budget.items -= items
        self._budget.kept_bytes -= kept_bytes
        if self._budget.items < 0:
            raise self.damaged("its header has more entries than any model needs")
        if self._budget.kept_bytes < 0:
            raise self.damaged(f"the texts in its header take more than {MAX_KEPT_BYTES >> 20} MiB")

    def damaged(self, what: str) -> ModelError:
        """The error for a header that no sound writer makes."""
        return ModelError(f"{self.name} is damaged: {what}", hint="fetch it again, from a source you trust")

    def incomplete(self, promised_bytes: int) -> ModelError:
        """The error for a file that ends too early."""
        return ModelError(
            f"{self.name} is incomplete: it ends at byte {self.file_bytes:,}, its header promises {promised_bytes:,}", hint="pull it again"
        )

    def _long(self, length: int) -> ModelError:
        return self.damaged(f"its header has a text of {length:,} bytes, {MAX_STRING_BYTES:,} are the most")

    def _reach(self, end: int) -> None:
        if end > self.file_bytes:
            raise self.incomplete(end)
        if end > MAX_HEADER_BYTES:
            raise self.damaged(f"its header takes more than {MAX_HEADER_BYTES >> 20} MiB")

    def _need(self, n: int) -> None:
        """Have the next `n` bytes in the buffer."""
        end = self.position + n
        if end <= len(self._buffer):
            return
        self._reach(end)
        while len(self._buffer) < end:
            have = len(self._buffer)
            wanted = min(self._chunk_bytes, self.file_bytes - have, MAX_HEADER_BYTES - have)
            chunk = self._read(have, wanted)[:wanted]
            if not chunk:
                raise ModelError(f"{self.name} ended at byte {have:,} while it was read", hint="is something else writing it? Try again")
            self._buffer += chunk
            self._chunk_bytes = min(4 * self._chunk_bytes, LAST_CHUNK_BYTES)


def quoted(text: str) -> str:
    """A text from a file as a terminal may show it: escaped, 80 characters at most."""
    return repr(text if len(text) <= 80 else text[:79] + "…")
