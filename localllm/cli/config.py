"""`localllm config`: show, get, set, unset, path, edit. What is a setting, and whether a value is good, settings.py knows."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(help="Show and change settings.", no_args_is_help=True)

Key = Annotated[str, typer.Argument(help="Name of a setting.", show_default=False)]


@app.command()
def show(
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the settings in force."""
    import json

    from localllm.settings import load

    loaded = load()
    values = loaded.settings.model_dump()
    if as_json:
        out = {key: {"value": value, "origin": loaded.origins[key]} for key, value in values.items()} if origin else values
        print(json.dumps(out, indent=2))
    else:
        lines = {key: f"{key} = {json.dumps(value)}" for key, value in values.items()}
        width = max(map(len, lines.values()))
        for key, line in lines.items():
            print(f"{line:<{width}}  # {loaded.origins[key]}" if origin else line)
    for name in loaded.ignored:
        print(f"warning: {name} matches no setting", file=sys.stderr)


@app.command()
def get(key: Key) -> None:
    """Print one value."""
    from localllm.settings import known_key, load

    value = load().settings.model_dump()[known_key(key)]
    print(str(value).lower() if isinstance(value, bool) else value)


@app.command("set")
def set_(key: Key, value: Annotated[str, typer.Argument(help="New value.", show_default=False)]) -> None:
    """Write one value to the settings file."""
    from localllm.paths import directories
    from localllm.settings import load, set_value

    file = directories().config_file
    set_value(file, key, value)
    if (origin := load().origins[key]) != str(file):
        print(f"warning: {origin} overrides it", file=sys.stderr)


@app.command()
def unset(key: Key) -> None:
    """Remove one value from the settings file."""
    from localllm.errors import NotFound
    from localllm.paths import directories
    from localllm.settings import unset_value

    file = directories().config_file
    if not unset_value(file, key):
        raise NotFound(f"{file} does not set {key}", hint="localllm config show --origin says where values come from")


@app.command()
def path() -> None:
    """Print where the settings file is, or would be."""
    from localllm.paths import directories

    print(directories().config_file)


@app.command()
def edit() -> None:
    """Open the settings file in $VISUAL or $EDITOR, then check it."""
    import os
    import shlex
    import subprocess

    from localllm.errors import UsageError
    from localllm.files import write_atomic
    from localllm.paths import directories
    from localllm.settings import load, template

    file = directories().config_file
    if not file.exists():
        write_atomic(file, template().encode())
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ("notepad" if os.name == "nt" else "vi")
    try:
        done = subprocess.run([*shlex.split(editor, posix=os.name != "nt"), str(file)], check=False)
    except OSError as error:
        raise UsageError(f"cannot start the editor {editor}: {error.strerror}", hint=f"set EDITOR, or edit {file}") from error
    if done.returncode:
        raise UsageError(f"the editor {editor} ended with code {done.returncode}", hint=f"the file is {file}")
    load()
