"""`localllm run`: one answer for a prompt, or a chat when there is none. The model always runs in a worker process.

Knows the options and the exit codes; showing an answer is output.py's business, the chat is chat.py's.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from localllm.cli.loading_flags import LoadingFlags, given_settings, loading_flags
from localllm.errors import UsageError

if TYPE_CHECKING:
    from localllm.cli.answer import Manner
    from localllm.cli.output import Screen
    from localllm.loading import Loaded, Planned

INTERRUPTED = 130
_SAMPLING = "Sampling"
_OUTPUT = "Output"


@loading_flags
def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="demo, a name from localllm list, or the path of a GGUF file.", show_default=False)
    ] = "",
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to ask; piped text comes after it. Without both: a chat.", show_default=False),
    ] = None,
    system: Annotated[str, typer.Option(help="The system prompt.", show_default=False)] = "",
    session: Annotated[str, typer.Option(metavar="NAME", help="Go on with the chat NAME, and keep it.", show_default=False)] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it stands, without a chat template.")] = False,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Let a reasoning model think, or not.", show_default=False)
    ] = None,
    context_shift: Annotated[bool, typer.Option("--context-shift", help="Drop the oldest tokens when the context is full.")] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "--temp", help="0 always takes the likeliest token.", rich_help_panel=_SAMPLING)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens; 0 is off.", rich_help_panel=_SAMPLING)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest that add up to p; 1 is off.", rich_help_panel=_SAMPLING)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out what is less likely than p times the likeliest; 0 is off.", rich_help_panel=_SAMPLING)
    ] = None,
    repeat_penalty: Annotated[float | None, typer.Option(help="Divide what was said already; 1 is off.", rich_help_panel=_SAMPLING)] = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="-1 draws one.", rich_help_panel=_SAMPLING)] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "--n-predict", "--predict", "-n", help="-1 sets no limit.", rich_help_panel=_SAMPLING)
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.", rich_help_panel=_SAMPLING)] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", "-l", metavar="ID=BIAS", help="-inf forbids the token; may be repeated.", rich_help_panel=_SAMPLING),
    ] = None,
    grammar: Annotated[str, typer.Option(help="GBNF that the answer must match.", show_default=False, rich_help_panel=_SAMPLING)] = "",
    grammar_file: Annotated[Path | None, typer.Option(help="The same, from a file.", rich_help_panel=_SAMPLING)] = None,
    json_schema: Annotated[
        str,
        typer.Option(
            "--json-schema",
            "-j",
            metavar="JSON|@FILE",
            help="JSON schema that the answer must match.",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = "",
    show_thinking: Annotated[bool, typer.Option("--show-thinking", help="Show the reasoning.", rich_help_panel=_OUTPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=_OUTPUT)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no statistics.", rich_help_panel=_OUTPUT)] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="The plan and the engine's log on stderr.", rich_help_panel=_OUTPUT)
    ] = False,
    *,
    loading: LoadingFlags,
) -> None:
    """Ask a model, or chat with it.

    The answer goes to stdout; progress and statistics go to stderr.
    """
    import asyncio

    from localllm.cli.answer import Manner
    from localllm.cli.output import Screen
    from localllm.library import resolve_model
    from localllm.paths import directories
    from localllm.settings import load as settings_of
    from localllm.types import Sampling

    question = read_question(prompt)
    if not question and (raw or as_json):
        raise UsageError(f"{'--raw' if raw else '--json'} needs a prompt", hint="give it after the model, or pipe it in")
    if raw and (system or session or think is not None):
        raise UsageError("--raw has no conversation", hint="leave out --system, --session and --think")
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": tuple(stop) if stop else None,
        "logit_bias": tuple(parse_bias(text) for text in logit_bias) if logit_bias else None,
        "grammar": read_grammar(grammar, grammar_file),
        "json_schema": read_schema(json_schema),
    }
    sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    chosen = settings_of({"model": model or None, **loading.settings()})
    settings = chosen.settings
    logging.getLogger("localllm").setLevel("DEBUG" if verbose else settings.log_level.upper())
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
    # one person asks one thing at a time
    given = {"n_seq": 1, **given_settings(chosen)}
    planned = loading.plan(resolve_model(settings.model), given, n_resident=3)
    keep = not raw and (bool(session) or not question)
    state_dir = str(directories().kv_states) if keep else ""
    options = {"cache_ram_bytes": settings.cache_ram_bytes, "state_disk_bytes": settings.state_disk_bytes, "state_dir": state_dir}
    wishes = Wishes(question, Manner(sampling, think, context_shift), system, session, raw, as_json)
    with Screen(answer=not as_json, quiet=quiet, progress=not verbose, show_thinking=show_thinking, color=settings.color) as screen:
        try:
            for line in (*planned.plan.warnings, *(planned.plan.reasons if verbose else ())):
                screen.note(line)
            code = asyncio.run(_run(settings.model, planned, options, wishes, screen))
        except KeyboardInterrupt:
            code = INTERRUPTED
    raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked on the command line, apart from the model and how to load it."""

    question: str
    """Empty: chat."""
    manner: Manner
    system: str
    session: str
    raw: bool
    as_json: bool


async def load(planned: Planned, options: dict[str, Any], screen: Screen) -> Loaded:
    """Start the worker that runs the model."""
    from localllm import loading

    return await loading.load(planned, options, on_event=screen.show, on_step=lambda plan: screen.note(plan.reasons[0]))


async def _run(model: str, planned: Planned, options: dict[str, Any], wishes: Wishes, screen: Screen) -> int:
    from localllm.cli.answer import stream_answer
    from localllm.cli.conversation import Conversation, load_conversation
    from localllm.loading import remember_speed

    state = planned.state
    # Before the model: a mistake in the name must not cost a load.
    conversation = load_conversation(state / "sessions", wishes.session) if wishes.session else Conversation()
    conversation.system = wishes.system or conversation.system

    loaded = await load(planned, options, screen)
    backend = loaded.engine
    screen.clear()
    try:
        if not wishes.question:
            from localllm.cli.chat import Chat

            await Chat(model, backend, screen, conversation, wishes.manner, state).run()
            return 0
        if wishes.raw:
            request = wishes.manner.request(prompt=wishes.question)
        else:
            request = wishes.manner.request(messages=conversation.ask(wishes.question), session=conversation.name)
        answer = await stream_answer(backend, request, screen)
        screen.end_answer()
        if answer.error:
            raise answer.error
        if wishes.as_json:
            print(json.dumps(answer.to_json(model)))
        screen.statistics(answer.timings)
        if answer.timings:
            remember_speed(loaded, answer.timings.predicted_per_second, answer.timings.predicted_n)
        if answer.text:
            conversation.add(wishes.question, answer.message())
            conversation.save(state / "sessions")
        return INTERRUPTED if answer.interrupted else 0
    finally:
        await loaded.close()


def read_question(words: list[str] | None) -> str:
    """The prompt: the words of the command line, then what is piped in; empty means a chat. Raises UsageError."""
    typed = " ".join(words or ())
    if any("\ud800" <= letter <= "\udfff" for letter in typed):
        raise UsageError("the prompt is not UTF-8", hint="check the encoding of the terminal")
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _read_pipe()
    question = "\n\n".join(text for text in (typed, piped) if text.strip())
    if not question and (words or sys.stdin is None or not sys.stdin.isatty()):
        raise UsageError("there is no prompt", hint="give it after the model or pipe it in; a chat needs a terminal")
    return question


def _read_pipe() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text (byte {error.start})", hint="convert it, for example with iconv -t utf-8") from error
    return text.removesuffix("\n").removesuffix("\r")


def parse_bias(text: str) -> tuple[int, float]:
    """`ID=BIAS`, or llama.cpp's `ID+BIAS` and `ID-BIAS`. Raises UsageError."""
    match = re.fullmatch(r"(\d+)(?:=|(?=[+-]))([+-]?(?:\d+\.?\d*|\.\d+|inf))", text)
    if not match:
        raise UsageError(f"--logit-bias {text} makes no sense", hint="give a token id and a bias, as 13=-5 or 13=-inf")
    return int(match[1]), float(match[2])


def read_grammar(text: str, file: Path | None) -> str:
    if file is None:
        return text
    if text:
        raise UsageError("both --grammar and --grammar-file are given", hint="give one of them")
    return _read_file(file)


def read_schema(text: str) -> dict[str, Any] | None:
    """A JSON schema given as text or as @FILE; None where there is none. Raises UsageError."""
    if not text:
        return None
    try:
        schema = json.loads(_read_file(Path(text[1:])) if text.startswith("@") else text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--json-schema is not JSON: {error}", hint="give a schema, or @FILE to read it from a file") from error
    if not isinstance(schema, dict):
        raise UsageError("--json-schema is not a JSON object", hint='for any object, give {"type": "object"}')
    return cast(dict[str, Any], schema)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read {path}: {why}", hint="check the path") from error
