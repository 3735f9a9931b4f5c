"""The machine that a benchmark ran on, for the record."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from localllm import __version__


def machine(info: dict[str, Any], *, busy_percent: float = 0.0) -> dict[str, Any]:
    """As plain data; `info` is what the engine reports of itself, `busy_percent` how much of the CPU others used."""
    return {
        "cpu": cpu_name(),
        "threads": info["n_threads"],
        "logical_cpus": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "devices": info["devices"],
        "os": platform.platform(),
        "python": platform.python_version(),
        "build": info["build"],
        "localllm": __version__,
        "busy_percent": busy_percent,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def busy_percent() -> float:
    """How much of the CPU is in use now, while we do nothing; takes half a second."""
    return psutil.cpu_percent(interval=0.5)


def cpu_name() -> str:
    """The CPU's marketing name, as far as the system tells it."""
    if sys.platform == "darwin":
        done = subprocess.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if name := done.stdout.strip():
            return name
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
