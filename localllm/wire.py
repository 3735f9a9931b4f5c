"""The language of the worker's pipe: JSON objects, one a line, and our frozen dataclasses in them.

It knows how a value becomes text and back, how a line is bounded, and how lines of several threads
leave without being mixed. What the lines mean is worker.py's and process.py's business.

Fields that hold their default are left out, tuples travel as arrays and come back as tuples, and
infinities travel as Python's json writes them (`-Infinity`). Text is pure ASCII, so that half a
surrogate pair in a prompt survives too. Decoding is strict: an unknown field or a wrong type is an
InvalidRequest that names it.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, BinaryIO, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from localllm.errors import InvalidRequest
from localllm.types import Delta, Done, Event, Failed, Finish, Loading, Prefill, Queued, ToolCall

PROTOCOL = 1
MAX_LINE_BYTES = 64 << 20

T = TypeVar("T")
Decoder = Callable[[Any], Any]

_EVENTS: dict[str, type[Event]] = {
    "queued": Queued,
    "loading": Loading,
    "prefill": Prefill,
    "delta": Delta,
    "tool_call": ToolCall,
    "finish": Finish,
    "done": Done,
    "failed": Failed,
}


def encode(message: Mapping[str, Any]) -> bytes:
    """One line with its newline; dataclasses may stand anywhere in `message`; InvalidRequest if it is too long or deep."""
    try:
        line = _ENCODER.encode(message).encode("ascii") + b"\n"
    except RecursionError:
        raise InvalidRequest("a message is nested too deeply", hint="flatten its JSON") from None
    if len(line) > MAX_LINE_BYTES:
        raise InvalidRequest(f"a message has {len(line):,} bytes, more than {MAX_LINE_BYTES:,}", hint="send less text")
    return line


def parse(line: bytes) -> dict[str, Any]:
    """The object of one line; InvalidRequest when it is none."""
    try:
        message = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"a line is not JSON: {error}", hint="send one JSON object a line") from None
    if not isinstance(message, dict):
        raise InvalidRequest("a line is not a JSON object", hint="send one JSON object a line")
    return cast(dict[str, Any], message)


def decode(kind: type[T], data: Any) -> T:
    """The dataclass `kind` that `encode` wrote as `data`; InvalidRequest names the field that does not fit."""
    try:
        return _decoder(kind)(data)
    except _Misfit as misfit:
        raise InvalidRequest(f"{kind.__name__}: {misfit}", hint="check the spelling and the type of the field") from None


def decode_event(data: Any) -> Event:
    """The event that `encode` wrote as `data`, told apart by its `type`."""
    kind = _EVENTS.get(cast(dict[str, Any], data).get("type", "")) if isinstance(data, dict) else None
    if kind is None:
        raise InvalidRequest(f"not an event: {data!r:.80}", hint="restart localllm: the two ends may be of different versions")
    return decode(kind, data)


def read_lines(pipe: BinaryIO) -> Iterator[bytes | InvalidRequest]:
    """Lines of `pipe` until it ends; for a line beyond the bound an error, and its bytes are dropped as they come."""
    while line := pipe.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while not line.endswith(b"\n") and (line := pipe.readline(1 << 20)):
            pass
        yield InvalidRequest(f"a line has more than {MAX_LINE_BYTES:,} bytes", hint="send less text")


class Pipe:
    """Lines of any thread, written by the thread that puts them: a worker's way out, where a hand-over would cost a
    wake-up per token. Who puts a line waits while the pipe is full; the parent reads it without pause.

    Lines after the pipe broke are dropped.
    """

    def __init__(self, fd: int) -> None:
        """Takes over `fd` and closes it at the end."""
        self._fd = fd
        self._lock = threading.Lock()
        self._open = True

    def put(self, line: bytes) -> None:
        with self._lock:
            try:
                if self._open:
                    _write(self._fd, line)
            except OSError:
                self._open = False

    def close(self) -> None:
        with self._lock:
            self._open = False
            os.close(self._fd)


class LineWriter:
    """Lines of any thread, written by one thread of its own: whatever gathered meanwhile leaves in one write.

    Nobody who puts a line waits for the reader at the other end. Lines after the pipe broke are dropped:
    the side that reads notices the death.
    """

    def __init__(self, fd: int, name: str) -> None:
        """Takes over `fd` and closes it at the end."""
        self._fd = fd
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        self._lines.put(line)

    def close(self, timeout_s: float | None = None) -> None:
        """Write what is left, then close the pipe; waits no longer than `timeout_s`."""
        self._lines.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while gathered := self._gather():
                _write(self._fd, gathered)
        except OSError:
            pass
        finally:
            os.close(self._fd)

    def _gather(self) -> bytes:
        """All lines that wait now, at least one; empty at the end."""
        lines: list[bytes] = []
        line = self._lines.get()
        while line is not None:
            lines.append(line)
            if self._lines.empty():
                return b"".join(lines)
            line = self._lines.get()
        self._lines.put(None)
        return b"".join(lines)


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _plain(value: Any) -> Any:
    """What json cannot write by itself: dataclasses without their defaults, and mappings that are no dict."""
    if is_dataclass(value):
        known = _defaults(type(value))
        return {name: v for name, default in known if (v := getattr(value, name)) != default}
    if isinstance(value, Mapping):
        return dict(cast(Mapping[str, Any], value))
    raise InvalidRequest(f"a {type(value).__name__} cannot be written as JSON", hint="use text, numbers, lists and dictionaries")


_ENCODER = json.JSONEncoder(default=_plain, separators=(",", ":"), check_circular=False)


@cache
def _defaults(kind: type) -> tuple[tuple[str, Any], ...]:
    """Field names of a dataclass, each with the value that need not be written."""
    never = object()

    def default(f: Any) -> Any:
        if f.name == "type" or (f.default is MISSING and f.default_factory is MISSING):
            return never
        return f.default_factory() if f.default is MISSING else f.default

    return tuple((f.name, default(f)) for f in fields(kind))


_SCALAR_NAMES: dict[Any, str] = {str: "text", int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
_SCALARS: dict[Any, Any] = {kind: kind for kind in _SCALAR_NAMES}


class _Misfit(Exception):
    """A value that does not fit its type; the path to it grows on the way up."""

    def __init__(self, what: str, path: str = "") -> None:
        super().__init__(what, path)
        self.what, self.path = what, path

    def __str__(self) -> str:
        return f"{self.path}: {self.what}" if self.path else self.what


@cache
def _decoder(kind: Any) -> Decoder:
    """A function from plain JSON to a value of the type `kind`; raises _Misfit."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass_decoder(cast(type, kind))
    if origin is tuple and args[-1] is Ellipsis:
        return _sequence_decoder(_decoder(args[0]), _SCALARS.get(args[0]))
    if origin is tuple:
        return _row_decoder([_decoder(arg) for arg in args])
    if origin in (Union, UnionType):
        return _union_decoder([_decoder(arg) for arg in args])
    if origin is Literal:
        return _check(lambda value: value in args, "one of " + ", ".join(map(repr, args)))
    if origin is not None and issubclass(origin, Mapping):
        return _check(lambda value: isinstance(value, dict), "an object")
    if kind is float:
        return _number
    if kind in _SCALARS:
        return _check(lambda value: type(value) is kind, _SCALAR_NAMES[kind])
    raise TypeError(f"no decoder for {kind}")


def _check(fits: Callable[[Any], bool], wanted: str) -> Decoder:
    def run(value: Any) -> Any:
        if not fits(value):
            raise _Misfit(f"wanted {wanted}, got {value!r:.80}")
        return value

    return run


def _number(value: Any) -> float:
    if type(value) in (int, float):
        return float(value)
    raise _Misfit(f"wanted a number, got {value!r:.80}")


def _dataclass_decoder(kind: type) -> Decoder:
    hints = get_type_hints(kind)
    # A value whose type is exactly the field's needs no call: an event comes for every token.
    decoders = {f.name: (_SCALARS.get(hints[f.name]), _decoder(hints[f.name])) for f in fields(kind)}
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]

    def run(data: Any) -> Any:
        if not isinstance(data, dict):
            raise _Misfit(f"wanted an object, got {data!r:.80}")
        values: dict[str, Any] = {}
        for name, value in cast(dict[str, Any], data).items():
            if name not in decoders:
                raise _Misfit("unknown field", name)
            scalar, convert = decoders[name]
            try:
                values[name] = value if type(value) is scalar else convert(value)
            except _Misfit as misfit:
                raise _Misfit(misfit.what, f"{name}.{misfit.path}".rstrip(".")) from None
        for name in required:
            if name not in values:
                raise _Misfit("missing", name)
        return kind(**values)

    return run


def _sequence_decoder(item: Decoder, scalar: Any) -> Decoder:
    def run(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _Misfit(f"wanted an array, got {value!r:.80}")
        values = cast(list[Any], value)
        return tuple(values if {scalar}.issuperset(map(type, values)) else map(item, values))

    return run


def _row_decoder(items: list[Decoder]) -> Decoder:
    def run(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(cast(list[Any], value)) != len(items):
            raise _Misfit(f"wanted an array of {len(items)}, got {value!r:.80}")
        return tuple(convert(v) for convert, v in zip(items, cast(list[Any], value), strict=True))

    return run


def _union_decoder(options: list[Decoder]) -> Decoder:
    def run(value: Any) -> Any:
        misfits: list[str] = []
        for option in options:
            try:
                return option(value)
            except _Misfit as misfit:
                misfits.append(misfit.what)
        raise _Misfit("; or ".join(misfits))

    return run
