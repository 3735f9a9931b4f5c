"""The engine as it is installed, asked in a child process: its build, backends and devices, or how it died.

The parent's side of llama/probe.py; it never imports llama.cpp. What is wrong with an engine is for the doctor to say.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

TIMEOUT_S = 60.0
"""The first start of a GPU driver may compile its kernels."""
LAST_WORDS_LINES = 8
# https://learn.microsoft.com/openspecs/windows_protocols/ms-erref: STATUS_ILLEGAL_INSTRUCTION
_ILLEGAL_WINDOWS = 0xC000001D
Backend = Literal["cuda", "hip", "vulkan", "metal"]
_REGISTERED: dict[str, Backend] = {"CUDA": "cuda", "ROCm": "hip", "Vulkan": "vulkan", "Metal": "metal", "MTL": "metal"}
Death = Literal["", "missing", "illegal-instruction", "timeout", "crashed", "failed"]


@dataclass(frozen=True, slots=True)
class Engine:
    """What the probe said, or how it died."""

    version: str = ""
    build: str = ""
    backends: tuple[str, ...] = ()
    """As ggml names them; empty when it died."""
    gpu_offload: bool = False
    devices: tuple[Mapping[str, Any], ...] = ()
    """name, description, kind, free_bytes, total_bytes each."""
    libraries: tuple[str, ...] = ()
    """Files of llama.cpp's libraries that were loaded; empty where the system does not tell."""
    foreign: tuple[str, ...] = ()
    """Those of them that do not lie in the package."""
    death: Death = ""
    last_words: tuple[str, ...] = field(default=(), repr=False)

    @property
    def builds(self) -> tuple[Backend, ...]:
        """The GPU backends among `backends`."""
        return tuple(dict.fromkeys(_REGISTERED[name] for name in self.backends if name in _REGISTERED))

    @property
    def gpus(self) -> list[str]:
        """Descriptions of the GPUs that it can use."""
        return [str(device["description"]) for device in self.devices if device["kind"] in ("gpu", "igpu")]

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        del data["devices"]
        return data


def probe_command(python: str | Path = sys.executable) -> list[str]:
    """The command line of the child, under the Python that localllm is installed for."""
    return [str(python), "-P", "-X", "utf8", "-m", "localllm.llama.probe"]


def ask_engine(command: Sequence[str] = (), env: Mapping[str, str] = os.environ, timeout_s: float = TIMEOUT_S) -> Engine:
    """Run the probe and read its line; every way it can end is an answer, nothing is raised."""
    try:
        done = subprocess.run(
            command or probe_command(),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env={**env, "GGML_NO_BACKTRACE": "1"},
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return Engine(death="timeout", last_words=_last_words(error.stderr))
    except OSError as error:
        return Engine(death="failed", last_words=(str(error),))
    if done.returncode == 0:
        try:
            said = json.loads(done.stdout)
            return Engine(
                version=str(said["version"]),
                build=str(said["build"]),
                backends=tuple(said["backends"]),
                gpu_offload=bool(said["gpu_offload"]),
                devices=tuple(said["devices"]),
                libraries=tuple(said["libraries"]),
                foreign=tuple(said["foreign"]),
            )
        except (ValueError, KeyError, TypeError):
            return Engine(death="failed", last_words=("it did not answer with JSON", *_last_words(done.stdout)))
    return Engine(death=_death(done.returncode, done.stderr), last_words=_last_words(done.stderr))


def _death(code: int, stderr: bytes) -> Death:
    if code in (-signal.SIGILL, _ILLEGAL_WINDOWS):
        return "illegal-instruction"
    if b"No module named 'llama_cpp'" in stderr:
        return "missing"
    return "crashed" if code < 0 or code >= 0xC0000000 else "failed"


def _last_words(stderr: bytes | None) -> tuple[str, ...]:
    lines = [line.rstrip() for line in (stderr or b"").decode("utf-8", "replace").splitlines()]
    return tuple(line for line in lines if line)[-LAST_WORDS_LINES:]
