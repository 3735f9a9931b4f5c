"""What a chat template can take, and messages in that shape. Found out by rendering, as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localllm.errors import InvalidRequest
from localllm.prompt.family import Family

Json = dict[str, Any]
Render = Callable[..., str | None]
"""(messages, tools=…) -> text, or None where the template raises."""

_CALL_FORMS = {
    Family.JSON: '{"name": "function", "arguments": {…}}',
    Family.HERMES: '<tool_call>\n{"name": "function", "arguments": {…}}\n</tool_call>',
    Family.LLAMA3: '{"name": "function", "parameters": {…}}',
    Family.MISTRAL: '[TOOL_CALLS][{"name": "function", "arguments": {…}}]',
    Family.DEEPSEEK: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{…}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
}
"""What a model is told to write where its template tells it nothing."""
_MARK = "m4rk"
_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "tool1",
        "description": "Tool description",
        "parameters": {"type": "object", "properties": {"arg": {"type": "string", "description": "Arg"}}, "required": ["arg"]},
    },
}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a template handles itself; the rest is prepared for it."""

    tools: bool
    system: bool
    text_content: bool
    """Content as a string."""
    part_content: bool
    """Content as a list of parts."""
    calls: bool
    """Tool calls of earlier turns."""
    object_arguments: bool
    """A tool call's arguments as an object, not as JSON text."""


def probe(render: Render) -> Capabilities:
    """Find a template's capabilities by rendering short conversations."""
    user = {"role": "user", "content": "hello"}
    parts = render([{"role": "user", "content": [{"type": "text", "text": _MARK}]}])
    as_text = render([{"role": "user", "content": _MARK}])
    system = render([{"role": "system", "content": _MARK}, user])
    tools = render([user], tools=[_TOOL])
    called = render(_called({"arg": _MARK}), tools=[_TOOL])
    called_text = render(_called(json.dumps({"arg": _MARK})), tools=[_TOOL])
    return Capabilities(
        tools=_shows(tools, "tool1") or _shows(called, "Arg"),
        system=_shows(system, _MARK),
        text_content=_shows(as_text, _MARK) or not _shows(parts, _MARK),
        part_content=_shows(parts, _MARK) and not _is_dump(parts),
        calls=_shows(called, _MARK) or _shows(called_text, _MARK),
        object_arguments=_shows(called, _MARK) and not _is_dump(called) or (called is not None and called_text is None),
    )


def prepare(
    messages: Sequence[Mapping[str, Any]], can: Capabilities, family: Family, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Json]:
    """Copies of `messages` in the shape that the template wants, with `tools` described where it does not do so.

    Raises InvalidRequest for a message without a role or with arguments that are no JSON object.
    """
    out = [_message(message, can, family is Family.GPT_OSS) for message in messages]
    if tools and not can.tools:
        told: Json = {"role": "system", "content": _description(tools, family)}
        if out and out[0]["role"] == "system":
            told["content"] = _joined(out.pop(0)["content"], told["content"])
        out.insert(0, told)
    if not can.system and out and out[0]["role"] == "system":
        system = out.pop(0)
        if out:
            out[0]["content"] = _joined(system["content"], out[0]["content"])
    return out


def plain_text(content: Any) -> str:
    """The text of a message's content; parts are joined by newlines, those that are not text left out."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = [str(part.get("text", "")) for part in content if part.get("type") == "text"]
    return "\n".join(texts)


def _message(message: Mapping[str, Any], can: Capabilities, harmony: bool) -> Json:
    if not isinstance(message.get("role"), str):
        raise InvalidRequest("a message has no role", hint="give each message a role: system, user, assistant or tool")
    out = dict(message)
    if out["role"] == "developer" and not harmony:
        out["role"] = "system"
    content = out.get("content")
    if isinstance(content, (list, tuple)):
        if not can.part_content:
            out["content"] = plain_text(content)
    elif content is None:
        out["content"] = ""
    if isinstance(out["content"], str) and not can.text_content:
        out["content"] = [{"type": "text", "text": out["content"]}]
    if calls := out.get("tool_calls"):
        out["tool_calls"] = [_tool_call(call, as_object=can.object_arguments) for call in calls]
        if not can.calls:
            written = [json.dumps(_tool_call(call, as_object=True)["function"], ensure_ascii=False) for call in calls]
            out["content"] = "\n".join(filter(None, (plain_text(out["content"]), *written)))
    if harmony and out.get("reasoning_content"):
        out["thinking"] = out["reasoning_content"]
        if out.get("tool_calls"):
            out.pop("content")
    return out


def _description(tools: Sequence[Mapping[str, Any]], family: Family) -> str:
    listed = "\n".join(json.dumps(tool.get("function") or tool, ensure_ascii=False) for tool in tools)
    form = _CALL_FORMS.get(family, _CALL_FORMS[Family.JSON])
    return f"You can call these functions:\n{listed}\nTo call one, answer with nothing but:\n{form}"


def _tool_call(call: Mapping[str, Any], *, as_object: bool) -> Json:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments", "{}")
    if as_object and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            name = function.get("name", "")
            hint = "send the arguments back as the model wrote them, as a JSON object"
            raise InvalidRequest(f"the arguments of the call to {name!r} are not JSON: {error}", hint=hint) from None
    elif not as_object and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n{second}"
    parts: list[Json] = []
    for content in (first, second):
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return parts


def _called(arguments: Any) -> list[Json]:
    call = {"id": "call00001", "type": "function", "function": {"name": "tool1", "arguments": arguments}}
    return [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "result", "tool_call_id": "call00001", "name": "tool1"},
        {"role": "assistant", "content": "It says so"},
        {"role": "user", "content": "hello"},
    ]


def _shows(text: str | None, word: str) -> bool:
    return text is not None and word in text


def _is_dump(text: str | None) -> bool:
    """Whether the probe came out as Python's or JSON's spelling of its container, not as what it holds."""
    return text is not None and any(dump in text for dump in (f"'arg': '{_MARK}'", f"'text': '{_MARK}'", f'"text": "{_MARK}"'))
