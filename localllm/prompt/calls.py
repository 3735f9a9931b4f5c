"""Tool calls in model output: a JSON object, or Qwen3-Coder's tags. What is no call is left unread."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

from localllm.prompt.pieces import CallArguments, CallStart, Piece
from localllm.prompt.reader import Chunks, Source, collect, json_string, json_value, literal, peek, space, until, word

Steps = Generator[Piece | None, None, Any]
"""Yields pieces, and None for more input."""

ARGUMENT_KEYS = ("arguments", "parameters")


class Tools:
    """The tools a request offers: OpenAI's list, or only whether there are any."""

    def __init__(self, offered: bool | Sequence[Mapping[str, Any]]) -> None:
        self._functions: dict[str, Mapping[str, Any]] = {}
        if not isinstance(offered, bool):
            functions = [tool.get("function") or tool for tool in offered]
            self._functions = {str(f.get("name")): f for f in functions}
        self._offered = bool(offered)

    def __bool__(self) -> bool:
        return self._offered

    def may_be(self, name: str) -> bool:
        """Whether `name` is one of them, as far as is known."""
        return not self._functions or name in self._functions

    def takes_text(self, name: str, parameter: str) -> bool | None:
        """Whether a parameter is declared a string; None if it is not declared."""
        schema: Any = self._functions.get(name)
        for key in ("parameters", "properties", parameter, "type"):
            schema = cast("Mapping[str, Any]", schema).get(key) if isinstance(schema, Mapping) else None
        return None if schema is None else schema == "string"


class Output:
    """One answer being read: its text, the tools it may call and the calls so far."""

    def __init__(self, tools: Tools) -> None:
        self.source = Source()
        self.tools = tools
        self.calls = 0

    def start(self, name: str) -> CallStart:
        self.calls += 1
        return CallStart(self.calls - 1, name)

    def arguments(self, delta: str) -> CallArguments:
        return CallArguments(self.calls - 1, delta)

    def stream(self, chunks: Chunks) -> Steps:
        """`chunks` as arguments of the current call; returns what they return."""
        while True:
            try:
                chunk = next(chunks)
            except StopIteration as end:
                return end.value
            yield None if chunk is None else self.arguments(chunk)


def call_object(out: Output, *, strict: bool) -> Steps:
    """Read `{"name": …, "arguments": {…}}`; returns whether it was a call, and if not nothing is read.

    `strict` is for objects that stand where an answer could: the name must be a tool's, the arguments an
    object, and no other keys may occur than the known ones.
    """
    source = out.source
    source.mark()
    name: str | None = None
    arguments: str | None = None
    started = False
    separator = yield from literal(source, "{")
    while separator:
        yield from space(source)
        key = yield from json_string(source)
        yield from space(source)
        if key is None or not (yield from literal(source, ":")):
            break
        yield from space(source)
        first = yield from peek(source)
        if key == "name":
            name = yield from json_string(source)
            if name is None or (strict and not out.tools.may_be(name)):
                break
        elif key in ARGUMENT_KEYS and not started:
            if strict and first != "{":
                break
            if name is not None and first == "{":
                started = True
                source.forget()
                yield out.start(name)
                if not (yield from out.stream(json_value(source))):
                    return True
            else:
                arguments, complete = yield from collect(json_value(source))
                if not complete:
                    break
        else:
            if strict and key not in ("type", "id"):
                break
            if not (yield from collect(json_value(source)))[1]:
                break
        yield from space(source)
        separator = yield from literal(source, ",", "}")
        if separator == "}":
            if started:
                return True
            if name is None or (strict and arguments is None):
                break
            source.forget()
            yield out.start(name)
            yield out.arguments(_unquoted(arguments))
            return True
    if not started:
        source.rewind()
    return started


def _unquoted(arguments: str | None) -> str:
    """Arguments as JSON text of an object: some models write them as a string, some leave them out."""
    if arguments is None or arguments.strip() == "null":
        return "{}"
    if arguments.startswith('"'):
        inner = json.loads(arguments, strict=False)
        return inner if inner.strip().startswith("{") else arguments
    return arguments


def call_array(out: Output, *, strict: bool) -> Steps:
    """Read `[{call}, {call}]`; returns whether the first was a call, and if not nothing is read but white space after `[`."""
    source = out.source
    any_call = False
    while True:
        yield from space(source)
        if (yield from peek(source)) != "{" or not (yield from call_object(out, strict=strict)):
            return any_call
        any_call = True
        yield from space(source)
        if not (yield from literal(source, ",")):
            yield from literal(source, "]")
            return True


def tagged_function(out: Output) -> Steps:
    """Read what follows `<function=`: `name>`, then `<parameter=key>value</parameter>`… or a JSON object, then `</function>`.

    Returns whether it was a call; if not, nothing is read. Values become JSON by the tool's schema.
    """
    source = out.source
    source.mark()
    name = yield from word(source)
    if not name or not (yield from literal(source, ">")):
        source.rewind()
        return False
    yield from space(source)
    if (yield from peek(source)) == "{":
        source.forget()
        yield out.start(name)
        yield from out.stream(json_value(source))
        yield from space(source)
        yield from literal(source, "</function>")
        return True
    following = yield from literal(source, "<parameter=", "</function>")
    if not following:
        source.rewind()
        return False
    source.forget()
    yield out.start(name)
    yield out.arguments("{")
    separator = ""
    while following == "<parameter=":
        key, _ = yield from collect(until(source, ">"))
        yield out.arguments(f"{separator}{json.dumps(key.strip(), ensure_ascii=False)}: ")
        separator = ", "
        if not (yield from _parameter(out, out.tools.takes_text(name, key.strip()))):
            return True  # cut off inside the value: the arguments stay open
        yield from space(source)
        following = yield from literal(source, "<parameter=", "</function>")
    yield out.arguments("}")
    return True


def _parameter(out: Output, is_text: bool | None) -> Steps:
    """A parameter's value up to its closing tag, as JSON; one newline at each end belongs to the tags."""
    source = out.source
    yield from literal(source, "\n", "\r\n")
    value = until(source, "\n</parameter>", "\r\n</parameter>", "</parameter>")
    if not is_text:
        text, end = yield from collect(value)
        yield out.arguments(_as_json(text) if end else json.dumps(text, ensure_ascii=False)[:-1])
        return bool(end)
    yield out.arguments('"')
    while True:
        try:
            chunk = next(value)
        except StopIteration as stop:
            if stop.value:
                yield out.arguments('"')
            return bool(stop.value)
        yield None if chunk is None else out.arguments(json.dumps(chunk, ensure_ascii=False)[1:-1])


def _as_json(text: str) -> str:
    """A value of undeclared or other type: JSON if it reads as such and is no string, else a string."""
    try:
        value = json.loads(text)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    return json.dumps(text if isinstance(value, str) else value, ensure_ascii=False)
