"""The `localllm` command: its subcommands, and the one place where an error becomes words and an exit code.

Command modules are light and import what they need inside their functions, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from localllm import __version__
from localllm.cli import bundle, config
from localllm.cli.adopt import adopt, import_
from localllm.cli.bench import bench
from localllm.cli.disk import df, prune
from localllm.cli.doctor import doctor
from localllm.cli.hardware import hardware
from localllm.cli.models import alias, list_, rm, show, verify
from localllm.cli.plan import plan
from localllm.cli.ps import ps
from localllm.cli.pull import downloads, pull, search
from localllm.cli.run import run
from localllm.errors import LocalLLMError

INTERRUPTED = 130
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})

app = typer.Typer(
    name="localllm",
    help="Run language models on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"localllm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Run language models on your own machine."""


app.command(rich_help_panel="Models")(run)
app.command(rich_help_panel="Models")(bench)
app.command(rich_help_panel="Models")(pull)
app.command(rich_help_panel="Models")(downloads)
app.command(rich_help_panel="Models")(search)
app.command("list", rich_help_panel="Disk")(list_)
app.command("ls", hidden=True)(list_)
app.command(rich_help_panel="Disk")(show)
app.command(rich_help_panel="Disk")(rm)
app.command(rich_help_panel="Disk")(alias)
app.command("import", rich_help_panel="Disk")(import_)
app.command(rich_help_panel="Disk")(adopt)
app.command(rich_help_panel="Disk")(verify)
app.command(rich_help_panel="Disk")(df)
app.command(rich_help_panel="Disk")(prune)
app.add_typer(bundle.app, name="bundle", rich_help_panel="Disk")
app.command(rich_help_panel="Machine")(plan)
app.command(rich_help_panel="Machine")(ps)
app.command(rich_help_panel="Machine")(hardware)
app.command(rich_help_panel="Machine")(doctor)
app.add_typer(config.app, name="config", rich_help_panel="Settings")


def main() -> None:
    """Run the command line and end the process with its exit code."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A model may write what the terminal's encoding lacks; a question mark is better than a crash.
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    code: str | int | None = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except LocalLLMError as error:
        _complain(error.message, error.hint)
        code = error.exit_code
    except BrokenPipeError:
        code = 1
    except Exception as error:
        if os.environ.get("LOCALLLM_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno in FULL and not error.filename:
            _complain(f"cannot write the answer: {error.strerror}", "see where stdout goes")
        else:
            what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            _complain(f"unexpected: {what}", "this is a bug; LOCALLLM_DEBUG=1 shows where it happened")
        code = 1
    _end(code)


def _open_closed_streams() -> None:
    """Give the null device to what was closed (`localllm … >&-`): else the next file opened would be taken for it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for as long as the process lives
            with suppress(OSError):
                if getattr(sys, name).fileno() != number:
                    os.dup2(getattr(sys, name).fileno(), number)


def _complain(message: str, hint: str) -> None:
    # A file's name, or a text in one, may hold what steers a terminal.
    from localllm.cli.visible import visible

    message, hint = visible(message), visible(hint)
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)


def _end(code: str | int | None) -> None:
    """Exit; a reader that has gone (`localllm … | head`) is no error, and must not become one while flushing."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
