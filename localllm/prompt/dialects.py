"""How each family of models writes reasoning and tool calls: one reading function a family, top to bottom.

Each starts after leading reasoning (`parse.py` reads that) and yields pieces; text that begins like a call
and is none comes out as answer text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from localllm.prompt.calls import Output, Steps, call_array, call_object, tagged_function
from localllm.prompt.family import Family
from localllm.prompt.pieces import Text
from localllm.prompt.reader import Chunks, collect, json_value, literal, peek, rest, space, until, word
from localllm.types import Channel


def spoken(chunks: Chunks, channel: Channel = "answer") -> Steps:
    """`chunks` as text of `channel`; returns what they return."""
    while True:
        try:
            chunk = next(chunks)
        except StopIteration as end:
            return end.value
        yield None if chunk is None else Text(channel, chunk)


def plain(out: Output) -> Steps:
    """No tools were offered: all is answer."""
    yield from spoken(rest(out.source))


def hermes(out: Output) -> Steps:
    source = out.source
    while mark := (yield from spoken(until(source, "<tool_call>", "<function="))):
        if mark == "<function=":
            if not (yield from tagged_function(out)):
                yield Text("answer", mark)
            continue
        gap = yield from space(source)
        if (yield from literal(source, "<function=")):
            is_call = yield from tagged_function(out)
            gap += "" if is_call else "<function="
        else:
            is_call = yield from call_object(out, strict=False)
        if is_call:
            yield from space(source)
            yield from literal(source, "</tool_call>")
        else:
            yield Text("answer", mark + gap)


def bare_json(out: Output) -> Steps:
    """Calls instead of an answer: `{…}`, `{…}; {…}` or `[{…}, {…}]`; returns whether there was one."""
    source = out.source
    gap = yield from space(source)
    if (yield from literal(source, "[")):
        if (yield from call_array(out, strict=True)):
            return True
        yield Text("answer", gap + "[")
        return False
    any_call = False
    while (yield from peek(source)) == "{" and (yield from call_object(out, strict=True)):
        any_call = True
        gap = yield from space(source)
        if (yield from literal(source, ";", ",")):
            gap = yield from space(source)
    if gap:
        yield Text("answer", gap)
    return any_call


def plain_json(out: Output) -> Steps:
    yield from bare_json(out)
    yield from plain(out)


_BUILT_IN = re.compile(r'\s*(\w+)\.call\(\s*(\w+)\s*=\s*("(?:[^"\\]|\\.)*")\s*\)\s*', re.DOTALL)


def llama3(out: Output) -> Steps:
    source = out.source
    yield from bare_json(out)
    while (yield from spoken(until(source, "<|python_tag|>"))):
        gap = yield from space(source)
        if (yield from peek(source)) == "{" and (yield from call_object(out, strict=False)):
            yield from literal(source, ";")
            continue
        code, _ = yield from collect(rest(source))
        if built_in := _BUILT_IN.fullmatch(code):
            name, arguments = built_in[1], f'{{"{built_in[2]}": {built_in[3]}}}'
        else:
            name, arguments = "python", json.dumps({"code": code}, ensure_ascii=False)
        if code and out.tools.may_be(name):
            yield out.start(name)
            yield out.arguments(arguments)
        else:
            yield Text("answer", "<|python_tag|>" + gap + code)


def mistral(out: Output) -> Steps:
    source = out.source
    while mark := (yield from spoken(until(source, "[TOOL_CALLS]"))):
        gap = yield from space(source)
        if (yield from literal(source, "[")):
            if not (yield from call_array(out, strict=False)):
                yield Text("answer", mark + gap + "[")
        elif (yield from peek(source)) == "{":
            if not (yield from call_object(out, strict=False)):
                yield Text("answer", mark + gap)
        else:
            source.mark()
            name = yield from word(source)
            if name and (yield from literal(source, "[CALL_ID]")):
                yield from word(source)
            if not (name and ((yield from literal(source, "[ARGS]")) or (yield from peek(source)) == "{")):
                source.rewind()
                yield Text("answer", mark + gap)
                continue
            source.forget()
            yield out.start(name)
            yield from space(source)
            yield from out.stream(json_value(source))


def _spellings(text: str) -> tuple[str, ...]:
    """DeepSeek's marks as quantised and distilled models write them: `▁` may be `_`, a space or `\\_`."""
    return tuple(dict.fromkeys(text.replace("▁", blank) for blank in ("▁", "_", " ", "\\_")))


_CALLS_BEGIN, _CALLS_END = _spellings("<｜tool▁calls▁begin｜>"), _spellings("<｜tool▁calls▁end｜>")
_CALL_BEGIN, _CALL_END = _spellings("<｜tool▁call▁begin｜>"), _spellings("<｜tool▁call▁end｜>")
_SEPARATOR = _spellings("<｜tool▁sep｜>")


def deepseek(out: Output) -> Steps:
    source = out.source
    while mark := (yield from spoken(until(source, *_CALLS_BEGIN, *_CALL_BEGIN))):
        raw = mark
        first = mark in _CALL_BEGIN
        while True:
            if not first:
                raw += yield from space(source)
                raw += yield from literal(source, *_CALL_BEGIN)  # R1 leaves it out of its first call now and then
            first = False
            if not (yield from _deepseek_call(out)):
                yield Text("answer", raw)
                break
            raw = yield from space(source)
            if (yield from literal(source, *_CALLS_END)):
                break
            if not (yield from literal(source, *_CALL_BEGIN)):
                if raw:
                    yield Text("answer", raw)
                break
            first = True


def _deepseek_call(out: Output) -> Steps:
    """`name<sep>{…}` (V3.1) or `function<sep>name`, a fence and the object (R1, V3); returns whether it was one."""
    source = out.source
    source.mark()
    name = yield from word(source)
    if name and (yield from literal(source, *_SEPARATOR)) and name == "function":
        name = yield from word(source)
    if not name:
        source.rewind()
        return False
    yield from space(source)
    yield from literal(source, "```json", "```")
    yield from space(source)
    if (yield from peek(source)) != "{":
        source.rewind()
        return False
    source.forget()
    yield out.start(name)
    if (yield from out.stream(json_value(source))):
        yield from space(source)
        yield from literal(source, "```")
        yield from space(source)
    yield from literal(source, *_CALL_END)
    return True


_HARMONY_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


def gpt_oss(out: Output) -> Steps:
    source = out.source
    reasoned = False
    while True:
        gap = yield from space(source)
        if not (yield from peek(source)):
            return
        opening = yield from literal(source, "<|start|>", "<|channel|>", "to=")
        if not opening:  # the prompt opened the message, or the model forgot to
            yield Text("answer", gap)
            yield from _body(out, spoken(until(source, *_HARMONY_ENDS, "<|channel|>")))
            continue
        header, begun = yield from collect(until(source, "<|message|>"))
        header = opening + header
        if not begun:
            if "to=" in header:
                yield Text("answer", header)
            return
        channel = match[1] if (match := _CHANNEL.search(header)) else "final"
        recipient = match[1] if (match := _RECIPIENT.search(header)) else ""
        name = recipient.removeprefix("functions.")
        if out.tools and recipient and (name != recipient or out.tools.may_be(name)) and recipient != "assistant":
            yield from space(source)
            yield out.start(name)
            yield from _body(out, out.stream(_trimmed(until(source, *_HARMONY_ENDS))))
        elif channel == "analysis":
            if reasoned:
                yield Text("reasoning", "\n\n")
            reasoned = True
            yield from _body(out, spoken(until(source, *_HARMONY_ENDS), "reasoning"))
        else:
            yield from _body(out, spoken(until(source, *_HARMONY_ENDS)))


def _body(out: Output, steps: Steps) -> Steps:
    """`steps`, which read a message's body; a mark that opens the next message is left for it."""
    end = yield from steps
    if end in ("<|start|>", "<|channel|>"):
        out.source.give_back(len(end))


def _trimmed(chunks: Chunks) -> Chunks:
    """`chunks` without white space at the end."""
    held = ""
    while True:
        try:
            chunk = next(chunks)
        except StopIteration as end:
            return end.value
        if chunk is None:
            yield None
            continue
        kept = (held + chunk).rstrip()
        held = (held + chunk)[len(kept) :]
        if kept:
            yield kept


DIALECTS: dict[Family, Callable[[Output], Steps]] = {
    Family.HERMES: hermes,
    Family.LLAMA3: llama3,
    Family.MISTRAL: mistral,
    Family.DEEPSEEK: deepseek,
    Family.GPT_OSS: gpt_oss,
    Family.JSON: plain_json,
}
MARKS: dict[Family, tuple[str, ...]] = {
    Family.HERMES: ("<tool_call>", "</tool_call>"),
    Family.LLAMA3: ("<|python_tag|>",),
    Family.MISTRAL: ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    Family.DEEPSEEK: (*_CALLS_BEGIN, *_CALLS_END, *_CALL_BEGIN, *_CALL_END, *_SEPARATOR),
    Family.GPT_OSS: ("<|channel|>", "<|message|>", "<|constrain|>", *_HARMONY_ENDS),
    Family.JSON: (),
}
"""Control tokens that a dialect reads."""
