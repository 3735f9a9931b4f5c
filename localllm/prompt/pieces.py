"""What the output parser gives: text, and tool calls in parts."""

from __future__ import annotations

from dataclasses import dataclass

from localllm.types import Channel


@dataclass(frozen=True, slots=True)
class Text:
    channel: Channel
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Tool call number `index` (from 0) begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of call `index`'s arguments."""

    index: int
    delta: str


Piece = Text | CallStart | CallArguments
