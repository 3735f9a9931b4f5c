"""What one run is asked to do and what it found. Plain values that cross the pipe to an arm's process."""

from __future__ import annotations

from dataclasses import dataclass

from localllm.types import Sampling


@dataclass(frozen=True, slots=True)
class Case:
    """Simultaneous requests of the same length: a prompt each, and `n_gen` tokens to generate for each.

    Every arm starts it with an empty KV cache.
    """

    prompts: tuple[tuple[int, ...], ...]
    n_gen: int
    seed: int = 0

    def sampling(self, stream: int, n_gen: int) -> Sampling:
        """llama-server's default chain with a fixed seed; end tokens are forbidden, so that lengths are fixed."""
        return Sampling(seed=self.seed + stream, max_tokens=n_gen, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of one arm found; rates are over all its requests together."""

    prompt_tps: float
    """Prompt tokens per second, from the start to the last request's first token."""
    decode_tps: float
    """Tokens per second while every request decodes; 0.0 when one token was asked for."""
    ttft_ms: float
    """Time to the first token, the median request's."""
    last_ttft_ms: float
    """The same of the request that waited longest."""
    itl_p50_ms: float = 0.0
    itl_p95_ms: float = 0.0
    python_us_per_token: float | None = None
    """Wall time between two decode calls outside of llama.cpp, per token; None where it cannot be seen."""
    rss_bytes: int = 0
    """Resident memory of the process that decodes, after the run."""
