"""`localllm import` and `adopt`: model files that are on this machine already, taken in or used where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localllm.cli.models import Json, Quiet
from localllm.errors import UsageError

if TYPE_CHECKING:
    from localllm.library import Library, LocalModel
    from localllm.library.importing import How
    from localllm.library.stores import Found


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A GGUF file; of a split model, one part.", show_default=False)],
    name: Annotated[
        str, typer.Option(metavar="PUBLISHER/REPO", help="Where it goes; local/ and its name by default.", show_default=False)
    ] = "",
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy it: the default; takes no space where the file system can share blocks.")
    ] = False,
    move: Annotated[bool, typer.Option("--move", help="Move it.")] = False,
    link: Annotated[bool, typer.Option("--link", "-L", help="A second name for the same file (hard link), on one disk.")] = False,
    symlink: Annotated[bool, typer.Option("--symlink", "-l", help="A link to where it is.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Take a model file into the library."""
    from localllm.amounts import amount
    from localllm.cli.table import bytes_bar, say
    from localllm.library import Library
    from localllm.library.importing import import_file

    ways: tuple[tuple[How, bool], ...] = (("copy", copy), ("move", move), ("link", link), ("symlink", symlink))
    chosen: list[How] = [way for way, given in ways if given]
    if len(chosen) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} exclude each other", hint="choose one")
    way: How = chosen[0] if chosen else "copy"
    library = Library()
    path = path.expanduser()
    with bytes_bar(f"importing {path.name}", _size(path), quiet=quiet) as progress:
        model = import_file(library, path, way, name, progress)
    if as_json:
        print(json.dumps(model.to_json(), indent=2))
    else:
        say(f"{model.name}, {amount(model.size_bytes)}, is in the library: {model.path}")
        print(model.name)


def adopt(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Models to adopt; none: look.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Adopt every model found.")] = False,
    folders: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="DIR", help="Look here, and not where other programs keep models.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Use models of Hugging Face, LM Studio, Ollama, Jan and llama.cpp where they are, without a copy.

    Without a name: list them, and which of them are on the disk several times.
    """
    from localllm.library import Library
    from localllm.library.adopting import adoptable, candidates, choose, find_others

    if names and everything:
        raise UsageError("--all takes no names", hint="give names, or --all alone")
    for folder in folders or []:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder", hint="give the folder to look in")
    library = Library()
    # Where the models folder is another program's, what is in it is in the library.
    found = [item for item in find_others([folder.expanduser() for folder in folders or []]) if not item.path.is_relative_to(library.root)]
    if names:
        _adopt(library, [choose(found, name) for name in names], as_json=as_json)
        return
    if everything:
        adopted = {model.path for model in library.models()}
        _adopt(library, [item for item in found if item.path not in adopted], as_json=as_json, keep_going=True)
        return

    from localllm.amounts import amount
    from localllm.cli.table import bytes_bar, say, show_table

    unknown = {file for files in candidates(library, found) for file in files}
    with bytes_bar("hashing files of equal size", sum(_size(file) for file in unknown), quiet=quiet) as progress:
        seen = adoptable(library, found, progress)
    if as_json:
        print(json.dumps([item.to_json() for item in seen], indent=2))
        return
    rows: list[tuple[str, ...]] = []
    for item in seen:
        note = item.found.problem or ("adopted" if item.adopted else "")
        copies = f"same as {', '.join(item.copies)}" if item.copies else ""
        rows.append(
            (item.found.name, amount(item.found.size_bytes), item.found.app, "; ".join(filter(None, (note, copies))), str(item.found.path))
        )
    show_table(("NAME", "SIZE", "FROM", "NOTE", "PATH"), rows, spare=("PATH",))
    if any(not item.adopted and not item.found.problem for item in seen):
        say("use them with: localllm adopt NAME, or localllm adopt --all")
    if not seen:
        say("no other program keeps models on this machine, or not where it usually does; see --from DIR")


def _adopt(library: Library, found: list[Found], *, as_json: bool, keep_going: bool = False) -> None:
    """Adopt each; with `keep_going` what cannot be adopted is said, and the rest goes on."""
    from localllm.cli.table import say
    from localllm.errors import LocalLLMError
    from localllm.library.adopting import adopt as take

    adopted: list[LocalModel] = []
    for item in found:
        try:
            adopted.append(take(library, item))
        except LocalLLMError as error:
            if not keep_going:
                raise
            say(f"warning: {error.message}")
    if as_json:
        print(json.dumps([model.to_json() for model in adopted], indent=2))
    else:
        for model in adopted:
            say(f"adopted {model.path}")
            print(model.name)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
