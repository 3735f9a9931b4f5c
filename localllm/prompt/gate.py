"""Tells a lazy grammar when to listen: not to reasoning, where a quoted call marker would start it."""

from __future__ import annotations

from enum import Enum


class Part(Enum):
    """Where an output stands."""

    UNKNOWN = "unknown"
    """What came so far may yet turn out to begin reasoning."""
    REASONING = "reasoning"
    ANSWER = "answer"


class ReasoningGate:
    """Follows one output; `opened` says that the prompt ended inside reasoning."""

    def __init__(self, opening: str, closing: str, *, opened: bool) -> None:
        self._opening, self._closing = opening.encode(), closing.encode()
        self._seen = b""
        self.part = Part.REASONING if opened else Part.UNKNOWN

    def push(self, data: bytes) -> Part:
        """The part that `data`, the output's next bytes, belongs to; a closing tag still counts as reasoning."""
        if self.part is Part.ANSWER:
            return self.part
        self._seen += data
        if self.part is Part.UNKNOWN:
            start = self._seen.lstrip()
            if not start.startswith(self._opening):
                if not self._opening.startswith(start):
                    self.part = Part.ANSWER
                return self.part
            self.part, self._seen = Part.REASONING, start[len(self._opening) :]
        if self._closing in self._seen:
            self.part = Part.ANSWER
        self._seen = self._seen[-len(self._closing) :]
        return Part.REASONING
