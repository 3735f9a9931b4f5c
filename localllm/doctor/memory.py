"""Whether there is memory enough to run a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from localllm.doctor.finding import Finding
from localllm.hardware import Memory

GIB = 1 << 30
LOW_BYTES = 2 * GIB
"""A 1B model in Q4_K_M takes about this with its cache."""
SHORT_BYTES = GIB // 2


def judge_memory(memory: Memory, warnings: Sequence[str] = ()) -> Iterator[Finding]:
    """Findings about memory as hardware.read_memory read it; `warnings` are those that came with it."""
    for warning in warnings:
        yield Finding("odd-memory", "warning", "memory", warning)
    if memory.available_bytes is None or memory.available_bytes >= LOW_BYTES:
        return
    why, fix = "Other programs hold the rest.", "close other programs, or choose a smaller model or context"
    if memory.limit_bytes is not None:
        why = f"This process may have {memory.limit_bytes / GIB:.1f} GiB: {memory.limit_origin}."
        fix = "raise the limit of the container or service, or choose a smaller model or context"
    level = "problem" if memory.available_bytes < SHORT_BYTES else "warning"
    title = f"only {memory.available_bytes / GIB:.1f} GiB of memory are free"
    yield Finding("memory-low", level, "memory", title, why, fix, asdict(memory))
