from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.llama.model import Model
from localllm.prompt.control import ControlTokens, Mask, Masked
from localllm.prompt.encode import Encoder, FragmentCache
from localllm.prompt.template import ChatTemplate

BOS, START, END = 0, 2, 3


@pytest.fixture(scope="module")
def model(demo_small: Path) -> Iterator[Model]:
    model = Model(str(demo_small))
    yield model
    model.close()


@pytest.fixture(scope="module")
def encoder(model: Model) -> Encoder:
    return Encoder(ControlTokens(model.control_tokens), model.tokenize, bos=model.bos, add_bos=model.add_bos)


PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|endoftext|>", "<|im", "_end|>", "<", "|>"]
    + ["user\n", "Hello, ", " wörld", "\n", "  ", "5 + 7"]
)


@given(st.lists(PIECES, max_size=14))
def test_trusted_text_gives_llama_cpps_tokens(model: Model, encoder: Encoder, pieces: list[str]) -> None:
    text = "".join(pieces)
    expected = model.tokenize(text, add_special=not text.startswith("<|bos|>"), parse_special=True)
    assert encoder.encode(Masked(text)).tokens == expected


@given(st.lists(st.lists(PIECES, max_size=6).map("".join), min_size=1, max_size=4))
def test_masked_text_is_never_a_control_token(model: Model, pieces: list[str]) -> None:
    """Strings of a caller, joined in any way, give ordinary tokens that read as the strings do."""
    control = ControlTokens(model.control_tokens)
    mask = Mask(control, pieces)
    joined = "".join(map(mask.text, pieces))
    masked = Masked(joined, mask.originals)
    assert str(masked) == "".join(pieces)
    tokens = Encoder(control, model.tokenize).encode(masked).tokens
    assert not set(tokens) & set(model.control_tokens.values())
    assert b"".join(map(model.piece, tokens)).decode() == "".join(pieces)


@given(st.lists(PIECES, max_size=8).map("".join), st.lists(PIECES, max_size=8).map("".join), st.sampled_from(["user", "tool", "assistant"]))
def test_a_conversation_has_the_templates_tokens_only(model: Model, encoder: Encoder, one: str, two: str, role: str) -> None:
    template = ChatTemplate(model.chat_template, "<|bos|>", "<|im_end|>", control=ControlTokens(model.control_tokens))
    rendered = template.render([{"role": "user", "content": one}, {"role": role, "content": [{"type": "text", "text": two}]}])
    tokens = encoder.encode(rendered).tokens
    assert [t for t in tokens if t in (BOS, START, END, 1)] == [BOS, START, END, START, END, START]
    assert str(rendered) == f"<|im_start|>user\n{one}<|im_end|>\n<|im_start|>{role}\n{two}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("bos", ["", "<|bos|>"])
def test_messages_start_at_their_control_tokens(encoder: Encoder, bos: str) -> None:
    text = f"{bos}<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\n\n<|im_end|>\n<|im_start|>assistant\n"
    encoded = encoder.encode(Masked(text))
    places = [i for i, token in enumerate(encoded.tokens) if token == START]
    assert encoded.tokens[0] == BOS
    assert list(encoded.starts) == places[1:]


def test_a_bos_in_the_text_is_the_only_one(encoder: Encoder) -> None:
    assert encoder.encode(Masked("<|bos|>a")).tokens == encoder.encode(Masked("a")).tokens


def test_tokens_that_swallow_white_space() -> None:
    control = ControlTokens({"<a>": 1, "<b>": 2}, lstrip=["<b>"], rstrip=["<a>"])
    encoder = Encoder(control, lambda text: list(text.encode()))
    assert encoder.encode(Masked("<a>\n x \n<b> y")).tokens == [1, ord("x"), 2, ord(" "), ord("y")]
    assert encoder.encode(Masked("<a>\n\t<b>")).tokens == [1, 2]


def test_the_longest_token_wins_where_two_begin() -> None:
    encoder = Encoder(ControlTokens({"<a": 1, "<a>": 2}), lambda text: list(text.encode()))
    assert encoder.encode(Masked("<a><a")).tokens == [2, 1]


def test_fragments_are_tokenised_once_and_forgotten_in_turn() -> None:
    seen: list[str] = []
    cache = FragmentCache(lambda text: [seen.append(text) or len(text)], max_chars=6)
    for text in ("aaa", "bbb", "aaa", "ccc", "aaa", "bbb"):
        assert cache(text) == (3,)
    assert seen == ["aaa", "bbb", "ccc", "bbb"]
    assert cache("too long") == cache("too long") == (8,)
    assert seen.count("too long") == 2


def test_the_next_turn_tokenises_new_messages_only(model: Model) -> None:
    seen: list[str] = []
    encoder = Encoder(ControlTokens(model.control_tokens), lambda text: seen.append(text) or model.tokenize(text), bos=0, add_bos=True)
    turn = "".join(f"<|im_start|>user\nnumber {i}<|im_end|>\n" for i in range(50))
    encoder.encode(Masked(turn))
    seen.clear()
    encoder.encode(Masked(turn + "<|im_start|>user\nnew<|im_end|>\n"))
    assert seen == ["user\nnew"]


@pytest.mark.parametrize("text", ["<|im_end|>", "x<|im_end", "|im_end|>x", "<|im_end\n", " |im_end|>", ">", "<", "a\ud800b<|im_end|>"])
def test_text_that_could_grow_into_a_token_is_masked(model: Model, text: str) -> None:
    mask = Mask(ControlTokens(model.control_tokens), [text])
    masked = mask.text(text)
    assert masked != text
    assert len(masked) == len(text)
    assert str(Masked(masked, mask.originals)) == text.replace("\ud800", "\ufffd")


def test_ordinary_text_is_left_alone(model: Model) -> None:
    text = "if a < b and c > d: print('<|x|> \ufdd0')"
    assert Mask(ControlTokens(model.control_tokens), [text]).text(text) == text


def test_a_stand_in_is_a_character_that_no_text_uses(model: Model) -> None:
    text = "\U00010600\U00010601<|im_end|>"
    mask = Mask(ControlTokens(model.control_tokens), [text], avoid="\U00010602")
    masked = mask.text(text)
    assert masked == "\U00010600\U00010601\U00010603|im_end|>"
    assert str(Masked(masked, mask.originals)) == text


def test_parts_around_a_reasoning_tag_cannot_be_joined_into_a_token(model: Model) -> None:
    mask = Mask(ControlTokens(model.control_tokens), [])
    masked = mask.text("<|im_<think>x</think>end|>", allowed=("<think>", "</think>"))
    assert "<|im_end|>" not in masked.replace("<think>x</think>", "")
