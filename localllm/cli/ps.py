"""`localllm ps`: what is loaded now, what was planned for it and what it took."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def ps(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that are loaded, with planned and actual memory."""
    from localllm.cli.table import say, show_table
    from localllm.loading import running
    from localllm.paths import directories
    from localllm.plan.explain import size

    models = running(directories().state)
    if as_json:
        print(json.dumps(models, indent=2))
        return
    if not models:
        say("no model is loaded; localllm run MODEL loads one")
        return
    rows: list[tuple[str, ...]] = []
    for model in models:
        for i, device in enumerate(model["devices"]):
            name = (str(model["pid"]), model["model"], f"{model['n_ctx']:,}") if i == 0 else ("", "", "")
            rows.append((*name, device["name"], size(device["planned_bytes"]), size(device["actual_bytes"]), size(device["mapped_bytes"])))
    show_table(("PID", "MODEL", "CONTEXT", "DEVICE", "PLANNED", "ACTUAL", "MAPPED FILE"), rows)
