from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from localllm.doctor.environment import (
    judge_catalog,
    judge_permissions,
    judge_settings,
    judge_terminal,
    judge_variables,
    models_folder,
    short,
)
from localllm.doctor.memory import judge_memory
from localllm.hardware import Memory
from localllm.settings import Settings
from tests.doctor.machines import Machine, ids, write

GIB = 1 << 30
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")


def test_a_quiet_machine_has_no_findings(machine: Machine) -> None:
    system = machine()
    settings, findings = judge_settings(system)
    assert (settings, findings) == (Settings.model_validate({}), [])
    assert ids(judge_permissions(system)) == []
    assert ids(judge_variables(system)) == []
    assert ids(judge_terminal(system, "utf-8")) == []


def test_broken_settings_are_a_finding_and_the_defaults_hold(machine: Machine) -> None:
    system = machine()
    write(system.directories.config, {"config.toml": "n_seq = 0\n"})
    settings, (finding,) = judge_settings(system)
    assert settings == Settings.model_validate({})
    assert (finding.id, finding.level) == ("config-broken", "problem")
    assert "n_seq" in finding.detail
    assert finding.fix


def test_a_broken_catalogue_is_a_finding(machine: Machine) -> None:
    system = machine()
    assert ids(judge_catalog(system)) == []
    write(system.directories.config, {"models.toml": '[models."mine:1b"]\nrepo = "nonsense"\n'})
    (finding,) = judge_catalog(system)
    assert (finding.id, finding.level) == ("catalog-broken", "problem")
    assert "models.toml, line 2: repo of mine:1b is 'nonsense'" in finding.detail


def test_the_settings_in_force_are_used(machine: Machine) -> None:
    system = machine()
    write(system.directories.config, {"config.toml": "n_gpu_layers = 0\n"})
    assert judge_settings(system)[0].n_gpu_layers == 0


def test_mistyped_variables(machine: Machine) -> None:
    _, findings = judge_settings(machine(env={"LOCALLLM_N_CTXX": "8", "LOCALLLM_ZZZZZZZZ": "1", "LOCALLLM_DEBUG": "1"}))
    assert [(f.id, f.level, f.data["variable"]) for f in findings] == [
        ("unknown-variable", "warning", "LOCALLLM_N_CTXX"),
        ("unknown-variable", "warning", "LOCALLLM_ZZZZZZZZ"),
    ]
    assert findings[0].fix == "did you mean LOCALLLM_N_CTX?"
    assert findings[1].fix.startswith("unset LOCALLLM_ZZZZZZZZ")


def test_where_models_are(machine: Machine, tmp_path: Path) -> None:
    system = machine()
    assert models_folder(system, Settings.model_validate({})) == system.directories.models
    assert models_folder(system, Settings.model_validate({"models_dir": str(tmp_path / "m")})) == tmp_path / "m"


@posix
def test_files_that_others_can_change(machine: Machine) -> None:
    system = machine()
    write(system.directories.config, {"config.toml": "", "models/keep": ""})
    system.directories.config_file.chmod(0o666)
    system.directories.models.chmod(0o777)
    findings = list(judge_permissions(system))
    assert ids(findings) == ["unsafe-permissions"] * 2
    paths = (system.directories.config_file, system.directories.models)
    assert {finding.fix for finding in findings} == {f"chmod o-w {path}" for path in paths}
    system.directories.config_file.chmod(0o644)
    system.directories.models.chmod(0o1777)
    assert ids(judge_permissions(system)) == [], "sticky"


@posix
def test_files_of_another_user(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    system = machine()
    write(system.directories.config, {"config.toml": ""})
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    findings = list(judge_permissions(system))
    assert set(ids(findings)) == {"foreign-owner"}
    assert findings[0].fix == f"sudo chown -R 4711 {system.directories.config}"


@pytest.mark.parametrize("where, level", [(Path("/var/lib/x"), "warning"), (Path("~/x"), "problem")])
def test_no_home(machine: Machine, where: Path, level: str) -> None:
    system = machine(env={"HOME": "", "LOCALLLM_HOME": ""})
    system = replace(system, directories=replace(system.directories, data=where))
    (finding,) = judge_variables(system)
    assert (finding.id, finding.level) == ("no-home", level)


def test_secrets_are_named_and_not_shown(machine: Machine) -> None:
    env = {"HF_TOKEN": "hf_secret", "https_proxy": "http://user:secret@proxy:3128", "NO_PROXY": "localhost"}
    findings = list(judge_variables(machine(env=env)))
    assert ids(findings) == ["hub-token", "proxy"]
    assert {finding.level for finding in findings} == {"info"}
    assert findings[1].data == {"variables": ["https_proxy"]}
    assert not any("secret" in str(finding.to_json()) for finding in findings)


ENCODINGS = {"utf-8": [], "UTF8": [], "utf_8": [], None: [], "ascii": ["encoding"], "cp1252": ["encoding"]}


@pytest.mark.parametrize("encoding, found", ENCODINGS.items())
def test_encodings(machine: Machine, encoding: str | None, found: list[str]) -> None:
    assert ids(judge_terminal(machine(), encoding)) == found


@pytest.mark.parametrize(
    "release, files, level",
    [
        ("5.15.153.1-microsoft-standard-WSL2", {"dev/dxg": ""}, "info"),
        ("5.15.153.1-microsoft-standard-WSL2", {}, "info"),
        ("4.4.0-19041-Microsoft", {}, "warning"),
        ("6.8.0-generic", {}, None),
    ],
)
def test_wsl(machine: Machine, release: str, files: dict[str, str], level: str | None) -> None:
    findings = list(judge_terminal(machine({**files, "proc/sys/kernel/osrelease": release + "\n"}), "utf-8"))
    assert [(finding.id, finding.level) for finding in findings] == ([("wsl", level)] if level else [])


@pytest.mark.parametrize(
    "memory, level",
    [
        (Memory(16 * GIB, 8 * GIB), None),
        (Memory(None, None), None),
        (Memory(16 * GIB, 2 * GIB - 1), "warning"),
        (Memory(16 * GIB, GIB // 4), "problem"),
        (Memory(16 * GIB, GIB, 4 * GIB, "memory.max of the control group abc"), "warning"),
    ],
)
def test_low_memory(memory: Memory, level: str | None) -> None:
    findings = list(judge_memory(memory))
    assert [(finding.id, finding.level) for finding in findings] == ([("memory-low", level)] if level else [])
    if memory.limit_origin:
        assert memory.limit_origin in findings[0].detail


def test_readings_that_cannot_be_are_passed_on() -> None:
    (finding,) = judge_memory(Memory(None, None), ("/proc/meminfo reports nonsense",))
    assert (finding.id, finding.title) == ("odd-memory", "/proc/meminfo reports nonsense")


def test_short_paths() -> None:
    home = str(Path("/home/me"))
    assert short(Path("/home/me/.config/x"), {"HOME": home}) == str(Path("~/.config/x"))
    assert short("/home/meg/x", {"HOME": home}) == "/home/meg/x"
    assert short("/x", {}) == "/x"
