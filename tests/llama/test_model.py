"""Loading and the vocabulary: unusable files, progress, silence on the terminal, text to tokens and back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.errors import InvalidRequest, ModelError, UsageError
from localllm.llama.model import LoadAborted, Model
from tests.tiny_models import END, LONG, N_CTX_TRAIN, TURN, TURN_END, plain


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("models") / "plain.gguf")


@pytest.fixture(scope="module")
def tiny_model(tiny: Path) -> Iterator[Model]:
    model = Model(str(tiny), n_gpu_layers=0)
    yield model
    model.close()


@pytest.fixture(scope="module")
def demo(request: pytest.FixtureRequest) -> Iterator[Model]:
    from localllm.demo import demo_models

    model = Model(str(demo_models()["demo-large"]), n_gpu_layers=0)
    yield model
    model.close()


# files


def test_a_missing_file_is_a_model_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file at .*gone.gguf"):
        Model(str(tmp_path / "gone.gguf"))
    with pytest.raises(ModelError, match="no file at"):
        Model(str(tmp_path))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GG",
        b"GGUF",
        b"not a model at all, just words" * 50,
        b"GGUF" + b"\xff" * 500,
        b"GGUF\x03\0\0\0" + b"\xff" * 16,
        b"GGUF\x63\0\0\0" + b"\0" * 16,
        b"GGUF\x03\0\0\0" + b"\0" * 16,
        b"FUGG" + b"\0" * 500,
        b"\0" * 4096,
    ],
)
def test_a_file_that_is_no_model_is_a_model_error_and_the_terminal_stays_clean(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], data: bytes
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="bad.gguf (cannot be loaded:|is) .*[a-z]") as caught:
        Model(str(path))
    assert "no reason" not in caught.value.message
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kept", [0.0001, 0.002, 0.01, 0.02, 0.03, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_a_model_error(tmp_path: Path, tiny: Path, capfd: pytest.CaptureFixture[str], kept: float) -> None:
    data = tiny.read_bytes()
    path = tmp_path / "half.gguf"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ModelError, match="half.gguf is incomplete"):
        Model(str(path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "old, new, reason",
    [
        (b"blk.2.ffn_up.weight", b"blk.2.ffn_xx.weight", "ffn_up"),
        (b"llama.block_count", b"llama.block_XXXXX", "block_count"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lamas", "lamas"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.XXXXXX", "tokens|vocab"),
        (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0gptX", "gptX|tokenizer"),
    ],
)
def test_a_malformed_file_is_a_model_error_that_says_what_is_wrong(
    tmp_path: Path, tiny: Path, capfd: pytest.CaptureFixture[str], old: bytes, new: bytes, reason: str
) -> None:
    data = tiny.read_bytes()
    assert data.count(old) == 1
    path = tmp_path / "odd.gguf"
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ModelError, match=f"odd.gguf cannot be loaded: .*({reason})"):
        Model(str(path))
    assert capfd.readouterr() == ("", "")


def test_a_good_file_loads_after_a_bad_one(tmp_path: Path, tiny: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    with pytest.raises(ModelError):
        Model(str(bad))
    Model(str(tiny), n_gpu_layers=0).close()


# progress and the log


def test_progress_rises_to_one(tiny: Path) -> None:
    seen: list[float] = []
    Model(str(tiny), n_gpu_layers=0, progress=lambda fraction: seen.append(fraction) is None).close()
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[0] >= 0.0
    assert seen[-1] == 1.0


@pytest.mark.parametrize("after", [0.0, 0.5])
def test_progress_can_stop_the_load(tiny: Path, capfd: pytest.CaptureFixture[str], after: float) -> None:
    seen: list[float] = []

    def progress(fraction: float) -> bool:
        seen.append(fraction)
        return fraction < after

    with pytest.raises(LoadAborted, match="plain.gguf was stopped"):
        Model(str(tiny), n_gpu_layers=0, progress=progress)
    assert seen[-1] >= after
    assert len([f for f in seen if f >= after]) == 1
    assert capfd.readouterr() == ("", "")


def test_an_error_in_progress_is_raised(tiny: Path) -> None:
    def progress(fraction: float) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model(str(tiny), n_gpu_layers=0, progress=progress)


def test_the_log_goes_to_logging_and_never_to_the_terminal(
    tiny: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="localllm.llama"):
        Model(str(tiny), n_gpu_layers=0).close()
    assert capfd.readouterr() == ("", "")
    lines = [record.getMessage() for record in caplog.records if record.name == "localllm.llama"]
    assert any("general.architecture" in line for line in lines)
    assert all(line == line.rstrip() and line.strip(".") for line in lines)


# facts


def test_what_the_file_says(tiny_model: Model) -> None:
    assert tiny_model.n_vocab == 256 + 7 + 4
    assert (tiny_model.n_ctx_train, tiny_model.n_embd, tiny_model.n_layer) == (N_CTX_TRAIN, 48, 4)
    assert tiny_model.metadata["general.architecture"] == "llama"
    assert tiny_model.metadata["llama.block_count"] == "4"
    assert tiny_model.description.startswith("llama")
    assert tiny_model.chat_template == ""
    assert tiny_model.size_bytes == 4 * tiny_model.n_params


def test_a_long_metadata_value_comes_whole(demo: Model) -> None:
    assert len(demo.chat_template) > 256
    assert demo.metadata["tokenizer.chat_template"] == demo.chat_template


def test_closing_twice_is_harmless(tiny: Path) -> None:
    model = Model(str(tiny), n_gpu_layers=0)
    model.close()
    model.close()


# text


def test_control_tokens_come_from_the_template_only(tiny_model: Model) -> None:
    for name in (END, TURN, TURN_END):
        token = tiny_model.control_tokens[name]
        assert tiny_model.tokenize(name, parse_special=True) == [token]
        plain_text = tiny_model.tokenize(name)
        assert token not in plain_text
        assert b"".join(map(tiny_model.piece, plain_text)) == name.encode()
        assert tiny_model.piece(token) == name.encode()
    assert set(tiny_model.control_tokens) == {END, TURN, TURN_END}
    assert tiny_model.end_tokens == {tiny_model.control_tokens[END], tiny_model.control_tokens[TURN_END]}


def test_the_demos_control_tokens_are_control(demo: Model) -> None:
    for name in ("<|im_start|>", "<|im_end|>"):
        assert demo.tokenize(name, parse_special=True) == [demo.control_tokens[name]]
        assert demo.control_tokens[name] not in demo.tokenize(f"a {name} b")
    assert demo.control_tokens["<|im_end|>"] in demo.end_tokens


@pytest.mark.parametrize("text", ["", " ", "hello the world", "é ü 漢字 🙂", "a\0b", "\r\n\t", "x" * 5000, "<|im_start|>user"])
def test_text_comes_back_from_its_tokens(tiny_model: Model, text: str) -> None:
    assert b"".join(map(tiny_model.piece, tiny_model.tokenize(text))) == text.encode()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_can_be_tokenised(tiny_model: Model, data: bytes) -> None:
    tokens = tiny_model.tokenize(data)
    assert b"".join(map(tiny_model.piece, tokens)) == data.decode("utf-8", "replace").encode()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=40))
def test_any_string_can_be_tokenised(demo: Model, text: str) -> None:
    assert b"".join(map(demo.piece, demo.tokenize(text))) == text.encode("utf-8", "replace")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ude00\ud83d"])
def test_a_lone_surrogate_is_replaced(demo: Model, tiny_model: Model, text: str) -> None:
    for model in (demo, tiny_model):
        said = b"".join(map(model.piece, model.tokenize(text))).decode()
        assert len(said) == len(text)
        assert "\ud800" not in said


def test_merges_are_applied(tiny_model: Model) -> None:
    assert [tiny_model.piece(t) for t in tiny_model.tokenize("hello the")] == [b"hello", b" the"]


@pytest.mark.parametrize("token", [-1, 267, 1 << 31])
def test_a_token_outside_the_vocabulary_has_no_piece(tiny_model: Model, token: int) -> None:
    with pytest.raises(InvalidRequest, match=f"token id {token} is outside"):
        tiny_model.piece(token)


def test_a_long_piece_comes_whole(tiny_model: Model) -> None:
    (token,) = tiny_model.tokenize(LONG)
    assert tiny_model.piece(token) == LONG.encode()
    assert len(LONG) > 100


def test_every_token_has_a_piece(demo: Model, tiny_model: Model) -> None:
    for model in (demo, tiny_model):
        assert all(model.piece(token) for token in range(model.n_vocab) if token not in model.end_tokens)


def test_placements_that_llama_cpp_cannot_take(demo_small: Path) -> None:
    with pytest.raises(UsageError, match="17 devices"):
        Model(str(demo_small), tensor_split=(1.0,) * 17)
    with pytest.raises(UsageError, match="no buffer 'CUDA9'"):
        Model(str(demo_small), overrides=(("output", "CUDA9"),))


def test_overrides_are_kept_for_llama_cpp(demo_small: Path) -> None:
    model = Model(str(demo_small), tensor_split=(1.0,), overrides=((r"blk\..*", "CPU"), ("output", "CPU")))
    assert model.n_vocab == 2048
    model.close()


def test_no_alloc_reads_no_weights(demo_small: Path) -> None:
    model = Model(str(demo_small), load_mode="mmap", no_alloc=True)
    assert model.no_alloc
    assert model.maps_files
    assert model.size_bytes > 0
    assert sum(each.n_bytes for each in model.buffers) == 0
    model.close()
