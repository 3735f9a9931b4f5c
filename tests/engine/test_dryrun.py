"""Dry runs on machines that are not there: where weights, caches and graphs go, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from localllm.dry import DryRun, dry_run, dry_runs
from localllm.engine.config import EngineConfig
from localllm.errors import UsageError
from localllm.plan.weights import experts_on_cpu
from localllm.rows import CPU, Row, by_device
from tests import fake_gpu, sparse_models
from tests.fake_gpu import GIB, MACHINES, FakeGpu

KV_PER_TOKEN = {"llama-8b": 128 << 10, "qwen3-30b-a3b": 96 << 10, "llama-1b": 32 << 10}
CELLS = 8192


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sparse")
    return {name: sparse_models.write(make(), folder / f"{name}.gguf") for name, make in sparse_models.MODELS.items()}


@pytest.fixture(scope="module")
def base(files: dict[str, Path]) -> EngineConfig:
    return EngineConfig(str(files["llama-8b"]), n_ctx=CELLS, n_seq=1, n_resident=0, load_mode="none")


def run(machine: str | tuple[FakeGpu, ...], *configs: EngineConfig) -> list[dict[str, Row]]:
    gpus = MACHINES[machine] if isinstance(machine, str) else machine
    results = dry_runs(configs, command=fake_gpu.command(gpus))
    assert all(result.exact for result in results)
    return [by_device(result.rows) for result in results]


def rows_on(machine: str, config: EngineConfig) -> DryRun:
    return dry_run(config, command=fake_gpu.command(MACHINES[machine]))


def test_layers_take_their_cache_with_them(base: EngineConfig) -> None:
    configs = [replace(base, n_gpu_layers=n) for n in (-1, 33, 20, 1, 0)]
    everything, all_named, some, output, nothing = run("24", *configs)
    assert everything == all_named
    kv = KV_PER_TOKEN["llama-8b"] * CELLS
    assert everything["CUDA0"].kv_bytes == kv
    assert some["CUDA0"].kv_bytes == kv * 19 // 32
    assert some[CPU].kv_bytes == kv * 13 // 32
    assert output["CUDA0"].kv_bytes == 0
    weights = [each["CUDA0"].weights_bytes for each in (everything, some, output)]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] > 0
    # not one layer there, and yet llama.cpp computes large batches there
    assert nothing["CUDA0"].weights_bytes == nothing["CUDA0"].kv_bytes == 0
    assert nothing["CUDA0"].compute_bytes > 0
    whole = sum(row.weights_bytes for row in nothing.values())
    assert all(sum(row.weights_bytes for row in each.values()) == whole for each in (everything, some, output))


@pytest.mark.parametrize("name", sparse_models.MODELS)
def test_every_architecture_runs_dry(files: dict[str, Path], name: str) -> None:
    config = EngineConfig(str(files[name]), n_ctx=CELLS, load_mode="none")
    (rows,) = run("24", config)
    held = sparse_models.MODELS[name]().weights_bytes
    # a tied embedding lies on both sides, and CUDA pads rows
    assert held <= sum(row.weights_bytes for row in rows.values()) < 1.5 * held
    assert rows["CUDA0"].kv_bytes > 0


def test_shares_are_kept(base: EngineConfig) -> None:
    even, uneven, one = run("24+24", *(replace(base, tensor_split=split) for split in ((1.0, 1.0), (1.0, 3.0), (0.0, 1.0))))
    per_layer = KV_PER_TOKEN["llama-8b"] * CELLS // 32
    assert [each["CUDA1"].kv_bytes // per_layer for each in (even, uneven, one)] == [15, 23, 32]
    assert "CUDA0" not in one or one["CUDA0"].weights_bytes == 0


def test_without_shares_the_free_memory_decides(base: EngineConfig) -> None:
    (rows,) = run("24+8", base)
    layers = [rows[name].kv_bytes // (KV_PER_TOKEN["llama-8b"] * CELLS // 32) for name in ("CUDA0", "CUDA1")]
    assert layers == [25, 7]


def test_one_device_or_none(base: EngineConfig) -> None:
    alone = replace(base, split_mode="none")
    second, none = run("24+24", replace(alone, main_gpu=1), replace(alone, main_gpu=-1))
    assert set(second) == {"CUDA1", CPU}
    assert set(none) == {CPU}


def test_experts_stay_on_the_cpu(files: dict[str, Path]) -> None:
    config = EngineConfig(str(files["qwen3-30b-a3b"]), n_ctx=CELLS, n_seq=1, n_resident=0, load_mode="none")
    whole, without = run("24", config, replace(config, overrides=experts_on_cpu(16)))
    model = sparse_models.qwen3_30b_a3b()
    experts = replace(model, rows=tuple(row for row in model.rows if "_exps" in row[0] and int(row[0].split(".")[1]) < 16))
    # CUDA pads ffn_down's last row from 768 to 1,024 weights, half a block, and that to 128 bytes
    assert whole["CUDA0"].weights_bytes - without["CUDA0"].weights_bytes == experts.weights_bytes + 16 * 256
    assert without[CPU].weights_bytes - whole[CPU].weights_bytes == experts.weights_bytes
    assert whole["CUDA0"].kv_bytes == without["CUDA0"].kv_bytes


def test_tensors_go_where_an_override_says(base: EngineConfig) -> None:
    usual, moved = run("24+24", base, replace(base, overrides=(("output", "CUDA0"), (r"blk\.31\..*", "CUDA0"))))
    assert moved["CUDA0"].weights_bytes > usual["CUDA0"].weights_bytes
    assert moved["CUDA0"].kv_bytes == usual["CUDA0"].kv_bytes


def test_a_buffer_that_is_not_there(base: EngineConfig) -> None:
    with pytest.raises(UsageError, match="no buffer 'CUDA7'") as caught:
        run("24", replace(base, overrides=(("x", "CUDA7"),)))
    assert "CPU, CUDA0" in caught.value.hint


def test_several_gpus_work_on_several_batches(base: EngineConfig) -> None:
    two = MACHINES["24+24"]
    (pipelined,) = run(two, base)
    (plain,) = run(tuple(replace(gpu, pipeline=False) for gpu in two), base)
    assert pipelined["CUDA0"].compute_bytes > plain["CUDA0"].compute_bytes
    assert pipelined["CUDA0"].weights_bytes == plain["CUDA0"].weights_bytes
    # four copies of what goes from device to device; overrides turn it off
    (with_override,) = run(two, replace(base, overrides=(("nothing like this", "CPU"),)))
    assert with_override == plain


def test_flash_attention_that_a_device_lacks(files: dict[str, Path]) -> None:
    config = EngineConfig(str(files["llama-1b"]), n_ctx=32768, n_seq=1, n_resident=0)
    (usual,) = run("24", config)
    (without,) = run("no flash", config)
    assert without["CUDA0"].compute_bytes > 4 * usual["CUDA0"].compute_bytes
    # a quantised cache of values needs it, and then the CPU does it
    (quantised,) = run("no flash", replace(config, type_v="q8_0"))
    assert quantised[CPU].compute_bytes > 2 * usual[CPU].compute_bytes


def test_a_quantised_cache_is_unpacked_for_large_batches(base: EngineConfig) -> None:
    f16, q8 = run("24", replace(base, n_ctx=65536), replace(base, n_ctx=65536, type_k="q8_0", type_v="q8_0"))
    assert q8["CUDA0"].kv_bytes == f16["CUDA0"].kv_bytes * 34 // 64
    assert q8["CUDA0"].compute_bytes > f16["CUDA0"].compute_bytes


@pytest.mark.parametrize("machine", ["zero", "absurd"])
def test_readings_do_not_matter_where_layers_are_named(base: EngineConfig, machine: str) -> None:
    placed = replace(base, n_gpu_layers=20, tensor_split=(1.0,))
    assert run(machine, placed) == run("24", placed)


def test_what_would_be_mapped(base: EngineConfig) -> None:
    """Pinned memory gives way to the mapped file; a device that shares the RAM does without mapping unless told."""
    auto, mapped = replace(base, load_mode="auto"), replace(base, load_mode="mmap")
    locked = replace(base, load_mode="mlock")
    for machine, config, expected in [
        ("24", auto, True),
        ("24", mapped, True),
        ("24", base, False),
        ("24", locked, False),
        ("igpu", auto, False),
        ("igpu", mapped, True),
    ]:
        rows = rows_on(machine, config).rows
        host = next(row for row in rows if row.buffer.endswith("_Host"))
        assert host.host
        assert host.device == CPU
        assert host.weights_bytes > 0
        assert host.mapped_bytes == (host.weights_bytes if expected else 0)
        assert sum(row.mapped_bytes for row in rows) == host.mapped_bytes
    only_cpu = replace(auto, split_mode="none", main_gpu=-1)
    assert any(row.mapped_bytes for row in rows_on("igpu", only_cpu).rows)


def test_repacked_weights_are_never_mapped(base: EngineConfig) -> None:
    rows = {row.buffer: row for row in dry_run(replace(base, load_mode="mmap", split_mode="none", main_gpu=-1)).rows}
    assert rows["CPU"].mapped_bytes == rows["CPU"].weights_bytes > 0
    if "CPU_REPACK" in rows:  # which types are repacked depends on the CPU
        assert not rows["CPU_REPACK"].host
        assert rows["CPU_REPACK"].mapped_bytes == 0


def test_as_many_devices_as_llama_cpp_schedules(base: EngineConfig) -> None:
    gpus = tuple(FakeGpu(f"CUDA{i}", 24 * GIB) for i in range(15))
    (rows,) = run(gpus, replace(base, tensor_split=(0.0,) * 14 + (1.0,)))
    assert rows["CUDA14"].kv_bytes == KV_PER_TOKEN["llama-8b"] * CELLS


def test_without_the_account_the_log_tells_compute_buffers(base: EngineConfig, tmp_path: Path) -> None:
    """The state of things where the C++ library is none that is known."""
    child = tmp_path / "child.py"
    child.write_text(
        "from localllm.llama import breakdown\nfrom localllm.engine import dryrun\nbreakdown._layout = lambda: None\ndryrun.main()\n"
    )
    gpus = MACHINES["24"]
    config = replace(base, n_gpu_layers=20)
    told = dry_run(config, command=fake_gpu.command(gpus, str(child)))
    exact = dry_run(config, command=fake_gpu.command(gpus))
    assert (told.exact, exact.exact) == (False, True)
    assert told.n_cells == exact.n_cells == CELLS
    rows = by_device(told.rows)
    for device, row in by_device(exact.rows).items():
        assert rows[device].compute_bytes == pytest.approx(row.compute_bytes, abs=5243)
        assert rows[device].output_bytes == row.output_bytes
        assert rows[device].weights_bytes == rows[device].kv_bytes == 0
