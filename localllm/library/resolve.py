"""From the name a person types to the model file on this machine. Never touches the network."""

from __future__ import annotations

import os
from pathlib import Path

from localllm.demo import demo_models
from localllm.errors import ModelError
from localllm.library.library import Library


def resolve_model(name: str) -> Path:
    """The file that `name` means; its header is sound.

    Looked up in this order: a built-in model, an alias, a path, the library, a name of the catalogue whose file is here. So
    `./demo` is a file, and `demo` never. Raises NotFound, saying how to fetch what the catalogue knows, or ModelError.
    """
    built_in = demo_models()
    library = Library()
    if name not in built_in:
        name = library.expand(name)
    if name in built_in:
        return built_in[name]
    # Unlike those of Path, these raise nothing, whatever the name.
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        from localllm.gguf import read_model

        # Of a split model the first part, whichever was given: it is the one that llama.cpp loads.
        return read_model(path.absolute()).files[0]
    model = library.find(name)
    if model.problem:
        raise ModelError(f"{model.name} cannot be used: {model.problem}", hint=f"remove it with: localllm rm {model.name}")
    return model.path
