"""Machines for the doctor: a tree of files, variables, programs, and an engine that says what a test wants."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from localllm.doctor.finding import Finding
from localllm.doctor.system import System
from localllm.hardware import Sources
from localllm.paths import Directories
from localllm.probe import Engine

CPU = {"name": "CPU", "description": "AMD EPYC", "kind": "cpu", "free_bytes": 8 << 30, "total_bytes": 8 << 30}
GPU = {"name": "CUDA0", "description": "NVIDIA L4", "kind": "gpu", "free_bytes": 20 << 30, "total_bytes": 23 << 30}
PINNED = "0.3.36"
HEALTHY = Engine(PINNED, f"llama-cpp-python {PINNED}", ("CPU",), False, (CPU,))
WITH_CUDA = Engine(PINNED, f"llama-cpp-python {PINNED}", ("CUDA", "CPU"), True, (GPU, CPU))

Machine = Callable[..., System]


def build(
    folder: Path,
    files: Mapping[str, str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    programs: tuple[str, ...] = ("c++",),
    os: str = "linux",
    arch: str = "x86_64",
) -> System:
    """A machine below `folder`: `files` by their path from the root, empty `programs` on its PATH, a localllm that wants PINNED."""
    root, home, path, checkout = folder / "root", folder / "home", folder / "bin", folder / "checkout"
    root.mkdir(exist_ok=True)
    write(root, files or {})
    write(path, {name + (".exe" if sys.platform == "win32" else ""): "" for name in programs})
    for program in path.glob("*"):
        program.chmod(0o755)
    project = f'[project]\nname = "localllm"\ndependencies = ["numpy", "llama-cpp-python=={PINNED}"]\n'
    write(checkout, {"pyproject.toml": project})
    variables = {"PATH": str(path), "HOME": str(folder), "LOCALLLM_HOME": str(home), **(env or {})}
    sources = Sources(os, arch, root, frozenset({0, 1}), 2, lambda _: "", variables)
    return System(sources, Directories(home, home, home / "cache", home / "state"), package=checkout / "localllm")


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def probe_saying(engine: Engine) -> list[str]:
    """A probe command that answers as the real one would for `engine`."""
    said = {**engine.to_json(), "devices": [dict(device) for device in engine.devices]}
    return [sys.executable, "-c", f"print({json.dumps(said)!r})"]


def ids(findings: Iterable[Finding]) -> list[str]:
    return [finding.id for finding in findings]
