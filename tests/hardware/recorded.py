"""Machines as recordings: `/proc` and `/sys` trees, outputs of commands, a stub of NVML, records of the Windows API.

The contents follow what the kernels, drivers and tools print; nothing here reads the machine that the tests run on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from localllm.hardware import Sources
from localllm.hardware.cores import parse_cpu_list

MIB, GIB = 1 << 20, 1 << 30


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def siblings(*groups: str) -> dict[str, str]:
    """thread_siblings_list of every CPU in groups such as `0,8`."""
    name = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {name.format(cpu): group + "\n" for group in groups for cpu in parse_cpu_list(group)}


def meminfo(total_kib: int, available_kib: int) -> str:
    return f"MemTotal:       {total_kib} kB\nMemFree:          812344 kB\nMemAvailable:   {available_kib} kB\nHugePages_Total:       0\n"


def linux(root: Path, files: Mapping[str, str], *, cpus: int = 8, **more: Any) -> Sources:
    return Sources(
        **{
            "os": "linux",
            "arch": "x86_64",
            "root": tree(root, files),
            "affinity": frozenset(range(cpus)),
            "logical_cores": cpus,
            "run": outputs({}),
            **more,
        }
    )


def outputs(known: Mapping[str, str]) -> Callable[[Sequence[str]], str]:
    """A `run` that knows the outputs of some programs, by their last path component."""
    return lambda command: known.get(Path(command[0]).name, "")


# --- NVIDIA ---------------------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


@dataclass
class FakeCard:
    """A card or, in `slices`, one of its MIG instances."""

    name: str = "NVIDIA GeForce RTX 4090"
    bus: str = "00000000:01:00.0"
    total: int = 24564 * MIB
    used: int = 1024 * MIB
    reserved: int = 450 * MIB
    display: int = 1
    uuid: str = "GPU-0b1c"
    slices: tuple[FakeCard | None, ...] = ()
    silent: tuple[str, ...] = ()
    """Questions that it answers with NVMLError_NotSupported."""


@dataclass
class FakeNvml:
    """What localllm uses of the module pynvml, with its names, its structures and its ways to fail."""

    cards: Sequence[FakeCard | None] = ()
    """None is a card that fell off the bus."""
    driver: bool = True
    knows_v2: bool = True
    nvmlMemory_v2: int = 0x02000028
    running: int = field(default=0, init=False)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def not_supported(*_: Any) -> Any:
            raise NVMLError("Not Supported")

        return not_supported

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")
        self.running += 1

    def nvmlShutdown(self) -> None:
        self.running -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        if (card := self.cards[index]) is None:
            raise NVMLError("GPU is lost")
        return card

    def _ask(self, card: FakeCard, question: str) -> FakeCard:
        if question in card.silent:
            raise NVMLError("Not Supported")
        return card

    def nvmlDeviceGetName(self, card: FakeCard) -> str:
        return self._ask(card, "name").name

    def nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return self._ask(card, "uuid").uuid

    def nvmlDeviceGetPciInfo(self, card: FakeCard) -> Any:
        return SimpleNamespace(busId=self._ask(card, "pci").bus, domain=0)

    def nvmlDeviceGetDisplayActive(self, card: FakeCard) -> int:
        return self._ask(card, "display").display

    def nvmlDeviceGetMemoryInfo(self, card: FakeCard, version: int | None = None) -> Any:
        self._ask(card, "memory")
        free = card.total - card.used - card.reserved
        if version is None:
            return SimpleNamespace(total=card.total, free=free, used=card.used + card.reserved)
        if not self.knows_v2:
            raise NVMLError("Function Not Found")
        return SimpleNamespace(version=version, total=card.total, reserved=card.reserved, free=free, used=card.used)

    def nvmlDeviceGetMigMode(self, card: FakeCard) -> list[int]:
        if not card.slices and "mig" not in card.silent:
            raise NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: FakeCard) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: FakeCard, index: int) -> FakeCard:
        if index >= len(card.slices) or (part := card.slices[index]) is None:
            raise NVMLError("Not Found")
        return part


# --- AMD and screens --------------------------------------------------------------------------------------------------


def drm_card(
    number: int,
    pci: str,
    *,
    vendor: str = "0x1002",
    vram: tuple[int, int] | None = None,
    gtt: tuple[int, int] | None = None,
    vram_vendor: str = "",
    product: str = "",
    screens: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Files of /sys/class/drm/cardN; pools are (total, used)."""
    card = f"sys/class/drm/card{number}"
    files = {
        f"{card}/device/vendor": f"{vendor}\n",
        f"{card}/device/uevent": f"DRIVER=amdgpu\nPCI_CLASS=30000\nPCI_SLOT_NAME={pci}\nMODALIAS=pci:v00001002\n",
    }
    for name, pool in (("vram", vram), ("gtt", gtt)):
        if pool is not None:
            files[f"{card}/device/mem_info_{name}_total"] = f"{pool[0]}\n"
            files[f"{card}/device/mem_info_{name}_used"] = f"{pool[1]}\n"
    if vram_vendor:
        files[f"{card}/device/mem_info_vram_vendor"] = f"{vram_vendor}\n"
    if product:
        files[f"{card}/device/product_name"] = f"{product}\n"
    for connector, status in (screens or {}).items():
        files[f"{card}/card{number}-{connector}/status"] = f"{status}\n"
    return files


# --- Apple --------------------------------------------------------------------------------------------------------------

M3_MAX = """\
hw.memsize: 68719476736
hw.physicalcpu: 16
hw.perflevel0.physicalcpu: 12
machdep.cpu.brand_string: Apple M3 Max
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
iogpu.wired_limit_mb: 0
"""
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              131072.
Pages active:                           1204411.
Pages inactive:                         1179648.
Pages speculative:                        65536.
Pages throttled:                              0.
Pages wired down:                        241412.
Pages purgeable:                          32768.
"Translation faults":                 893412311.
Pages copy-on-write:                   41231212.
File-backed pages:                       812931.
Swapins:                                      0.
"""
ON_AC = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=23593059)\t100%; charged; 0:00 remaining present: true\n"
ON_BATTERY = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=23593059)\t94%; discharging; 5:26 remaining present: true\n"


def mac(root: Path, sysctl: str = M3_MAX, vm_stat: str = VM_STAT, pmset: str = ON_AC, **more: Any) -> Sources:
    known = {"sysctl": sysctl, "vm_stat": vm_stat, "pmset": pmset}
    facts: dict[str, Any] = {"os": "darwin", "arch": "arm64", "root": root, "affinity": frozenset(range(16)), "logical_cores": 16}
    return Sources(**{**facts, "run": outputs(known), **more})


# --- Windows ------------------------------------------------------------------------------------------------------------


def core_record(mask: int, *, efficiency: int = 0, group: int = 0, relation: int = 0) -> bytes:
    """SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX with a PROCESSOR_RELATIONSHIP of one group (48 bytes)."""
    flags = 1 if mask & (mask - 1) else 0  # LTP_PC_SMT
    return struct.pack("<IIBB20xHQH6x", relation, 48, flags, efficiency, 1, mask, group)


# --- llama.cpp ------------------------------------------------------------------------------------------------------------


def probed(
    name: str = "CUDA0",
    *,
    description: str = "NVIDIA GeForce RTX 4090",
    kind: str = "gpu",
    total: Any = 24210 * MIB,
    free: Any = 23000 * MIB,
    device_id: str | None = None,
) -> dict[str, Any]:
    """One device as the probe child prints it."""
    return {
        "name": name,
        "description": description,
        "kind": kind,
        "total_bytes": total,
        "free_bytes": free,
        **({} if device_id is None else {"device_id": device_id}),
    }


CPU = probed("CPU", description="AMD Ryzen 9 7950X", kind="cpu", total=64 * GIB, free=64 * GIB)
