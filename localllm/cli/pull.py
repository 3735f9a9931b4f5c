"""`localllm pull` and `search`: models from the Hub. What a name means pull.py knows, how bytes come download.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localllm.cli.models import Json, Quiet
from localllm.errors import LocalLLMError, NotFound

if TYPE_CHECKING:
    from localllm.download.queue import Download, Order
    from localllm.download.transfer import Fetched
    from localllm.hub import Hub, SearchHit
    from localllm.library import Library, LocalModel
    from localllm.pull import Wanted
    from localllm.quant import RemoteModel

DOWNLOADS = "downloads"
"""Folder of the state directory with a record of each unfinished download."""
MAX_QUANTS = 6
"""Sizes that `search` shows of one repository, around the usual one."""


def pull(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="llama3.2:3b, user/repo[:QUANT], hf://user/repo/file.gguf.", show_default=False)
    ],
    quant: Annotated[str, typer.Option(metavar="QUANT", help="As Q4_K_M or Q8_0; else what fits is chosen.", show_default=False)] = "",
    revision: Annotated[str, typer.Option(metavar="REV", help="Branch, tag or commit of the repository.", show_default=False)] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files, sizes and where they would go; fetch nothing.")] = False,
    limit_rate: Annotated[
        str, typer.Option("--limit-rate", metavar="RATE", help="At most this many bytes per second: 500K, 10MB.", show_default=False)
    ] = "",
    parts: Annotated[int, typer.Option("--parts", help="Connections at once.", min=1, max=32)] = 8,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fetch models: whole, verified, and from where it stopped."""
    from localllm.catalog import load_catalog
    from localllm.hub import Hub
    from localllm.library import Library
    from localllm.pull import find_wanted, order
    from localllm.settings import load

    settings = load({"limit_rate": limit_rate or None}).settings
    hub, library = Hub(offline=settings.offline), Library()
    catalog = load_catalog(library.directories.catalog_file)
    memory = memory_once()
    wanted = [find_wanted(name, hub, catalog, quant=quant, revision=revision, memory_bytes=memory, expand=library.expand) for name in names]
    orders = [order(each, library.root) for each in wanted]
    if dry_run:
        _show_plan(wanted, orders, as_json=as_json)
        return
    if not quiet:
        for each in wanted:
            _say(f"{each.label}, {_amount(each.model.size_bytes)}: {each.reason}")
    asked = {each.id: one for each, one in zip(orders, wanted, strict=True)}
    results, failures = _fetch(hub, library, orders, asked, limit_bytes_per_s=settings.limit_rate, parts=parts, quiet=quiet)
    if as_json:
        print(json.dumps([{**model.to_json(), **counts} for model, counts in results], indent=2))
    else:
        for model, counts in results:
            done = "is here already" if not counts["fetched_bytes"] else f"is here: {_amount(counts['fetched_bytes'])} fetched, verified"
            _say(f"{model.name} {done}; {model.path}")
            print(model.name)
    for error in failures[1:]:
        _say(f"error: {error.message}")
    if failures:
        raise failures[0]


def downloads(
    resume: Annotated[bool, typer.Option("--resume", help="Go on with all of them.")] = False,
    cancel: Annotated[
        list[str] | None, typer.Option("--cancel", metavar="NAME", help="Drop one and what it has fetched; may be repeated.")
    ] = None,
    limit_rate: Annotated[
        str, typer.Option("--limit-rate", metavar="RATE", help="At most this many bytes per second: 500K, 10MB.", show_default=False)
    ] = "",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List downloads that were begun and are not done; go on with them, or drop them."""
    from localllm.cli.table import show_table
    from localllm.download.queue import Queue
    from localllm.hub import Hub
    from localllm.library import Library
    from localllm.settings import load

    settings = load({"limit_rate": limit_rate or None}).settings
    hub, library = Hub(offline=settings.offline), Library()
    queue = Queue(hub, library.directories.state / DOWNLOADS)
    left = {download.order.name: download for download in queue.downloads()}
    for name in cancel or ():
        if name not in left:
            raise NotFound(f"no download is called {name}", hint=f"there is {', '.join(left)}" if left else "there is none")
        queue.cancel(left.pop(name).id)
        _say(f"{name}: dropped")
    queue.close()
    if resume and left:
        orders = [each.order for each in left.values()]
        results, failures = _fetch(hub, library, orders, {}, limit_bytes_per_s=settings.limit_rate, quiet=quiet)
        for model, _ in results:
            _say(f"{model.name} is here: {model.path}")
        if failures:
            raise failures[0]
        left = {}
    if as_json:
        print(json.dumps([_download_json(each) for each in left.values()], indent=2))
    elif not left:
        _say("no download is unfinished")
    else:
        rows = [
            (name, each.state, _amount(each.done_bytes), _amount(each.order.size_bytes), each.error.message if each.error else "")
            for name, each in left.items()
        ]
        show_table(("NAME", "STATE", "FETCHED", "SIZE", "NOTE"), rows)


def search(
    words: Annotated[list[str], typer.Argument(metavar="WORDS...", show_default=False)],
    limit: Annotated[int, typer.Option("--limit", "-n", help="Repositories to show.", min=1, max=50)] = 10,
    as_json: Json = False,
) -> None:
    """Find models on the Hub, with the size of each quantisation and whether it fits here."""
    from localllm.hub import Hub
    from localllm.settings import load

    hub = Hub(offline=load().settings.offline)
    hits = hub.search(" ".join(words), limit)
    found = _with_models(hub, hits)
    memory_bytes = memory_once()() if hits else 0
    if as_json:
        print(json.dumps([_hit_json(hit, models, memory_bytes) for hit, models in found], indent=2))
        return
    if not hits:
        _say(f"the Hub has no GGUF model for {' '.join(words)!r}")
        return
    from localllm.cli.table import show_table

    rows = [(hit.repo, f"{hit.downloads:,}", hit.updated[:10], _sizes(models, memory_bytes), _note(hit, models)) for hit, models in found]
    show_table(("REPOSITORY", "DOWNLOADS", "UPDATED", "SIZES", "NOTE"), rows, spare=("UPDATED", "DOWNLOADS"))
    if sys.stdout.isatty():
        _say(f"✓ fits into {_amount(memory_bytes)} free; fetch one with: localllm pull {found[0][0].repo}")


def _fetch(
    hub: Hub,
    library: Library,
    orders: Sequence[Order],
    asked: Mapping[str, Wanted],
    *,
    limit_bytes_per_s: int,
    parts: int = 8,
    quiet: bool = False,
) -> tuple[list[tuple[LocalModel, dict[str, int]]], list[LocalLLMError]]:
    """Fetch all orders, one after the other, and record them; one that fails does not keep the others from coming.

    `asked` says what an order was made for, by its id; an order of an earlier run is made for itself. What was interrupted goes on
    next time.
    """
    from localllm.download.queue import Queue
    from localllm.download.rate import RateLimit
    from localllm.download.transfer import Options

    results: dict[str, tuple[LocalModel, dict[str, int]]] = {}

    def record(order: Order, files: Sequence[Fetched]) -> None:
        one = asked.get(order.id)
        model = library.record(
            files[0].path,
            how="pulled",
            sha256s={file.path: file.sha256 for file in files if file.sha256},
            repo=order.repo,
            revision=one.listing.revision if one else order.commit,
            commit=order.commit,
            catalog_name=one.catalog_name if one else "",
        )
        counts = {
            "fetched_bytes": sum(file.fetched_bytes for file in files),
            "resumed_bytes": sum(file.resumed_bytes for file in files),
        }
        results[order.id] = model, counts

    with ExitStack() as stack:
        show = stack.enter_context(_bars(orders, quiet=quiet))
        queue = Queue(
            hub,
            library.directories.state / DOWNLOADS,
            options=Options(parts=parts),
            limit=RateLimit(limit_bytes_per_s),
            on_change=show,
            on_done=record,
        )
        stack.callback(queue.close)
        # One file may be asked for by two names.
        ids = list(dict.fromkeys(queue.add(order) for order in orders))
        failures: list[LocalLLMError] = []
        try:
            for ident in ids:
                try:
                    queue.wait(ident)
                except LocalLLMError as error:
                    failures.append(error)
        except KeyboardInterrupt:
            queue.close()
            stack.close()
            _say("interrupted: what was fetched is kept, the same command goes on from there")
            raise
    return [results[ident] for ident in ids if ident in results], failures


def _bars(orders: Sequence[Order], *, quiet: bool) -> Any:
    """A context with a function that shows a download: as a bar on a terminal, as lines for its messages elsewhere."""
    from contextlib import contextmanager

    @contextmanager
    def plain() -> Any:
        said: dict[str, str] = {}

        def show(download: Download) -> None:
            if download.message and said.get(download.id) != download.message and not quiet:
                said[download.id] = download.message
                _say(download.message)

        yield show

    @contextmanager
    def bars() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}", style="dim", markup=False),
        )
        said: dict[str, str] = {}
        with Progress(*columns, console=Console(stderr=True, highlight=False, emoji=False), transient=True) as progress:
            tasks = {each.id: progress.add_task(each.name[-40:], total=each.size_bytes, state="") for each in orders}

            def show(download: Download) -> None:
                progress.update(tasks[download.id], completed=download.done_bytes, state=_state(download))
                if download.message and said.get(download.id) != download.message:
                    said[download.id] = download.message
                    progress.console.print(download.message, markup=False, style="yellow")

            yield show

    return plain() if quiet or not sys.stderr.isatty() else bars()


def _download_json(download: Download) -> dict[str, Any]:
    return {
        "name": download.order.name,
        "state": download.state,
        "done_bytes": download.done_bytes,
        "size_bytes": download.order.size_bytes,
        "files": [str(target) for target in download.order.targets],
        "error": download.error.message if download.error else "",
    }


def _state(download: Download) -> str:
    return "" if download.state == "running" else download.state


def _show_plan(wanted: Sequence[Wanted], orders: Sequence[Order], *, as_json: bool) -> None:
    from localllm.cli.table import show_table
    from localllm.download.queue import planned

    if as_json:
        print(json.dumps([each.to_json(order) for each, order in zip(wanted, orders, strict=True)], indent=2))
        return
    rows: list[tuple[str, str, str, str]] = []
    for each, order in zip(wanted, orders, strict=True):
        _say(f"{each.label}: {each.reason}" + (f" (licence: {each.listing.licence})" if each.listing.licence else ""))
        for file in planned(order):
            there = "" if file.state == "new" else "here" if file.state == "present" else f"{_amount(file.present_bytes)} here"
            rows.append((file.file.path, _amount(file.file.size_bytes), str(file.target), there))
    show_table(("FILE", "SIZE", "GOES TO", "NOTE"), rows)


def _with_models(hub: Hub, hits: Sequence[SearchHit]) -> list[tuple[SearchHit, tuple[RemoteModel, ...]]]:
    """Each hit with its models, asked for side by side; a repository that does not answer is shown without."""
    from concurrent.futures import ThreadPoolExecutor

    def models(hit: SearchHit) -> tuple[RemoteModel, ...]:
        try:
            return hub.listing(hit.repo).models
        except LocalLLMError:
            return ()

    with ThreadPoolExecutor(8) as pool:
        return list(zip(hits, pool.map(models, hits), strict=True))


def _sizes(models: Sequence[RemoteModel], memory_bytes: int) -> str:
    """`Q4_K_M 4.9 GB ✓  Q8_0 8.5 GB`: the usual quantisations of a repository."""
    from localllm.quant import needed_bytes

    usual = {"Q4_K_M": 0, "Q8_0": 1, "MXFP4": 0, "Q6_K": 2, "Q5_K_M": 3, "Q4_0": 4, "Q3_K_M": 5}
    named = sorted((model for model in models if not model.missing), key=lambda model: usual.get(model.quant, len(usual)))
    shown = sorted(named[:MAX_QUANTS], key=lambda model: model.size_bytes)
    return "  ".join(
        f"{model.quant or model.name} {_amount(model.size_bytes)}{' ✓' if needed_bytes(model) <= memory_bytes else ''}" for model in shown
    )


def _note(hit: SearchHit, models: Sequence[RemoteModel]) -> str:
    notes = ["gated"] if hit.gated else []
    if len(models) > MAX_QUANTS:
        notes.append(f"{len(models)} files in all")
    if not models:
        notes.append("no models listed")
    elif all(model.missing for model in models):
        notes.append("incomplete: parts are missing")
    return ", ".join(notes)


def _hit_json(hit: SearchHit, models: Sequence[RemoteModel], memory_bytes: int) -> dict[str, Any]:
    from dataclasses import asdict

    from localllm.quant import needed_bytes

    listed = [
        {
            "quant": model.quant,
            "name": model.name,
            "size_bytes": model.size_bytes,
            "fits": not model.missing and needed_bytes(model) <= memory_bytes,
            "complete": not model.missing,
        }
        for model in models
    ]
    return {**asdict(hit), "models": listed}


def memory_once() -> Callable[[], int]:
    """A function that asks this machine for the free memory a model may use: of its cards where it has some, else its RAM."""
    from functools import cache

    @cache
    def memory_bytes() -> int:
        from localllm.cli.hardware import look

        found = look()
        cards = sum(device.free_bytes or 0 for device in found.devices if not device.shared_with_ram)
        return max(cards, found.ram.available_bytes or 0)

    return memory_bytes


def _amount(n_bytes: int) -> str:
    from localllm.amounts import amount

    return amount(n_bytes)


def _say(text: str) -> None:
    from localllm.cli.table import say

    say(text)
