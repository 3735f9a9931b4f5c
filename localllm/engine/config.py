"""What an engine is asked to load. Choosing these values is the planner's job, not this module's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from localllm.errors import UsageError

GIB = 1 << 30
KVType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
MAX_DEVICES = 16
"""As many as llama.cpp is built for."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """A model file and how to load and serve it. Zero means "choose from the model or the machine"."""

    model_path: str
    n_ctx: int = 0
    """KV cells in total, shared by all sequences; 0 takes the trained context times `n_seq`, at most 8,192 cells."""
    n_seq: int = 8
    """Requests decoded at once (llama.cpp's -np)."""
    n_resident: int = 24
    """Finished sequences kept in the KV cache for prefix reuse, beside the running ones."""
    n_batch: int = 512
    n_ubatch: int = 512
    n_draft: int = 0
    """Drafted rows per sequence in one batch; sizes the output buffer."""
    n_threads: int = 0
    n_gpu_layers: int = -1
    """-1 offloads all layers where there is a device."""
    tensor_split: tuple[float, ...] = ()
    """The share of each device, in llama.cpp's order; empty shares out by the memory that is free when the model loads."""
    main_gpu: int = 0
    """The one device that takes part with split_mode `none`; -1 is none at all."""
    split_mode: Literal["none", "layer", "row"] = "layer"
    overrides: tuple[tuple[str, str], ...] = ()
    """Pairs of a regular expression of tensor names and the buffer for them, such as `CPU`; the first match wins (llama.cpp's -ot)."""
    type_k: KVType = "f16"
    type_v: KVType = "f16"
    flash_attn: Literal["auto", "on", "off"] = "auto"
    swa_full: bool = False
    load_mode: Literal["auto", "none", "mmap", "mlock"] = "auto"
    chat_template: str = ""
    """Overrides the template of the GGUF."""
    step_target_ms: float = 100.0
    """While answers stream, prompt chunks are sized so that a step takes about this long."""
    cache_ram_bytes: int = GIB
    state_dir: str = ""
    """Where sequence states are saved; empty keeps nothing on disk."""
    state_disk_bytes: int = 4 * GIB
    max_queue: int = 1024

    def __post_init__(self) -> None:
        def check(ok: bool, message: str, hint: str) -> None:
            if not ok:
                raise UsageError(message, hint=hint)

        check(1 <= self.n_seq <= 128, f"n_seq is {self.n_seq}", "use 1 to 128 parallel sequences")
        check(0 <= self.n_resident <= 128, f"n_resident is {self.n_resident}", "use 0 to 128")
        check(self.n_ctx >= 0, f"n_ctx is {self.n_ctx}", "use 0 (automatic) or a number of tokens")
        check(self.n_batch >= 1 and self.n_ubatch >= 1, "n_batch and n_ubatch must be at least 1", "try 512")
        check(self.n_threads >= 0, f"n_threads is {self.n_threads}", "use 0 (physical cores) or more")
        split = self.tensor_split
        check(len(split) <= MAX_DEVICES, f"the tensor split names {len(split)} devices", f"name at most {MAX_DEVICES}")
        check(all(math.isfinite(s) and s >= 0 for s in split), f"the tensor split is {split}", "use shares of 0 or more, such as 3,1")
        check(not split or sum(split) > 0, "the tensor split gives no device a share", "use shares such as 3,1, or none")
        alone = self.split_mode == "none"
        check(self.main_gpu >= (-1 if alone else 0), f"main_gpu is {self.main_gpu}", "use 0 or more, or -1 with split mode none")
        for pattern, buffer in self.overrides:
            check(bool(pattern and buffer), f"the override {pattern!r}={buffer!r} is not complete", "write PATTERN=BUFFER")
            check(_compiles(pattern), f"the override {pattern!r} is no regular expression", "see llama.cpp's -ot")
        check(self.cache_ram_bytes >= 0 and self.state_disk_bytes >= 0, "a cache size is negative", "use 0 to turn it off")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
