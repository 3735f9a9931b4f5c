"""Where readings come from: the file system, commands, libraries and variables of the machine, or of a recorded one.

Knows how to read and to give up quietly: what cannot be read is empty or None. Interprets nothing.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from localllm.hardware.windows import WindowsReadings, read_windows

Run = Callable[[Sequence[str]], str]
"""Runs a command and returns what it printed on stdout, however it ended; empty when it cannot run."""

COMMAND_S = 5.0


@dataclass(frozen=True, slots=True)
class Sources:
    """One machine, as far as it lets itself be read; tests put a recorded one together from files and outputs."""

    os: str
    """`linux`, `darwin` or `windows`, as `platform.system()` in small letters."""
    arch: str
    root: Path
    """Where `/proc` and `/sys` lie."""
    affinity: frozenset[int]
    """Numbers of the CPUs that this process may run on."""
    logical_cores: int
    """CPUs of the whole machine, hyperthreads included."""
    run: Run
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType[str, str]({}))
    nvml: Callable[[], Any] = lambda: None
    """Imports the module pynvml (package nvidia-ml-py, an extra); None where it is not installed."""
    windows: WindowsReadings | None = None


def this_machine() -> Sources:
    """The machine that this process runs on. Takes milliseconds."""
    logical = os.cpu_count() or 1
    return Sources(
        os=platform.system().lower(),
        arch=platform.machine().lower(),
        root=Path("/"),
        affinity=affinity(),
        logical_cores=logical,
        run=run_command,
        env=os.environ,
        nvml=import_pynvml,
        windows=read_windows(),
    )


def affinity() -> frozenset[int]:
    """The CPUs this process may run on; all of them where the system cannot say."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def run_command(command: Sequence[str]) -> str:
    """The stdout of `command`; a failure of the command or of starting it is no error, but less or nothing to read."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=COMMAND_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def read_text(path: Path) -> str:
    """The stripped text of a small kernel file, empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\r\n")
    except OSError:
        return ""


def read_int(path: Path) -> int | None:
    """The number in a kernel file; None when there is none."""
    return parse_int(read_text(path))


def parse_int(text: str) -> int | None:
    """A decimal number, None for anything else (`max`, rubbish, nothing)."""
    try:
        return int(text)
    except ValueError:
        return None


SYSCTL_NAMES = (
    *("hw.memsize", "hw.physicalcpu", "hw.perflevel0.physicalcpu", "hw.l3cachesize"),
    *("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features", "hw.optional.arm", "iogpu.wired_limit_mb"),
)


def sysctl(run: Run) -> dict[str, str]:
    """What macOS' sysctl knows of SYSCTL_NAMES; names that this version lacks are left out (sysctl goes on after them)."""
    lines = run(["/usr/sbin/sysctl", *SYSCTL_NAMES]).splitlines()
    pairs = (line.partition(": ") for line in lines)
    return {name: value.strip() for name, colon, value in pairs if colon}


def import_pynvml() -> Any:
    """NVIDIA's own bindings, None where they are not installed."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]  # an extra
    except Exception:  # a broken installation must not take localllm down with it
        return None
    return pynvml  # pyright: ignore[reportUnknownVariableType]
