"""What earlier loads and answers on this machine taught: tokens per second, and memory that no formula counts.

Values, and the two files that keep them: `speed.json` and `plans.json` in the state directory. What follows from a run for another
model is speed.py's business; nothing here is needed to plan, everything here makes a plan more exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from localllm.files import write_atomic

SPEED_FILE, PLANS_FILE = "speed.json", "plans.json"
SCHEMA = 1
MOST = 256
"""Entries kept in a file; the oldest go."""
NEWEST_WEIGHT = 0.5
"""Of a new measurement, against what its predecessors say: machines throttle, and other programs run."""
ABSURD_OVERHEAD_BYTES = 16 << 30

T = TypeVar("T", bound="Run | Residual")


@dataclass(frozen=True, slots=True)
class Run:
    """How fast one model decoded, one sequence alone."""

    model: str
    """The file's sha256, or a hash of its header."""
    build: str
    """Of llama.cpp."""
    threads: int
    kind: str
    """Of its weights: speed.py's class of quantisations."""
    read_bytes: Mapping[str, int]
    """Read for each token, by device key; weights and KV cache."""
    tokens_per_s: float

    @property
    def key(self) -> tuple[Any, ...]:
        """Of two runs with the same key the later one tells all."""
        return self.model, self.build, self.threads, tuple(sorted(self.read_bytes))


@dataclass(frozen=True, slots=True)
class Residual:
    """What a loaded model took of a device beyond its buffers: the backend's context, libraries, the process itself."""

    device: str
    """Device key."""
    build: str
    n_bytes: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.device, self.build


@dataclass(frozen=True, slots=True)
class History:
    """All that is known of this machine; oldest first."""

    runs: tuple[Run, ...] = ()
    residuals: tuple[Residual, ...] = ()
    build: str = ""
    """The llama.cpp in use: what another build took says nothing of this one's memory. Empty takes any."""

    def with_run(self, run: Run) -> History:
        """Together with a new measurement; one of the same model in the same place is averaged with it."""
        before = next((each for each in self.runs if each.key == run.key), None)
        if before is not None:
            seconds = NEWEST_WEIGHT / run.tokens_per_s + (1 - NEWEST_WEIGHT) / before.tokens_per_s
            run = replace(run, tokens_per_s=1 / seconds)
        return replace(self, runs=_appended(self.runs, run))

    def with_residual(self, residual: Residual) -> History:
        """Together with a new measurement. The larger of two counts, and falls slowly: too much is safe, too little ends in a crash."""
        before = next((each for each in self.residuals if each.key == residual.key), None)
        size = max(0, residual.n_bytes)
        if before is not None and before.n_bytes > size:
            size = int(NEWEST_WEIGHT * size + (1 - NEWEST_WEIGHT) * before.n_bytes)
        return replace(self, residuals=_appended(self.residuals, replace(residual, n_bytes=size)))

    def overhead_bytes(self, device: str) -> int | None:
        """What this build took of a device besides the buffers; None before the first load."""
        known = [each.n_bytes for each in self.residuals if each.device == device and self.build in ("", each.build)]
        return max(known) if known else None


def load(state: Path, build: str = "") -> tuple[History, tuple[str, ...]]:
    """The history in a state directory and warnings; a file that cannot be used counts as empty."""
    runs, said = _read(state / SPEED_FILE, "runs", _run)
    residuals, more = _read(state / PLANS_FILE, "residuals", _residual)
    return History(runs, residuals, build), (*said, *more)


def save(state: Path, history: History) -> None:
    """Write both files. Raises OSError."""
    _write(state / SPEED_FILE, "runs", history.runs)
    _write(state / PLANS_FILE, "residuals", history.residuals)


def _appended(entries: tuple[T, ...], entry: T) -> tuple[T, ...]:
    return (*(each for each in entries if each.key != entry.key), entry)[-MOST:]


def _write(path: Path, name: str, entries: Iterable[Run | Residual]) -> None:
    content = {"schema": SCHEMA, name: [asdict(entry) for entry in entries]}
    write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")


def _read(path: Path, name: str, entry: Callable[[Mapping[str, Any]], T | None]) -> tuple[tuple[T, ...], tuple[str, ...]]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return (), ()
    except (OSError, ValueError, RecursionError) as error:
        return (), (f"{path} cannot be read and is ignored: {error}",)
    entries = cast(dict[str, Any], content).get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or cast(dict[str, Any], content).get("schema") != SCHEMA:
        return (), (f"{path} is of another version of localllm and is ignored",)
    sound = (entry(cast(Mapping[str, Any], each)) for each in cast(list[Any], entries) if isinstance(each, dict))
    return tuple(each for each in sound if each is not None)[-MOST:], ()


def _run(data: Mapping[str, Any]) -> Run | None:
    match data:
        case {
            "model": str() as model,
            "build": str() as build,
            "threads": int() as threads,
            "kind": str() as kind,
            "read_bytes": dict() as read,  # pyright: ignore[reportUnknownVariableType]
            "tokens_per_s": int() | float() as rate,
        } if 0 < rate < math.inf and threads > 0:
            sizes = {str(device): size for device, size in cast(dict[Any, Any], read).items() if isinstance(size, int) and size > 0}
            return Run(model, build, threads, kind, sizes, float(rate)) if sizes else None
        case _:
            return None


def _residual(data: Mapping[str, Any]) -> Residual | None:
    match data:
        case {"device": str() as device, "build": str() as build, "n_bytes": int() as size} if 0 <= size <= ABSURD_OVERHEAD_BYTES:
            return Residual(device, build, size)
        case _:
            return None
