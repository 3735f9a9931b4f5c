"""What the processor is: its name, the instructions that llama.cpp has kernels for, its last-level cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from localllm.hardware.sources import Sources, parse_int, read_text, sysctl

X86 = (
    *("sse4_2", "avx", "f16c", "fma", "bmi2", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
)
"""As /proc/cpuinfo spells them; ggml's variants of the CPU backend differ in these."""
ARM = {"asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2", "sme": "sme"}
"""Linux' name -> the usual one."""
APPLE = {"FEAT_FP16": "fp16", "FEAT_DotProd": "dotprod", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16", "FEAT_SME": "sme"}
INTEL_MAC = {"SSE4.2": "sse4_2", "AVX1.0": "avx", "F16C": "f16c", "FMA": "fma", "BMI2": "bmi2", "AVX2": "avx2", "AVX512F": "avx512f"}
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cpu_name(sources: Sources) -> str:
    """The marketing name, as far as the system tells it; at least the architecture."""
    match sources.os:
        case "darwin":
            name = sysctl(sources.run).get("machdep.cpu.brand_string", "")
        case "windows":
            name = sources.windows.cpu_name if sources.windows else ""
        case _:
            info = _cpuinfo(sources.root)
            # ARM boards name the board, not the processor, and some only in the device tree.
            name = info.get("model name") or info.get("Model") or read_text(sources.root / "proc/device-tree/model")
    return " ".join(name.split()) or sources.arch


def cpu_features(sources: Sources) -> tuple[str, ...]:
    """Instruction sets that matter to llama.cpp, weakest first; empty when the system does not tell."""
    match sources.os:
        case "darwin":
            return _apple_features(sysctl(sources.run), sources.arch)
        case "windows":
            known = sources.windows.features if sources.windows else frozenset[str]()
            return tuple(name for name in ("neon", "dotprod", *X86) if name in known)
        case _:
            info = _cpuinfo(sources.root)
            flags = {*info.get("flags", "").split(), *info.get("Features", "").split()}
            return tuple(name for name in X86 if name in flags) or tuple(name for flag, name in ARM.items() if flag in flags)


def last_level_cache_bytes(sources: Sources) -> int:
    """All last-level caches together (a processor of chiplets has several), 0 when unknown: Apple's chips hide theirs."""
    if sources.os == "darwin":
        return parse_int(sysctl(sources.run).get("hw.l3cachesize", "")) or 0
    caches: dict[str, tuple[int, int]] = {}
    for cpu in sources.affinity:
        levels: list[tuple[int, str, int]] = []
        for index in range(8):
            folder = sources.root / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            level = parse_int(read_text(folder / "level"))
            if level is not None and read_text(folder / "type") in ("Unified", "Data"):
                levels.append((level, read_text(folder / "shared_cpu_list") or str(cpu), _size(read_text(folder / "size"))))
        if levels:
            level, shared, size = max(levels)
            caches[shared] = (level, size)
    last = max((level for level, _ in caches.values()), default=0)
    return sum(size for level, size in caches.values() if level == last)


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first value of every key in /proc/cpuinfo."""
    found: dict[str, str] = {}
    for line in read_text(root / "proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _apple_features(values: Mapping[str, str], arch: str) -> tuple[str, ...]:
    if arch == "arm64":
        return ("neon", *(name for flag, name in APPLE.items() if values.get(f"hw.optional.arm.{flag}") == "1"))
    flags = {*values.get("machdep.cpu.features", "").split(), *values.get("machdep.cpu.leaf7_features", "").split()}
    return tuple(name for flag, name in INTEL_MAC.items() if flag in flags)


def _size(text: str) -> int:
    """`32768K` as bytes."""
    number = parse_int(text.rstrip("KMG"))
    return (number or 0) * UNITS.get(text[-1:], 1)
