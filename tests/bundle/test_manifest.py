"""A manifest is written by whoever had the stick: nothing in it is believed."""

from __future__ import annotations

import ast
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.bundle import manifest as form
from localllm.bundle.manifest import BundledModel, Manifest, ModelFile, Piece, Platform, Refused, parse, unsafe
from localllm.bundle.stick import TRAVELLERS
from localllm.errors import UsageError
from localllm.reference import safe_parts

SHA = "ab" * 32
WHEEL = {"file": "wheels/a-1-py3-none-any.whl", "size_bytes": 1, "sha256": SHA}
PLATFORM = Platform("linux", "x86_64", "glibc", "2.36", "3.11", ("avx2",))


def sound() -> Manifest:
    chunks = (Piece("weights/m.000", 10, SHA), Piece("weights/m.001", 5, SHA))
    model = BundledModel("p/r:Q", "p/r", "0" * 40, "mit", (ModelFile("p/r/m.gguf", 15, SHA, chunks),))
    wheels = (Piece("wheels/a-1-py3-none-any.whl", 1, SHA),)
    return Manifest("localllm 1", "now", PLATFORM, (model,), wheels, (Piece("licences/models.txt", 0, SHA),))


def broken(change: Callable[[dict[str, Any]], object]) -> bytes:
    raw = json.loads(sound().to_bytes())
    change(raw)
    return json.dumps(raw).encode()


def file(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["models"][0]["files"][0]


def test_round_trip() -> None:
    assert parse(sound().to_bytes()) == sound()
    assert sound().size_bytes == 16


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda raw: raw.update(schema=2), "schema 2"),
        (lambda raw: raw.pop("models"), "models is missing"),
        (lambda raw: raw.update(models={}), "not a list"),
        (lambda raw: file(raw).update(path="p/r/../../../x.gguf"), "leaves its folder"),
        (lambda raw: file(raw).update(path="/p/r/x.gguf"), "leaves its folder"),
        (lambda raw: file(raw).update(path="p\\r\\x.gguf"), "takes amiss"),
        (lambda raw: file(raw).update(path="C:/r/x.gguf"), "takes amiss"),
        (lambda raw: file(raw).update(path="p/r/.bashrc.gguf"), "begins or ends with a dot"),
        (lambda raw: file(raw).update(path="p/r/nul.gguf"), "device on Windows"),
        (lambda raw: file(raw).update(path="p/r/x.sh"), "not publisher/repo/file.gguf"),
        (lambda raw: file(raw).update(path="x.gguf"), "not publisher/repo/file.gguf"),
        (lambda raw: file(raw).update(path="p/r/" + "x" * 200 + ".gguf"), "longer than 200 bytes"),
        (lambda raw: file(raw).update(path="p/" * 8 + "x.gguf"), "too deep"),
        (lambda raw: file(raw)["chunks"][1].update(file="weights/" + "x" * 100 + "/" + "x" * 150), "too long"),
        (lambda raw: file(raw).update(path="p/r/\x1b[2J.gguf"), "not a short text"),
        (lambda raw: file(raw).update(path="p/r/\u202efugg.gguf"), "not a short text"),
        (lambda raw: raw["models"].append(raw["models"][0]), "listed twice"),
        (lambda raw: file(raw)["chunks"][1].update(file="weights/M.000"), "listed twice"),
        (lambda raw: file(raw)["chunks"][1].update(file="weights/m.000/x"), "both a file and a folder"),
        (lambda raw: file(raw)["chunks"][1].update(file="../m.001"), "leaves its folder"),
        (lambda raw: file(raw)["chunks"][1].update(file="licences/m.001"), "outside weights"),
        (lambda raw: file(raw)["chunks"][1].update(size_bytes=6), "its chunks have others"),
        (lambda raw: file(raw)["chunks"][1].update(size_bytes=1 << 32), "larger than FAT32"),
        (lambda raw: file(raw)["chunks"][1].update(size_bytes=-5), "no size"),
        (lambda raw: file(raw)["chunks"][1].update(size_bytes=True), "no size"),
        (lambda raw: file(raw)["chunks"][1].update(size_bytes=5.0), "no size"),
        (lambda raw: file(raw)["chunks"][1].update(sha256="AB" * 32), "64 hex digits"),
        (lambda raw: file(raw).update(size_bytes=1 << 60), "no size"),
        (lambda raw: file(raw).update(chunks=[], size_bytes=0), "not what its chunks make"),
        (lambda raw: raw["models"][0].update(files=[]), "has no files"),
        (lambda raw: raw["wheels"][0].update(file="wheels/x.exe"), "not a wheel"),
        (lambda raw: raw["wheels"][0].update(file="elsewhere/x.whl"), "not a wheel"),
        (lambda raw: raw.update(platform=None), "not for which platform"),
        (lambda raw: raw["others"][0].update(file="wheels/evil.txt"), "no place"),
        (lambda raw: raw["others"][0].update(file="Manifest.json"), "no place"),
        (lambda raw: raw["others"].extend({**WHEEL, "file": f"licences/{n}"} for n in range(form.MAX_FILES)), "more than 10,000"),
    ],
)
def test_refused(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    with pytest.raises(Refused, match=reason) as caught:
        parse(broken(change))
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"schema": ' + b"1" * 10_000 + b"}", b'{"schema": 1, "schema": 1}'],
)
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(Refused):
        parse(data)


def test_a_manifest_that_is_too_large_is_not_even_read_as_json() -> None:
    with pytest.raises(Refused, match="larger than"):
        parse(b" " * (form.MAX_MANIFEST_BYTES + 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda child: st.lists(child) | st.dictionaries(st.text(), child)
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["schema", "platform", "models", "wheels", "others", "created"]), min_size=1), JSON)
def test_any_json_in_any_place_is_refused_or_read(path: list[str], value: Any) -> None:
    raw = json.loads(sound().to_bytes())
    for key in path:
        raw[key] = value
    with contextlib.suppress(Refused):
        assert isinstance(parse(json.dumps(raw).encode()), Manifest)


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(["..", ".", "a", "con", "a.b", "C:", "\\", "a ", " a", "x\0", "\u202e"])).map("/".join))
def test_a_safe_path_stays_inside_on_every_system(path: str) -> None:
    if unsafe(path):
        return
    parts = path.split("/")
    assert all(part not in ("", ".", "..") and not set(part) & set('\\:*?"<>|\0') and part[-1] not in ". " for part in parts)
    assert Path("/root").joinpath(*parts).resolve().is_relative_to("/root")


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["..", ".", "a", "con", "nul.x", "C:", "\\", "a ", " a", "é", "\u202e", "x" * 201]) | st.text(),
        min_size=3,
        max_size=9,
    )
)
def test_what_the_library_takes_a_bundle_may_carry(parts: list[str]) -> None:
    try:
        path = "/".join(safe_parts("/".join(parts[:2]), "/".join(parts[2:])))
    except UsageError:
        return
    assert not unsafe(path)


def test_what_travels_runs_on_python_3_8_with_the_standard_library() -> None:
    for name in TRAVELLERS:
        path = Path(form.__file__).with_name(f"{name}.py")
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert {node.module or alias.name for alias in node.names} <= set(TRAVELLERS)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert all(module.split(".")[0] in sys.stdlib_module_names for module in modules), modules
