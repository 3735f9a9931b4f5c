"""Writing GBNF, the grammar notation of llama.cpp: rules, repetitions, text, the JSON primitives.

Knows llama.cpp's limits (src/llama-grammar.cpp): one repetition may unfold to 2,000 rules and a larger
maximum silently becomes "no limit"; a rule must not reach itself before it consumes a character; an
empty alternative must be written `""`, because a line break after `|` continues the rule. Knows no
JSON Schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import cast

from localllm.errors import GrammarError

MAX_RULES = 20_000
MAX_CHARACTERS = 1_000_000
MAX_REPEAT = 100_000
CHUNK = 1_000
"""Longer repetitions are assembled from blocks of this many."""

PRIMITIVES: Mapping[str, str] = {
    # Models write `{"a": 1, "b": [1, 2]}` or indented lines; the bound keeps a weak model from looping on blanks.
    "ws": r'(" " | "\n" [ \t]{0,20})?',
    "colon": r'":" " "?',
    "comma": r'"," ws',
    "value": r'object | array | string | number | boolean | "null"',
    "object": r'"{" ws (pair (comma pair)* ws)? "}"',
    "pair": "string colon value",
    "array": r'"[" ws (value (comma value)* ws)? "]"',
    "boolean": r'"true" | "false"',
    "string": r'"\"" char* "\""',
    # One code point each, so that lengths are exact: a surrogate pair counts once, a lone surrogate never passes.
    "char": r'plain | "\\" (["\\/bfnrt] | "u" (unit | pair-high "\\u" pair-low))',
    "plain": r'[^"\\\x00-\x1F]',
    "unit": r"[0-9A-CE-Fa-ce-f] hex hex hex | [Dd] [0-7] hex hex",
    "pair-high": r"[Dd] [89ABab] hex hex",
    "pair-low": r"[Dd] [C-Fc-f] hex hex",
    "hex": r"[0-9A-Fa-f]",
    "integer": r'"0" | "-"? [1-9] [0-9]{0,39}',
    # Two exponent digits: the value stays a finite double.
    "number": r'"-"? ("0" | [1-9] [0-9]{0,39}) ("." [0-9]{1,24})? ([eE] [+-]? [0-9]{1,2})?',
    "digits": r"[0-9]{0,24}",
    "zeros": r'"0"{0,24}',
    # The rest of a key written without escapes, so that it cannot spell a declared key another way.
    "key-rest": r'plain* "\""',
}

_QUOTED_OR_CLASS = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|\{[\d,]*\}')
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")
_ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


def literal(text: str) -> str:
    """`text` as a GBNF string."""
    return '"' + "".join(_ESCAPES.get(c) or (f"\\x{ord(c):02X}" if ord(c) < 32 else c) for c in text) + '"'


def json_literal(value: object) -> str:
    """The JSON text of `value` with free blanks between the elements of objects and arrays."""
    if isinstance(value, dict):
        members = " comma ".join(f"{json_literal(k)} colon {json_literal(v)}" for k, v in cast(dict[str, object], value).items())
        return f'"{{" ws {members} ws "}}"' if members else '"{" ws "}"'
    if isinstance(value, list):
        items = " comma ".join(json_literal(item) for item in cast(list[object], value))
        return f'"[" ws {items} ws "]"' if items else '"[" ws "]"'
    return literal(json.dumps(value, ensure_ascii=False))


def character_class(ranges: list[tuple[int, int]]) -> str:
    """A class of inclusive code point ranges, at least one; a single character is a string."""
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return literal(chr(ranges[0][0]))

    def one(code: int) -> str:
        c = chr(code)
        if c in "\\]-[^" or code < 0x20 or 0x7F <= code < 0xA0:
            return f"\\x{code:02X}"
        return c if code < 0x7F else f"\\U{code:08X}"

    return "[" + "".join(one(a) if a == b else f"{one(a)}-{one(b)}" for a, b in ranges) + "]"


def either(*alternatives: str) -> str:
    """One of `alternatives`, safe inside a sequence."""
    return alternatives[0] if len(alternatives) == 1 else f"({' | '.join(alternatives)})"


class Rules:
    """A grammar being written: named rules, equal ones shared, its size watched."""

    def __init__(self) -> None:
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._reserved = 0
        self._characters = 0

    def reserve(self, kind: str) -> str:
        """A fresh rule name; `define` gives it a body later."""
        self._reserved += 1
        if self._reserved > MAX_RULES:
            raise GrammarError(f"the grammar needs more than {MAX_RULES:,} rules", hint="make the schema smaller")
        return f"{kind}-{self._reserved}"

    def define(self, name: str, body: str) -> None:
        self._characters += len(body)
        if self._characters > MAX_CHARACTERS:
            raise GrammarError(f"the grammar is longer than {MAX_CHARACTERS:,} characters", hint="make the schema smaller")
        self._bodies[name] = body

    def add(self, kind: str, body: str) -> str:
        """The name of a rule with this body."""
        if body not in self._names:
            name = self._names[body] = self.reserve(kind)
            self.define(name, body)
        return self._names[body]

    def repeat(self, item: str, low: int, high: int | None) -> str:
        """`low` to `high` (None: any number) times `item`, a rule name that matches at least one character."""
        if max(low, high or 0) > MAX_REPEAT:
            raise GrammarError(f"{max(low, high or 0):,} repetitions are too many", hint=f"use at most {MAX_REPEAT:,}, or no limit")
        if high == 0:
            return '""'
        if high is not None and high <= CHUNK:
            return f"{item}{{{low},{high}}}"
        blocks, left = divmod(low, CHUNK)
        needed = [self.add("block", f"{item}{{{CHUNK}}}")] * blocks if blocks else []
        if high is None:
            return " ".join([*needed, f"{item}{{{left},}}"])
        if left:
            needed.append(f"{item}{{{left}}}")
        free = high - low
        if not free:
            return " ".join(needed)
        # Fewer than a block, or a block and then the rest: every length has exactly one derivation.
        rest = f"{item}{{0,{(free - 1) % CHUNK + 1}}}"
        for _ in range((free - 1) // CHUNK):
            part, block = self.add("part", f"{item}{{0,{CHUNK - 1}}}"), self.add("block", f"{item}{{{CHUNK}}}")
            rest = self.add("upto", f"{part} | {block} {rest}")
        return " ".join([*needed, rest])

    def until(self, marker: str) -> str:
        """The name of a rule for any text up to and including the first `marker`."""
        states = [self.reserve("until") for _ in marker]

        def after(i: int, c: str) -> int:
            seen = marker[:i] + c
            return next(n for n in range(len(seen), -1, -1) if seen.endswith(marker[:n]))

        for i, name in enumerate(states):
            known = sorted(c for c in set(marker) if after(i, c))
            moves = [literal(c) if after(i, c) == len(marker) else f"{literal(c)} {states[after(i, c)]}" for c in known]
            others = "".join(r"\\" if c == "\\" else rf"\{c}" if c in "[]-" else c for c in known)
            self.define(name, " | ".join([*moves, f"[^{others}] {states[0]}"]))
        return states[0]

    def key_except(self, names: list[str]) -> str:
        """A JSON key that is none of `names`."""
        spellings = {name for name in names if json.dumps(name, ensure_ascii=False) == f'"{name}"'}
        if not names:
            return "string"
        nodes = sorted({name[:i] for name in spellings for i in range(len(name) + 1)} | {""}, key=len, reverse=True)
        rules: dict[str, str] = {}
        for node in nodes:
            following = sorted({name[len(node)] for name in spellings if name.startswith(node) and len(name) > len(node)})
            moves = [f"{literal(c)} {rules[node + c]}" for c in following]
            others = "".join(rf"\{c}" if c in "[]-" else c for c in following)
            ends = [] if node in spellings else [r'"\""']
            rules[node] = self.add("key", " | ".join([*moves, rf'[^"\\\x00-\x1F{others}] key-rest', *ends]))
        return rf'"\"" {rules[""]}'

    def text(self, root: str) -> str:
        """The grammar, with the primitives that it mentions; `root` is the body of the start rule."""
        bodies = {"root": root, **self._bodies}
        todo = list(bodies.values())
        while todo:
            for name in _NAME.findall(_QUOTED_OR_CLASS.sub(" ", todo.pop())):
                if name in PRIMITIVES and name not in bodies:
                    bodies[name] = PRIMITIVES[name]
                    todo.append(PRIMITIVES[name])
        gbnf = "".join(f"{name} ::= {body}\n" for name, body in bodies.items())
        try:
            gbnf.encode()
        except UnicodeEncodeError:
            raise GrammarError("a text in the schema holds half of a surrogate pair", hint="use valid Unicode") from None
        return gbnf
