"""The loop that nothing can beat on the same context: decode, sample, no requests, no events. The machine's own bound."""

from __future__ import annotations

import time
from collections.abc import Callable

from localllm.bench.case import Case, Run
from localllm.bench.clock import Moments
from localllm.llama.context import Context
from localllm.llama.sampling import Sampler
from localllm.llama.stopwatch import Stopwatch

clock = time.perf_counter


def measure(context: Context, case: Case, rss: Callable[[], int]) -> Run:
    """Prefill the prompts in full batches, then decode a row of each per step, `n_gen` tokens in all."""
    samplers = [Sampler(context.model, case.sampling(i, case.n_gen), seed=case.seed + i) for i in range(len(case.prompts))]
    context.clear()
    with Stopwatch() as watch:
        moments = Moments(clock())
        tokens = _prefill(context, case, samplers, moments)
        _decode(context, case, samplers, tokens, moments)
    return moments.run(case, python_us=watch.python_us(len(case.prompts)), rss_bytes=rss())


def _prefill(context: Context, case: Case, samplers: list[Sampler], moments: Moments) -> list[int]:
    """Compute all prompts, one after the other but in batches that may hold parts of several; returns the first tokens."""
    rows = [(token, position, i) for i, prompt in enumerate(case.prompts) for position, token in enumerate(prompt)]
    ends = [len(prompt) - 1 for prompt in case.prompts]
    firsts: list[int] = []
    for start in range(0, len(rows), context.n_batch):
        batch = rows[start : start + context.n_batch]
        n = len(batch)
        tokens, positions, sequences = zip(*batch, strict=True)
        context.tokens[:n], context.positions[:n], context.sequences[:n] = tokens, positions, sequences
        last = [row for row, (_, position, i) in enumerate(batch) if position == ends[i]]
        context.outputs[:n] = 0
        context.outputs[last] = 1
        context.decode(n)
        for row in last:
            firsts.append(samplers[len(firsts)].sample(context, row))
            moments.first_s.append(clock())
    return firsts


def _decode(context: Context, case: Case, samplers: list[Sampler], tokens: list[int], moments: Moments) -> None:
    n = len(tokens)
    context.sequences[:n] = range(n)
    context.outputs[:n] = 1
    context.positions[:n] = [len(prompt) for prompt in case.prompts]
    moments.steps_s.append(clock())
    for _ in range(case.n_gen - 1):
        context.tokens[:n] = tokens
        context.decode(n)
        tokens = [sampler.sample(context, row) for row, sampler in enumerate(samplers)]
        context.positions[:n] += 1
        moments.steps_s.append(clock())
