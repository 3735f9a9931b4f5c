"""RAM from recorded /proc files, control groups, vm_stat and Windows readings; and what readings can be believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.hardware import Memory
from localllm.hardware.memory import ABSURD_BYTES, plausible, read_memory
from localllm.hardware.windows import WindowsReadings
from tests.hardware.recorded import GIB, MIB, linux, mac, meminfo

KIB = 1 << 10
SIXTEEN = {"proc/meminfo": meminfo(16 << 20, 12 << 20)}
GROUP = "sys/fs/cgroup/memory.{}"


def group(limit: int, current: int, cache: int = 0) -> dict[str, str]:
    values = {"max": str(limit), "current": str(current), "stat": f"inactive_file {cache}"}
    return {"proc/self/cgroup": "0::/\n", **{GROUP.format(name): text + "\n" for name, text in values.items()}}


def test_linux_without_limits(tmp_path: Path) -> None:
    assert read_memory(linux(tmp_path, SIXTEEN)) == (Memory(16 * GIB, 12 * GIB), ())


def test_a_control_group_limits_what_is_available(tmp_path: Path) -> None:
    memory, warnings = read_memory(linux(tmp_path, {**SIXTEEN, **group(8 * GIB, 5 * GIB, cache=4 * GIB)}))
    assert memory == Memory(16 * GIB, 7 * GIB, 8 * GIB, "memory.max of the container")
    assert not warnings


def test_the_machine_may_have_less_than_the_group_allows(tmp_path: Path) -> None:
    files = {"proc/meminfo": meminfo(16 << 20, 2 << 20), **group(8 * GIB, 0)}
    assert read_memory(linux(tmp_path, files))[0].available_bytes == 2 * GIB


def test_a_limit_above_the_machine_is_none(tmp_path: Path) -> None:
    assert read_memory(linux(tmp_path, {**SIXTEEN, **group(64 * GIB, 0)}))[0] == Memory(16 * GIB, 12 * GIB)


def test_the_smallest_limit_and_the_smallest_room_may_be_of_two_groups(tmp_path: Path) -> None:
    files = {
        **SIXTEEN,
        "proc/self/cgroup": "0::/busy/own\n",
        "sys/fs/cgroup/busy/memory.max": f"{10 * GIB}\n",
        "sys/fs/cgroup/busy/memory.current": f"{9 * GIB}\n",
        "sys/fs/cgroup/busy/own/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/busy/own/memory.current": "0\n",
    }
    memory, _ = read_memory(linux(tmp_path, files))
    assert memory == Memory(16 * GIB, GIB, 4 * GIB, "memory.max of the control group busy/own")


def test_an_old_kernel_without_memavailable(tmp_path: Path) -> None:
    text = "MemTotal: 1000 kB\nMemFree: 100 kB\nBuffers: 20 kB\nCached: 300 kB\nShmem: 50 kB\nSReclaimable: 30 kB\n"
    assert read_memory(linux(tmp_path, {"proc/meminfo": text}))[0] == Memory(1000 * KIB, 400 * KIB)


@pytest.mark.parametrize(
    "text, memory, warned",
    [
        pytest.param("", Memory(None, None), False, id="no file"),
        pytest.param("rubbish\n", Memory(None, None), False, id="rubbish"),
        pytest.param(meminfo(0, 0), Memory(None, None), False, id="zero of zero"),
        pytest.param(meminfo(4 << 20, 5 << 20), Memory(4 * GIB, None), True, id="more available than there is"),
        pytest.param(meminfo(1 << 50, 5 << 20), Memory(None, None), True, id="absurd"),
    ],
)
def test_unknown_stays_unknown(tmp_path: Path, text: str, memory: Memory, warned: bool) -> None:
    found, warnings = read_memory(linux(tmp_path, {"proc/meminfo": text}))
    assert found == memory
    assert bool(warnings) == warned


def test_under_a_limit_an_unknown_amount_stays_unknown(tmp_path: Path) -> None:
    memory, _ = read_memory(linux(tmp_path, group(GIB, 0)))
    assert memory == Memory(None, None, GIB, "memory.max of the container")


def test_macos(tmp_path: Path) -> None:
    # free 131072 + speculative 65536 + inactive 1179648 + purgeable 32768 pages of 16 KiB
    assert read_memory(mac(tmp_path)) == (Memory(64 * GIB, 1409024 * 16 * KIB), ())


@pytest.mark.parametrize("vm_stat", ["", "Mach Virtual Memory Statistics: (page size of 4096 bytes)\n", "Pages free: 12.\n"])
def test_macos_without_vm_stat(tmp_path: Path, vm_stat: str) -> None:
    assert read_memory(mac(tmp_path, vm_stat=vm_stat))[0] == Memory(64 * GIB, None)


def test_macos_never_has_more_than_it_has(tmp_path: Path) -> None:
    assert read_memory(mac(tmp_path, sysctl="hw.memsize: 17179869184\n"))[0] == Memory(16 * GIB, 16 * GIB)


def windows(tmp_path: Path, **readings: Any) -> tuple[Memory, tuple[str, ...]]:
    return read_memory(linux(tmp_path, {}, os="windows", windows=WindowsReadings(**readings)))


def test_windows(tmp_path: Path) -> None:
    found = windows(tmp_path, total_bytes=32 * GIB, available_bytes=20 * GIB, commit_available_bytes=26 * GIB)
    assert found == (Memory(32 * GIB, 20 * GIB), ())


def test_windows_with_a_short_page_file(tmp_path: Path) -> None:
    memory, warnings = windows(tmp_path, total_bytes=32 * GIB, available_bytes=20 * GIB, commit_available_bytes=3 * GIB)
    assert memory == Memory(32 * GIB, 3 * GIB)
    assert "only 3.0 GiB more" in warnings[0]


def test_windows_that_does_not_answer(tmp_path: Path) -> None:
    assert windows(tmp_path) == (Memory(None, None), ())


def test_an_unknown_system(tmp_path: Path) -> None:
    assert read_memory(linux(tmp_path, SIXTEEN, os="plan9")) == (Memory(None, None), ())


@pytest.mark.parametrize(
    "total, free, expected, warned",
    [
        (8 * GIB, GIB, (8 * GIB, GIB), False),
        (8 * GIB, 0, (8 * GIB, 0), False),
        (8 * GIB, 8 * GIB, (8 * GIB, 8 * GIB), False),
        (8 * GIB, None, (8 * GIB, None), False),
        (0, 0, (None, None), False),
        (None, None, (None, None), False),
        (None, GIB, (None, None), False),
        (8 * GIB, 8 * GIB + 1, (8 * GIB, None), True),
        (8 * GIB, -1, (8 * GIB, None), True),
        (-1, -1, (None, None), True),
        (ABSURD_BYTES, MIB, (ABSURD_BYTES, MIB), False),
        (ABSURD_BYTES + 1, MIB, (None, None), True),
        (2**64 - 1, 2**64 - 1, (None, None), True),
    ],
)
def test_what_can_be_believed(total: int | None, free: int | None, expected: tuple[int | None, int | None], warned: bool) -> None:
    *found, warnings = plausible("the card", total, free)
    assert tuple(found) == expected
    assert bool(warnings) == warned
    assert all("the card" in warning for warning in warnings)


READING = st.none() | st.integers(-(2**65), 2**65)


@given(READING, READING)
def test_belief_never_invents(total: int | None, free: int | None) -> None:
    believed_total, believed_free, _ = plausible("x", total, free)
    assert believed_total in (None, total)
    assert believed_free in (None, free)
    assert believed_total is None or 0 < believed_total <= ABSURD_BYTES
    assert believed_free is None or (believed_total is not None and 0 <= believed_free <= believed_total)
