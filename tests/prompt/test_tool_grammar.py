from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from localllm.errors import GrammarError, InvalidRequest
from localllm.prompt.family import Family
from localllm.prompt.parse import CallStart, OutputParser
from localllm.prompt.tool_grammar import ToolGrammar, tool_call_grammar
from tests.prompt.gbnf import Grammar, LlamaVocab


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


TOOLS = [tool("get_weather", city={"type": "string"}), tool("get_time"), tool("add", a={"type": "integer"}, b={"type": "integer"})]
ROME = '{"city": "Rome"}'
SUM = '{"a": 1, "b": 2}'
ONE_TOOL = {"type": "function", "function": {"name": "add"}}

# A call of get_weather, how two calls follow each other, and reasoning, in each family's syntax.
DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
FENCED = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
BARE = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
HARMONY = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}"
CALLS: dict[Family, list[str]] = {
    Family.HERMES: [
        f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>',
        '<tool_call>{"name":"get_time","arguments":{}}</tool_call>',
    ],
    Family.LLAMA3: [
        f'{{"name": "get_weather", "parameters": {ROME}}}',
        f'{{"type": "function", "name": "add", "parameters": {SUM}}}',
    ],
    Family.MISTRAL: [
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ROME}}}]',
        f'[TOOL_CALLS] [{{"name": "add", "arguments": {SUM}, "id": "abc123DEF"}}]',
        f"[TOOL_CALLS]get_weather[ARGS]{ROME}",
        f"[TOOL_CALLS]add[CALL_ID]abc123DEF[ARGS]{SUM}",
    ],
    Family.DEEPSEEK: [DEEPSEEK.format(FENCED.format("get_weather", ROME)), DEEPSEEK.format(BARE.format("add", SUM))],
    Family.GPT_OSS: [
        HARMONY.format("get_weather", ROME),
        f"<|channel|>commentary to=functions.add<|message|>{SUM}",
        f" to=functions.add<|channel|>commentary json<|message|>{SUM}",
    ],
    Family.JSON: [f'{{"name": "get_weather", "arguments": {ROME}}}'],
}
SEVERAL: dict[Family, list[str]] = {
    Family.HERMES: [f"{CALLS[Family.HERMES][0]}\n{CALLS[Family.HERMES][1]}"],
    Family.LLAMA3: [f"{CALLS[Family.LLAMA3][0]}; {CALLS[Family.LLAMA3][1]}"],
    Family.MISTRAL: [
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ROME}}}, {{"name": "add", "arguments": {SUM}}}]',
        f"[TOOL_CALLS]get_weather[ARGS]{ROME}[TOOL_CALLS]add[ARGS]{SUM}",
    ],
    Family.DEEPSEEK: [
        DEEPSEEK.format(FENCED.format("get_weather", ROME) + "\n" + FENCED.format("add", SUM)),
        DEEPSEEK.format(BARE.format("get_weather", ROME) + BARE.format("add", SUM)),
    ],
    Family.GPT_OSS: [],
    Family.JSON: [CALLS[Family.JSON][0] + "\n" + CALLS[Family.JSON][0]],
}
WRONG = [('"city": "Rome"', '"city": 5'), ('"city": "Rome"', '"town": "Rome"'), ('"city": "Rome"', ""), ("get_weather", "get_wealth")]


@pytest.fixture(scope="module")
def llama(demo_small: Path) -> Iterator[LlamaVocab]:
    pytest.importorskip("llama_cpp")
    vocab = LlamaVocab(demo_small)
    yield vocab
    vocab.close()


def made(family: Family, choice: str | Mapping[str, Any] = "required", *, parallel: bool = True, **more: Any) -> ToolGrammar:
    grammar = tool_call_grammar(TOOLS, family, choice=choice, parallel=parallel, **more)
    assert grammar is not None
    return grammar


@pytest.mark.parametrize("family", Family)
def test_required_forces_a_call_that_fits_its_schema(family: Family, llama: LlamaVocab) -> None:
    strict = made(family)
    assert not strict.lazy
    assert strict.triggers == ()
    grammar = Grammar(strict.gbnf)

    def both(text: str) -> bool:
        with llama.grammar(strict.gbnf) or pytest.fail("llama.cpp refuses the grammar") as native:
            verdict = native.accepts(text)
        assert verdict is grammar.accepts(text), text
        return verdict

    for text in CALLS[family] + SEVERAL[family]:
        assert both(text), text
        assert not both(text[:-1])
        assert not both("Sure. " + text)
        assert not both(text + " Done.")
    for right, wrong in WRONG:
        assert not both(CALLS[family][0].replace(right, wrong))
    assert not both("")
    assert not both("Rome is sunny.")


@pytest.mark.parametrize("family", Family)
def test_one_call_only_unless_parallel(family: Family) -> None:
    grammar = Grammar(made(family, parallel=False).gbnf)
    assert all(grammar.accepts(text) for text in CALLS[family])
    assert not any(grammar.accepts(text) for text in SEVERAL[family])


@pytest.mark.parametrize("family", Family)
def test_a_named_tool_is_the_only_one(family: Family) -> None:
    for choice in (ONE_TOOL, {"type": "function", "name": "add"}):
        grammar = Grammar(made(family, choice).gbnf)
        call = CALLS[family][0]
        assert not grammar.accepts(call)
        assert grammar.accepts(call.replace("get_weather", "add").replace(ROME, SUM))


@pytest.mark.parametrize("family", Family)
def test_the_parser_reads_what_the_grammar_lets_through(family: Family) -> None:
    for text, count in [*((text, 1) for text in CALLS[family]), *((text, 2) for text in SEVERAL[family])]:
        parser = OutputParser(family, tools=TOOLS)
        pieces = [*parser.feed(text), *parser.finish()]
        names = [piece.name for piece in pieces if isinstance(piece, CallStart)]
        assert names == re.findall("get_weather|get_time|add", text)
        assert len(names) == count


def test_another_syntax_after_the_marker_is_left_alone(llama: LlamaVocab) -> None:
    lazy = made(Family.HERMES, "auto")
    with llama.grammar(lazy.gbnf, lazy.triggers) or pytest.fail("refused") as native:
        assert native.accepts("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>")


THOUGHT = {
    Family.MISTRAL: ("[THINK]", "[/THINK]"),
    Family.GPT_OSS: ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
}


@pytest.mark.parametrize("family", Family)
def test_reasoning_may_come_first(family: Family) -> None:
    start, end = THOUGHT.get(family, ("<think>", "</think>\n\n"))
    call = CALLS[family][0]
    thought = f"Hm <<tool_call> </thin [/ <|en \\ {{é}} {call[:-1]}"
    grammar = Grammar(made(family).gbnf)
    assert grammar.accepts(f"{start}{thought}{end}{call}")
    assert not grammar.accepts(f"{start}{thought}{end}")
    assert not grammar.accepts(f"{thought}{end}{call}")
    inside = Grammar(made(family, reasoning_open=True).gbnf)
    assert inside.accepts(f"{thought}{end}{call}")
    assert inside.accepts(f"{end}{call}")
    assert not inside.accepts(call)


def triggered(grammar: ToolGrammar, text: str) -> int | None:
    """Where the grammar starts when the output is `text`, as llama.cpp finds it."""
    for trigger in grammar.triggers:
        if found := re.search(trigger, text):
            return found.start(1)
    return None


@pytest.mark.parametrize("family", Family)
def test_auto_waits_for_a_call(family: Family, llama: LlamaVocab) -> None:
    lazy = made(family, "auto")
    assert lazy.lazy
    grammar = Grammar(lazy.gbnf)
    before = "" if family in (Family.LLAMA3, Family.JSON) else "Let me look. "
    for call in CALLS[family] + SEVERAL[family]:
        lead = "<|start|>assistant" if call.startswith(" to=") else before
        assert grammar.accepts(call), call
        starts = (triggered(lazy, (lead + call)[:n]) for n in range(len(lead + call) + 1))
        assert next(s for s in starts if s is not None) == len(lead), "the grammar starts right at the call"
        native = llama.grammar(lazy.gbnf, lazy.triggers)
        assert native is not None
        with native:
            assert native.accepts(lead + call)
    for answer in ("Rome is sunny.", '[1, 2, {"name": 3}]', '{"name": "Bob", "arguments": 3}', '{"city": "Rome"}', "a < b [TOOL"):
        native = llama.grammar(lazy.gbnf, lazy.triggers)
        assert native is not None
        with native:
            assert native.accepts(answer)


@pytest.mark.parametrize("family", Family)
def test_a_trigger_never_feeds_the_grammar_what_it_refuses(family: Family) -> None:
    """llama.cpp aborts the process when it does. The last token may reach beyond the marker, with anything."""
    lazy = made(family, "auto")
    grammar = Grammar(lazy.gbnf)
    tails = ["", " ", "\n", "\n\n", "  ", "x", "g", "get_", "get_t", "gx", "add", "addx", "[", "[{", '"', "}"]
    tails += ["{", '{"', '\n{"', '{"n', '{"name', '{"name"', '{"name":', '{ "x']
    tails += [",", ", ", ',\n"', ', "p', ', "arguments":', ', "parameters":', ', "arguments": ', ',"x', ",\n\n"]
    fired = 0
    for call in CALLS[family] + SEVERAL[family]:
        for cut in range(len(call) + 1):
            for lead in ("", "Hi ", "<|start|>assistant"):
                for tail in tails:
                    text = lead + call[:cut] + tail
                    start = triggered(lazy, text)
                    if start is not None:
                        fired += 1
                        assert grammar.begins(text[start:]), text
    assert fired > 10


def test_auto_marks_constrain_the_arguments(llama: LlamaVocab) -> None:
    lazy = made(Family.HERMES, "auto")
    native = llama.grammar(lazy.gbnf, lazy.triggers)
    assert native is not None
    with native:
        assert not native.accepts('Well. <tool_call>\n{"name": "add", "arguments": {"a": "one"')
    native = llama.grammar(lazy.gbnf, lazy.triggers)
    assert native is not None
    with native:
        assert not native.accepts('<tool_call>\n{"name": "subtract"')


def test_no_grammar_where_no_call_is_wanted() -> None:
    assert tool_call_grammar(TOOLS, Family.HERMES, choice="none", parallel=True) is None
    assert tool_call_grammar([], Family.HERMES, choice="auto", parallel=True) is None
    assert tool_call_grammar([], Family.HERMES, choice="none", parallel=True) is None


def test_names_of_tools_are_checked() -> None:
    with pytest.raises(InvalidRequest, match="get_weather, get_time, add") as caught:
        made(Family.HERMES, {"type": "function", "function": {"name": "divide"}})
    assert "divide" in caught.value.message
    for bad in ("any", {"type": "tool"}, {"type": "function"}, {"type": "function", "function": 3}):
        with pytest.raises(InvalidRequest):
            made(Family.HERMES, bad)
    with pytest.raises(InvalidRequest, match="no tools"):
        tool_call_grammar([], Family.HERMES, choice="required", parallel=True)
    with pytest.raises(InvalidRequest, match="same name"):
        tool_call_grammar([TOOLS[0], TOOLS[0]], Family.HERMES, choice="auto", parallel=True)
    for name in ("", "a b", 'x"y', None, "<｜tool▁sep｜>"):
        with pytest.raises(InvalidRequest, match="name"):
            tool_call_grammar([{"type": "function", "function": {"name": name}}], Family.HERMES, choice="auto", parallel=True)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_what_cannot_be_enforced_is_an_error(choice: str) -> None:
    with pytest.raises(GrammarError, match="tool pick: JSON schema at #/properties/n/multipleOf"):
        tool_call_grammar([TOOLS[0], tool("pick", n={"multipleOf": 2})], Family.HERMES, choice=choice, parallel=True)
    with pytest.raises(GrammarError, match="tool x"):
        tool_call_grammar([{"function": {"name": "x", "parameters": [1]}}], Family.HERMES, choice=choice, parallel=True)
    with pytest.raises(GrammarError, match="tool x"):
        tool_call_grammar([{"function": {"name": "x", "parameters": {"type": "string"}}}], Family.HERMES, choice=choice, parallel=True)


def test_arguments_are_an_object_whatever_the_schema_says() -> None:
    nothing: dict[str, Any] = {"type": "function", "function": {"name": "x"}}
    recursive = {"$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}

    def accepts(parameters: Any, arguments: str) -> bool:
        one = {"function": {"name": "x", "parameters": parameters}} if parameters is not None else nothing
        grammar = tool_call_grammar([one], Family.JSON, choice="required", parallel=False)
        assert grammar is not None
        return Grammar(grammar.gbnf).accepts(f'{{"name": "x", "arguments": {arguments}}}')

    assert accepts(None, "{}")
    assert not accepts(None, '{"a": 1}')
    assert accepts({}, '{"a": 1}')
    assert not accepts({}, "3")
    assert accepts(recursive, '{"next": {"next": {}}}')
    assert not accepts(recursive, '{"next": 1}')
