"""Graphics cards as their drivers report them, without llama.cpp: a second opinion on memory, and what is there but unused."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """One card, or one slice of a divided card; None is unknown."""

    name: str
    pci: str
    """Bus id in the form `0000:01:00.0`; slices of one card share it."""
    total_bytes: int | None
    free_bytes: int | None
    source: str
    """Who says so: NVML, sysfs."""
    vendor: str
    """`NVIDIA`, `AMD`, `Intel`, or empty."""
    shared_with_ram: bool = False
    own_free_bytes: int = 0
    """Of a card that shares RAM: free memory of its own carve-out, which is not part of the RAM that the system counts."""
    display: bool | None = None
    """Whether a screen hangs on it."""
    uuid: str = ""
    slice: bool = False
    """A MIG instance."""


def pci_id(text: str) -> str:
    """A PCI bus id as Linux writes it (`0000:01:00.0`), from any vendor's spelling; empty when it is none.

    NVML writes `00000000:01:00.0`, nvidia-smi capitals, some drivers leave out the domain or the function.
    """
    match = re.fullmatch(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{2}):([0-9a-f]{2})(?:\.([0-9a-f]))?", text.strip().lower())
    if match is None:
        return ""
    domain, bus, device, function = match.groups()
    return f"{int(domain or '0', 16):04x}:{bus}:{device}.{function or '0'}"
