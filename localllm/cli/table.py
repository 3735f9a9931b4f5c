"""Rows for people and for pipes: a table on a terminal, tab-separated lines elsewhere. And a bar for work on bytes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Sequence

from localllm.cli.visible import visible

RIGHT = frozenset({"SIZE", "PARAMS", "CONTEXT", "FREED"})
"""Columns of numbers."""
FOLDED = frozenset({"NOTE", "PATH", "GOES TO", "SIZES"})
"""Columns of text that may take several lines."""
FOLDED_WIDTH = 22
GAP = 2


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, spare: Sequence[str] = ()) -> None:
    """Print the rows under their heads on stdout; no cell can steer the terminal or break a line.

    A pipe gets every column. A terminal gets none that is empty, and where it is too narrow goes without the `spare` ones, in
    that order, before a name is folded.
    """
    cells = [[_cell(text) for text in row] for row in rows]
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in [columns, *cells]))
        return
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, emoji=False)
    widths = {name: max(map(cell_len, (name, *(row[i] for row in cells)))) + GAP for i, name in enumerate(columns)}
    shown = [name for i, name in enumerate(columns) if not cells or any(row[i] for row in cells)]

    def fits() -> bool:
        return sum(min(widths[name], FOLDED_WIDTH) if name in FOLDED else widths[name] for name in shown) <= console.width

    for name in spare:
        if name in shown and not fits():
            shown.remove(name)
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold")
    for name in shown:
        table.add_column(name, justify="right" if name in RIGHT else "left", overflow="fold", no_wrap=name not in FOLDED and fits())
    for row in cells:
        table.add_row(*(Text(text) for name, text in zip(columns, row, strict=True) if name in shown))
    console.print(table)


def show_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names with their values, one a line; a pair without a value is left out."""
    there = [(name, _cell(value)) for name, value in pairs if value]
    if not sys.stdout.isatty():
        print("\n".join(f"{name}\t{value}" for name, value in there))
        return
    width = max(len(name) for name, _ in there)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in there))


def say(text: str, *, answer: bool = False) -> None:
    """One line that names of files cannot break: on stderr, or on stdout where it is the command's answer."""
    print(_cell(text), file=sys.stdout if answer else sys.stderr)


def count(number: int) -> str:
    """A number of parameters as people write it: 8.0B, 494M; empty for 0."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.0f}{unit}" if scaled >= 99.5 else f"{scaled:.1f}{unit}"
    return str(number) if number else ""


@contextlib.contextmanager
def bytes_bar(description: str, total_bytes: int, *, quiet: bool = False) -> Generator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; call what it gives with the bytes just done. It leaves no trace."""
    if quiet or not sys.stderr.isatty() or not total_bytes:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    text = TextColumn("{task.description}", style="dim", markup=False)
    columns = (text, BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False, emoji=False), transient=True) as progress:
        task = progress.add_task(_cell(description), total=total_bytes)
        yield lambda n_bytes: progress.advance(task, n_bytes)


def _cell(text: str) -> str:
    return visible(text).replace("\n", "␊").replace("\t", "␉")
