"""Memory by buffer: a breakdown's rows, as plain values. Where they come from is llama/breakdown.py's business."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

CPU = "CPU"
"""The device of everything that lies in RAM, whatever its buffer is called."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one kind of buffer holds."""

    buffer: str
    """llama.cpp's name: CUDA0, CPU, CPU_REPACK (weights rearranged for this CPU), CUDA_Host (pinned RAM), …"""
    device: str
    """Where that is: a device's name, or CPU."""
    host: bool
    """Whether a CPU can use it as it is; not so CPU_REPACK."""
    weights_bytes: int = 0
    kv_bytes: int = 0
    """The cache: keys and values, recurrent states."""
    compute_bytes: int = 0
    output_bytes: int = 0
    """Logits for as many rows as a batch may ask for; llama.cpp's own breakdown leaves them out."""
    mapped_bytes: int = 0
    """Of `weights_bytes`, what is a mapping of the file: evictable, and dearly missed when evicted. Of a loaded model that is a range of
    the file with whatever lies in it, also weights that were copied to a device or to CPU_REPACK."""

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.output_bytes

    @property
    def anonymous_bytes(self) -> int:
        """What only swap could take back: it must fit."""
        return self.total_bytes - self.mapped_bytes


def by_device(rows: Iterable[Row]) -> dict[str, Row]:
    """The sum of each device's rows, in the order in which the devices come first."""
    sums: dict[str, Row] = {}
    for row in rows:
        had = sums.get(row.device) or Row(row.device, row.device, row.device == CPU)
        sums[row.device] = Row(
            had.buffer,
            had.device,
            had.host,
            had.weights_bytes + row.weights_bytes,
            had.kv_bytes + row.kv_bytes,
            had.compute_bytes + row.compute_bytes,
            had.output_bytes + row.output_bytes,
            had.mapped_bytes + row.mapped_bytes,
        )
    return sums
