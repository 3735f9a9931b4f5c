"""`localllm plan` as typed, and its screen for machines that are not at hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from localllm.cli.plan import plan, show
from localllm.errors import DoesNotFit, EngineError, NotFound
from localllm.hardware import Hardware
from localllm.loading import Machine
from localllm.plan.choose import plan_load
from localllm.plan.history import History, Run
from localllm.plan.loadplan import LoadPlan
from localllm.plan.question import OtherQuant
from localllm.plan.spec import Wishes
from localllm.plan.speed import device_key
from tests import sparse_models
from tests.plan.machines import GIB, MIB, gpu, header, machine

app = typer.Typer()
app.command()(plan)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localllm.loading.look", lambda state, measure: Machine(machine(ram=16 * GIB), "b1"))


def typed(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def screen(found: LoadPlan, model: str, encoding: str = "utf-8") -> list[str]:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    show(header(sparse_models.MODELS[model]()), found, Console(file=out, width=80, highlight=False, emoji=False))
    out.seek(0)
    return out.read().splitlines()


def desktop() -> tuple[Hardware, History]:
    card = gpu(total=8 * GIB, free=7 * GIB, description="NVIDIA GeForce RTX 4060", display=True)
    hardware = machine(card, ram=32 * GIB, available=20 * GIB)
    return hardware, History().with_run(Run("x", "b", 8, "k", {device_key(card): 4 * GIB}, 58.0))


def test_the_screen_of_a_desktop() -> None:
    hardware, history = desktop()
    lines = screen(plan_load(header(sparse_models.llama_8b()), hardware, Wishes(n_ctx=8192), history=history), "llama-8b")
    assert lines[0] == "llama  llama · Q4_K · 4.6 GiB · trained for 131,072 tokens"
    card, ram = lines[2], lines[5]
    assert card.startswith("CUDA0   ▒▒▒▒▒▒██████████████████████")
    assert card.endswith("·  5.4 GiB of 8.0 GiB")
    assert [card.count(letter) for letter in "▒▓▞"] == [6, 5, 1]  # 1 GiB, 1 GiB, and what is too small to be in proportion
    assert lines[3] == "        ▒ others 1.0 GiB   █ weights 4.3 GiB   ▓ KV cache 1.0 GiB"
    assert lines[4].startswith("        ▞ compute ")
    assert ram.startswith("RAM     ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒█▞░·")
    assert lines[9] == "context 8,192 · KV f16 · 33 of 33 layers on the GPU"
    assert "tokens/s · 8 at once · 24 kept · micro-batch 512 · 8 threads" in lines[10]
    assert lines[12].startswith("• All 33 layers on CUDA0 (NVIDIA GeForce RTX 4060)")
    assert lines[13].startswith("  ")
    at = lines.index("Instead:")
    assert lines[at + 1].startswith("  -c 16384 --kv q8_0  16k context with q8_0 KV, about ")


def test_the_screen_fits_80_columns_and_a_terminal_that_has_only_ascii() -> None:
    hardware, history = desktop()
    quants = (OtherQuant("IQ1_S", 5 * GIB, "someone/Qwen3-30B-A3B-GGUF:IQ1_S"),)
    for model, wishes in (
        ("qwen3-30b-a3b", Wishes()),
        ("llama-70b", Wishes()),
        ("gemma3-12b", Wishes(draft=header(sparse_models.gemma3_1b()))),
    ):
        hardware = machine(*hardware.devices, ram=128 * GIB)
        found = plan_load(header(sparse_models.MODELS[model]()), hardware, wishes, history=history, quants=quants)
        for encoding in ("utf-8", "ascii"):
            lines = screen(found, model, encoding)
            assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
        bar = lines[2][8:52]
        assert len(bar) == 44
        assert set(bar) <= set("-#=+%~.!")
        assert "?" not in bar


def test_an_offered_file_says_how_to_fetch_it() -> None:
    hardware, history = desktop()
    quants = (OtherQuant("IQ1_S", 5 * GIB, "someone/Qwen3:IQ1_S"),)
    lines = screen(plan_load(header(sparse_models.qwen3_30b_a3b()), hardware, history=history, quants=quants), "qwen3-30b-a3b")
    at = lines.index("Instead:")
    assert "IQ1_S (5.0 GiB)" in lines[at + 1]
    assert any(line.strip() == "localllm pull someone/Qwen3:IQ1_S" for line in lines[at:])


def test_names_cannot_steer_the_terminal() -> None:
    hardware = machine(gpu(description="NVIDIA [bold]\x1b[31m"))
    assert "\x1b" not in "".join(screen(plan_load(header(sparse_models.llama_8b()), hardware), "llama-8b"))


def test_the_plan_of_a_model_as_json() -> None:
    result = typed("demo", "--no-dry-run", "--json", "-c", "2048", "--kv", "q8_0", "-np", "2")
    data = json.loads(result.stdout)
    assert (data["n_ctx"], data["type_k"], data["n_seq"], data["confirmed"]) == (2048, "q8_0", 2, False)
    assert data["devices"][-1]["name"] == "CPU"


def test_a_dry_run_confirms_the_plan() -> None:
    data = json.loads(typed("demo", "--json", "-c", "2048", "-np", "1").stdout)
    assert data["confirmed"]
    assert data["drift"] == []
    assert data["exact"]


def test_the_draft_model_is_planned_too() -> None:
    data = json.loads(typed("demo", "--no-dry-run", "--json", "--draft", "demo-small").stdout)
    assert data["draft"]["n_draft"] > 0
    assert data["devices"][-1]["draft_bytes"] > MIB


def test_an_engine_that_cannot_be_asked_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: object, **__: object) -> None:
        raise EngineError("the dry run does not start")

    monkeypatch.setattr("localllm.loading.dry_run", dead)
    data = json.loads(typed("demo", "--json").stdout)
    assert data["warnings"][0] == "not confirmed: the dry run does not start"
    assert not data["confirmed"]


def test_what_does_not_fit_ends_with_exit_code_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localllm.loading.look", lambda state, measure: Machine(machine(ram=600 * MIB), "b1"))
    with pytest.raises(DoesNotFit) as refusal:
        typed("demo", "--no-dry-run")
    assert refusal.value.exit_code == 4


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        typed("no-such-model")
