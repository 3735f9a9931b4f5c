"""Conversations that templates are tried on, and jinja2 as transformers sets it up, without our limits."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

NOW = datetime(2025, 7, 26, 12, 30)

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a city, in °C & "words"',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City's name"},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any, id: str = "call00001") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


SYSTEM = {"role": "system", "content": "You are  terse.\n"}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"t": 21, "sky": "<blue>"}'}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "user": ([user('Hi <there> & "you"')], []),
    "system": ([SYSTEM, user("Hi")], []),
    "turns": ([SYSTEM, user("One?"), assistant("1."), user("  Two?\n"), assistant("2\n\n"), user("Three?")], []),
    "reasoning": (
        [
            user("Why?"),
            assistant("Because.", reasoning_content="Let me see."),
            user("And?"),
            assistant("<think>\nx\n</think>\n\ny"),
            user("So?"),
        ],
        [],
    ),
    "parts": ([user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])], []),
    "tools offered": ([SYSTEM, user("Weather?")], [WEATHER]),
    "called": ([user("Weather?"), assistant("", tool_calls=[call({"city": "Zürich", "days": [1, 2]})]), RESULT], [WEATHER]),
    "called, as text": (
        [SYSTEM, user("Weather?"), assistant("", tool_calls=[call('{"city": "Oslo"}')]), RESULT, assistant("Blue."), user("Thanks")],
        [WEATHER],
    ),
}


class GenerationTag(Extension):
    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(lineno)

    def _say(self, caller: Any) -> str:
        return caller()


def plain_jinja() -> jinja2.Environment:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": NOW.strftime}
    return environment
