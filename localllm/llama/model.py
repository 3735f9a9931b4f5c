"""A loaded model file: weights, vocabulary, metadata. Thread-safe once loaded (read only)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from localllm.errors import EngineError, InvalidRequest, ModelError, UsageError
from localllm.gguf import read_model
from localllm.llama import buffers, lib
from localllm.llama.lib import api

Progress = Callable[[float], bool]
"""Called with the loaded fraction; returning False aborts the load."""

_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}
_LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "direct-io": 4}
_UNKNOWN, _CONTROL, _LSTRIP, _RSTRIP = 1 << 0, 1 << 3, 1 << 7, 1 << 8


class LoadAborted(EngineError):
    """The progress callback asked to stop."""


class Model:
    """A model and its vocabulary; token ids are ints in [0, n_vocab)."""

    def __init__(
        self,
        path: str,
        *,
        n_gpu_layers: int = -1,
        tensor_split: Sequence[float] = (),
        main_gpu: int = 0,
        split_mode: str = "layer",
        overrides: Sequence[tuple[str, str]] = (),
        load_mode: str = "auto",
        no_alloc: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Load `path`, or the whole of which it is a part; raises ModelError for an unusable file, LoadAborted if `progress` said so.

        `tensor_split` is the share of each device; `overrides` are pairs of a regular expression of tensor names and the buffer
        for them, the first match wins; UsageError for more devices or other buffers than there are. With `no_alloc` nothing is
        allocated and no weight is read: such a model serves to make contexts whose memory is asked for.
        """
        # no file reaches C code unchecked; of a split model llama.cpp wants the first part
        path = str(read_model(Path(path)).files[0])
        self.path = path
        self.handle: int | None = None
        params = api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.main_gpu = main_gpu
        params.split_mode = _SPLIT_MODES[split_mode]
        # llama.cpp keeps both pointers
        self._split, self._overrides = _shares(tensor_split), _placements(overrides)
        params.tensor_split = self._split
        params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p) if overrides else None
        params.no_alloc = no_alloc
        # llama.cpp aborts when told to map what it shall not allocate
        params.load_mode = _LOAD_MODES["none" if no_alloc else load_mode]
        self.no_alloc = no_alloc
        self.maps_files = buffers.maps_files(load_mode, split_mode, main_gpu)
        """Whether `load_mode` maps the file on this machine; with `no_alloc`, whether it would."""
        aborted = False
        failure: BaseException | None = None

        def on_progress(fraction: float, _: object) -> bool:
            nonlocal aborted, failure
            try:
                aborted = aborted or (progress is not None and not progress(fraction))
            except BaseException as error:  # an exception cannot cross C; stop the load and raise it after
                failure, aborted = error, True
            return not aborted

        callback = api.llama_progress_callback(on_progress)
        params.progress_callback = callback
        lib.take_errors()
        with lib.log_lines() as lines:
            handle = api.llama_model_load_from_file(os.fsencode(path), params)
        self.buffers = buffers.logged(lines)
        """What llama.cpp logged of the buffers with weights."""
        if failure is not None:
            if handle:
                api.llama_model_free(handle)
            raise failure
        if not handle:
            if aborted:
                raise LoadAborted(f"loading {os.path.basename(path)} was stopped")
            reason = lib.take_errors() or "llama.cpp gave no reason"
            raise ModelError(
                f"{os.path.basename(path)} cannot be loaded: {reason}",
                hint="the file may be damaged, incomplete or of an unknown architecture; fetch it again",
            )
        self.handle = handle
        self.vocab = api.llama_model_get_vocab(handle)
        self.n_vocab = int(api.llama_vocab_n_tokens(self.vocab))
        self.n_ctx_train = int(api.llama_model_n_ctx_train(handle))
        self.n_embd = int(api.llama_model_n_embd(handle))
        self.n_layer = int(api.llama_model_n_layer(handle))
        self.n_params = int(api.llama_model_n_params(handle))
        self.size_bytes = int(api.llama_model_size(handle))
        self.n_swa = int(api.llama_model_n_swa(handle))
        self.is_recurrent = bool(api.llama_model_is_recurrent(handle))
        self.is_hybrid = bool(api.llama_model_is_hybrid(handle))
        self.bos = int(api.llama_vocab_bos(self.vocab))
        self.eos = int(api.llama_vocab_eos(self.vocab))
        self.add_bos = bool(api.llama_vocab_get_add_bos(self.vocab))
        self._pieces: dict[int, bytes] = {}

    def close(self) -> None:
        """Free the weights; contexts made from the model must be closed before."""
        if self.handle is not None:
            api.llama_model_free(self.handle)
            self.handle = None

    def tokenize(self, text: str | bytes, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; `parse_special` lets control tokens in the text become themselves.

        Lone surrogates become "?" and invalid UTF-8 U+FFFD: half a code point aborts llama.cpp.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        while True:
            buffer = (api.llama_token * room)()
            n = api.llama_tokenize(self.vocab, data, len(data), buffer, room, add_special, parse_special)
            if n >= 0:
                return buffer[:n]
            if n == -(1 << 31):
                raise InvalidRequest("the text is too long to tokenise", hint="send less text")
            room = -n

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for, control tokens included by name; may end inside a code point."""
        piece = self._pieces.get(token)
        if piece is None:
            if not 0 <= token < self.n_vocab:
                raise InvalidRequest(f"token id {token} is outside the vocabulary of {self.n_vocab}", hint="use ids below that")
            room = 64
            while True:
                buffer = ctypes.create_string_buffer(room)
                n = api.llama_token_to_piece(self.vocab, token, buffer, room, 0, True)
                if n >= 0:
                    break
                room = -n
            piece = self._pieces[token] = buffer.raw[:n]
        return piece

    def attributes(self, token: int) -> int:
        """llama.cpp's attribute bits of a token."""
        return int(api.llama_vocab_get_attr(self.vocab, token))

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a generation (end of text, end of turn and the like)."""
        return frozenset(t for t in range(self.n_vocab) if api.llama_vocab_is_eog(self.vocab, t))

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that text may only become when the template says so."""
        ids = (t for t in range(self.n_vocab) if self.attributes(t) & (_CONTROL | _UNKNOWN))
        named = ((self.piece(t).decode("utf-8", "replace"), t) for t in ids)
        return {text: t for text, t in named if text}

    def swallows(self, token: int) -> tuple[bool, bool]:
        """Whether the tokenizer drops the white space before and after this control token."""
        bits = self.attributes(token)
        return bool(bits & _LSTRIP), bool(bits & _RSTRIP)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The scalar GGUF metadata as text (llama.cpp does not give arrays)."""
        out: dict[str, str] = {}
        for i in range(api.llama_model_meta_count(self.handle)):
            key = self._text(api.llama_model_meta_key_by_index, i)
            out[key] = self._text(api.llama_model_meta_val_str_by_index, i)
        return out

    @property
    def description(self) -> str:
        """Such as `llama 1B Q4_K - Medium`."""
        return self._text(api.llama_model_desc)

    @property
    def chat_template(self) -> str:
        """The jinja source stored in the file; empty if there is none."""
        text = api.llama_model_chat_template(self.handle, None)
        return text.decode("utf-8", "replace") if text else ""

    def _text(self, function: Callable[..., int], *arguments: int) -> str:
        room = 256
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = function(self.handle, *arguments, buffer, room)
            if n < room:
                return buffer.raw[: max(n, 0)].decode("utf-8", "replace")
            room = n + 1


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _shares(split: Sequence[float]) -> Any:
    """llama.cpp reads as many numbers as it knows devices; null lets it split by free memory."""
    if not split:
        return None
    room = int(api.llama_max_devices())
    if len(split) > room:
        raise UsageError(f"the tensor split names {len(split)} devices, llama.cpp takes {room}", hint="name fewer")
    return (ctypes.c_float * room)(*split)


def _placements(overrides: Sequence[tuple[str, str]]) -> Any:
    """The pairs, ended by a pair of nulls."""
    return (_Override * (len(overrides) + 1))(*((pattern.encode(), buffers.find(name)) for pattern, name in overrides))
