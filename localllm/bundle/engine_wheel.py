"""The engine for other machines than this one: llama-cpp-python built for a CPU of the last ten years, not for this very one.

One baseline, not all CPU variants: those are backends that are loaded by path, which llama-cpp-python neither installs nor
loads. Built once, kept in the cache under all that it depends on.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from localllm.bundle.machine import this_machine
from localllm.bundle.wheels import run_pip
from localllm.errors import UsageError

PACKAGE = "llama-cpp-python"
BASELINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # Intel since Haswell (2013), AMD since Zen (2017): x86-64-v3. What llama.cpp gains beyond is AVX-512, on few machines.
    "x86_64": (
        ("-DGGML_SSE42=ON", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_BMI2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON")
        + ("-DGGML_AVX_VNNI=OFF", "-DGGML_AVX512=OFF", "-DGGML_AMX_TILE=OFF"),
        ("avx", "avx2", "bmi2", "f16c", "fma", "sse4_2", "ssse3"),
    ),
    # Raspberry Pi 5, Graviton 2 and newer: without the dot product a quantised model is several times slower.
    "linux arm64": (("-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16",), ("asimddp", "asimdhp")),
    # Every Apple chip has these, and the compiler takes them by default.
    "macos arm64": ((), ("asimddp", "asimdhp")),
}
"""Per architecture: CMake's flags, and the CPU features that the result needs."""


def baseline() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """CMake's flags for a portable build here, and the CPU features it needs. Raises UsageError."""
    here = this_machine()
    found = BASELINES.get(here.arch) or BASELINES.get(f"{here.os} {here.arch}")
    if found is None:
        raise UsageError(
            f"no portable build is known for {here.os} on {here.arch}", hint="--native carries the engine that is installed here"
        )
    flags, features = found
    return ("-DGGML_NATIVE=OFF", *flags), features


def portable_wheel(version: str, cache: Path, say: Callable[[str], object]) -> tuple[Path, tuple[str, ...]]:
    """The wheel of this version for the baseline CPU, from `cache` or compiled into it, and the CPU features it needs.

    CMAKE_ARGS (a GPU backend) is honoured; ours come last and win. Raises LocalLLMError.
    """
    flags, features = baseline()
    arguments = shlex.join([*shlex.split(os.environ.get("CMAKE_ARGS", "")), *flags])
    here = this_machine()
    key = f"{PACKAGE}=={version} {arguments} {here.os} {here.arch} {here.libc} {here.libc_version}"
    folder = cache / "wheels" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if ready := sorted(folder.glob("*.whl")):
        say(f"engine: {ready[0].name}, built earlier with {arguments}")
        return ready[0], features
    say(f"engine: compiling {PACKAGE} {version} with {arguments}; this takes minutes, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as built:
        # pip's own cache does not know CMAKE_ARGS: a wheel from there would be one for this very CPU.
        run_pip(
            *("wheel", "--no-deps", "--no-cache-dir", "--no-binary", PACKAGE, "--wheel-dir", built, f"{PACKAGE}=={version}"),
            what=f"compiling {PACKAGE} {version}",
            env={"CMAKE_ARGS": arguments, "FORCE_CMAKE": "1", "PYTHONUTF8": "1"},
        )
        (wheel,) = Path(built).glob("*.whl")
        folder.mkdir(exist_ok=True)
        (folder / "build.txt").write_text(f"{key}\nby {sys.executable}\n", encoding="utf-8")
        return wheel.replace(folder / wheel.name), features
