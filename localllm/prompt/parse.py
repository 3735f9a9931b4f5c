"""Model output -> answer, reasoning and tool calls, while it streams. Knows the dialects, not the model.

What arrives is text with the control tokens that `markers` names written out; how it is cut does not matter.
White space is left as llama-server leaves it: none around reasoning, none after it, none before a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from localllm.prompt.calls import Output, Steps, Tools
from localllm.prompt.dialects import DIALECTS, MARKS, plain, spoken
from localllm.prompt.family import Family
from localllm.prompt.pieces import CallArguments, CallStart, Piece, Text
from localllm.prompt.reader import literal, space, until
from localllm.types import Channel

__all__ = ("CallArguments", "CallStart", "OutputParser", "Piece", "Text", "markers")


def markers(family: Family) -> frozenset[str]:
    """Texts of control tokens that the parser must see; all others are dropped before it."""
    return frozenset((*MARKS[family], *_think_tags(family)))


def _think_tags(family: Family) -> tuple[str, ...]:
    """Opening and closing tag of reasoning; nothing for gpt-oss, whose channels do without."""
    if family is Family.GPT_OSS:
        return ()
    return ("[THINK]", "[/THINK]") if family is Family.MISTRAL else ("<think>", "</think>")


class OutputParser:
    """Parses one answer; `tools` are those the request offers, without any a call is plain text.

    `reasoning_open` says that the prompt ended inside reasoning. Every character comes out: as reasoning, as
    a call, or as answer (a call that is malformed, too).
    """

    def __init__(self, family: Family, *, tools: bool | Sequence[Mapping[str, Any]] = False, reasoning_open: bool = False) -> None:
        self._out = Output(Tools(tools))
        self._steps = self._answer(family, reasoning_open)
        self._tidy = _Tidy(hold=bool(self._out.tools))

    @property
    def calls(self) -> int:
        """How many tool calls have begun."""
        return self._out.calls

    def feed(self, text: str) -> list[Piece]:
        """What is certain after `text`."""
        self._out.source.feed(text)
        return _merged(self._tidy.pieces(self._run()))

    def finish(self) -> list[Piece]:
        """The rest, after the last text."""
        self._out.source.close()
        return _merged([*self._tidy.pieces(self._run()), *self._tidy.rest()])

    def _run(self) -> Iterator[Piece]:
        for piece in self._steps:
            if piece is None:
                return
            yield piece

    def _answer(self, family: Family, reasoning_open: bool) -> Steps:
        source, tags = self._out.source, _think_tags(family)
        if tags:
            opening, closing = tags
            gap = yield from space(source)
            if (yield from literal(source, opening)) or reasoning_open:
                yield Text("reasoning", "")
                yield from spoken(until(source, closing), "reasoning")
            else:
                yield Text("answer", gap)
        elif reasoning_open:
            yield from spoken(until(source, "<|end|>"), "reasoning")
        dialect = DIALECTS[family] if self._out.tools or family is Family.GPT_OSS else plain
        yield from dialect(self._out)


class _Tidy:
    """White space: held back until it is known whether text of the same channel follows."""

    def __init__(self, *, hold: bool) -> None:
        self._hold = hold
        """Whether white space may turn out to stand before a call."""
        self._held: dict[Channel, str] = {"answer": "", "reasoning": ""}
        self._fresh: dict[Channel, bool] = {"answer": False, "reasoning": True}
        """Whether white space at the start of what comes next is dropped."""
        self._called = False

    def pieces(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if not isinstance(piece, Text):
                if isinstance(piece, CallStart):
                    self._called = self._fresh["answer"] = True
                    self._held["answer"] = ""
                yield piece
            elif text := self._text(piece.channel, piece.text):
                yield Text(piece.channel, text)

    def rest(self) -> Iterator[Piece]:
        """White space at the end is part of the answer, unless all that came last were calls."""
        if self._held["answer"] and not (self._called and self._fresh["answer"]):
            yield Text("answer", self._held["answer"])

    def _text(self, channel: Channel, text: str) -> str:
        if channel == "reasoning":
            self._fresh["answer"] = True
        if self._fresh[channel]:
            text = text.lstrip()
            self._fresh[channel] = not text
        if channel == "answer" and not self._hold:
            return text
        text = self._held[channel] + text
        kept = text.rstrip()
        self._held[channel] = text[len(kept) :]
        return kept


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbouring pieces of the same thing as one."""
    every = list(pieces)
    if len(every) < 2:
        return every
    out: list[Piece] = []
    for piece in every:
        last = out[-1] if out else None
        if isinstance(piece, Text) and isinstance(last, Text) and piece.channel == last.channel:
            out[-1] = Text(piece.channel, last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments) and piece.index == last.index:
            out[-1] = CallArguments(piece.index, last.delta + piece.delta)
        else:
            out.append(piece)
    return out
