"""The child process of an arm: a model under one way of driving it, and nothing else, so that memory is its own.

    python -m localllm.bench.arm engine | bare | llama

It speaks the worker's protocol; the operation `measure` runs a case. The engine behind the worker
protocol proper needs no child of this kind: it is measured from the outside, like `run` uses it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import psutil

from localllm import wire, worker
from localllm.bench import served
from localllm.bench.case import Case, Run
from localllm.bench.clock import Moments
from localllm.engine.config import EngineConfig
from localllm.errors import InvalidRequest, UsageError
from localllm.types import Event, Request

clock = time.perf_counter


class Arm:
    """A loaded model that can only be measured."""

    def info(self) -> Mapping[str, Any]:
        return {}

    def submit(self, request: Request, sink: Callable[[list[Event]], None]) -> NoReturn:
        raise InvalidRequest("an arm of a benchmark answers no requests", hint="call measure")

    async def call(self, op: str, **args: Any) -> Any:
        if op != "measure":
            raise InvalidRequest(f"unknown operation {op!r}", hint="call measure")
        return await self.measure(wire.decode(Case, args["case"]))

    async def measure(self, case: Case) -> Run:
        raise NotImplementedError

    async def close(self) -> None:
        """The process ends right after; what it holds ends with it."""


class EngineArm(Arm):
    """Our engine, in the process of who asks."""

    def __init__(self, config: EngineConfig, progress: worker.OnProgress) -> None:
        from localllm.engine.engine import Engine

        self._engine = Engine.load(config, progress)

    def info(self) -> Mapping[str, Any]:
        return self._engine.info()

    async def measure(self, case: Case) -> Run:
        from localllm.llama.stopwatch import Stopwatch

        with Stopwatch() as watch:
            run = await served.measure(self._engine, case)
        return replace(run, rss_bytes=rss_bytes(), python_us_per_token=watch.python_us(len(case.prompts)))

    async def close(self) -> None:
        await self._engine.close()


class OneThreadArm(Arm):
    """An arm whose every call of llama.cpp comes from one thread.

    OpenMP makes a team for each thread that computes, and with more threads than cores its barriers
    sleep instead of spinning: a second team, even an idle one, would slow the arm down.
    """

    def __init__(self, config: EngineConfig, progress: worker.OnProgress) -> None:
        self._thread = ThreadPoolExecutor(1, "arm")
        self._thread.submit(self.load, config, progress).result()

    async def measure(self, case: Case) -> Run:
        return await asyncio.wrap_future(self._thread.submit(self.run, case))

    def load(self, config: EngineConfig, progress: worker.OnProgress) -> None:
        raise NotImplementedError

    def run(self, case: Case) -> Run:
        raise NotImplementedError


class BareArm(OneThreadArm):
    """A loop over llama.cpp's calls, on a context with the engine's settings."""

    def load(self, config: EngineConfig, progress: worker.OnProgress) -> None:
        from localllm.engine.opening import context_params, open_model
        from localllm.llama.context import Context

        model = open_model(config, progress=partial(progress, "weights"))
        self._context = Context(model, context_params(config, model))

    def run(self, case: Case) -> Run:
        from localllm.bench import bare

        return bare.measure(self._context, case, rss_bytes)


class LlamaArm(OneThreadArm):
    """`llama_cpp.Llama`, with room for one sequence."""

    def load(self, config: EngineConfig, progress: worker.OnProgress) -> None:
        from localllm.engine.opening import context_params
        from localllm.llama.high_level import HighLevel
        from localllm.llama.model import Model

        model = Model(config.model_path, n_gpu_layers=0)
        params = context_params(config, model)
        params = replace(params, n_ctx=min(params.n_ctx, model.n_ctx_train or params.n_ctx))
        model.close()
        self._llama = HighLevel(config.model_path, params, n_gpu_layers=config.n_gpu_layers)

    def run(self, case: Case) -> Run:
        started_s = clock()
        ended_s, token_s = self._llama.complete(case.prompts[0], case.n_gen, case.seed)
        # the last token counts when its text is out
        moments = Moments(started_s, first_s=token_s[:1], steps_s=[*token_s[:-1], ended_s])
        return moments.run(case, rss_bytes=rss_bytes())


ARMS: dict[str, Callable[[EngineConfig, worker.OnProgress], Arm]] = {"engine": EngineArm, "bare": BareArm, "llama": LlamaArm}


def command(kind: str) -> list[str]:
    """The command line of an arm's process."""
    return [sys.executable, "-P", "-X", "utf8", "-m", "localllm.bench.arm", kind]


def rss_bytes(pid: int | None = None) -> int:
    """Resident memory of a process, mapped weights included; of this one when none is named."""
    return psutil.Process(pid).memory_info().rss


def main(kind: str) -> None:
    """Serve one arm until the parent lets go."""
    if kind not in ARMS:
        raise UsageError(f"no arm is called {kind!r}", hint=f"use one of {', '.join(ARMS)}")
    worker.main(load=ARMS[kind])


if __name__ == "__main__":
    main(sys.argv[1])
