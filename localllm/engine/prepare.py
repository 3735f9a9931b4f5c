"""A request turned into a job: template, tokens, grammar, samplers, limits. Runs on the caller's thread."""

from __future__ import annotations

import secrets
import time
from functools import cached_property

from localllm.engine.output import Answer, ChoiceText, Output, Sink
from localllm.engine.sequence import Job
from localllm.errors import ContextExceeded, InvalidRequest
from localllm.llama.model import Model
from localllm.llama.sampling import Sampler
from localllm.prompt.control import ControlTokens
from localllm.prompt.encode import Encoded, Encoder
from localllm.prompt.gate import ReasoningGate
from localllm.prompt.grammar import response_format_to_gbnf, schema_to_gbnf
from localllm.prompt.parse import OutputParser, markers
from localllm.prompt.template import ChatTemplate, Rendered
from localllm.prompt.tool_grammar import reasoning_tags, tool_call_grammar
from localllm.types import Request


class Vocabulary:
    """What a reader sees of tokens: control tokens are hidden but for those the output parser reads."""

    def __init__(self, model: Model, visible: frozenset[str]) -> None:
        self.piece = model.piece
        self._hidden = frozenset(t for text, t in model.control_tokens.items() if text not in visible)
        self._texts: dict[int, bytes] = {}

    def text(self, token: int) -> bytes:
        """The bytes to show for `token`."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = b"" if token in self._hidden else self.piece(token)
        return text


class Preparer:
    """Makes jobs for one model. Thread-safe."""

    def __init__(self, model: Model, *, n_ctx: int, template: str = "") -> None:
        self.model = model
        self.n_ctx = n_ctx
        strips = {text: model.swallows(token) for text, token in model.control_tokens.items()}
        self.control = ControlTokens(
            model.control_tokens,
            lstrip=[text for text, (left, _) in strips.items() if left],
            rstrip=[text for text, (_, right) in strips.items() if right],
        )
        self._source = template or model.chat_template
        self._encoder = Encoder(self.control, model.tokenize, bos=model.bos, add_bos=model.add_bos)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; raises TemplateError on the first use of a broken one."""
        return ChatTemplate(self._source, bos=self._text(self.model.bos), eos=self._text(self.model.eos), control=self.control)

    @cached_property
    def _chat_vocabulary(self) -> Vocabulary:
        return Vocabulary(self.model, markers(self.template.family))

    @cached_property
    def _plain_vocabulary(self) -> Vocabulary:
        return Vocabulary(self.model, frozenset())

    def job(self, request: Request, output: Output, sink: Sink) -> Job:
        """The job for `request`; its events go to `sink`.

        Raises ContextExceeded, GrammarError, TemplateError or InvalidRequest before any work is done.
        """
        if request.adapter:
            raise InvalidRequest(f"no adapter named {request.adapter!r} is loaded", hint="leave adapter out")
        s = request.sampling
        rendered = self.render(request) if request.messages else None
        encoded = self._plain(request) if rendered is None else self._encoder.encode(rendered)
        if len(encoded.tokens) >= self.n_ctx:
            raise ContextExceeded(
                f"the prompt has {len(encoded.tokens):,} tokens, the context holds {self.n_ctx:,} with at least one to answer",
                hint="shorten the prompt or load the model with a larger context (-c)",
                n_prompt_tokens=len(encoded.tokens),
                n_ctx=self.n_ctx,
            )
        grammar, triggers = self._grammar(request, rendered)
        seed = secrets.randbits(32) if s.seed == -1 else s.seed
        samplers = [
            Sampler(self.model, s, seed=seed + i, grammar=grammar, triggers=triggers, gate=self._gate(rendered)) for i in range(request.n)
        ]
        for sampler in samplers:
            sampler.read_prompt(encoded.tokens)
        vocabulary = self._plain_vocabulary if rendered is None else self._chat_vocabulary
        choices = [ChoiceText(i, vocabulary, s.stop, self._parser(request, rendered)) for i in range(request.n)]
        return Job(
            prompt=encoded.tokens,
            samplers=samplers,
            listener=Answer(output, sink, choices),
            max_tokens=s.max_tokens,
            end_tokens=self.model.end_tokens,
            stop_bytes=tuple(stop.encode("utf-8", "replace") for stop in s.stop),
            piece=vocabulary.text,
            logprobs=request.logprobs,
            priority=request.priority,
            deadline_s=float("inf") if request.deadline_ms is None else time.perf_counter() + request.deadline_ms / 1e3,
            cache=request.cache,
            marks=encoded.starts,
            session=request.session,
            context_shift=request.context_shift,
            n_keep=len(encoded.tokens) if request.n_keep < 0 else request.n_keep + self.model.add_bos,
        )

    def render(self, request: Request) -> Rendered:
        """The chat prompt of `request`; `str()` of it is the text."""
        messages = [message.for_template() for message in request.messages]
        return self.template.render(
            messages,
            tools=request.tools if request.tool_choice != "none" else (),
            continue_final_message=request.messages[-1].role == "assistant",
            extra=request.template_kwargs,
        )

    def encode(self, request: Request) -> list[int]:
        """The token ids of a chat prompt."""
        return self._encoder.encode(self.render(request)).tokens

    def _gate(self, rendered: Rendered | None) -> ReasoningGate | None:
        """Keeps reasoning from a tool grammar that waits for its trigger."""
        if rendered is None:
            return None
        return ReasoningGate(*reasoning_tags(self.template.family), opened=rendered.reasoning_open)

    def _parser(self, request: Request, rendered: Rendered | None) -> OutputParser | None:
        if rendered is None:
            return None
        tools = request.tools if request.tool_choice != "none" else ()
        return OutputParser(self.template.family, tools=tools, reasoning_open=rendered.reasoning_open)

    def _plain(self, request: Request) -> Encoded:
        """The tokens of a request without messages."""
        if request.prompt is not None:
            tokens = self.model.tokenize(request.prompt, add_special=True, parse_special=True)
        else:
            tokens = list(request.tokens)
            if bad := [t for t in tokens if not 0 <= t < self.model.n_vocab]:
                raise InvalidRequest(f"token id {bad[0]} is outside the vocabulary of {self.model.n_vocab}", hint="use ids below that")
        if not tokens:
            raise InvalidRequest("the prompt is empty", hint="give at least one token")
        return Encoded(tokens, ())

    def _grammar(self, request: Request, rendered: Rendered | None) -> tuple[str, tuple[str, ...]]:
        """GBNF and its triggers; empty when the output is free."""
        s = request.sampling
        wanted: list[str] = []
        if s.grammar:
            wanted.append(s.grammar)
        if s.json_schema is not None:
            wanted.append(schema_to_gbnf(s.json_schema))
        if request.response_format is not None and (gbnf := response_format_to_gbnf(request.response_format)) is not None:
            wanted.append(gbnf)
        if len(wanted) > 1:
            raise InvalidRequest("grammar, json_schema and response_format exclude each other", hint="give one of them")
        if request.tools and rendered is not None:
            calls = tool_call_grammar(
                request.tools,
                self.template.family,
                choice=request.tool_choice,
                parallel=request.parallel_tool_calls,
                reasoning_open=rendered.reasoning_open,
            )
            if calls is not None and wanted and not calls.lazy:
                raise InvalidRequest("a required tool call excludes another grammar", hint="leave one of them out")
            if calls is not None and not wanted:
                return calls.gbnf, calls.triggers
        return (wanted[0] if wanted else ""), ()

    def _text(self, token: int) -> str:
        return self.model.piece(token).decode("utf-8", "replace") if token >= 0 else ""
