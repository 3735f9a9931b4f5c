"""Time spent inside llama.cpp's two calls of a decode loop. For benchmarks: nothing is timed unless one runs."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

from llama_cpp import llama_cpp as api

clock = time.perf_counter


class Stopwatch(AbstractContextManager["Stopwatch"]):
    """While it is entered, the bindings' decode and sample functions of this process are timed.

    The time of a call includes taking the GIL back when it returns; converting the arguments is
    mostly outside.
    """

    def __init__(self) -> None:
        self._decodes: list[tuple[int, float, float, float]] = []
        """(rows, start, end, seconds of sampling until then) of each call."""
        self._sampling_s = 0.0

    def __enter__(self) -> Stopwatch:
        self._originals = (api.llama_decode, api.llama_sampler_sample)
        decode, sample = self._originals

        def timed_decode(context: Any, batch: Any) -> int:
            sampled_s, start = self._sampling_s, clock()
            code = decode(context, batch)
            self._decodes.append((batch.n_tokens, start, clock(), sampled_s))
            return code

        def timed_sample(chain: Any, context: Any, row: int) -> int:
            start = clock()
            token = sample(chain, context, row)
            self._sampling_s += clock() - start
            return token

        api.llama_decode, api.llama_sampler_sample = timed_decode, timed_sample  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def __exit__(self, *_: object) -> None:
        api.llama_decode, api.llama_sampler_sample = self._originals

    def python_us(self, rows: int) -> float | None:
        """Median microseconds per token between two successive decodes of `rows` rows that neither decode nor sample took."""
        spans: list[float] = []
        for (rows_a, _, end, sampled_a), (rows_b, start, _, sampled_b) in zip(self._decodes, self._decodes[1:], strict=False):
            if rows_a == rows_b == rows:
                spans.append((start - end) - (sampled_b - sampled_a))
        return median(spans) * 1e6 / rows if spans else None
