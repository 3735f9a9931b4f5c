"""What the KV cache and recurrent states take on each device, to the byte, and what llama.cpp refuses to cache.

Restates llama_kv_cache, llama_kv_cache_iswa and llama_memory_recurrent for unified caches, which are the engine's: all sequences
share one pool of cells, and only sliding windows and states grow with their number.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from localllm.plan.architecture import CELLS, Architecture, Layer
from localllm.plan.buffers import UNQUANTISED, Buffers, block_weights
from localllm.plan.placement import Placement
from localllm.plan.spec import Amount, Shape, padded, row_bytes

_STATE_BYTES = 4
"""A float."""


def window_cells(architecture: Architecture, shape: Shape, n_ctx: int) -> int:
    """Cells of a layer with a sliding window, in a context of `n_ctx`."""
    if shape.swa_full:
        return n_ctx
    return padded(min(n_ctx, architecture.n_swa * shape.n_seq_max + shape.n_ubatch), CELLS)


def flash(architecture: Architecture, shape: Shape) -> bool:
    """Whether attention is computed without its matrix; `auto` is hoped for."""
    return shape.flash_attn != "off" and architecture.name != "grok"


def refusal(architecture: Architecture, shape: Shape) -> str:
    """Why llama.cpp or the engine would not make a context of this shape; empty when nothing speaks against it."""
    quantised = [kind for kind in (shape.type_k, shape.type_v) if kind.upper() not in UNQUANTISED]
    if architecture.mla and shape.type_k != shape.type_v:
        return f"keys and values of {architecture.name} are one: they need one type, not {shape.type_k} and {shape.type_v}"
    if shape.type_v in quantised and not flash(architecture, shape):
        return f"values in {shape.type_v} need flash attention"
    for kind, widths, what in ((shape.type_k, architecture.k_heads, "keys"), (shape.type_v, architecture.v_heads, "values")):
        odd = [width for width in widths if kind in quantised and width % block_weights(kind)]
        if odd and flash(architecture, shape):
            return f"{what} of {odd[0]} numbers are no multiple of {block_weights(kind)}, the block of {kind}"
    if shape.n_batch < shape.n_seq_max:
        return f"a batch of {shape.n_batch} tokens is below the number of sequences, {shape.n_seq_max}"
    return ""


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that keep the same."""

    layer: Layer
    members: tuple[int, ...]

    def between(self, first: int, end: int) -> int:
        """How many of them are in [first, end)."""
        return bisect_left(self.members, end) - bisect_left(self.members, first)


class Cache:
    """One model's cache before it is placed."""

    def __init__(self, architecture: Architecture, backend_of: Mapping[str, Buffers]) -> None:
        self.architecture = architecture
        self.backend_of = backend_of
        groups: dict[Layer, list[int]] = {}
        for i, layer in enumerate(architecture.layers):
            if layer.k_width or layer.v_width or layer.states:
                groups.setdefault(layer, []).append(i)
        self._groups = [_Group(layer, tuple(members)) for layer, members in groups.items()]
        self._widths_vary = any(layer.v_width not in (0, architecture.v_width_max) for layer in groups)

    def amount(self, placement: Placement, shape: Shape) -> Amount:
        """Bytes of cache and states on each device."""
        by_device: dict[str, int] = {}
        for device, first, end in placement.items():
            buffers = self.backend_of[device]
            n_bytes = sum(n * self._layer_bytes(group.layer, shape, buffers) for group in self._groups if (n := group.between(first, end)))
            if n_bytes:
                by_device[device] = n_bytes
        return Amount(by_device, self._doubt(shape))

    def cell_bytes(self, shape: Shape) -> int:
        """What one more token of context takes, on all devices together; windows and states do not grow."""
        full = [group for group in self._groups if shape.swa_full or not group.layer.window]
        return sum(
            len(g.members) * (row_bytes(shape.type_k, g.layer.k_width) + row_bytes(shape.type_v, self._v_width(g.layer, shape)))
            for g in full
        )

    def read_bytes(self, shape: Shape, n_past: int, placement: Placement) -> dict[str, int]:
        """What decoding one token reads on each device with `n_past` tokens before it: cells and states."""
        by_device: dict[str, int] = {}
        for device, first, end in placement.items():
            for group in self._groups:
                layer = group.layer
                cells = min(n_past, self.architecture.n_swa) if layer.window else n_past
                row = row_bytes(shape.type_k, layer.k_width) + row_bytes(shape.type_v, layer.v_width)
                n_bytes = group.between(first, end) * (cells * row + _STATE_BYTES * sum(layer.states))
                by_device[device] = by_device.get(device, 0) + n_bytes
        return by_device

    def _layer_bytes(self, layer: Layer, shape: Shape, buffers: Buffers) -> int:
        cells = window_cells(self.architecture, shape, shape.n_ctx) if layer.window else shape.n_ctx
        n_bytes = 0
        for kind, width in ((shape.type_k, layer.k_width), (shape.type_v, self._v_width(layer, shape))):
            if width:
                n_bytes += buffers.size(kind, width, row_bytes(kind, width) * cells)
        return n_bytes + sum(padded(_STATE_BYTES * width * shape.n_seq_max, buffers.alignment) for width in layer.states)

    def _v_width(self, layer: Layer, shape: Shape) -> int:
        """Without flash attention values are stored transposed, every layer's as wide as the widest."""
        return layer.v_width if flash(self.architecture, shape) or not layer.v_width else self.architecture.v_width_max

    def _doubt(self, shape: Shape) -> str:
        if self._widths_vary and shape.flash_attn == "auto":
            return self.architecture.doubt or "layers differ, so that the cache depends on flash attention, which a device may lack"
        return self.architecture.doubt
