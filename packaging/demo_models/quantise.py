"""Quantise a GGUF with llama.cpp.

    python quantise.py demo-large-f16.gguf ../../localllm/demo/demo-large-q8_0.gguf --type q8_0

Needs: llama-cpp-python. The same F16 file gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import llama_cpp

TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--type", choices=TYPES, default="q8_0")
    args = parser.parse_args()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[args.type]
    if code := llama_cpp.llama_model_quantize(str(args.source).encode(), str(args.target).encode(), params):
        parser.exit(1, f"llama.cpp could not quantise {args.source} (code {code})\n")


if __name__ == "__main__":
    main()
