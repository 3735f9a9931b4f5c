"""Weights in numbers measured or worked out by hand: copies, overrides, adapters, mappings."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.errors import UsageError
from localllm.gguf import Header, Tensor, read_header
from localllm.plan.buffers import repack_of, repacks
from localllm.plan.footprint import Footprint
from localllm.plan.spec import CPU, Amount, Bytes, combined, padded, row_bytes
from localllm.plan.weights import experts_on_cpu
from tests import sparse_models
from tests.fake_gpu import APU, RTX_24, FakeGpu
from tests.plan.reality import device, footprint, write
from tests.sparse_models import Sparse

TWO = (RTX_24, FakeGpu("CUDA1", 8 << 30))


def of(model: Sparse, folder: Path, *gpus: FakeGpu, features: tuple[str, ...] | None = ("avx2",)) -> Footprint:
    return Footprint(read_header(write(model, folder)), [device(gpu) for gpu in gpus], cpu_features=features)


def test_measured_sizes(tmp_path: Path) -> None:
    """research/memory.md, measured with llama.cpp."""
    gemma = of(sparse_models.gemma3_1b(), tmp_path, RTX_24)
    assert gemma.weights(gemma.architecture.shape()).by_device == {"CUDA0": 713_932_800, CPU: 320_864_256}
    deepseek = of(sparse_models.deepseek2_lite(), tmp_path, RTX_24)
    assert deepseek.weights(deepseek.architecture.shape()).by_device == {"CUDA0": 8_783_166_208, CPU: 117_964_800}


def test_a_tied_embedding_is_there_twice_where_its_copy_lies_elsewhere(tmp_path: Path) -> None:
    model = of(sparse_models.gemma3_1b(), tmp_path, RTX_24)
    embedding = 1152 // 32 * 34 * 262_144
    on_gpu, on_cpu = (model.weights(model.architecture.shape(n_gpu_layers=n)) for n in (1, 0))
    # the copy's last row is filled up to 1,536 weights
    assert on_gpu.total_bytes - on_cpu.total_bytes == padded(embedding + row_bytes("Q8_0", 384), 128)
    both_there = model.architecture.shape(overrides=(("token_embd", "CUDA0"),))
    assert model.weights(both_there).on(CPU) == 0


def test_a_tied_embedding_that_is_repacked_is_there_twice_on_the_cpu(tmp_path: Path) -> None:
    tied = sparse_models.llama(2, 256, 4, 2, 64, 512, 1024, 4096, tied=True, kind="Q4_0")
    embedding = 256 // 32 * 18 * 1024
    with_avx2, without = (of(tied, tmp_path, features=features) for features in (("avx2",), ("sse4_2",)))
    shape = with_avx2.architecture.shape()
    assert with_avx2.weights(shape).on(CPU) - without.weights(shape).on(CPU) == embedding
    assert with_avx2.repacked_bytes(shape) == with_avx2.weights(shape).on(CPU) - embedding - 5 * 256 * 4
    assert without.repacked_bytes(shape) == 0
    unknown = of(tied, tmp_path, features=None)
    assert "not known" in unknown.weights(shape).doubt
    assert of(sparse_models.llama_8b(), tmp_path, features=None).weights(shape).exact, "nothing is there twice"


def test_weights_in_pinned_memory_are_not_repacked(tmp_path: Path) -> None:
    model = of(sparse_models.llama_8b(), tmp_path, RTX_24)
    assert model.repacked_bytes(model.architecture.shape(n_gpu_layers=0)) == 0
    alone = model.architecture.shape(n_gpu_layers=0, split_mode="none", main_gpu=-1)
    assert model.repacked_bytes(alone) > 1 << 30


def test_a_cpu_with_amx_is_doubtful(tmp_path: Path) -> None:
    model = of(sparse_models.llama_8b(), tmp_path, features=("avx2", "avx512f", "amx_tile", "amx_int8"))
    assert "AMX" in model.weights(model.architecture.shape()).doubt


def test_rows_split_over_devices_are_doubtful(tmp_path: Path) -> None:
    model = of(sparse_models.llama_8b(), tmp_path, *TWO)
    shape = model.architecture.shape(split_mode="row", tensor_split=(1.0, 1.0))
    assert "rows" in model.weights(shape).doubt


def test_an_unknown_backend_is_counted_like_the_widest(tmp_path: Path) -> None:
    model = of(sparse_models.gpt_oss_20b(), tmp_path, FakeGpu("NPU0", 24 << 30))
    cuda = of(sparse_models.gpt_oss_20b(), tmp_path, RTX_24)
    shape = model.architecture.shape()
    assert model.weights(shape).on("NPU0") == cuda.weights(shape).on("CUDA0")
    assert "NPU" in model.weights(shape).doubt
    assert cuda.weights(shape).exact


def test_graphics_that_share_the_ram_wait_behind_cards(tmp_path: Path) -> None:
    model = of(sparse_models.llama_8b(), tmp_path, APU, RTX_24)
    shape = model.architecture.shape()
    assert [each.name for each in model.used(shape)] == ["CUDA0"]
    assert model.weights(shape).on("Vulkan0") == 0


def test_experts_of_the_first_layers_stay_on_the_cpu(tmp_path: Path) -> None:
    model = of(sparse_models.qwen3_30b_a3b(), tmp_path, RTX_24)
    sizes = [model.weights(model.architecture.shape(overrides=experts_on_cpu(k))) for k in (0, 1, 16, 48)]
    assert experts_on_cpu(0) == ()
    on_gpu = [size.on("CUDA0") for size in sizes]
    assert on_gpu == sorted(on_gpu, reverse=True)

    def experts(n_layers: int) -> int:
        """Of the first layers, with the last row of those that are 768 wide filled up."""
        tensors = [t for t in model.header.tensors if "_exps" in t.name and int(t.name.split(".")[1]) < n_layers]
        return sum(padded(t.n_bytes + (row_bytes(t.type, 256) if t.shape[0] == 768 else 0), 128) for t in tensors)

    assert on_gpu == [on_gpu[0] - experts(k) for k in (0, 1, 16, 48)]


@pytest.mark.parametrize("override, said", [(("blk.(", CPU), "regular expression"), (("blk", "CUDA7"), "CUDA7")])
def test_an_override_that_makes_no_sense(override: tuple[str, str], said: str, tmp_path: Path) -> None:
    model = of(sparse_models.llama_1b(), tmp_path, RTX_24)
    with pytest.raises(UsageError, match=said):
        model.weights(model.architecture.shape(overrides=(override,)))


def test_an_adapter_lies_with_what_it_changes(tmp_path: Path) -> None:
    model = of(sparse_models.llama(4, 256, 4, 2, 64, 512, 1024, 4096), tmp_path, RTX_24)
    names = [f"blk.{i}.attn_q.weight.lora_{part}" for i in range(4) for part in "ab"]
    tensors = tuple(Tensor(name, (256, 8) if name.endswith("a") else (8, 256), "F16", 0, 4096) for name in names)
    adapter = Header(3, 32, {}, tensors, 0, 0, "", "")
    half = model.architecture.shape(n_gpu_layers=3)
    assert model.adapter(adapter, half) == Amount({CPU: 4 * 4096, "CUDA0": 4 * 4096})
    moved = model.architecture.shape(overrides=(("attn_q", CPU),))
    assert model.adapter(adapter, moved).by_device == {CPU: 8 * 4096}
    foreign = Header(3, 32, {}, (Tensor("blk.9.attn_q.weight.lora_a", (256, 8), "F16", 0, 4096),), 0, 0, "", "")
    assert not model.adapter(foreign, half).exact


def test_a_projector_goes_to_the_first_device(tmp_path: Path) -> None:
    model = of(sparse_models.llama_1b(), tmp_path, *TWO)
    projector = Header(3, 32, {}, (Tensor("v.blk.0.ffn_up.weight", (64, 64), "F16", 0, 8192),), 0, 0, "", "")
    assert model.projector(projector, model.architecture.shape(tensor_split=(1.0, 1.0))).by_device == {"CUDA0": 8192}
    assert model.projector(projector, model.architecture.shape(n_gpu_layers=0)).by_device == {CPU: 8192}


def test_which_files_are_mapped(tmp_path: Path) -> None:
    plain, apu = of(sparse_models.llama_1b(), tmp_path, RTX_24), of(sparse_models.llama_1b(), tmp_path, APU)
    assert [plain.maps_file(plain.architecture.shape(load_mode=mode)) for mode in ("auto", "mmap", "none", "mlock")] == [
        True,
        True,
        False,
        False,
    ]
    assert not apu.maps_file(apu.architecture.shape()), "llama.cpp does not map for graphics that share the RAM"


def test_a_mapping_of_what_is_left_on_the_cpu_ends_with_its_last_tensor(tmp_path: Path) -> None:
    model = footprint(write(sparse_models.llama_8b(), tmp_path), [RTX_24])
    header = model.header
    first = min(tensor.offset for tensor in header.tensors)
    shape = model.architecture.shape(n_gpu_layers=33 - 4)
    end = max(t.offset + t.n_bytes for t in header.tensors if t.name.startswith(("token_embd", "blk.0.", "blk.1.", "blk.2.", "blk.3.")))
    assert model.mapped_bytes(shape) == end - first
    assert model.mapped_bytes(model.architecture.shape()) == header.tensors[0].n_bytes


def test_all_layers_or_none_are_the_whole_model(tmp_path: Path) -> None:
    model = of(sparse_models.llama_8b(), tmp_path, *TWO)
    sizes = [model.weights(model.architecture.shape(n_gpu_layers=n, tensor_split=(1.0, 1.0))) for n in range(34)]
    assert {size.total_bytes for size in sizes} == {sum(t.n_bytes for t in model.header.tensors)}
    on_gpu = [size.total_bytes - size.on(CPU) for size in sizes]
    assert on_gpu == sorted(on_gpu)


@pytest.mark.parametrize(
    "features, kernels",
    [
        ((), ""),
        (("sse4_2",), ""),
        (("avx2",), "avx2"),
        (("avx2", "avx512f", "avx512bw"), "avx512"),
        (("avx2", "avx512f"), "avx2"),
        (("neon",), ""),
        (("neon", "dotprod"), "dotprod"),
        (("neon", "dotprod", "i8mm"), "i8mm"),
    ],
)
def test_repacking_kernels(features: tuple[str, ...], kernels: str) -> None:
    assert repack_of(features) == kernels


@pytest.mark.parametrize(
    "name, shape, kind, kernels, expected",
    [
        ("blk.0.attn_q.weight", (256, 256), "Q4_K", "avx2", True),
        ("blk.0.attn_q.weight", (256, 252), "Q4_K", "avx2", False),
        ("blk.0.attn_q.weight", (256, 256), "Q8_0", "avx2", False),
        ("blk.0.attn_q.weight", (256, 252), "Q8_0", "dotprod", True),
        ("blk.0.ffn_up_exps.weight", (256, 256, 8), "Q4_0", "avx2", True),
        ("blk.0.attn_k_b.weight", (256, 256, 8), "Q4_0", "avx2", False),
        ("token_embd.weight", (256, 256), "Q4_0", "avx2", False),
        ("blk.0.attn_q.weight", (256, 256), "Q2_K", "avx512", True),
        ("blk.0.attn_q.weight", (256, 256), "Q4_K", "", False),
    ],
)
def test_what_is_repacked(name: str, shape: tuple[int, ...], kind: str, kernels: str, expected: bool) -> None:
    assert repacks(Tensor(name, shape, kind, 0, 1), kernels) is expected


def test_rows_and_padding() -> None:
    assert (row_bytes("q8_0", 1024), row_bytes("Q4_K", 512), row_bytes("F16", 3)) == (1088, 288, 6)
    assert (padded(129, 128), padded(128, 128), padded(0, 128)) == (256, 128, 0)


def test_amounts_add_up_and_keep_their_doubts() -> None:
    total = combined([Amount({CPU: 1}), Amount({CPU: 2, "CUDA0": 3}, "one"), Amount({}, "two"), Amount({}, "one")])
    assert total == Amount({CPU: 3, "CUDA0": 3}, "one; two")
    assert (Amount({CPU: 1}) + Amount({CPU: 1})).on(CPU) == 2
    assert Bytes(CPU, 1, 2, 3, 4).total_bytes == 10
