"""Wheels made again from what is installed: the same files, installable, and honest about what was changed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest

from localllm.bundle import engine_wheel
from localllm.bundle.engine_wheel import BASELINES, portable_wheel
from localllm.bundle.machine import FEATURES, this_machine
from localllm.bundle.wheels import WheelFile, licence_of, licence_texts, needed, wheel_of
from localllm.errors import LocalLLMError, NotFound, UsageError, VerificationFailed


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", ["psutil", "shellingham", pytest.param("pip", marks=pytest.mark.slow)])
def test_a_wheel_of_an_installed_package_installs_to_the_same_files(tmp_path: Path, package: str) -> None:
    dist = distribution(package)
    wheel = wheel_of(dist, tmp_path)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (again,) = [found for found in Distribution.discover(path=[str(tmp_path / "site")]) if found.metadata["Name"] == dist.metadata["Name"]]
    assert again.read_text("METADATA") == dist.read_text("METADATA")
    old = {
        str(file): file.hash and file.hash.value for file in dist.files or [] if file.suffix != ".pyc" and ".dist-info/" not in str(file)
    }
    new = {
        str(file): file.hash and file.hash.value for file in again.files or [] if file.suffix != ".pyc" and ".dist-info/" not in str(file)
    }
    assert {name: value for name, value in old.items() if not name.startswith("..")} == {
        name: value for name, value in new.items() if not name.startswith("..")
    }


def test_the_same_content_gives_the_same_wheel(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (wheel_of(distribution("tomlkit"), tmp_path / folder) for folder in "ab")
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


INFO = "".join(f"fake-1.dist-info/{name},,\n" for name in ("METADATA", "WHEEL", "RECORD"))


def install_fake(site: Path, *, tag: str = "py3-none-any", record: str | None = None) -> PathDistribution:
    """A package with a script and data beside the packages, as pip leaves it."""
    info = site / "fake-1.dist-info"
    info.mkdir(parents=True)
    (site / "fake.py").write_text("x = 1\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1\n")
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n{tag and 'Tag: ' + tag}\n")
    lines = f"fake.py,sha256=k7wlhDa7wGYTXbFSI6IpMrJGNqrFMPMbnLuWUAxYJfM,6\n{INFO}"
    (info / "RECORD").write_text(lines if record is None else record)
    return PathDistribution(info)


def test_a_file_that_was_changed_is_not_carried(tmp_path: Path) -> None:
    dist = install_fake(tmp_path / "site")
    with pytest.raises(VerificationFailed, match="was changed after it was installed") as caught:
        wheel_of(dist, tmp_path)
    assert "--force-reinstall" in caught.value.hint
    (tmp_path / "site" / "fake.py").unlink()
    with pytest.raises(VerificationFailed, match="incomplete"):
        wheel_of(dist, tmp_path)


@pytest.mark.parametrize(
    "fault", [{"record": ""}, {"tag": "", "record": "fake.py,,\nfake-1.dist-info/WHEEL,,\nfake-1.dist-info/RECORD,,\n"}]
)
def test_a_package_that_did_not_come_as_a_wheel(tmp_path: Path, fault: dict[str, str]) -> None:
    with pytest.raises(LocalLLMError):
        wheel_of(install_fake(tmp_path / "site", **fault), tmp_path)


def test_scripts_lose_this_machine_s_python_and_data_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tmp_path / "prefix"
    site = prefix / "lib" / "site-packages"
    record = f"fake.py,,\n../../bin/tool,,\n../../share/man/tool.1,,\n{INFO}"
    dist = install_fake(site, record=record)
    (prefix / "bin").mkdir()
    (prefix / "bin" / "tool").write_bytes(b"#!/home/me/.venv/bin/python3\nprint(1)\n")
    (prefix / "share" / "man").mkdir(parents=True)
    (prefix / "share" / "man" / "tool.1").write_text("page")
    monkeypatch.setattr(sys, "prefix", str(prefix))
    wheel = wheel_of(dist, tmp_path)
    assert {"fake-1.data/scripts/tool", "fake-1.data/data/share/man/tool.1", "fake.py"} <= names(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("fake-1.data/scripts/tool") == b"#!python\nprint(1)\n"


def test_all_that_localllm_needs_and_nothing_of_its_tests() -> None:
    found = {dist.metadata["Name"].lower() for dist in needed()}
    assert {"localllm", "llama_cpp_python", "numpy", "typer", "pip", "diskcache"} <= {name.replace("-", "_") for name in found}
    assert not found & {"pytest", "ruff", "hypothesis", "fastapi"}


def test_a_missing_dependency_is_named() -> None:
    with pytest.raises(NotFound, match="no-such-package-of-ours"):
        needed("no-such-package-of-ours")


def test_a_given_wheel_stands_in(tmp_path: Path) -> None:
    wheel = wheel_of(distribution("tomlkit"), tmp_path)
    given = WheelFile(wheel)
    assert given in needed(wheels={"tomlkit": given})
    assert given.version == distribution("tomlkit").version
    (tmp_path / "x.whl").write_bytes(b"no zip")
    for path in (tmp_path / "x.whl", tmp_path / "none.whl"):
        with pytest.raises(UsageError, match="not a wheel"):
            WheelFile(path)


def test_licences(tmp_path: Path) -> None:
    dist = distribution("tomlkit")
    assert "MIT" in licence_of(dist)
    (text,) = licence_texts(wheel_of(dist, tmp_path)).values()
    assert b"Permission is hereby granted" in text


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Stands in for pip and a compiler; what they were asked for."""
    calls: list[tuple[tuple[str, ...], dict[str, str]]] = []

    def run_pip(*arguments: str, what: str, env: dict[str, str]) -> None:
        calls.append((arguments, env))
        folder = Path(arguments[arguments.index("--wheel-dir") + 1])
        (folder / "llama_cpp_python-1.0-py3-none-linux_x86_64.whl").write_bytes(b"wheel")

    monkeypatch.setattr(engine_wheel, "run_pip", run_pip)
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on -DGGML_NATIVE=ON")
    return calls


def test_the_engine_is_compiled_portable_once(tmp_path: Path, compiled: list[tuple[tuple[str, ...], dict[str, str]]]) -> None:
    said: list[str] = []
    wheel, features = portable_wheel("1.0", tmp_path, said.append)
    ((arguments, env),) = compiled
    assert "--no-cache-dir" in arguments, "pip's cache would give the wheel of this very CPU"
    assert arguments[-1] == "llama-cpp-python==1.0"
    flags = env["CMAKE_ARGS"].split()
    assert flags.index("-DGGML_NATIVE=OFF") > flags.index("-DGGML_NATIVE=ON") > flags.index("-DGGML_CUDA=on")
    assert features
    assert set(features) <= FEATURES
    assert portable_wheel("1.0", tmp_path, said.append) == (wheel, features)
    assert len(compiled) == 1
    portable_wheel("1.1", tmp_path, said.append)
    assert len(compiled) == 2
    assert "minutes" in said[0]


def test_a_machine_without_a_baseline_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_wheel, "BASELINES", {})
    with pytest.raises(UsageError, match=this_machine().arch):
        portable_wheel("1.0", tmp_path, print)


def test_every_baseline_names_features_that_a_machine_can_tell() -> None:
    assert all(set(features) <= FEATURES for _, features in BASELINES.values())
