"""Choosing the next token from a row of logits: llama-server's sampler chain and its grammar rule.

The chain and its order are those of llama.cpp's common_sampler, so equal seeds and parameters give
equal text. A grammar is checked after sampling and applied to the whole vocabulary only when the
sampled token breaks it.
"""

from __future__ import annotations

import ctypes
import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from localllm.errors import EngineError, GrammarError, InvalidRequest
from localllm.llama import lib
from localllm.llama.context import Context
from localllm.llama.lib import api
from localllm.llama.model import Model
from localllm.prompt.gate import Part, ReasoningGate
from localllm.types import Sampling

LARGEST_WINDOW = 1 << 17
"""Past tokens a penalty may look at, where the model names no context length."""
MAX_GRAMMAR_DEPTH = 500
MAX_GRAMMAR_RULES = 20_000

_OPAQUE = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\r\n]*', re.DOTALL)
"""Strings, character classes and comments: what is in them is not grammar."""
_BRACKET = re.compile(r"[()]")
_RANGE = re.compile(r"\{\s*(\d+)\s*,\s*(\d+)\s*\}")
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Sampler:
    """The sampling state of one sequence: random numbers, recent tokens, grammar position."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        *,
        seed: int,
        grammar: str = "",
        triggers: tuple[str, ...] = (),
        gate: ReasoningGate | None = None,
    ) -> None:
        """Build the chain; `triggers` (regular expressions) make the grammar wait until one matches outside of reasoning.

        Raises GrammarError for a grammar that llama.cpp does not accept and InvalidRequest for a
        logit bias outside the vocabulary.
        """
        self.chain: Any = None
        self.grammar: Any = None
        # to llama.cpp the largest 32-bit number means a random seed
        self.seed = seed % 0xFFFFFFFF
        self._n_vocab = model.n_vocab
        self._piece = model.piece
        self._gate = gate if triggers else None
        self._unheard: list[int] = []
        self._memory = _memory(model, sampling)
        for token, _ in sampling.logit_bias:
            if not 0 <= token < model.n_vocab:
                raise InvalidRequest(f"logit_bias names token {token}, the vocabulary has {model.n_vocab}", hint="use ids below that")
        if grammar:
            self.grammar = _grammar(model, grammar, triggers)
            self._ids = np.arange(model.n_vocab, dtype=np.int32)
            self._candidates = np.zeros(model.n_vocab, _CANDIDATE)
            self._single = api.llama_token_data(0, 1.0, 0.0)
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if not chain:
            raise EngineError("llama.cpp could not create a sampler")
        self.chain = chain
        for sampler in _links(model, sampling, self.seed):
            api.llama_sampler_chain_add(chain, sampler)

    def close(self) -> None:
        for handle in (self.chain, self.grammar):
            if handle is not None:
                api.llama_sampler_free(handle)
        self.chain = self.grammar = None

    def __del__(self) -> None:
        self.close()

    def sample(self, context: Context, row: int) -> int:
        """Choose the token after batch row `row` and remember it."""
        if self.grammar is None:
            return int(api.llama_sampler_sample(self.chain, context.handle, row))
        if self._gate is not None:
            token = int(api.llama_sampler_sample(self.chain, context.handle, row))
            self._hear(token, self._gate)
            return token
        logits = context.logits(row)
        token = self._choose(logits, constrained=False)
        if not self._allowed(token):
            token = self._choose(logits, constrained=True)
            # a bias or a penalty can lift what the grammar forbids, and accepting that would abort the process
            if not self._allowed(token):
                raise EngineError("the grammar allows no token here", hint="check the grammar, logit_bias and penalties")
        api.llama_sampler_accept(self.grammar, token)
        api.llama_sampler_accept(self.chain, token)
        return token

    def read_prompt(self, tokens: list[int]) -> None:
        """Let the penalties see the prompt; the grammar does not."""
        for token in tokens[-self._memory :] if self._memory else ():
            api.llama_sampler_accept(self.chain, token)

    def _hear(self, token: int, gate: ReasoningGate) -> None:
        """Give the grammar what turned out to be the answer; it restricts nothing before a trigger has matched."""
        part = gate.push(self._piece(token))
        self._unheard = [] if part is Part.REASONING else [*self._unheard, token]
        if part is Part.ANSWER:
            for unheard in self._unheard:
                api.llama_sampler_accept(self.grammar, unheard)
        if gate.part is Part.ANSWER:
            self._gate = None

    def _choose(self, logits: npt.NDArray[np.float32], *, constrained: bool) -> int:
        candidates = self._candidates
        candidates["id"] = self._ids
        candidates["logit"] = logits
        candidates["p"] = 0
        array = api.llama_token_data_array(
            data=candidates.ctypes.data_as(api.llama_token_data_p), size=self._n_vocab, selected=-1, sorted=False
        )
        if constrained:
            api.llama_sampler_apply(self.grammar, ctypes.byref(array))
        api.llama_sampler_apply(self.chain, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise EngineError("the sampler chose no token", hint="loosen the sampling parameters")
        return int(array.data[array.selected].id)

    def _allowed(self, token: int) -> bool:
        self._single.id, self._single.logit = token, 1.0
        array = api.llama_token_data_array(data=ctypes.pointer(self._single), size=1, selected=-1, sorted=False)
        api.llama_sampler_apply(self.grammar, ctypes.byref(array))
        return self._single.logit != -math.inf


def _links(model: Model, s: Sampling, seed: int) -> list[Any]:
    """The samplers of the chain, in llama-server's order."""
    links: list[Any] = []
    n_suppressed = ctypes.c_int32(0)
    suppressed = api.llama_vocab_get_suppress_tokens(model.vocab, ctypes.byref(n_suppressed))
    bias = [*s.logit_bias, *((suppressed[i], -math.inf) for i in range(n_suppressed.value))]
    if s.ignore_eos:
        bias += [(token, -math.inf) for token in model.end_tokens]
    if bias:
        array = (api.llama_logit_bias * len(bias))(*(api.llama_logit_bias(t, b) for t, b in bias))
        links.append(api.llama_sampler_init_logit_bias(model.n_vocab, len(bias), array))
    if s.mirostat:
        links.append(api.llama_sampler_init_temp(s.temperature))
        if s.mirostat == 1:
            links.append(api.llama_sampler_init_mirostat(model.n_vocab, seed, s.mirostat_tau, s.mirostat_eta, 100))
        else:
            links.append(api.llama_sampler_init_mirostat_v2(seed, s.mirostat_tau, s.mirostat_eta))
        return links
    breakers = [text.encode("utf-8", "replace") for text in s.dry_sequence_breakers]
    keep = s.min_keep
    links += [
        api.llama_sampler_init_penalties(
            model.n_vocab, _window(model, s.repeat_last_n), s.repeat_penalty, s.frequency_penalty, s.presence_penalty
        ),
        api.llama_sampler_init_dry(
            model.vocab,
            s.dry_multiplier,
            s.dry_base,
            s.dry_allowed_length,
            _window(model, s.dry_penalty_last_n),
            (ctypes.c_char_p * len(breakers))(*breakers),
            len(breakers),
        ),
        api.llama_sampler_init_top_n_sigma(s.top_n_sigma),
        api.llama_sampler_init_top_k(s.top_k),
        api.llama_sampler_init_typical(s.typical_p, keep),
        api.llama_sampler_init_top_p(s.top_p, keep),
        api.llama_sampler_init_min_p(s.min_p, keep),
        api.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, keep, seed),
        api.llama_sampler_init_temp_ext(s.temperature, s.dynatemp_range, s.dynatemp_exponent),
        api.llama_sampler_init_dist(seed),
    ]
    return links


def _window(model: Model, n: int) -> int:
    """How many past tokens `n` means: -1 is the whole context. llama.cpp takes -1 for none and allocates what it is told."""
    whole = model.n_ctx_train or LARGEST_WINDOW
    return whole if n < 0 else min(n, whole)


def _memory(model: Model, s: Sampling) -> int:
    """How many past tokens the chain looks at."""
    penalised = s.repeat_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0
    return max(_window(model, s.repeat_last_n) if penalised else 0, _window(model, s.dry_penalty_last_n) if s.dry_multiplier else 0)


def _grammar(model: Model, text: str, triggers: tuple[str, ...]) -> Any:
    """A llama.cpp grammar sampler; raises GrammarError with llama.cpp's own words."""
    _check_shape(text)
    source = text.encode("utf-8", "replace")
    lib.take_errors()
    with lib.captured_stderr() as said:
        if triggers:
            patterns = (ctypes.c_char_p * len(triggers))(*(t.encode() for t in triggers))
            handle = api.llama_sampler_init_grammar_lazy_patterns(model.vocab, source, b"root", patterns, len(triggers), None, 0)
        else:
            handle = api.llama_sampler_init_grammar(model.vocab, source, b"root")
    if not handle:
        # a syntax error is printed, the rest is logged
        reasons = [line.partition("error parsing grammar: ")[2] or line for line in said if line.strip()]
        reasons += [line for line in lib.take_errors().split("; ") if line not in ("", "failed to parse grammar")]
        reason = reasons[0] if reasons else "it has no rules"
        raise GrammarError(f"the grammar does not parse: {reason}", hint="see llama.cpp's guide to GBNF")
    return handle


def _check_shape(text: str) -> None:
    """Refuse grammars that llama.cpp's parser does not survive: it recurses per parenthesis and per rule, and
    unfolds {3,1} almost 2^64 times."""
    bare = _OPAQUE.sub(" ", text)
    depth = deepest = 0
    for bracket in _BRACKET.findall(bare):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_GRAMMAR_DEPTH or bare.count("::=") > MAX_GRAMMAR_RULES:
        limit = f"{MAX_GRAMMAR_RULES:,} rules and parentheses {MAX_GRAMMAR_DEPTH:,} deep"
        raise GrammarError("the grammar is too large", hint=f"at most {limit} are taken")
    for low, high in _RANGE.findall(bare):
        # as text: there may be more digits than int() takes
        a, b = low.lstrip("0"), high.lstrip("0")
        if (len(a), a) > (len(b), b):
            raise GrammarError(f"the grammar repeats something {{{low[:20]},{high[:20]}}} times", hint="write the smaller number first")


def top_logprobs(logits: npt.NDArray[np.float32], token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural-log probability of `token` and of the `n` likeliest tokens, under the unmodified logits."""
    peak = float(logits.max())
    norm = peak + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))
    if n <= 0:
        return float(logits[token]) - norm, []
    n = min(n, logits.size)
    best = np.argpartition(logits, -n)[-n:]
    best = best[np.argsort(-logits[best], kind="stable")]
    return float(logits[token]) - norm, [(int(i), float(logits[i]) - norm) for i in best]
