"""Jinja for text we did not write: the dialect of Hugging Face chat templates, with limits on time and size.

jinja2's sandbox keeps a template from reaching Python's inside; it does not stop one that loops, or that
writes 'x' * 10**9. Here every loop turn, call and filter checks a clock, and whatever can make a large value
(`*`, `+`, `~`, `%`, filters, string methods, list literals) is measured. Knows nothing of messages.
"""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_format, do_indent, do_join, do_replace
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from localllm.prompt.meter import LimitExceeded, Limits, Meter

_STRING_METHODS = frozenset(
    ("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "partition", "rpartition", "removeprefix", "removesuffix")
    + ("startswith", "endswith", "find", "rfind", "index", "rindex", "count", "replace", "join")
    + ("lower", "upper", "title", "capitalize", "casefold", "swapcase", "center", "ljust", "rjust", "zfill")
    + ("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric")
    + ("isprintable", "isspace", "istitle", "isupper")
)
_DROPPED_FILTERS = ("pprint", "random", "urlize", "wordwrap", "xmlattr", "filesizeformat")
_COUNTING_FILTERS = frozenset(("center", "truncate", "batch", "slice"))
_COUNTING_METHODS = frozenset(("center", "ljust", "rjust", "zfill"))
_MAX_COUNT = 10_000
"""The largest width or count that one of these takes."""
_MAX_BITS = 4096
"""The largest integer that `*` and `**` may make."""
_WIDE = re.compile(r"\d{5}|\*|:[^{}]*\{")
"""In a format string: a width of five digits, or one taken from an argument."""


class _PlainNamespace(Namespace):
    """A namespace that prints as a word: attributes may nest without end."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is plain."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Metering(NodeTransformer):
    """Puts a count into every loop and macro, and a measure on every literal that could nest."""

    def _call(self, name: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=lineno)

    def _count(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Call:
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        return self._call("count", [nodes.Const(text)], node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        count = self._count(node)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(self._call("count", [nodes.Const(0)], node.lineno), node.test, lineno=node.lineno)
        return self.generic_visit(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        node.body.insert(0, nodes.ExprStmt(self._count(node), lineno=node.lineno))
        return self.generic_visit(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        node.body.insert(0, nodes.ExprStmt(self._count(node), lineno=node.lineno))
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined", list(node.nodes), node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return node if constant else self._call("measured", [node], node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx != "load":
            return node
        self.generic_visit(node)
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return node if constant else self._call("measured", [node], node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(item.value, nodes.Const) for item in node.items)
        return node if constant else self._call("measured", [node], node.lineno)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one chat template; `meter` is set anew for each rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, now: Callable[[], datetime] = datetime.now) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            finalize=_finalize,
            optimized=False,  # folding constants would run filters while compiling
        )
        self.meter = Meter(Limits())
        self._now = now
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        self.filters = {name: self._metered(name, function) for name, function in self.filters.items()}
        self.filters |= {"tojson": self._tojson, "join": _join, "replace": _replace, "indent": _indent, "format": _format}
        del self.globals["lipsum"]
        self.globals |= {"namespace": _PlainNamespace, "raise_exception": _raise_exception, "strftime_now": self._strftime}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metering().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if isinstance(obj, (int, float, complex, bytes)):
            return False
        if isinstance(obj, list) and attr in ("append", "pop"):
            return True  # templates keep queues of call ids in lists; what they can reach is a copy
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        template: str = value.__self__

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(template)
            self.meter.need(len(template) + template.count("{") * self.meter.weigh((args, kwargs)))
            return formatted(*args, **kwargs)

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self = __self
        self.meter.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ in _COUNTING_METHODS:
                _check_counts(args)
            elif __obj.__name__ == "replace":
                self.meter.need(_replaced_length(owner, args))
            elif __obj.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])
                self.meter.need(_joined_length(self.meter, args[0], owner))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(owner, list):
            self.meter.spend(self.meter.weigh(owner))
        return self.measured(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                    meter.need(meter.weigh(sequence) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
                raise LimitExceeded("it multiplies huge numbers")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_BITS:
            raise LimitExceeded("it raises to a huge power")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            meter.need(len(left) + left.count("%") * meter.weigh(right))
        return self.measured(super().call_binop(context, operator, left, right))

    def count(self, text: int) -> bool:
        """One turn of a loop or call of a macro that writes `text` characters of its own."""
        self.meter.spend(text)
        return True

    def joined(self, *values: Any) -> str:
        """`a ~ b`: the values as text, one after the other."""
        for value in values:
            self.meter.weigh(value)
        return self.measured("".join(map(str, values)))

    def measured(self, value: Any) -> Any:
        """`value`, counted; a generator is counted as it runs."""
        if isinstance(value, str):
            self.meter.spend(len(value))
        elif isinstance(value, (list, tuple, set, Mapping)):
            self.meter.spend(self.meter.weigh(value))
        elif isinstance(value, types.GeneratorType):
            return self.meter.each(cast("Iterable[Any]", value))
        return cast("Any", value)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # carries jinja's marks (pass_context and the like) over
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            if name in _COUNTING_FILTERS:
                _check_counts((*args, *kwargs.values()))
            return self.measured(function(*args, **kwargs))

        return metered

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if isinstance(value, Undefined):
            raise jinja2.UndefinedError("tojson was given an undefined value")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        self.meter.weigh(value)
        if indent is None:
            return self.measured(encoder.encode(value))
        _check_counts((indent,))
        chunks: list[str] = []
        for chunk in encoder.iterencode(value):
            self.meter.spend(len(chunk))
            chunks.append(chunk)
        return self.measured("".join(chunks))

    def _strftime(self, format: str) -> str:
        if len(format) > 100 or _WIDE.search(format):
            raise LimitExceeded("it asks for an odd date format")
        return self._now().strftime(format)


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    env = context.environment
    assert isinstance(env, ChatEnvironment)
    if not isinstance(value, (str, Undefined)):
        env.meter.weigh(value)
        value = str(value)
    return env.measured(value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message)[:1000])


@jinja2.pass_eval_context
def _join(context: nodes.EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    env = _environment(context)
    items = list(env.meter.each(value))
    env.meter.need(_joined_length(env.meter, items, d))
    return env.measured(do_join(context, items, d, attribute))


@jinja2.pass_eval_context
def _replace(context: nodes.EvalContext, s: str, old: str, new: str, count: int | None = None) -> str:
    env = _environment(context)
    env.meter.need(_replaced_length(str(s), (str(old), str(new))))
    return env.measured(do_replace(context, s, old, new, count))


@jinja2.pass_eval_context
def _indent(context: nodes.EvalContext, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    env = _environment(context)
    _check_counts((width,))
    env.meter.need(len(s) + (s.count("\n") + 2) * (width if isinstance(width, int) else len(width)))
    return env.measured(do_indent(s, width, first, blank))


@jinja2.pass_eval_context
def _format(context: nodes.EvalContext, value: str, *args: Any, **kwargs: Any) -> str:
    env = _environment(context)
    _check_format(value)
    env.meter.need(len(value) + value.count("%") * env.meter.weigh((args, kwargs)))
    return env.measured(do_format(value, *args, **kwargs))


def _environment(context: nodes.EvalContext) -> ChatEnvironment:
    assert isinstance(context.environment, ChatEnvironment)
    return context.environment


def _check_counts(args: Iterable[Any]) -> None:
    for arg in args:
        if isinstance(arg, int) and abs(arg) > _MAX_COUNT:
            raise LimitExceeded(f"it uses a count of more than {_MAX_COUNT:,}")


def _check_format(template: str) -> None:
    if _WIDE.search(template):
        raise SecurityError("a format string asks for an unbounded width")


def _replaced_length(text: str, args: tuple[Any, ...]) -> int:
    old, new = (*args, "", "")[:2]
    times = text.count(old) if isinstance(old, str) else 0
    return len(text) + times * max(0, len(new) - len(old)) if isinstance(new, str) else len(text)


def _joined_length(meter: Meter, items: list[Any], separator: Any) -> int:
    return meter.weigh(items) + len(items) * len(str(separator))
