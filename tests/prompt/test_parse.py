"""The recorded outputs in data/ are one per dialect and situation; however they are cut, the same comes out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.prompt.family import Family, detect_family
from localllm.prompt.parse import CallArguments, CallStart, OutputParser, Piece, Text, markers
from localllm.prompt.stream import Utf8Stream

RECORDED = [json.loads(path.read_text("utf-8")) for path in sorted((Path(__file__).parent / "data").glob("*.json"))]
CASES = [
    pytest.param(Family(book["family"]), book["tools"], case, id=f"{book['family']}-{case['title'].replace(' ', '-')}")
    for book in RECORDED
    for case in book["cases"]
]
TOOLS = RECORDED[0]["tools"]


def summed(pieces: Iterable[Piece]) -> dict[str, Any]:
    out: dict[str, Any] = {"reasoning": "", "answer": "", "calls": []}
    for piece in pieces:
        match piece:
            case Text(channel, text):
                assert text
                out[channel] += text
            case CallStart(index, name):
                assert index == len(out["calls"])
                out["calls"].append({"name": name, "arguments": ""})
            case CallArguments(index, delta):
                assert index == len(out["calls"]) - 1
                out["calls"][index]["arguments"] += delta
    return out


def parsed(family: Family, cuts: Iterable[str], tools: Any = TOOLS, *, reasoning_open: bool = False) -> dict[str, Any]:
    parser = OutputParser(family, tools=tools, reasoning_open=reasoning_open)
    pieces = [piece for cut in cuts for piece in parser.feed(cut)]
    return summed([*pieces, *parser.finish()])


def test_every_family_is_recorded() -> None:
    assert {book["family"] for book in RECORDED} == set(Family)


@pytest.mark.parametrize("family, tools, case", CASES)
def test_recorded_output(family: Family, tools: Any, case: dict[str, Any]) -> None:
    assert parsed(family, [case["output"]], tools) == {key: case[key] for key in ("reasoning", "answer", "calls")}


@pytest.mark.parametrize("family, tools, case", CASES)
def test_where_it_is_cut_does_not_matter(family: Family, tools: Any, case: dict[str, Any]) -> None:
    text = case["output"]
    whole = parsed(family, [text], tools)
    assert parsed(family, text, tools) == whole
    for i in range(len(text) + 1):
        assert parsed(family, [text[:i], text[i:]], tools) == whole
    if len(text) <= 60:
        for i in range(len(text) + 1):
            for j in range(i, len(text) + 1):
                assert parsed(family, [text[:i], text[i:j], text[j:]], tools) == whole


@pytest.mark.parametrize("family, tools, case", CASES)
def test_where_the_bytes_are_cut_does_not_matter(family: Family, tools: Any, case: dict[str, Any]) -> None:
    data = case["output"].encode()
    whole = parsed(family, [case["output"]], tools)
    for i in range(len(data) + 1):
        stream = Utf8Stream()
        assert parsed(family, [stream.push(data[:i]), stream.push(data[i:]), stream.flush()], tools) == whole


@pytest.mark.parametrize("family, tools, case", CASES)
def test_an_answer_cut_short_is_a_prefix(family: Family, tools: Any, case: dict[str, Any]) -> None:
    """What was shown while streaming is never taken back: more input only adds to it."""
    parser = OutputParser(family, tools=tools)
    pieces: list[Piece] = []
    for char in case["output"]:
        pieces += parser.feed(char)
    before = summed(pieces)
    after = summed([*pieces, *parser.finish()])
    assert after["reasoning"].startswith(before["reasoning"])
    assert after["answer"].startswith(before["answer"])
    assert [call["name"] for call in after["calls"]][: len(before["calls"])] == [call["name"] for call in before["calls"]]


FRAGMENTS = sorted(set().union(*(markers(family) for family in Family)))
FRAGMENTS += ['{"name": "get_weather", "arguments": {"city": "x"}}', '{"name"', '"arguments": ', "get_weather", "to=functions.f"]
FRAGMENTS += ["<function=", "<parameter=a>", "</parameter>", "</function>", "function", "```json\n", "assistant"]
FRAGMENTS += ["{", "}", "[", "]", '"', "\\", ",", ":", " ", "\n", "<", "é"]


@given(st.sampled_from(list(Family)), st.lists(st.sampled_from(FRAGMENTS), max_size=20), st.data())
def test_any_output_parses_and_cuts_do_not_matter(family: Family, fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cut = data.draw(st.integers(0, len(text)))
    whole = parsed(family, [text])
    assert parsed(family, [text[:cut], text[cut:]]) == whole == parsed(family, text)


@given(st.sampled_from([f for f in Family if f is not Family.GPT_OSS]), st.lists(st.sampled_from(FRAGMENTS), max_size=20))
def test_without_tools_everything_is_answer_or_reasoning(family: Family, fragments: list[str]) -> None:
    text = "".join(fragments)
    out = parsed(family, [text], tools=False)
    assert out["calls"] == []
    if not text.lstrip().startswith(("<think>", "[THINK]")):
        assert out["answer"] == text


@pytest.mark.parametrize("family, closing", [(Family.HERMES, "</think>"), (Family.DEEPSEEK, "</think>"), (Family.MISTRAL, "[/THINK]")])
def test_reasoning_that_the_prompt_opened(family: Family, closing: str) -> None:
    out = parsed(family, f"I'm\nthinking\n{closing}\n\nHello", reasoning_open=True)
    assert out == {"reasoning": "I'm\nthinking", "answer": "Hello", "calls": []}


def test_reasoning_that_the_prompt_opened_in_harmony() -> None:
    out = parsed(Family.GPT_OSS, "so<|end|><|start|>assistant<|channel|>final<|message|>Hi", reasoning_open=True)
    assert out == {"reasoning": "so", "answer": "Hi", "calls": []}


@pytest.mark.parametrize("family", list(Family))
def test_arguments_stream_before_the_call_is_complete(family: Family) -> None:
    book = next(book for book in RECORDED if book["family"] == family)
    case = next(case for case in book["cases"] if case["calls"] and '"city": "Paris"' in case["calls"][0]["arguments"])
    start = case["output"].index('"Paris"') + 3
    parser = OutputParser(family, tools=book["tools"])
    out = summed(parser.feed(case["output"][:start]))
    assert out["calls"] == [{"name": "get_weather", "arguments": '{"city": "Pa'}]


def test_a_long_text_parameter_streams() -> None:
    parser = OutputParser(Family.HERMES, tools=TOOLS)
    out = summed(parser.feed('<tool_call>\n<function=edit_file>\n<parameter=text>\nfirst "line"\nsecond'))
    assert out["calls"] == [{"name": "edit_file", "arguments": '{"text": "first \\"line\\"\\nsecond'}]


def test_an_answer_streams_without_delay() -> None:
    parser = OutputParser(Family.HERMES, tools=TOOLS)
    assert parser.feed("Hello") == [Text("answer", "Hello")]
    assert parser.feed(" wor") == [Text("answer", " wor")]
    assert parser.feed("ld <") == [Text("answer", "ld")]
    assert parser.feed("b") == [Text("answer", " <b")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    "source, family",
    [
        ("{{ '<|im_start|>' }}<tool_call>", Family.HERMES),
        ("<|start_header_id|> <|python_tag|>", Family.LLAMA3),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", Family.MISTRAL),
        ("<｜User｜><｜Assistant｜><think>", Family.DEEPSEEK),
        ("<|start|>assistant<|channel|>final", Family.GPT_OSS),
        ("<start_of_turn>model", Family.JSON),
    ],
)
def test_detect_family(source: str, family: Family) -> None:
    assert detect_family(source) is family
