"""A reader of GBNF in pure Python, and llama.cpp itself as the second opinion."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A symbol is ("char", negated, ranges), ("ref", name), ("alt", sequences) or ("rep", symbol, low, high).
Symbol = tuple[Any, ...]
Stack = tuple[Any, ...]


class Grammar:
    """The language of one grammar."""

    def __init__(self, text: str) -> None:
        self.rules: dict[str, tuple[tuple[Symbol, ...], ...]] = {}
        for line in text.removesuffix("\n").split("\n"):
            name, _, body = line.partition(" ::= ")
            assert name not in self.rules, f"rule {name} is written twice"
            reader = _Reader(body)
            self.rules[name] = reader.alternatives()
            assert reader.at == len(body), f"{name}: unexpected {body[reader.at :]!r}"
        for sequences in self.rules.values():
            for sequence in sequences:
                self._check(sequence)
        self.root = self.rules["root"]

    def _check(self, sequence: Sequence[Symbol]) -> None:
        for symbol in sequence:
            match symbol:
                case ("ref", name):
                    assert name in self.rules, f"rule {name} is missing"
                case ("alt", sequences):
                    for inner in sequences:
                        self._check(inner)
                case ("rep", inner, low, high):
                    assert max(low, high or 0) <= 2000, "llama.cpp unfolds at most 2,000 repetitions"
                    self._check([inner])

    def accepts(self, text: str) -> bool:
        return () in self._after(text)

    def begins(self, text: str) -> bool:
        """Whether `text` can be continued to an accepted text."""
        return bool(self._after(text))

    def _after(self, text: str) -> set[Stack]:
        """What may follow `text`: stacks of symbols (head, rest), the head a character; () for the end."""
        stacks = self._expand({(("alt", self.root), ())})
        for char in text:
            follow: set[Stack] = set()
            for stack in stacks:
                if stack:
                    (_, negated, ranges), rest = stack
                    if any(a <= char <= b for a, b in ranges) != negated:
                        follow.add(rest)
            stacks = self._expand(follow)
        return stacks

    def _expand(self, stacks: set[Stack]) -> set[Stack]:
        ready: set[Stack] = set()
        seen, todo = set(stacks), list(stacks)
        while todo:
            stack = todo.pop()
            if not stack or stack[0][0] == "char":
                ready.add(stack)
                continue
            symbol, rest = stack
            for sequence in self._choices(symbol):
                new = rest
                for inner in reversed(sequence):
                    new = (inner, new)
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
        return ready

    def _choices(self, symbol: Symbol) -> Sequence[Sequence[Symbol]]:
        match symbol:
            case ("ref", name):
                return self.rules[name]
            case ("alt", sequences):
                return sequences
            case ("rep", inner, low, high):
                more = ("rep", inner, max(0, low - 1), None if high is None else high - 1)
                again = [] if high == 0 else [(inner, more)]
                return again if low else [(), *again]
        raise AssertionError(symbol)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def blank(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in " \t":
            self.at += 1

    def alternatives(self) -> tuple[tuple[Symbol, ...], ...]:
        out = [self.sequence()]
        while self.at < len(self.text) and self.text[self.at] == "|":
            self.at += 1
            out.append(self.sequence())
        return tuple(out)

    def sequence(self) -> tuple[Symbol, ...]:
        out: list[Symbol] = []
        self.blank()
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            out.append(self.repeated(self.symbol()))
            self.blank()
        assert out, f'an empty alternative must be written "": {self.text!r}'
        return tuple(out)

    def symbol(self) -> Symbol:
        c = self.text[self.at]
        if c == '"':
            self.at += 1
            out: list[Symbol] = []
            while self.text[self.at] != '"':
                char = self.char()
                out.append(("char", False, ((char, char),)))
            self.at += 1
            return ("alt", (tuple(out),))
        if c == "[":
            self.at += 1
            negated = self.text[self.at] == "^"
            self.at += negated
            ranges: list[tuple[str, str]] = []
            while self.text[self.at] != "]":
                low = high = self.char()
                if self.text[self.at] == "-" and self.text[self.at + 1] != "]":
                    self.at += 1
                    high = self.char()
                ranges.append((low, high))
            self.at += 1
            return ("char", negated, tuple(ranges))
        if c == "(":
            self.at += 1
            inner = self.alternatives()
            assert self.text[self.at] == ")"
            self.at += 1
            return ("alt", inner)
        start = self.at
        while self.at < len(self.text) and (self.text[self.at].isalnum() or self.text[self.at] == "-"):
            self.at += 1
        assert self.at > start, f"unexpected {self.text[self.at :]!r}"
        return ("ref", self.text[start : self.at])

    def repeated(self, symbol: Symbol) -> Symbol:
        rest = self.text[self.at : self.at + 1]
        if rest and rest in "*+?":
            self.at += 1
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[rest]
            return ("rep", symbol, low, high)
        if rest == "{":
            end = self.text.index("}", self.at)
            low_text, comma, high_text = self.text[self.at + 1 : end].partition(",")
            self.at = end + 1
            return ("rep", symbol, int(low_text), int(high_text) if high_text else None if comma else int(low_text))
        return symbol

    def char(self) -> str:
        c = self.text[self.at]
        self.at += 1
        if c != "\\":
            return c
        c = self.text[self.at]
        self.at += 1
        if size := {"x": 2, "u": 4, "U": 8}.get(c):
            digits = self.text[self.at : self.at + size]
            self.at += size
            return chr(int(digits, 16))
        return {"n": "\n", "r": "\r", "t": "\t"}.get(c) or {"\\": c, '"': c, "[": c, "]": c, "-": c}[c]


class LlamaVocab:
    """llama.cpp's own grammar engine over one model's vocabulary."""

    def __init__(self, model: Path) -> None:
        import llama_cpp

        # importing it takes llama.cpp's log; a callback of our own would outlive this object in C
        import localllm.llama.lib  # noqa: F401

        self.lib = llama_cpp
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        assert self.model
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def close(self) -> None:
        self.lib.llama_model_free(self.model)

    def grammar(self, gbnf: str, triggers: tuple[str, ...] | None = None) -> LlamaGrammar | None:
        """None when llama.cpp refuses the grammar."""
        if triggers is None:
            sampler = self.lib.llama_sampler_init_grammar(self.vocab, gbnf.encode(), b"root")
        else:
            patterns = (ctypes.c_char_p * len(triggers))(*(t.encode() for t in triggers))
            sampler = self.lib.llama_sampler_init_grammar_lazy_patterns(
                self.vocab, gbnf.encode(), b"root", ctypes.cast(patterns, ctypes.POINTER(ctypes.c_char_p)), len(triggers), None, 0
            )
        return LlamaGrammar(self, sampler) if sampler else None

    def tokens(self, text: str) -> list[int]:
        raw = text.encode()
        out = (self.lib.llama_token * (len(raw) + 8))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, True)
        assert count >= 0
        return list(out[:count])


class LlamaGrammar:
    """One grammar sampler; `allows` asks, `accept` goes on."""

    def __init__(self, owner: LlamaVocab, sampler: Any) -> None:
        self.owner = owner
        self.sampler = sampler

    def __enter__(self) -> LlamaGrammar:
        return self

    def __exit__(self, *_: object) -> None:
        self.owner.lib.llama_sampler_free(self.sampler)

    def allows(self, token: int) -> bool:
        lib = self.owner.lib
        data = (lib.llama_token_data * 1)(lib.llama_token_data(id=token, logit=1.0, p=0.0))
        array = lib.llama_token_data_array(data=data, size=1, selected=-1, sorted=False)
        lib.llama_sampler_apply(self.sampler, ctypes.byref(array))
        return data[0].logit == 1.0

    def accept(self, token: int) -> None:
        self.owner.lib.llama_sampler_accept(self.sampler, token)

    def accepts(self, text: str) -> bool:
        """Whether the whole text passes and the end is allowed after it."""
        for token in self.owner.tokens(text):
            if not self.allows(token):
                return False
            self.accept(token)
        return self.allows(self.owner.lib.llama_vocab_eos(self.owner.vocab))
