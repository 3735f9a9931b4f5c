"""The options that every loading command takes, as typed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from localllm.cli.loading_flags import ALL_LAYERS, LoadingFlags, given_settings, loading_flags, parse_limits, parse_overrides, parse_split
from localllm.errors import UsageError
from localllm.plan.spec import Wishes
from localllm.settings import load

app = typer.Typer()
seen: list[tuple[str, bool, LoadingFlags]] = []


@app.command()
@loading_flags
def command(
    model: Annotated[str, typer.Argument()] = "",
    loud: Annotated[bool, typer.Option("--loud")] = False,
    *,
    loading: LoadingFlags,
) -> None:
    """A command with options of its own."""
    seen.append((model, loud, loading))


def typed(*arguments: str) -> LoadingFlags:
    seen.clear()
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return seen[0][2]


def wished(*arguments: str) -> Wishes:
    flags = typed(*arguments)
    return flags.wishes(given_settings(load(flags.settings())))


def test_nothing_given_is_nothing_wished() -> None:
    assert typed() == LoadingFlags()
    assert wished() == Wishes()


def test_a_command_keeps_its_own_arguments() -> None:
    typed("qwen3:8b", "--loud", "-c", "4096")
    assert seen[0][:2] == ("qwen3:8b", True)
    assert seen[0][2].ctx_size == 4096


@pytest.mark.parametrize(
    "arguments, wishes",
    [
        ("-c 4096", {"n_ctx": 4096}),
        ("--ctx 4096", {"n_ctx": 4096}),
        ("-ngl 20", {"n_gpu_layers": 20}),
        ("--ngl -1", {"n_gpu_layers": -1}),
        ("-ctk q8_0 -ctv q4_0", {"type_k": "q8_0", "type_v": "q4_0"}),
        ("--kv q8_0", {"type_k": "q8_0", "type_v": "q8_0"}),
        ("--kv q8_0 -ctk f16", {"type_k": "f16", "type_v": "q8_0"}),
        ("-fa on", {"flash_attn": "on"}),
        ("-np 4", {"n_seq": 4}),
        ("--parallel 4", {"n_seq": 4}),
        ("-t 6 -b 1024 -ub 256", {"n_threads": 6, "n_batch": 1024, "n_ubatch": 256}),
        ("-ts 3,1 -mg 1 -sm row", {"tensor_split": (3.0, 1.0), "main_gpu": 1, "split_mode": "row"}),
        ("-ncmoe 12", {"n_cpu_moe": 12}),
        ("-cmoe", {"n_cpu_moe": ALL_LAYERS}),
        ("--swa-full --load-mode mmap", {"swa_full": True, "load_mode": "mmap"}),
        (r"-ot blk\.1\.=CPU,blk\.2\.=CUDA1", {"overrides": ((r"blk\.1\.", "CPU"), (r"blk\.2\.", "CUDA1"))}),
        ("--gpu-memory 8GiB", {"gpu_memory": {"all": 8 << 30}}),
        ("--gpu-memory CUDA0=8GiB --gpu-memory 1=500MB", {"gpu_memory": {"CUDA0": 8 << 30, "1": 500_000_000}}),
        ("--reserve 1GiB --strict --draft-max 5", {"reserve_bytes": 1 << 30, "strict": True, "n_draft": 5}),
        ("-c 0 -t 0", {}),
    ],
)
def test_flags_and_what_they_wish(arguments: str, wishes: dict[str, object]) -> None:
    assert wished(*arguments.split()) == Wishes(**wishes)  # type: ignore[arg-type]


def test_a_setting_that_somebody_made_is_a_wish_and_a_default_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wished().n_seq is None
    monkeypatch.setenv("LOCALLLM_N_SEQ", "3")
    assert wished() == Wishes(n_seq=3)
    home.mkdir()
    (home / "config.toml").write_text('n_gpu_layers = 12\ntype_k = "q8_0"\n')
    assert wished("-np", "5") == Wishes(n_seq=5, n_gpu_layers=12, type_k="q8_0")


@pytest.mark.parametrize(
    "arguments",
    [
        "-sm diagonal",
        "--load-mode floppy",
        "-ub 0",
        "-b 0",
        "-ncmoe -1",
        "-mg -2",
        "--gpu-memory much",
        "--gpu-memory -3",
        "--reserve some",
        "-ts 3,x",
        "-ts 0,0",
        "-ts -1,2",
        "-ts nan",
        "-ot CPU",
        "-ot =CPU",
    ],
)
def test_what_makes_no_sense_is_refused(arguments: str) -> None:
    with pytest.raises(UsageError):
        wished(*arguments.split())


def test_pieces() -> None:
    assert parse_split(None) == ()
    assert parse_split("1/3") == (1.0, 3.0)
    assert parse_overrides(()) == ()
    assert parse_overrides([r"a=b=CPU"]) == (("a=b", "CPU"),)
    assert parse_limits(["0=1GiB,all=2GiB"]) == {"0": 1 << 30, "all": 2 << 30}


def test_every_flag_is_in_the_help() -> None:
    help_text = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["--help"]).output
    for field in fields(LoadingFlags):
        long = {"n_draft": "draft-max", "type_k": "cache-type-k", "type_v": "cache-type-v"}.get(field.name, field.name.replace("_", "-"))
        assert f"--{long}" in help_text
