"""The sampler chain and the grammar: llama-server's order and defaults, and no token that was forbidden."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp as api

from localllm.errors import EngineError, GrammarError, InvalidRequest
from localllm.llama.context import Context, ContextParams
from localllm.llama.model import Model
from localllm.llama.sampling import Sampler, top_logprobs
from localllm.types import Sampling
from tests.tiny_models import END, plain

FREE = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(str(plain(tmp_path_factory.mktemp("models") / "plain.gguf")), n_gpu_layers=0)
    yield model
    model.close()


@pytest.fixture(scope="module")
def context(model: Model) -> Iterator[Context]:
    """A context that has just decoded a prompt; row 9 has logits."""
    context = Context(model, ContextParams(n_ctx=256, n_batch=16, n_ubatch=16, flash_attn="off"))
    context.tokens[:10], context.positions[:10], context.sequences[:10] = range(65, 75), range(10), 0
    context.outputs[:10] = 0
    context.outputs[9] = 1
    context.decode(10)
    yield context
    context.close()


class Loaded:
    """Stands for a context whose logits the test chooses; enough for a sampler with a grammar."""

    def __init__(self, n_vocab: int) -> None:
        self.row = np.zeros(n_vocab, np.float32)

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        return self.row


def draw(model: Model, context: Context, sampling: Sampling, n: int, seed: int = 1) -> list[int]:
    sampler = Sampler(model, sampling, seed=seed)
    return [sampler.sample(context, 9) for _ in range(n)]


def write(model: Model, sampler: Sampler, n: int, seed: int = 0) -> bytes:
    """Up to n tokens under a grammar, from random logits; stops at an end token."""
    context, random = Loaded(model.n_vocab), np.random.default_rng(seed)
    out = b""
    for _ in range(n):
        context.row = random.normal(0, 5, model.n_vocab).astype(np.float32)
        token = sampler.sample(context, 0)  # type: ignore[arg-type]
        if token in model.end_tokens:
            break
        out += model.piece(token)
    return out


# the chain


def test_the_chain_is_llama_servers(model: Model) -> None:
    def names(sampling: Sampling) -> list[str]:
        chain = Sampler(model, sampling, seed=1)
        n = api.llama_sampler_chain_n(chain.chain)
        return [api.llama_sampler_name(api.llama_sampler_chain_get(chain.chain, i)).decode().strip("?+") for i in range(n)]

    usual = ["penalties", "dry", "top-n-sigma", "top-k", "typical", "top-p", "min-p", "xtc", "temp-ext", "dist"]
    active = Sampling(dry_multiplier=0.5, repeat_penalty=1.1, top_n_sigma=2, typical_p=0.5, xtc_probability=0.5, dynatemp_range=0.1)
    assert names(active) == usual
    assert names(Sampling(logit_bias=((1, 1.0),), dry_multiplier=0.5)) == ["logit-bias", *names(Sampling(dry_multiplier=0.5))]
    assert len(names(Sampling())) == len(usual)
    assert names(Sampling(mirostat=1)) == ["temp", "mirostat"]
    assert names(Sampling(mirostat=2)) == ["temp", "mirostat-v2"]


def test_the_defaults_are_llama_servers() -> None:
    # common_params_sampling in llama.cpp's common/common.h
    s = Sampling()
    assert (s.temperature, s.dynatemp_range, s.dynatemp_exponent) == (0.8, 0.0, 1.0)
    assert (s.top_k, s.top_p, s.min_p, s.typical_p, s.top_n_sigma, s.min_keep) == (40, 0.95, 0.05, 1.0, -1.0, 0)
    assert (s.xtc_probability, s.xtc_threshold) == (0.0, 0.1)
    assert (s.repeat_last_n, s.repeat_penalty, s.presence_penalty, s.frequency_penalty) == (64, 1.0, 0.0, 0.0)
    assert (s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n) == (0.0, 1.75, 2, 64)
    assert s.dry_sequence_breakers == ("\n", ":", '"', "*")
    assert (s.mirostat, s.mirostat_tau, s.mirostat_eta) == (0, 5.0, 0.1)


# choosing


def test_temperature_zero_is_the_likeliest_token(model: Model, context: Context) -> None:
    best = int(context.logits(9).argmax())
    for sampling in (GREEDY, Sampling(temperature=0, top_k=0, top_p=1, min_p=0), Sampling(top_k=1)):
        assert {draw(model, context, sampling, 1, seed)[0] for seed in range(20)} == {best}


def test_the_same_seed_gives_the_same_tokens(model: Model, context: Context) -> None:
    assert draw(model, context, FREE, 50, seed=7) == draw(model, context, FREE, 50, seed=7)
    assert draw(model, context, FREE, 50, seed=7) != draw(model, context, FREE, 50, seed=8)
    assert draw(model, context, FREE, 50, seed=0) == draw(model, context, FREE, 50, seed=0)


def test_tokens_come_as_often_as_their_probability_says(model: Model, context: Context) -> None:
    logits = context.logits(9).astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    best = np.argsort(-p)[:5]
    seen = Counter(draw(model, context, FREE, 4000))
    for token in best:
        # five standard deviations; the seed is fixed
        assert abs(seen[int(token)] / 4000 - p[token]) < 5 * math.sqrt(p[token] * (1 - p[token]) / 4000)


def test_top_k_keeps_the_k_likeliest(model: Model, context: Context) -> None:
    best = set(np.argsort(-context.logits(9))[:3].tolist())
    assert set(draw(model, context, Sampling(top_k=3, top_p=1, min_p=0, temperature=5), 300)) == best


def test_a_bias_forbids_and_forces(model: Model, context: Context) -> None:
    best = int(context.logits(9).argmax())
    assert best not in draw(model, context, Sampling(temperature=5, logit_bias=((best, -math.inf),)), 300)
    assert set(draw(model, context, Sampling(logit_bias=((200, 1e9),)), 20)) == {200}
    assert draw(model, context, Sampling(temperature=0, logit_bias=((best, -100.0),)), 1) != [best]


@pytest.mark.parametrize("token", [-1, 100_000])
def test_a_bias_outside_the_vocabulary_is_an_error(model: Model, token: int) -> None:
    with pytest.raises(InvalidRequest, match=f"logit_bias names token {token}"):
        Sampler(model, Sampling(logit_bias=((token, 1.0),)), seed=1)


def test_ignoring_the_end_means_no_end_token_ever(model: Model, context: Context) -> None:
    wanted = tuple((token, 50.0) for token in sorted(model.end_tokens))
    assert set(draw(model, context, Sampling(logit_bias=wanted), 20)) <= model.end_tokens
    assert not set(draw(model, context, Sampling(logit_bias=wanted, ignore_eos=True), 100)) & model.end_tokens


@pytest.mark.parametrize("penalty", [{"repeat_penalty": 1e6}, {"presence_penalty": 1e6}, {"frequency_penalty": 1e6}])
def test_penalties_see_the_prompt_and_what_was_said(model: Model, context: Context, penalty: dict[str, Any]) -> None:
    order = np.argsort(-context.logits(9)).tolist()
    sampler = Sampler(model, Sampling(temperature=0, **penalty), seed=1)
    sampler.read_prompt([order[0], order[2]])
    # each token once: those of the prompt are taken, what was said is taken too
    assert sampler.sample(context, 9) == order[1]
    assert sampler.sample(context, 9) == order[3]


def test_penalties_look_back_only_as_far_as_they_are_told(model: Model, context: Context) -> None:
    best = int(context.logits(9).argmax())
    for last_n, seen in ((11, False), (12, True), (-1, True), (0, False)):
        sampler = Sampler(model, Sampling(temperature=0, presence_penalty=1e6, repeat_last_n=last_n), seed=1)
        sampler.read_prompt([best, *(t for t in range(100, 120) if t != best)][:12])
        assert (sampler.sample(context, 9) != best) is seen


def test_dry_sees_the_prompt(model: Model, context: Context) -> None:
    best = int(context.logits(9).argmax())
    phrase = [201, 202, 203, 204, 205]
    for prompt, repeats in (([*phrase, best, 206, *phrase], True), ([*phrase, 206, best, *phrase[:1]], False)):
        sampler = Sampler(model, Sampling(temperature=0, dry_multiplier=1e3), seed=1)
        sampler.read_prompt(prompt)
        assert (sampler.sample(context, 9) != best) is repeats


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_steers_surprise(model: Model, context: Context, version: int) -> None:
    def spread(tau: float) -> int:
        return len(set(draw(model, context, Sampling(temperature=1.0, mirostat=version, mirostat_tau=tau), 400)))

    assert spread(0.5) < spread(3.0) < spread(8.0)
    again = Sampling(mirostat=version)
    assert draw(model, context, again, 20, seed=3) == draw(model, context, again, 20, seed=3)


# log-probabilities


@settings(max_examples=100)
@given(st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=60), st.integers(0, 70), st.data())
def test_logprobs_are_log_softmax(values: list[float], n: int, data: st.DataObject) -> None:
    logits = np.array(values, np.float32)
    token = data.draw(st.integers(0, len(values) - 1))
    exact = logits.astype(np.float64)
    want = exact - (exact.max() + np.log(np.exp(exact - exact.max()).sum()))
    logprob, top = top_logprobs(logits, token, n)
    assert logprob == pytest.approx(want[token], abs=1e-4)
    assert len(top) == min(n, len(values))
    assert [p for _, p in top] == pytest.approx(np.sort(want)[::-1][: len(top)], abs=1e-4)
    assert [p for _, p in top] == pytest.approx([want[i] for i, _ in top], abs=1e-4)
    assert len({i for i, _ in top}) == len(top)


def test_logprobs_bear_forbidden_tokens() -> None:
    logits = np.array([1.0, -math.inf, 2.0], np.float32)
    assert top_logprobs(logits, 1, 3)[0] == -math.inf
    assert [i for i, _ in top_logprobs(logits, 0, 2)[1]] == [2, 0]


# grammars

DIGITS = 'root ::= [0-9] [0-9] "-" [0-9]+ "."'
JSON = r"""
root   ::= object
object ::= "{" (pair ("," pair)*)? "}"
pair   ::= string ":" value
value  ::= object | string | [0-9] [0-9]?
string ::= "\"" [a-z]? [a-z]? "\""
"""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sampling", [FREE, GREEDY, Sampling(), Sampling(mirostat=2), Sampling(top_k=1)], ids=str)
def test_a_grammar_lets_only_its_own_text_through(model: Model, sampling: Sampling, seed: int) -> None:
    said = write(model, Sampler(model, sampling, seed=seed, grammar=DIGITS), 40, seed)
    assert re.fullmatch(rb"\d\d-\d+(\.)?", said)
    assert len(said) >= 5


@pytest.mark.parametrize("seed", range(10))
def test_a_recursive_grammar_ends_in_valid_json(model: Model, seed: int) -> None:
    # closing braces and quotes are favoured, so that it ends
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1, min_p=0, logit_bias=((ord("}"), 6.0), (ord('"'), 3.0)))
    said = write(model, Sampler(model, sampling, seed=seed, grammar=JSON), 400, seed)
    assert isinstance(json.loads(said), dict)


def test_after_the_grammar_only_an_end_token_follows(model: Model) -> None:
    sampler = Sampler(model, FREE, seed=1, grammar='root ::= "ab"')
    context = Loaded(model.n_vocab)
    said = [sampler.sample(context, 0) for _ in range(3)]  # type: ignore[arg-type]
    assert b"".join(map(model.piece, said[:2])) == b"ab"
    assert said[2] in model.end_tokens


def test_an_allowed_token_is_taken_as_the_chain_chose_it(model: Model, context: Context) -> None:
    # the grammar must not disturb a text that obeys it: same seed, same tokens
    anything = "root ::= [^\\x00]*"
    free = Sampler(model, FREE, seed=5)
    bound = Sampler(model, FREE, seed=5, grammar=anything)
    free_tokens, bound_tokens = [free.sample(context, 9) for _ in range(30)], [bound.sample(context, 9) for _ in range(30)]
    # a byte that begins no character is against the grammar, up to there all is equal
    parted = next((i for i, (a, b) in enumerate(zip(free_tokens, bound_tokens, strict=True)) if a != b), 30)
    ascii_only = next((i for i, t in enumerate(free_tokens) if not model.piece(t).isascii()), 30)
    assert parted >= ascii_only


def test_a_bias_does_not_lift_the_grammar(model: Model) -> None:
    sampling = Sampling(temperature=0, logit_bias=((ord("x"), 1e6),))
    assert write(model, Sampler(model, sampling, seed=1, grammar='root ::= "ab" [xy] "c"'), 10) == b"abxc"


def test_when_every_allowed_token_is_forbidden_there_is_an_error(model: Model) -> None:
    end = tuple((token, -math.inf) for token in model.end_tokens)
    sampler = Sampler(model, Sampling(logit_bias=((ord("a"), -math.inf), *end)), seed=1, grammar='root ::= "a"')
    with pytest.raises(EngineError, match="grammar allows no token|chose no token"):
        write(model, sampler, 1)


@pytest.mark.parametrize(
    "grammar, reason",
    [
        ("root ::= [a-z", "expecting|unexpected end"),
        ('root ::= "a" | other', "[Uu]ndefined rule|other"),
        ('start ::= "a"', "root"),
        ("root :: 'a'", "expecting"),
        ('root ::= root | "a"', "left recursion"),
        ("  ", "no rules"),
        ('root ::= "a"{3,1}', r"repeats something \{3,1\} times"),
        ('root ::= ("a" | "b"){3,\n 002 }', r"repeats something \{3,002\} times"),
        ('root ::= "a"{1' + "0" * 5000 + ",3}", "repeats something"),
        ("root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000, "too large"),
        ("root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(100_000)) + 'r100000 ::= "a"', "too large"),
        ("%%%", "expecting"),
        ('root ::= "\\x"', "hex|expecting"),
    ],
)
def test_a_grammar_that_does_not_parse_is_an_error_in_llama_cpps_words(
    model: Model, capfd: pytest.CaptureFixture[str], grammar: str, reason: str
) -> None:
    with pytest.raises(GrammarError, match=reason) as caught:
        Sampler(model, FREE, seed=1, grammar=grammar)
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "grammar", ['root ::= "{3,1}"', "root ::= [{3,1}(]", 'root ::= "a" # {3,1} ((("', 'root ::= "a"{1,3}', 'root ::= "\\"(" "a"{2}']
)
def test_what_only_looks_dangerous_is_taken(model: Model, grammar: str) -> None:
    assert write(model, Sampler(model, FREE, seed=1, grammar=grammar), 20)


def test_a_good_grammar_follows_a_bad_one(model: Model) -> None:
    with pytest.raises(GrammarError):
        Sampler(model, FREE, seed=1, grammar="root ::= |(")
    assert write(model, Sampler(model, FREE, seed=1, grammar='root ::= "ok"'), 5) == b"ok"


def test_a_lazy_grammar_waits_for_its_trigger(model: Model) -> None:
    sampler = Sampler(model, GREEDY, seed=1, grammar='root ::= "<t>" [0-9] [0-9] "</t>"', triggers=("(<t>)",))
    context = Loaded(model.n_vocab)

    def say(wish: str) -> str:
        context.row[:] = 0
        context.row[ord(wish)] = 10.0
        return model.piece(sampler.sample(context, 0)).decode()  # type: ignore[arg-type]

    assert [say(c) for c in "free <t>"] == list("free <t>")
    # from here on only the grammar's text
    assert say("x").isdigit()
    assert say("7") == "7"
    assert say("x") == "<"
    assert "".join(say("x") for _ in range(3)) == "/t>"


def test_a_seed_of_any_size_is_taken(model: Model, context: Context) -> None:
    # the largest 32-bit number would mean "draw one" to llama.cpp
    for seed in (-1, 0, 0xFFFFFFFF, 1 << 40, -(1 << 70)):
        assert draw(model, context, FREE, 20, seed) == draw(model, context, FREE, 20, seed)
        assert 0 <= Sampler(model, FREE, seed=seed).seed < 0xFFFFFFFF


def test_control_tokens_obey_the_grammar_too(model: Model) -> None:
    end = model.control_tokens[END]
    sampler = Sampler(model, Sampling(temperature=0, logit_bias=((end, 1e6),)), seed=1, grammar='root ::= "a" "b"?')
    context = Loaded(model.n_vocab)
    # not before the grammar's text may end
    assert [model.piece(sampler.sample(context, 0)) for _ in range(2)] == [b"a", END.encode()]  # type: ignore[arg-type]


def test_closing_twice_is_harmless(model: Model) -> None:
    sampler = Sampler(model, FREE, seed=1, grammar='root ::= "a"')
    sampler.close()
    sampler.close()
