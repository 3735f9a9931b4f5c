"""A model in a child process, behind the same interface as one in this process.

It knows when to start the child and when to start it again; a child that dies never takes its
parent along. It never imports llama.cpp.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

from localllm.child import Child, worker_command
from localllm.engine.config import EngineConfig
from localllm.errors import EngineDied, EngineError, LocalLLMError
from localllm.inbox import Inbox
from localllm.types import Event, Failed, Loading, Request

OnLoading = Callable[[Loading], None]

log = logging.getLogger("localllm.worker")


class EngineProcess:
    """One loaded model in a child process, for use from one event loop.

    When the child dies, every open stream ends with Failed(EngineDied) and every call raises it;
    the next request starts a new child with the same configuration.
    """

    def __init__(self, config: EngineConfig, command: Sequence[str] | None = None) -> None:
        self.config = config
        self._command = command or worker_command("engine")
        self._child: Child | None = None
        self._starting: asyncio.Task[Child] | None = None
        self._listeners: list[OnLoading] = []
        self._closed = False

    @classmethod
    async def start(cls, config: EngineConfig, on_event: OnLoading | None = None, *, command: Sequence[str] | None = None) -> Self:
        """Start a child and load the model; its load error is raised here, and cancelling kills the child."""
        engine = cls(config, command)
        try:
            await engine._ready(on_event)
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def info(self) -> dict[str, Any]:
        """What the child reported of the loaded model; empty before the first load."""
        return self._child.info if self._child else {}

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        return self._child.pid if self._child and not self._child.ended.done() else None

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncGenerator[AsyncIterator[Event]]:
        """Run `request`; leaving the context cancels it. Exactly one Done or Failed ends the iterator.

        A dead child is restarted first; the stream then begins with Loading events.
        """
        inbox = Inbox()
        opening = asyncio.create_task(self._open(request, inbox))
        try:
            yield inbox
        finally:
            inbox.close()
            if not opening.cancel() and not opening.cancelled() and (opened := opening.result()) is not None:
                child, ident = opened
                child.cancel(ident)

    async def call(self, op: str, **args: Any) -> Any:
        """A short operation in the child, answered in plain JSON; its error is raised here."""
        child = await self._ready()
        return await asyncio.wrap_future(child.ask({"type": "call", "op": op, "args": args}))

    async def restart(self, on_event: OnLoading | None = None) -> None:
        """End the child, if there is one, and start another with the same configuration."""
        if self._child is not None:
            await self._child.close()
        await self._ready(on_event)

    async def close(self) -> None:
        """End the child; what is in flight fails. Closing twice is fine, using it afterwards is an error."""
        self._closed = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait({self._starting})
        if self._child is not None:
            await self._child.close()

    async def _open(self, request: Request, inbox: Inbox) -> tuple[Child, int] | None:
        """Send `request` to a living child; a failure before that goes where its events would have gone."""
        try:
            child = await self._ready(lambda event: inbox.push([event]))
            return child, child.open(request, inbox.push)
        except Exception as error:
            if not isinstance(error, LocalLLMError):
                log.exception("sending a request failed")
                error = EngineError(f"{type(error).__name__}: {error}", hint="this is a bug in localllm; its log has the traceback")
            inbox.push([Failed(error.to_json())])
            return None

    async def _ready(self, on_event: OnLoading | None = None) -> Child:
        """The living child, started if need be. All who wait share one start, and none of them cancels it by leaving."""
        closed = EngineDied("this model was unloaded", hint="load it again")
        if self._closed:
            raise closed
        if self._child is not None and not self._child.ended.done():
            return self._child
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start_child())
        starting = self._starting
        if on_event is not None:
            self._listeners.append(on_event)
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            if starting.cancelled():  # by close(): that ends the load, not whoever waits for it
                raise closed from None
            raise
        finally:
            if on_event is not None:
                self._listeners.remove(on_event)

    async def _start_child(self) -> Child:
        loop = asyncio.get_running_loop()

        def on_events(events: Sequence[Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(self._tell, events)

        child = Child(self._command)
        try:
            child.info = await asyncio.wrap_future(child.ask({"type": "load", "config": self.config}, on_events))
        except asyncio.CancelledError:
            await child.kill()
            raise
        except BaseException:
            await child.close()
            raise
        self._child = child
        return child

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            for listener in tuple(self._listeners):
                if isinstance(event, Loading):
                    listener(event)
