"""How much of each memory a model may take: what is free, less what has to stay free. Knows devices, not models.

A device of its own has one limit. A device that shares the RAM has two: its own, and one together with the RAM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from localllm.errors import UsageError
from localllm.hardware import Device, Hardware
from localllm.plan.buffers import used_devices
from localllm.plan.spec import CPU, Resident, Wishes

MIB = 1 << 20
RAM = "RAM"
"""The pool of the CPU and of all that shares its memory."""

OVERHEAD_BYTES: Mapping[str, int] = {"CUDA": 320 * MIB, "HIP": 320 * MIB, "Metal": 128 * MIB, "Vulkan": 192 * MIB, "SYCL": 256 * MIB}
"""What a backend takes beyond the buffers that llama.cpp counts: workspaces of its matrix library, pools that grow with the first
batches, graphs. An assumption until the first load on a machine has shown its own."""
UNKNOWN_OVERHEAD_BYTES = 384 * MIB
"""For any other backend."""
PROCESS_BYTES = 160 * MIB
"""The worker process itself in RAM: Python, llama.cpp's code, the vocabulary."""
DISPLAY_BYTES, DISPLAY_SHARE = 512 * MIB, 0.03
"""A screen's programs come and go: so much of its card, at least, stays free."""
SYSTEM_BYTES, SYSTEM_SHARE = 512 * MIB, 0.03
"""The same for the RAM, so that opening a browser does not swap the model out."""

Kind = Literal["gpu", "igpu", "cpu"]


@dataclass(frozen=True, slots=True)
class Budget:
    """One device's memory as a plan sees it; sizes in bytes, None unknown."""

    name: str
    kind: Kind
    backend: str
    description: str
    total_bytes: int | None
    free_bytes: int | None
    """The lowest of the readings."""
    overhead_bytes: int
    """What the backend, or the worker process, takes beyond the model's buffers."""
    reserve_bytes: int
    """Stays free, for the screen or the system, or because the user wished it."""
    resident_bytes: int
    """Promised to models that the readings do not show yet."""
    cap_bytes: int | None
    """The user's limit."""
    shared: bool
    """Its memory is RAM."""

    @property
    def room_bytes(self) -> int | None:
        """What a model may take here; None when nobody knows."""
        free = None if self.free_bytes is None else max(0, self.free_bytes - self.overhead_bytes - self.reserve_bytes - self.resident_bytes)
        known = [size for size in (free, self.cap_bytes) if size is not None]
        return min(known) if known else None

    @property
    def other_bytes(self) -> int:
        """Taken by others: what is not free, and what is promised."""
        used = 0 if self.total_bytes is None or self.free_bytes is None else max(0, self.total_bytes - self.free_bytes)
        return used + self.resident_bytes


@dataclass(frozen=True, slots=True)
class Pool:
    """A memory, and the devices that take from it."""

    name: str
    """For people: `CUDA0`, `RAM`."""
    devices: tuple[str, ...]
    room_bytes: int | None


@dataclass(frozen=True, slots=True)
class Budgets:
    """All memories of a machine: its accelerators in llama.cpp's order, then the RAM."""

    devices: tuple[Budget, ...]
    """What llama.cpp takes: discrete cards, or integrated ones where there is no other."""
    ram: Budget
    pools: tuple[Pool, ...]
    """A plan fits when no pool is exceeded."""

    def __iter__(self) -> Iterator[Budget]:
        return iter((*self.devices, self.ram))

    def shortfalls(self, need: Mapping[str, int]) -> dict[str, int]:
        """Pool -> bytes missing when each device takes what `need` says; empty when all fits. Unknown room holds anything."""
        missing: dict[str, int] = {}
        for pool in self.pools:
            if pool.room_bytes is not None:
                over = sum(need.get(name, 0) for name in pool.devices) - pool.room_bytes
                if over > 0:
                    missing[pool.name] = over
        return missing


def budgets(
    hardware: Hardware, wishes: Wishes, overheads: Mapping[str, int] | None = None, limits: Mapping[str, int] | None = None
) -> Budgets:
    """The memories of `hardware` under the user's limits; `overheads` has what was learned, `limits` what else must not be exceeded,
    by device name.

    Raises UsageError for a limit on a device that is not there.
    """
    overheads, limits = overheads or {}, limits or {}
    usable = used_devices(hardware.devices)
    caps = _caps(wishes.gpu_memory, usable)
    for name, limit in limits.items():
        caps[name] = min(limit, caps.get(name, limit))
    devices = tuple(_device(device, wishes, caps.get(device.name), overheads) for device in usable)
    ram = _ram(hardware, wishes, caps.get(CPU), overheads)
    return Budgets(devices, ram, (*(Pool(device.name, (device.name,), device.room_bytes) for device in devices), _ram_pool(ram, devices)))


def _device(device: Device, wishes: Wishes, cap: int | None, overheads: Mapping[str, int]) -> Budget:
    # A screen on shared memory is the system's reserve, which the RAM has.
    screen = device.display is not False and not device.shared_with_ram
    kept = _share(device.total_bytes, DISPLAY_BYTES, DISPLAY_SHARE) if screen else 0
    return Budget(
        name=device.name,
        kind=device.kind,
        backend=device.backend,
        description=device.description,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        overhead_bytes=overheads.get(device.name, OVERHEAD_BYTES.get(device.backend, UNKNOWN_OVERHEAD_BYTES)),
        reserve_bytes=max(kept, wishes.reserve_bytes or 0),
        resident_bytes=_residents(wishes.others, device.name),
        cap_bytes=cap,
        shared=device.shared_with_ram,
    )


def _ram(hardware: Hardware, wishes: Wishes, cap: int | None, overheads: Mapping[str, int]) -> Budget:
    ram = hardware.ram
    total = ram.total_bytes if ram.limit_bytes is None else ram.limit_bytes
    return Budget(
        name=CPU,
        kind="cpu",
        backend=CPU,
        description=hardware.cpu_name,
        total_bytes=total,
        free_bytes=ram.available_bytes,
        overhead_bytes=overheads.get(CPU, PROCESS_BYTES),
        reserve_bytes=max(_share(total, SYSTEM_BYTES, SYSTEM_SHARE), wishes.reserve_bytes or 0),
        resident_bytes=_residents(wishes.others, CPU),
        cap_bytes=cap,
        shared=False,
    )


def _ram_pool(ram: Budget, devices: Sequence[Budget]) -> Pool:
    """The RAM with all that shares it; a graphics carve-out, which the system does not count, is room besides."""
    sharing = [device for device in devices if device.shared]
    room = ram.room_bytes
    if room is not None and sharing:
        own = max((device.free_bytes or 0 for device in sharing), default=0) - (ram.free_bytes or 0)
        room = max(0, room + max(0, own) - sum(device.overhead_bytes + device.resident_bytes for device in sharing))
    return Pool(RAM, (CPU, *(device.name for device in sharing)), room)


def _caps(wished: Mapping[str, int], devices: Sequence[Device]) -> dict[str, int]:
    """The limit of each device that has one: by its name, by its index, or for all; the more particular one counts."""
    names = {**{str(index): device.name for index, device in enumerate(devices)}, **{device.name: device.name for device in devices}}
    if unknown := [key for key in wished if key != "all" and key not in names]:
        there = ", ".join(f"{index} ({device.name})" for index, device in enumerate(devices)) or "no device at all"
        raise UsageError(f"there is no device {unknown[0]} to limit", hint=f"there is {there}")
    caps = dict.fromkeys((device.name for device in devices), wished["all"]) if "all" in wished else {}
    return caps | {names[key]: limit for key, limit in wished.items() if key != "all"}


def _residents(others: Iterable[Resident], device: str) -> int:
    return sum(other.n_bytes for other in others if other.device == device)


def _share(total: int | None, least: int, share: float) -> int:
    return max(least, int((total or 0) * share))
