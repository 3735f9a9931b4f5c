"""Which rows go into the next batch. Pure: numbers in, numbers out.

Every decoding sequence gets its row first. Prompt chunks share what is left, and while answers
stream the chunks are sized so that one step takes about the target time: a long prompt never
stalls running streams. Among prompts the shortest remaining goes first, and waiting counts as
progress, so a short prompt is protected and a long one is not starved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MIN_CHUNK = 16
FIRST_CHUNK = 64
"""Prompt rows in the very first step, before any cost is known."""
IDLE_STEP_MS = 1500.0
"""With nobody streaming, a step may take this long: it bounds how late a cancel is seen."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sequence still in prefill: tokens `remaining`, of which at most `limit` may go into one batch."""

    key: int
    remaining: int
    limit: int
    rank: int = 0
    """0 interactive, 1 batch."""
    deadline_s: float = float("inf")
    waited_s: float = 0.0


class StepCost:
    """What a batch costs, learned while running: milliseconds for a decode step and per prompt row."""

    def __init__(self) -> None:
        self.decode_ms = 0.0
        self.row_ms = 0.0

    def record(self, elapsed_ms: float, decode_rows: int, prompt_rows: int) -> None:
        """Learn from one step; exponential averages, so drift is followed."""
        if prompt_rows == 0:
            self.decode_ms = _blend(self.decode_ms, elapsed_ms, 0.1)
        elif prompt_rows >= MIN_CHUNK:
            extra = max(elapsed_ms - (self.decode_ms if decode_rows else 0.0), elapsed_ms * 0.1)
            self.row_ms = _blend(self.row_ms, extra / prompt_rows, 0.3)

    def prompt_rows(self, target_ms: float, *, decoding: bool) -> int:
        """Prompt rows that keep a step near `target_ms`."""
        if self.row_ms == 0.0:
            return FIRST_CHUNK
        spare = (target_ms - self.decode_ms) if decoding else max(target_ms, IDLE_STEP_MS)
        return max(MIN_CHUNK, int(spare / self.row_ms))

    @property
    def rows_per_second(self) -> float:
        return 1e3 / self.row_ms if self.row_ms else 0.0


def _blend(old: float, new: float, weight: float) -> float:
    return new if old == 0.0 else old + weight * (new - old)


def share_rows(prompts: Iterable[Prompt], budget: int, rows_per_second: float = 0.0) -> dict[int, int]:
    """Split `budget` prompt rows: key -> rows, each at most its limit and remaining; keys with none left out.

    Order: class, deadline, then fewest remaining tokens, where each second waited counts as the
    tokens that could have been computed in it.
    """

    def order(p: Prompt) -> tuple[int, float, float, int]:
        return (p.rank, p.deadline_s, p.remaining - p.waited_s * max(rows_per_second, 1.0), p.key)

    out: dict[int, int] = {}
    for prompt in sorted(prompts, key=order):
        rows = min(prompt.remaining, prompt.limit, budget)
        if rows > 0:
            out[prompt.key] = rows
            budget -= rows
        if budget == 0:
            break
    return out
