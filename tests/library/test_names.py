from __future__ import annotations

from pathlib import Path

import pytest

from localllm.errors import NotFound
from localllm.library.model import LocalModel, unique_names
from localllm.library.names import matches, one_of

NOWHERE = Path("/nonexistent/models.toml")


def local(name: str, file: str, *, repo: str = "", commit: str = "", revision: str = "", catalog_name: str = "") -> LocalModel:
    folder, _, quant = name.partition(":")
    path = Path("/models") / folder / file
    return LocalModel(
        name, f"{folder}/{file}", path, (path,), 1, "pulled", quant, repo=repo, commit=commit, revision=revision, catalog_name=catalog_name
    )


MODELS = unique_names(
    [
        local(
            "bart/Llama-3-8B-GGUF:Q4_K_M", "Llama-3-8B-Q4_K_M.gguf", repo="bart/Llama-3-8B-GGUF", commit="ab" * 20, catalog_name="llama3:8b"
        ),
        local("bart/Llama-3-8B-GGUF:Q8_0", "Llama-3-8B-Q8_0.gguf", repo="bart/Llama-3-8B-GGUF", commit="cd" * 20, revision="main"),
        local("unsloth/Llama-3-8B-GGUF:Q8_0", "Llama-3-8B-UD.gguf"),
        local("bart/Tiny-GGUF:Q8_0", "tiny.gguf", catalog_name="tiny"),
        local("ollama/phi4:14b", "sha256-1"),
        local("u/twins:Q8_0", "one-Q8_0.gguf"),
        local("u/twins:Q8_0", "two-Q8_0.gguf"),
    ]
)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("bart/Llama-3-8B-GGUF:Q8_0", "bart/Llama-3-8B-GGUF:Q8_0"),
        ("bart/llama-3-8b-gguf:q8_0", "bart/Llama-3-8B-GGUF:Q8_0"),
        ("bart/Llama-3-8B-GGUF@q4_k_m", "bart/Llama-3-8B-GGUF:Q4_K_M"),
        ("hf.co/bart/Llama-3-8B-GGUF:Q4_K_M", "bart/Llama-3-8B-GGUF:Q4_K_M"),
        ("hf://bart/Llama-3-8B-GGUF/Llama-3-8B-Q8_0.gguf", "bart/Llama-3-8B-GGUF:Q8_0"),
        ("bart/Llama-3-8B-GGUF@main", "bart/Llama-3-8B-GGUF:Q8_0"),
        (f"bart/Llama-3-8B-GGUF@{'ab' * 20}", "bart/Llama-3-8B-GGUF:Q4_K_M"),
        ("bart/Llama-3-8B-GGUF@CDCDCDC", "bart/Llama-3-8B-GGUF:Q8_0"),
        ("unsloth/Llama-3-8B-GGUF", "unsloth/Llama-3-8B-GGUF:Q8_0"),
        ("bart/Llama-3-8B-GGUF/Llama-3-8B-Q8_0.gguf", "bart/Llama-3-8B-GGUF:Q8_0"),
        ("/models/bart/Tiny-GGUF/tiny.gguf", "bart/Tiny-GGUF:Q8_0"),
        ("llama3:8b", "bart/Llama-3-8B-GGUF:Q4_K_M"),
        ("llama3", "bart/Llama-3-8B-GGUF:Q4_K_M"),
        ("Llama-3-8B-GGUF:Q4_K_M", "bart/Llama-3-8B-GGUF:Q4_K_M"),
        ("llama-3-8b:q4_k_m", "bart/Llama-3-8B-GGUF:Q4_K_M"),
        ("Llama-3-8B-UD", "unsloth/Llama-3-8B-GGUF:Q8_0"),
        ("tiny", "bart/Tiny-GGUF:Q8_0"),
        ("tiny-gguf", "bart/Tiny-GGUF:Q8_0"),
        ("phi4", "ollama/phi4:14b"),
        ("phi4:14b", "ollama/phi4:14b"),
        ("u/twins/one-Q8_0.gguf", "u/twins/one-Q8_0.gguf"),
        ("one-q8_0", "u/twins/one-Q8_0.gguf"),
    ],
)
def test_names_that_mean_one_model(text: str, expected: str) -> None:
    assert one_of(MODELS, text, NOWHERE).name == expected


@pytest.mark.parametrize(
    "text, candidates",
    [
        ("bart/Llama-3-8B-GGUF", ["bart/Llama-3-8B-GGUF:Q4_K_M", "bart/Llama-3-8B-GGUF:Q8_0"]),
        ("Llama-3-8B:Q8_0", ["bart/Llama-3-8B-GGUF:Q8_0", "unsloth/Llama-3-8B-GGUF:Q8_0"]),
        ("u/twins:Q8_0", ["u/twins/one-Q8_0.gguf", "u/twins/two-Q8_0.gguf"]),
    ],
)
def test_an_ambiguous_name_lists_the_candidates(text: str, candidates: list[str]) -> None:
    with pytest.raises(NotFound, match="is ambiguous") as caught:
        one_of(MODELS, text, NOWHERE)
    assert caught.value.hint == f"choose one: {', '.join(candidates)}"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "text, hint",
    [
        ("bart/Llama-3-8B-GGUF:Q2_K", "localllm pull bart/Llama-3-8B-GGUF:Q2_K"),
        ("bart/Llama-3-8B-GGUF@other", "localllm pull bart/Llama-3-8B-GGUF@other"),
        ("bart/Llama-3-8B-GGUF@ab", "localllm pull bart/Llama-3-8B-GGUF@ab"),
        ("llama3.3:70b", "localllm pull llama3.3:70b"),
        ("phi5:14b", "did you mean: ollama/phi4:14b"),
        ("???", "use demo"),
        ("", "use demo"),
    ],
)
def test_a_name_that_means_nothing_here_gets_the_next_step(text: str, hint: str) -> None:
    assert not matches(MODELS, text)
    with pytest.raises(NotFound) as caught:
        one_of(MODELS, text, NOWHERE)
    assert hint in caught.value.hint


@pytest.mark.parametrize("text, near", [("lama3.3", "llama3.3"), ("lama3.3:70b", "llama3.3:70b")])
def test_a_mistyped_name_of_the_catalogue_is_recognised(text: str, near: str) -> None:
    with pytest.raises(NotFound) as caught:
        one_of(MODELS, text, NOWHERE)
    assert near in caught.value.hint.removeprefix("did you mean: ").split(", ")


def test_names_that_differ_in_capitals_alone_can_be_told_apart() -> None:
    models = unique_names([local("u/r:Q4_0", "M-Q4_0.gguf"), local("u/r:Q4_0", "m-q4_0.gguf")])
    for name in ("u/r/M-Q4_0.gguf", "u/r/m-q4_0.gguf"):
        assert one_of(models, name, NOWHERE).name == name
    with pytest.raises(NotFound, match="ambiguous"):
        one_of(models, "u/r/M-q4_0.gguf", NOWHERE)


def test_many_candidates_are_cut() -> None:
    many = unique_names([local(f"u/r:Q{n}", f"m{n}.gguf") for n in range(12)])
    with pytest.raises(NotFound, match="it means 12 models") as caught:
        one_of(many, "u/r", NOWHERE)
    assert caught.value.hint.endswith("and 4 more")
