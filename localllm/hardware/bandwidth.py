"""How fast this machine reads memory: the figure that bounds decoding on the CPU, since every token reads all weights once.

Measured, not looked up: the same processor has one to eight memory channels behind it. Kept in the state directory, keyed by what
it depends on. Numpy is imported only to measure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from localllm.files import write_atomic

FILE = "bandwidth.json"
SCHEMA = 1
BUDGET_S = 0.3
"""For the passes; making the array takes about as long again."""
MIN_PASSES = 3
MIN_BYTES, MAX_BYTES = 128 << 20, 1 << 30
CACHES = 4
"""The array is so many times the last-level caches: little of it can still be there in the next pass."""
UNKNOWN_CACHE_BYTES = 64 << 20
SHARE_OF_RAM = 4
"""… but no more than a quarter of the available RAM."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Read bandwidth with all cores that decoding would use."""

    bytes_per_s: float
    date: str
    """ISO 8601, UTC."""


def array_bytes(cache_bytes: int, available_bytes: int | None) -> int:
    """How large an array to read, so that it comes from memory and does not crowd the machine."""
    wanted = min(max(MIN_BYTES, CACHES * (cache_bytes or UNKNOWN_CACHE_BYTES)), MAX_BYTES)
    return wanted if available_bytes is None else min(wanted, available_bytes // SHARE_OF_RAM)


def measure(n_threads: int, n_bytes: int, *, budget_s: float = BUDGET_S, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second at which `n_threads` together read `n_bytes`: the best of at least three passes.

    Raises MemoryError where the array does not fit.
    """
    import numpy as np

    each = max(1, n_bytes // n_threads)

    def fill(_: int) -> Any:
        # Written by the thread that will read it: on machines with several memory nodes that decides where it lies.
        # A page never written is the kernel's one page of zeros, which comes from the cache.
        return np.ones(each, dtype=np.uint8)

    with ThreadPoolExecutor(n_threads) as threads:
        parts = list(threads.map(fill, range(n_threads)))
        best_s = float("inf")
        started = now = clock()
        passes = 0
        while passes < MIN_PASSES or now - started < budget_s:
            before = clock()
            # numpy lets go of the interpreter lock within, and has hand-made vector loops for the maximum: memory is what holds it up.
            list(threads.map(np.maximum.reduce, parts))
            now = clock()
            best_s = min(best_s, now - before)
            passes += 1
    return each * n_threads / best_s


def key(cpu_name: str, n_cores: int) -> str:
    """What a measurement belongs to."""
    return f"{cpu_name} x {n_cores}"


def recall(file: Path, key: str) -> Measured | None:
    """The measurement kept for `key`; None when there is none, or the file is of another version or broken."""
    entry = _read(file).get(key)
    match entry:
        case {"bytes_per_s": int() | float() as rate, "date": str() as date} if 0 < rate < float("inf"):
            return Measured(float(rate), date)
        case _:
            return None


def remember(file: Path, key: str, bytes_per_s: float, now: datetime | None = None) -> Measured:
    """Keep a measurement beside those of other machines that share the directory. Raises OSError."""
    measured = Measured(bytes_per_s, (now or datetime.now(UTC)).isoformat(timespec="seconds"))
    machines = {**_read(file), key: {"bytes_per_s": measured.bytes_per_s, "date": measured.date}}
    write_atomic(file, json.dumps({"schema": SCHEMA, "machines": machines}, indent=2).encode() + b"\n")
    return measured


def _read(file: Path) -> dict[str, Any]:
    """The machines in `file`; a file that cannot be used counts as empty, as everything in it can be measured again."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    known = isinstance(content, dict) and cast(dict[str, Any], content).get("schema") == SCHEMA
    machines = cast(dict[str, Any], content).get("machines") if known else None
    return cast(dict[str, Any], machines) if isinstance(machines, dict) else {}
