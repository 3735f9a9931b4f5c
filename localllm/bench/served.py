"""Measuring an engine from outside, as its users meet it: requests in, events out.

A run has two halves. First every prompt is new and asks for one token: prompt tokens/s and TTFT, by
the client's clock. Then the same prompts come again, now from the prefix cache, and decode together:
decode tokens/s, by the engine's clock, from a request's first token to its last, since events may
bring several tokens at once. So no prefill runs beside a measured decode.
"""

from __future__ import annotations

import asyncio
import time
from statistics import median

from localllm.bench.case import Case, Run
from localllm.bench.clock import figures
from localllm.errors import EngineError, LocalLLMError
from localllm.types import Backend, Done, Failed, Request, Timings

clock = time.perf_counter


async def measure(backend: Backend, case: Case) -> Run:
    """Run `case`. What only the engine's process can know, its memory and its Python time, is left open."""
    await backend.call("cache_clear")
    started_s = clock()
    firsts = await _together(backend, case, 1)
    ttft_s = [ended_s - started_s for ended_s, _ in firsts]
    if case.n_gen == 1:
        return figures(case, ttft_s)
    timings = [timings for _, timings in await _together(backend, case, case.n_gen)]
    return figures(
        case,
        ttft_s,
        # all start within a step of each other, so each one's own rate is its rate beside all the others
        decode_tps=sum(t.predicted_per_second for t in timings),
        itl_p50_ms=median(t.itl_p50_ms for t in timings),
        itl_p95_ms=median(t.itl_p95_ms for t in timings),
    )


async def _together(backend: Backend, case: Case, n_gen: int) -> list[tuple[float, Timings]]:
    requests = [Request(tokens=tokens, sampling=case.sampling(i, n_gen)) for i, tokens in enumerate(case.prompts)]
    return await asyncio.gather(*(_answer(backend, request) for request in requests))


async def _answer(backend: Backend, request: Request) -> tuple[float, Timings]:
    """When the answer was complete, and the engine's timings; raises when it failed or ended early."""
    async with backend.stream(request) as events:
        async for event in events:
            match event:
                case Failed(error=error):
                    raise LocalLLMError.from_json(dict(error))
                case Done(timings=timings):
                    if timings.predicted_n != request.sampling.max_tokens:
                        raise EngineError(
                            f"an answer ended after {timings.predicted_n} tokens of {request.sampling.max_tokens}",
                            hint="use a larger context (-c)",
                        )
                    return clock(), timings
                case _:
                    pass
    raise EngineError("a stream ended without Done", hint="this is a bug in localllm; please report it")
