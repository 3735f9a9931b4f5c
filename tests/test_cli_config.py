from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from localllm.cli.app import main
from localllm.settings import Settings


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `localllm config …` in this process."""

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["localllm", "config", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    return run


Config = Callable[..., Ran]


def test_show_prints_every_setting(config: Config) -> None:
    ran = config("show")
    assert ran.code == 0
    assert [line.split(" = ")[0] for line in ran.out.splitlines()] == list(Settings.model_fields)
    assert 'model = "demo"' in ran.out.splitlines()
    assert json.loads(config("show", "--json").out) == Settings().model_dump()


def test_show_origin(config: Config, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config("set", "n_seq", "3")
    monkeypatch.setenv("LOCALLLM_N_CTX", "512")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("LOCALLLM_NCTX", "512")
    origins = json.loads(config("show", "--origin", "--json").out)
    assert origins["n_seq"] == {"value": 3, "origin": str(home / "config.toml")}
    assert origins["n_ctx"] == {"value": 512, "origin": "LOCALLLM_N_CTX"}
    assert origins["color"] == {"value": False, "origin": "NO_COLOR"}
    assert origins["model"]["origin"] == "default"
    ran = config("show", "--origin")
    assert any(line.startswith("n_ctx = 512 ") and line.endswith("# LOCALLLM_N_CTX") for line in ran.out.splitlines())
    assert "LOCALLLM_NCTX matches no setting" in ran.err


def test_set_get_unset(config: Config, home: Path) -> None:
    assert config("path").out.strip() == str(home / "config.toml")
    assert config("get", "n_ctx").out == "0\n"
    assert config("set", "n_ctx", "4096") == Ran(0, "", "")
    assert config("get", "n_ctx").out == "4096\n"
    assert config("get", "color").out == "true\n"
    assert config("unset", "n_ctx").code == 0
    assert config("get", "n_ctx").out == "0\n"
    again = config("unset", "n_ctx")
    assert again.code == 3
    assert "does not set n_ctx" in again.err


def test_set_says_when_it_has_no_effect(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALLLM_N_CTX", "512")
    assert config("set", "n_ctx", "1024").err == "warning: LOCALLLM_N_CTX overrides it\n"


@pytest.mark.parametrize(
    "arguments, message, hint",
    [
        (["set", "n_seq", "0"], "n_seq = '0'", "Requests decoded at once"),
        (["set", "n_thread", "2"], "n_thread is no setting", "n_threads"),
        (["get", "nonsense"], "nonsense is no setting", "config show"),
    ],
)
def test_mistakes_are_two_lines_and_exit_2(config: Config, home: Path, arguments: list[str], message: str, hint: str) -> None:
    ran = config(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    first, second = ran.err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second.startswith("hint: ")
    assert hint in second
    assert not home.exists(), "nothing was written"


def editor(code: str) -> str:
    return shlex.join([sys.executable, "-c", f"import sys, pathlib; file = pathlib.Path(sys.argv[1])\n{code}"])


@pytest.mark.skipif(sys.platform == "win32", reason="shell quoting")
def test_edit_starts_from_a_template_and_checks_the_result(config: Config, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", editor("assert '# n_ctx = 0' in file.read_text(); file.write_text('n_ctx = 77')"))
    assert config("edit").code == 0
    assert config("get", "n_ctx").out == "77\n"
    monkeypatch.setenv("EDITOR", editor("file.write_text('n_seq = 0')"))
    ran = config("edit")
    assert ran.code == 2
    assert f"{home / 'config.toml'}: n_seq = 0" in ran.err
    monkeypatch.setenv("EDITOR", editor("sys.exit(5)"))
    assert "ended with code 5" in config("edit").err
    monkeypatch.setenv("EDITOR", "/no/such/editor")
    assert "set EDITOR" in config("edit").err


def test_unwritable_file_is_an_error_not_a_traceback(config: Config, home: Path) -> None:
    (home / "config.toml").mkdir(parents=True)
    ran = config("show")
    assert ran.code == 2
    assert ran.err.startswith(f"error: cannot read {home / 'config.toml'}")
    assert "Traceback" not in ran.err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_error() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "localllm", "config", "show"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.close()
    _, err = child.communicate()
    assert err == ""


def test_an_unexpected_error_is_one_line_unless_debugging(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("localllm.settings.load", broken)
    ran = config("show")
    assert ran.code == 1
    assert ran.err.startswith("error: unexpected: ZeroDivisionError: by zero\nhint: ")
    monkeypatch.setenv("LOCALLLM_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["localllm", "config", "show"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_interrupted_is_130(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("localllm.settings.load", interrupted)
    assert config("show").code == 130
