"""Which output dialect a model speaks: how it marks reasoning and tool calls."""

from __future__ import annotations

from enum import StrEnum


class Family(StrEnum):
    """Output conventions, named after the template that made each known."""

    HERMES = "hermes"
    """ChatML, Hermes, Qwen: `<tool_call>{"name", "arguments"}</tool_call>`, `<think>`."""
    LLAMA3 = "llama3"
    """Llama 3.x: a bare `{"name", "parameters"}` object, perhaps after `<|python_tag|>`."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS]` and a JSON array, or `[TOOL_CALLS]name[ARGS]{…}`; `[THINK]`."""
    DEEPSEEK = "deepseek"
    """`<｜tool▁calls▁begin｜>` … blocks, `<think>`."""
    GPT_OSS = "gpt-oss"
    """Harmony channels: `<|channel|>analysis<|message|>` … `<|end|>`."""
    JSON = "json"
    """No convention known: a tool call is a plain JSON object."""


_MARKS = (
    (Family.GPT_OSS, ("<|channel|>",)),
    (Family.DEEPSEEK, ("<｜tool▁calls▁begin｜>", "<｜Assistant｜>")),
    (Family.MISTRAL, ("[TOOL_CALLS]", "[THINK]")),
    (Family.HERMES, ("<tool_call>",)),
    (Family.LLAMA3, ("<|python_tag|>", '{"name": function name, "parameters":')),
    (Family.HERMES, ("<|im_start|>", "<think>")),
)
"""Text of a template -> family; the first that occurs decides."""


def detect_family(template_source: str) -> Family:
    """The family whose marks the template writes; JSON if it writes none."""
    for family, marks in _MARKS:
        if any(mark in template_source for mark in marks):
            return family
    return Family.JSON
