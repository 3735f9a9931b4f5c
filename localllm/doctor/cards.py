"""The graphics cards of this machine as the operating system shows them, without llama.cpp and without their vendors' libraries.

It says what could be used and what is missing for that; how much memory a card has, hardware/ knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from localllm.doctor.system import System
from localllm.hardware.drm import VENDORS
from localllm.hardware.sources import parse_int, read_text
from localllm.probe import Backend

"""What llama.cpp is built with for a card."""
Vendor = Literal["NVIDIA", "AMD", "Intel", "Apple"]

_WINDOWS_LIBRARIES: dict[Vendor, tuple[str, ...]] = {
    "NVIDIA": ("nvcuda.dll",),
    "AMD": ("amdhip64.dll", "amdhip64_6.dll", "amdhip64_7.dll"),
}
# https://pci-ids.ucw.cz/read/PD/: display controllers are 0x03xxxx
_BACKENDS: dict[Vendor, tuple[Backend, ...]] = {
    "NVIDIA": ("cuda", "vulkan"),
    "AMD": ("hip", "vulkan"),
    "Intel": ("vulkan",),
    "Apple": ("metal",),
}
_DISPLAY = "0x03"
_DISCRETE_VRAM_BYTES = 2 << 30
"""amdgpu reports what the firmware set aside for an integrated card, most often 512 MiB."""


@dataclass(frozen=True, slots=True)
class Card:
    vendor: Vendor
    name: str
    driver: str
    """Version of the vendor's driver, `present` where it does not tell; empty where none is loaded."""
    usable: bool
    """This process can reach it: its device file is here and a driver runs it."""
    integrated: bool
    """Shares the CPU's memory: it may gain little or nothing, except Apple's."""

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Builds of llama.cpp that run on it, the fastest first."""
        return _BACKENDS[self.vendor]


def find_cards(system: System) -> list[Card]:
    """Every card of a vendor that llama.cpp has a backend for."""
    if system.os == "darwin":
        # Metal on Intel Macs is slower than their CPUs, so llama.cpp is built without it there.
        return [Card("Apple", "Apple GPU", "Metal", usable=True, integrated=True)] if system.sources.arch == "arm64" else []
    if system.os == "windows":
        return list(_windows(system))
    nvidia = list(_nvidia(system))
    return nvidia + [card for card in _drm(system) if card.vendor != "NVIDIA" or not nvidia]


def _windows(system: System) -> Iterator[Card]:
    """A driver leaves its library in System32; a card without a driver cannot be told from none."""
    for vendor, libraries in _WINDOWS_LIBRARIES.items():
        if any(system.exists(f"Windows/System32/{name}") for name in libraries):
            yield Card(vendor, f"{vendor} GPU", "present", usable=True, integrated=False)


def _nvidia(system: System) -> Iterator[Card]:
    """What NVIDIA's own driver shows, also into containers and WSL2."""
    if system.exists("dev/dxg") and system.exists("usr/lib/wsl/lib/libcuda.so.1"):
        yield Card("NVIDIA", "NVIDIA GPU (through WSL)", "present", usable=True, integrated=False)
        return
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
    words = system.read("proc/driver/nvidia/version").partition("\n")[0].split()
    driver = next((word for word in words if word.replace(".", "").isdigit() and "." in word), "present" if words else "")
    nodes = list((system.root / "dev").glob("nvidia[0-9]*"))
    models = [
        line.partition(":")[2].strip()
        for file in sorted((system.root / "proc/driver/nvidia/gpus").glob("*/information"))
        for line in read_text(file).splitlines()
        if line.startswith("Model:")
    ]
    if not words and not nodes:
        return
    for name in models or ["NVIDIA GPU"] * max(1, len(nodes)):
        yield Card("NVIDIA", name, driver or "present", usable=bool(nodes), integrated=False)


def _drm(system: System) -> Iterator[Card]:
    """What the kernel's graphics drivers show: AMD, Intel, and NVIDIA where only nouveau runs."""
    for device in sorted((system.root / "sys/class/drm").glob("card[0-9]*/device")):
        if "-" in device.parent.name:  # card0-HDMI-A-1: a connector
            continue
        here = device.relative_to(system.root).as_posix()
        vendor = cast(Vendor | None, VENDORS.get(system.read(f"{here}/vendor")))
        kind = system.read(f"{here}/class")
        if vendor is None or (kind and not kind.startswith(_DISPLAY)):
            continue
        driver = next((line.partition("=")[2] for line in system.read(f"{here}/uevent").splitlines() if line.startswith("DRIVER=")), "")
        vram = parse_int(system.read(f"{here}/mem_info_vram_total")) or 0
        integrated = vendor == "Intel" or (vendor == "AMD" and vram < _DISCRETE_VRAM_BYTES)
        name = system.read(f"{here}/product_name") or f"{vendor} GPU"
        # nouveau drives the screen; llama.cpp has nothing to do with it.
        usable = vendor != "NVIDIA" and bool(driver) and any((system.root / "dev/dri").glob("renderD*"))
        yield Card(vendor, name, driver, usable=usable, integrated=integrated)
