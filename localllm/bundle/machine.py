"""What this machine is, as far as compiled code cares, and whether it is what a bundle needs.

Travels on the stick: standard library only, Python 3.8.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import sysconfig

from .manifest import Platform

# What compilers emit on their own under -march=native, plus what ggml asks for: a CPU without one of these that a
# binary was built for dies with an illegal instruction. Names as in Linux' /proc/cpuinfo.
_X86 = (
    "ssse3 sse4_1 sse4_2 sse4a popcnt abm movbe avx avx2 fma fma4 xop f16c bmi1 bmi2 tbm adx gfni avx_vnni avx_ifma avx_vnni_int8"
    " avx_ne_convert avx512f avx512bw avx512cd avx512dq avx512vl avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg"
    " avx512_vpopcntdq avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16"
)
_ARM = "asimd asimddp asimdhp fphp atomics crc32 i8mm bf16 sve sve2 svei8mm svebf16 sme sme2"
FEATURES = frozenset(_X86.split() + _ARM.split())
_APPLE_ARM = {
    "FEAT_DotProd": "asimddp",
    "FEAT_FP16": "asimdhp",
    "FEAT_LSE": "atomics",
    "FEAT_I8MM": "i8mm",
    "FEAT_BF16": "bf16",
    "FEAT_SME": "sme",
    "FEAT_SME2": "sme2",
}
_APPLE_X86 = {"sse4.1": "sse4_1", "sse4.2": "sse4_2", "avx1.0": "avx", "lzcnt": "abm"}


def this_machine() -> Platform:
    """This machine and the Python that runs here."""
    libc, version = _libc()
    system = {"linux": "linux", "darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform)
    return Platform(system, arch(), libc, version, python(), cpu_features())


def arch() -> str:
    name = platform.machine().lower()
    return {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}.get(name, name)


def python() -> str:
    """Such as `3.11`, `3.13t` (free-threaded), `pypy3.11`: what wheels with compiled code are built for."""
    name = "" if sys.implementation.name == "cpython" else sys.implementation.name
    return f"{name}{sys.version_info[0]}.{sys.version_info[1]}{'t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''}"


def cpu_features() -> tuple[str, ...] | None:
    """The features of this CPU that compiled code may need; None where the system does not tell (Windows)."""
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
                return linux_features(file.read())
        except OSError:
            return None
    if sys.platform == "darwin":
        return apple_features(sysctl("hw.optional.arm" if arch() == "arm64" else "machdep.cpu"))
    return None


def linux_features(cpuinfo: str) -> tuple[str, ...] | None:
    """Those that every core has (big and little ones may differ)."""
    cores = [set(line.split()) for line in _found(r"(?mi)^(?:flags|features)\s*:(.*)$", cpuinfo)]
    common = sorted(FEATURES.intersection(*cores)) if cores else []
    return tuple(common) or None


def apple_features(sysctl: str) -> tuple[str, ...] | None:
    """From the output of `sysctl hw.optional.arm` or `sysctl machdep.cpu`."""
    found = {name for feature, name in _APPLE_ARM.items() if re.search(rf"{feature}: 1\b", sysctl)}
    for line in _found(r"(?m)features: (.*)$", sysctl):
        found |= FEATURES.intersection(_APPLE_X86.get(word, word) for word in line.lower().split())
    return tuple(sorted(found)) if found else None


def _found(pattern: str, text: str) -> list[str]:
    return re.findall(pattern, text)


def mismatches(needed: Platform, here: Platform) -> tuple[list[str], list[str]]:
    """Why code for `needed` cannot run `here`, and what could not be told."""
    wrong: list[str] = []
    unsure: list[str] = []
    for what, theirs, ours in (
        ("operating system", needed.os, here.os),
        ("processor", needed.arch, here.arch),
        ("C library", needed.libc, here.libc),
        ("Python", needed.python, here.python),
    ):
        if theirs != ours:
            wrong.append(f"{what}: the bundle is for {theirs}, this is {ours}")
    if needed.libc == here.libc and _numbers(here.libc_version) < _numbers(needed.libc_version):
        if here.libc_version:
            wrong.append(f"{needed.libc}: the bundle needs {needed.libc_version} or newer, this is {here.libc_version}")
        else:
            unsure.append(f"the version of {here.libc} here is unknown, the bundle needs {needed.libc_version}")
    if needed.cpu_features is None or here.cpu_features is None:
        if needed.cpu_features != ():
            unsure.append(f"whether this CPU can run it is unknown: needed {' '.join(needed.cpu_features or ['(not recorded)'])}")
    elif needed.arch == here.arch and (missing := sorted(set(needed.cpu_features) - set(here.cpu_features))):
        wrong.append(f"CPU: the bundle needs {' '.join(missing)}, which this one lacks")
    return wrong, unsure


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _libc() -> tuple[str, str]:
    if sys.platform == "darwin":
        return "macos", platform.mac_ver()[0]
    if sys.platform == "win32":
        return "ucrt", ""
    name, version = platform.libc_ver()
    if not name and "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE")):
        name = "musl"
    return name or "unknown", version


def sysctl(name: str) -> str:
    """What macOS tells about itself under `name`; empty where it does not."""
    try:
        return subprocess.run(["/usr/sbin/sysctl", name], stdout=subprocess.PIPE, timeout=5, check=True).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return ""
