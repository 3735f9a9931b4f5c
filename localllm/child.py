"""One worker process, from its birth to its last words.

It knows how a child is started out of the terminal's reach, how messages and answers find each
other, and how a death is told to everyone who waits. It never imports llama.cpp, and it does not
start anything twice: that is process.py's decision. Threads do the blocking work (one spawns and
reads, one writes, one listens to stderr), since asyncio's own subprocesses need a particular event
loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, BinaryIO, cast

from localllm import wire
from localllm.errors import EngineDied, InvalidRequest, LocalLLMError
from localllm.types import Done, Event, Failed, Request

SHUTDOWN_S = 8.0
"""How long a worker may take to end by itself; then it is terminated, then killed."""
TERMINATE_S = 2.0
LAST_WORDS_LINES = 60
LAST_WORDS_LINE_BYTES = 2000

Sink = Callable[[Sequence[Event]], None]
"""Takes the events of one message, in order, on the reading thread; must neither wait nor raise."""

log = logging.getLogger("localllm.worker")
_LEVELS = logging.getLevelNamesMapping()


def worker_command(role: str) -> list[str]:
    """The command line of a worker; -P keeps files of the current folder from posing as modules."""
    return [sys.executable, "-P", "-X", "utf8", "-m", "localllm.worker", role]


def spawn(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a child with pipes on all three descriptors, out of reach of the terminal's Ctrl-C.

    On Linux a worker dies with the *thread* that calls this: call it from one that outlives the child.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # On a crash ggml would start a debugger for a backtrace, which delays the death and buries the last words.
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


class Child:
    """One incarnation of the worker: a process, its threads, and who waits for what."""

    def __init__(self, command: Sequence[str]) -> None:
        """Starts the process in the background; what goes wrong comes out of `ask` and `open`."""
        self.info: dict[str, Any] = {}
        self.pid: int | None = None
        self.ended: Future[EngineDied] = Future()
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._out: wire.LineWriter | None = None
        self._unsent: list[bytes] = []
        self._killed = False
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS_LINES)
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._answers: dict[int, Future[Any]] = {}
        self._sinks: dict[int, Sink] = {}
        threading.Thread(target=self._live, name="worker-in", daemon=True).start()

    def ask(self, message: Mapping[str, Any], sink: Sink | None = None) -> Future[Any]:
        """Send `message`; the future is its one result or error. Events meanwhile go to `sink`."""
        answer: Future[Any] = Future()
        self._send(message, sink, answer)
        return answer

    def open(self, request: Request, sink: Sink) -> int:
        """Send `request` and return its id; its events go to `sink`, up to Done, Failed or `cancel`."""
        return self._send({"type": "stream", "request": request}, sink)

    def cancel(self, ident: int) -> None:
        """Stop a stream that nobody reads any more; one that has ended is left alone."""
        with self._lock:
            if self._sinks.pop(ident, None) is not None:
                self._put(wire.encode({"id": ident, "type": "cancel"}))

    async def close(self) -> None:
        """Shut down; terminate, then kill what does not listen. Returns when the process is gone."""
        with self._lock:
            if not self.ended.done():
                self._put(wire.encode({"id": next(self._ids), "type": "shutdown"}))
        try:
            if not await self._wait(SHUTDOWN_S) and self._process is not None:
                log.warning("worker %s does not shut down, ending it", self.pid)
                self._process.terminate()
                await self._wait(TERMINATE_S)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End the process now, also one that is still being started."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()
        await self._wait(TERMINATE_S)

    async def _wait(self, timeout_s: float) -> bool:
        done, _ = await asyncio.wait({asyncio.wrap_future(self.ended)}, timeout=timeout_s)
        return bool(done)

    def _send(self, message: Mapping[str, Any], sink: Sink | None, answer: Future[Any] | None = None) -> int:
        ident = next(self._ids)
        line = wire.encode({"id": ident, **message})
        with self._lock:
            if self.ended.done():
                raise self.ended.result()
            if answer is not None:
                self._answers[ident] = answer
            if sink is not None:
                self._sinks[ident] = sink
            self._put(line)
        return ident

    def _put(self, line: bytes) -> None:
        if self._out is None:
            self._unsent.append(line)
        else:
            self._out.put(line)

    def _live(self) -> None:
        """The whole life of the process in one thread: Linux ends a worker with the thread that spawned it."""
        try:
            process = spawn(self._command)
        except (OSError, ValueError) as error:
            self._end(EngineDied(f"the worker does not start: {error}", hint="check the installation of localllm"))
            return
        stdin, stdout, stderr = cast(tuple[BinaryIO, BinaryIO, BinaryIO], (process.stdin, process.stdout, process.stderr))
        listening = threading.Thread(target=self._listen, args=(stderr,), name="worker-stderr", daemon=True)
        listening.start()
        out = wire.LineWriter(os.dup(stdin.fileno()), "worker-out")
        stdin.close()
        with self._lock:
            self._process, self.pid, self._out = process, process.pid, out
            for line in self._unsent:
                out.put(line)
            if self._killed:
                process.kill()
        with stdout:
            for line in wire.read_lines(stdout):
                try:
                    if isinstance(line, InvalidRequest):
                        raise line
                    self._handle(wire.parse(line))
                except Exception as error:
                    log.warning("a line from the worker makes no sense: %s", error)
        out.close()
        try:
            code = process.wait(TERMINATE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        # A grandchild may hold stderr open; its words are not worth waiting for.
        listening.join(1.0)
        self._end(obituary(process.pid, code, list(self._last_words)))

    def _listen(self, stderr: BinaryIO) -> None:
        with stderr:
            while line := stderr.readline(LAST_WORDS_LINE_BYTES):
                text = line.decode(errors="replace").rstrip()
                self._last_words.append(text)
                level, _, rest = text.partition(" ")
                name, colon, said = rest.partition(": ")
                if colon and level in _LEVELS:  # a record of the child's logging, as worker.py formats them
                    logging.getLogger(name).log(_LEVELS[level], "%s", said)
                else:
                    log.info("%s", text)

    def _handle(self, message: dict[str, Any]) -> None:
        ident = message.get("id")
        match message:
            case {"type": "events", "events": events} if (sink := self._sinks.get(cast(int, ident))) is not None:
                self._pass_on(cast(int, ident), sink, events)
            case {"type": "loaded" | "result" | "error"}:
                with self._lock:
                    self._sinks.pop(cast(int, ident), None)
                    answer = self._answers.pop(cast(int, ident), None)
                error = LocalLLMError.from_json(message["error"]) if message["type"] == "error" else None
                _settle(answer, message.get("value"), error)
            case {"type": "hello", "protocol": protocol} if protocol != wire.PROTOCOL and self._process is not None:
                self._last_words.append(f"it speaks protocol {protocol}, not {wire.PROTOCOL}: localllm was updated, start it anew")
                self._process.kill()
            case _:
                pass

    def _pass_on(self, ident: int, sink: Sink, data: list[Any]) -> None:
        try:
            events = [wire.decode_event(event) for event in data]
        except InvalidRequest as error:
            events = [Failed(error.to_json())]
        if any(isinstance(event, (Done, Failed)) for event in events):
            with self._lock:
                self._sinks.pop(ident, None)
        sink(events)

    def _end(self, died: EngineDied) -> None:
        """Tell everyone who waits; who comes later is told by `ended`."""
        with self._lock:
            self.ended.set_result(died)
            answers, sinks = list(self._answers.values()), list(self._sinks.values())
            self._answers.clear()
            self._sinks.clear()
        for answer in answers:
            _settle(answer, None, died)
        for sink in sinks:
            sink([Failed(died.to_json())])


def obituary(pid: int, code: int, last_words: Sequence[str]) -> EngineDied:
    """How a worker ended: its exit code (negative: the signal that killed it) and the end of its log."""
    hint = "send the request again: that restarts it"
    if code == -getattr(signal, "SIGKILL", 9):
        hint += "; if memory was short, choose a smaller context or model"
    words = headline(last_words)
    message = f"the worker process {pid} {how_it_ended(code)}{words and ': ' + words}"
    return EngineDied(message, hint=hint, last_words=list(last_words), exit_code=code)


def how_it_ended(code: int) -> str:
    """An exit code in words; a negative one is a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"


def headline(last_words: Sequence[str]) -> str:
    """The line that says most: what came right before Python's own crash report, else the last one; no mere log records."""
    lines = [line for line in last_words if line and not line.startswith(("DEBUG ", "INFO "))]
    for at, line in enumerate(lines):
        if line.startswith("Fatal Python error"):
            return lines[at - 1] if at else line
    return lines[-1] if lines else ""


def _settle(answer: Future[Any] | None, value: Any, error: LocalLLMError | None) -> None:
    if answer is None:
        log.warning("the worker could not use a message: %s", error)
    elif answer.set_running_or_notify_cancel():
        if error is None:
            answer.set_result(value)
        else:
            answer.set_exception(error)
