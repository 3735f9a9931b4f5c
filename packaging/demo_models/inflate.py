"""Blow a demo model up to the shape, file size and cost of a real one, without changing what it says.

    python inflate.py build/demo-large-q4_k_m.gguf bench-8b.gguf --shape 8b

`localllm bench --shape 1b --quant q4_k_m` does it by itself for the built-in models. How it works is
in localllm/demo/inflate.py. Needs localllm installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from localllm.demo.inflate import SHAPES, inflate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--vocab", type=int, default=0, help="pad the vocabulary to this many tokens with unused ones (Llama 3: 128256)")
    args = parser.parse_args()
    inflate(args.source, args.target, args.shape, vocab=args.vocab)
    print(f"{args.target}: {args.target.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
