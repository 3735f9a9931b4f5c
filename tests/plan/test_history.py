"""What a machine remembers of its loads and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localllm.plan import history
from localllm.plan.history import MOST, PLANS_FILE, SPEED_FILE, History, Residual, Run


def run(model: str = "m", tokens_per_s: float = 10.0, threads: int = 8) -> Run:
    return Run(model, "b1", threads, "k", {"CPU x": 1000}, tokens_per_s)


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    known = History((run("a"), run("b")), (Residual("CUDA GPU", "b1", 300),))
    history.save(tmp_path, known)
    assert history.load(tmp_path) == (known, ())


def test_nothing_saved_is_nothing_known(tmp_path: Path) -> None:
    assert history.load(tmp_path / "new") == (History(), ())


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema": 99, "runs": []}', '{"schema": 1}', '{"schema": 1, "runs": 3}', "[" * 100_000]
)
def test_a_file_that_cannot_be_used_is_ignored_with_a_warning(tmp_path: Path, content: str) -> None:
    (tmp_path / SPEED_FILE).write_text(content)
    found, warnings = history.load(tmp_path)
    assert found == History()
    assert len(warnings) == 1
    assert SPEED_FILE in warnings[0]


def test_entries_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    sound = {"model": "m", "build": "b", "threads": 2, "kind": "k", "read_bytes": {"CPU": 5}, "tokens_per_s": 3}
    broken = [
        *(
            {**sound, name: value}
            for name, value in (("tokens_per_s", 0), ("tokens_per_s", float("nan")), ("read_bytes", {}), ("threads", 0))
        ),
        {"model": "m"},
        7,
    ]
    (tmp_path / SPEED_FILE).write_text(json.dumps({"schema": 1, "runs": [*broken, sound]}))
    (tmp_path / PLANS_FILE).write_text(json.dumps({"schema": 1, "residuals": [{"device": "d", "build": "b", "n_bytes": -1}]}))
    found, warnings = history.load(tmp_path)
    assert found.runs == (Run("m", "b", 2, "k", {"CPU": 5}, 3.0),)
    assert found.residuals == ()
    assert warnings == ()


def test_a_second_run_of_the_same_is_averaged_in_time() -> None:
    known = History().with_run(run(tokens_per_s=10.0)).with_run(run(tokens_per_s=30.0))
    assert len(known.runs) == 1
    assert known.runs[0].tokens_per_s == pytest.approx(15.0)
    assert len(known.with_run(run(threads=4)).runs) == 2


def test_overheads_rise_at_once_and_fall_slowly() -> None:
    known = History().with_residual(Residual("d", "b", 100))
    assert known.with_residual(Residual("d", "b", 300)).overhead_bytes("d") == 300
    assert known.with_residual(Residual("d", "b", 0)).overhead_bytes("d") == 50
    assert known.with_residual(Residual("d", "b", -500)).overhead_bytes("d") == 50
    assert known.overhead_bytes("other") is None


def test_only_the_newest_are_kept() -> None:
    known = History()
    for i in range(MOST + 10):
        known = known.with_run(run(str(i)))
    assert len(known.runs) == MOST
    assert known.runs[-1].model == str(MOST + 9)
    assert known.runs[0].model == "10"
