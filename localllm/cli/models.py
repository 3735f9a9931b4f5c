"""`localllm list`, `show`, `rm`, `verify` and `alias`: the models on this machine. What is one, the library knows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from localllm.catalog import ModelSpec
    from localllm.gguf import Header
    from localllm.library import Library, LocalModel
    from localllm.library.library import Checked

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Models, as localllm list names them.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def list_(as_json: Json = False) -> None:
    """List the models on this machine."""
    from localllm.amounts import amount
    from localllm.cli.table import count, show_table
    from localllm.library import Library

    library = Library()
    models = library.models()
    if as_json:
        print(json.dumps([model.to_json() for model in models], indent=2))
        return
    names: dict[str, list[str]] = {}
    for alias, target in {"demo": "demo-large", **library.aliases()}.items():
        names.setdefault(target.casefold(), []).append(alias)
    show_table(
        ("NAME", "SIZE", "QUANT", "PARAMS", "ARCHITECTURE", "FROM", "ADDED", "NOTE"),
        [
            (
                model.name,
                amount(model.size_bytes),
                model.quant,
                count(model.n_params),
                model.architecture,
                model.how,
                model.added[:10],
                "; ".join(_notes(model, [*names.get(model.name.casefold(), []), *names.get(model.catalog_name, [])])),
            )
            for model in models
        ],
        spare=("ARCHITECTURE", "ADDED", "PARAMS", "FROM", "QUANT"),
    )


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model, or the path of a GGUF file.", show_default=False)],
    template: Annotated[bool, typer.Option("--template", help="Print the chat template.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="Print every key of the header.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a model is and where it lies."""
    from localllm.cli.table import show_pairs
    from localllm.cli.visible import visible
    from localllm.errors import ModelError, NotFound, UsageError
    from localllm.gguf import read_model
    from localllm.library import Library

    if template and (metadata or as_json):
        raise UsageError("--template prints the template alone", hint="leave out --metadata and --json")
    library = Library()
    model = _look_up(library, name)
    try:
        header = read_model(model.path)
    except ModelError:
        # What is wrong with it is part of what there is to show.
        if template or metadata:
            raise
        header = None
    if template:
        if header is None or not header.chat_template:
            raise NotFound(f"{model.name} has no chat template", hint="use it with: localllm run --raw")
        print(visible(header.chat_template) if sys.stdout.isatty() else header.chat_template)
    elif metadata and header:
        values = {key: _plain(value) for key, value in header.metadata.items()}
        if as_json:
            print(json.dumps(values, indent=2))
        else:
            show_pairs([(visible(key), value if isinstance(value, str) else json.dumps(value)) for key, value in values.items()])
    else:
        spec = _spec(library, model)
        facts = {**model.to_json(), **_facts(header, spec)}
        print(json.dumps(facts, indent=2)) if as_json else show_pairs(_pairs(facts))


def rm(names: Names, yes: Yes = False, as_json: Json = False) -> None:
    """Delete models from disk. An adopted one is only forgotten: its files are another program's."""
    from localllm.amounts import amount
    from localllm.cli.table import say
    from localllm.library import Library

    library = Library()
    models = list({model.key: model for model in map(library.find, names)}.values())
    if not yes and sys.stdin.isatty():
        for model in models:
            say(
                f"{model.name}, {amount(model.size_bytes)}, {model.path}" + (" (adopted: its files stay)" if model.how == "adopted" else "")
            )
        typer.confirm("Remove?" if len(models) == 1 else f"Remove these {len(models)}?", abort=True, err=True)
    removed = [library.remove(model) for model in models]
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": one.name,
                        "freed_bytes": one.freed_bytes,
                        "deleted": [str(path) for path in one.deleted],
                        "forgotten": [str(path) for path in one.forgotten],
                    }
                    for one in removed
                ],
                indent=2,
            )
        )
        return
    for one in removed:
        if one.deleted:
            held = "" if one.freed_bytes else "; another name still holds the data"
            say(f"removed {one.name}, freed {amount(one.freed_bytes)}{held}", answer=True)
        else:
            say(f"forgot {one.name}; its files stay: {', '.join(map(str, one.forgotten))}", answer=True)


def verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Models to check.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Check every model.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Hash models again and compare. Exit code 6 when a file is not what it should be.

    A file whose hash nobody told gets its first one recorded.
    """
    from localllm.cli.table import bytes_bar, show_table
    from localllm.errors import UsageError, VerificationFailed
    from localllm.library import Library

    if bool(names) == everything:
        raise UsageError("say which models to verify", hint="give their names, or --all alone")
    library = Library()
    models = library.models() if everything else list({model.key: model for model in map(library.find, names or [])}.values())
    checked: list[Checked] = []
    with bytes_bar("hashing", sum(model.size_bytes for model in models), quiet=quiet) as progress:
        for model in models:
            checked += library.verify(model, progress)
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": one.model,
                        "path": str(one.path),
                        "state": one.state,
                        "sha256": one.sha256,
                        "expected": one.expected,
                        "detail": one.detail,
                    }
                    for one in checked
                ],
                indent=2,
            )
        )
    else:
        words = {"ok": "ok", "recorded": "first hash recorded", "mismatch": "MISMATCH", "unreadable": "UNREADABLE"}
        rows = [(one.model, words[one.state], one.sha256 or one.detail, str(one.path)) for one in checked]
        show_table(("NAME", "RESULT", "SHA256", "PATH"), rows, spare=("PATH", "SHA256"))
    if bad := [one for one in checked if one.state in ("mismatch", "unreadable")]:
        first = bad[0]
        what = f"has changed: its SHA-256 should be {first.expected}" if first.state == "mismatch" else f"cannot be read: {first.detail}"
        raise VerificationFailed(
            f"{first.path} {what}" + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""),
            hint=f"remove it with localllm rm {first.model}, and fetch it again",
        )


def alias(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="The alias; without one, list them.", show_default=False)] = "",
    target: Annotated[str, typer.Argument(metavar="[TARGET]", help="The model it stands for.", show_default=False)] = "",
    remove: Annotated[bool, typer.Option("--rm", help="Remove the alias.")] = False,
    as_json: Json = False,
) -> None:
    """Give a model a short name of your own, or list those given."""
    from localllm.cli.table import show_table
    from localllm.errors import NotFound, UsageError
    from localllm.library import Library

    library = Library()
    if remove and (not name or target):
        raise UsageError("--rm takes the alias alone", hint="localllm alias --rm NAME")
    if remove:
        library.remove_alias(name)
    elif target:
        library.set_alias(name, target)
        _warn_if_missing(library, name, target)
    aliases = library.aliases()
    if name and not remove:
        if name not in aliases:
            raise NotFound(f"no alias is called {name!r}", hint=f"make it with: localllm alias {name} MODEL")
        aliases = {name: aliases[name]}
    if as_json:
        print(json.dumps([{"alias": alias, "target": target} for alias, target in aliases.items()], indent=2))
    elif not target and not remove:
        show_table(("ALIAS", "MODEL"), list(aliases.items()))


def _warn_if_missing(library: Library, alias: str, target: str) -> None:
    """An alias may be made before its model is here; a typing error should not wait until it is used."""
    from localllm.cli.table import say
    from localllm.errors import NotFound

    try:
        _look_up(library, alias)
    except NotFound as error:
        say(f"note: {error.message}; {error.hint}")


def _notes(model: LocalModel, aliases: list[str]) -> list[str]:
    notes = [model.problem] if model.problem else []
    if model.changed and not model.problem:
        notes.append("changed since its hash was taken; see localllm verify")
    if model.is_side_file:
        notes.append("goes with a model")
    if model.catalog_name:
        notes.append(model.catalog_name)
    return notes + [f"alias {alias}" for alias in aliases]


def _look_up(library: Library, name: str) -> LocalModel:
    """The model in the library, or in the file at the path `name`."""
    name = library.expand(name)
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):
        return library.find(name)
    key = library.key_of(path)
    return next((model for model in library.models() if model.key == key), None) or library.describe(path)


def _spec(library: Library, model: LocalModel) -> ModelSpec | None:
    """The catalogue's entry for the model, if it has one."""
    from localllm.catalog import load_catalog

    catalog = load_catalog(library.directories.catalog_file)
    repo = model.repo or model.name.partition(":")[0]
    name = model.path.name
    return next((spec for spec in catalog.models if spec.repo.casefold() == repo.casefold() and spec.quant_of(name)), None) or next(
        (spec for spec in catalog.models if spec.built_in and model.how == "built-in" and name in spec.files.values()), None
    )


def _facts(header: Header | None, spec: ModelSpec | None) -> dict[str, Any]:
    """What `show` says beyond the list."""
    licence = header.metadata.get("general.license", "") if header else ""
    return {
        "title": header.name if header else "",
        "licence": licence if isinstance(licence, str) and licence else spec.licence if spec else "",
        "n_layers": header.n_layers if header else 0,
        "n_embd": header.n_embd if header else 0,
        "n_vocab": header.n_vocab if header else 0,
        "has_chat_template": bool(header and header.chat_template),
        "tokenizer_hash": header.tokenizer_hash if header else "",
        "catalog": spec.key if spec else "",
        "roles": list(spec.roles) if spec else [],
        "draft": list(spec.draft) if spec else [],
    }


def _pairs(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from localllm.amounts import amount
    from localllm.cli.table import count

    source = facts["repo"] + (f" at {facts['commit'][:12]}" if facts["commit"] else "")
    pairs: list[tuple[str, str]] = [
        ("name", facts["name"]),
        ("title", facts["title"]),
        ("problem", facts["problem"]),
        ("architecture", facts["architecture"]),
        ("parameters", count(facts["n_params"])),
        ("quantisation", facts["quant"]),
        ("context", f"{facts['n_ctx_train']:,} tokens" if facts["n_ctx_train"] else ""),
        ("layers", str(facts["n_layers"] or "")),
        ("embedding", str(facts["n_embd"] or "")),
        ("vocabulary", f"{facts['n_vocab']:,} tokens" if facts["n_vocab"] else ""),
        ("chat template", "yes" if facts["has_chat_template"] else "no"),
        ("licence", facts["licence"]),
        ("catalogue", facts["catalog"]),
        ("roles", ", ".join(facts["roles"])),
        ("drafts for it", ", ".join(facts["draft"])),
        ("size", f"{amount(facts['size_bytes'])} ({facts['size_bytes']:,} bytes)"),
        ("from", f"{facts['how']} {facts['added'][:10]}".strip()),
        ("repository", source),
    ]
    for path, sha256 in zip(facts["files"], facts["sha256s"], strict=True):
        unknown = "not known" if facts["name"] == facts["path"] else "not known; localllm verify records it"
        pairs += [("file", path), ("sha256", sha256 or unknown)]
    return pairs


def _plain(value: Any) -> Any:
    """A header's value as JSON can hold it; a long array by its length alone."""
    from localllm.errors import ModelError
    from localllm.gguf import Array

    if not isinstance(value, Array):
        return value
    try:
        return list(value.values())
    except ModelError:
        return f"{value.length:,} x {value.type}"
