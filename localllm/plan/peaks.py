"""The peaks of a graph in closed form: what is alive together at its widest points, by the model's dimensions.

Fitted to what llama.cpp reserves for the architectures in tests/plan/test_compute.py, on the safe side: a dry run tells the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

from localllm.plan.cache import flash, window_cells
from localllm.plan.footprint import Footprint
from localllm.plan.spec import CPU, Shape, padded
from localllm.plan.weights import EXPERT_TENSORS

COPIES = 4
"""ggml's GGML_SCHED_MAX_COPIES: batches in flight on several devices at once."""
TAKEN_OVER_ROWS = 32
"""A device computes batches of at least this many rows with weights in host memory."""
_FLOAT, _HALF, _INDEX = 4, 2, 8
_SAFETY = 1.06
"""Small tensors and alignment that the formulas leave out."""
_COMPETING = 1.2
"""Room lost where states and logits are alive with the activations."""
_COPIED, _COPIED_EXPERTS = 1.5, 1.1
"""Room that copies from the CPU need, for one of them: the next may come before the last has gone."""


@dataclass(frozen=True, slots=True)
class Peak:
    """What is alive together at one point of the graph, over contexts."""

    start: float
    """Bytes that do not depend on the context."""
    per_cell: float
    per_mask_cell: float
    """For each cell that the masks cover: those of the context, and again those of sliding windows."""

    def at(self, n_ctx: int, masked: int) -> float:
        return self.start + self.growth(n_ctx, masked)

    def growth(self, n_ctx: int, masked: int) -> float:
        return self.per_cell * n_ctx + self.per_mask_cell * masked


class Peaks:
    """The peaks of one shape in closed form: activations that are alive together, by the model's dimensions."""

    def __init__(self, footprint: Footprint, shape: Shape) -> None:
        self.footprint = footprint
        self.shape = shape
        self.architecture = footprint.architecture
        self.placement = footprint.placement(shape)
        self.flash = flash(self.architecture, shape)
        self.copies = COPIES if footprint.asynchronous(shape) else 1
        self.offloads = bool(self.placement.devices) and footprint.largest_host_bytes(shape) > 0
        self.on_cpu = self.placement.ranges[0][1] - self.placement.ranges[0][0]
        self.windowed = self.architecture.windowed
        self._of: dict[str, list[Peak]] = {}

    def masked(self, n_ctx: int) -> int:
        """Cells that the masks cover: one mask for full layers, one for windowed ones."""
        a = self.architecture
        return n_ctx + (window_cells(a, self.shape, n_ctx) if self.windowed else 0)

    def has_gaps(self, device: str) -> bool:
        """Whether no line describes the size: layers are copied to `device` as they are needed (experts alone do no harm), or latent
        attention takes a detour, or recurrent states and many rows of logits compete."""
        a, kinds = self.architecture, {self.shape.type_k, self.shape.type_v}
        if (a.mla and (not self.flash or kinds != {"f16"})) or (a.recurrent and self._wide_output()):
            return True
        if not self._takes_over(device):
            return False
        return self.on_cpu > 0 or not all(buffer == CPU and pattern.endswith(EXPERT_TENSORS) for pattern, buffer in self.shape.overrides)

    def of(self, device: str) -> list[Peak]:
        """From the flattest to the steepest."""
        known = self._of.get(device)
        if known is None:
            known = self._of[device] = self._find(device)
        return known

    def _find(self, device: str) -> list[Peak]:
        a, shape = self.architecture, self.shape
        computes = self.on_cpu > 0 if device == CPU else any(name == device for name, _, _ in self.placement.items())
        rows = tokens(shape)
        if device == CPU and computes and self._all_taken_over():
            rows = min(rows, padded(TAKEN_OVER_ROWS, shape.n_seq_max))
        mask = float((_HALF if self.flash else _FLOAT) * tokens(shape) * self.copies)
        inputs = self._inputs(tokens(shape))
        if not computes and not self._takes_over(device):
            return [Peak(inputs * _SAFETY, 0.0, mask)]
        between = inputs if self.copies > 1 or device == CPU else self._indices(rows)
        if rows < tokens(shape):
            # what a device has computed comes back to be kept
            between += _FLOAT * tokens(shape) * max((layer.k_width + layer.v_width for layer in a.layers), default=0)
        output = _FLOAT * (a.n_vocab * shape.n_outputs + 3 * rows * a.n_embd) if self.placement.device(a.n_layers) == device else 0
        weights, per_cell = self._moved(device)
        activations = self._activations(rows) * (_COMPETING if a.recurrent and self._wide_output() else 1.0)
        attention = _FLOAT * rows * (2 * a.n_embd + 5 * a.n_heads * max(a.k_heads, default=0))
        return [
            Peak((max(output, activations if weights else 0) + between) * _SAFETY + weights, 0.0, 0.0),
            Peak((activations + between) * _SAFETY + weights, per_cell, mask),
            Peak((attention + between) * _SAFETY + weights, per_cell + self._attention_per_cell(device, rows), mask),
        ]

    def _wide_output(self) -> bool:
        """Whether the logits take more than a layer's activations."""
        return _FLOAT * self.architecture.n_vocab * self.shape.n_outputs > self._activations(tokens(self.shape))

    def _inputs(self, rows: int) -> float:
        """Embeddings on their way from the CPU, indices and rotations."""
        return 2.0 * _FLOAT * rows * self.architecture.n_embd * self.copies + self._indices(rows) * self.copies

    def _indices(self, rows: int) -> float:
        """Where new values go, one place for each number while they are stored transposed; matrices that turn a quantised cache."""
        a, kinds = self.architecture, 2 if self.architecture.windowed else 1
        indices = 0 if self.flash else _INDEX * rows * a.v_width_max
        turned = [max(heads, default=0) for heads, kind in ((a.k_heads, self.shape.type_k), (a.v_heads, self.shape.type_v)) if "q" in kind]
        return float(kinds * (indices + sum(_FLOAT * width * width for width in turned)))

    def _takes_over(self, device: str) -> bool:
        """The first device computes large batches with the weights of the CPU, which are copied to it."""
        return self.offloads and self.placement.devices[0] == device

    def _all_taken_over(self) -> bool:
        """Whether the CPU is left with small batches only; repacked weights and recurrent states stay with it."""
        large = self.shape.n_ubatch >= TAKEN_OVER_ROWS
        return self.offloads and large and self.footprint.pinned_host(self.shape) and not self.architecture.recurrent

    def _moved(self, device: str) -> tuple[float, float]:
        """Weights and cache copied from the CPU: bytes, and bytes for each cell."""
        if not self._takes_over(device):
            return 0.0, 0.0
        first, end = self.placement.ranges[0]
        on_cpu = self.architecture.layers[first : min(end, self.architecture.n_layers)]
        rows = [_HALF * (layer.k_width + max(layer.v_width, layer.k_width)) for layer in on_cpu]
        gaps = _COPIED if on_cpu else _COPIED_EXPERTS
        return gaps * self.footprint.largest_host_bytes(self.shape), gaps * max(rows, default=0)

    def _activations(self, rows: int) -> float:
        """Of the widest layer: feed-forward, experts, a recurrent mixture or queries."""
        a = self.architecture
        experts = a.n_expert_used * (3 * a.n_ff_expert + a.n_embd) + a.n_embd if a.n_expert_used else 0
        widest = max(3 * a.n_ff, experts, 3 * a.state_width, 5 * a.n_heads * max(a.k_heads, default=0))
        states = self.shape.n_seq_max * max((sum(layer.states) for layer in a.layers), default=0)
        return _FLOAT * (rows * (widest + 3 * a.n_embd) + 2 * states)

    def _attention_per_cell(self, device: str, rows: int) -> float:
        """What attention adds for each cell: its matrix, or the cache as 16-bit floats where it is kept in another type."""
        a, shape = self.architecture, self.shape
        if not self.flash:
            matrix = float(_FLOAT * rows * a.n_heads + (_HALF * rows if a.mla else 0))
            return 2 * matrix if self.on_cpu and self._takes_over(device) else matrix
        if device == CPU:
            return 0.0
        full = [layer for layer in a.layers if not layer.window]
        k = max((layer.k_width for layer in full), default=0) if shape.type_k != "f16" else 0
        v = max((layer.v_width for layer in full), default=0) if shape.type_v != "f16" else 0
        return float(_HALF * (k + v))


def tokens(shape: Shape) -> int:
    """Rows of the graph that llama.cpp reserves: a micro-batch, rounded up to a multiple of the sequences."""
    return padded(min(shape.n_ctx, shape.n_ubatch), shape.n_seq_max)
