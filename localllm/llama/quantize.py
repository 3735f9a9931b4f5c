"""Changing a model file's quantisation with llama.cpp.

    python -m localllm.llama.quantize SOURCE TARGET q4_k_m

Run it in a process of its own: it takes all cores, cannot be stopped half-way and aborts when memory is short.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path

from llama_cpp import llama_cpp as api

from localllm.errors import ModelError
from localllm.gguf import read_model
from localllm.llama import lib

TYPES = {"f16": api.LLAMA_FTYPE_MOSTLY_F16, "q8_0": api.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": api.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write `source` as `target` in the type `kind`; a quantised source loses a little more. Raises ModelError."""
    source = read_model(source).files[0]
    params = api.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    params.allow_requantize = True
    lib.take_errors()
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.pointer(params)):
        reason = lib.take_errors() or "llama.cpp gave no reason"
        raise ModelError(f"{source.name} cannot be quantised to {kind}: {reason}", hint="check the file and the free disk space")


def main() -> None:
    parser = argparse.ArgumentParser(description="Change a model file's quantisation.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("kind", choices=TYPES)
    args = parser.parse_args()
    try:
        quantize(args.source, args.target, args.kind)
    except ModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
