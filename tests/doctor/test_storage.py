from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from localllm.doctor.storage import Disk, Mount, can_write, judge_disks, judge_partials, mounts, partial_downloads, read_disks, type_of
from tests.doctor.machines import Machine, ids, write

GIB = 1 << 30
ROOMY = Disk("models", Path("/m"), 100 * GIB, 50 * GIB, "ext4", True)


@pytest.mark.parametrize(
    "disk, found",
    [
        (ROOMY, []),
        (replace(ROOMY, free_bytes=5 * GIB - 1), ["disk-low:warning"]),
        (replace(ROOMY, free_bytes=GIB // 2 - 1), ["disk-full:problem"]),
        (replace(ROOMY, use="state", free_bytes=GIB), []),
        (replace(ROOMY, use="state", free_bytes=0), ["disk-full:problem"]),
        (replace(ROOMY, total_bytes=0, free_bytes=0), []),
        (replace(ROOMY, writable=False), ["models-not-writable:problem"]),
        (replace(ROOMY, type="nfs4"), ["models-on-network:warning"]),
        (replace(ROOMY, type="fuse.sshfs"), ["models-on-network:warning"]),
        (replace(ROOMY, type="9p"), ["models-on-network:warning"]),
        (replace(ROOMY, type="FAT32"), ["models-on-fat:warning"]),
        (replace(ROOMY, type="nfs4", use="cache"), []),
        (replace(ROOMY, type="fuseblk"), []),
    ],
)
def test_what_is_wrong_with_a_disk(disk: Disk, found: list[str]) -> None:
    findings = list(judge_disks([disk]))
    assert [f"{finding.id}:{finding.level}" for finding in findings] == found
    assert all(finding.fix and str(disk.path) in finding.detail for finding in findings)


def test_the_innermost_mount_counts(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    (root / "a/b/c").mkdir(parents=True)
    mounted = [Mount(Path(root.anchor), "ext4"), Mount(root / "a/b", "nfs4"), Mount(root / "a", "xfs"), Mount(root / "a/b/c", "old")]
    mounted.append(Mount(root / "a/b/c", "tmpfs"))
    assert [type_of(root / name, mounted) for name in ("", "a", "a/b", "a/b/c", "a/bb")] == ["ext4", "xfs", "nfs4", "tmpfs", "xfs"]
    (root / "link").symlink_to(root / "a/b")
    assert type_of(root / "link", mounted) == "nfs4"
    assert type_of(root, []) == ""


def test_directories_that_do_not_exist_yet_are_measured_above(machine: Machine, tmp_path: Path) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> tuple[int, int, int]:
        asked.append(path)
        return 100, 60, 40

    system = machine()
    disks = read_disks(system, system.directories.models, [Mount(Path("/"), "ext4")], usage)
    assert [(disk.use, disk.path, disk.total_bytes, disk.free_bytes, disk.writable) for disk in disks] == [
        ("models", tmp_path / "home/models", 100, 40, True)
    ], "all on one disk, so one line"
    assert set(asked) == {tmp_path}
    assert not (tmp_path / "home").exists(), "looking made nothing"


def test_models_elsewhere_are_a_disk_of_their_own(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()

    def usage(path: Path) -> tuple[int, int, int]:
        return (1000, 0, 1000) if path.name == "big" else (10, 0, 10)

    disks = read_disks(machine(), tmp_path / "big", [], usage)
    assert [(disk.use, disk.free_bytes) for disk in disks] == [("models", 1000), ("settings", 10)]


def test_a_folder_that_takes_no_files(tmp_path: Path) -> None:
    assert can_write(tmp_path)
    assert not can_write(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert not can_write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "the trial left nothing"


def test_this_machine_has_mounts_and_a_type() -> None:
    assert type_of(Path.cwd(), mounts())


def test_partial_downloads_are_counted(tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert partial_downloads(models) == (0, 0)
    assert list(judge_partials(models)) == []
    write(models, {"a/b/x.gguf": "GGUF", "a/b/y.gguf.part": "0" * 10_000, "a/b/y.gguf.part.json": "{}", "a/b/z.gguf.lock": ""})
    number, size = partial_downloads(models)
    assert number == 1
    assert size >= 10_000
    (finding,) = judge_partials(models)
    assert (finding.id, finding.level) == ("partial-downloads", "info")
    assert finding.title.startswith("1 unfinished download,")
    assert ids(judge_partials(models)) == ["partial-downloads"]
