"""What a machine is, from texts that machines told, and what keeps a bundle from it."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from localllm.bundle import machine
from localllm.bundle.machine import apple_features, linux_features, mismatches, this_machine
from localllm.bundle.manifest import Platform

NEEDED = Platform("linux", "x86_64", "glibc", "2.31", "3.11", ("avx2", "fma"))


def test_the_same_machine_fits() -> None:
    here = this_machine()
    wrong, _ = mismatches(here, here)
    assert not wrong
    assert here.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert mismatches(NEEDED, replace(NEEDED, libc_version="2.39", cpu_features=("avx2", "avx512f", "fma"))) == ([], [])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"os": "windows"}, "operating system: the bundle is for linux, this is windows"),
        ({"arch": "arm64"}, "processor: the bundle is for x86_64, this is arm64"),
        ({"libc": "musl"}, "C library: the bundle is for glibc, this is musl"),
        ({"libc_version": "2.28"}, "glibc: the bundle needs 2.31 or newer, this is 2.28"),
        ({"libc_version": "2.4"}, "needs 2.31 or newer, this is 2.4"),
        ({"python": "3.12"}, "Python: the bundle is for 3.11, this is 3.12"),
        ({"cpu_features": ("fma", "sse4_2")}, "CPU: the bundle needs avx2, which this one lacks"),
    ],
)
def test_each_mismatch_is_said(change: dict[str, object], reason: str) -> None:
    (wrong,), unsure = mismatches(NEEDED, replace(NEEDED, **change))  # type: ignore[arg-type]
    assert reason in wrong
    assert not unsure


def test_all_mismatches_are_said_at_once() -> None:
    assert len(mismatches(NEEDED, replace(NEEDED, os="macos", python="3.12", libc="macos"))[0]) == 3


def test_what_cannot_be_told_is_a_warning() -> None:
    wrong, unsure = mismatches(NEEDED, replace(NEEDED, cpu_features=None, libc_version=""))
    assert not wrong
    assert len(unsure) == 2
    assert "avx2 fma" in unsure[1]
    assert mismatches(replace(NEEDED, cpu_features=()), replace(NEEDED, cpu_features=None)) == ([], [])


def test_features_are_those_that_all_cores_have() -> None:
    big, little = "flags\t\t: fpu avx2 fma avx512f sse4_2", "flags\t\t: fpu avx2 fma sse4_2"
    assert linux_features(f"processor : 0\n{big}\n\nprocessor : 1\n{little}\n") == ("avx2", "fma", "sse4_2")
    assert linux_features("Features\t: fp asimd aes asimddp asimdhp\n") == ("asimd", "asimddp", "asimdhp")
    assert linux_features("vendor_id : unknown\n") is None


def test_apple() -> None:
    assert apple_features("hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.optional.arm.FEAT_FP16: 1\n") == (
        "asimddp",
        "asimdhp",
    )
    intel = "machdep.cpu.features: FPU SSE4.2 AVX1.0 FMA F16C\nmachdep.cpu.leaf7_features: BMI2 AVX2\n"
    assert apple_features(intel) == ("avx", "avx2", "bmi2", "f16c", "fma", "sse4_2")
    assert apple_features("") is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_cpu_is_known() -> None:
    features = machine.cpu_features()
    assert features
    assert set(features) <= machine.FEATURES
