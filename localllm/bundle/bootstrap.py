"""Putting localllm itself on a machine without a network: a virtual environment, and the bundle's wheels in it.

Travels on the stick as `python install.py`: standard library only, Python 3.8, though wheels may need a newer one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from .machine import mismatches, this_machine
from .manifest import Piece, Refused
from .verify import Bundle, check_hashes, complain, describe_signature, open_bundle, print_progress, unpacked_bytes

# What a bare `import pip` needs none of, and what would let the user's settings reach an index or another folder.
_STRANGERS = ("PIP_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
MARKER = "localllm-bundle.txt"
"""In an environment that we made: which wheels it holds, or that it is unfinished."""
RUN_PIP = "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('pip', run_name='__main__', alter_sys=True)"


def default_environment(env: dict[str, str]) -> Path:
    """Where localllm goes unless told: `venv` in its own data folder."""
    home = Path(os.path.expanduser("~"))
    if env.get("LOCALLLM_HOME"):
        return Path(env["LOCALLLM_HOME"]).expanduser().absolute() / "venv"
    if sys.platform == "win32":
        return Path(env.get("LOCALAPPDATA") or home / "AppData" / "Local") / "localllm" / "venv"
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "localllm" / "venv"
    return Path(env.get("XDG_DATA_HOME") or home / ".local" / "share") / "localllm" / "venv"


def check_platform(bundle: Bundle) -> list[str]:
    """Warnings about what could not be told. Raises Refused, with every reason, where the wheels cannot run here."""
    if not bundle.manifest.wheels or bundle.manifest.platform is None:
        raise Refused(["this bundle holds models only, not localllm"], "make one with: localllm bundle create --with-runtime", exit_code=3)
    wrong, unsure = mismatches(bundle.manifest.platform, this_machine())
    if wrong:
        hint = f"run it with python{bundle.manifest.platform.python}" if all(text.startswith("Python") for text in wrong) else ""
        raise Refused(
            wrong, hint or "make a bundle on a machine like this one; localllm bundle install --models-only takes the models", exit_code=4
        )
    return unsure


def check_environment(target: Path, bundle: Bundle) -> None:
    """Whether `target` may become the environment, and has room. Raises Refused; writes nothing."""
    ours = (target / MARKER).is_file() or (target / "pyvenv.cfg").is_file()
    if target.exists() and not ours and (not target.is_dir() or any(target.iterdir())):
        raise Refused([f"{target} is there and is no Python environment"], "give another folder: --venv DIR", exit_code=2)
    if target.resolve() == Path(sys.prefix).resolve():
        raise Refused([f"this Python runs from {target} itself"], "run install.py with the system's Python", exit_code=2)
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    needed, free = int(unpacked_bytes(bundle) * 1.3), shutil.disk_usage(existing).free
    if needed > free:
        problem = f"localllm needs {needed:,} bytes in {target}, {free:,} are free"
        raise Refused([problem], "free some, or give another folder: --venv DIR", exit_code=4)


def install_runtime(bundle: Bundle, target: Path) -> Path:
    """Make the environment at `target` from the bundle's wheels, unless it is there; the Python in it. Raises Refused.

    One that was not finished, or came from another bundle, is made anew: a half-installed package looks whole to pip.
    """
    marker, python = target / MARKER, environment_python(target)
    wanted = "\n".join(sorted(f"{wheel.sha256} {wheel.file}" for wheel in bundle.manifest.wheels))
    # Somebody's own environment is added to, never emptied.
    ours = marker.is_file() or not (target / "pyvenv.cfg").is_file()
    try:
        if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
            return python
        if ours:
            _begin(target)
        venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(target)
        _install_wheels(bundle, python)
        if ours:
            marker.write_text(wanted, encoding="utf-8")
    except (OSError, subprocess.SubprocessError) as error:
        raise Refused([f"cannot make a Python environment in {target}: {error}"], exit_code=1) from error
    return python


def _begin(target: Path) -> None:
    """An empty folder with the marker in it, which stays from now on: the folder is ours even when this is cut off."""
    target.mkdir(parents=True, exist_ok=True)
    (target / MARKER).write_text("unfinished", encoding="utf-8")
    for child in target.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != MARKER:
            child.unlink()


def _install_wheels(bundle: Bundle, python: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        # Files by name and hash: an extra wheel in the folder is never looked at, and a swapped one is refused by pip.
        lines = [f"{_path(bundle, wheel).as_uri()} --hash=sha256:{wheel.sha256}" for wheel in bundle.manifest.wheels]
        requirements.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [str(python), "-I", *_pip(bundle, python), "--isolated", "--disable-pip-version-check", "install", "--quiet"]
        command += [
            "--no-index",
            "--no-deps",
            "--no-cache-dir",
            "--only-binary=:all:",
            "--require-hashes",
            "--requirement",
            str(requirements),
        ]
        if subprocess.run(command, env=_clean(), check=False).returncode:
            raise Refused(
                [f"pip could not install the wheels, with {python}"], "its messages are above; remove the folder and try again", exit_code=1
            )


def prove(python: Path) -> None:
    """Let the installed localllm answer with its built-in model. Raises Refused with what the system said.

    Some reasons why compiled code does not run show only now: a missing libgomp, or a CPU whose features nobody could tell.
    """
    with tempfile.TemporaryDirectory() as home:
        command = [str(python), "-I", "-m", "localllm", "run", "--quiet", "--max-tokens", "4", "demo-small", "Hello"]
        env = {**_clean(), "LOCALLLM_HOME": home}
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-8:]
        raise Refused(
            ["localllm is installed, but does not run on this machine:", *last],
            "a shared library that is missing comes from this system's packages (libgomp1, libstdc++6)",
            exit_code=1,
        )


def environment_python(target: Path) -> Path:
    return target / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _pip(bundle: Bundle, python: Path) -> list[str]:
    """How to start pip: from its own wheel, since Debian's Python comes without; else the one that Python carries."""
    for wheel in bundle.manifest.wheels:
        if wheel.file.startswith("wheels/pip-"):
            return ["-c", RUN_PIP, str(_path(bundle, wheel))]
    if subprocess.run([str(python), "-I", "-m", "ensurepip"], env=_clean(), stdout=subprocess.DEVNULL, check=False).returncode:
        raise Refused(
            ["there is no pip in the bundle, and none in this Python"], "install python3-venv, or add pip to the bundle", exit_code=1
        )
    return ["-m", "pip"]


def _path(bundle: Bundle, piece: Piece) -> Path:
    return bundle.root.absolute().joinpath(*piece.file.split("/"))


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_STRANGERS)}


def main(root: Path, arguments: list[str]) -> int:
    """`python install.py` on the stick: check everything, then localllm, then, by it, the models."""
    parser = argparse.ArgumentParser(prog="install.py", description="Install localllm and its models from this bundle, without a network.")
    parser.add_argument(
        "--venv", type=Path, default=default_environment(dict(os.environ)), help="folder for localllm (default: %(default)s)"
    )
    parser.add_argument("--key", help="public key (file or hex) that must have signed the bundle")
    options = parser.parse_args(arguments)
    target = Path(options.venv).expanduser().absolute()
    try:
        bundle = open_bundle(root, options.key)
        print(describe_signature(bundle.signature), file=sys.stderr)
        for warning in check_platform(bundle):
            print(f"warning: {warning}", file=sys.stderr)
        check_environment(target, bundle)
        check_hashes(bundle, print_progress)
        print(f"installing localllm into {target}", file=sys.stderr)
        python = install_runtime(bundle, target)
        prove(python)
        # Every byte was just read: the models are checked once more while they are copied, which is enough.
        command = [str(python), "-I", "-m", "localllm", "bundle", "install", str(root), "--models-only", "--quick"]
        code = subprocess.run(command + (["--key", options.key] if options.key else []), env=_clean(), check=False).returncode
    except Refused as refused:
        return complain(refused)
    except KeyboardInterrupt:
        return 130
    if code == 0:
        print(f"run it with: {python.with_name('localllm')} run")
    return code
