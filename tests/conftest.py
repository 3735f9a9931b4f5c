"""What every test gets: directories of its own and no settings from this machine. And the two demo models."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from localllm.demo import demo_models

# a test run that was started in the background ignores SIGINT, and all it starts would, too
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LOCALLLM_HOME of this test; no other LOCALLLM_* variable and no NO_COLOR is set."""
    for name in os.environ:
        if name.startswith("LOCALLLM_") or name == "NO_COLOR":
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    monkeypatch.setenv("LOCALLLM_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def demo_large() -> Path:
    return demo_models()["demo-large"]


@pytest.fixture(scope="session")
def demo_small() -> Path:
    return demo_models()["demo-small"]
