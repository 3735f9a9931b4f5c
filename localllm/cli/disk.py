"""`localllm df` and `prune`: what the models take on disk, and getting rid of what nobody needs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from localllm.cli.models import Json, Yes

if TYPE_CHECKING:
    from localllm.library.disk import Prunable, Usage

BAR_WIDTH = 40


def df(as_json: Json = False) -> None:
    """Say how much disk the models take, and how much is left."""
    from localllm.amounts import amount
    from localllm.cli.table import show_pairs, show_table
    from localllm.library import Library
    from localllm.library.disk import usage

    library = Library()
    used = usage(library)
    publishers: dict[str, int] = {}
    for model in used.models:
        publisher = model.key.partition("/")[0] if "/" in model.key else ""
        publishers[publisher] = publishers.get(publisher, 0) + model.size_bytes
    if as_json:
        out = {
            "path": str(library.root),
            "models": [{"name": model.name, "size_bytes": model.size_bytes} for model in used.models],
            "publishers": [{"publisher": name, "size_bytes": size} for name, size in publishers.items()],
            "models_bytes": used.models_bytes,
            "partial_bytes": used.partial_bytes,
            "other_bytes": used.other_bytes,
            "kv_states_bytes": used.kv_states_bytes,
            "adopted_bytes": used.adopted_bytes,
            "disk_free_bytes": used.disk_free_bytes,
            "disk_total_bytes": used.disk_total_bytes,
        }
        print(json.dumps(out, indent=2))
        return
    rows = [(model.name, amount(model.size_bytes)) for model in used.models]
    totals = [(f"{publisher}/", amount(size)) for publisher, size in publishers.items() if publisher and len(publishers) > 1]
    if rows:
        show_table(("NAME", "SIZE"), rows + totals)
        print()
    show_pairs(
        [
            ("models", amount(used.models_bytes)),
            ("partial downloads", amount(used.partial_bytes) if used.partial_bytes else ""),
            ("other files", amount(used.other_bytes) if used.other_bytes else ""),
            ("saved KV states", amount(used.kv_states_bytes) if used.kv_states_bytes else ""),
            ("adopted, elsewhere", amount(used.adopted_bytes) if used.adopted_bytes else ""),
            ("free", f"{amount(used.disk_free_bytes)} of {amount(used.disk_total_bytes)}"),
            ("folder", str(library.root)),
        ]
    )
    if sys.stdout.isatty():
        print(_bar(used))


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete partial downloads that nobody works on, dead links, empty folders and notes on files that are gone."""
    from localllm.amounts import amount
    from localllm.cli.table import say, show_table
    from localllm.library import Library
    from localllm.library.disk import prunable
    from localllm.library.disk import prune as delete

    library = Library()
    found = prunable(library)
    if not as_json:
        show_table(("WHAT", "NAME", "SIZE"), [(item.what, item.name, amount(item.size_bytes) if item.size_bytes else "") for item in found])
    if found and not yes and not dry_run and sys.stdin.isatty():
        typer.confirm(
            "Delete these? A paused download starts again from nothing." if _has_partial(found) else "Delete these?", abort=True, err=True
        )
    freed = 0 if dry_run else delete(library, found)
    if as_json:
        items = [
            {"what": item.what, "name": item.name, "size_bytes": item.size_bytes, "paths": [str(path) for path in item.paths]}
            for item in found
        ]
        print(json.dumps({"dry_run": dry_run, "freed_bytes": freed, "items": items}, indent=2))
    elif not found:
        say("nothing to prune")
    elif not dry_run:
        say(f"freed {amount(freed)}", answer=True)


def _has_partial(found: list[Prunable]) -> bool:
    return any(item.what == "partial" for item in found)


def _bar(used: Usage) -> str:
    """The disk as a bar: models, what else is on it, free."""
    total = max(1, used.disk_total_bytes)
    models = round(BAR_WIDTH * min(1.0, used.models_bytes / total)) or int(bool(used.models_bytes))
    free = round(BAR_WIDTH * used.disk_free_bytes / total)
    others = max(0, BAR_WIDTH - models - free)
    return f"[{'#' * models}{'-' * others}{' ' * (BAR_WIDTH - models - others)}]  # models  - other files"
