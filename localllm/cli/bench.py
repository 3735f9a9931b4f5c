"""`localllm bench`: how fast this machine runs a model, alone and with several requests at once, and next to the bound.

Knows the options; what is measured is bench/plan.py's business.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localllm.cli.loading_flags import LoadingFlags, given_settings, loading_flags
from localllm.errors import UsageError

if TYPE_CHECKING:
    from localllm.bench.report import Report

_MODEL = "Model"
MAX_STREAMS = 64
MIN_CELLS = 8192
"""KV cells where the user names none and the workloads need no more."""


@loading_flags
def bench(
    model: Annotated[str, typer.Argument(help="demo, or the path of a GGUF file.", show_default=False)] = "",
    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", help="Prompt tokens of each request.", min=1)] = 128,
    n_gen: Annotated[int, typer.Option("--n-gen", "-n", help="Tokens to generate for each request.", min=2)] = 128,
    concurrency: Annotated[str, typer.Option(metavar="N,N,…", help="Requests at once.")] = "1,2,4,8",
    repeats: Annotated[int, typer.Option("--repeats", "-r", help="Rounds; the median counts.", min=1)] = 5,
    compare: Annotated[
        bool, typer.Option("--compare", help="Beside a bare loop over llama.cpp and beside llama_cpp.Llama, with goals.")
    ] = False,
    n_long: Annotated[int, typer.Option("--n-long", help="Tokens of the long answer under --compare; 0 leaves it out.", min=0)] = 1000,
    shared_prefix: Annotated[
        bool, typer.Option("--shared-prefix", help="Also 8 requests with one new 700-token prefix, against one alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the JSON to FILE.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    shape: Annotated[
        str,
        typer.Option(
            metavar="1b|3b|8b|70b",
            help="Blow the built-in model up to the size and cost of a Llama of this shape; kept in the cache directory.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = "",
    quant: Annotated[str, typer.Option(metavar="q8_0|q4_k_m", help="Its quantisation.", rich_help_panel=_MODEL)] = "q8_0",
    *,
    loading: LoadingFlags,
) -> None:
    """Measure a model's speed on this machine.

    The table, or the JSON, goes to stdout; progress goes to stderr.
    """
    streams = parse_concurrency(concurrency)
    if loading.batch_size is not None and max(streams) > loading.batch_size:
        raise UsageError(
            f"{max(streams)} requests at once need a row each in a batch of {loading.batch_size}", hint="raise -b or lower --concurrency"
        )

    import asyncio

    from localllm.bench.plan import TINY_BYTES, make_plan
    from localllm.library import resolve_model
    from localllm.settings import load

    chosen = load({"model": model or None, **loading.settings()})
    settings = chosen.settings
    path = _inflated(settings.model, shape, quant, quiet=quiet) if shape else resolve_model(settings.model)
    plan = make_plan(
        n_prompt=n_prompt,
        n_gen=n_gen,
        concurrency=streams,
        n_long=n_long,
        compare=compare,
        shared_prefix=shared_prefix,
        tiny=path.stat().st_size < TINY_BYTES,
    )
    given = {"n_ctx": max(MIN_CELLS, max(workload.cells for workload in plan.workloads)), **given_settings(chosen)}
    planned = loading.plan(path, {**given, "n_seq": plan.streams})
    config = planned.plan.engine_config(path, cache_ram_bytes=settings.cache_ram_bytes, state_disk_bytes=settings.state_disk_bytes)
    report = asyncio.run(_measure(plan, config, repeats, quiet=quiet))
    if output is not None:
        _write(output, json.dumps(report.to_json(), indent=2) + "\n")
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        from localllm.bench.table import show

        show(report)


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`1,2,4` as ascending numbers without repetition. Raises UsageError."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UsageError(f"--concurrency {text} makes no sense", hint="give numbers, as 1,2,4,8") from error
    if not 1 <= numbers[0] <= numbers[-1] <= MAX_STREAMS:
        raise UsageError(f"--concurrency {text} is out of range", hint=f"use 1 to {MAX_STREAMS}")
    return tuple(numbers)


def _inflated(model: str, shape: str, quant: str, *, quiet: bool) -> Path:
    from localllm.demo import demo_models
    from localllm.demo.inflate import QUANTS, SHAPES, inflated_demo

    if shape not in SHAPES:
        raise UsageError(f"no shape is called {shape!r}", hint=f"use {', '.join(SHAPES)}")
    if quant not in QUANTS:
        raise UsageError(f"--quant {quant} is not supported", hint=f"use {', '.join(QUANTS)}")
    source = demo_models().get(model)
    if source is None:
        raise UsageError("--shape works on the built-in models only", hint="leave out the model or the shape")
    return inflated_demo(source, shape, quant, lambda text: _say(text, quiet=quiet))


async def _measure(plan: Any, config: Any, repeats: int, *, quiet: bool) -> Report:
    from localllm.bench.machine import busy_percent, machine
    from localllm.bench.report import make_report
    from localllm.bench.rounds import run_plan

    before = busy_percent()
    try:
        info, records = await run_plan(plan, config, repeats, lambda text: _say(text, quiet=quiet))
    finally:
        _say("", quiet=quiet)
    return make_report(plan, records, model=info, machine=machine(info, busy_percent=max(before, busy_percent())))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="check the path") from error


def _say(text: str, *, quiet: bool) -> None:
    """A line of progress: on a terminal it replaces the one before, and an empty one takes it away."""
    if quiet:
        return
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
    elif text:
        print(text, file=sys.stderr)
