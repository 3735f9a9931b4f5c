"""Quantisations: names, grouping of a repository's files, and the choice for a machine. Sizes are those of real repositories."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from localllm.errors import DoesNotFit, NotFound
from localllm.hub import RepoFile
from localllm.quant import (
    BITS,
    RemoteModel,
    bits_per_weight,
    choose_quant,
    find_quant,
    models_in,
    needed_bytes,
    quant_of,
    side_files,
)

GB = 1_000_000_000

LLAMA_8B = {
    **{"IQ2_M": 2.95, "Q2_K": 3.18, "IQ3_XXS": 3.27, "IQ3_XS": 3.52, "Q3_K_S": 3.66, "IQ3_M": 3.78, "Q3_K_M": 4.02, "Q3_K_L": 4.32},
    **{"IQ4_XS": 4.45, "Q4_0": 4.68, "IQ4_NL": 4.68, "Q4_K_S": 4.69, "Q4_K_M": 4.92, "Q4_K_L": 5.31},
    **{"Q5_K_S": 5.60, "Q5_K_M": 5.73, "Q6_K": 6.60, "Q6_K_L": 6.85, "Q8_0": 8.54, "F16": 16.07},
}
LLAMA_70B = {
    "IQ1_M": 16.75,
    "IQ2_XS": 21.14,
    "IQ3_XXS": 27.47,
    "Q3_K_M": 34.27,
    "IQ4_XS": 37.90,
    "Q4_K_M": 42.52,
    "Q6_K": 57.89,
    "Q8_0": 74.98,
}


def repo(sizes_gb: dict[str, float], stem: str = "Llama-3-Instruct-") -> tuple[RemoteModel, ...]:
    return models_in([file(f"{stem}{name}.gguf", int(size * GB)) for name, size in sizes_gb.items()], "user/repo", "0" * 40)


def file(path: str, size_bytes: int = 1, sha256: str | None = None) -> RepoFile:
    return RepoFile(path, size_bytes, sha256)


@pytest.mark.parametrize(
    "name,quant",
    [
        ("Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf", "Q4_K_M"),
        ("mistral-7b-instruct-v0.2.Q5_K_S.gguf", "Q5_K_S"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("UD-IQ1_S/DeepSeek-R1-UD-IQ1_S-00001-of-00004.gguf", "UD-IQ1_S"),
        ("DeepSeek-R1-0528-UD-TQ1_0.gguf", "UD-TQ1_0"),
        ("Q8_0/model-00001-of-00003.gguf", "Q8_0"),
        ("Q8_0/model-F16.gguf", "F16"),
        ("BF16/deep/model.gguf", "BF16"),
        ("Q4_K_M.gguf", "Q4_K_M"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("GLM-4.5-Air-MXFP4_MOE.gguf", "MXFP4"),
        ("Qwen3-8B-NVFP4.gguf", "NVFP4"),
        ("gemma-3-4b-it-q4_0.gguf", "Q4_0"),
        ("Phi-3-mini-4k-instruct-q4.gguf", "Q4"),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "F16"),
        ("model-IQ4_NL.gguf", "IQ4_NL"),
        ("Llama-3.2-3B.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("model_Q8_0.gguf", "Q8_0"),
        ("model-Q4_0_4_8.gguf", "Q4_0_4_8"),
        ("ggml-model-Q4_K.gguf", "Q4_K"),
        ("Mistral-7B-v0.3.f16.q6_k.gguf", "Q6_K"),
        ("bonsai-8b-Q1_0.gguf", "Q1_0"),
        ("model-TQ2_0.gguf", "TQ2_0"),
        ("model-Q4_K_M-imatrix.GGUF", "Q4_K_M"),
        ("mmproj-F16.gguf", "F16"),
        ("demo-large-q8_0.gguf", "Q8_0"),
        # ik_llama.cpp's own formats, which llama.cpp does not load, are not mistaken for its
        ("model-IQ4_KS.gguf", None),
        ("model-IQ5_K.gguf", None),
        ("model-Q4_K_R4.gguf", None),
        ("model-Q8_0_R8.gguf", None),
        ("model-IQ4_K_R4.gguf", None),
        ("Qwen3-4B.gguf", None),
        ("gemma-3n-E4B-it.gguf", None),
        ("BF16x/SQ4_K_M/model.gguf", None),
        ("", None),
    ],
)
def test_quant_of_a_file_name(name: str, quant: str | None) -> None:
    assert quant_of(name) == quant


@pytest.mark.parametrize(
    "form", ["m-{}.gguf", "m.{}.gguf", "m_{}.gguf", "{}.gguf", "{}/m.gguf", "m-{}-00001-of-00002.gguf", "m-{}-it.gguf"]
)
def test_every_known_name_is_found_wherever_it_stands(form: str) -> None:
    for name in BITS:
        for written in (name, name.lower()):
            assert quant_of(form.format(written)) == name
            assert quant_of(form.format(f"UD-{written}")) == f"UD-{name}"


def test_every_type_of_the_pinned_llama_cpp_has_a_name() -> None:
    from gguf import GGMLQuantizationType, LlamaFileType

    kinds = {each.name.removeprefix("MOSTLY_").removeprefix("ALL_") for each in LlamaFileType} - {"GUESSED"}
    assert {kind for kind in kinds if quant_of(f"m-{kind}.gguf") is None} == set()
    # Types that only tensors within a model, or intermediate results, have.
    inner = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
    assert {kind.name for kind in GGMLQuantizationType if quant_of(f"m-{kind.name}.gguf") is None} == inner


def test_bits_per_weight() -> None:
    assert bits_per_weight("UD-Q4_K_M") == bits_per_weight("Q4_K_M") == 4.89
    assert bits_per_weight("nonsense") == 0.0


def test_models_are_listed_best_first() -> None:
    quants = [model.quant for model in repo(LLAMA_70B)]
    assert quants == ["Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "IQ2_XS", "IQ1_M"]


def test_parts_of_a_split_model_belong_together() -> None:
    parts = [file(f"Q8_0/model-{number:05}-of-00003.gguf", number) for number in (3, 1, 2)]
    (model,) = models_in(parts, "user/repo", "c" * 40)
    assert (model.repo, model.commit, model.quant, model.size_bytes, model.missing) == ("user/repo", "c" * 40, "Q8_0", 6, ())
    assert model.name == "Q8_0/model-00001-of-00003.gguf"
    assert [each.size_bytes for each in model.files] == [1, 2, 3]


def test_a_model_without_all_its_parts_says_which_are_missing() -> None:
    (model,) = models_in([file("m-Q4_K_M-00002-of-00004.gguf"), file("m-Q4_K_M-00004-of-00004.gguf")])
    assert model.missing == ("m-Q4_K_M-00001-of-00004.gguf", "m-Q4_K_M-00003-of-00004.gguf")
    with pytest.raises(NotFound, match="m-Q4_K_M-00001-of-00004.gguf, m-Q4_K_M-00003-of-00004.gguf is missing"):
        choose_quant([model], 100 * GB)


def test_a_part_number_beyond_the_count_is_a_file_of_its_own() -> None:
    models = models_in([file("m-Q4_0-00004-of-00003.gguf"), file("m-Q4_0-00000-of-00003.gguf"), file("m-Q4_0-00001-of-00003.gguf")])
    assert sorted(len(model.files) for model in models) == [1, 1, 1]
    assert sorted(len(model.missing) for model in models) == [0, 0, 2]


def test_side_files_are_no_models() -> None:
    files = [
        file("gemma-3-4b-it-Q4_K_M.gguf"),
        file("mmproj-F16.gguf"),
        file("gemma-3-4b-it-mmproj-bf16.gguf"),
        file("imatrix.dat"),
        file("imatrix_unsloth.gguf_file"),
        file("gemma-3-4b-it.imatrix.gguf"),
        file("gemma-3-4b-it-draft-Q8_0.gguf"),
        file("MTP/gemma-3-4b-it-MTP-Q8_0.gguf"),
        file("README.md"),
        file(".gitattributes"),
        file("model.safetensors"),
    ]
    assert [model.name for model in models_in(files)] == ["gemma-3-4b-it-Q4_K_M.gguf"]
    assert [(side.kind, side.file.path) for side in side_files(files)] == [
        ("mmproj", "mmproj-F16.gguf"),
        ("mmproj", "gemma-3-4b-it-mmproj-bf16.gguf"),
        ("imatrix", "imatrix.dat"),
        ("imatrix", "imatrix_unsloth.gguf_file"),
        ("imatrix", "gemma-3-4b-it.imatrix.gguf"),
        ("draft", "gemma-3-4b-it-draft-Q8_0.gguf"),
        ("draft", "MTP/gemma-3-4b-it-MTP-Q8_0.gguf"),
    ]


def test_a_model_made_with_an_importance_matrix_is_a_model() -> None:
    assert [model.quant for model in models_in([file("m-imatrix-Q4_K_M.gguf"), file("m-Q6_K-imatrix.gguf")])] == ["Q6_K", "Q4_K_M"]


def test_a_repository_of_drafts_holds_models() -> None:
    files = [file("DeepSeek-R1-DRAFT-0.6B-64k-Q4_0.gguf"), file("DeepSeek-R1-DRAFT-0.6B-32k-Q4_0.gguf")]
    assert len(models_in(files)) == 2
    assert side_files(files) == ()


WORDS = st.sampled_from(["model", "mmproj", "draft", "imatrix", "Q4_K_M", "q8_0", "UD-Q2_K_XL", "F16", "README", "a b", "ü", ""])
ENDS = st.sampled_from([".gguf", ".GGUF", ".dat", ".md", "-00001-of-00002.gguf", "-00002-of-00002.gguf", "-00009-of-00002.gguf", ""])
PATHS = st.builds(
    lambda words, ends, slash: slash.join(words) + ends, st.lists(WORDS, min_size=1, max_size=3), ENDS, st.sampled_from("/-_.")
)


@given(st.lists(PATHS | st.text(max_size=40), unique=True, max_size=12))
@example(["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "a.gguf", "A.GGUF"])
def test_no_file_is_lost_and_none_is_taken_twice(paths: list[str]) -> None:
    files = [file(path, position) for position, path in enumerate(paths)]
    models = models_in(files)
    taken = [each.path for each in itertools.chain(*(model.files for model in models), (side.file for side in side_files(files)))]
    assert len(taken) == len(set(taken))
    assert {path for path in paths if path.lower().endswith(".gguf")} <= set(taken) <= set(paths)
    for model in models:
        assert len(model.files) + len(model.missing) == model.n_parts
        assert not set(model.missing) & set(paths)
        assert len({quant_of(each.path) for each in model.files}) == 1


@given(
    st.dictionaries(st.sampled_from(sorted(BITS)).map(lambda name: f"m-{name}.gguf"), st.integers(0, 900 * GB), min_size=1),
    st.integers(0, 2000 * GB),
)
def test_a_choice_fits_wherever_anything_does(sizes: dict[str, int], memory_bytes: int) -> None:
    models = models_in([file(path, size) for path, size in sizes.items()])
    loadable = [model for model in models if not model.quant.startswith("Q4_0_")]
    if not loadable:
        with pytest.raises(NotFound):
            choose_quant(models, memory_bytes)
        return
    quantised = [model for model in loadable if model.quant not in {"F32", "F16", "BF16"}] or loadable
    choice = choose_quant(models, memory_bytes)
    assert choice.model in quantised
    assert choice.fits == (choice.needed_bytes <= memory_bytes) == any(needed_bytes(model) <= memory_bytes for model in quantised)
    if choice.fits:
        assert choose_quant(models, memory_bytes, strict=True) == choice
    else:
        with pytest.raises(DoesNotFit):
            choose_quant(models, memory_bytes, strict=True)


@pytest.mark.parametrize(
    "sizes,free_gb,quant",
    [
        (LLAMA_8B, 4.3, "IQ2_M"),
        (LLAMA_8B, 5.0, "IQ3_XS"),
        (LLAMA_8B, 6.0, "IQ4_XS"),
        (LLAMA_8B, 6.5, "Q4_K_M"),
        # a laptop with 16 GB has about 10 free
        (LLAMA_8B, 10.0, "Q4_K_M"),
        (LLAMA_8B, 14.7, "Q5_K_M"),
        (LLAMA_8B, 17.5, "Q6_K_L"),
        (LLAMA_8B, 24.0, "Q8_0"),
        # more memory never buys more than Q8_0
        (LLAMA_8B, 512.0, "Q8_0"),
        (LLAMA_70B, 24.0, "IQ1_M"),
        (LLAMA_70B, 32.0, "IQ3_XXS"),
        (LLAMA_70B, 48.0, "Q4_K_M"),
        (LLAMA_70B, 96.0, "Q4_K_M"),
        (LLAMA_70B, 192.0, "Q8_0"),
        ({"Q8_0": 1.32, "Q4_K_M": 0.81}, 8.0, "Q8_0"),
        ({"MXFP4": 12.1, "F16": 13.8}, 16.0, "MXFP4"),
        ({"Q8_0": 0.64, "BF16": 1.2}, 4.0, "Q8_0"),
        ({"BF16": 1.2, "F32": 2.4}, 4.0, "BF16"),
        ({"Q4_0": 3.2}, 8.0, "Q4_0"),
        ({"UD-Q2_K_XL": 3.4, "UD-Q4_K_XL": 5.1, "UD-Q3_K_XL": 4.3, "UD-Q6_K_XL": 7.4}, 8.0, "UD-Q4_K_XL"),
        ({"UD-Q4_K_XL": 5.1, "Q4_K_M": 4.9}, 8.0, "Q4_K_M"),
        # removed from llama.cpp
        ({"Q4_0_4_4": 4.6, "Q3_K_M": 4.0}, 8.0, "Q3_K_M"),
    ],
)
def test_what_is_chosen(sizes: dict[str, float], free_gb: float, quant: str) -> None:
    choice = choose_quant(repo(sizes), int(free_gb * GB), strict=True)
    assert choice.model.quant == quant
    assert choice.fits


def test_reasons_hold_the_numbers() -> None:
    def reason(free_gb: float, sizes: dict[str, float] = LLAMA_8B) -> str:
        return choose_quant(repo(sizes), int(free_gb * GB)).reason

    assert reason(10) == "the usual balance of size and quality: 4.9 GB and about 1.5 GB to run, of 10.0 GB free"
    assert reason(64) == ("better than Q4_K_M, and small here: 8.5 GB and about 1.9 GB to run, under half of the 64.0 GB free")
    assert reason(6) == ("Q4_K_M takes 4.9 GB and about 1.5 GB to run, of 6.0 GB free; this one 4.5 GB and about 1.4 GB to run")
    assert reason(4.3).endswith("; so few bits cost much quality, a smaller model may answer better")
    assert reason(2) == (
        "nothing fits: this one takes 3.3 GB and about 1.3 GB to run, with 2.0 GB free; it will be slow or fail, a smaller model is better"
    )
    assert reason(8, {"Q4_0": 3.2}).startswith("the nearest to Q4_K_M here: 3.2 GB")


def test_strict_refuses_with_the_numbers() -> None:
    with pytest.raises(
        DoesNotFit, match=r"nothing in user/repo fits: the smallest, IQ2_M, takes 3.0 GB and about 1.3 GB.* with 2.0 GB free"
    ):
        choose_quant(repo(LLAMA_8B), 2 * GB, strict=True)


def test_several_models_in_one_repository_are_never_picked_from_silently() -> None:
    models = models_in([file("Qwen-4B-Q4_K_M.gguf", 3 * GB), file("Qwen-8B-Q8_0.gguf", 9 * GB)], "user/repo")
    with pytest.raises(NotFound, match=r"user/repo holds several models \(name a file: Qwen-8B-Q8_0.gguf \(9.0 GB\), Qwen-4B-Q4_K_M.gguf"):
        choose_quant(models, 64 * GB)
    folders = models_in([file("4B/model-Q4_K_M.gguf"), file("8B/model-Q8_0.gguf")], "user/repo")
    with pytest.raises(NotFound, match="several models"):
        choose_quant(folders, 64 * GB)


def test_files_of_one_model_in_several_styles_are_one_model() -> None:
    names = [
        "DeepSeek-R1-Q8_0/DeepSeek-R1-Q8_0-00001-of-00001.gguf",
        "deepseek-r1.i1-IQ4_XS.gguf",
        "UD-Q2_K_XL/DeepSeek_R1-UD-Q2_K_XL.gguf",
    ]
    assert choose_quant(models_in([file(name, GB) for name in names]), 3 * GB).model.quant == "IQ4_XS"


def test_the_same_bytes_under_two_names_are_one_choice_and_others_are_not() -> None:
    same = [file("m-Q4_K_M.gguf", GB, "a" * 64), file("M.Q4_K_M.gguf", GB, "a" * 64)]
    assert choose_quant(models_in(same), 8 * GB).model.name == "M.Q4_K_M.gguf"
    other = [file("m-Q4_K_M.gguf", GB, "a" * 64), file("m.Q4_K_M.gguf", GB, "b" * 64)]
    with pytest.raises(NotFound, match=r"the repository holds several Q4_K_M files"):
        choose_quant(models_in(other), 8 * GB)


def test_no_models_at_all() -> None:
    with pytest.raises(NotFound, match="holds no complete GGUF model"):
        choose_quant([], 8 * GB)


def test_a_file_without_a_known_quantisation_is_the_last_resort() -> None:
    assert choose_quant(models_in([file("model.gguf", GB)]), 8 * GB).model.name == "model.gguf"
    assert choose_quant(models_in([file("model.gguf", GB), file("model-Q2_K.gguf", GB)]), 8 * GB).model.quant == "Q2_K"


def test_finding_a_named_quantisation() -> None:
    models = repo({"Q4_K_M": 4.9, "UD-Q4_K_XL": 5.1, "F16": 16, "MXFP4_MOE": 4.0})
    for asked, quant in [
        ("q4_k_m", "Q4_K_M"),
        ("Q4_K_XL", "UD-Q4_K_XL"),
        ("ud-q4_k_xl", "UD-Q4_K_XL"),
        ("fp16", "F16"),
        ("mxfp4", "MXFP4"),
    ]:
        assert find_quant(models, asked).quant == quant
    with pytest.raises(NotFound, match=r"there is no Q8_0 in user/repo \(it has F16 \(16.0 GB\), UD-Q4_K_XL \(5.1 GB\), Q4_K_M \(4.9 GB\)"):
        find_quant(models, "Q8_0")
    twice = models_in([file("a-Q8_0.gguf"), file("b-Q8_0.gguf")])
    with pytest.raises(NotFound, match=r"several Q8_0 files \(name one: a-Q8_0.gguf \(0.0 MB\), b-Q8_0.gguf"):
        find_quant(twice, "q8_0")
    with pytest.raises(NotFound, match="it holds no GGUF model"):
        find_quant([], "Q8_0")


def test_a_hundred_thousand_files_take_no_time_to_speak_of() -> None:
    files = [file(f"{number}/m-Q4_K_M-{number % 9 + 1:05}-of-00009.gguf", GB, f"{number:064x}") for number in range(20_000)]
    assert len(models_in(files)) == 20_000
