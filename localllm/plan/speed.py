"""How fast a plan will decode: the bytes that one token makes each device read, over the rate at which it reads them.

Layers run one after the other, so the times of the devices add up. The bytes are exact; the rates come from runs on this machine, or
for the processor from its measured bandwidth. No table of graphics cards stands in for a measurement: before the first run on a card
its speed is not known, and the answer is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from localllm.gguf import Header
from localllm.hardware import Device, Hardware
from localllm.plan.architecture import Architecture
from localllm.plan.history import History, Run
from localllm.plan.placement import Placement
from localllm.plan.spec import CPU, Overrides

TYPICAL_PAST = 2048
"""Tokens in the context of a chat under way, for the part of the cache that is read; half of the context where that is less."""

Range = tuple[float, float]
"""Low and high."""

KINDS = (
    (re.compile(r"F32|F16|BF16|F64"), "float"),
    (re.compile(r"Q8_.*"), "q8"),
    (re.compile(r"Q\d_K.*"), "k"),
    (re.compile(r"I?Q\d_[01]|IQ4_NL"), "legacy"),
    (re.compile(r".*FP4"), "fp4"),
)
OTHER_KIND = "iq"

CPU_EFFICIENCY: Mapping[str, Range] = {
    "float": (0.60, 1.00),
    "q8": (0.55, 0.95),
    "k": (0.45, 0.90),
    "legacy": (0.45, 0.90),
    "fp4": (0.35, 0.85),
    OTHER_KIND: (0.15, 0.70),
}
"""Share of the measured bandwidth that decoding reaches; unpacking the small types costs the processor more than it waits for memory."""
SHARED_GPU: Range = (0.5, 2.5)
"""Graphics that share the RAM, against what the processor's cores read: less where they are small, far more on Apple's large chips."""
SAME: Range = (0.92, 1.08)
"""How far a prediction strays from a run of this model in this place …"""
SAME_KIND: Range = (0.80, 1.20)
"""… from one of another model with weights of this kind …"""
OTHER: Range = (0.50, 1.60)
"""… and from one with other weights on the device."""
LAYER_S: Range = (2e-6, 25e-6)
"""For starting the work of a layer; what bounds tiny models."""
TOKEN_S: Range = (20e-6, 200e-6)
"""Sampling and the rest of a step."""
DOMINANT = 0.9


def weight_kind(header: Header) -> str:
    """The class of quantisation that most bytes of the model are in."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        if not _is_embedding(tensor.name):
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.n_bytes
    most = max(sizes, key=lambda kind: sizes[kind], default="F16")
    return next((name for pattern, name in KINDS if pattern.fullmatch(most)), OTHER_KIND)


def device_key(device: Device) -> str:
    """What a measurement of a device belongs to, whatever its number today."""
    return f"{device.backend} {device.description}"


def cpu_key(hardware: Hardware) -> str:
    """The same for the processor."""
    return f"{CPU} {hardware.cpu_name}"


def keys(hardware: Hardware) -> dict[str, str]:
    """Device name -> key, of all that can hold weights."""
    return {**{device.name: device_key(device) for device in hardware.devices}, CPU: cpu_key(hardware)}


def typical_past(n_ctx: int) -> int:
    """How many tokens of a context of `n_ctx` cells a prediction reckons with."""
    return min(n_ctx // 2, TYPICAL_PAST)


@dataclass(frozen=True, slots=True)
class _Sums:
    running: tuple[float, ...]
    """Bytes read in the layers before each, the output being the last."""
    fixed: Mapping[str, float]
    """In overridden tensors, by device."""


class Reads:
    """The weights that decoding one token reads, before they are placed."""

    def __init__(self, header: Header, architecture: Architecture) -> None:
        self._header = header
        self._architecture = architecture
        self._by_overrides: dict[Overrides, _Sums] = {}

    def by_device(self, placement: Placement, overrides: Overrides = ()) -> dict[str, float]:
        """Bytes by device: all of dense layers, the used share of experts, of embeddings a row, which is nothing."""
        sums = self._by_overrides.get(overrides)
        if sums is None:
            sums = self._by_overrides[overrides] = self._sum(overrides)
        read = dict(sums.fixed)
        for device, first, end in placement.items():
            read[device] = read.get(device, 0.0) + sums.running[end] - sums.running[first]
        return read

    @cached_property
    def _weights(self) -> list[tuple[str, int, float]]:
        """(tensor, layer, bytes read); the prediction heads are not part of a token."""
        last = self._architecture.n_layers
        used = self._architecture.n_expert_used / self._architecture.n_expert if self._architecture.n_expert else 1.0
        weights: list[tuple[str, int, float]] = []
        for tensor in self._header.tensors:
            block = _BLOCK.match(tensor.name)
            layer = int(block[1]) if block else last
            if tensor.name == "token_embd.weight":
                if self._architecture.tied:
                    weights.append(("output.weight", last, tensor.n_bytes))
            elif not _is_embedding(tensor.name) and (block is None or layer < self._architecture.n_trunk):
                weights.append((tensor.name, layer, tensor.n_bytes * (used if _EXPERTS.search(tensor.name) else 1.0)))
        return weights

    def _sum(self, overrides: Overrides) -> _Sums:
        rules = [(re.compile(pattern), buffer) for pattern, buffer in overrides]
        layers = [0.0] * (self._architecture.n_layers + 1)
        fixed: dict[str, float] = {}
        for name, layer, n_bytes in self._weights:
            moved = next((buffer for pattern, buffer in rules if pattern.search(name)), None)
            if moved is None:
                layers[layer] += n_bytes
            else:
                fixed[moved] = fixed.get(moved, 0.0) + n_bytes
        return _Sums(tuple(accumulate(layers, initial=0.0)), fixed)


@dataclass(frozen=True, slots=True)
class Speeds:
    """What is known of this machine's speed for one model."""

    hardware: Hardware
    history: History
    kind: str
    """Of the model's weights."""
    threads: int
    model: str = ""
    """As in history.Run; empty when it is not known."""

    def tokens_per_s(self, read_bytes: Mapping[str, float], n_layers: int) -> Range | None:
        """The range that decoding will lie in; None where a device is involved of which nothing is known.

        `read_bytes` is weights and cache, by device name.
        """
        names = keys(self.hardware)
        by_key: dict[str, float] = {}
        for name, n_bytes in read_bytes.items():
            if n_bytes:
                by_key[names[name]] = by_key.get(names[name], 0.0) + n_bytes
        if not by_key:
            return None
        if (run := self._same(by_key)) is not None:
            rate = run.tokens_per_s * sum(run.read_bytes.values()) / sum(by_key.values())
            return rate * SAME[0], rate * SAME[1]
        slow, fast = TOKEN_S[1] + n_layers * LAYER_S[1], TOKEN_S[0] + n_layers * LAYER_S[0]
        for key, n_bytes in by_key.items():
            rate = self.rate(key)
            if rate is None:
                return None
            # A measured rate has the cost of starting each layer in it.
            slow += n_bytes / rate[0]
            fast += n_bytes / rate[1]
        return 1 / slow, 1 / fast

    def rate(self, key: str) -> Range | None:
        """Bytes per second that a device gets through, by its key; None when nothing is known."""
        for same_kind, spread in ((True, SAME_KIND), (False, OTHER)):
            known = [rate for run in self.history.runs if (run.kind == self.kind) == same_kind and (rate := self._measured(run, key))]
            if known:
                return min(known) * spread[0], max(known) * spread[1]
        return self._estimate(key)

    def _estimate(self, key: str) -> Range | None:
        """From the bandwidth of the RAM, for what lives in it."""
        bandwidth = self.hardware.bandwidth_bytes_per_s
        if not bandwidth:
            return None
        low, high = CPU_EFFICIENCY[self.kind]
        if key == cpu_key(self.hardware):
            return low * bandwidth, high * bandwidth
        if any(device.shared_with_ram and device_key(device) == key for device in self.hardware.devices):
            return low * bandwidth * SHARED_GPU[0], bandwidth * SHARED_GPU[1]
        return None

    def _measured(self, run: Run, key: str) -> float | None:
        """The rate of one device in a run that was nearly all its own; of others the share cannot be told apart."""
        total = sum(run.read_bytes.values())
        mine = run.read_bytes.get(key, 0)
        if mine < DOMINANT * total or (key == cpu_key(self.hardware) and run.threads != self.threads):
            return None
        return mine * run.tokens_per_s

    def _same(self, by_key: Mapping[str, float]) -> Run | None:
        """A run of this very model on the same devices, in about the same shares."""
        total = sum(by_key.values())
        for run in reversed(self.history.runs):
            if not self.model or run.model != self.model or run.threads != self.threads or run.read_bytes.keys() != by_key.keys():
                continue
            of_run = sum(run.read_bytes.values())
            if all(math.isclose(n_bytes / total, run.read_bytes[key] / of_run, abs_tol=0.1) for key, n_bytes in by_key.items()):
                return run
        return None


_BLOCK = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"_(ch)?exps\b")
_EMBEDDINGS = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")


def _is_embedding(name: str) -> bool:
    return name.startswith(_EMBEDDINGS)
