"""How a config becomes a model and a context: in the engine, in a dry run, in a benchmark. Light to import."""

from __future__ import annotations

from localllm.engine.config import EngineConfig
from localllm.hardware.cores import physical_cores
from localllm.llama.context import ContextParams
from localllm.llama.model import Model, Progress

DEFAULT_CELLS = 8192
RECURRENT_RESIDENTS = 4
"""Each sequence of a recurrent model has a state of its own, so few are kept."""


def open_model(config: EngineConfig, *, no_alloc: bool = False, progress: Progress | None = None) -> Model:
    """The model that `config` names, placed as it says."""
    return Model(
        config.model_path,
        n_gpu_layers=config.n_gpu_layers,
        tensor_split=config.tensor_split,
        main_gpu=config.main_gpu,
        split_mode=config.split_mode,
        overrides=config.overrides,
        load_mode=config.load_mode,
        no_alloc=no_alloc,
        progress=progress,
    )


def context_params(config: EngineConfig, model: Model) -> ContextParams:
    """How a context for `config` is made."""
    residents = min(config.n_resident, RECURRENT_RESIDENTS) if model.is_recurrent or model.is_hybrid else config.n_resident
    trained = model.n_ctx_train or DEFAULT_CELLS
    return ContextParams(
        n_ctx=config.n_ctx or min(trained * config.n_seq, DEFAULT_CELLS),
        n_seq=config.n_seq + residents,
        n_batch=max(config.n_batch, config.n_seq + residents),
        n_ubatch=config.n_ubatch,
        n_outputs=config.n_seq * (config.n_draft + 1),
        n_threads=n_threads(config),
        type_k=config.type_k,
        type_v=config.type_v,
        flash_attn=config.flash_attn,
        swa_full=config.swa_full,
    )


def n_threads(config: EngineConfig) -> int:
    """Threads to decode with: those of `config`, else one for each core worth it."""
    return config.n_threads or physical_cores()
