"""llama.cpp's rule for which device gets which layer (llama_model_base::load_tensors), in its own 32-bit arithmetic."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from localllm.plan.spec import CPU

_FLOAT = struct.Struct("f")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each layer lies; layer `n_layers` is the output."""

    devices: tuple[str, ...]
    """Those in use, in llama.cpp's order; `ranges` has one more entry, for the CPU, in front."""
    ranges: tuple[tuple[int, int], ...]
    """First layer and the one after the last, for the CPU and each device; all layers once and in order."""

    def items(self) -> list[tuple[str, int, int]]:
        """(device, first, last + 1) of every device that has a layer."""
        return [(name, first, end) for name, (first, end) in zip((CPU, *self.devices), self.ranges, strict=True) if first < end]

    def device(self, layer: int) -> str:
        """Who has `layer`."""
        return next(name for name, first, end in self.items() if first <= layer < end)


def place(n_layers: int, n_gpu_layers: int, devices: Sequence[str], split: Sequence[float]) -> Placement:
    """The last `n_gpu_layers` of the n_layers + 1 (the output is one) on `devices`, in the proportions of `split`.

    Raises ValueError when the shares do not say how to split between several devices.
    """
    total = n_layers + 1
    on_gpu = min(n_gpu_layers, total) if devices else 0
    if not on_gpu:
        return Placement(tuple(devices), ((0, total), *((total, total) for _ in devices)))
    shares = tuple(split[: len(devices)])
    if len(devices) == 1:
        shares = (1.0,)
    if len(shares) != len(devices) or not any(shares):
        raise ValueError(f"a split between {len(devices)} devices needs a share for each, not {tuple(split)}")
    bounds = _cumulated(shares)
    first = total - on_gpu
    owners = [bisect_right(bounds, _f32(i / on_gpu)) for i in range(on_gpu)]
    ranges = [(0, first)]
    for device in range(len(devices)):
        begin = ranges[-1][1]
        ranges.append((begin, begin + owners.count(device)))
    return Placement(tuple(devices), tuple(ranges))


def _cumulated(shares: Sequence[float]) -> list[float]:
    """Running sums over the total."""
    sums: list[float] = []
    for share in shares:
        sums.append(_f32((sums[-1] if sums else 0.0) + _f32(share)))
    return [_f32(each / sums[-1]) for each in sums]


def _f32(value: float) -> float:
    return _FLOAT.unpack(_FLOAT.pack(value))[0]
