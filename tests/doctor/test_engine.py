"""The engine is asked in a child; each way it can be wrong, or die, is a finding with the command that mends it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from localllm.doctor.cards import find_cards
from localllm.doctor.engine import judge_cpu, judge_engine
from localllm.doctor.finding import Finding
from localllm.doctor.system import System
from localllm.doctor.tools import pinned_version, rebuild_command
from localllm.probe import Engine, ask_engine
from tests.doctor.machines import CPU, HEALTHY, PINNED, WITH_CUDA, Machine, ids, probe_saying, write
from tests.doctor.test_cards import NVIDIA, drm

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def judge(system: System, engine: Engine, gpu_layers: int = -1) -> list[Finding]:
    return list(judge_engine(system, engine, find_cards(system), gpu_layers))


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, ids(findings)
    return findings[0]


def test_the_installed_engine_answers() -> None:
    engine = ask_engine()
    assert engine.death == ""
    assert engine.version == metadata.version("llama-cpp-python")
    assert engine.version in engine.build
    assert "CPU" in engine.backends
    assert [device["total_bytes"] > 0 for device in engine.devices if device["kind"] == "cpu"] == [True]
    assert [device["device_id"] for device in engine.devices if device["kind"] == "cpu"] == [""], "the CPU is on no bus"
    assert engine.foreign == ()
    if sys.platform == "linux":
        assert any("libllama" in path for path in engine.libraries)


@posix
def test_a_library_from_elsewhere_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    own = Path(spec.origin).parent / "lib"
    for file in own.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    engine = ask_engine()
    if sys.platform == "linux":
        assert engine.foreign
    finding = next(f for f in judge_engine(System.here(), engine, []) if f.id == "foreign-ggml")
    assert finding.fix == "unset LLAMA_CPP_LIB_PATH"
    assert str(tmp_path) in finding.detail


@pytest.mark.parametrize("engine", [HEALTHY, WITH_CUDA])
def test_what_the_probe_says_is_read(engine: Engine) -> None:
    assert ask_engine(probe_saying(engine)) == engine


@pytest.mark.parametrize(
    "command, death, words",
    [
        (python("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")"), "missing", "No module named"),
        (python("raise RuntimeError('libcudart.so.12: cannot open shared object file')"), "failed", "libcudart.so.12"),
        (python("print('hello')"), "failed", "did not answer"),
        (python("print('[]')"), "failed", "did not answer"),
        (python("pass"), "failed", "did not answer"),
        (["/no/such/python"], "failed", "/no/such/python"),
        pytest.param(python("import os; os.kill(os.getpid(), 4)"), "illegal-instruction", "", marks=posix),
        pytest.param(python("import os; os.kill(os.getpid(), 11)"), "crashed", "", marks=posix),
        pytest.param(python("import os; os.write(2, b'GGML_ASSERT(x)'); os.abort()"), "crashed", "ASSERT", marks=posix),
    ],
)
def test_deaths_are_told_apart(machine: Machine, command: list[str], death: str, words: str) -> None:
    engine = ask_engine(command)
    assert engine.death == death
    assert words in " ".join(engine.last_words)
    finding = only(judge(machine(), engine))
    assert finding.level == "problem"
    assert finding.id == {"missing": "engine-missing", "illegal-instruction": "illegal-instruction"}.get(death, "engine-broken")
    assert finding.fix == rebuild_command(machine(), "cpu")
    assert words in finding.detail


@posix
def test_a_probe_that_hangs_is_ended(machine: Machine) -> None:
    engine = ask_engine(python("import signal; signal.pause()"), timeout_s=0.1)
    assert engine.death == "timeout"
    assert only(judge(machine(), engine)).id == "engine-hangs"


def test_a_healthy_machine_has_no_findings(machine: Machine) -> None:
    assert judge(machine(), HEALTHY) == []
    assert judge(machine(NVIDIA), WITH_CUDA) == []


def test_an_unused_card_is_a_problem_with_the_exact_command(machine: Machine) -> None:
    system = machine(NVIDIA, programs=("c++", "nvcc"))
    finding = only(judge(system, HEALTHY))
    assert (finding.id, finding.level, finding.area) == ("cpu-only-engine", "problem", "cards")
    assert "NVIDIA H100" in finding.title
    assert "nvcc" in finding.detail
    words = shlex.split(finding.fix)
    assert words[0] == "CMAKE_ARGS=-DGGML_CUDA=on"
    assert words[1:4] == [sys.executable, "-m", "pip"]
    assert "--no-binary" in words
    assert words[-1] == f"llama-cpp-python=={PINNED}"
    assert finding.data["toolkit"] is True


def test_without_a_toolkit_the_fix_begins_with_it(machine: Machine) -> None:
    finding = only(judge(machine(NVIDIA), HEALTHY))
    assert finding.fix.startswith("install the CUDA toolkit")
    assert rebuild_command(machine(), "cuda") in finding.fix
    assert finding.data["toolkit"] is False


def test_a_toolkit_off_the_path_is_named(machine: Machine) -> None:
    system = machine({**NVIDIA, "usr/local/cuda/bin/nvcc": ""})
    words = shlex.split(only(judge(system, HEALTHY)).fix)
    assert words[:2] == ["CMAKE_ARGS=-DGGML_CUDA=on", f"CUDACXX={system.root / 'usr/local/cuda/bin/nvcc'}"]


@pytest.mark.parametrize(
    "files, programs, level, flag",
    [
        (drm("card0", "0x1002", "amdgpu", mem_info_vram_total=str(24 << 30)), ("c++", "hipcc"), "problem", "-DGGML_HIP=on"),
        (drm("card0", "0x1002", "amdgpu", mem_info_vram_total=str(1 << 29)), ("c++", "hipcc"), "info", "-DGGML_HIP=on"),
        (drm("card0", "0x8086", "i915"), ("c++",), "info", "-DGGML_VULKAN=on"),
        ({**NVIDIA, "usr/include/vulkan/vulkan.h": ""}, ("c++", "glslc"), "problem", "-DGGML_VULKAN=on"),
    ],
)
def test_other_cards(machine: Machine, files: dict[str, str], programs: tuple[str, ...], level: str, flag: str) -> None:
    finding = only(judge(machine(files, programs=programs), HEALTHY))
    assert (finding.id, finding.level) == ("cpu-only-engine", level)
    assert flag in finding.fix


def test_a_mac_without_metal(machine: Machine) -> None:
    files = {"Library/Developer/CommandLineTools/usr/bin/c++": ""}
    system = machine(files, os="darwin", arch="arm64")
    finding = only(judge(system, HEALTHY))
    assert finding.level == "problem"
    assert "-DGGML_METAL=on" in finding.fix
    for name in ("Metal", "MTL"):
        gpu = {**CPU, "kind": "gpu"}
        assert judge(system, replace(HEALTHY, backends=(name, "CPU"), devices=(gpu, CPU))) == []


def test_a_card_that_is_not_wanted_is_no_problem(machine: Machine) -> None:
    finding = only(judge(machine(NVIDIA), HEALTHY, gpu_layers=0))
    assert (finding.id, finding.level) == ("cpu-only-engine", "info")


def test_two_cards_of_a_kind_are_one_finding(machine: Machine) -> None:
    assert ids(judge(machine({**NVIDIA, "dev/nvidia1": ""}), HEALTHY)) == ["cpu-only-engine"]


def test_a_build_that_finds_no_device(machine: Machine) -> None:
    finding = only(judge(machine(NVIDIA), replace(WITH_CUDA, devices=(CPU,))))
    assert (finding.id, finding.level) == ("gpu-not-found", "problem")
    assert "nvidia-smi" in finding.fix


@pytest.mark.parametrize(
    "files, ident, fix",
    [
        ({"proc/driver/nvidia/version": NVIDIA["proc/driver/nvidia/version"]}, "card-not-passed", "--gpus all"),
        (drm("card0", "0x10de", "nouveau"), "card-without-driver", "driver"),
        ({k: v for k, v in drm("card0", "0x1002", "amdgpu").items() if "dri" not in k.split("/")}, "card-without-driver", "/dev/dri"),
    ],
)
def test_a_card_out_of_reach(machine: Machine, files: dict[str, str], ident: str, fix: str) -> None:
    finding = only(judge(machine(files), HEALTHY))
    assert finding.id == ident
    assert finding.level in ("info", "warning")
    assert fix in finding.fix


def test_a_toolkit_without_a_card(machine: Machine) -> None:
    assert only(judge(machine(programs=("c++", "nvcc")), HEALTHY)).id == "toolkit-without-card"


def test_another_version_than_the_pinned_one(machine: Machine) -> None:
    finding = only(judge(machine(NVIDIA), replace(WITH_CUDA, version="0.3.16")))
    assert (finding.id, finding.level) == ("engine-version", "warning")
    assert finding.data == {"version": "0.3.16", "pinned": PINNED}
    assert "-DGGML_CUDA=on" in finding.fix, "the GPU must not be lost by it"


def test_a_broken_engine_is_rebuilt_for_the_card(machine: Machine) -> None:
    system = machine(NVIDIA, programs=("c++", "nvcc"))
    assert only(judge(system, Engine(death="illegal-instruction"))).fix == rebuild_command(system, "cuda")


def test_no_compiler(machine: Machine) -> None:
    files = {"etc/os-release": 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n'}
    finding = only(judge(machine(files, programs=()), HEALTHY))
    assert (finding.id, finding.level, finding.fix) == ("no-compiler", "info", "sudo apt install build-essential")


def test_another_ggml_on_the_library_path(machine: Machine, tmp_path: Path) -> None:
    write(tmp_path / "other", {"libggml-base.so": "", "libllama.so": "", "libz.so": ""})
    (tmp_path / "empty").mkdir()
    system = machine(env={"LD_LIBRARY_PATH": f"{tmp_path / 'empty'}:{tmp_path / 'other'}"})
    finding = only(judge(system, HEALTHY))
    assert (finding.id, finding.fix) == ("foreign-ggml", "unset LD_LIBRARY_PATH")
    assert finding.data["paths"] == [str(tmp_path / "other/libggml-base.so"), str(tmp_path / "other/libllama.so")]
    assert judge(machine(env={"LD_LIBRARY_PATH": str(tmp_path / "empty")}), HEALTHY) == []


@pytest.mark.parametrize(
    "arch, flags, found",
    [
        ("x86_64", "fpu sse3 avx f16c", ["no-avx2"]),
        ("x86_64", "fpu avx avx2", []),
        ("x86_64", None, []),
        ("aarch64", "asimd", []),
    ],
)
def test_old_cpus(machine: Machine, arch: str, flags: str | None, found: list[str]) -> None:
    files = {} if flags is None else {"proc/cpuinfo": f"processor\t: 0\nflags\t\t: {flags}\n"}
    assert ids(judge_cpu(machine(files, arch=arch))) == found


def test_the_pin_is_found_without_a_checkout(machine: Machine, tmp_path: Path) -> None:
    assert pinned_version(machine()) == PINNED
    installed = replace(machine(), package=tmp_path / "site-packages" / "localllm")
    required = [text for text in metadata.requires("localllm") or [] if text.startswith("llama-cpp-python==")]
    assert required == [f"llama-cpp-python=={pinned_version(installed)}"]
    # Another project's checkout around it says nothing.
    write(tmp_path / "site-packages", {"pyproject.toml": '[project]\nname = "other"\ndependencies = ["llama-cpp-python==1.0"]\n'})
    assert pinned_version(installed) == required[0].partition("==")[2]


def test_commands_for_powershell(machine: Machine) -> None:
    command = rebuild_command(replace(machine(os="windows"), python=Path("C:/my venv/python.exe")), "cuda")
    assert command.startswith('$env:CMAKE_ARGS = "-DGGML_CUDA=on"; & "')
    assert command.endswith(f"llama-cpp-python=={PINNED}")
