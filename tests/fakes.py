"""A Backend without a model: it says what it is told to say, and gets into trouble when asked.

Run as a script it is a worker process with this engine in it:

    EngineProcess.start(config, command=FAKE_WORKER)

The prompt (or the last message) chooses what happens; see `FakeEngine.script`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from localllm.engine.config import EngineConfig
from localllm.errors import ContextExceeded, EngineError, InvalidRequest, ModelError
from localllm.inbox import Inbox
from localllm.types import Delta, Done, Event, Failed, Finish, Prefill, Request, Timings, Usage
from localllm.worker import main

FAKE_WORKER = [sys.executable, str(Path(__file__))]


class FakeEngine:
    """Answers with the words of the prompt, one Delta each; every request runs in a thread of its own."""

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig(model_path="fake.gguf")
        self.closed = False
        self.requests: list[Request] = []
        self._cancelled: list[threading.Event] = []

    @classmethod
    def load(cls, config: EngineConfig, on_progress: Callable[[str, float], bool] | None = None) -> FakeEngine:
        """A model path `broken.gguf` is no model, `crash.gguf` aborts, `endless.gguf` loads until it is told to stop."""
        report = on_progress or (lambda stage, fraction: True)
        match Path(config.model_path).name:
            case "broken.gguf":
                raise ModelError("broken.gguf is not a GGUF file", hint="download it again", path=config.model_path)
            case "crash.gguf":
                os.write(2, b"ggml.c:1: GGML_ASSERT(false) failed\n")
                os.abort()
            case "endless.gguf":
                for n in itertools.count():
                    if not report("weights", n % 100 / 100):
                        raise ModelError("loading was stopped", hint="load it again")
            case _:
                for fraction in (0.0, 0.5, 1.0):
                    report("weights", fraction)
                return cls(config)

    def info(self) -> dict[str, Any]:
        return {"model_path": self.config.model_path, "n_ctx": self.config.n_ctx, "pid": os.getpid()}

    def submit(self, request: Request, sink: Callable[[list[Event]], None]) -> FakeHandle:
        self.requests.append(request)
        if said(request) == "too long":
            raise ContextExceeded("the prompt has 5000 tokens, the context 1024", hint="shorten it", n_prompt_tokens=5000, n_ctx=1024)
        cancelled = threading.Event()
        self._cancelled.append(cancelled)
        threading.Thread(target=self._play, args=(request, sink, cancelled), daemon=True).start()
        return FakeHandle(cancelled)

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncGenerator[AsyncIterator[Event]]:
        inbox = Inbox()
        try:
            handle = self.submit(request, inbox.push)
        except InvalidRequest as error:
            inbox.push([Failed(error.to_json())])
            handle = FakeHandle(threading.Event())
        try:
            yield inbox
        finally:
            handle.cancel()
            inbox.close()

    async def call(self, op: str, **args: Any) -> Any:
        match op:
            case "tokenize":
                return [ord(c) for c in args["text"]]
            case "detokenize":
                return "".join(map(chr, args["tokens"]))
            case "streams":
                return sum(not cancelled.is_set() for cancelled in self._cancelled)
            case "wait":
                await asyncio.Event().wait()
            case "bug":
                raise ZeroDivisionError("a bug")
            case "unwritable":
                return object()
            case _:
                raise InvalidRequest(f"no operation {op!r}", hint="use tokenize or detokenize")

    async def close(self) -> None:
        self.closed = True
        for cancelled in self._cancelled:
            cancelled.set()

    def script(self, request: Request, cancelled: threading.Event) -> Iterator[str]:
        """The words of the answer, and what happens on the way."""
        text = said(request)
        yield from itertools.islice(text.split(" "), None if text else 0)
        match text:
            case "forever":
                while not cancelled.wait(0.001):
                    yield "on"
            case "flood":
                yield from map(str, range(5000))
            case "noise":
                os.write(1, b'{"id": 1, "type": "noise"}\nnot a line of the protocol\n')
                print("noise", flush=True)
                logging.getLogger("localllm.fake").warning("it is noisy: very")
                yield "after"
            case "abort":
                os.write(2, b"ggml.c:1: GGML_ASSERT(false) failed\n")
                os.abort()
            case "killed":
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
            case "bug":
                raise ZeroDivisionError("a bug")
            case "fail":
                raise EngineError("decoding failed", hint="try again")
            case "unwritable":
                raise EngineError("decoding failed", culprit=object())
            case _:
                pass

    def _play(self, request: Request, sink: Callable[[list[Event]], None], cancelled: threading.Event) -> None:
        sink([Prefill(3, 3, 0)])
        n = 0
        try:
            for n, word in enumerate(self.script(request, cancelled), 1):
                if cancelled.is_set():
                    break
                sink([Delta(0, word if n == 1 else " " + word, tokens=(n,))])
        except EngineError as error:
            sink([Failed(error.to_json())])
            return
        finally:
            stopped = cancelled.is_set()
            cancelled.set()
        sink([Finish(0, "cancelled" if stopped else "stop"), Done(Usage(3, 0, n), Timings(prompt_n=3, predicted_n=n))])


class FakeHandle:
    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled

    def cancel(self) -> None:
        self._cancelled.set()


def said(request: Request) -> str:
    """The text that a request asks with."""
    content = request.messages[-1].content if request.messages else request.prompt
    return content if isinstance(content, str) else ""


if __name__ == "__main__":
    main(load=FakeEngine.load)
