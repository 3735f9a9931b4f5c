"""A command run so that it cannot reach another machine without being seen: the parent's side of the socket guard.

Every Python process that the command starts is watched by `sitecustomize.py` beside this file. Where Linux lets
us, all of it also runs in a network namespace without a network, which native code cannot leave either.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RECORD = "SOCKET_GUARD_RECORD"
TEST_ADDRESS = "192.0.2.1"
"""Reserved for documentation (RFC 5737): no machine has it."""
CONTROL = f"import socket; s = socket.socket(); s.settimeout(1); s.connect(('{TEST_ADDRESS}', 9))"
_NO_WAY_OUT = f"""import errno, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # connecting this kind sends nothing
sys.exit(s.connect_ex(('{TEST_ADDRESS}', 9)) != errno.ENETUNREACH)"""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One use of the network."""

    pid: int
    event: str
    """As Python's audit events name it: socket.connect, socket.getaddrinfo, …"""
    host: str
    here: bool
    """It meant this machine."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """How a guarded command went."""

    code: int
    """Exit code; negative: the signal that killed it."""
    stdout: str
    stderr: str
    watched: Mapping[int, tuple[str, ...]]
    """Process id -> command line (without the program) of every process that was watched."""
    attempts: tuple[Attempt, ...]
    isolated: bool
    """It ran in a namespace without a network."""

    @property
    def outside(self) -> tuple[Attempt, ...]:
        return tuple(attempt for attempt in self.attempts if not attempt.here)

    @property
    def inside(self) -> int:
        return sum(attempt.here for attempt in self.attempts)


def isolation() -> list[str]:
    """The words before a command that take its network away, tried out; empty where the system does not allow that."""
    unshare = shutil.which("unshare") if sys.platform == "linux" else None
    if unshare is None:
        return []
    # The second way is for root in a container, who may not map users.
    for options in (["--map-root-user", "--net"], ["--net"]):
        words = [unshare, *options, "--"]
        try:
            tried = subprocess.run([*words, sys.executable, "-I", "-S", "-c", _NO_WAY_OUT], capture_output=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if tried.returncode == 0:
            return words
    return []


def run_guarded(command: Sequence[str], env: Mapping[str, str], timeout_s: float, prefix: Sequence[str] = ()) -> Guarded:
    """Run `command`, a Python, under the guard and, with the `prefix` of `isolation()`, without a network.

    Raises subprocess.TimeoutExpired and OSError.
    """
    with tempfile.TemporaryDirectory(prefix="localllm-guard-") as folder:
        record = Path(folder) / "record"
        path = os.pathsep.join(filter(None, [str(FOLDER), env.get("PYTHONPATH", "")]))
        done = subprocess.run(
            [*prefix, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**env, "PYTHONPATH": path, RECORD: str(record), "PYTHONUTF8": "1"},
            timeout=timeout_s,
            check=False,
        )
        lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return Guarded(
        done.returncode,
        done.stdout.decode("utf-8", "replace"),
        done.stderr.decode("utf-8", "replace"),
        {event["pid"]: tuple(event["command"]) for event in events if event["event"] == "watching"},
        tuple(Attempt(e["pid"], e["event"], e["host"], e["here"]) for e in events if e["event"] != "watching"),
        bool(prefix),
    )


def control(env: Mapping[str, str], prefix: Sequence[str] = ()) -> Guarded:
    """The guard's own test: a process that does try to reach another machine."""
    return run_guarded([sys.executable, "-c", CONTROL], env, 30, prefix)
