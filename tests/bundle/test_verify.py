"""Checking a bundle: every kind of damage and mischief is found, by localllm and by the stick's own program, and nothing is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm.bundle import verify as module
from localllm.bundle.manifest import MANIFEST, SIGNATURE, Platform, Refused
from localllm.bundle.sign import generate
from localllm.bundle.stick import Contents, Runtime
from localllm.bundle.verify import check_hashes, open_bundle
from tests.bundle.sticks import CHUNK_BYTES, chunk, content, edit, flip, make, source


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    make(tmp_path / "stick", source(tmp_path / "a"))
    return tmp_path / "stick"


def replace_by_link(root: Path) -> None:
    path = chunk(root)
    shutil.move(path, root / "there")
    path.symlink_to(root / "there")


def replace_folder_by_link(root: Path) -> None:
    (root / "weights").rename(root / "there")
    (root / "weights").symlink_to(root / "there")


def replace_by_pipe(root: Path) -> None:
    path = chunk(root)
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(root: Path) -> None:
    path = chunk(root)
    path.unlink()
    path.mkdir()


def cut(root: Path) -> None:
    os.truncate(chunk(root), CHUNK_BYTES - 1)


def grow(root: Path) -> None:
    os.truncate(chunk(root), CHUNK_BYTES + 1)


def swap(root: Path) -> None:
    """Two chunks of the same size, each right, in each other's place."""
    first, second = chunk(root, 1), chunk(root, 2)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def flip_in_a_program(root: Path) -> None:
    path = root / "localllm_bundle" / "verify.py"
    path.write_bytes(path.read_bytes()[:-1] + b" ")


def reorder(root: Path) -> None:
    """Every chunk is right, and so is every sum; only the whole is not."""
    edit(root, lambda raw: raw["models"][0]["files"][0]["chunks"].__setitem__(slice(1, 3), raw["models"][0]["files"][0]["chunks"][2:0:-1]))


CHEAP: list[tuple[Callable[[Path], object], str]] = [
    (replace_by_link, "is a link"),
    (replace_folder_by_link, "weights is a link"),
    (replace_by_pipe, "not a plain file"),
    (replace_by_folder, "not a plain file"),
    (cut, "has 999 bytes, not 1,000"),
    (grow, "has 1,001 bytes, not 1,000"),
    (lambda root: chunk(root).unlink(), "is missing"),
    (lambda root: shutil.rmtree(root / "weights"), "is missing"),
    (lambda root: (root / MANIFEST).unlink(), "no bundle"),
    (lambda root: ((root / MANIFEST).rename(root / "m"), (root / MANIFEST).symlink_to(root / "m")), "cannot read"),
    (lambda root: (root / SIGNATURE).write_text("{}"), "not readable"),
    (lambda root: (root / SIGNATURE).write_text("[" * 5000), "not readable"),
    (lambda root: edit(root, lambda raw: raw["models"][0]["files"][0].update(path="../../../.bashrc")), "leaves its folder"),
]
COSTLY: list[tuple[Callable[[Path], object], str]] = [
    (swap, "damaged"),
    (flip, "damaged"),
    (flip_in_a_program, "damaged"),
    (reorder, "not the file"),
]


@pytest.mark.skipif(os.name == "nt", reason="makes links and pipes")
@pytest.mark.parametrize("harm, reason", CHEAP)
def test_found_without_reading_the_weights(stick: Path, harm: Callable[[Path], object], reason: str) -> None:
    harm(stick)
    with pytest.raises(Refused, match=reason):
        open_bundle(stick)


@pytest.mark.parametrize("harm, reason", COSTLY)
def test_found_by_reading_everything(stick: Path, harm: Callable[[Path], object], reason: str) -> None:
    harm(stick)
    bundle = open_bundle(stick)
    with pytest.raises(Refused, match=reason) as caught:
        check_hashes(bundle)
    assert caught.value.exit_code == 6


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_any_flipped_bit_is_found(stick: Path, data: st.DataObject) -> None:
    pieces = list(open_bundle(stick).manifest.pieces)
    path = stick / data.draw(st.sampled_from(pieces)).file
    before = path.read_bytes()
    bit = data.draw(st.integers(0, len(before) * 8 - 1))
    after = bytearray(before)
    after[bit // 8] ^= 1 << bit % 8
    path.write_bytes(after)
    try:
        with pytest.raises(Refused, match="damaged"):
            check_hashes(open_bundle(stick))
    finally:
        path.write_bytes(before)


def test_every_damage_is_named(stick: Path) -> None:
    flip(stick)
    flip_in_a_program(stick)
    with pytest.raises(Refused) as caught:
        check_hashes(open_bundle(stick))
    assert len(caught.value.problems) == 2


def run(stick: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The stick's own program, without localllm: isolated from this environment's packages."""
    command = [sys.executable, "-I", "-S", str(stick / "verify.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env={})


def test_on_the_stick_itself(stick: Path) -> None:
    before = content(stick)
    done = run(stick)
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "ok"), done.stderr
    assert "UNSIGNED" in done.stderr
    flip(stick)
    done = run(stick)
    assert done.returncode == 6
    assert f"error: weights/{chunk(stick).name} is damaged" in done.stderr
    flip(stick)
    assert content(stick) == before, "checking wrote to the stick"


def test_on_the_stick_with_a_key(stick: Path, tmp_path: Path) -> None:
    public = generate(tmp_path / "key")
    assert run(stick, "--key", public).returncode == 6
    make(stick, source(tmp_path / "a"), key=tmp_path / "key")
    done = run(stick, "--key", public)
    assert (done.returncode, "trusted" in done.stderr) == (0, True)
    assert run(stick, "--key", generate(tmp_path / "other")).returncode == 6
    assert run(stick, "--key", "no such file").returncode == 2


def with_wheel(tmp_path: Path, entries: list[tuple[str, int]]) -> Path:
    from localllm.bundle.create import create

    wheel = tmp_path / "evil-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, attributes in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = attributes << 16
            archive.writestr(entry, b"content")
    platform = Platform("linux", "x86_64", "glibc", "2.1", "3.11", ())
    create(tmp_path / "stick", Contents((), Runtime((wheel,), platform, {})))
    return tmp_path / "stick"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "entries, reason",
    [
        ([("../evil.py", 0o100644)], "leaves its folder"),
        ([("a/../../evil.py", 0o100644)], "leaves its folder"),
        ([("/etc/evil", 0o100644)], "leaves its folder"),
        ([("C:/evil", 0o100644)], "leaves its folder"),
        ([("a\\..\\evil", 0o100644)], "leaves its folder"),
        ([("link", 0o120777)], "holds a link"),
        ([("a.py", 0o100644), ("a.py", 0o100644)], "twice"),
    ],
)
def test_a_wheel_that_would_write_elsewhere(tmp_path: Path, entries: list[tuple[str, int]], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        open_bundle(with_wheel(tmp_path, entries))


def test_a_wheel_that_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stick = with_wheel(tmp_path, [("a", 0o100644), ("b", 0o100644)])
    open_bundle(stick)
    monkeypatch.setattr(module, "MAX_UNPACKED_BYTES", 13)
    with pytest.raises(Refused, match="unpack to 14 bytes"):
        open_bundle(stick)


def test_a_wheel_that_is_none(tmp_path: Path) -> None:
    stick = with_wheel(tmp_path, [("a", 0o100644)])
    (wheel,) = (stick / "wheels").iterdir()
    wheel.write_bytes(b"x" * wheel.stat().st_size)
    with pytest.raises(Refused, match="not a wheel"):
        open_bundle(stick)
