"""Engine: a model loaded in this process behind the `Backend` interface.

It puts the parts together (model, context, cells, step loop, output thread) and owns their
lifetimes; the work is theirs.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localllm.engine.config import EngineConfig
from localllm.engine.kv import KVPool
from localllm.engine.loop import StepLoop
from localllm.engine.opening import context_params, n_threads, open_model
from localllm.engine.output import Output, Sink
from localllm.engine.prepare import Preparer
from localllm.engine.sequence import Job
from localllm.engine.store import StateStore
from localllm.errors import EngineError, InvalidRequest, LocalLLMError
from localllm.inbox import Inbox
from localllm.llama import lib
from localllm.llama.breakdown import breakdown
from localllm.llama.context import Context
from localllm.llama.model import Model
from localllm.types import Done, Event, Failed, Message, Request

OnProgress = Callable[[str, float], bool]
"""Called with (stage, fraction); returning False aborts the load."""


class Handle:
    """A request in flight."""

    def __init__(self, loop: StepLoop | None, job: Job | None) -> None:
        self._loop = loop
        self._job = job

    def cancel(self) -> None:
        """Stop at the next step; harmless when it is over."""
        if self._loop is not None and self._job is not None:
            self._loop.cancel(self._job)


class Engine:
    """One loaded model. Use `Engine.load`; `submit` from threads, `stream` from asyncio."""

    def __init__(self, config: EngineConfig, model: Model, context: Context) -> None:
        self.config = config
        self.model = model
        self.context = context
        self.n_ctx = min(context.n_ctx, model.n_ctx_train or context.n_ctx)
        """Tokens one sequence may have."""
        self.preparer = Preparer(model, n_ctx=self.n_ctx, template=config.chat_template)
        self.store = StateStore(
            _state_key(config),
            ram_bytes=config.cache_ram_bytes,
            directory=Path(config.state_dir) if config.state_dir else None,
            disk_bytes=config.state_disk_bytes,
        )
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="localllm-save")
        self.output = Output(self.store, self._saver)
        self.pool = KVPool(context, self.store, n_swa=0 if config.swa_full else model.n_swa)
        self.loop = StepLoop(
            context,
            self.pool,
            n_running=config.n_seq,
            n_ctx_seq=self.n_ctx,
            step_target_ms=config.step_target_ms,
            max_queue=config.max_queue,
        )
        self._memory = breakdown(context)
        self._closed = False
        self._users = 0
        """Threads that are using the model or giving the step loop work, besides its own."""
        self._users_changed = threading.Condition()
        self._named: dict[str, Handle] = {}
        """Requests in flight that have an id."""

    @classmethod
    def load(cls, config: EngineConfig, on_progress: OnProgress | None = None) -> Engine:
        """Load the model and make its context; blocks.

        Raises ModelError for an unusable file, DoesNotFit when memory is short, LoadAborted when
        `on_progress` returns False.
        """
        tell: OnProgress = on_progress or (lambda stage, fraction: True)
        model = open_model(config, progress=lambda fraction: tell("weights", fraction))
        try:
            tell("context", 0.0)
            # OpenMP keeps a team for each living thread that ever decoded, and a second team makes the
            # barriers of the first one sleep: the context's first decode belongs to a thread that ends
            with ThreadPoolExecutor(1) as once:
                context = once.submit(Context, model, context_params(config, model)).result()
        except BaseException:
            model.close()
            raise
        return cls(config, model, context)

    def submit(self, request: Request, sink: Sink) -> Handle:
        """Start `request`; `sink` gets lists of events on the output thread, ending with one Done or Failed.

        Templates and tokenises on the calling thread; a request that is refused fails through the sink.
        """
        handle = Handle(None, None)

        def watched(events: list[Event]) -> None:
            if isinstance(events[-1], (Done, Failed)):
                if self._named.get(request.id) is handle:
                    del self._named[request.id]
                # an answer whose text could not be read still runs; for one that is over this does nothing
                handle.cancel()
            sink(events)

        try:
            with self._in_use():
                job = self.preparer.job(request, self.output, watched)
                if request.session and not self._remembers(job):
                    self.store.load_session(request.session)
                handle = Handle(self.loop, job)
                if request.id:
                    self._named[request.id] = handle
                self.loop.submit(job)
        except LocalLLMError as error:
            sink([Failed(error.to_json())])
        return handle

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncGenerator[AsyncIterator[Event]]:
        """Run `request` and iterate over its events; leaving the context cancels it."""
        inbox = Inbox()
        handles: list[Handle] = []
        left = threading.Event()

        def start() -> None:
            handles.append(self.submit(request, inbox.push))
            # the task may have been cancelled meanwhile, which does not stop this thread
            if left.is_set():
                handles[0].cancel()

        try:
            await asyncio.to_thread(start)
            yield inbox
        finally:
            left.set()
            for handle in handles:
                handle.cancel()
            inbox.close()

    async def call(self, op: str, **args: Any) -> Any:
        """cancel, tokenize, detokenize, template, count, props, slots or cache_clear."""
        operation = _OPERATIONS.get(op)
        if operation is None:
            raise InvalidRequest(f"unknown operation {op!r}", hint=f"use one of {', '.join(_OPERATIONS)}")

        def run() -> Any:
            with self._in_use():
                return operation(self, **args)

        try:
            inspect.signature(operation).bind(self, **args)
        except TypeError as error:
            raise InvalidRequest(f"{op}: {error}", hint="check the argument names") from None
        return await asyncio.to_thread(run)

    async def close(self) -> None:
        """End requests, threads and free the model; safe to call twice."""
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """`close` for callers without an event loop; not to be called from a sink."""
        with self._users_changed:
            if self._closed:
                return
            self._closed = True
            self._users_changed.wait_for(lambda: self._users == 0)
        self.loop.close()
        self._saver.shutdown()
        self.output.close()
        self.context.close()
        self.model.close()

    def info(self) -> dict[str, Any]:
        """Facts about the loaded model, as plain data; sizes in bytes."""
        model = self.model
        return {
            "model_path": model.path,
            "name": model.metadata.get("general.name", os.path.basename(model.path)),
            "description": model.description,
            "architecture": model.metadata.get("general.architecture", ""),
            "n_params": model.n_params,
            "size_bytes": model.size_bytes,
            "n_vocab": model.n_vocab,
            "n_ctx_train": model.n_ctx_train,
            "n_ctx": self.n_ctx,
            "n_cells": self.context.n_ctx,
            "n_seq": self.config.n_seq,
            "n_threads": n_threads(self.config),
            "cut": self.pool.cut.value,
            "build": lib.build(),
            "devices": [device.name for device in lib.devices()],
            "memory": [asdict(row) for row in self._memory],
        }

    def _remembers(self, job: Job) -> bool:
        """Whether a good part of the job's prompt is in the cache or in RAM."""
        tokens = job.prompt
        return self.loop.do(lambda: self.pool.best(tokens, len(tokens) - 1).length).result() * 2 >= len(tokens)

    @contextmanager
    def _in_use(self) -> Generator[None]:
        """Keep the engine from closing meanwhile; raises EngineError when it has."""
        with self._users_changed:
            if self._closed:
                raise EngineError("the engine was closed", hint="load the model again")
            self._users += 1
        try:
            yield
        finally:
            with self._users_changed:
                self._users -= 1
                self._users_changed.notify_all()

    # operations

    def _cancel(self, id: str) -> bool:
        """Stop a request by its id; it still ends with Finish and Done. False when none of that id runs."""
        handle = self._named.get(id)
        if handle is not None:
            handle.cancel()
        return handle is not None

    def _tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        return self.model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def _detokenize(self, tokens: list[int]) -> str:
        return b"".join(map(self.model.piece, tokens)).decode("utf-8", "replace")

    def _template(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **extra: Any) -> str:
        return str(self.preparer.render(_chat(messages, tools, extra)))

    def _count(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **extra: Any) -> int:
        return len(self.preparer.encode(_chat(messages, tools, extra)))

    def _slots(self) -> dict[str, Any]:
        loop, pool = self.loop, self.pool

        def look() -> dict[str, Any]:
            return {
                "running": len(loop.running),
                "waiting": len(loop.waiting),
                "resident": pool.n_resident,
                "cells_used": pool.used,
                "cells_total": self.context.n_ctx,
                "store_bytes": self.store.used_bytes,
                "steps": loop.n_steps,
            }

        return loop.do(look).result()

    def _cache_clear(self) -> None:
        self.loop.do(self.pool.clear).result()


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "cancel": Engine._cancel,  # pyright: ignore[reportPrivateUsage]
    "tokenize": Engine._tokenize,  # pyright: ignore[reportPrivateUsage]
    "detokenize": Engine._detokenize,  # pyright: ignore[reportPrivateUsage]
    "template": Engine._template,  # pyright: ignore[reportPrivateUsage]
    "count": Engine._count,  # pyright: ignore[reportPrivateUsage]
    "props": Engine.info,
    "slots": Engine._slots,  # pyright: ignore[reportPrivateUsage]
    "cache_clear": Engine._cache_clear,  # pyright: ignore[reportPrivateUsage]
}


def _chat(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, extra: dict[str, Any]) -> Request:
    return Request(messages=tuple(Message(**m) for m in messages), tools=tuple(tools or ()), template_kwargs=extra)


def _state_key(config: EngineConfig) -> str:
    """Names what a saved state depends on: the file's content, the KV types, the attention layout, the build."""
    size = os.path.getsize(config.model_path)
    digest = hashlib.sha256(str(size).encode())
    with open(config.model_path, "rb") as file:
        # whole files take minutes: the header and a sample across the weights tell files apart
        digest.update(file.read(1 << 20))
        for i in range(64):
            file.seek(size * i // 64)
            digest.update(file.read(4096))
    digest.update(f"{config.type_k} {config.type_v} {config.flash_attn} {config.swa_full} {lib.build()}".encode())
    return digest.hexdigest()[:32]
