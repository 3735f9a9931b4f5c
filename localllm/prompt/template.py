"""A model's chat template: messages and tools -> prompt text. Knows no tokens' ids and no model.

Follows llama-server where it differs from transformers: `enable_thinking` is true unless given, `tools` is
undefined rather than none where there are none, tool-call arguments become objects where the template wants
them and text where not, a system message joins the first user message where the template knows no such role,
content parts become text where it wants text, tools it does not describe are described in the system message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from localllm.errors import TemplateError
from localllm.prompt.control import REASONING_TAGS, ControlTokens, Mask, Masked
from localllm.prompt.family import Family, detect_family
from localllm.prompt.messages import Capabilities, plain_text, prepare, probe
from localllm.prompt.meter import LimitExceeded, Limits, Meter
from localllm.prompt.sandbox import ChatEnvironment

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""For models that bring no template."""

MAX_SOURCE_CHARS = 500_000
_PROBE = Limits(seconds=0.5)
_OTHER_TEMPLATE = "give another template with --chat-template"
_KNOWN_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation", "model"))


@dataclass(frozen=True, slots=True)
class Rendered(Masked):
    """A prompt; `str()` of it is the plain text."""

    reasoning_open: bool = False
    """Whether the prompt ends inside the model's reasoning, so that the answer begins there."""


class ChatTemplate:
    """A compiled template; `render` may be called from several threads.

    `bos` and `eos` are those tokens' texts, `control` the tokens that callers' text must not become.
    Raises TemplateError for a source that is too long or does not compile.
    """

    def __init__(
        self,
        source: str,
        bos: str = "",
        eos: str = "",
        *,
        control: ControlTokens | None = None,
        limits: Limits | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source = source if source and source != "chatml" else CHATML
        self._bos, self._eos = bos, eos
        self._control = control or ControlTokens({})
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        if len(self.source) > MAX_SOURCE_CHARS:
            raise TemplateError(f"the chat template is longer than {MAX_SOURCE_CHARS:,} characters", hint=_OTHER_TEMPLATE)
        self._environment = ChatEnvironment(now)
        try:
            self._template = self._environment.from_string(self.source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, OverflowError, ValueError) as error:
            raise TemplateError(f"the chat template does not compile: {_reason(error)}", hint=_OTHER_TEMPLATE) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The prompt for `messages` (OpenAI's shape); `str()` of it is the plain text.

        `continue_final_message` leaves the last message, an assistant's, open for the model to go on.
        `extra` are the template's own settings (chat_template_kwargs). Raises TemplateError with the
        template's own words where it refuses, loops or writes too much.
        """
        mask = Mask(self._control, (messages, tools, extra or {}), avoid=self.source)
        prepared = prepare(messages, self.capabilities, self.family, tools)
        safe = [self._masked(mask, message) for message in prepared]
        last = safe.pop() if continue_final_message and safe else None
        context = self._context(safe, mask.value(list(tools)), add_generation_prompt or last is not None)
        context |= mask.value(dict(extra or {}))
        text = self._run(context)
        if last is not None:
            text += self._continuation(text, last)
        return Rendered(text, mask.originals, opens_reasoning(text, self.family, last))

    @cached_property
    def family(self) -> Family:
        """How a model with this template marks reasoning and calls."""
        return detect_family(self.source)

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the template can take, found by rendering a few short conversations once."""

        harmful = False

        def attempt(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str | None:
            nonlocal harmful
            if harmful:  # one long wait is enough; rendering for real will say what is wrong
                return None
            try:
                return self._generate(self._context(messages, tools or [], True), _PROBE)
            except LimitExceeded:
                harmful = True
            except Exception:  # what `_run` turns into an error here means "it cannot take this"
                pass
            return None

        return probe(attempt)

    @property
    def supports_tools(self) -> bool:
        """Whether it describes offered tools to the model."""
        return self.capabilities.tools

    @property
    def supports_system(self) -> bool:
        """Whether it has a place for a system message."""
        return self.capabilities.system

    def _context(self, messages: list[Any], tools: list[Any], add_generation_prompt: bool) -> dict[str, Any]:
        context: dict[str, Any] = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": True,
            "bos_token": self._bos,
            "eos_token": self._eos,
        }
        return context | {"tools": tools} if tools else context

    def _masked(self, mask: Mask, message: dict[str, Any]) -> dict[str, Any]:
        role = message["role"]
        allowed = REASONING_TAGS if role == "assistant" else ()
        content = mask.value(message.pop("content", None), allowed=allowed)
        out = mask.value(message)
        out["role"] = role if role in _KNOWN_ROLES else mask.role(role)
        return out if content is None else out | {"content": content}

    def _generate(self, context: dict[str, Any], limits: Limits) -> str:
        with self._lock:
            meter = self._environment.meter = Meter(limits)
            chunks: list[str] = []
            length = 0
            for chunk in self._template.generate(context):
                length += len(chunk)
                meter.need(length)
                chunks.append(chunk)
            return "".join(chunks)

    def _run(self, context: dict[str, Any]) -> str:
        try:
            return self._generate(context, self._limits)
        except (LimitExceeded, SecurityError, RecursionError, MemoryError) as error:
            raise TemplateError(f"the chat template was stopped: {_reason(error)}", hint=_OTHER_TEMPLATE) from None
        except Exception as error:  # a template may raise anything that Python's operators raise
            hint = "this model may not allow these roles, this order of messages, or tools; change them, or " + _OTHER_TEMPLATE
            raise TemplateError(f"the chat template refused the conversation: {_reason(error)}", hint=hint) from None

    def _continuation(self, prompt: str, message: Mapping[str, Any]) -> str:
        """The last message's text as it stands after the generation prompt that ends `prompt`."""
        content, reasoning = plain_text(message.get("content")), message.get("reasoning_content", "")
        if self.family is Family.GPT_OSS:
            thought = f"<|channel|>analysis<|message|>{reasoning}"
            if not content and reasoning:
                return thought
            return (f"{thought}<|end|><|start|>assistant" if reasoning else "") + f"<|channel|>final<|message|>{content}"
        opening, closing = ("[THINK]", "[/THINK]") if "[THINK]" in self.source else ("<think>\n", "\n</think>\n\n")
        is_open = prompt.rstrip().endswith(opening.strip())
        if not reasoning and not is_open:
            return content
        thought = reasoning if is_open else opening + reasoning
        return thought + closing + content if content or not reasoning else thought


def opens_reasoning(prompt: str, family: Family, continued: Mapping[str, Any] | None = None) -> bool:
    """Whether `prompt` ends inside reasoning: at its opening tag, or in a `continued` message that has no answer yet."""
    if continued is not None:
        return bool(continued.get("reasoning_content")) and not plain_text(continued.get("content"))
    opening = {Family.MISTRAL: "[THINK]", Family.GPT_OSS: "<|channel|>analysis<|message|>"}.get(family, "<think>")
    return prompt.rstrip().endswith(opening)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
