"""How the memory of each kind of device is dealt out: alignment, padding, and which buffer of the host a weight gets.

Restated from ggml's backends (ggml/src/ggml-*/) for the build that localllm is pinned to. A backend that is not listed is counted
like CUDA, the widest, and marked doubtful.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from localllm.gguf import Tensor
from localllm.hardware import Device
from localllm.plan.spec import TYPE_SIZES, SplitMode, padded, row_bytes

UNQUANTISED = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})
EXPERTS = ("_exps.", "_chexps.")


@dataclass(frozen=True, slots=True)
class Buffers:
    """What one backend's buffers add to a tensor, and what llama.cpp does because of them."""

    alignment: int
    row_padding: int = 0
    """Quantised rows are filled up to a multiple of this many weights, once per tensor."""
    pinned_host: bool = False
    """Weights that stay on the CPU go to pinned memory, which keeps them from being repacked."""
    asynchronous: bool = False
    """Several devices of this kind compute on up to four batches at once, each with compute buffers of its own."""
    doubt: str = ""

    def size(self, kind: str, width: int, n_bytes: int) -> int:
        """What a tensor of `n_bytes`, of ggml's type `kind` and rows of `width` weights, takes."""
        if self.row_padding and width % self.row_padding and kind.upper() not in UNQUANTISED:
            n_bytes += row_bytes(kind, self.row_padding - width % self.row_padding)
        return padded(n_bytes, self.alignment)


HOST = Buffers(32)
"""ggml-impl.h: TENSOR_ALIGNMENT; pinned and repacked memory has it, too."""

_CUDA = Buffers(128, 512, pinned_host=True, asynchronous=True)
"""ggml-cuda.cu: get_alignment, MATRIX_ROW_PADDING; HIP and MUSA are the same source."""

BACKENDS: dict[str, Buffers] = {
    "CUDA": _CUDA,
    "HIP": _CUDA,
    "MUSA": _CUDA,
    # ggml-sycl: SYCL_BUFFER_ALIGNMENT, MATRIX_ROW_PADDING
    "SYCL": Buffers(128, 512, pinned_host=True, asynchronous=True),
    # ggml-metal.cpp: get_alignment; the padding of some operations is for graphs, not weights
    "Metal": Buffers(32, asynchronous=True),
    # ggml-vulkan.cpp: minStorageBufferOffsetAlignment, which is the driver's to choose, at most 256
    "Vulkan": Buffers(256, pinned_host=True, asynchronous=True, doubt="a Vulkan driver chooses its own alignment, 256 bytes at most"),
}


def buffers_of(device: Device) -> Buffers:
    """The rules of a device's backend."""
    known = BACKENDS.get(device.backend)
    return known or Buffers(128, 512, asynchronous=True, doubt=f"how {device.backend} allocates is not known")


def used_devices(devices: Sequence[Device], split_mode: SplitMode = "layer", main_gpu: int = 0) -> tuple[Device, ...]:
    """Those that llama.cpp puts layers on: graphics that share the RAM only where there is no card; with `none` the main one only."""
    cards = tuple(device for device in devices if device.kind == "gpu")
    used = cards or tuple(devices)
    if split_mode != "none":
        return used
    return used[main_gpu : main_gpu + 1] if main_gpu >= 0 else ()


def repack_of(features: Collection[str]) -> str:
    """Which of ggml's repacking kernels a CPU with these `features` (as hardware.cpu_features spells them) runs.

    ggml decides at compile time: this holds for a build made for this CPU, as pip's is, or that picks its variant at run time.
    """
    if {"amx_tile", "amx_int8"} <= set(features):
        return "amx"
    if "avx2" in features:
        return "avx512" if {"avx512f", "avx512bw"} <= set(features) else "avx2"
    if "dotprod" in features:
        return "i8mm" if "i8mm" in features else "dotprod"
    return ""


_ROWS: dict[str, dict[str, int]] = {
    "avx2": {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8},
    "avx512": {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8, "Q2_K": 8},
    "dotprod": {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "IQ4_NL": 4, "MXFP4": 4, "Q8_0": 4},
}
_ROWS["i8mm"] = _ROWS["dotprod"]
"""ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type: type -> what the number of rows must be a multiple of."""


def repacks(tensor: Tensor, kernels: str) -> bool:
    """Whether a weight on the CPU is copied into the layout of its `kernels` (`repack_of`), which keeps it out of the mapped file."""
    multiple = _ROWS.get(kernels, {}).get(tensor.type)
    if multiple is None or len(tensor.shape) < 2 or tensor.shape[1] % multiple:
        return False
    if tensor.name.startswith(("token_embd.", "per_layer_token_embd.", "position_embd.", "token_types.")):
        return False
    experts = any(mark in tensor.name for mark in EXPERTS)
    return len(tensor.shape) == (3 if experts else 2)


def block_weights(kind: str) -> int:
    """Weights in a block of ggml's type `kind`: what a row must be a multiple of."""
    return TYPE_SIZES[kind.upper()][0]
