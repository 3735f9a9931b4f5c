"""Rendered prompt -> token ids, as llama.cpp does it with parse_special, but for trusted control tokens only.

The text between two control tokens is tokenised as one fragment, template's and user's words jointly, so a
prompt without injected tokens gives exactly llama.cpp's ids. Fragments are cached: the next turn of a long
chat tokenises its new messages only.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from localllm.prompt.control import ControlTokens, Masked

Tokenize = Callable[[str], list[int]]
"""Text -> ids, control tokens not recognised (llama.cpp's parse_special=False, add_special=False)."""

_C_SPACE = " \t\n\v\f\r"
_ROLE_TOKEN = re.compile(r"(?<![a-z])(user|assistant|system|observation|developer)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt, complete with BOS, and where messages begin."""

    tokens: list[int]
    starts: tuple[int, ...]
    """Offsets in `tokens` at which a message probably begins, ascending, the first message's left out: good places
    for checkpoints of the KV cache. A hint: a control token that follows another one (white space between them
    aside), or that is named after a role."""


class FragmentCache:
    """Text -> ids, the least recently used forgotten; holds at most `max_chars` characters. Thread-safe."""

    def __init__(self, tokenize: Tokenize, max_chars: int = 4_000_000) -> None:
        self._tokenize, self._max_chars = tokenize, max_chars
        self._entries: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._chars = 0
        self._lock = threading.Lock()

    def __call__(self, text: str) -> tuple[int, ...]:
        with self._lock:
            if (ids := self._entries.get(text)) is not None:
                self._entries.move_to_end(text)
                return ids
        ids = tuple(self._tokenize(text))
        if len(text) > self._max_chars:
            return ids
        with self._lock:
            if text not in self._entries:
                self._entries[text] = ids
                self._chars += len(text)
            while self._chars > self._max_chars:
                old, _ = self._entries.popitem(last=False)
                self._chars -= len(old)
        return ids


class Encoder:
    """Turns rendered prompts into ids for one vocabulary.

    `bos` is put first where `add_bos` asks for it and the prompt does not begin with it.
    """

    def __init__(
        self, control: ControlTokens, tokenize: Tokenize, *, bos: int = -1, add_bos: bool = False, cache_chars: int = 4_000_000
    ) -> None:
        self._control = control
        self._fragment = FragmentCache(tokenize, cache_chars)
        self._bos = bos if add_bos else -1

    def encode(self, rendered: Masked) -> Encoded:
        """The ids of `rendered`; its masked text stays text."""
        tokens: list[int] = []
        starts: list[int] = []
        end, after_control, swallow = 0, False, False
        for match in self._control.find(rendered.text):
            name = match[0]
            text = self._between(rendered.text[end : match.start()], lstrip=swallow, rstrip=name in self._control.lstrip)
            if text:
                tokens += self._fragment(rendered.unmask(text))
            if (after_control and not text.strip()) or _ROLE_TOKEN.search(name):
                starts.append(len(tokens))
            tokens.append(self._control.ids[name])
            end, after_control, swallow = match.end(), True, name in self._control.rstrip
        if text := self._between(rendered.text[end:], lstrip=swallow, rstrip=False):
            tokens += self._fragment(rendered.unmask(text))
        if self._bos >= 0 and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
            starts = [start + 1 for start in starts]
        return Encoded(tokens, tuple(start for start in starts if start > 1))

    @staticmethod
    def _between(text: str, *, lstrip: bool, rstrip: bool) -> str:
        text = text.lstrip(_C_SPACE) if lstrip else text
        return text.rstrip(_C_SPACE) if rstrip else text
