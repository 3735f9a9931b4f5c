"""For the vocabularies that llama.cpp ships: prompts give its own token ids, and users' text gives no control token.

Among them are SentencePiece (a space put before each fragment) and Phi-3 (tokens that swallow white space).
"""

from __future__ import annotations

import ctypes
import random
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from llama_cpp import llama_cpp as api

from localllm.prompt.control import ControlTokens, Mask, Masked
from localllm.prompt.encode import Encoder

pytestmark = pytest.mark.slow

_UNKNOWN, _CONTROL, _LSTRIP, _RSTRIP = 1 << 0, 1 << 3, 1 << 7, 1 << 8
WORDS = ["Hello", " world", "\n", "\n\n", "  ", " ", "\t", "    x", "user", "ünï", "日本", "😀", "123", " 45", ".", "'s"]
WORDS += ["<", "|>", "<s", "</s"]


@dataclass
class Vocabulary:
    handle: int
    control: ControlTokens
    bos: int
    add_bos: bool

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        data = text.encode()
        buffer = (api.llama_token * (len(data) * 2 + 8))()
        n = api.llama_tokenize(self.handle, data, len(data), buffer, len(buffer), add_special, parse_special)
        assert n >= 0
        return buffer[:n]


@pytest.fixture(scope="module", params=["llama-spm", "phi-3", "llama-bpe", "qwen2", "deepseek-llm", "gpt-2", "command-r", "gemma-4"])
def vocabulary(request: pytest.FixtureRequest, llama_cpp_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vocabulary]:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.gguf"
    with tarfile.open(llama_cpp_sdist) as archive:
        name = next(n for n in archive.getnames() if n.endswith(f"/models/ggml-vocab-{request.param}.gguf"))
        path.write_bytes(archive.extractfile(name).read())  # type: ignore[union-attr]
    parameters = api.llama_model_default_params()
    parameters.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), parameters)
    vocab = api.llama_model_get_vocab(model)
    ids: dict[str, int] = {}
    strips: dict[int, list[str]] = {_LSTRIP: [], _RSTRIP: []}
    for token in range(api.llama_vocab_n_tokens(vocab)):
        attributes = api.llama_vocab_get_attr(vocab, token)
        if attributes & (_UNKNOWN | _CONTROL):
            buffer = ctypes.create_string_buffer(256)
            length = api.llama_token_to_piece(vocab, token, buffer, 256, 0, True)
            text = buffer.raw[:length].decode()
            ids[text] = token
            for bit, names in strips.items():
                if attributes & bit:
                    names.append(text)
    control = ControlTokens(ids, lstrip=strips[_LSTRIP], rstrip=strips[_RSTRIP])
    yield Vocabulary(vocab, control, api.llama_vocab_bos(vocab), api.llama_vocab_get_add_bos(vocab))
    api.llama_model_free(model)


def test_trusted_text_gives_llama_cpps_tokens(vocabulary: Vocabulary) -> None:
    encoder = Encoder(vocabulary.control, vocabulary.tokenize, bos=vocabulary.bos, add_bos=vocabulary.add_bos)
    rng = random.Random(7)
    names = [name for name in vocabulary.control.ids if name.strip() and not re.search(r"reserved|unused|extra", name)][:30]
    for _ in range(400):
        text = "".join(rng.choice(names) if rng.random() < 0.3 else rng.choice(WORDS) for _ in range(rng.randrange(12)))
        expected = vocabulary.tokenize(text, add_special=True, parse_special=True)
        if vocabulary.add_bos and expected[1:2] == [vocabulary.bos]:
            expected = expected[1:]  # the text brings its own
        assert encoder.encode(Masked(text)).tokens == expected, repr(text)


def test_users_text_gives_ordinary_tokens(vocabulary: Vocabulary) -> None:
    rng = random.Random(8)
    names = list(vocabulary.control.ids)[:30]
    for _ in range(200):
        text = "".join(rng.choice(names) if rng.random() < 0.4 else rng.choice(WORDS) for _ in range(rng.randrange(12)))
        mask = Mask(vocabulary.control, [text])
        tokens = Encoder(vocabulary.control, vocabulary.tokenize).encode(Masked(mask.text(text), mask.originals)).tokens
        assert tokens == vocabulary.tokenize(text), repr(text)
