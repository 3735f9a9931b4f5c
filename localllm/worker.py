"""The child process: one engine behind JSON lines on stdin and stdout.

It knows the protocol and how to live and die as a child; what an answer is, it does not. Lines in:

    {"id": 1, "type": "load", "config": {…}}        -> events with Loading, then loaded or error
    {"id": 2, "type": "stream", "request": {…}}     -> events; the last one is Done or Failed
    {"id": 2, "type": "cancel"}
    {"id": 3, "type": "call", "op": "…", "args": {…}}   -> result or error
    {"id": 4, "type": "shutdown"}

Lines out: `hello {protocol, version, pid}` first, then `{"id", "type": "events", "events": [Event…]}`,
`{"id", "type": "loaded" | "result", "value"}`, `{"id", "type": "error", "error": LocalLLMError.to_json()}`.

The end of stdin means that the parent is gone, whatever way it went: the worker ends too.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from localllm import __version__, wire
from localllm.engine.config import EngineConfig
from localllm.errors import EngineError, InvalidRequest, LocalLLMError, UsageError
from localllm.types import Done, Event, Failed, Loading, Request

GRACE_S = 5.0
"""How long the engine may take to close before the process ends anyway."""
PR_SET_PDEATHSIG = 1

OnProgress = Callable[[str, float], bool]
Sink = Callable[[list[Event]], None]


class Handle(Protocol):
    """A request in flight."""

    def cancel(self) -> None: ...


class LoadedEngine(Protocol):
    """The part of Engine that a worker drives."""

    def info(self) -> Mapping[str, Any]: ...
    def submit(self, request: Request, sink: Sink) -> Handle: ...
    async def call(self, op: str, **args: Any) -> Any: ...
    async def close(self) -> None: ...


Load = Callable[[EngineConfig, OnProgress], LoadedEngine]


class Stream:
    """A request in flight; a cancel may come before the engine has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handle: Handle | None = None
        self._cancelled = False

    def started(self, handle: Handle) -> None:
        with self._lock:
            self._handle = handle
            if self._cancelled:
                handle.cancel()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._handle is not None:
                self._handle.cancel()


class Worker:
    """Turns lines into calls of one engine, and what it says into lines. No line makes it end but `shutdown`."""

    def __init__(self, load: Load, out: wire.Pipe) -> None:
        self._load = load
        self._out = out
        self._engine: LoadedEngine | None = None
        self._ending = threading.Event()
        self._streams: dict[int, Stream] = {}
        self._loads = ThreadPoolExecutor(1, "load")
        # Templates and long prompts take their time; meanwhile this thread still reads a `cancel`.
        self._work = ThreadPoolExecutor(8, "work")

    def run(self, lines: Iterable[bytes | InvalidRequest]) -> None:
        """Serve until `shutdown` or the end of `lines`, then close the engine."""
        self._send({"type": "hello", "protocol": wire.PROTOCOL, "version": __version__, "pid": os.getpid()})
        for line in lines:
            ident: Any = None
            try:
                if isinstance(line, InvalidRequest):
                    raise line
                message = wire.parse(line)
                ident = message.get("id")
                if message.get("type") == "shutdown":
                    break
                self._handle(ident, message)
            except Exception as error:
                self._error(ident, error)
        self._end()

    def _handle(self, ident: Any, message: dict[str, Any]) -> None:
        if not isinstance(ident, int):
            raise InvalidRequest("a message has no id", hint="give it a number that no other message has")
        match message:
            case {"type": "stream", "request": request}:
                if ident in self._streams:
                    raise InvalidRequest(f"stream {ident} is open already", hint="use a new id")
                self._streams[ident] = stream = Stream()
                self._work.submit(self._stream, ident, stream, request)
            case {"type": "cancel"}:
                if (stream := self._streams.get(ident)) is not None:
                    stream.cancel()
            case {"type": "call", "op": str(op), "args": args}:
                self._work.submit(self._call, ident, op, args)
            case {"type": "load", "config": config}:
                self._loads.submit(self._load_engine, ident, config)
            case _:
                raise InvalidRequest(f"not a message of the worker protocol: {message.get('type')!r:.40}", hint="see localllm/worker.py")

    def _load_engine(self, ident: int, config: Any) -> None:
        said: tuple[str, int] | None = None

        def on_progress(stage: str, fraction: float) -> bool:
            nonlocal said
            if (now := (stage, int(fraction * 100))) != said:
                said = now
                self._send({"id": ident, "type": "events", "events": [Loading(stage, fraction)]})
            return not self._ending.is_set()

        try:
            if self._engine is not None:
                raise InvalidRequest("a model is loaded already", hint="start a second worker")
            self._engine = self._load(wire.decode(EngineConfig, config), on_progress)
            self._send({"id": ident, "type": "loaded", "value": self._engine.info()})
        except Exception as error:
            self._error(ident, error)

    def _stream(self, ident: int, stream: Stream, data: Any) -> None:
        def sink(events: list[Event]) -> None:
            if any(isinstance(event, (Done, Failed)) for event in events):
                self._streams.pop(ident, None)
            self._send({"id": ident, "type": "events", "events": events})

        try:
            stream.started(self._loaded().submit(wire.decode(Request, data), sink))
        except Exception as error:
            sink([Failed(_as_error(error).to_json())])

    def _call(self, ident: int, op: str, args: Any) -> None:
        try:
            self._send({"id": ident, "type": "result", "value": asyncio.run(self._loaded().call(op, **args))})
        except Exception as error:
            self._error(ident, error)

    def _loaded(self) -> LoadedEngine:
        if self._engine is None:
            raise InvalidRequest("no model is loaded", hint="load one first")
        return self._engine

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            line = wire.encode(message)
        except LocalLLMError as error:  # who waits for an answer that cannot be written is told so
            said = error.to_json()
            end = {"events": [Failed(said)]} if message["type"] == "events" else {"type": "error", "error": said}
            line = wire.encode({"id": message["id"], "type": message["type"], **end})
        self._out.put(line)

    def _error(self, ident: Any, error: Exception) -> None:
        self._send({"id": ident, "type": "error", "error": _as_error(error).to_json()})

    def _end(self) -> None:
        """Close the engine in order; a step that takes too long is cut off with the process."""
        self._ending.set()
        deadline = threading.Timer(GRACE_S, os._exit, [1])
        deadline.daemon = True
        deadline.start()
        self._loads.shutdown()
        self._work.shutdown(wait=False, cancel_futures=True)
        if self._engine is not None:
            asyncio.run(self._engine.close())
        self._out.close()


def _as_error(error: Exception) -> LocalLLMError:
    """`error` as one that can cross the pipe; a surprise leaves its traceback in the log."""
    if isinstance(error, LocalLLMError):
        return error
    traceback.print_exception(error)
    return EngineError(f"{type(error).__name__}: {error}", hint="this is a bug in localllm; its log has the traceback")


def _end_with_thread(died: threading.ExceptHookArgs) -> None:
    traceback.print_exception(died.exc_type, died.exc_value, died.exc_traceback)
    os._exit(1)


def isolate() -> tuple[int, int]:
    """Make this process a worker; returns the descriptors (in, out) that carry the protocol.

    C code prints to descriptor 1 and may read descriptor 0, so both are moved out of its reach.
    Ctrl-C belongs to the parent. On Linux the kernel ends us with the thread that started us. When one
    of our own threads dies, requests would wait for it forever, so the process ends and says why.
    """
    threading.excepthook = _end_with_thread
    faulthandler.enable(all_threads=False)  # the parent keeps only the last lines
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    pipe_in, pipe_out = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return pipe_in, pipe_out


def load_engine(config: EngineConfig, on_progress: OnProgress) -> LoadedEngine:
    """The real engine; imported late, so that a broken llama.cpp is an answer to `load` and not a silent death."""
    from localllm.engine.engine import Engine

    return Engine.load(config, on_progress)


def main(role: str = "engine", load: Load = load_engine) -> None:
    """Run a worker until its parent lets go; `load` makes the engine."""
    if role != "engine":
        raise UsageError(f"no worker has the role {role!r}", hint="use engine")
    pipe_in, pipe_out = isolate()
    with open(pipe_in, "rb") as lines:
        Worker(load, wire.Pipe(pipe_out)).run(wire.read_lines(lines))
    sys.stdout.flush()
    # An operation that still runs would hold up an orderly exit, and C++ destructors can only make trouble now.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
