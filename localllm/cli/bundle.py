"""`localllm bundle`: create, verify, install, show, keygen. Bundles themselves localllm/bundle/ knows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from localllm.bundle.verify import Bundle

app = typer.Typer(help="Carry models, and localllm itself, to a machine without a network.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of the bundle, such as the stick.", show_default=False)]
Key = Annotated[str | None, typer.Option("--key", metavar="KEY", help="Public key, a .pub file or hex, that must have signed it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    out: Annotated[Path, typer.Argument(help="Folder to write to: new, empty, or a bundle.", show_default=False)],
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Model to carry; may be given several times.")] = None,
    with_runtime: Annotated[bool, typer.Option("--with-runtime", help="Carry localllm too, for machines like this one.")] = False,
    native: Annotated[
        bool, typer.Option("--native", help="Carry the engine as installed here: no compiling, but only for CPUs like this one.")
    ] = False,
    wheel: Annotated[list[Path] | None, typer.Option("--wheel", help="Use this wheel for its package; may be given several times.")] = None,
    config: Annotated[bool, typer.Option("--config/--no-config", help="Carry the settings, without keys and tokens.")] = True,
    sign: Annotated[Path | None, typer.Option("--sign", metavar="KEYFILE", help="Sign with this private key (bundle keygen).")] = None,
    chunk_size: Annotated[str, typer.Option("--chunk-size", help="Largest file of the bundle, below FAT32's 4 GiB.")] = "2GiB",
    force: Annotated[
        bool, typer.Option("--force", help="Write beside other files in the folder, and drop what a bundle there held.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write models, and with --with-runtime localllm itself, into a folder."""
    import tempfile

    from localllm.bundle.create import check
    from localllm.bundle.create import create as write
    from localllm.bundle.runtime import collect
    from localllm.bundle.settings import settings_for
    from localllm.bundle.sources import sources
    from localllm.bundle.stick import Contents
    from localllm.errors import UsageError
    from localllm.library.library import Library
    from localllm.paths import directories
    from localllm.settings import parse_bytes

    if not model and not with_runtime:
        raise UsageError("nothing to carry", hint="give --model NAME, --with-runtime, or both")
    if (native or wheel) and not with_runtime:
        raise UsageError("--native and --wheel are about the runtime", hint="add --with-runtime")
    chunk_bytes = parse_bytes(chunk_size)
    if not str(chunk_bytes).isdigit():
        raise UsageError(f"--chunk-size {chunk_size} is no size", hint="write it as 2GiB or 500MB")
    here = directories()
    carried = sources(Library(), model or [])
    check(out, carried, key=sign, force=force, chunk_bytes=int(chunk_bytes))
    settings = settings_for(here.config_file, [source.name for source in carried]) if config else None
    with tempfile.TemporaryDirectory(prefix="localllm-bundle-") as folder:
        runtime = collect(Path(folder), here.cache, native=native, given=wheel or [], say=_say) if with_runtime else None
        with _progress("writing") as on_progress:
            manifest = write(
                out,
                Contents(tuple(carried), runtime, settings),
                key=sign,
                force=force,
                chunk_bytes=int(chunk_bytes),
                on_progress=on_progress,
            )
    if not sign:
        _say("warning: the bundle is unsigned; its hashes find damage, not an attacker (--sign KEYFILE)")
    _report(_described(out, manifest, "signed" if sign else "unsigned"), as_json)


@app.command()
def verify(folder: Folder, key: Key = None, as_json: AsJson = False) -> None:
    """Check every byte of a bundle; `python verify.py` on the stick does the same without localllm."""
    from localllm.bundle.install import explained
    from localllm.bundle.verify import check_hashes

    with explained():
        bundle = _open(folder, key)
        with _progress("checking") as on_progress:
            check_hashes(bundle, on_progress)
    if as_json:
        _report(_described(folder, bundle.manifest, bundle.signature.state), as_json)
    else:
        print(f"ok: {sum(1 for _ in bundle.manifest.pieces)} files, {bundle.manifest.size_bytes:,} bytes")


@app.command()
def install(
    folder: Folder,
    key: Key = None,
    models_only: Annotated[bool, typer.Option("--models-only", help="Leave the bundle's localllm alone.")] = False,
    venv: Annotated[Path | None, typer.Option("--venv", help="Folder for the bundle's localllm.", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Hash while copying only, when the bundle was just verified.")] = False,
    as_json: AsJson = False,
) -> None:
    """Install a bundle's models, and its localllm if it has one; needs no network. Run it again after an interruption."""
    import os

    from localllm.bundle import bootstrap
    from localllm.bundle.install import explained, install_config, install_models, plan
    from localllm.bundle.verify import check_hashes
    from localllm.library.library import Library
    from localllm.paths import directories

    here = directories()
    library = Library()
    with explained():
        bundle = _open(folder, key)
        target = (venv or bootstrap.default_environment(dict(os.environ))).expanduser().absolute()
        # The environment that this very program runs from is not rebuilt under its feet.
        with_runtime = bool(bundle.manifest.wheels) and not models_only and target.resolve() != Path(sys.prefix).resolve()
        if with_runtime:
            for warning in bootstrap.check_platform(bundle):
                _say(f"warning: {warning}")
            bootstrap.check_environment(target, bundle)
        steps = plan(bundle, library)
        if not quick:
            with _progress("checking") as on_progress:
                check_hashes(bundle, on_progress)
        if with_runtime:
            _say(f"installing localllm into {target}")
            bootstrap.prove(bootstrap.install_runtime(bundle, target))
        with _progress("installing") as on_progress:
            models = install_models(bundle, library, steps, on_progress)
        settings = install_config(bundle, here.config_file)
    if as_json:
        _report(
            {
                "models": [model.to_json() for model in models],
                "runtime": str(target) if with_runtime else None,
                "config": str(here.config_file) if settings else None,
            },
            as_json,
        )
        return
    for model in models:
        print(f"installed {model.name}: {model.path}")
    if with_runtime:
        print(f"installed localllm: {bootstrap.environment_python(target).with_name('localllm')}")
    if settings:
        print(f"installed settings: {here.config_file}")


@app.command()
def show(folder: Folder, key: Key = None, as_json: AsJson = False) -> None:
    """Print what a bundle holds; reads sizes, not weights."""
    from localllm.bundle.install import explained

    with explained():
        bundle = _open(folder, key)
    _report(_described(folder, bundle.manifest, bundle.signature.state), as_json)


@app.command()
def keygen(file: Annotated[Path, typer.Argument(help="Where to write the private key; FILE.pub is the public one.")]) -> None:
    """Make a key that signs bundles."""
    from localllm.bundle.sign import generate

    print(generate(file))
    _say(f"private: {file} (keep it); public: {file}.pub (give it to those who check, by another way than the stick)")


def _open(folder: Path, key: str | None) -> Bundle:
    from localllm.bundle.verify import describe_signature, open_bundle

    bundle = open_bundle(folder, key)
    _say(describe_signature(bundle.signature))
    return bundle


def _described(folder: Path, manifest: Any, signature: str) -> dict[str, Any]:
    platform = manifest.platform
    return {
        "path": str(folder.absolute()),
        "created_by": manifest.created_by,
        "created": manifest.created,
        "signature": signature,
        "size_bytes": manifest.size_bytes,
        "models": [
            {
                "name": model.name,
                "repo": model.repo,
                "commit": model.commit,
                "licence": model.licence,
                "size_bytes": sum(file.size_bytes for file in model.files),
                "files": [{"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256} for file in model.files],
            }
            for model in manifest.models
        ],
        "runtime": platform
        and {
            "os": platform.os,
            "arch": platform.arch,
            "libc": platform.libc,
            "libc_version": platform.libc_version,
            "python": platform.python,
            "cpu_features": platform.cpu_features and list(platform.cpu_features),
            "wheels": [wheel.file for wheel in manifest.wheels],
        },
    }


def _report(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(facts, indent=2))
        return
    from localllm.amounts import amount

    print(f"{facts['path']}: {amount(facts['size_bytes'])}, {facts['signature']}, made by {facts['created_by']} on {facts['created']}")
    for model in facts["models"]:
        print(f"  model    {model['name']}  {amount(model['size_bytes'])}  licence: {model['licence']}")
    if runtime := facts["runtime"]:
        needs = " ".join(runtime["cpu_features"] or ["(unknown)"])
        print(f"  runtime  {runtime['os']} {runtime['arch']}, {runtime['libc']} {runtime['libc_version']}, Python {runtime['python']}")
        print(f"           {len(runtime['wheels'])} wheels; CPU features: {needs}")


class _progress:
    """A bar on a terminal's stderr that leaves no trace; nothing elsewhere. Gives the function that moves it."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None

    def __enter__(self) -> Callable[[str, int, int], None]:
        if not sys.stderr.isatty():
            return lambda what, done, total: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        task = self._bar.add_task(self._what, total=None)
        return lambda what, done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


def _say(text: str) -> None:
    print(text, file=sys.stderr)
