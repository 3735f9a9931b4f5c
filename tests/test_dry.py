"""The dry run and the truth: equal to the byte to a real load, and one clear error for every way the child can end."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from localllm import wire
from localllm.demo import demo_models
from localllm.dry import DryRun, child_command, dry_run, dry_runs
from localllm.engine.config import EngineConfig
from localllm.errors import EngineError, LocalLLMError, ModelError
from localllm.gguf import Header, read_model
from localllm.rows import CPU, Row, by_device
from tests import sparse_models
from tests.tiny_models import KINDS

LINUX = sys.platform == "linux"


# equal to a real load

SMALL_HEADS = {"plain", "window"}
"""Heads of 16 values, half a block of a quantised cache."""
TYPES = [("f16", "f16"), ("f32", "f32"), ("q8_0", "q8_0"), ("q8_0", "q4_0")]


def combinations(kind: str) -> list[dict[str, Any]]:
    """What a model of the kind can be run with."""
    every = itertools.product((1, 4), TYPES, ("on", "off"))
    return [
        {"n_seq": n_seq, "type_k": k, "type_v": v, "flash_attn": flash}
        for n_seq, (k, v), flash in every
        if not ((k.startswith("q") and kind in SMALL_HEADS) or (v.startswith("q") and flash == "off"))
    ]


def real_rows(configs: list[EngineConfig]) -> list[tuple[Row, ...]]:
    from localllm.engine.opening import context_params, open_model
    from localllm.llama.breakdown import breakdown
    from localllm.llama.context import Context

    model = open_model(configs[0])
    rows: list[tuple[Row, ...]] = []
    for config in configs:
        context = Context(model, context_params(config, model))
        rows.append(breakdown(context))
        context.close()
    model.close()
    return rows


@pytest.mark.parametrize("kind", [*KINDS, "demo-large", "demo-small"])
def test_a_dry_run_is_the_load_to_the_byte(kind: str, tmp_path: Path) -> None:
    path = demo_models()[kind] if kind in demo_models() else KINDS[kind](tmp_path / "m.gguf")
    base = EngineConfig(str(path), n_ctx=2000, n_resident=3, n_ubatch=128, n_draft=2, n_threads=1, load_mode="none")
    configs = [replace(base, **each) for each in combinations(kind)]
    assert len(configs) >= 8
    for config, dry, real in zip(configs, dry_runs(configs), real_rows(configs), strict=True):
        assert dry.exact
        assert dry.rows == real, config


def test_a_mapped_load_takes_the_same_beside_its_weights(tmp_path: Path) -> None:
    config = EngineConfig(str(KINDS["plain"](tmp_path / "m.gguf")), n_ctx=2048, n_threads=1, load_mode="mmap")
    dry, (real,) = by_device(dry_run(config).rows)[CPU], real_rows([config])
    loaded = by_device(real)[CPU]
    assert (loaded.kv_bytes, loaded.compute_bytes, loaded.output_bytes) == (dry.kv_bytes, dry.compute_bytes, dry.output_bytes)
    assert loaded.anonymous_bytes == dry.anonymous_bytes
    # the gaps between tensors are mapped, too
    assert 0 <= loaded.mapped_bytes - dry.mapped_bytes < 32 * 64


async def test_the_engine_tells_what_it_took(demo_small: Path) -> None:
    from localllm.engine.engine import Engine

    config = EngineConfig(str(demo_small), n_ctx=1024, n_seq=2, n_resident=2, load_mode="none")
    engine = Engine.load(config)
    try:
        assert engine.info()["memory"] == [asdict(row) for row in dry_run(config).rows]
    finally:
        await engine.close()


MEASURE = """
import json, sys
from dataclasses import asdict
from localllm import wire
from localllm.engine.config import EngineConfig
from localllm.engine.opening import context_params, open_model
from localllm.llama.breakdown import breakdown
from localllm.llama.context import Context

def memory():
    kilobytes = dict(line.split()[:2] for line in open("/proc/self/smaps_rollup") if line.endswith("kB\\n"))
    anonymous = int(kilobytes["Anonymous:"]) * 1024
    return anonymous, int(kilobytes["Rss:"]) * 1024 - anonymous

config = wire.decode(EngineConfig, json.load(sys.stdin))
before = memory()
model = open_model(config)
context = Context(model, context_params(config, model))
# a whole batch uses the whole of the compute buffers
n = context.n_batch
context.positions[:], context.outputs[:] = range(n), 0
context.outputs[-config.n_seq:] = 1
context.decode(n)
after = memory()
print(json.dumps([after[0] - before[0], after[1] - before[1], [asdict(row) for row in breakdown(context)]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="reads /proc/self/smaps_rollup")
@pytest.mark.parametrize("load_mode", ["none", "mmap"])
def test_resident_memory_is_what_the_rows_say(load_mode: Any, tmp_path: Path) -> None:
    """A model of real dimensions: what must stay in RAM is told within 2 %, and so is what is mapped."""
    path = sparse_models.write(sparse_models.llama_1b(), tmp_path / "1b.gguf")
    config = EngineConfig(str(path), n_ctx=8192, n_seq=4, n_resident=4, n_threads=1, load_mode=load_mode, n_gpu_layers=0)
    asked = wire.encode({"c": config})
    done = subprocess.run([sys.executable, "-c", MEASURE], input=json.dumps(json.loads(asked)["c"]).encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    anonymous_bytes, file_bytes, rows = json.loads(done.stdout)
    planned = by_device(dry_run(config).rows)[CPU]
    assert anonymous_bytes == pytest.approx(planned.anonymous_bytes, rel=0.02)
    mapped = sum(row["mapped_bytes"] for row in rows)
    if load_mode == "none":
        assert planned.mapped_bytes == mapped == 0
        assert file_bytes < 16 << 20
    else:
        assert planned.mapped_bytes > 0
        # the mapping spans the file, with the weights that were repacked
        assert mapped == pytest.approx(path.stat().st_size, rel=0.01)
        assert file_bytes == pytest.approx(mapped, rel=0.02)


def test_a_model_that_is_not_here_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header is enough, as ranged requests fetch it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = sparse_models.write(sparse_models.qwen35_08b(), tmp_path / "there.gguf")
    header = read_model(path)
    config = EngineConfig(str(path), n_ctx=4096)
    here = dry_run(config)
    away = replace(config, model_path="hf:someone/there.gguf")
    path.unlink()
    assert dry_run(away, replace(header, files=())) == here
    assert dry_runs([away, config], {away.model_path: header, config.model_path: header}) == (here, here)
    assert not list(tmp_path.glob("localllm-*"))


def test_where_no_outline_can_be_made_the_file_itself_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(header: Header, path: Path) -> None:
        raise OSError(errno.EFBIG, "File too large")

    path = KINDS["plain"](tmp_path / "m.gguf")
    config = EngineConfig(str(path), n_ctx=512)
    usual = dry_run(config)
    monkeypatch.setattr("localllm.dry.write_outline", full)
    assert dry_run(config) == usual
    with pytest.raises(EngineError, match="File too large"):
        dry_run(config, replace(read_model(path), files=()))


def test_configs_of_one_child_are_as_alone(tmp_path: Path) -> None:
    plain, window = (EngineConfig(str(KINDS[kind](tmp_path / f"{kind}.gguf")), n_ctx=512) for kind in ("plain", "window"))
    configs = [plain, replace(plain, n_ctx=4096), window, plain, replace(plain, load_mode="none")]
    together = dry_runs(configs)
    assert together == tuple(dry_run(config) for config in configs)
    assert together[0] == together[3] != together[1]
    assert together[0] != together[4]  # nothing is mapped
    assert dry_runs([]) == ()


# the child's ends


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


CONFIG = EngineConfig(str(demo_models()["demo-small"]))


def refused(config: EngineConfig = CONFIG, **options: Any) -> LocalLLMError:
    with pytest.raises(LocalLLMError) as caught:
        dry_run(config, **options)
    error = caught.value
    assert error.message
    assert error.hint
    assert "Traceback" not in error.message
    assert "\n" not in error.message
    return error


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(EngineConfig(str(tmp_path / "none.gguf")))


@pytest.mark.parametrize("damage", ["not gguf", "corrupt header", "truncated header", "truncated weights", "empty"])
def test_a_damaged_file(damage: str, tmp_path: Path, demo_small: Path) -> None:
    good = demo_small.read_bytes()
    bad = {
        "not gguf": b"<html>Not found</html>" * 100,
        "corrupt header": good[:24] + b"\xff" * 64 + good[88:],
        "truncated header": good[:2000],
        "truncated weights": good[: len(good) // 2],
        "empty": b"",
    }[damage]
    path = tmp_path / "bad.gguf"
    path.write_bytes(bad)
    error = refused(EngineConfig(str(path)))
    assert type(error) is ModelError
    assert "bad.gguf" in error.message


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = sparse_models.write(replace(sparse_models.llama_1b(), architecture="perceptron"), tmp_path / "new.gguf")
    error = refused(EngineConfig(str(path)))
    assert type(error) is ModelError
    assert "unknown model architecture: 'perceptron'" in error.message


def test_a_missing_tensor(tmp_path: Path) -> None:
    model = sparse_models.llama_1b()
    path = sparse_models.write(replace(model, rows=model.rows[:-1]), tmp_path / "less.gguf")
    error = refused(EngineConfig(str(path)))
    assert type(error) is ModelError
    assert "blk.15.ffn_down.weight" in error.message


def test_a_file_that_makes_llama_cpp_abort(tmp_path: Path) -> None:
    """The header is sound; llama.cpp asserts what it says."""
    model = sparse_models.llama_1b()
    path = sparse_models.write(replace(model, keys={**model.keys, "block_count": 100_000}), tmp_path / "deep.gguf")
    error = refused(EngineConfig(str(path)))
    assert type(error) is ModelError
    assert "deep.gguf cannot be loaded" in error.message
    assert "GGML_ASSERT" in error.message
    assert error.details["exit_code"] < 0


def test_a_combination_that_makes_llama_cpp_abort(demo_small: Path) -> None:
    # fewer outputs than sequences, which our contexts never ask for
    code = """
from localllm.engine import dryrun
from localllm.llama import context
native = context.native
def wrong(model, params):
    c = native(model, params)
    c.n_outputs_max = 1
    return c
context.native = wrong
dryrun.main()
"""
    error = refused(EngineConfig(str(demo_small)), command=script(code))
    assert type(error) is EngineError
    assert "demo-small-q8_0.gguf" in error.message
    assert "SIGABRT" in error.message
    assert "n_outputs" in error.message


def test_a_context_that_llama_cpp_refuses(demo_small: Path) -> None:
    error = refused(EngineConfig(str(demo_small), type_v="q8_0", flash_attn="off"))
    assert type(error) is EngineError
    assert "V cache" in error.message


@pytest.mark.parametrize(
    "code, said",
    [
        ("import os; os.abort()", "SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import sys; sys.exit('the library is missing')", "exit code 1: the library is missing"),
        ("print('{')", "exit code 0: it said b'{'"),
        ("print('Hello')", "it said b'Hello'"),
        ("print('[1]')", "it said"),
        ("print('{}')", "it said"),
        ('print(\'{"rows": [1], "n_cells": 1, "exact": true}\')', "it said"),
        ("print('{\"error\": 1}')", "it said"),
        ("import os; os.write(1, bytes(range(256)))", "it said"),
        ("pass", "exit code 0"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_child_that_ends_otherwise(code: str, said: str) -> None:
    error = refused(command=script(code))
    assert type(error) is EngineError
    assert "the dry run of demo-small-q8_0.gguf" in error.message
    assert said in error.message


@pytest.mark.parametrize("signal, hint", [("SIGKILL", "memory"), ("SIGILL", "another CPU")])
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_hint_knows_the_signal(signal: str, hint: str) -> None:
    assert hint in refused(command=script(f"import os, signal; os.kill(os.getpid(), signal.{signal})")).hint


def test_an_answer_before_the_death_is_not_enough(demo_large: Path) -> None:
    answer = json.dumps({"rows": [], "n_cells": 1, "exact": True})
    code = f"import os\nprint({answer!r}, flush=True)\nos.abort()"
    with pytest.raises(EngineError, match="demo-large"):
        dry_runs([CONFIG, EngineConfig(str(demo_large))], command=script(code))
    assert dry_run(CONFIG, command=script(f"print({answer!r})")) == DryRun((), 1, True)


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    error = refused(command=script(code), timeout_s=2.0)
    assert type(error) is EngineError
    assert "within 2 s" in error.message
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_command_that_does_not_start() -> None:
    assert "does not start" in refused(command=["/no/such/python"]).message


def test_neither_side_loads_what_it_does_not_need(demo_small: Path) -> None:
    parent = "import sys, localllm.dry; assert not {'llama_cpp', 'numpy', 'pydantic', 'typer'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", parent], check=True)
    child = """
import os, sys
from localllm.engine import dryrun
end = os._exit
def look(code):
    heavy = {'pydantic', 'typer', 'huggingface_hub', 'textual', 'fastapi', 'gguf', 'asyncio'} & set(sys.modules)
    end(1 if heavy else code)
os._exit = look
dryrun.main()
"""
    dry_run(EngineConfig(str(demo_small)), command=script(child))


def test_the_command_does_not_import_from_the_current_folder() -> None:
    assert "-P" in child_command()
