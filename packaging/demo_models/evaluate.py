"""Exact-match accuracy of a demo model per skill, on fresh conversations, greedy.

    python evaluate.py ../../localllm/demo/demo-large-q8_0.gguf [more.gguf ...] --per-skill 40

Needs: llama-cpp-python. Skills with a single right answer only; the answer is the whole last message.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

import corpus
import llama_cpp

SKILLS = (
    corpus.arithmetic,
    corpus.reasoning,
    corpus.facts,
    corpus.strings,
    corpus.extraction,
    corpus.code,
    corpus.copying,
    corpus.recall,
    corpus.tool_use,
    corpus.self_help,
)


def render(messages: corpus.Messages) -> str:
    body = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return body + "<|im_start|>assistant\n"


def same(got: str, want: str, skill) -> bool:
    """Exact match; for sums only the number counts, since the corpus words the answer in two ways."""
    if skill is corpus.arithmetic:
        return re.findall(r"\d+", got)[-1:] == re.findall(r"\d+", want)[-1:]
    return got.strip() == want.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--per-skill", type=int, default=40)
    parser.add_argument("--seed", type=int, default=999)
    args = parser.parse_args()
    for path in args.models:
        model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=2, verbose=False)
        scores = {}
        for skill in SKILLS:
            r, right = random.Random(args.seed), 0
            for _ in range(args.per_skill):
                messages = skill(r)
                prompt = model.tokenize(render(messages[:-1]).encode(), add_bos=True, special=True)
                out = model.create_completion(prompt, max_tokens=200, temperature=0.0, stop=["<|im_end|>"])
                right += same(out["choices"][0]["text"], messages[-1]["content"], skill)
            scores[skill.__name__] = right / args.per_skill
        mean = sum(scores.values()) / len(scores)
        print(f"{path.name}: mean {mean:.3f}  " + "  ".join(f"{k} {v:.2f}" for k, v in scores.items()), flush=True)


if __name__ == "__main__":
    main()
