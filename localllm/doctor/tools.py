"""What can compile llama.cpp here, and the exact command that does."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from contextlib import suppress
from importlib import metadata
from typing import Literal

from localllm.doctor.system import System
from localllm.probe import Backend

ENGINE = "llama-cpp-python"
Build = Literal["cpu", "cuda", "hip", "vulkan", "metal"]
_FLAGS: dict[Build, str] = {
    "cpu": "",
    "cuda": "-DGGML_CUDA=on",
    "hip": "-DGGML_HIP=on",
    "vulkan": "-DGGML_VULKAN=on",
    "metal": "-DGGML_METAL=on",
}
TOOLKITS: dict[Backend, str] = {
    "cuda": "the CUDA toolkit (nvcc), https://developer.nvidia.com/cuda-downloads",
    "hip": "ROCm (hipcc), https://rocm.docs.amd.com",
    "vulkan": "the Vulkan SDK (glslc and headers), https://vulkan.lunarg.com/sdk/home",
    "metal": "Xcode's command line tools: xcode-select --install",
}


def toolkit(system: System, backend: Backend) -> str | None:
    """Where the compiler of `backend` is; None where it is not installed."""
    match backend:
        case "cuda":
            return system.command("nvcc") or _file(system, "usr/local/cuda/bin/nvcc")
        case "hip":
            return system.command("hipcc") or _file(system, "opt/rocm/bin/hipcc")
        case "vulkan":
            headers = system.env.get("VULKAN_SDK") or system.exists("usr/include/vulkan/vulkan.h")
            return system.command("glslc") if headers else None
        case "metal":
            return compiler(system)


def compiler(system: System) -> str | None:
    """Where a C++ compiler is; it is not tried."""
    if system.os == "windows":
        installer = "Program Files (x86)/Microsoft Visual Studio/Installer/vswhere.exe"
        return system.command("cl", "g++", "clang++") or _file(system, installer)
    if system.os == "darwin":
        # /usr/bin/c++ is always there, and only asks to install the real one.
        return _file(system, "Library/Developer/CommandLineTools/usr/bin/c++") or _file(system, "Applications/Xcode.app")
    return system.command(*filter(None, [system.env.get("CXX", "").split(" ")[0]]), "c++", "g++", "clang++")


def pinned_version(system: System) -> str:
    """The engine's version that this localllm was made for; empty where nothing says so.

    A checkout's pyproject.toml goes before the installed metadata, which an update by git leaves as they were.
    """
    wanted: list[str] = []
    with suppress(OSError, KeyError, tomllib.TOMLDecodeError):
        project = tomllib.loads((system.package.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        wanted = project["dependencies"] if project["name"] == "localllm" else []
    with suppress(metadata.PackageNotFoundError):
        wanted = wanted or metadata.requires("localllm") or []
    exact = (re.match(rf"{ENGINE}\s*==\s*([^\s;,]+)", text) for text in wanted)
    return next((found[1] for found in exact if found), "")


def rebuild_command(system: System, build: Build) -> str:
    """The command, to be pasted into this system's shell, that compiles the engine anew for this machine."""
    version = pinned_version(system)
    package = f"{ENGINE}=={version}" if version else ENGINE
    # Without the cache: it does not know CMAKE_ARGS, nor on which machine a wheel was built.
    pip = ["-m", "pip", "install", "--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary", ENGINE, package]
    # On a Mac, Metal is on unless it is turned off.
    flags = "-DGGML_METAL=off" if (build, system.os) == ("cpu", "darwin") else _FLAGS[build]
    if system.os == "windows":
        command = f"& {subprocess.list2cmdline([str(system.python), *pip])}"
        return f'$env:CMAKE_ARGS = "{flags}"; {command}'
    given = {"CMAKE_ARGS": flags} if flags or system.env.get("CMAKE_ARGS") else {}
    if build == "cuda" and system.command("nvcc") is None and (nvcc := toolkit(system, "cuda")):
        given["CUDACXX"] = nvcc
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in given.items()), shlex.join([str(system.python), *pip])])


def install_command(system: System) -> str:
    """How to get a C++ compiler on this system."""
    if system.os == "darwin":
        return "xcode-select --install"
    if system.os == "windows":
        return (
            "winget install Microsoft.VisualStudio.2022.BuildTools"
            ' --override "--passive --add Microsoft.VisualStudio.Workload.VCTools --includeRecommended"'
        )
    release = " ".join(
        line.partition("=")[2] for line in system.read("etc/os-release").splitlines() if line.startswith(("ID=", "ID_LIKE="))
    )
    for names, command in (
        (("debian", "ubuntu"), "sudo apt install build-essential"),
        (("fedora", "rhel", "centos"), "sudo dnf install gcc-c++"),
        (("arch",), "sudo pacman -S base-devel"),
        (("suse",), "sudo zypper install gcc-c++"),
    ):
        if any(name in release for name in names):
            return command
    return "install a C++ compiler (g++ or clang++) with your package manager"


def _file(system: System, name: str) -> str | None:
    return str(system.root / name) if system.exists(name) else None
