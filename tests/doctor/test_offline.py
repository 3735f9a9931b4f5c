"""`doctor --offline`: each step succeeds on a good machine and fails on one where it must."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from localllm.demo import demo_models
from localllm.doctor.finding import Finding
from localllm.doctor.guard import Guarded, control, run_guarded
from localllm.doctor.offline import (
    SUMS,
    Proof,
    cloud_variables,
    demo_sums,
    judge_control,
    judge_demo,
    judge_demo_files,
    judge_flags,
    judge_isolation,
    judge_keys,
    judge_models,
    prove,
    secret_settings,
)
from localllm.doctor.system import System
from localllm.library import Library
from localllm.library.hashing import sha256_of
from localllm.settings import Settings
from tests.doctor.machines import Machine, ids, write

SETTINGS = Settings.model_validate({})
FOLDER = demo_models()["demo"].parent
WORKER = "subprocess.run([sys.executable, '-P', '-c', 'pass', 'localllm.worker', 'engine'], check=True)\n"
ANSWER = "print(json.dumps({'answer': 'Paris'}))\n"


def a_demo(code: str, *flags: str) -> list[str]:
    return [sys.executable, *flags, "-c", f"import json, os, socket, subprocess, sys\n{code}"]


@pytest.fixture
def system() -> System:
    """This machine, in the directories of this test."""
    return System.here()


def silent(text: str) -> None: ...


def test_the_shipped_hashes_are_those_of_the_files() -> None:
    assert demo_sums(FOLDER) == {path.name: sha256_of(path) for path in set(demo_models().values())}
    assert judge_demo_files().level == "ok"


def damage(path: Path) -> None:
    """Change one byte and keep size and time, as a bad disk does."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


HARMS: dict[str, Callable[[Path], object]] = {
    "one bit": lambda folder: damage(folder / "demo-small-q8_0.gguf"),
    "a file is gone": lambda folder: (folder / "demo-small-q8_0.gguf").unlink(),
    "the list is gone": lambda folder: (folder / SUMS).unlink(),
    "the list is empty": lambda folder: (folder / SUMS).write_text(""),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_damaged_demo_files(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(FOLDER, folder)
    assert judge_demo_files(folder).level == "ok"
    harm(folder)
    assert (judge_demo_files(folder).id, judge_demo_files(folder).level) == ("demo-damaged", "problem")


@pytest.fixture
def library(home: Path) -> Library:
    """With one model, recorded as an import."""
    library = Library()
    file = library.root / "me" / "tiny" / "tiny-Q8_0.gguf"
    file.parent.mkdir(parents=True)
    shutil.copy(demo_models()["demo-small"], file)
    library.record(file, how="imported", sha256s={file: sha256_of(file)})
    return library


def test_models_that_match(library: Library) -> None:
    said: list[str] = []
    (finding,) = judge_models(library, said.append)
    assert (finding.id, finding.level, finding.data) == ("models-match", "ok", {"files": 1})
    assert said[-1] == "reading me/tiny:Q8_0, 100%"


@pytest.mark.parametrize("touched", [False, True])
def test_a_changed_model_is_found(library: Library, touched: bool) -> None:
    (model,) = [model for model in library.models() if model.how == "imported"]
    damage(model.path)
    if touched:
        os.utime(model.path)
    findings = {finding.id: finding for finding in judge_models(library, silent)}
    assert findings["model-changed"].level == "problem"
    assert findings["model-changed"].data["sha256"] == sha256_of(model.path)
    assert "me/tiny:Q8_0" in findings["model-changed"].fix


def test_a_model_with_missing_parts_is_found(library: Library) -> None:
    (model,) = [model for model in library.models() if model.how == "imported"]
    model.path.rename(model.path.with_name("tiny-Q8_0-00001-of-00002.gguf"))
    findings = {finding.id: finding.level for finding in judge_models(library, silent)}
    assert findings["model-broken"] == "problem"


def test_a_model_without_a_hash_is_not_taken_for_good(library: Library) -> None:
    shutil.copy(demo_models()["demo-large"], library.root / "me" / "tiny" / "other-Q8_0.gguf")
    findings = {finding.id: finding for finding in judge_models(library, silent)}
    assert findings["models-match"].data == {"files": 1}
    assert findings["models-without-hash"].level == "info"
    assert len(findings["models-without-hash"].data["models"]) == 1
    assert ids(judge_models(library, silent)) == list(findings), "looking recorded nothing"


def test_an_empty_library_is_fine(system: System) -> None:
    assert [(finding.id, finding.level) for finding in judge_models(Library(), silent)] == [("models-match", "ok")]


@pytest.mark.parametrize(
    "name, is_key",
    [
        ("OPENAI_API_KEY", True),
        ("ANTHROPIC_API_KEY", True),
        ("ANTHROPIC_AUTH_TOKEN", True),
        ("OPENROUTER_API_KEY", True),
        ("AZURE_OPENAI_API_KEY", True),
        ("LOCALLLM_OPENAI_API_KEY", True),
        ("AWS_BEARER_TOKEN_BEDROCK", True),
        ("OPENAI_BASE_URL", False),
        ("SSH_KEY", False),
        ("HF_TOKEN", False),
        ("API_KEY", False),
    ],
)
def test_variables_that_open_a_cloud(name: str, is_key: bool) -> None:
    assert cloud_variables({name: "sk-secret", "PATH": "/bin"}) == ([name] if is_key else [])
    assert cloud_variables({name: ""}) == []


def test_keys_in_the_settings_file() -> None:
    table = {"cloud": {"api_key": "sk-1", "openai": {"token": "t", "api_key": ""}}, "max_tokens": "5", "model": "x", "secret": "s"}
    assert secret_settings(table) == ["cloud.api_key", "cloud.openai.token", "secret"]


def test_keys_are_named_and_never_shown(machine: Machine) -> None:
    system = machine(env={"OPENAI_API_KEY": "sk-hidden"})
    write(system.directories.config, {"config.toml": '[cloud]\napi_key = "sk-hidden"\n'})
    findings = list(judge_keys(system))
    assert [(f.id, f.level) for f in findings] == [("cloud-key", "problem")] * 2
    assert [f.title for f in findings] == ["OPENAI_API_KEY is set", "cloud.api_key is set"]
    assert "sk-hidden" not in str([f.to_json() for f in findings])
    assert ids(judge_keys(machine(env={"OPENAI_API_KEY": ""}))) == ["cloud-key"], "the file's"


def test_no_keys(machine: Machine) -> None:
    assert ids(judge_keys(machine())) == ["no-cloud-key"]


def test_flags(machine: Machine) -> None:
    assert [(f.id, f.level) for f in judge_flags(machine(), SETTINGS)] == [("not-offline", "problem"), ("telemetry-off", "ok")]
    system = machine(env={"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"})
    flag, telemetry = judge_flags(system, SETTINGS)
    assert (flag.id, flag.data) == ("offline-flag", {"by": ["HF_HUB_OFFLINE"]})
    assert telemetry.data == {"by": ["DO_NOT_TRACK"]}
    assert ids(judge_flags(machine(), Settings.model_validate({"offline": True})))[0] == "offline-flag"


def test_a_guard_that_sees_nothing_is_a_problem(system: System) -> None:
    assert judge_control(control(system.env)).id == "guard-works"
    blind = run_guarded([sys.executable, "-I", "-c", "raise SystemExit(1)"], system.env, 60)
    assert (judge_control(blind).id, judge_control(blind).level) == ("guard-broken", "problem")
    assert judge_control(Guarded(0, "", "", {}, control(system.env).attempts, False)).level == "problem", "seen but not refused"


def test_isolation_is_told() -> None:
    assert judge_isolation(["unshare"]).level == "ok"
    assert judge_isolation([]).level == "info"


def test_a_demo_that_stays_here(system: System) -> None:
    finding = judge_demo(system, a_demo(WORKER + ANSWER), [])
    assert (finding.id, finding.level) == ("demo-stays-here", "ok")
    assert finding.data["answer"] == "Paris"
    assert (finding.data["connects_outside"], finding.data["connects_loopback"], finding.data["processes"]) == (0, 0, 2)
    assert "0 connects outside this machine (0 loopback)" in finding.title


@pytest.mark.parametrize(
    "command, ident",
    [
        (a_demo("try: socket.socket().connect(('192.0.2.1', 80))\nexcept OSError: pass\n" + WORKER + ANSWER), "demo-connects"),
        (a_demo(WORKER.replace("pass", 'import socket; socket.getaddrinfo("example.invalid", 1)') + ANSWER), "demo-connects"),
        (a_demo(WORKER + "sys.exit('no such model')"), "demo-failed"),
        (a_demo(WORKER + "print('Paris')"), "demo-failed"),
        (a_demo(WORKER + "print('{}')"), "demo-failed"),
        (a_demo(WORKER + ANSWER, "-I"), "demo-unwatched"),
        (a_demo(ANSWER), "demo-unwatched"),
        (a_demo(WORKER.replace("'-P'", "'-I'") + ANSWER), "demo-unwatched"),
    ],
)
def test_demos_that_prove_nothing(system: System, command: list[str], ident: str) -> None:
    finding = judge_demo(system, command, [])
    assert (finding.id, finding.level) == (ident, "problem")
    assert finding.fix


@pytest.mark.skipif(sys.platform == "win32", reason="pause")
def test_a_demo_that_hangs(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localllm.doctor.offline.DEMO_TIMEOUT_S", 0.1)
    finding = judge_demo(system, a_demo("import signal; signal.pause()"), [])
    assert (finding.id, finding.level) == ("demo-failed", "problem")


def test_one_problem_and_nothing_is_proven() -> None:
    good, bad = Finding("a", "ok", "x", "a"), Finding("b", "problem", "x", "b")
    hint = Finding("c", "info", "x", "c")
    assert Proof((good, hint)).proven
    assert not Proof((good, bad, hint)).proven
    assert json.loads(json.dumps(Proof((bad,)).to_json()))["findings"][0]["id"] == "b"


def test_all_steps_come_in_order(home: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cloud_variables(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCALLLM_OFFLINE", "true")
    steps = list(prove(System.here(), demo=a_demo(WORKER + ANSWER), words=[]))
    assert [(step.id, step.level) for step in steps] == [
        ("demo-matches", "ok"),
        ("models-match", "ok"),
        ("no-cloud-key", "ok"),
        ("offline-flag", "ok"),
        ("telemetry-off", "ok"),
        ("guard-works", "ok"),
        ("no-isolation", "info"),
        ("demo-stays-here", "ok"),
    ]
    (home / "config.toml").write_text("n_seq = 0\n")
    assert next(prove(System.here(), words=[])).id == "config-broken"
