from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import UsageError
from localllm.quant import BITS
from localllm.reference import HubReference, NameReference, PathReference, Reference, as_quant, check_repo, parse, safe_parts

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("demo", NameReference("demo")),
        ("llama3.3:70b", NameReference("llama3.3", "70b")),
        ("qwen2.5-coder:7b-instruct-q4_K_M", NameReference("qwen2.5-coder", "7b-instruct-q4_K_M")),
        (" demo\n", NameReference("demo")),
        ("user/repo", HubReference("user/repo")),
        ("user/repo:Q4_K_M", HubReference("user/repo", "Q4_K_M")),
        ("user/repo:q4_k_m", HubReference("user/repo", "Q4_K_M")),
        ("user/repo:ud-q4_k_xl", HubReference("user/repo", "UD-Q4_K_XL")),
        ("user/repo:fp16", HubReference("user/repo", "F16")),
        ("user/repo:latest", HubReference("user/repo")),
        ("user/repo:new-kind", HubReference("user/repo", "NEW-KIND")),
        ("user/repo:model-q8_0.gguf", HubReference("user/repo", file="model-q8_0.gguf")),
        ("hf.co/user/repo:Q4_K_M", HubReference("user/repo", "Q4_K_M")),
        ("HF.co/user/repo", HubReference("user/repo")),
        ("huggingface.co/user/repo@q8_0", HubReference("user/repo", "Q8_0")),
        ("hf.co/user/repo/", HubReference("user/repo")),
        ("hf.co/user/repo/file.gguf", HubReference("user/repo", file="file.gguf")),
        ("user/repo@q4_k_m", HubReference("user/repo", "Q4_K_M")),
        ("user/repo@IQ4_XS", HubReference("user/repo", "IQ4_XS")),
        ("user/repo@main", HubReference("user/repo", revision="main")),
        (f"user/repo@{COMMIT}", HubReference("user/repo", revision=COMMIT)),
        ("user/repo@fix-Q8_0", HubReference("user/repo", revision="fix-Q8_0")),
        ("user/repo@refs/pr/3", HubReference("user/repo", revision="refs/pr/3")),
        ("user/repo@main:Q8_0", HubReference("user/repo", "Q8_0", revision="main")),
        ("user/repo:Q8_0@main", HubReference("user/repo", "Q8_0", revision="main")),
        ("user/repo@q8_0@main", HubReference("user/repo", "Q8_0", revision="main")),
        ("hf://user/repo", HubReference("user/repo")),
        ("hf://user/repo/file.gguf", HubReference("user/repo", file="file.gguf")),
        ("hf://user/repo/Q8_0/m-00001-of-00002.gguf", HubReference("user/repo", file="Q8_0/m-00001-of-00002.gguf")),
        ("hf://user/repo@main/file.gguf", HubReference("user/repo", file="file.gguf", revision="main")),
        ("hf://user/repo@refs%2Fpr%2F3/file.gguf", HubReference("user/repo", file="file.gguf", revision="refs/pr/3")),
        ("https://hf.co/user/repo", HubReference("user/repo")),
        ("https://huggingface.co/user/repo/", HubReference("user/repo")),
        ("https://huggingface.co/user/repo?local-app=ollama#files", HubReference("user/repo")),
        ("https://huggingface.co/user/repo/resolve/main/a.gguf?download=true", HubReference("user/repo", file="a.gguf", revision="main")),
        ("https://huggingface.co/user/repo/blob/main/Q8_0/a%20b.gguf", HubReference("user/repo", file="Q8_0/a b.gguf", revision="main")),
        ("https://huggingface.co/user/repo/tree/refs%2Fpr%2F3", HubReference("user/repo", revision="refs/pr/3")),
        ("https://huggingface.co/user/repo/tree/main/Q8_0", HubReference("user/repo", revision="main")),
        ("model.gguf", PathReference(Path("model.gguf"))),
        ("models/a/model.GGUF", PathReference(Path("models/a/model.GGUF"))),
        ("./demo", PathReference(Path("demo"))),
        ("../demo", PathReference(Path("../demo"))),
        ("/models/odd\u202ename", PathReference(Path("/models/odd\u202ename"))),
        ("C:\\models\\m", PathReference(Path("C:\\models\\m"))),
        ("C:/models/m", PathReference(Path("C:/models/m"))),
        ("file:///models/my%20model.gguf", PathReference(Path("/models/my model.gguf"))),
        ("file://localhost/m.gguf", PathReference(Path("/m.gguf"))),
        ("file:///C:/m.gguf", PathReference(Path("C:/m.gguf"))),
    ],
)
def test_forms(text: str, expected: Reference) -> None:
    assert parse(text) == expected


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert parse("~/m.gguf") == PathReference(tmp_path / "m.gguf")
    assert parse("~no-such-user/m.gguf") == PathReference(Path("~no-such-user/m.gguf"))


@pytest.mark.parametrize(
    "text, named",
    [
        ("", "no model reference"),
        ("  ", "no model reference"),
        ("a\x1b[31mb", "no model reference"),
        ("a\u202eb", "no model reference"),
        ("llama 3", "no model name"),
        ("llama:", "no model name"),
        ("llama@q8_0", "no model name"),
        (":70b", "no model name"),
        ("a:b:c", "no model name"),
        ("user/", "no model reference"),
        ("user//repo", "no model reference"),
        ("user/repo:", "is empty"),
        ("user/repo@", "is no revision"),
        ("user/repo:Q8_0:Q4_0", "said already"),
        ("user/repo@main@next", "said already"),
        ("user/repo@a..b", "is no revision"),
        ("user/repo:Q 8", "is no quantisation"),
        ("user/repo/file.bin", "is not a .gguf file"),
        ("a/b/c", "is not a .gguf file"),
        ("us er/repo", "is no repository"),
        ("user/..", "is no repository"),
        ("user/re--po", "is no repository"),
        ("user/repo.git", "is no repository"),
        ("-user/repo", "is no repository"),
        ("üser/repo", "is no repository"),
        (f"user/{'x' * 97}", "is no repository"),
        ("con/repo", "Windows reserves it"),
        ("hf://user/repo/../../x.gguf", "begins with a dot"),
        ("hf://user/repo//x.gguf", "is empty"),
        ("hf://user/repo/.hidden/x.gguf", "begins with a dot"),
        ("hf://user/repo/nul.gguf", "Windows reserves it"),
        ("hf://user/repo/a\\b.gguf", "it holds"),
        ("hf.co/user/repo/c:x.gguf", "it holds :"),
        ("https://hf.co/user/repo/resolve/main/%2e%2e/%2e%2e/x.gguf", "begins with a dot"),
        ("https://hf.co/user%2F..%2F../repo", "is no repository"),
        ("https://hf.co/user", "names no repository"),
        ("https://hf.co/user/repo/discussions/1", "is no page"),
        ("https://hf.co/user/repo/resolve", "is no page"),
        ("https://hf.co.evil.example/user/repo", "is not on the Hugging Face Hub"),
        ("https://hf.co@evil.example/user/repo", "is not on the Hugging Face Hub"),
        ("https://[", "is no address"),
        ("ftp://hf.co/user/repo", "ftp:// is not supported"),
        ("file://elsewhere/m.gguf", "names no file"),
    ],
)
def test_what_is_refused_and_why(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert named in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "text, quant", [("q4_k_m", "Q4_K_M"), ("UD-IQ2_M", "UD-IQ2_M"), ("fp16", "F16"), ("main", ""), ("v1-Q8_0", ""), ("", "")]
)
def test_what_is_a_quantisation(text: str, quant: str) -> None:
    assert as_quant(text) == quant


WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_]{0,10}", fullmatch=True)
REPOS = st.builds("u{}/r.{}".format, WORDS, WORDS)
REVISIONS = st.one_of(st.just(""), WORDS.map("b-{}".format), st.just("refs/pr/1"))


@given(
    st.one_of(
        st.builds(HubReference, REPOS, st.sampled_from(["", "UD-Q2_K_XL", *BITS]), st.just(""), REVISIONS),
        st.builds(HubReference, REPOS, st.just(""), WORDS.map("a/{}.gguf".format), REVISIONS),
        st.builds(NameReference, WORDS, st.one_of(st.just(""), WORDS)),
    )
)
def test_a_reference_reads_back_what_it_prints(reference: HubReference | NameReference) -> None:
    assert parse(str(reference)) == reference


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_a_usage_error(text: str) -> None:
    try:
        reference = parse(text)
    except UsageError:
        return
    if isinstance(reference, HubReference):
        assert check_repo(reference.repo) == reference.repo
        assert not reference.file or safe_parts(reference.repo, reference.file)


PIECES = ["..", ".", "", "a", "b.gguf", "C:", "nul", "aux.gguf", "\\", "\0", "x\n", "…", "é", " ", "a.", ":", "~", "-rf", "％2e", "~root"]
NAMES = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=6).map("/".join))


@given(NAMES, NAMES)
def test_no_name_leaves_the_folder(repo: str, filename: str) -> None:
    try:
        parts = safe_parts(repo, filename)
    except UsageError:
        return
    root = Path("/models")
    target = root.joinpath(*parts)
    assert Path(os.path.normpath(target)) == target
    assert target.is_relative_to(root)
    assert target != root
    windows = PureWindowsPath("D:\\models")
    assert windows.joinpath(*parts).is_relative_to(windows)
    assert len(windows.joinpath(*parts).parts) == len(parts) + 2
    assert not any(PureWindowsPath(part).is_reserved() for part in parts)
    assert PurePosixPath(*parts).parts == parts


@pytest.mark.parametrize(
    "filename",
    [
        "../x",
        "/etc/x",
        "a/../../x",
        "a\\..\\x",
        "C:x",
        "x.gguf.",
        "x ",
        " x",
        "a\0b",
        "a\x1bb",
        "a\u202eb",
        "LPT1.txt",
        "a//b",
        "x" * 201,
        "é" * 101,
    ]
    + ["/".join("abcdefghi"), "\ud800", "x.gguf:stream", "com\u00b9.gguf"],
)
def test_hostile_file_names_are_refused(filename: str) -> None:
    with pytest.raises(UsageError, match="cannot be a file name|too deep"):
        safe_parts("user/repo", filename)


def test_good_file_names_pass() -> None:
    assert safe_parts("user/repo", "Q8_0/My model (1)-ü.gguf") == ("user", "repo", "Q8_0", "My model (1)-ü.gguf")
    assert safe_parts("user/repo", "console.gguf")[-1] == "console.gguf"
