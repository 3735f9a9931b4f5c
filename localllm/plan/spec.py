"""The values that planning passes around: what was wished, what llama.cpp will be told, and bytes with their certainty.

Nothing is computed here but sums and sizes that follow from the values alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from localllm.gguf import Header
from localllm.gguf.types import TENSOR_TYPES

CPU = "CPU"
"""The device that is always there: its memory is the RAM."""

KVType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
FlashAttention = Literal["auto", "on", "off"]
SplitMode = Literal["layer", "none", "row"]
LoadMode = Literal["auto", "none", "mmap", "mlock"]
Overrides = tuple[tuple[str, str], ...]
"""(regular expression on tensor names, buffer: `CPU` or a device's name); the first that matches counts."""

TYPE_SIZES: dict[str, tuple[int, int]] = {name: (weights, size) for name, weights, size in TENSOR_TYPES.values()}
"""ggml's types: weights in a block, bytes of a block."""


def padded(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


def row_bytes(kind: str, width: int) -> int:
    """A row of `width` weights of ggml's type `kind` (such as Q8_0 or q8_0); a partial block counts as ggml counts it."""
    weights, size = TYPE_SIZES[kind.upper()]
    return size * width // weights


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory that is taken already, by a model that stays loaded."""

    device: str
    n_bytes: int
    what: str
    """Such as `qwen3:8b`, for explanations."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user fixed; None and empty leave the planner free."""

    n_ctx: int | None = None
    """KV cells in total, as in EngineConfig."""
    n_gpu_layers: int | None = None
    """-1 is all of them."""
    type_k: KVType | None = None
    type_v: KVType | None = None
    flash_attn: FlashAttention | None = None
    n_seq: int | None = None
    """Requests decoded at once."""
    n_resident: int | None = None
    """Finished sequences kept for their prefixes."""
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_threads: int | None = None
    tensor_split: tuple[float, ...] = ()
    """A share for each device, in llama.cpp's order."""
    main_gpu: int | None = None
    split_mode: SplitMode | None = None
    overrides: Overrides = ()
    n_cpu_moe: int | None = None
    """Of this many first layers the experts stay on the CPU."""
    swa_full: bool | None = None
    load_mode: LoadMode | None = None
    gpu_memory: Mapping[str, int] = field(default_factory=dict[str, int])
    """At most so many bytes on a device: by its name, its index or `all`."""
    reserve_bytes: int | None = None
    """Kept free on every device."""
    strict: bool = False
    """Refuse rather than give up anything."""
    draft: Header | None = None
    n_draft: int | None = None
    """Rows drafted for each sequence in one batch."""
    adapters: tuple[Header, ...] = ()
    """LoRA adapters that are loaded with the model."""
    projector: Header | None = None
    """The mmproj file of a model that sees or hears."""
    others: tuple[Resident, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything that llama.cpp is told about one model, complete: equal shapes of one header take equal memory.

    `Architecture.shape` makes one as the engine would, every limit applied.
    """

    n_ctx: int
    """KV cells, a multiple of 256."""
    n_gpu_layers: int = 0
    """0 to n_layers + 1, where the last one is the output; never -1."""
    tensor_split: tuple[float, ...] = ()
    """A share for each device; may be empty where there is at most one."""
    main_gpu: int = 0
    split_mode: SplitMode = "layer"
    overrides: Overrides = ()
    n_seq_max: int = 1
    """Sequences, running and resident ones."""
    n_outputs: int = 1
    """Rows of one batch that may ask for logits; at least n_seq_max."""
    n_batch: int = 512
    n_ubatch: int = 512
    type_k: KVType = "f16"
    type_v: KVType = "f16"
    flash_attn: FlashAttention = "auto"
    """`auto` is counted as on: llama.cpp turns it off only where a device cannot."""
    swa_full: bool = False
    n_threads: int = 1
    load_mode: LoadMode = "auto"


@dataclass(frozen=True, slots=True)
class Part:
    """One line of an explanation: what takes how much where."""

    device: str
    buffer: Literal["weights", "kv", "compute", "output"]
    n_bytes: int
    what: str = ""
    """`draft`, `projector` or an adapter's name; empty for the model itself."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """What is allocated on one device."""

    device: str
    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0
    output_bytes: int = 0
    """Logits that wait for the sampler, in host memory; llama.cpp's breakdown leaves them out."""

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.output_bytes


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes by device, and what stands between them and certainty."""

    by_device: Mapping[str, int]
    """Devices that take nothing may be missing."""
    doubt: str = ""
    """Why llama.cpp may take another amount, so that only a dry run can tell; empty when the figures are exact."""

    @property
    def exact(self) -> bool:
        return not self.doubt

    @property
    def total_bytes(self) -> int:
        return sum(self.by_device.values())

    def on(self, device: str) -> int:
        """The bytes on `device`."""
        return self.by_device.get(device, 0)

    def __add__(self, other: Amount) -> Amount:
        return combined((self, other))


def combined(amounts: Iterable[Amount]) -> Amount:
    """Several amounts as one; it is as doubtful as any of them."""
    by_device: dict[str, int] = {}
    doubts: dict[str, None] = {}
    for amount in amounts:
        for device, n_bytes in amount.by_device.items():
            by_device[device] = by_device.get(device, 0) + n_bytes
        if amount.doubt:
            doubts[amount.doubt] = None
    return Amount(by_device, "; ".join(doubts))
