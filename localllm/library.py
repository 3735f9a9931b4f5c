"""From the name a person types to the model file on this machine. Opens no file beyond its first bytes."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from localllm.demo import demo_models
from localllm.errors import ModelError, NotFound

MAGIC = b"GGUF"


def resolve_model(name: str) -> Path:
    """The file that `name` means: a built-in model (`demo`, `demo-large`, `demo-small`) or the path of a GGUF file.

    A built-in name wins over a file of the same name (`./demo` is the file). Raises NotFound or ModelError.
    """
    built_in = demo_models()
    if name in built_in:
        return built_in[name]
    path = Path(name).expanduser()
    if path.is_file():
        _check_magic(path)
        return path.absolute()
    if path.is_dir():
        raise NotFound(f"{name} is a directory, not a model", hint=_choices("give one of its files", [str(p) for p in path.glob("*.gguf")]))
    beside = [str(p) for p in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
    close = get_close_matches(name, [*built_in, *beside], n=3)
    raise NotFound(f"no model named {name!r}", hint=_choices("did you mean", close) if close else "use demo, or the path of a .gguf file")


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error
    if magic != MAGIC:
        raise ModelError(f"{path} is not a GGUF file", hint="give a model in the GGUF format (llama.cpp's)")


def _choices(lead: str, names: list[str]) -> str:
    return f"{lead}: {', '.join(sorted(names)[:8])}" if names else "use demo, or the path of a .gguf file"
