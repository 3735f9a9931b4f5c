"""The accelerators that llama.cpp may use, with memory that two witnesses agree on: its own reading and the driver's.

Takes what a probe child printed (a list of plain dicts) and what nvidia.py and drm.py found; asks nobody itself.
The lower reading wins: llama.cpp's does not know other programs on Metal and some Vulkan drivers, the driver's does not know
what a context costs. What no one knows is None, and nothing here turns None into a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from localllm.hardware.cards import Card, pci_id
from localllm.hardware.memory import Memory, plausible

Kind = Literal["gpu", "igpu"]

BACKENDS = {"MTL": "Metal", "ROCm": "HIP", "GPUOpenCL": "OpenCL"}
"""Where llama.cpp's device names differ from what people call the backend."""
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
"""With one of these set, a card that llama.cpp does not see may be hidden on purpose."""
MAKERS = {"NVIDIA": ("nvidia", "geforce"), "AMD": ("amd", "radeon"), "Intel": ("intel",)}
"""Words that give the maker of a device away."""
WORTH_BYTES = 2 << 30
"""A card with less memory is not missed."""

GIB = 1 << 30
METAL_SMALL_BYTES = 36 * GIB


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator; sizes in bytes, None unknown."""

    name: str
    """llama.cpp's, such as `CUDA0`."""
    description: str
    kind: Kind
    backend: str
    """CUDA, HIP, Metal, Vulkan, SYCL, …"""
    pci: str
    """`0000:01:00.0`, empty when it has none or does not tell."""
    total_bytes: int | None
    free_bytes: int | None
    """The lower of the readings; of a device that shares the RAM also no more than what is available there."""
    shared_with_ram: bool
    """Its memory is RAM: what it takes is gone from the RAM's budget, too."""
    display: bool | None
    """Whether a screen hangs on it."""
    sources: tuple[str, ...]
    """Who the readings are from: llama.cpp, NVML, sysfs, estimated."""


def find_devices(
    probe: Iterable[Mapping[str, Any]],
    cards: Sequence[Card],
    memory: Memory,
    *,
    arch: str,
    wired_limit_bytes: int = 0,
    env: Mapping[str, str],
) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """The devices of `probe` in llama.cpp's order, checked against `cards`, and warnings.

    A card that two backends offer is listed once, under the first, as llama.cpp itself takes it.
    """
    seen = [entry for entry in map(_entry, probe) if entry is not None]
    devices: list[Device] = []
    warnings: list[str] = []
    used: list[Card] = []
    for entry in seen:
        if entry.pci and any(entry.pci == device.pci for device in devices):
            continue
        total, free, said = plausible(f"llama.cpp: {entry.name} ({entry.description})", entry.total_bytes, entry.free_bytes)
        warnings += said
        device = replace(entry, total_bytes=total, free_bytes=free)
        candidates = _candidates(entry, cards)
        used += candidates
        alone = sum(_candidates(other, cards) == candidates for other in seen) == 1
        matches = candidates if entry.pci or (alone and len({card.pci for card in candidates}) == 1) else []
        device = replace(device, display=_any(match.display for match in matches))
        if card := _chosen(matches, env):
            device = _agree(device, card)
        if device.backend == "Metal":
            device = _on_metal(device, memory, arch, wired_limit_bytes)
        devices.append(_within_ram(device, memory, own_bytes=card.own_free_bytes if card else 0))
    if not any(name in env for name in HIDING):  # an empty list hides all
        warnings += _unused(cards, used)
    return tuple(devices), tuple(warnings)


def metal_working_set_bytes(total_bytes: int, wired_limit_bytes: int = 0) -> int:
    """What Metal would recommend as the working set, where it cannot be asked: an estimate.

    A limit that the user set (`iogpu.wired_limit_mb`) is followed exactly. Else the share grows with the machine: 2/3 was seen up to
    32 GB, 3/4 at 64 GB, 84 % at 128 GB; the estimate stays at or below all of these.
    """
    if wired_limit_bytes:
        return min(wired_limit_bytes, total_bytes)
    return total_bytes * 2 // 3 if total_bytes <= METAL_SMALL_BYTES else total_bytes * 3 // 4


def _entry(data: Mapping[str, Any]) -> Device | None:
    """One line of the probe as a device with unchecked readings; None for the CPU and its helpers."""
    kind = data.get("kind")
    if kind not in ("gpu", "igpu"):
        return None
    name = str(data.get("name") or "?")
    prefix = re.sub(r"\d.*$", "", name)
    return Device(
        name=name,
        description=str(data.get("description") or name),
        kind=kind,
        backend=BACKENDS.get(prefix, prefix),
        pci=pci_id(str(data.get("device_id") or data.get("pci") or "")),
        total_bytes=_whole(data.get("total_bytes")),
        free_bytes=_whole(data.get("free_bytes")),
        shared_with_ram=kind == "igpu",
        display=None,
        sources=("llama.cpp",),
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _candidates(device: Device, cards: Sequence[Card]) -> list[Card]:
    """The cards that `device` can be: by bus id, else those of its name, else those of its maker."""
    if device.pci:
        return [card for card in cards if card.pci == device.pci]
    description = device.description.casefold()
    named = [card for card in cards if card.name.casefold() == description]
    return named or [card for card in cards if any(word in description for word in MAKERS.get(card.vendor, ()))]


def _chosen(matches: Sequence[Card], env: Mapping[str, str]) -> Card | None:
    """The card behind a device: of several witnesses the one that knows the memory, of several MIG slices the one the user chose."""
    slices = [card for card in matches if card.slice]
    if len(slices) > 1:
        wanted = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        slices = [card for card in slices if any(card.uuid.startswith(uuid) for uuid in wanted if uuid.startswith("MIG-"))]
        return slices[0] if len(slices) == 1 else None
    return min(matches, key=lambda card: (card.free_bytes is None, card.total_bytes is None), default=None)


def _agree(device: Device, card: Card) -> Device:
    """`device` with the lower of both readings; a driver that knows the memory also knows whether it is RAM."""
    if card.total_bytes is None:
        return device
    total, free = _least(device.total_bytes, card.total_bytes), _least(device.free_bytes, card.free_bytes)
    return replace(
        device,
        total_bytes=total,
        free_bytes=None if free is None else _least(free, total),
        shared_with_ram=card.shared_with_ram,
        sources=(*device.sources, card.source),
    )


def _on_metal(device: Device, memory: Memory, arch: str, wired_limit_bytes: int) -> Device:
    """Apple silicon has one memory for all; its working set is estimated where Metal did not tell."""
    if arch != "arm64":  # a card in an Intel Mac has memory of its own, Intel's graphics have not
        return replace(device, shared_with_ram="intel" in device.description.casefold())
    device = replace(device, shared_with_ram=True)
    if device.total_bytes is not None or memory.total_bytes is None:
        return device
    total = metal_working_set_bytes(memory.total_bytes, wired_limit_bytes)
    return replace(device, total_bytes=total, free_bytes=_least(total, memory.available_bytes), sources=(*device.sources, "estimated"))


def _within_ram(device: Device, memory: Memory, *, own_bytes: int) -> Device:
    """Memory that is RAM cannot be freer than RAM; `own_bytes` is what the device has besides."""
    if not device.shared_with_ram or device.free_bytes is None or memory.available_bytes is None:
        return device
    return replace(device, free_bytes=min(device.free_bytes, memory.available_bytes + own_bytes))


def _unused(cards: Sequence[Card], used: Sequence[Card]) -> list[str]:
    """A warning for every card worth having that llama.cpp does not offer."""
    busy = {card.pci for card in used if card.pci}
    missed: dict[str, Card] = {}
    for card in cards:
        big = card.vendor == "NVIDIA" or (card.total_bytes or 0) >= WORTH_BYTES
        if big and card not in used and card.pci not in busy:
            missed.setdefault(card.pci or card.name, card)
    return [f"{card.name} is there, but the engine does not use it: localllm doctor says why" for card in missed.values()]


def _least(one: int | None, other: int | None) -> int | None:
    """The lower of two readings, the known one of one, None of none."""
    return min((value for value in (one, other) if value is not None), default=None)


def _any(answers: Iterable[bool | None]) -> bool | None:
    """True when one says so, None when nobody knows."""
    known = [answer for answer in answers if answer is not None]
    return any(known) if known else None
