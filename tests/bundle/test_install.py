"""Installing models from a bundle: whole or not at all, resumable, and nothing written for a bad one."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from localllm.bundle import bootstrap
from localllm.bundle.bootstrap import MARKER, check_environment, check_platform, default_environment, install_runtime
from localllm.bundle.install import install_config, install_models, plan
from localllm.bundle.machine import this_machine
from localllm.bundle.manifest import Platform, Refused
from localllm.bundle.stick import Contents, Runtime
from localllm.bundle.verify import open_bundle
from localllm.errors import DoesNotFit, ModelError, UsageError, VerificationFailed
from localllm.library.library import Library
from localllm.library.model import LocalModel
from tests.bundle.sticks import CHUNK_BYTES, content, edit, flip, make, model_bytes, source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    make(tmp_path / "stick", source(tmp_path / "a", "one"), source(tmp_path / "b", "two", seed=1))
    return tmp_path / "stick"


def install(stick: Path, library: Library) -> list[LocalModel]:
    bundle = open_bundle(stick)
    return install_models(bundle, library, plan(bundle, library))


def target(library: Library, name: str = "one") -> Path:
    return library.root / "pub" / name / f"{name}-Q4_0.gguf"


def test_round_trip(stick: Path) -> None:
    library = Library()
    one, two = install(stick, library)
    assert target(library, "one").read_bytes() == model_bytes(0)
    assert target(library, "two").read_bytes() == model_bytes(1)
    assert (one.name, one.repo, one.commit) == ("pub/one:Q4_0", "pub/name", "0" * 40)
    assert one.sha256s == (hashlib.sha256(model_bytes(0)).hexdigest(),)
    assert library.find("two").path == two.path
    assert {path.suffix for path in library.root.rglob("*") if path.is_file()} == {".gguf"}


def test_again_it_changes_nothing(stick: Path) -> None:
    library = Library()
    install(stick, library)
    inode = target(library).stat().st_ino
    assert all(step.there for step in plan(open_bundle(stick), library))
    install(stick, library)
    assert target(library).stat().st_ino == inode


KILLED = """
import os, signal, sys
from pathlib import Path
from localllm.bundle.install import install_models, plan
from localllm.bundle.verify import open_bundle
from localllm.library.library import Library

def die(what, done, total):
    if done >= 3000:
        os.kill(os.getpid(), signal.SIGKILL)

bundle, library = open_bundle(Path(sys.argv[1])), Library()
install_models(bundle, library, plan(bundle, library), die)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills with a signal")
def test_killed_and_run_again_it_copies_only_what_is_missing(stick: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(stick)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    library = Library()
    assert not target(library).exists()
    part = target(library).with_name(f"{target(library).name}.part")
    kept = part.stat().st_size // CHUNK_BYTES
    assert kept >= 2
    # Whoever copied one of these again would copy nonsense and fail.
    bundle = open_bundle(stick)
    for chunk in bundle.manifest.models[0].files[0].chunks[:kept]:
        (stick / chunk.file).write_bytes(b"x" * CHUNK_BYTES)
    install_models(bundle, library, plan(bundle, library))
    assert target(library).read_bytes() == model_bytes(0)
    assert not part.exists()


def test_a_part_with_wrong_bytes_is_mended(stick: Path) -> None:
    library = Library()
    part = target(library).with_name(f"{target(library).name}.part")
    part.parent.mkdir(parents=True)
    data = bytearray(model_bytes(0))
    data[1500] ^= 1
    part.write_bytes(bytes(data) + b"too long")
    install(stick, library)
    assert target(library).read_bytes() == model_bytes(0)


@pytest.mark.skipif(os.name == "nt", reason="makes a link")
def test_a_part_that_is_a_link_is_not_written_through(stick: Path, tmp_path: Path) -> None:
    library = Library()
    (tmp_path / "precious").write_bytes(b"mine")
    part = target(library).with_name(f"{target(library).name}.part")
    part.parent.mkdir(parents=True)
    part.symlink_to(tmp_path / "precious")
    install(stick, library)
    assert (tmp_path / "precious").read_bytes() == b"mine"


def test_a_chunk_that_went_bad_since_it_was_checked(stick: Path) -> None:
    bundle, library = open_bundle(stick), Library()
    flip(stick)
    with pytest.raises(VerificationFailed, match="damaged"):
        install_models(bundle, library, plan(bundle, library))
    assert not target(library).exists()
    flip(stick)
    install_models(bundle, library, plan(bundle, library))
    assert target(library).read_bytes() == model_bytes(0)


def test_right_chunks_of_a_wrong_file(stick: Path) -> None:
    edit(stick, lambda raw: raw["models"][0]["files"][0].update(sha256="0" * 64))
    library = Library()
    with pytest.raises(VerificationFailed, match="not the file that was bundled"):
        install(stick, library)
    assert not [path for path in library.root.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_what_is_no_model_gets_no_name(tmp_path: Path) -> None:
    evil = source(tmp_path / "a")
    evil.files[0].path.write_bytes(b"GGUF" + b"\xff" * (evil.files[0].size_bytes - 4))
    make(tmp_path / "stick", evil)
    library = Library()
    with pytest.raises(ModelError):
        install(tmp_path / "stick", library)
    assert not [path for path in library.root.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_another_file_in_the_place_stays(stick: Path, home: Path) -> None:
    library = Library()
    target(library, "two").parent.mkdir(parents=True)
    target(library, "two").write_bytes(b"GGUF mine")
    before = content(home)
    with pytest.raises(UsageError, match="is another file"):
        install(stick, library)
    assert content(home) == before


def test_room_is_checked_before_anything_is_written(stick: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 7000})())
    with pytest.raises(DoesNotFit, match="bundle's models"):
        install(stick, Library())
    assert not home.exists()


def test_one_at_a_time(stick: Path) -> None:
    from filelock import FileLock

    library = Library()
    target(library).parent.mkdir(parents=True)
    with FileLock(f"{target(library)}.lock"), pytest.raises(UsageError, match="another localllm"):
        install(stick, library)
    install(stick, library)


def test_settings_are_taken_over_only_where_there_are_none(tmp_path: Path) -> None:
    from localllm.bundle.create import create

    create(tmp_path / "stick", Contents((), config=b"n_ctx = 7\n"))
    bundle, file = open_bundle(tmp_path / "stick"), tmp_path / "home" / "config.toml"
    assert install_config(bundle, file)
    assert file.read_bytes() == b"n_ctx = 7\n"
    file.write_bytes(b"n_ctx = 8\n")
    assert not install_config(bundle, file)
    assert file.read_bytes() == b"n_ctx = 8\n"


def with_wheel(tmp_path: Path, platform: Platform) -> Path:
    from localllm.bundle.create import create
    from localllm.bundle.wheels import Member, write_wheel

    wheel = tmp_path / "a-1-py3-none-any.whl"
    write_wheel(wheel, "a-1.dist-info", [Member("a.py", lambda: b"")])
    create(tmp_path / "stick", Contents((), Runtime((wheel,), platform, {})))
    return tmp_path / "stick"


def test_a_runtime_for_another_machine_is_refused(tmp_path: Path) -> None:
    here = this_machine()
    check_platform(open_bundle(with_wheel(tmp_path, here)))
    bundle = open_bundle(with_wheel(tmp_path, Platform("plan9", here.arch, here.libc, "99.0", "2.7", ("levitation",))))
    with pytest.raises(Refused) as caught:
        check_platform(bundle)
    assert caught.value.exit_code == 4
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["operating system", "Python", here.libc, "CPU"]
    with pytest.raises(Refused) as caught:
        check_platform(open_bundle(with_wheel(tmp_path, Platform(here.os, here.arch, here.libc, "", "2.7", ()))))
    assert caught.value.hint == "run it with python2.7"


def test_models_alone_are_for_every_machine(stick: Path) -> None:
    with pytest.raises(Refused, match="models only"):
        check_platform(open_bundle(stick))


def test_the_environment_takes_no_folder_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(with_wheel(tmp_path, this_machine()))
    taken = tmp_path / "taken"
    taken.mkdir()
    check_environment(taken, bundle)
    (taken / "thesis.doc").touch()
    with pytest.raises(Refused, match="no Python environment"):
        check_environment(taken, bundle)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1})())
    with pytest.raises(Refused, match="are free"):
        check_environment(tmp_path / "new" / "er", bundle)
    assert default_environment({"LOCALLLM_HOME": str(tmp_path)}) == tmp_path / "venv"
    monkeypatch.setattr("sys.prefix", str(tmp_path / "running"))
    with pytest.raises(Refused, match="runs from"):
        check_environment(tmp_path / "running", bundle)


def test_an_environment_that_was_cut_off_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, target = open_bundle(with_wheel(tmp_path, this_machine())), tmp_path / "new" / "venv"
    runs: list[Path] = []
    monkeypatch.setattr(bootstrap, "_install_wheels", lambda bundle, python: runs.append(python))
    python = install_runtime(bundle, target)
    assert subprocess.run([python, "-I", "-c", "import sys; sys.exit(sys.prefix == sys.base_prefix)"]).returncode == 0
    (target / "installed").touch()
    assert install_runtime(bundle, target) == python
    assert (len(runs), (target / "installed").exists()) == (1, True)
    (target / MARKER).write_text("unfinished")
    check_environment(target, bundle)
    install_runtime(bundle, target)
    assert (len(runs), (target / "installed").exists()) == (2, False)


def test_an_environment_of_the_user_s_own_is_not_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, target = open_bundle(with_wheel(tmp_path, this_machine())), tmp_path / "venv"
    monkeypatch.setattr(bootstrap, "_install_wheels", lambda bundle, python: None)
    target.mkdir()
    (target / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (target / "mine").touch()
    for _ in range(2):
        check_environment(target, bundle)
        install_runtime(bundle, target)
        assert (target / "mine").exists()
