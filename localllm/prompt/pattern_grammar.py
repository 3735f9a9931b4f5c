"""A subset of ECMAScript regular expressions as GBNF over the JSON spelling of a string.

Knows literals, escapes, classes, groups, alternatives, quantifiers and `^`/`$` at the ends; refuses what
GBNF cannot say (look-around, back-references, `\\b`, `\\p`). A pattern without `^` or `$` may match
anywhere, as JSON Schema wants. A character is spelled as itself, or by its shortest JSON escape.
"""

from __future__ import annotations

import json
from typing import NoReturn

from localllm.errors import GrammarError
from localllm.prompt.gbnf import MAX_REPEAT, Rules, character_class, either, literal

Ranges = list[tuple[int, int]]

MAX_PATTERN = 10_000
MAX_NESTING = 50

_TOP = 0x10FFFF
_DIGIT: Ranges = [(0x30, 0x39)]
_WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACE: Ranges = [
    (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
    (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
]  # fmt: skip
_LINE_ENDS: Ranges = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
_CONTROLS = {"t": 0x09, "n": 0x0A, "r": 0x0D, "f": 0x0C, "v": 0x0B, "0": 0x00}


def _complement(ranges: Ranges) -> Ranges:
    out: Ranges = []
    start = 0
    for a, b in sorted(ranges):
        if a > start:
            out.append((start, a - 1))
        start = max(start, b + 1)
    return [*out, (start, _TOP)] if start <= _TOP else out


_SETS = {"d": _DIGIT, "w": _WORD, "s": _SPACE, "D": _complement(_DIGIT), "W": _complement(_WORD), "S": _complement(_SPACE)}
# Half surrogates have no UTF-8; quote, backslash and controls must be escaped in JSON.
_NOT_PLAIN: Ranges = [(0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0xD800, 0xDFFF)]


def pattern_gbnf(pattern: str, rules: Rules) -> tuple[str, bool]:
    """(the characters between the quotes that satisfy `pattern`, whether there may be none)."""
    return _Pattern(pattern, rules).whole()


def _spell(ranges: Ranges) -> str | None:
    """One character of `ranges` as JSON writes it; None when there is none."""
    plain = _complement(_complement(ranges) + _NOT_PLAIN)
    forms = [character_class(plain)] if plain else []
    for code in (*range(0x20), 0x22, 0x5C):
        if any(a <= code <= b for a, b in ranges):
            forms.append(literal(json.dumps(chr(code))[1:-1]))
    return either(*forms) if forms else None


class _Pattern:
    """A cursor over one pattern."""

    def __init__(self, text: str, rules: Rules) -> None:
        self.text = text
        self.rules = rules
        self.at = 0
        if len(text) > MAX_PATTERN:
            self.fail(f"is longer than {MAX_PATTERN:,} characters")

    def fail(self, what: str) -> NoReturn:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        raise GrammarError(f"the pattern {shown!r} {what} (at character {self.at + 1})", hint="simplify the pattern, or leave it out")

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def take(self, text: str) -> bool:
        if self.peek(text):
            self.at += len(text)
            return True
        return False

    def next(self) -> str:
        if self.at >= len(self.text):
            self.fail("ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def whole(self) -> tuple[str, bool]:
        forms: list[str] = []
        nullable = False
        while True:
            parts = [] if self.take("^") else ["char*"]
            form, empty = self.sequence(0)
            parts.append(form)
            if not self.take("$"):
                parts.append("char*")
            forms.append(" ".join(parts))
            nullable |= empty
            if self.at == len(self.text):
                return either(*forms), nullable
            if not self.take("|"):
                self.fail("has an unmatched )" if self.peek(")") else "goes on after $")

    def sequence(self, depth: int) -> tuple[str, bool]:
        if depth > MAX_NESTING:
            self.fail("is nested too deeply")
        parts: list[str] = []
        nullable = True
        while self.at < len(self.text) and not (self.peek("|") or self.peek(")") or self.peek("$")):
            form, empty = self.quantified(*self.atom(depth))
            parts.append(form)
            nullable &= empty
        return " ".join(parts) or '""', nullable

    def atom(self, depth: int) -> tuple[str, bool]:
        c = self.next()
        if c == "(":
            if self.take("?") and not self.take(":"):
                self.fail("uses look-around or a named group, which a grammar cannot express")
            options = [self.sequence(depth + 1)]
            while self.take("|"):
                options.append(self.sequence(depth + 1))
            if not self.take(")"):
                self.fail("uses $ inside a group" if self.peek("$") else "has an unmatched (")
            return either(*(form for form, _ in options)) if len(options) > 1 else f"({options[0][0]})", any(e for _, e in options)
        if c in "^*+?{":
            self.fail("uses ^ after its start" if c == "^" else f"has nothing before {c}")
        ranges = self.bracket() if c == "[" else _complement(_LINE_ENDS) if c == "." else self.escape() if c == "\\" else [(ord(c), ord(c))]
        form = _spell(ranges)
        if form is None:
            self.fail("has a class that matches nothing")
        return form, False

    def bracket(self) -> Ranges:
        negated = self.take("^")
        ranges: Ranges = []
        while not self.take("]"):
            low = self.member()
            if self.peek("-") and not self.peek("-]"):
                self.at += 1
                high = self.member()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1] or low[0][0] > high[0][0]:
                    self.fail("has a range that makes no sense")
                low = [(low[0][0], high[0][0])]
            ranges += low
        return _complement(ranges) if negated else ranges

    def member(self) -> Ranges:
        c = self.next()
        if c != "\\":
            return [(ord(c), ord(c))]
        return [(0x08, 0x08)] if self.take("b") else self.escape()

    def escape(self) -> Ranges:
        c = self.next()
        if c in _SETS:
            return _SETS[c]
        if c in "xu":
            digits = self.text[self.at : self.at + (2 if c == "x" else 4)]
            self.at += len(digits)
            if len(digits) != (2 if c == "x" else 4) or any(d not in "0123456789abcdefABCDEF" for d in digits):
                self.fail(f"has an incomplete \\{c} escape")
            return [(int(digits, 16), int(digits, 16))]
        if c in _CONTROLS and not (c == "0" and self.text[self.at : self.at + 1].isdigit()):
            return [(_CONTROLS[c], _CONTROLS[c])]
        if c.isalnum():
            self.fail(f"uses \\{c}, which a grammar cannot express")
        return [(ord(c), ord(c))]

    def quantified(self, form: str, nullable: bool) -> tuple[str, bool]:
        low, high = 1, 1
        if self.take("*"):
            low, high = 0, None
        elif self.take("+"):
            low, high = 1, None
        elif self.take("?"):
            low, high = 0, 1
        elif self.take("{"):
            low, high = self.counts()
        else:
            return form, nullable
        self.take("?")  # lazy or greedy: the same strings
        if nullable and (high is None or high > 1):
            self.fail("repeats something that may be empty")
        return self.rules.repeat(self.rules.add("re", form), low, high), nullable or low == 0

    def counts(self) -> tuple[int, int | None]:
        end = self.text.find("}", self.at)
        first, comma, second = self.text[self.at : end].partition(",")
        if end < 0 or not first.isdecimal() or not (second == "" or second.isdecimal()):
            self.fail("has a { that is no quantifier; write \\{ for the character")
        self.at = end + 1
        if len(first) > 9 or len(second) > 9 or max(int(first), int(second or 0)) > MAX_REPEAT or (second and int(second) < int(first)):
            self.fail("has a quantifier out of order, or too large")
        return int(first), int(second) if second else None if comma else int(first)
