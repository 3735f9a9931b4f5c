"""A device's memory as a bar: which part gets how many characters. Pure numbers; colours and letters are the screens' business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from localllm.plan.loadplan import DevicePlan

PartName = Literal["others", "weights", "kv", "draft", "compute", "reserve", "free", "over"]


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a device's memory."""

    part: PartName
    n_bytes: int
    cells: int
    """Characters of the bar."""


def segments(device: DevicePlan, width: int) -> tuple[Segment, ...]:
    """The memory of `device` in `width` characters, in the order they are drawn; parts without bytes are left out.

    Every part that is there gets at least one character as long as there are enough. What the plan takes beyond the device's size,
    as after a wish that could not be checked, is `over`; a device of unknown size is as large as the plan.
    """
    parts: list[tuple[PartName, int]] = [
        ("others", device.other_bytes),
        ("weights", device.weights_bytes),
        ("kv", device.kv_bytes),
        ("draft", device.draft_bytes),
        ("compute", device.compute_bytes),
        ("reserve", device.overhead_bytes + device.reserve_bytes),
    ]
    taken = sum(n_bytes for _, n_bytes in parts)
    total = taken if device.total_bytes is None else device.total_bytes
    if taken <= total:
        parts.append(("free", total - taken))
    else:
        # The reserve is what is missed first: it shrinks to what is left of it.
        over = taken - total
        reserve = parts.pop()[1]
        if over < reserve:
            parts.append(("reserve", reserve - over))
        parts.append(("over", max(0, over - reserve)))
    there: list[tuple[PartName, int]] = [(part, n_bytes) for part, n_bytes in parts if n_bytes > 0]
    cells = apportion([n_bytes for _, n_bytes in there], width)
    return tuple(Segment(part, n_bytes, count) for (part, n_bytes), count in zip(there, cells, strict=True))


def apportion(sizes: Sequence[int], width: int) -> list[int]:
    """`width` characters shared out by size, the sum exact; every size gets one where there are enough for all."""
    if not sizes:
        return []
    least = 1 if width >= len(sizes) else 0
    total = sum(sizes)
    exact = [size * width / total for size in sizes]
    cells = [max(least, int(each)) for each in exact]
    while sum(cells) != width:
        missing = 1 if sum(cells) < width else -1
        candidates = [i for i in range(len(cells)) if missing > 0 or cells[i] > least]
        worst = max(candidates, key=lambda i: ((exact[i] - cells[i]) * missing, sizes[i]))
        cells[worst] += missing
    return cells
