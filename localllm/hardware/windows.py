"""What Windows tells through its API, as plain values; the reading and nothing of its meaning.

The record of processor cores comes as the bytes that GetLogicalProcessorInformationEx wrote: cores.py takes them apart.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WindowsReadings:
    """Raw readings; None and empty where Windows did not answer."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    commit_available_bytes: int | None = None
    """What private memory may still grow by: RAM and page file together, less what is promised already."""
    cores: bytes = b""
    """SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX records of the relation RelationProcessorCore."""
    affinity_mask: int = 0
    """CPUs of the process' group that it may run on; 0 when unknown."""
    ac_line: int | None = None
    """0 on battery, 1 on mains, 255 unknown."""
    cpu_name: str = ""
    features: frozenset[str] = frozenset()


RELATION_PROCESSOR_CORE = 0
FEATURES = {19: "neon", 39: "avx", 40: "avx2", 41: "avx512f", 43: "dotprod"}
"""IsProcessorFeaturePresent's numbers, from winnt.h."""


def read_windows() -> WindowsReadings | None:
    """Read this machine; None where it is no Windows."""
    if sys.platform != "win32":
        return None
    import ctypes
    from ctypes import wintypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", wintypes.DWORD),
            ("load", wintypes.DWORD),
            ("total_phys", ctypes.c_uint64),
            ("avail_phys", ctypes.c_uint64),
            ("total_page_file", ctypes.c_uint64),
            ("avail_page_file", ctypes.c_uint64),
            ("total_virtual", ctypes.c_uint64),
            ("avail_virtual", ctypes.c_uint64),
            ("avail_extended", ctypes.c_uint64),
        )

    class PowerStatus(ctypes.Structure):
        _fields_ = (
            ("ac_line", ctypes.c_ubyte),
            ("battery_flag", ctypes.c_ubyte),
            ("percent", ctypes.c_ubyte),
            ("system_flag", ctypes.c_ubyte),
            ("life", wintypes.DWORD),
            ("full_life", wintypes.DWORD),
        )

    kernel32 = ctypes.WinDLL("kernel32")
    memory = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    has_memory = bool(kernel32.GlobalMemoryStatusEx(ctypes.byref(memory)))
    power = PowerStatus()
    has_power = bool(kernel32.GetSystemPowerStatus(ctypes.byref(power)))

    # The first call fails and says how many bytes the second one needs.
    size = wintypes.DWORD(0)
    kernel32.GetLogicalProcessorInformationEx(RELATION_PROCESSOR_CORE, None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    has_cores = bool(kernel32.GetLogicalProcessorInformationEx(RELATION_PROCESSOR_CORE, buffer, ctypes.byref(size)))

    kernel32.GetCurrentProcess.restype = wintypes.HANDLE
    kernel32.GetProcessAffinityMask.argtypes = (wintypes.HANDLE, ctypes.c_void_p, ctypes.c_void_p)
    process_mask, system_mask = ctypes.c_size_t(0), ctypes.c_size_t(0)
    kernel32.GetProcessAffinityMask(kernel32.GetCurrentProcess(), ctypes.byref(process_mask), ctypes.byref(system_mask))

    return WindowsReadings(
        total_bytes=memory.total_phys if has_memory else None,
        available_bytes=memory.avail_phys if has_memory else None,
        commit_available_bytes=memory.avail_page_file if has_memory else None,
        cores=buffer.raw[: size.value] if has_cores else b"",
        affinity_mask=process_mask.value,
        ac_line=power.ac_line if has_power else None,
        cpu_name=_cpu_name(),
        features=frozenset(name for number, name in FEATURES.items() if kernel32.IsProcessorFeaturePresent(number)),
    )


def _cpu_name() -> str:
    if sys.platform != "win32":
        return ""
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    except OSError:
        return ""
