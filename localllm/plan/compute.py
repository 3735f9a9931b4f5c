"""What llama.cpp computes in, on each device: read off dry runs where there are some, estimated on the safe side where not.

The size of a compute buffer follows from the graph's peaks, and each peak grows with the context in a straight line: attention's
mask is alive in all of them, its matrix or a dequantised cache in some. So over contexts the size is the highest of a few lines
whose slopes are known and whose starts two dry runs tell. Where a device takes large batches over from layers on the CPU, what is
copied leaves gaps, and only a dry run of that very context is exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from localllm.plan.footprint import Footprint
from localllm.plan.peaks import Peak, Peaks
from localllm.plan.spec import CPU, Amount, Shape, padded

_GAPS = 1.05
"""On guesses between dry runs where buffers have gaps."""
_SAME_BYTES = 128 << 10
"""Two sizes that differ by less lie on one line."""
_NEAR = 0.8
"""A peak of more than this part of a size may be the one that it was read off."""

ESTIMATED = "compute buffers are estimated"
OTHER_LAYERS = "compute buffers are those of a dry run with other layers on the devices"
IRREGULAR = "compute buffers between dry runs are a guess: these have gaps"
BEYOND = "compute buffers are continued beyond the dry runs"
FLAT = "compute buffers may not grow with the context at first"


@dataclass(frozen=True, slots=True)
class Sample:
    """One dry run's compute buffers."""

    shape: Shape
    by_device: Mapping[str, int]


class ComputeModel:
    """The compute buffers of one footprint, as far as `samples` tell; pure, so that equal samples give equal answers."""

    def __init__(self, footprint: Footprint, samples: Iterable[Sample] = ()) -> None:
        self.footprint = footprint
        self.samples = tuple(samples)
        self._curves: dict[Shape, dict[int, Mapping[str, int]]] = {}
        self._alike: dict[tuple[Shape, bool, bool], Shape] = {}
        self._peaks: dict[Shape, Peaks] = {}
        for sample in self.samples:
            key = _without_context(sample.shape)
            self._curves.setdefault(key, {})[sample.shape.n_ctx] = sample.by_device
            self._alike[self._likeness(sample.shape)] = key

    def with_samples(self, *samples: Sample) -> ComputeModel:
        """One that knows these dry runs, too."""
        return ComputeModel(self.footprint, (*self.samples, *samples))

    def amount(self, shape: Shape) -> Amount:
        """Bytes of compute buffers on each device: what a dry run of the shape said, within 1 % where there is no doubt, else a guess.

        Without any dry run of a shape like it, that is `estimate`.
        """
        key = _without_context(shape)
        curve = self._curves.get(key)
        if curve is not None and shape.n_ctx in curve:
            return Amount(curve[shape.n_ctx])
        doubts: dict[str, None] = {}
        if curve is None:
            like = self._alike.get(self._likeness(shape))
            if like is None:
                return self._estimate(self._peaks_of(shape, key), shape.n_ctx)
            curve = self._curves[like]
            doubts[OTHER_LAYERS] = None
        peaks = self._peaks_of(shape, key)
        by_device: dict[str, int] = {}
        for device in (*peaks.placement.devices, CPU):
            points = [(n_ctx, by.get(device, 0)) for n_ctx, by in sorted(curve.items())]
            if not any(size for _, size in points):  # it had nothing to do there
                by_device[device] = self.estimate(shape).on(device) if OTHER_LAYERS in doubts else 0
                continue
            reading = _Reading(points, peaks.of(device), peaks)
            value, doubt = reading.guess(shape.n_ctx) if peaks.has_gaps(device) else reading.read(shape.n_ctx)
            by_device[device] = max(round(value), 0)
            if doubt:
                doubts[doubt] = None
        return Amount(by_device, "; ".join(doubts))

    def estimate(self, shape: Shape) -> Amount:
        """What no dry run was asked about, from the dimensions alone: rather too much than too little."""
        return self._estimate(self._peaks_of(shape, _without_context(shape)), shape.n_ctx)

    def worth_sampling(self, shape: Shape, largest: int) -> tuple[Shape, ...]:
        """The shape at the two contexts whose dry runs tell the most about all contexts up to `largest`."""
        smallest = padded(max(2 * shape.n_ubatch, 1024), 256)
        return tuple(replace(shape, n_ctx=n_ctx) for n_ctx in sorted({min(smallest, largest), largest}))

    def _estimate(self, peaks: Peaks, n_ctx: int) -> Amount:
        masked = peaks.masked(n_ctx)
        by_device = {name: max(peak.at(n_ctx, masked) for peak in peaks.of(name)) for name in (*peaks.placement.devices, CPU)}
        return Amount({name: padded(round(n_bytes), 128) for name, n_bytes in by_device.items()}, ESTIMATED)

    def _peaks_of(self, shape: Shape, key: Shape) -> Peaks:
        """Those of all shapes that differ from this one in the context only."""
        known = self._peaks.get(key)
        if known is None:
            known = self._peaks[key] = Peaks(self.footprint, shape)
        return known

    def _likeness(self, shape: Shape) -> tuple[Shape, bool, bool]:
        """Equal for shapes that differ only in how many layers or experts lie where."""
        plain = replace(_without_context(shape), n_gpu_layers=0, tensor_split=(), overrides=())
        placement = self.footprint.placement(shape)
        return plain, placement.ranges[0][0] == placement.ranges[0][1], bool(shape.overrides)


class _Reading:
    """One device's sizes over contexts, from those of a few."""

    def __init__(self, points: Sequence[tuple[int, int]], peaks: Sequence[Peak], over: Peaks) -> None:
        self.points = points
        self.peaks = peaks
        self.over = over

    def read(self, n_ctx: int) -> tuple[float, str]:
        """The size at `n_ctx` where the peaks' slopes hold; and the doubt that is left."""
        at = bisect_left([point for point, _ in self.points], n_ctx)
        if 0 < at < len(self.points):
            return self._between(self.points[at - 1], self.points[at], n_ctx)
        x1, v1 = self.points[0] if at == 0 else self.points[-1]
        on = min(self._on(at), len(self.peaks) - 1)
        value = v1 + self._growth(self.peaks[on], n_ctx) - self._growth(self.peaks[on], x1)
        # a peak that is hidden at the known point may show at this one
        others = self.peaks[:on] if at == 0 else self.peaks[on + 1 :]
        rival = max((peak.start + self._growth(peak, n_ctx) for peak in others), default=0.0)
        rival = min(rival, v1) if at == 0 else rival
        doubt = BEYOND if rival > _NEAR * value or (len(self.points) == 1 and self._steeper(on)) else ""
        if len(self.peaks) > 1 and (on == 0 or self.peaks[0].start > _NEAR * v1):
            return max(value, rival) * _GAPS, FLAT
        return max(value, rival if doubt else 0.0), doubt

    def guess(self, n_ctx: int) -> tuple[float, str]:
        """The size where no slope holds: in proportion, and a little more."""
        at = bisect_left([point for point, _ in self.points], n_ctx)
        if at == 0:
            return self.points[0][1] * _GAPS, IRREGULAR
        x1, v1 = self.points[at - 1]
        if at == len(self.points):
            steepest = self.peaks[-1]
            return v1 * _GAPS + self._growth(steepest, n_ctx) - self._growth(steepest, x1), IRREGULAR
        x2, v2 = self.points[at]
        return (v1 + (v2 - v1) * (n_ctx - x1) / (x2 - x1)) * _GAPS, IRREGULAR

    def _between(self, left: tuple[int, int], right: tuple[int, int], n_ctx: int) -> tuple[float, str]:
        (x1, v1), (x2, v2) = left, right
        rises = [self._growth(peak, x2) - self._growth(peak, x1) for peak in self.peaks]
        for peak, rise in zip(self.peaks, rises, strict=True):
            if abs(v2 - v1 - rise) <= _SAME_BYTES:
                return v1 + self._growth(peak, n_ctx) - self._growth(peak, x1), ""
        flatter = [peak for peak, rise in zip(self.peaks, rises, strict=True) if rise < v2 - v1]
        steeper = [peak for peak, rise in zip(self.peaks, rises, strict=True) if rise > v2 - v1]
        # peaks are convex over the context, so that a chord lies above them
        chord = v1 + (v2 - v1) * (n_ctx - x1) / (x2 - x1)
        if not flatter or not steeper:
            return chord, IRREGULAR
        from_left = v1 + self._growth(flatter[-1], n_ctx) - self._growth(flatter[-1], x1)
        from_right = v2 - self._growth(steeper[0], x2) + self._growth(steeper[0], n_ctx)
        if flatter[-1] is self.peaks[0] and len(self.peaks) > 1:
            return max(from_left, chord) * _GAPS, FLAT
        return max(from_left, from_right), FLAT if len(self.peaks) > 1 and self.peaks[0].start > _NEAR * v1 else ""

    def _on(self, at: int) -> int:
        """Index of the peak that the outermost points lie on, as far as they tell; else that of the activations."""
        if len(self.points) > 1:
            (x1, v1), (x2, v2) = self.points[:2] if at == 0 else self.points[-2:]
            rises = [self._growth(peak, x2) - self._growth(peak, x1) for peak in self.peaks]
            fitting = [i for i, rise in enumerate(rises) if rise <= v2 - v1 + _SAME_BYTES]
            return fitting[-1] if fitting else 0
        return 1

    def _steeper(self, on: int) -> bool:
        """Whether the size may lie on a peak steeper than that."""
        return any(peak.per_cell > self.peaks[on].per_cell for peak in self.peaks[on + 1 :])

    def _growth(self, peak: Peak, n_ctx: int) -> float:
        return peak.growth(n_ctx, self.over.masked(n_ctx))


def _without_context(shape: Shape) -> Shape:
    return replace(shape, n_ctx=0, n_threads=1, load_mode="auto")
