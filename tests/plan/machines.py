"""Headers and machines as values: published models without their files, computers that nobody has to own."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localllm.gguf import Array, Header, Tensor, Value
from localllm.hardware import Device, Hardware, Memory
from tests.sparse_models import Sparse

MIB, GIB = 1 << 20, 1 << 30
FEATURES = ("avx", "avx2", "f16c", "fma", "sse4_2")


def header(model: Sparse) -> Header:
    """What read_model says of the file that sparse_models.write makes."""
    metadata: dict[str, Value] = {"general.architecture": model.architecture, "general.name": model.architecture}
    metadata[f"{model.architecture}.vocab_size"] = model.n_vocab
    metadata |= {f"{model.architecture}.{name}": _value(value) for name, value in model.keys.items()}
    tensors: list[Tensor] = []
    offset = 0
    for name, shape, kind in model.rows:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        n_bytes = size
        for width in shape:
            n_bytes *= width
        n_bytes //= block
        tensors.append(Tensor(name, shape, kind, offset, n_bytes))
        offset += n_bytes + -n_bytes % 32
    return Header(3, 32, metadata, tuple(tensors), 4096, 4096 + offset, "", "")


def _value(value: Any) -> Value:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    flags = all(isinstance(each, bool) for each in value)
    data = struct.pack(f"<{len(value)}{'?' if flags else 'i'}", *value)
    return Array("BOOL" if flags else "INT32", len(value), 0, len(data), "", data)


def gpu(index: int = 0, total: int | None = 24 * GIB, free: int | None = -1, **more: Any) -> Device:
    """A discrete card; all of it is free unless said."""
    values: dict[str, Any] = {
        "name": f"CUDA{index}",
        "description": "NVIDIA Test",
        "kind": "gpu",
        "backend": "CUDA",
        "pci": f"0000:0{index + 1}:00.0",
        "total_bytes": total,
        "free_bytes": total if free == -1 else free,
        "shared_with_ram": False,
        "display": False,
        "sources": ("llama.cpp", "NVML"),
    }
    return Device(**{**values, **more})


def metal(total: int, free: int) -> Device:
    """Apple's, which shares the RAM."""
    return gpu(0, total, free, name="MTL0", description="Apple M4", backend="Metal", pci="", shared_with_ram=True, display=None)


def igpu(total: int, free: int) -> Device:
    """A processor's graphics."""
    return gpu(0, total, free, name="Vulkan0", description="Radeon", kind="igpu", backend="Vulkan", shared_with_ram=True)


def machine(*devices: Device, ram: int | None = 64 * GIB, available: int | None = -1, bandwidth: float | None = 40e9) -> Hardware:
    """A computer with eight cores; all of its RAM is available unless said."""
    return Hardware(
        os="linux",
        arch="x86_64",
        cpu_name="Test CPU",
        physical_cores=8,
        logical_cores=16,
        cpu_features=FEATURES,
        ram=Memory(ram, ram if available == -1 else available),
        devices=devices,
        on_battery=False,
        bandwidth_bytes_per_s=bandwidth,
        wsl=False,
    )


def pair(first: int, second: int, **more: Any) -> Hardware:
    """Two cards."""
    return machine(gpu(0, first), gpu(1, second), **more)


def with_template(model: Header, **metadata: Value) -> Header:
    """The same header with other metadata."""
    return replace(model, metadata={**model.metadata, **metadata})
