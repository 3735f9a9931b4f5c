"""`localllm plan`: what a model would take on this machine, how fast it would be, why, and what else there is.

Knows how it looks; what is true, localllm.plan knows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localllm.cli.loading_flags import LoadingFlags, given_settings, loading_flags

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from localllm.gguf import Header
    from localllm.plan.bar import PartName
    from localllm.plan.loadplan import DevicePlan, LoadPlan
    from localllm.plan.question import OtherQuant

BAR_WIDTH = 44
NAME_WIDTH = 8

PARTS: dict[PartName, tuple[str, str, str, str]] = {
    "others": ("others", "▒", "-", "dim"),
    "weights": ("weights", "█", "#", "blue"),
    "kv": ("KV cache", "▓", "=", "magenta"),
    "draft": ("draft", "▚", "+", "cyan"),
    "compute": ("compute", "▞", "%", "yellow"),
    "reserve": ("kept free", "░", "~", "dim"),
    "free": ("free", "·", ".", "green"),
    "over": ("too much", "!", "!", "red"),
}
"""Name, letter, letter on a terminal that has only ASCII, style. The letters differ, too: not everybody sees the colours."""


@loading_flags
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model here, a GGUF file, or a name of the Hub.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run/--no-dry-run", help="Ask llama.cpp itself, in a child process.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    loading: LoadingFlags,
) -> None:
    """Show what a model would take here, before it is loaded.

    Exit code 4 when it does not fit.
    """
    from localllm.errors import NotFound
    from localllm.library import resolve_model
    from localllm.settings import load

    settings = load({"model": model or None, **loading.settings()})
    name, given = settings.settings.model, given_settings(settings)
    try:
        planned = loading.plan(resolve_model(name), given, dry=dry_run)
    except NotFound as error:
        remote = _on_the_hub(name, offline=settings.settings.offline)
        if remote is None:
            raise
        header, quants = remote
        print(f"{error.message}: planned from its header on the Hub", file=sys.stderr)
        planned = loading.plan(Path(name), given, dry=dry_run, header=header, quants=quants)
    if as_json:
        print(json.dumps(planned.plan.to_json(), indent=2))
        return
    from rich.console import Console

    show(planned.header, planned.plan, Console(highlight=False, emoji=False, no_color=None if settings.settings.color else True))


def _on_the_hub(name: str, *, offline: bool) -> tuple[Header, list[OtherQuant]] | None:
    """The header of a model that is not here, and its other files; None for what is no name of the Hub or the catalogue."""
    from localllm.catalog import load_catalog
    from localllm.cli.pull import memory_once
    from localllm.download.peek import remote_header
    from localllm.errors import NotFound
    from localllm.hub import Hub
    from localllm.library import Library
    from localllm.plan.question import OtherQuant
    from localllm.pull import find_wanted
    from localllm.reference import NameReference, PathReference, parse

    library = Library()
    catalog = load_catalog(library.directories.catalog_file)
    reference = parse(library.expand(name))
    if isinstance(reference, PathReference):
        return None
    if isinstance(reference, NameReference):
        try:
            catalog.find(reference.name, reference.tag or None)
        except NotFound:
            return None
    hub = Hub(offline=offline)
    wanted = find_wanted(name, hub, catalog, memory_bytes=memory_once(), expand=library.expand)
    others = [model for model in wanted.listing.models if model.quant and not model.missing and model != wanted.model]
    quants = [OtherQuant(model.quant, model.size_bytes, f"{model.repo}:{model.quant}") for model in others]
    return remote_header(hub, wanted.model), quants


def show(header: Header, found: LoadPlan, console: Console) -> None:
    """Print the screen; it fits 80 columns."""
    from rich.text import Text

    from localllm.cli.visible import visible
    from localllm.plan.explain import flags

    ascii_only = console.options.ascii_only
    bullet = "*" if ascii_only else "•"
    width = min(console.width, 100)

    def entry(mark: str, text: str, style: str = "") -> None:
        for i, line in enumerate(Text(visible(text), style=style).wrap(console, width - len(mark) - 1)):
            line.rstrip()
            console.print(Text.assemble((f"{mark} " if i == 0 else " " * (len(mark) + 1), "dim"), line))

    console.print(Text.assemble((visible(_name(header)), "bold"), f"  {_about(header)}"))
    console.print()
    for device in found.devices:
        if device.kind == "cpu" or device.planned_bytes:
            for line in device_lines(device, width, ascii_only):
                console.print(line)
    console.print()
    for line in _facts(found, header):
        console.print(Text(line))
    console.print()
    for reason in found.reasons:
        entry(bullet, reason)
    for note in found.notes:
        entry(bullet, note, "dim")
    for warning in found.warnings:
        entry("warning:", warning, "yellow")
    if found.alternatives:
        console.print()
        console.print(Text("Instead:", style="bold"))
    column = max((len(flags(other.wishes)) for other in found.alternatives), default=0) + 1
    for other in found.alternatives:
        entry(f"  {flags(other.wishes):<{column}}", other.summary)
        if other.reference:
            entry(f"  {'':<{column}}", f"localllm pull {other.reference}", "dim")


def device_lines(device: DevicePlan, width: int, ascii_only: bool) -> list[Text]:
    """A device's memory: its bar with the totals, then what the letters mean."""
    from rich.text import Text

    from localllm.cli.visible import visible
    from localllm.plan.bar import segments
    from localllm.plan.explain import size

    name = "RAM" if device.kind == "cpu" else visible(device.name)
    parts = segments(device, BAR_WIDTH)
    bar = Text.assemble(*((PARTS[part.part][2 if ascii_only else 1] * part.cells, PARTS[part.part][3]) for part in parts))
    total = "size unknown" if device.total_bytes is None else f"of {size(device.total_bytes)}"
    lines = [Text.assemble((f"{name:<{NAME_WIDTH}}", "bold"), bar, f"  {size(device.planned_bytes)} {total}")]
    line = Text(" " * NAME_WIDTH)
    for part in parts:
        label, letter, plain, style = PARTS[part.part]
        item = Text.assemble((plain if ascii_only else letter, style), f" {label} {size(part.n_bytes)}   ")
        if line.cell_len + item.cell_len - 3 > width:
            lines.append(line)
            line = Text(" " * NAME_WIDTH)
        line.append_text(item)
    lines.append(line)
    for each in lines:
        each.rstrip()
    return lines


def _name(header: Header) -> str:
    return header.name or (header.files[0].name if header.files else "model")


def _about(header: Header) -> str:
    from localllm.cli.visible import visible
    from localllm.plan.explain import size

    parts = [header.architecture, header.quant, size(header.weights_bytes)]
    parts += [f"trained for {header.n_ctx_train:,} tokens"] if header.n_ctx_train else []
    return visible(" · ".join(filter(None, parts)))


def _facts(found: LoadPlan, header: Header) -> list[str]:
    """The choices at a glance."""
    shape = found.shape
    kv = shape.type_k if shape.type_k == shape.type_v else f"{shape.type_k}/{shape.type_v}"
    on_gpu = sum(device.n_layers for device in found.devices if device.kind != "cpu")
    layers = f"{on_gpu} of {header.n_layers + 1} layers on the GPU" if on_gpu else "all layers on the CPU"
    layers += f", experts of {found.n_cpu_moe} in RAM" if on_gpu and found.n_cpu_moe else ""
    speed = "speed not known yet"
    if found.decode_tps is not None:
        low, high = (f"{rate:,.{0 if rate >= 10 else 1}f}" for rate in found.decode_tps)
        speed = f"{low} to {high} tokens/s"
    first = [f"context {shape.n_ctx:,}", f"KV {kv}", layers]
    second = [speed, f"{found.n_seq} at once", f"{found.n_resident} kept", f"micro-batch {shape.n_ubatch}", f"{shape.n_threads} threads"]
    second += [f"draft of {found.draft.n_draft} tokens"] if found.draft else []
    return [" · ".join(first), " · ".join(second)]
