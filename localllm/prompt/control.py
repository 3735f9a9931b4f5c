"""Control tokens: which text may become one, and which never.

A chat template writes `<|im_end|>` and means the control token; a user who types it means ten characters.
Once rendered the two look the same, so before rendering one character of whatever could become a control
token in a caller's string is replaced by a code point that occurs nowhere else (`Mask`). What still reads as
a control token afterwards comes from the template. Knows nothing of jinja or of messages' shape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

REASONING_TAGS = ("<think>", "</think>", "[THINK]", "[/THINK]")
"""Templates split an assistant's text at these, so it may hold them, even where they are control tokens."""

_SPLIT = re.compile("(" + "|".join(map(re.escape, REASONING_TAGS)) + ")")
_SURROGATE = re.compile("[\ud800-\udfff]")
_RARE = ((0x10600, 0x10737), (0x13000, 0x13430), (0x20000, 0x2A6E0))
"""Linear A, hieroglyphs, rare ideographs: letters without case that `repr` and JSON write as they are, which
they do not do with private or unassigned code points. Only those that occur nowhere in the conversation serve."""


class ControlTokens:
    """The texts that only a template may turn into tokens, with their ids.

    `ids` holds tokens with llama.cpp's attributes CONTROL and UNKNOWN; user-defined tokens do not belong
    here, llama.cpp recognises them in any text. `lstrip` and `rstrip` name the tokens that swallow the white
    space before or after them (Phi-3's do).
    """

    def __init__(self, ids: Mapping[str, int], *, lstrip: Collection[str] = (), rstrip: Collection[str] = ()) -> None:
        self.ids = {text: token for text, token in ids.items() if text}
        self.lstrip, self.rstrip = frozenset(lstrip), frozenset(rstrip)
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        folded = {_folded(text) for text in self.ids}
        self._any_case = re.compile("|".join(map(re.escape, folded)) or r"(?!)")
        self._heads = {text[:n] for text in folded for n in range(1, len(text))}
        self._tails = {text[n:] for text in folded for n in range(1, len(text))}
        self._longest = max(map(len, self.ids), default=0)

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """The control tokens in `text`, left to right, the longest at each place."""
        return self._pattern.finditer(text)

    def risky(self, text: str) -> set[int]:
        """Positions in `text` that, each replaced, leave nothing that is or may grow into a control token.

        A template may trim the text, change its case and put it beside other text.
        """
        out: set[int] = set()
        text = _folded(text)
        start = 0
        while match := self._any_case.search(text, start):
            out.add(match.start())
            start = match.start() + 1
        stripped = text.strip()
        offset = text.find(stripped)
        for piece, at in ((text, 0), (stripped, offset)) if stripped != text else ((text, 0),):
            reach = range(1, min(self._longest, len(piece)) + 1)
            out.update(at + len(piece) - n for n in reach if piece[-n:] in self._heads)
            out.update(at + n - 1 for n in reach if piece[:n] in self._tails)
        return out

    def inside(self, text: str) -> bool:
        """Whether `text` is the middle of some control token."""
        return any(text in token for token in self.ids) if text else False


@dataclass(frozen=True, slots=True)
class Masked:
    """Text in which some characters stand for others, so that it holds no untrusted control token."""

    text: str
    originals: Mapping[int, str] = field(default_factory=dict[int, str])

    def unmask(self, text: str) -> str:
        """`text`, a part of this, as it is meant."""
        return text.translate(self.originals) if self.originals else text

    def __str__(self) -> str:
        return self.unmask(self.text)


class Mask:
    """Rewrites the strings of one conversation; the same object must see all of them.

    `avoid` is text in which the stand-ins must not occur (the template).
    """

    def __init__(self, control: ControlTokens, values: Iterable[Any], avoid: str = "") -> None:
        self._control = control
        self._stand_ins: dict[str, str] = {}
        self._values, self._avoid = list(values), avoid
        self._free: Iterator[str] | None = None

    @property
    def originals(self) -> dict[int, str]:
        """Code point of a stand-in -> what it stands for."""
        return {ord(stand_in): char for char, stand_in in self._stand_ins.items()}

    def text(self, text: str, *, allowed: Collection[str] = ()) -> str:
        """`text` made harmless; the reasoning tags in `allowed` stay as they are.

        A template may cut a text at a reasoning tag and join the rest, so each part stands for itself.
        """
        text = _SURROGATE.sub("\ufffd", text)
        parts = _SPLIT.split(text) if "THINK]" in text or "think>" in text else [text]
        return "".join(part if part in allowed else self._replace(part, self._control.risky(part)) for part in parts)

    def role(self, role: str) -> str:
        """A role that no template of ours knows: templates build tokens around it, as in `'<|' + role + '|>'`."""
        role = self.text(role)
        return self._replace(role, {0}) if self._control.inside(role.strip()) else role

    def value(self, value: Any, *, allowed: Collection[str] = ()) -> Any:
        """A copy of plain data with every string in it made harmless, keys too."""
        if isinstance(value, str):
            return self.text(value, allowed=allowed)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item, allowed=allowed) for key, item in value.items()}  # type: ignore[misc]
        if isinstance(value, (list, tuple)):
            return [self.value(item, allowed=allowed) for item in value]  # type: ignore[misc]
        return value

    def _replace(self, text: str, positions: Collection[int]) -> str:
        if not positions:
            return text
        chars = list(text)
        for position in positions:
            chars[position] = self._stand_in(text[position])
        return "".join(chars)

    def _stand_in(self, char: str) -> str:
        if char not in self._stand_ins:
            if self._free is None:
                taken = set(self._avoid).union(*_strings(self._values), *self._control.ids)
                self._free = (chr(c) for low, high in _RARE for c in range(low, high) if chr(c) not in taken)
            self._stand_ins[char] = next(self._free)
        return self._stand_ins[char]


def _folded(text: str) -> str:
    """`text` in lower case, character by character, so that positions stay."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():  # type: ignore[misc]
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:  # type: ignore[misc]
            yield from _strings(item)
