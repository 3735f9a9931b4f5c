"""A llama.cpp context: the batch, the decode, the KV cache, sequence state. One thread at a time.

It knows rows, positions and sequence ids; it does not know requests. Rules that llama.cpp
enforces by aborting the process are checked here and become exceptions.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from localllm.errors import DoesNotFit, EngineError, InvalidRequest
from localllm.llama import buffers, lib
from localllm.llama.lib import api
from localllm.llama.model import Model

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}
_FLASH = {"auto": -1, "off": 0, "on": 1}
PARTIAL = int(api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
"""State flag: only the part that cannot be cut (recurrent state, sliding window)."""


class NoRoom(EngineError):
    """No free KV cells for this batch; the cache is unchanged."""


class BatchError(InvalidRequest):
    """A batch that llama.cpp would refuse or abort on."""


@dataclass(frozen=True, slots=True)
class ContextParams:
    """Sizes in tokens; `n_outputs` bounds the rows of one batch that may ask for logits."""

    n_ctx: int
    n_seq: int = 1
    n_batch: int = 512
    n_ubatch: int = 512
    n_outputs: int = 1
    n_threads: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: str = "auto"
    swa_full: bool = False


class Context:
    """KV cache and compute buffers of one model.

    Fill `tokens`, `positions`, `sequences` and `outputs` up to n rows, call `decode(n)`, then read
    `logits(row)` for each row whose output flag was 1. The context of a model without allocated weights
    has sizes and nothing else: it cannot decode.
    """

    def __init__(self, model: Model, params: ContextParams) -> None:
        """Allocate; raises DoesNotFit when llama.cpp cannot, EngineError when it refuses without having allocated."""
        self.handle: int | None = None
        self.model = model
        c = native(model, params)
        if params.n_seq > c.n_batch:
            raise BatchError(f"n_batch is {c.n_batch}, below {params.n_seq} sequences", hint="raise -b or lower -np")
        lib.take_errors()
        with lib.log_lines() as lines:
            handle = api.llama_init_from_model(model.handle, c)
        if not handle:
            refusal = f"llama.cpp could not create a context of {params.n_ctx} cells: {lib.take_errors() or 'no reason given'}"
            if model.no_alloc:
                raise EngineError(refusal, hint="try other KV types, or flash attention")
            raise DoesNotFit(refusal, hint="try a smaller context (-c) or f16 KV")
        self.buffers = buffers.logged(lines)
        """What llama.cpp logged of the buffers that the context has."""
        self.handle = handle
        self.memory = api.llama_get_memory(handle)
        self.n_ctx = int(api.llama_n_ctx(handle))
        self.n_seq = int(api.llama_n_seq_max(handle))
        self.n_batch = int(api.llama_n_batch(handle))
        self.n_outputs = int(c.n_outputs_max)
        self.n_vocab = model.n_vocab

        n = self.n_batch
        self.tokens: npt.NDArray[np.int32] = np.zeros(n, np.int32)
        self.positions: npt.NDArray[np.int32] = np.zeros(n, np.int32)
        self.sequences: npt.NDArray[np.int32] = np.zeros(n, np.int32)
        self.outputs: npt.NDArray[np.int8] = np.zeros(n, np.int8)
        self._one_each = np.ones(n, np.int32)
        # one pointer per row into `sequences`, set once
        self._pointers = self.sequences.ctypes.data + 4 * np.arange(n, dtype=np.uintp)
        self._batch = api.llama_batch(
            n_tokens=0,
            token=_pointer(self.tokens, ctypes.c_int32),
            embd=None,
            pos=_pointer(self.positions, ctypes.c_int32),
            n_seq_id=_pointer(self._one_each, ctypes.c_int32),
            seq_id=ctypes.cast(self._pointers.ctypes.data, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=_pointer(self.outputs, ctypes.c_int8),
        )
        self.can_cut = not model.no_alloc and self._probe_cut()

    def close(self) -> None:
        if self.handle is not None:
            api.llama_free(self.handle)
            self.handle = None

    def decode(self, n: int) -> None:
        """Run the first `n` rows of the batch arrays.

        Raises BatchError before touching llama.cpp when the batch is not acceptable, NoRoom when the
        KV cache is full (nothing changed), EngineError when the backend failed (positions of this
        batch are removed again by llama.cpp, earlier micro-batches of it stay).
        """
        if not 0 < n <= self.n_batch:
            raise BatchError(f"a batch of {n} rows does not fit n_batch {self.n_batch}", hint="split it")
        wanted = int(np.count_nonzero(self.outputs[:n]))
        if wanted > self.n_outputs:
            raise BatchError(f"{wanted} rows ask for logits, the context holds {self.n_outputs}", hint="split the batch")
        self._batch.n_tokens = n
        code = api.llama_decode(self.handle, self._batch)
        if code == 0:
            return
        if code == 1:
            lib.take_errors()
            raise NoRoom("no free KV cells for this batch", hint="use a larger context (-c)")
        if code == -1:
            raise BatchError(f"llama.cpp refused the batch: {lib.take_errors()}", hint="this is a bug in localllm; please report it")
        raise EngineError(f"decoding failed ({code}): {lib.take_errors() or 'no reason given'}", hint="see the engine log (--verbose)")

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """The logits of a batch row, shape (n_vocab,): a view that the next decode overwrites."""
        pointer = api.llama_get_logits_ith(self.handle, row)
        if not pointer:
            raise EngineError(f"row {row} has no logits", hint="ask for them before decoding")
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    def remove(self, seq: int, start: int = 0, end: int = -1) -> bool:
        """Drop positions [start, end) of a sequence; False when this model cannot drop a part."""
        return bool(api.llama_memory_seq_rm(self.memory, seq, start, end))

    def share(self, source: int, target: int, start: int = 0, end: int = -1) -> None:
        """Let `target` use the cells of `source` in [start, end): no data moves."""
        api.llama_memory_seq_cp(self.memory, source, target, start, end)

    def span(self, seq: int) -> tuple[int, int]:
        """First and last position held for `seq`; (-1, -1) when empty."""
        return int(api.llama_memory_seq_pos_min(self.memory, seq)), int(api.llama_memory_seq_pos_max(self.memory, seq))

    def clear(self) -> None:
        api.llama_memory_clear(self.memory, False)

    def state(self, seq: int, flags: int = 0) -> bytes:
        """The KV state of a sequence as bytes (with PARTIAL only what cannot be cut); empty when there is none."""
        size = int(api.llama_state_seq_get_size_ext(self.handle, seq, flags))
        buffer = (ctypes.c_uint8 * size)()
        written = int(api.llama_state_seq_get_data_ext(self.handle, buffer, size, seq, flags))
        return bytes(memoryview(buffer)[:written])

    def restore(self, seq: int, state: bytes, flags: int = 0) -> bool:
        """Put a state back under `seq`; False (and an empty sequence) when it does not fit or does not match."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if api.llama_state_seq_set_data_ext(self.handle, buffer, len(state), seq, flags):
            return True
        lib.take_errors()
        self.remove(seq)
        return False

    def _probe_cut(self) -> bool:
        """Whether the last token of a sequence can be dropped, found by trying, as llama.cpp's server does."""
        self.tokens[:2], self.positions[:2], self.sequences[:2], self.outputs[:2] = 0, (0, 1), 0, (0, 1)
        self.decode(2)
        possible = self.remove(0, 1, -1)
        self.clear()
        return possible


def _pointer(array: npt.NDArray[Any], kind: type[ctypes.c_int32 | ctypes.c_int8]) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def native(model: Model, params: ContextParams) -> Any:
    """llama.cpp's structure for a context of `model`."""
    c = api.llama_context_default_params()
    c.n_ctx = params.n_ctx
    c.n_seq_max = params.n_seq
    c.n_ubatch = min(params.n_ubatch, params.n_batch)
    # while planning several micro-batches llama.cpp drops tokens from sliding windows that the first of
    # them still needs, and the logits are wrong; one micro-batch a batch is planned and run at once
    c.n_batch = c.n_ubatch if model.n_swa else params.n_batch
    # llama.cpp reserves one output per sequence and aborts when told of fewer
    c.n_outputs_max = min(max(params.n_outputs, params.n_seq), c.n_batch)
    c.n_threads = c.n_threads_batch = params.n_threads
    c.type_k = KV_TYPES[params.type_k]
    c.type_v = KV_TYPES[params.type_v]
    c.flash_attn_type = _FLASH[params.flash_attn]
    c.swa_full = params.swa_full
    c.kv_unified = True
    c.no_perf = True
    return c
