"""Graphics cards as the Linux kernel shows them in /sys/class/drm: AMD's memory, and for every maker the bus id and screens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from localllm.hardware.cards import Card, pci_id
from localllm.hardware.memory import plausible
from localllm.hardware.sources import read_int, read_text

VENDORS = {"0x1002": "AMD", "0x10de": "NVIDIA", "0x8086": "Intel"}
GIB = 1 << 30


def drm_cards(root: Path, ram_available_bytes: int | None) -> tuple[list[Card], tuple[str, ...]]:
    """The cards of the three makers and warnings; memory is known of AMD's alone.

    An AMD processor with graphics may use its carve-out and, through the GTT, RAM: free is both, the latter no more than
    the RAM that is available.
    """
    cards: list[Card] = []
    warnings: list[str] = []
    for folder in sorted((root / "sys/class/drm").glob("card*")):
        device = folder / "device"
        vendor = VENDORS.get(read_text(device / "vendor"))
        if vendor is None or not re.fullmatch(r"card\d+", folder.name):
            continue
        uevent = dict(line.split("=", 1) for line in read_text(device / "uevent").splitlines() if "=" in line)
        pci = pci_id(uevent.get("PCI_SLOT_NAME", ""))
        name = read_text(device / "product_name") or f"{vendor} graphics {pci}".strip()
        total, free, own, shared = None, None, 0, False
        if vendor == "AMD":
            total, free, said = plausible(f"sysfs: {name}", *_pool(device, "vram"))
            warnings += said
            if shared := is_apu(device):
                own = free or 0
                total, free = _with_gtt(device, total, free, ram_available_bytes)
        cards.append(
            Card(
                name=name,
                pci=pci,
                total_bytes=total,
                free_bytes=free,
                source="sysfs",
                vendor=vendor,
                shared_with_ram=shared,
                own_free_bytes=own,
                display=_has_screen(folder),
            )
        )
    return cards, tuple(warnings)


def is_apu(device: Path) -> bool:
    """Whether the graphics share the processor's RAM: a small carve-out, a large window into RAM, no memory chips of its own."""
    vram = read_int(device / "mem_info_vram_total")
    gtt = read_int(device / "mem_info_gtt_total")
    if vram is None or gtt is None or read_text(device / "mem_info_vram_vendor"):
        return False
    return vram <= 4 * GIB and gtt >= 8 * GIB and gtt >= 4 * vram


def _pool(device: Path, name: str) -> tuple[int | None, int | None]:
    """(total, free) of one of amdgpu's pools."""
    total, used = read_int(device / f"mem_info_{name}_total"), read_int(device / f"mem_info_{name}_used")
    return total, None if total is None or used is None else total - used


def _with_gtt(device: Path, total: int | None, free: int | None, ram_available: int | None) -> tuple[int | None, int | None]:
    gtt_total, gtt_free, _ = plausible("GTT", *_pool(device, "gtt"))
    total = None if gtt_total is None else gtt_total + (total or 0)
    if gtt_free is None or ram_available is None or total is None:
        return total, None
    return total, (free or 0) + min(gtt_free, ram_available)


def _has_screen(card: Path) -> bool | None:
    states = list(_connectors(card))
    return "connected" in states if states else None


def _connectors(card: Path) -> Iterator[str]:
    for connector in sorted(card.glob(f"{card.name}-*")):
        yield read_text(connector / "status")
