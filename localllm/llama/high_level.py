"""The bindings' own high-level class, `llama_cpp.Llama`, as its users drive it. Only benchmarks compare with it.

What differs from our contexts: one sequence, room for its own context only, its own sampler chain
(the same samplers without DRY, XTC and top-n-sigma), and the text of the answer is decoded anew for every token.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from functools import cache
from typing import Any

import llama_cpp

from localllm.errors import ModelError
from localllm.llama import lib
from localllm.llama.context import KV_TYPES, ContextParams

clock = time.perf_counter


class _Unending(llama_cpp.Llama):
    """Goes on after an end token: the text gets a full stop in its place, the model sees its own.

    So does a token that is no text by itself: the class's time for invalid UTF-8 grows without
    bound, which says nothing about ordinary use.
    """

    token_s: list[float]
    """When each token of the answer was there."""

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None]:
        for token in super().generate(*args, **kwargs):
            self.token_s.append(clock())
            yield self._shown(token)

    @cache  # noqa: B019  one instance lives as long as its process
    def _shown(self, token: int) -> int:
        ends = llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
        broken = "\ufffd" in self.detokenize([token]).decode("utf-8", "replace")
        return self.tokenize(b".", add_bos=False)[0] if ends or broken else token


class HighLevel:
    """One `llama_cpp.Llama` with the threads, batch sizes, KV types and flash attention of `params`."""

    def __init__(self, path: str, params: ContextParams, *, n_gpu_layers: int) -> None:
        lib.take_errors()
        try:
            self._llama = _Unending(
                path,
                n_gpu_layers=n_gpu_layers,
                n_ctx=params.n_ctx,
                n_batch=params.n_batch,
                n_ubatch=params.n_ubatch,
                n_threads=params.n_threads,
                n_threads_batch=params.n_threads,
                flash_attn=params.flash_attn != "off",
                swa_full=params.swa_full,
                type_k=KV_TYPES[params.type_k],
                type_v=KV_TYPES[params.type_v],
                verbose=False,
            )
        except ValueError as error:
            raise ModelError(f"llama_cpp.Llama cannot load it: {lib.take_errors() or error}", hint="leave out --compare") from error

    def complete(self, tokens: tuple[int, ...], n_gen: int, seed: int) -> tuple[float, list[float]]:
        """Stream a completion of exactly `n_gen` tokens, reusing nothing; returns when its stream ended and when each token was there."""
        llama = self._llama
        llama.reset()
        llama.token_s = []
        for _ in llama.create_completion(list(tokens), max_tokens=n_gen, seed=seed, stream=True):
            pass
        return clock(), llama.token_s

    def close(self) -> None:
        self._llama.close()
