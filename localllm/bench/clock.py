"""From moments to the figures of a run: the same arithmetic for every arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from localllm.bench.case import Case, Run
from localllm.metrics import percentile


@dataclass(slots=True)
class Moments:
    """When things happened, in seconds of one clock."""

    started_s: float
    first_s: list[float] = field(default_factory=list[float])
    """The first token of each request."""
    steps_s: list[float] = field(default_factory=list[float])
    """Each step of a decode in lock step, from the last first token on; every step gives each request a token."""

    def run(self, case: Case, *, python_us: float | None = None, rss_bytes: int = 0) -> Run:
        intervals_ms = [(after - before) * 1e3 for before, after in pairwise(self.steps_s)]
        tokens = len(intervals_ms) * len(case.prompts)
        decode_tps = tokens / (self.steps_s[-1] - self.steps_s[0]) if intervals_ms else 0.0
        return figures(
            case,
            [first - self.started_s for first in self.first_s],
            decode_tps=decode_tps,
            itl_p50_ms=percentile(intervals_ms, 50),
            itl_p95_ms=percentile(intervals_ms, 95),
            python_us=python_us,
            rss_bytes=rss_bytes,
        )


def figures(
    case: Case,
    ttft_s: Sequence[float],
    *,
    decode_tps: float = 0.0,
    itl_p50_ms: float = 0.0,
    itl_p95_ms: float = 0.0,
    python_us: float | None = None,
    rss_bytes: int = 0,
) -> Run:
    """A run from the seconds that each request waited for its first token, and from what its decode gave."""
    return Run(
        prompt_tps=sum(map(len, case.prompts)) / max(ttft_s),
        decode_tps=decode_tps,
        ttft_ms=percentile(ttft_s, 50) * 1e3,
        last_ttft_ms=max(ttft_s) * 1e3,
        itl_p50_ms=itl_p50_ms,
        itl_p95_ms=itl_p95_ms,
        python_us_per_token=python_us,
        rss_bytes=rss_bytes,
    )
