"""The whole journey: localllm and a model on a stick, an empty home, no network, and `localllm run` answers.

The network is taken away by a namespace of its own where the system allows that, else by a guard in every Python that runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from venv import EnvBuilder

import pytest

import localllm

ROOT = Path(__file__).resolve().parents[2]
GUARD = """
import sys

def guard(event, args):
    if event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else "localhost"  # a path: a Unix socket
    elif event == "socket.getaddrinfo":
        host = args[0] or "localhost"
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost"):
        with open({attempts!r}, "a") as file:
            print(event, host, file=file)
        raise OSError("the guard")

sys.addaudithook(guard)
"""
CANARY = "import socket; socket.create_connection(('192.0.2.1', 9), timeout=5)"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists() or os.name == "nt", reason="needs the checkout, and POSIX"),
    pytest.mark.timeout(600),
]


class Isolated:
    """A new user on this machine: an empty home, a bare PATH, and no network."""

    def __init__(self, home: Path, *, namespace: bool) -> None:
        home.mkdir()
        self.home, self.namespace = home, namespace
        self.attempts = home.parent / "attempts"
        self.guard = GUARD.format(attempts=str(self.attempts))

    def run(self, *command: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.home), "LANG": "C.UTF-8"}
        prefix = ["unshare", "--map-root-user", "--net"] if self.namespace else []
        return subprocess.run([*prefix, *map(str, command)], env=env, cwd=self.home, input=stdin, capture_output=True, text=True)

    def script(self, path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a Python program of the stick."""
        if self.namespace:
            return self.run(sys.executable, "-I", path, *arguments)
        guarded = f"{self.guard}\nimport runpy; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
        return self.run(sys.executable, "-I", "-c", guarded, path, *arguments)

    def environment(self, venv: Path) -> Path:
        """Where localllm is to be installed; without a namespace, every Python in there will start with the guard."""
        if not self.namespace:
            EnvBuilder(with_pip=False, symlinks=True).create(venv)
            (site,) = venv.glob("lib/python*/site-packages")
            (site / "guard.pth").write_text(f"import sys; exec({self.guard!r})\n")
        return venv


def can_unshare() -> bool:
    try:
        return subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def stick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the demo and of what is installed here, made by the command."""
    folder = tmp_path_factory.mktemp("stick")
    command = [sys.executable, "-m", "localllm", "bundle", "create", str(folder), "--model", "demo", "--with-runtime", "--native", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LOCALLLM_HOME": str(folder.parent / "maker")})
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["runtime"]["cpu_features"] != []
    assert len(made["runtime"]["wheels"]) > 20
    return folder


@pytest.mark.parametrize("namespace", [True, False], ids=["namespace", "guard"])
def test_an_empty_home_without_a_network_gets_answers(stick: Path, tmp_path: Path, namespace: bool) -> None:
    if namespace and not can_unshare():
        pytest.skip("no network namespaces here; the guard's turn")
    there = Isolated(tmp_path / "home", namespace=namespace)
    assert there.script(stick / "verify.py").stdout.startswith("ok: ")

    venv = there.environment(there.home / "apps" / "localllm")
    done = there.script(stick / "install.py", "--venv", venv)
    assert done.returncode == 0, done.stderr
    assert "installed localllm/demo-large:Q8_0" in done.stdout

    command = venv / "bin" / "localllm"
    assert there.run(command, "--version").stdout == f"localllm {localllm.__version__}\n"
    answer = there.run(command, "run", stdin="What is the capital of France?")
    assert (answer.returncode, answer.stdout) == (0, "The capital of France is Paris.\n"), answer.stderr
    (model,) = json.loads(there.run(command, "bundle", "install", stick, "--models-only", "--json").stdout)["models"]
    assert Path(model["path"]).is_relative_to(there.home)

    # Nobody tried; and whoever had would have failed.
    assert not there.attempts.exists()
    canary = there.run(venv / "bin" / "python", "-I", "-c", CANARY)
    assert canary.returncode == 1
    assert there.attempts.exists() is not namespace
