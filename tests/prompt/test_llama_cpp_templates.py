"""Every chat template that llama.cpp ships renders as plain jinja2 renders it, and none lets a token through.

The templates are other people's, so they are not kept here but read from llama-cpp-python's source distribution.
"""

from __future__ import annotations

import copy
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from localllm.errors import TemplateError
from localllm.prompt.control import ControlTokens
from localllm.prompt.messages import prepare
from localllm.prompt.template import ChatTemplate
from tests.prompt.conversations import CONVERSATIONS, NOW, plain_jinja

pytestmark = pytest.mark.slow

_TOKEN = re.compile(r"<\|[^|>\s'\"{}+]+\|>|<｜[^｜>{}]+｜>|\[/?[A-Z_]{4,}\]|</?(?:s|start_of_turn|end_of_turn|think)>")


@pytest.fixture(scope="module")
def templates(llama_cpp_sdist: Path) -> dict[str, str]:
    """File name -> source."""
    with tarfile.open(llama_cpp_sdist) as archive:
        names = [name for name in archive.getnames() if re.search(r"/models/templates/[^/]+\.jinja$", name)]
        return {Path(name).name: archive.extractfile(name).read().decode("utf-8") for name in names}  # type: ignore[union-attr]


def test_there_are_templates(templates: dict[str, str]) -> None:
    assert len(templates) > 50


def test_each_renders_as_plain_jinja_renders_it(templates: dict[str, str]) -> None:
    compared = 0
    for name, source in templates.items():
        template = ChatTemplate(source, "<s>", "</s>", now=lambda: NOW)
        plain = plain_jinja().from_string(source)
        for title, (messages, tools) in CONVERSATIONS.items():
            for generation_prompt in (True, False):
                prepared = prepare(copy.deepcopy(messages), template.capabilities, template.family, tools)
                context: dict[str, Any] = {"messages": prepared, "add_generation_prompt": generation_prompt, "enable_thinking": True}
                context |= {"bos_token": "<s>", "eos_token": "</s>"} | ({"tools": tools} if tools else {})
                try:
                    expected: str | None = plain.render(copy.deepcopy(context))
                except Exception:  # whatever the template raises
                    expected = None
                try:
                    actual = str(template.render(messages, tools=tools, add_generation_prompt=generation_prompt))
                except TemplateError:
                    actual = None
                assert actual == expected, f"{name}: {title}"
                compared += expected is not None
    assert compared > 12 * len(templates)


def test_no_template_lets_a_control_token_through(templates: dict[str, str]) -> None:
    """Evil text gives as many control tokens as harmless text in its place, and reads as written."""
    attacked = 0
    for name, source in templates.items():
        tokens = sorted(set(_TOKEN.findall(source)) - {"<think>", "</think>", "[THINK]", "[/THINK]"})
        if not tokens:
            continue
        control = ControlTokens({token: i for i, token in enumerate(tokens)})
        template = ChatTemplate(source, "", "", control=control, now=lambda: NOW)
        evil = "x" + "".join(tokens) + "y"
        for title, (messages, tools) in CONVERSATIONS.items():
            counts: list[int] = []
            for word in ("harmless", evil, tokens[0], tokens[-1][:-1], tokens[-1][1:]):
                said = [_saying(message, word) for message in messages]
                offered = [{"type": "function", "function": {**tool["function"], "description": word}} for tool in tools]
                try:
                    counts.append(sum(1 for _ in control.find(template.render(said, tools=offered).text)))
                except TemplateError:
                    counts.append(-1)
            assert len(set(counts)) == 1, f"{name}: {title}: {counts}"
            attacked += counts[0] >= 0
    assert attacked > 200


def _saying(message: dict[str, Any], word: str) -> dict[str, Any]:
    out = {**message, "content": word if message["content"] else ""}
    if "reasoning_content" in out:
        out["reasoning_content"] = word
    if "tool_calls" in out:
        out["tool_calls"] = [{**call, "function": {"name": "get_weather", "arguments": {"city": word}}} for call in out["tool_calls"]]
    return out
