"""A demo model blown up: larger, and saying exactly the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.demo import inflate
from localllm.demo.inflate import SHAPES, Shape, inflated_demo
from localllm.errors import ModelError


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape that is larger than demo-small and still quick to write."""
    monkeypatch.setitem(SHAPES, "little", Shape(layers=10, width=512, heads=16, kv_heads=4, head=32, hidden=1024))
    return "little"


def greedy(path: Path) -> list[int]:
    from localllm.bench import bare
    from localllm.bench.case import Case
    from localllm.bench.clock import Moments
    from localllm.llama.context import Context, ContextParams
    from localllm.llama.model import Model
    from localllm.llama.sampling import Sampler
    from localllm.types import Sampling

    model = Model(str(path))
    context = Context(model, ContextParams(n_ctx=256, n_seq=8, n_batch=256))
    questions = ("What is the capital of France?", "What is 2 + 3?", "Tell me a story", "Who are you?")
    prompts = tuple(
        tuple(model.tokenize(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", parse_special=True)) for q in questions
    )
    try:
        samplers = [Sampler(model, Sampling(temperature=0), seed=0) for _ in prompts]
        return bare._prefill(context, Case(prompts, 1), samplers, Moments(0.0))
    finally:
        context.close()
        model.close()


def test_an_inflated_model_says_the_same(demo_small: Path, tmp_path: Path, little: str) -> None:
    target = tmp_path / "large.gguf"
    inflate.inflate(demo_small, target, little)
    assert target.stat().st_size > 3 * demo_small.stat().st_size
    assert greedy(target) == greedy(demo_small)


def test_a_padded_vocabulary_changes_nothing_either(demo_small: Path, tmp_path: Path, little: str) -> None:
    from localllm.llama.model import Model

    target = tmp_path / "large.gguf"
    inflate.inflate(demo_small, target, little, vocab=4096)
    model = Model(str(target))
    assert model.n_vocab == 4096
    assert model.n_layer == 10
    model.close()
    assert greedy(target) == greedy(demo_small)


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_the_file_is_made_once(demo_large: Path, home: Path, little: str, quant: str) -> None:
    said: list[str] = []
    path = inflated_demo(demo_large, little, quant, said.append)
    assert path == home / "cache" / "bench" / f"demo-large-little-{quant}.gguf"
    written = path.stat().st_mtime_ns
    assert inflated_demo(demo_large, little, quant, said.append) == path
    assert path.stat().st_mtime_ns == written
    assert len(said) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert len(greedy(path)) == 4


def test_a_failed_quantisation_is_told(tmp_path: Path, little: str) -> None:
    broken = tmp_path / "broken-q8_0.gguf"
    broken.write_bytes(b"GGUF but no more")
    with pytest.raises(ModelError, match="broken-q8_0.gguf"):
        inflated_demo(broken, little, "q4_k_m", lambda _: None)
