"""What the weights take on each device, to the byte: llama.cpp's placement of every tensor, summed once and then looked up.

Restates llama_model_loader::create_tensor and ggml_backend_alloc_ctx_tensors_from_buft: a tensor lies with its layer, embeddings
with the CPU, an override goes before both, and each is padded as its backend pads.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from localllm.errors import UsageError
from localllm.gguf import Header, Tensor
from localllm.hardware import Device
from localllm.plan import families
from localllm.plan.architecture import Architecture
from localllm.plan.buffers import HOST, Buffers, buffers_of, repacks
from localllm.plan.placement import Placement
from localllm.plan.spec import CPU, Amount, Overrides

EXPERT_TENSORS = r"ffn_(up|down|gate_up|gate)_(ch|)exps"
"""llama.cpp's name for them, in its -ncmoe."""

_INPUT = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
_FIRST_LAYER = ("token_embd_norm.", "per_layer_model_proj.", "per_layer_proj_norm.")
_EVERY_LAYER = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")
"""Each device with such layers has a copy."""
_NORM_IS_LAST = frozenset({"lfm2", "lfm2moe"})
"""What these call token_embd_norm is the norm of the output."""
_EMBEDDING = "token_embd.weight"
_LAZY_BYTES = 4 << 30
"""llama.cpp reads a per-layer embedding of more than this from the file as it needs it."""
_BLOCK = re.compile(r"blk\.(\d+)\.")

INPUT, EVERY, SKIPPED = -1, -2, -3


def experts_on_cpu(n_layers: int) -> Overrides:
    """Overrides that keep the experts of the first `n_layers` layers on the CPU; all of one kind, so that equal plans are equal."""
    if n_layers <= 0:
        return ()
    return ((rf"blk\.({'|'.join(map(str, range(n_layers)))})\.{EXPERT_TENSORS}", CPU),)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor, or the copy of one, on its way to a device."""

    name: str
    layer: int
    """INPUT, EVERY, a block, or n_layers for the output."""
    sizes: tuple[int, ...]
    """By index of the rules: the host's first."""
    repacked: bool
    """On the CPU it is copied into another layout."""


@dataclass(frozen=True, slots=True)
class _Sums:
    """All weights under one set of overrides, as running sums over the layers, the output being the last."""

    by_rule: tuple[tuple[int, ...], ...]
    repacked: tuple[int, ...]
    """The part of the host's sums that is repacked."""
    largest: tuple[int, ...]
    """The largest tensor of all layers before each, on the host."""
    every: tuple[int, ...]
    """By rule: what each device with layers has a copy of."""
    inputs: int
    """On the host, whatever the layers do."""
    fixed: Mapping[str, int]
    """Overridden, by device."""
    fixed_repacked: int
    fixed_largest: int
    """Of those overridden to the CPU."""


class Weights:
    """One model's weights before they are placed."""

    def __init__(self, header: Header, architecture: Architecture, devices: Sequence[Device], kernels: str | None) -> None:
        """`kernels` is what the CPU repacks for (`buffers.repack_of`), None when nobody knows."""
        self.header = header
        self.architecture = architecture
        self.kernels = kernels or ""
        self.kernels_known = kernels is not None
        self.rules: tuple[Buffers, ...] = tuple(dict.fromkeys((HOST, *map(buffers_of, devices))))
        self.rule_of = {CPU: 0, **{device.name: self.rules.index(buffers_of(device)) for device in devices}}
        self.backend_of = {CPU: HOST, **{device.name: buffers_of(device) for device in devices}}
        self._every: list[_Weight] = []
        self._weights: list[_Weight] = []
        self._embedding: _Weight | None = None
        for tensor in header.tensors:
            self._add(tensor)
        self._lazy = any(t.name.startswith("per_layer_token_embd.") and t.n_bytes > _LAZY_BYTES for t in header.tensors)
        self._layers_of_every = self._sharing_layers()
        self._sums: dict[Overrides, _Sums] = {}
        self._matches: dict[str, frozenset[str]] = {}

    def amount(self, placement: Placement, overrides: Overrides = ()) -> Amount:
        """Bytes of weights on each device."""
        sums = self._summed(overrides)
        by_device = {CPU: sums.inputs}
        for name, first, end in placement.items():
            running = sums.by_rule[self.rule_of[name]]
            by_device[name] = by_device.get(name, 0) + running[end] - running[first]
            if self._every and self._has_layer(first, end):
                by_device[name] += sums.every[self.rule_of[name]]
        for name, n_bytes in sums.fixed.items():
            by_device[name] = by_device.get(name, 0) + n_bytes
        if self._embedding is not None and (copy := self._copy(placement, overrides)) is not None:
            by_device[copy] = by_device.get(copy, 0) + self._embedding.sizes[self.rule_of[copy]]
        return Amount(by_device, self._doubt(placement, by_device))

    def repacked_bytes(self, placement: Placement, overrides: Overrides = ()) -> int:
        """The part on the CPU that is copied into another layout, so that it is anonymous memory even of a mapped file."""
        if not self._repacking(placement):
            return 0
        sums = self._summed(overrides)
        n_bytes = sums.fixed_repacked
        for name, first, end in placement.items():
            if name == CPU:
                n_bytes += sums.repacked[end] - sums.repacked[first]
        if self._embedding is not None and self._embedding.repacked and self._copy(placement, overrides) == CPU:
            n_bytes += self._embedding.sizes[0]
        return n_bytes

    def largest_bytes(self, placement: Placement, overrides: Overrides = ()) -> int:
        """The largest tensor on the CPU that a layer computes with: what is copied to a device that takes large batches over."""
        sums = self._summed(overrides)
        end = min(placement.ranges[0][1], self.architecture.n_layers)
        return max(sums.largest[end], sums.fixed_largest)

    def mapped_bytes(self, placement: Placement, overrides: Overrides = (), device: str = CPU) -> int:
        """What `device` shows as weights of a mapped file: from the first of its tensors to the last, gaps included, for each part."""
        ends: dict[int, tuple[int, int]] = {}
        repacking = self._repacking(placement)
        owners = self.owners(placement, overrides)
        for tensor in self.header.tensors:
            if owners.get(tensor.name) != device or (device == CPU and repacking and repacks(tensor, self.kernels)):
                continue
            first, last = ends.get(tensor.file, (tensor.offset, 0))
            ends[tensor.file] = min(first, tensor.offset), max(last, tensor.offset + tensor.n_bytes)
        return sum(last - first for first, last in ends.values())

    def owners(self, placement: Placement, overrides: Overrides = ()) -> dict[str, str]:
        """Who has which tensor, by its name; of one with copies, the CPU's or the first device's."""
        moved = self._moved(overrides)
        where = {weight.name: CPU if weight.layer == INPUT else placement.device(weight.layer) for weight in self._weights}
        where |= {weight.name: placement.device(self._layers_of_every[0]) for weight in self._every if self._layers_of_every}
        return where | {name: buffer for name, buffer in moved.items() if name in where}

    def adapter(self, adapter: Header, placement: Placement, overrides: Overrides = ()) -> Amount:
        """Bytes of a LoRA adapter: its tensors lie with those that they change (llama-adapter.cpp)."""
        owners = self.owners(placement, overrides)
        by_device: dict[str, int] = {}
        unknown = 0
        for tensor in adapter.tensors:
            base, _, part = tensor.name.rpartition(".")
            if part not in ("lora_a", "lora_b"):
                continue
            device = owners.get(base)
            unknown += device is None
            device = device or CPU
            size = self.backend_of[device].size(tensor.type, tensor.shape[0], tensor.n_bytes)
            by_device[device] = by_device.get(device, 0) + size
        return Amount(by_device, f"the adapter changes {unknown} tensors that the model does not have" if unknown else "")

    def _add(self, tensor: Tensor) -> None:
        layer = self._layer(tensor.name)
        if layer == SKIPPED:
            return
        sizes = tuple(rule.size(tensor.type, tensor.shape[0] if tensor.shape else 1, tensor.n_bytes) for rule in self.rules)
        weight = _Weight(tensor.name, layer, sizes, repacks(tensor, self.kernels))
        if layer == EVERY:
            self._every.append(weight)
            return
        self._weights.append(weight)
        if tensor.name == _EMBEDDING and self.architecture.tied:
            as_output = Tensor("output.weight", tensor.shape, tensor.type, tensor.offset, tensor.n_bytes, tensor.file)
            self._embedding = _Weight(_EMBEDDING, self.architecture.n_layers, sizes, repacks(as_output, self.kernels))

    def _layer(self, name: str) -> int:
        block = _BLOCK.match(name)
        if block is not None:
            layer = int(block[1])
            return layer if layer < self.architecture.n_trunk else SKIPPED
        if name.startswith(_INPUT):
            return INPUT
        if name.startswith(_EVERY_LAYER):
            return EVERY
        if name.startswith(_FIRST_LAYER) and self.architecture.name not in _NORM_IS_LAST:
            return 0
        return self.architecture.n_layers

    def _sharing_layers(self) -> list[int]:
        """The layers that use what every layer has; gemma4's windowed ones do not turn by frequencies."""
        full_only = self.architecture.name == "gemma4"
        layers = enumerate(self.architecture.layers[: self.architecture.n_trunk])
        return [i for i, layer in layers if not (full_only and layer.window)]

    def _has_layer(self, first: int, end: int) -> bool:
        at = bisect_left(self._layers_of_every, first)
        return at < len(self._layers_of_every) and self._layers_of_every[at] < end

    def _summed(self, overrides: Overrides) -> _Sums:
        known = self._sums.get(overrides)
        if known is None:
            known = self._sums[overrides] = self._sum(self._moved(overrides))
        return known

    def _sum(self, moved: Mapping[str, str]) -> _Sums:
        n_places = self.architecture.n_layers + 1
        by_rule = [[0] * n_places for _ in self.rules]
        repacked = [0] * n_places
        fixed: dict[str, int] = {}
        largest = [0] * n_places
        every = [0] * len(self.rules)
        inputs = fixed_repacked = fixed_largest = 0
        for weight in (*self._weights, *self._every):
            buffer = moved.get(weight.name)
            if buffer is not None:
                fixed[buffer] = fixed.get(buffer, 0) + weight.sizes[self.rule_of[buffer]]
                if buffer == CPU:
                    fixed_repacked += weight.sizes[0] if weight.repacked else 0
                    fixed_largest = max(fixed_largest, weight.sizes[0])
            elif weight.layer == INPUT:
                inputs += weight.sizes[0]
            elif weight.layer == EVERY:
                every = [had + size for had, size in zip(every, weight.sizes, strict=True)]
            else:
                for sums, size in zip(by_rule, weight.sizes, strict=True):
                    sums[weight.layer] += size
                repacked[weight.layer] += weight.sizes[0] if weight.repacked else 0
                largest[weight.layer] = max(largest[weight.layer], weight.sizes[0])
        running = tuple(tuple(accumulate(sums, initial=0)) for sums in by_rule)
        return _Sums(
            running,
            tuple(accumulate(repacked, initial=0)),
            tuple(accumulate(largest, max, initial=0)),
            tuple(every),
            inputs,
            fixed,
            fixed_repacked,
            fixed_largest,
        )

    def _moved(self, overrides: Overrides) -> dict[str, str]:
        """Tensor -> buffer, the first override that matches counting. Raises UsageError for one that makes no sense."""
        moved: dict[str, str] = {}
        for pattern, buffer in reversed(overrides):
            if buffer not in self.rule_of:
                raise UsageError(f"an override names the buffer {buffer}", hint=f"use one of {', '.join(self.rule_of)}")
            moved |= dict.fromkeys(self._matching(pattern), buffer)
        return moved

    def _matching(self, pattern: str) -> frozenset[str]:
        found = self._matches.get(pattern)
        if found is None:
            try:
                search = re.compile(pattern).search
            except re.error as error:
                raise UsageError(f"the override {pattern} is no regular expression: {error}", hint=r"write one like blk\.1\.=CPU") from None
            found = self._matches[pattern] = frozenset(w.name for w in (*self._weights, *self._every) if search(w.name))
        return found

    def _copy(self, placement: Placement, overrides: Overrides) -> str | None:
        """Who has the embedding a second time, as the output; None when once is enough."""
        assert self._embedding is not None
        moved = self._moved(overrides).get(_EMBEDDING) if overrides else None
        first = moved or CPU
        device = moved or placement.device(self.architecture.n_layers)
        if device != first or self.architecture.name in families.OUTPUT_FIRST:
            return device
        # two layouts, two copies
        return CPU if device == CPU and self._embedding.repacked and self._repacking(placement) else None

    def _repacking(self, placement: Placement) -> bool:
        """Whether weights on the CPU are repacked: not where they lie in a device's pinned memory."""
        return not any(self.backend_of[name].pinned_host for name in placement.devices)

    def _doubt(self, placement: Placement, by_device: Mapping[str, int]) -> str:
        doubts = [self.architecture.doubt, *(self.backend_of[name].doubt for name, n_bytes in by_device.items() if n_bytes)]
        if self._lazy:
            doubts.append("llama.cpp reads the per-layer embedding from the file as it needs it")
        if self._repacking(placement):
            if self.kernels == "amx":
                doubts.append("on a CPU with AMX weights take another layout")
            elif not self.kernels_known and self._embedding is not None and placement.device(self.architecture.n_layers) == CPU:
                doubts.append("whether this CPU keeps the embedding twice is not known")
        return "; ".join(dict.fromkeys(filter(None, doubts)))
