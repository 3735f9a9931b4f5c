"""`localllm doctor` as a person or a script meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from localllm.cli.doctor import doctor, show
from localllm.doctor.finding import Finding, worst
from localllm.doctor.offline import cloud_variables
from localllm.doctor.report import Report, examine
from tests.doctor.machines import HEALTHY, WITH_CUDA, Machine, ids, probe_saying
from tests.doctor.test_cards import NVIDIA

H100 = "NVIDIA H100 80GB HBM3"
app = typer.Typer()
app.command()(doctor)


def screen(report: Report, width: int = 80, encoding: str = "utf-8") -> str:
    import io

    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    show(report, {"HOME": "/home/me"}, Console(file=out, width=width, highlight=False, emoji=False))
    out.flush()
    return raw.getvalue().decode(encoding)


@pytest.fixture
def report(machine: Machine) -> Report:
    """Of a machine with an unused card and a mistyped variable."""
    system = machine(NVIDIA, programs=("c++", "nvcc"), env={"LOCALLLM_N_CTXX": "1"})
    report = examine(system, probe=probe_saying(HEALTHY), encoding="utf-8")
    # The disk is that of the machine that runs the tests.
    report = replace(report, findings=tuple(finding for finding in report.findings if finding.area != "disk"))
    assert set(ids(report.findings)) == {"unknown-variable", "cpu-only-engine"}
    return report


def test_the_screen(report: Report) -> None:
    lines = screen(report).splitlines()
    starts = {line.split()[1]: line for line in lines[2:] if line[:2] in ("✓ ", "! ", "✗ ", "· ")}
    assert starts["engine"] == "✓ engine    llama-cpp-python 0.3.36 · CPU"
    assert starts["cards"] == f"✗ cards     {H100} (550.54.15)"
    assert starts["devices"] == "✓ devices   AMD EPYC"
    assert starts["hub"] == "· hub       not asked; --network tries https://huggingface.co"
    assert starts["settings"].startswith("! settings")
    assert f"✗ the engine uses only the CPU, not the {H100}  cpu-only-engine" in lines
    (fix,) = [line for line in lines if "-DGGML_CUDA=on" in line]
    assert fix.startswith("  → CMAKE_ARGS=-DGGML_CUDA=on ")
    assert fix.endswith("llama-cpp-python==0.3.36"), "one line, to be copied"
    # What the user pastes, the header and paths may be longer.
    assert all(len(line) <= 80 for line in lines[1:] if "→" not in line and "/" not in line)
    assert lines.index(next(line for line in lines if "unknown-variable" in line)) < lines.index(fix), "the worst comes last"
    assert lines[-1] == "1 problem, 1 warning"


def test_a_healthy_screen_is_quiet(machine: Machine) -> None:
    report = replace(examine(machine(NVIDIA), probe=probe_saying(WITH_CUDA), encoding="utf-8"), findings=())
    text = screen(report)
    assert text.endswith("\n\nNothing is wrong.\n")
    assert "NVIDIA L4, 20.0 GiB of 23.0 GiB free · AMD EPYC" in text
    assert len(text.splitlines()) < 16


def test_a_dead_engine_leaves_the_rest_standing(machine: Machine) -> None:
    report = examine(machine(), probe=[sys.executable, "-c", "raise SystemExit('libcudart.so.12: cannot open')"], encoding="utf-8")
    text = screen(report)
    assert "✗ engine    does not load" in text
    assert "libcudart.so.12" in text
    assert "✓ devices" not in text
    assert not report.healthy


def test_nothing_found_can_steer_the_terminal(report: Report) -> None:
    nasty = Finding("x", "problem", "disk", "a\x1b[2Jb", "c\x1b]0;d\x07e", "rm \x1b[31mf")
    text = screen(replace(report, findings=(nasty,)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "a␛[2Jb" in text


def test_a_terminal_without_unicode_gets_ascii(report: Report) -> None:
    lines = screen(report, encoding="ascii", width=200).splitlines()
    assert any(line.startswith("x cards") for line in lines if line.isascii())
    assert any(line.startswith("  -> CMAKE_ARGS") for line in lines)


def test_the_json_is_complete(report: Report) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert set(data) == {"version", "healthy", "system", "build", "devices", "cards", "memory", "disk", "hub", "findings"}
    assert data["healthy"] is False
    assert data["build"]["version"] == "0.3.36"
    assert data["devices"][0]["kind"] == "cpu"
    assert data["cards"][0] == {
        "vendor": "NVIDIA",
        "name": H100,
        "driver": "550.54.15",
        "usable": True,
        "integrated": False,
        "backends": ["cuda", "vulkan"],
    }
    assert isinstance(data["disk"][0]["free_bytes"], int)
    assert data["hub"]["asked"] is False
    finding = next(finding for finding in data["findings"] if finding["id"] == "cpu-only-engine")
    assert set(finding) == {"id", "level", "area", "title", "detail", "fix", "data"}


def test_levels() -> None:
    def at(level: Any) -> Finding:
        return Finding("x", level, "a", "t")

    assert worst([]) == "ok"
    assert worst([at("info"), at("ok")]) == "info"
    assert worst([at("warning"), at("problem"), at("info")]) == "problem"


@pytest.mark.parametrize("healthy, code", [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_there_is_a_problem(machine: Machine, monkeypatch: pytest.MonkeyPatch, healthy: bool, code: int) -> None:
    system = machine()
    findings = (Finding("w", "warning", "disk", "w"),) if healthy else (Finding("p", "problem", "disk", "p"),)
    report = replace(examine(system, probe=probe_saying(HEALTHY)), findings=findings)
    asked: list[bool] = []
    monkeypatch.setattr("localllm.doctor.report.examine", lambda system, network, encoding: asked.append(network) or report)
    ran = CliRunner().invoke(app, ["--json"])
    assert ran.exit_code == code
    assert json.loads(ran.stdout)["healthy"] is healthy
    assert CliRunner().invoke(app, ["--network"]).exit_code == code
    assert asked == [False, True]


def test_offline_and_network_exclude_each_other() -> None:
    ran = CliRunner().invoke(app, ["--offline", "--network"])
    assert ran.exception is not None
    assert "exclude each other" in str(ran.exception)


@pytest.mark.parametrize("level, code, said", [("ok", 0, "This machine needs no network."), ("problem", 1, "Not proven")])
def test_the_proof_ends_with_a_verdict(monkeypatch: pytest.MonkeyPatch, level: Any, code: int, said: str) -> None:
    step = Finding("cloud-key", level, "keys", "OPENAI_API_KEY is set", "It opens a cloud model.", "unset OPENAI_API_KEY")
    monkeypatch.setattr("localllm.doctor.offline.prove", lambda system, on_step: iter([step]))
    ran = CliRunner().invoke(app, ["--offline"])
    assert ran.exit_code == code
    assert said in ran.stdout
    assert json.loads(CliRunner().invoke(app, ["--offline", "--json"]).stdout)["proven"] is (level == "ok")


def test_it_can_be_asked_with_broken_settings(home: Path) -> None:
    home.mkdir()
    (home / "config.toml").write_text("n_seq = 0\n")
    ran = CliRunner().invoke(app, [])
    assert ran.exit_code == 1
    assert "config-broken" in ran.stdout


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in cloud_variables(os.environ)}
    command = [sys.executable, "-m", "localllm", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env={**clean, **env}, timeout=200)


@pytest.mark.slow
def test_this_machine() -> None:
    ran = run("--json")
    data = json.loads(ran.stdout)
    assert ran.returncode == (0 if data["healthy"] else 1), ran.stderr
    assert ran.stderr == ""
    assert data["build"]["death"] == ""
    assert data["devices"]
    assert data["memory"]["total_bytes"] > 0
    assert data["hub"]["asked"] is False
    shown = run()
    assert shown.returncode == ran.returncode
    assert "engine" in shown.stdout


@pytest.mark.slow
def test_this_machine_needs_no_network() -> None:
    ran = run("--offline", "--json", LOCALLLM_OFFLINE="true")
    data = json.loads(ran.stdout)
    assert (ran.returncode, data["proven"]) == (0, True), ran.stdout
    demo = next(step for step in data["findings"] if step["id"] == "demo-stays-here")
    assert "Paris" in demo["data"]["answer"]
    assert demo["data"]["connects_outside"] == 0
    assert demo["data"]["processes"] >= 2
    refused = run("--offline", LOCALLLM_OFFLINE="true", OPENAI_API_KEY="sk-x")
    assert refused.returncode == 1
    assert "OPENAI_API_KEY" in refused.stdout
    assert "sk-x" not in refused.stdout
