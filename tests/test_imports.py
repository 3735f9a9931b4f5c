"""What importing costs: the heavy libraries stay out until they are needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"llama_cpp", "textual", "fastapi", "starlette", "numpy", "huggingface_hub", "prompt_toolkit", "jinja2", "pydantic_settings"}
REPORT = "import sys; print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
COMMAND = "import sys; sys.argv[1:] = {!r}\nfrom localllm.cli.app import main\nmain()"


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded by `code` in a fresh interpreter; its own output is dropped."""
    script = f"import atexit\natexit.register(lambda: exec({REPORT!r}))\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    return set(lines[-1].split())


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = modules_after("import localllm; localllm.__version__")
    assert "localllm" in loaded
    assert not loaded - set(sys.stdlib_module_names) - {"localllm", "__mp_main__", "_distutils_hack"} - site_modules()


def site_modules() -> set[str]:
    """What an empty program loads here: .pth files of the environment may import something."""
    return modules_after("pass")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_after(COMMAND.format(arguments))
    assert "typer" in loaded
    assert not loaded & (HEAVY | {"pydantic"})


@pytest.mark.parametrize("command", ["run", "bench", "config", "pull", "list", "hardware", "doctor"])
def test_help_of_a_command_loads_nothing_heavy(command: str) -> None:
    # typer itself brings pydantic here, to convert arguments.
    assert not modules_after(COMMAND.format([command, "--help"])) & HEAVY


@pytest.mark.parametrize("module", ["localllm.process", "localllm.cli.app", "localllm.library", "localllm.settings"])
def test_the_parent_never_loads_llama_cpp(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert not loaded & {"llama_cpp", "textual", "fastapi"}
