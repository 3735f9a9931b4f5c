"""A report as a person reads it, on stdout."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from localllm.bench.report import ArmResult, Compared, Report

MIB = 1 << 20
WIDTH = 106
"""Wide enough for every column: a line that the terminal folds is better than a figure that is cut."""

NOTES = {
    "worker": "worker: the engine in its child process, measured at this end of the pipe, as `localllm run` uses it",
    "engine": "engine: the same in one process, through its asyncio interface",
    "bare": "bare: llama_decode and the same samplers in a loop, on a context with the engine's settings: this machine's bound",
    "llama": "llama: llama_cpp.Llama.create_completion, streaming; a context for one sequence, no DRY, XTC and top-n-sigma samplers",
}
PYTHON = "Python: wall time between two decode calls outside of llama.cpp, per token; waiting for the GIL as a call returns is not in it"
PROMPTS = "prompts: new meaningless sentences in every round, the same for all arms; end tokens are forbidden, so lengths are fixed"
SPREAD = "±: half of the range over the rounds; everything else is the median round"
COLUMNS = (
    "prompt\ntokens/s",
    "decode\ntokens/s",
    "",
    "TTFT\nms",
    "last\nTTFT",
    "p50\nms",
    "p95\nms",
    "Python\nµs",
    "RSS\nMiB",
)


def show(report: Report, console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console(highlight=False, emoji=False)
    console.width = max(console.width, WIDTH)
    model, machine = report.model, report.machine
    size = f"{model['size_bytes'] / MIB:,.0f} MiB"
    console.print(f"{model['name']}: {model['description']}, {size}, {model['n_cells']:,} KV cells", markup=False)
    console.print(f"{machine['cpu']}, {machine['threads']} threads; {machine['build'].split(' (')[0]}; {machine['date']}", markup=False)
    console.print(_arms(report))
    if report.compared:
        console.print(_comparisons(report.compared))
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    names = dict.fromkeys(arm.name for arm in report.arms)
    notes = [NOTES[name] for name in names]
    if any(arm.median("python_us_per_token") is not None for arm in report.arms):
        notes.append(PYTHON)
    console.print("\n".join([*notes, PROMPTS, SPREAD]), style="dim", markup=False, soft_wrap=True)


def _arms(report: Report) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in ("workload", "arm"):
        table.add_column(head, no_wrap=True)
    for head in COLUMNS:
        table.add_column(head, justify="right", no_wrap=True)
    before = ""
    for arm in report.arms:
        name = _workload(arm)
        if name != before and before:
            table.add_section()
        table.add_row(name if name != before else "", arm.name, *_cells(arm))
        before = name
    return table


def _workload(arm: ArmResult) -> str:
    w = arm.workload
    return f"{w.name}, {w.n_prompt} + {w.n_gen}"


def _cells(arm: ArmResult) -> list[str]:
    decode = arm.values("decode_tps")
    decodes = any(decode)
    return [
        _number(arm.median("prompt_tps")),
        _number(arm.median("decode_tps")) if decodes else "",
        f"±{(max(decode) - min(decode)) / 2 / max(decode):.0%}" if decodes and len(decode) > 1 else "",
        _number(arm.median("ttft_ms")),
        _number(arm.median("last_ttft_ms")),
        _number(arm.median("itl_p50_ms"), 2) if decodes else "",
        _number(arm.median("itl_p95_ms"), 2) if decodes else "",
        _number(arm.median("python_us_per_token")),
        _number((arm.median("rss_bytes") or 0) / MIB, 0),
    ]


def _comparisons(compared: tuple[Compared, ...]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("compared, round by round", no_wrap=True)
    for head in ("median", "(low – high)", "goal"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for c in compared:
        mark = {True: "[green]✓[/]", False: "[red]✗ missed[/]", None: ""}[c.met]
        goal = str(c.comparison.goal) if c.comparison.goal else ""
        table.add_row(c.comparison.name, f"{c.median:.3f}", f"({c.low:.3f} – {c.high:.3f})", goal, mark)
    return table


def _number(value: float | None, digits: int = 1) -> str:
    """With thousands separators; fewer digits where they say nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.{digits}f}"
