from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama_cpp_sdist(pytestconfig: pytest.Config) -> Path:
    """llama-cpp-python's source distribution: llama.cpp's templates and vocabularies are in it.

    From `LOCALLLM_LLAMA_SDIST`, or fetched once with pip into pytest's cache; skips where neither works.
    """
    if given := os.environ.get("LOCALLLM_LLAMA_SDIST"):
        return Path(given)
    release = version("llama-cpp-python")
    assert pytestconfig.cache is not None
    directory = Path(pytestconfig.cache.mkdir("llama-cpp-python"))
    if not (archives := sorted(directory.glob(f"*{release}.tar.gz"))):
        # With build isolation: pip asks the sdist for its metadata, and its build backend may not be installed here.
        options = ["--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(directory)]
        command = [sys.executable, "-m", "pip", "download", *options, f"llama-cpp-python=={release}"]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        if fetched.returncode:
            pytest.skip(f"cannot fetch llama-cpp-python's sdist (offline?), set LOCALLLM_LLAMA_SDIST: {fetched.stderr.strip()[-200:]}")
        archives = sorted(directory.glob(f"*{release}.tar.gz"))
    return archives[0]
