"""That llama.cpp's own fit can be asked, so that plans can be held against it."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.dry import dry_run
from localllm.engine.config import EngineConfig
from localllm.rows import by_device
from tests import fake_gpu, llama_fit, sparse_models
from tests.fake_gpu import GIB, MACHINES

pytestmark = pytest.mark.skipif(bool(llama_fit.why_not()), reason=f"common_fit_params: {llama_fit.why_not()}")


def test_what_llama_cpp_fits_stays_within_its_margin(tmp_path: Path) -> None:
    path = sparse_models.write(sparse_models.llama_8b(), tmp_path / "8b.gguf")
    config = EngineConfig(str(path), n_ctx=32768, n_seq=1, n_resident=0)
    fit = llama_fit.fit(config, MACHINES["8"])
    assert fit.fits
    assert 0 < fit.n_gpu_layers < 33
    assert fit.n_ctx == 32768
    rows = by_device(dry_run(fit.applied(config), command=fake_gpu.command(MACHINES["8"])).rows)
    layer_bytes = (rows["CUDA0"].weights_bytes + rows["CUDA0"].kv_bytes) // fit.n_gpu_layers
    assert 7 * GIB - 2 * layer_bytes < rows["CUDA0"].total_bytes <= 7 * GIB


def test_it_takes_experts_off_the_gpu(tmp_path: Path) -> None:
    path = sparse_models.write(sparse_models.qwen3_30b_a3b(), tmp_path / "moe.gguf")
    config = EngineConfig(str(path), n_ctx=8192, n_seq=1, n_resident=0)
    fit = llama_fit.fit(config, MACHINES["12"])
    assert fit.fits
    assert fit.n_gpu_layers == 49
    assert {buffer for _, buffer in fit.overrides} == {"CPU"}
    rows = by_device(dry_run(fit.applied(config), command=fake_gpu.command(MACHINES["12"])).rows)
    assert rows["CUDA0"].total_bytes <= 11 * GIB


def test_it_shortens_an_open_context(tmp_path: Path) -> None:
    path = sparse_models.write(sparse_models.llama_8b(), tmp_path / "8b.gguf")
    fit = llama_fit.fit(EngineConfig(str(path), n_ctx=0, n_seq=1, n_resident=0), MACHINES["12"])
    assert fit.fits
    assert 4096 <= fit.n_ctx < 131_072


def test_it_leaves_what_was_chosen_alone(tmp_path: Path) -> None:
    path = sparse_models.write(sparse_models.llama_8b(), tmp_path / "8b.gguf")
    fit = llama_fit.fit(EngineConfig(str(path), n_ctx=131_072, n_gpu_layers=33, n_seq=1, n_resident=0), MACHINES["8"])
    assert not fit.fits
    assert (fit.n_gpu_layers, fit.n_ctx) == (33, 131_072)
