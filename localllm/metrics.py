"""What the finished requests add up to: percentiles, rates over the last minute, Prometheus text.

Consumes the engine's own timings; measures nothing itself and knows no engine.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from localllm.types import FinishReason, Timings, Usage

WINDOW_S = 60.0
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
Outcome = FinishReason | Literal["failed"]


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) with linear interpolation between ranks; 0.0 of nothing."""
    if not 0 <= q <= 100:
        raise ValueError(f"percentile {q} is not in 0 to 100")
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, slots=True)
class Rates:
    """The last minute, over all requests that ended in it."""

    requests: int = 0
    prompt_tps: float = 0.0
    """Prompt tokens computed (not those from the cache) per second of wall time."""
    decode_tps: float = 0.0
    """Tokens generated per second of wall time."""
    ttft_p50_ms: float = 0.0
    ttft_p95_ms: float = 0.0
    cached: float = 0.0
    """Share of prompt tokens that came from the prefix cache."""
    acceptance: float = 0.0
    """Share of drafted tokens that were accepted."""


class Metrics:
    """Counters of one process; `record` may be called from any thread. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, Timings]] = deque()
        # Its own registry: two of these may live in one process, and the default one collects the interpreter's.
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("localllm_requests", "Requests by how they ended", ["outcome"], registry=registry)
        self._tokens = Counter("localllm_tokens", "Tokens by kind", ["kind"], registry=registry)
        self._ttft = Histogram(
            "localllm_time_to_first_token_seconds", "From arrival to the first token", buckets=TTFT_BUCKETS_S, registry=registry
        )
        self._itl = Histogram(
            "localllm_inter_token_seconds", "Mean time between the tokens of a request", buckets=ITL_BUCKETS_S, registry=registry
        )

    def record(self, timings: Timings, usage: Usage, outcome: Outcome = "stop") -> None:
        """Count one request that has ended."""
        now = self._clock()
        self._requests.labels(outcome).inc()
        kinds = {
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "completion": usage.completion_tokens,
            "reasoning": usage.reasoning_tokens,
            "drafted": timings.draft_n,
            "accepted": timings.draft_n_accepted,
        }
        for kind, count in kinds.items():
            self._tokens.labels(kind).inc(count)
        if timings.predicted_n:
            self._ttft.observe(timings.ttft_ms / 1000)
        if timings.predicted_per_second > 0:
            self._itl.observe(1 / timings.predicted_per_second)
        with self._lock:
            self._recent.append((now, timings))
            self._forget(now)

    def rates(self) -> Rates:
        """The last minute, or the time since the start where that is less."""
        now = self._clock()
        with self._lock:
            self._forget(now)
            recent = [timings for _, timings in self._recent]
        if not recent:
            return Rates()
        seconds = max(min(now - self._began, WINDOW_S), 1e-3)
        prompt, cached = sum(t.prompt_n for t in recent), sum(t.cache_n for t in recent)
        ttft = [t.ttft_ms for t in recent if t.predicted_n]
        return Rates(
            requests=len(recent),
            prompt_tps=prompt / seconds,
            decode_tps=sum(t.predicted_n for t in recent) / seconds,
            ttft_p50_ms=percentile(ttft, 50),
            ttft_p95_ms=percentile(ttft, 95),
            cached=_share(cached, prompt + cached),
            acceptance=_share(sum(t.draft_n_accepted for t in recent), sum(t.draft_n for t in recent)),
        )

    def prometheus_text(self) -> str:
        """Everything since the start, in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry).decode()

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
