"""`localllm bundle`: what is printed where, exit codes, and that nothing is written for a bundle that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from localllm.bundle import bootstrap
from localllm.bundle.machine import this_machine
from localllm.cli.bundle import app
from localllm.demo import demo_models
from localllm.errors import DoesNotFit, LocalLLMError, NotFound, UsageError, VerificationFailed
from localllm.library.importing import import_file
from localllm.library.library import Library
from localllm.paths import directories
from tests.bundle.sticks import content, edit, flip


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def ok(*arguments: str | Path) -> Result:
    done = run(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def refused(kind: type[LocalLLMError], *arguments: str | Path) -> LocalLLMError:
    error = run(*arguments).exception
    assert type(error) is kind, error
    return error


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    ok("create", tmp_path / "stick", "--model", "demo-small", "--chunk-size", "100KiB")
    return tmp_path / "stick"


def test_there_and_back(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ok("create", tmp_path / "stick", "-m", "demo", "-m", "demo-small", "--json")
    assert [model["name"] for model in json.loads(made.stdout)["models"]] == ["localllm/demo-large:Q8_0", "localllm/demo-small:Q8_0"]
    assert "unsigned" in made.stderr
    assert ok("verify", tmp_path / "stick").stdout.startswith("ok: ")
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "other"))
    installed = json.loads(ok("install", tmp_path / "stick", "--json").stdout)
    assert [Path(model["path"]).read_bytes() for model in installed["models"]] == [
        demo_models()[name].read_bytes() for name in ("demo-large", "demo-small")
    ]
    assert (installed["runtime"], installed["config"]) == (None, str(tmp_path / "other" / "config.toml"))
    assert 'model = "localllm/demo-large:Q8_0"' in directories().config_file.read_text()
    assert Library().find("localllm/demo-small:Q8_0").sha256s[0]
    assert ok("install", tmp_path / "stick").stdout.count("installed ") == 2


def test_models_are_taken_from_and_put_into_the_folder_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = [tmp_path / "one", tmp_path / "two"]
    monkeypatch.setenv("LOCALLLM_MODELS_DIR", str(disks[0]))
    import_file(Library(), demo_models()["demo-small"], repo="a/b")
    ok("create", tmp_path / "stick", "-m", "a/b")
    monkeypatch.setenv("LOCALLLM_MODELS_DIR", str(disks[1]))
    ok("install", tmp_path / "stick")
    files = [[path.relative_to(disk) for path in disk.rglob("*.gguf")] for disk in disks]
    assert files[0] == files[1] == [Path("a/b/demo-small-q8_0.gguf")]


def test_show(stick: Path) -> None:
    shown = json.loads(ok("show", stick, "--json").stdout)
    assert set(shown) == {"path", "created_by", "created", "signature", "size_bytes", "models", "runtime"}
    assert (shown["signature"], shown["runtime"]) == ("unsigned", None)
    (model,) = shown["models"]
    assert set(model) == {"name", "repo", "commit", "licence", "size_bytes", "files"}
    assert model["size_bytes"] == demo_models()["demo-small"].stat().st_size
    text = ok("show", stick)
    assert "localllm/demo-small:Q8_0" in text.stdout
    assert "UNSIGNED" in text.stderr


def test_a_refused_bundle_leaves_no_trace(stick: Path, home: Path) -> None:
    before = content(home)
    flip(stick)
    refused(VerificationFailed, "verify", stick)
    refused(VerificationFailed, "install", stick)
    flip(stick)
    edit(stick, lambda raw: raw["models"][0]["files"][0].update(path="a/../../x.gguf"))
    refused(VerificationFailed, "install", stick, "--quick")
    refused(NotFound, "install", stick / "weights")
    assert content(home) == before


def test_signed_and_checked(tmp_path: Path) -> None:
    public = ok("keygen", tmp_path / "key").stdout.strip()
    ok("create", tmp_path / "stick", "-m", "demo-small", "--sign", tmp_path / "key")
    assert public in ok("verify", tmp_path / "stick", "--key", tmp_path / "key.pub").stderr
    assert json.loads(ok("verify", tmp_path / "stick", "--key", public, "--json").stdout)["signature"] == "trusted"
    assert "WARNING" in ok("show", tmp_path / "stick").stderr
    refused(VerificationFailed, "install", tmp_path / "stick", "--key", "ab" * 32)
    refused(UsageError, "install", tmp_path / "stick", "--key", "nonsense")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--native", "-m", "demo"],
        ["-m", "demo", "--chunk-size", "5GiB"],
        ["-m", "demo", "--chunk-size", "big"],
        ["-m", "demo", "--chunk-size", "0"],
    ],
)
def test_create_with_nonsense(tmp_path: Path, arguments: list[str]) -> None:
    refused(UsageError, "create", tmp_path / "stick", *arguments)
    assert not (tmp_path / "stick").exists()


def test_a_folder_that_is_no_bundle_is_refused_before_anything_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_for_minutes(*_: object, **__: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr("localllm.bundle.runtime.collect", compile_for_minutes)
    (tmp_path / "thesis.doc").touch()
    refused(UsageError, "create", tmp_path, "--with-runtime")
    refused(NotFound, "create", tmp_path / "stick", "--with-runtime", "--sign", tmp_path / "no key")


def test_create_of_an_unknown_model(tmp_path: Path) -> None:
    refused(NotFound, "create", tmp_path / "stick", "-m", "nonesuch")
    assert not (tmp_path / "stick").exists()


@pytest.fixture
def runtime(stick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stick holds a runtime, too; instead of installing it, this list says what would be done."""
    from dataclasses import asdict, replace
    from hashlib import sha256

    from localllm.bundle.wheels import Member, write_wheel

    (stick / "wheels").mkdir()
    wheel = stick / "wheels" / "a-1-py3-none-any.whl"
    write_wheel(wheel, "a-1.dist-info", [Member("a.py", lambda: b"")])
    piece = {"file": "wheels/a-1-py3-none-any.whl", "size_bytes": wheel.stat().st_size, "sha256": sha256(wheel.read_bytes()).hexdigest()}

    def add(raw: dict[str, Any]) -> None:
        raw.update(wheels=[piece], platform=asdict(replace(this_machine(), python=python)))

    python = this_machine().python
    edit(stick, add)
    done: list[str] = []
    monkeypatch.setattr(bootstrap, "install_runtime", lambda bundle, target: done.append(f"installed {target}") or target / "python")
    monkeypatch.setattr(bootstrap, "prove", lambda python: done.append("proved"))
    return done


def test_the_runtime_comes_too_unless_told(stick: Path, runtime: list[str], home: Path, tmp_path: Path) -> None:
    assert json.loads(ok("install", stick, "--models-only", "--json").stdout)["runtime"] is None
    assert not runtime
    assert json.loads(ok("install", stick, "--json").stdout)["runtime"] == str(home / "venv")
    ok("install", stick, "--venv", tmp_path / "elsewhere")
    assert runtime == [f"installed {home / 'venv'}", "proved", f"installed {tmp_path / 'elsewhere'}", "proved"]


def test_a_mismatch_is_refused_before_anything_is_written(stick: Path, runtime: list[str], home: Path) -> None:
    edit(stick, lambda raw: raw["platform"].update(python="2.7", cpu_features=["levitation"]))
    before = content(home)
    error = refused(DoesNotFit, "install", stick)
    assert "2.7" in error.message
    assert content(home) == before
    assert not runtime
    ok("install", stick, "--models-only")
