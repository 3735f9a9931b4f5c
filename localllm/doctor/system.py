"""The machine as the doctor looks at it, with the installation on it, so that a test can hand in a recorded one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from localllm.hardware import Sources, this_machine
from localllm.hardware.sources import read_text
from localllm.paths import PACKAGE, Directories, directories


@dataclass(frozen=True, slots=True)
class System:
    """This machine and user, or what stands for them."""

    sources: Sources
    directories: Directories
    python: Path = Path(sys.executable)
    """The one that localllm is installed for; not resolved, a virtual environment's is a link."""
    package: Path = PACKAGE

    @classmethod
    def here(cls) -> System:
        return cls(this_machine(), directories())

    @property
    def os(self) -> str:
        """`linux`, `darwin` or `windows`."""
        return self.sources.os

    @property
    def root(self) -> Path:
        return self.sources.root

    @property
    def env(self) -> Mapping[str, str]:
        return self.sources.env

    def read(self, name: str) -> str:
        """The stripped text of a file, named relative to the root; empty where it cannot be read."""
        return read_text(self.root / name)

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def command(self, *names: str) -> str | None:
        """The path of the first of these programs that is on the PATH."""
        # An empty PATH finds nothing; None would ask this process's own.
        return next((found for name in names if (found := shutil.which(name, path=self.env.get("PATH", "")))), None)
