"""What every test gets: directories of its own and no settings from this machine. And the two demo models."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from localllm.demo import demo_models
from tests.hub_server import HubServer

# how long an example takes says how busy the machine is, and nothing else
hypothesis.settings.register_profile("steady", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("steady")
# several test processes share the cores: threads that spin while they wait for each other would starve the rest
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# a test run that was started in the background ignores SIGINT, and all it starts would, too
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LOCALLLM_HOME of this test; no other LOCALLLM_* or HF_* variable and no NO_COLOR is set."""
    for name in os.environ:
        if name.startswith(("LOCALLLM_", "HF_")) or name == "NO_COLOR":
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of this test's own: HF_ENDPOINT points to it, without a proxy between and without this machine's token."""
    from huggingface_hub import close_session

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield server
        close_session()
