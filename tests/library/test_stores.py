"""Stores of other programs, laid out as those programs do."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from localllm.library.stores import HUGGING_FACE, JAN, LLAMA_CPP, LM_STUDIO, OLLAMA, Found, kept_in, stores

from .conftest import model, part

pytestmark = pytest.mark.skipif(os.name == "nt", reason="symbolic links")
COMMIT, OLDER = "a1" * 20, "b2" * 20


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def by_name(found: list[Found]) -> dict[str, Found]:
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def cached(hub: Path, repo: str, commit: str, filename: str, data: bytes) -> Path:
    """A file as huggingface_hub caches it."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    blob = write(folder / "blobs" / hashlib.sha256(data).hexdigest(), data)
    link = folder / "snapshots" / commit / filename
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def ollama(root: Path, name: str, layers: Any) -> Path:
    return write(root / "manifests" / name, layers if isinstance(layers, str) else json.dumps({"schemaVersion": 2, "layers": layers}))


def layer(digest: str) -> dict[str, Any]:
    return {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": 1}


def test_where_to_look_follows_the_programs_own_variables(tmp_path: Path) -> None:
    home = tmp_path / "h"
    plain = stores({"HOME": str(home)})
    assert (HUGGING_FACE, home / ".cache/huggingface/hub") in plain
    assert (LM_STUDIO, home / ".lmstudio/models") in plain
    assert (LM_STUDIO, home / ".cache/lm-studio/models") in plain
    assert (OLLAMA, home / ".ollama/models") in plain
    assert (JAN, home / ".local/share/Jan/data") in plain
    assert (JAN, home / "Library/Application Support/Jan/data") in plain
    env = {"HOME": str(home), "HF_HOME": "/d/hf", "OLLAMA_MODELS": "/d/ollama", "LLAMA_CACHE": "/d/llama", "XDG_DATA_HOME": "/d/data"}
    assert {
        (HUGGING_FACE, Path("/d/hf/hub")),
        (OLLAMA, Path("/d/ollama")),
        (LLAMA_CPP, Path("/d/llama")),
        (JAN, Path("/d/data/Jan/data")),
    } <= {*stores(env)}
    assert (HUGGING_FACE, Path("/d/cache")) in stores({**env, "HF_HUB_CACHE": "/d/cache"})


@pytest.mark.parametrize("app", [HUGGING_FACE, LM_STUDIO, OLLAMA, JAN, LLAMA_CPP, "/some/folder"])
def test_a_store_that_is_not_there_holds_nothing(app: str, tmp_path: Path) -> None:
    assert kept_in(app, tmp_path / "nothing") == []


def test_hugging_face(tmp_path: Path) -> None:
    new, shared = model(name="new"), model(name="shared")
    cached(tmp_path, "user/repo", OLDER, "m-Q4_K_M.gguf", model(name="old"))
    cached(tmp_path, "user/repo", OLDER, "m-Q8_0.gguf", shared)
    link = cached(tmp_path, "user/repo", COMMIT, "m-Q4_K_M.gguf", new)
    cached(tmp_path, "user/repo", COMMIT, "m-Q8_0.gguf", shared)
    write(tmp_path / "models--user--repo" / "refs" / "main", COMMIT)
    write(tmp_path / "datasets--user--repo" / "snapshots" / COMMIT / "m-Q8_0.gguf", shared)
    write(tmp_path / "models--user--repo" / "snapshots" / COMMIT / "README.md", "text")
    found = kept_in(HUGGING_FACE, tmp_path)
    assert [(one.name, one.commit) for one in found] == [
        ("user/repo:Q4_K_M", COMMIT),
        ("user/repo:Q4_K_M", OLDER),
        ("user/repo:Q8_0", COMMIT),
    ], "the same blob in an older snapshot is not another model"
    assert found[0] == Found(
        HUGGING_FACE, "user/repo:Q4_K_M", link, (link,), len(new), (hashlib.sha256(new).hexdigest(),), "user/repo", COMMIT
    )


def test_hugging_face_split_and_subfolder(tmp_path: Path) -> None:
    links = [cached(tmp_path, "u/r", COMMIT, f"Q8_0/m-0000{n + 1}-of-00002.gguf", part(n, 2)) for n in range(2)]
    cached(tmp_path, "u/r", COMMIT, "Q4_0/m-00001-of-00003.gguf", part(0, 3))
    found = by_name(kept_in(HUGGING_FACE, tmp_path))
    assert found["u/r:Q8_0"].files == tuple(links)
    assert len(set(found["u/r:Q8_0"].sha256s)) == 2
    assert found["u/r:Q4_0"].problem == "2 of its parts are missing"


def test_hugging_face_links_out_and_to_nothing(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    outside = write(tmp_path / "secret", model())
    snapshot = hub / "models--u--r" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "out-Q8_0.gguf").symlink_to(outside)
    (snapshot / "gone-Q4_0.gguf").symlink_to("../../blobs/nothing")
    (snapshot / "loop-Q2_K.gguf").symlink_to("loop-Q2_K.gguf")
    write(hub / "models--u--..--..--etc" / "snapshots" / COMMIT / "m-Q8_0.gguf", model())
    found = by_name(kept_in(HUGGING_FACE, hub))
    assert found["u/r:Q8_0"].problem == "a link leads out of the cache"
    assert found["u/r:Q4_0"].problem == "a link to nothing"
    assert found["u/r:Q2_K"].problem == "a link to nothing"
    assert len(found) == 3


def test_lm_studio(tmp_path: Path) -> None:
    path = write(tmp_path / "pub" / "thing-GGUF" / "thing-Q4_K_M.gguf", model())
    side = write(tmp_path / "pub" / "thing-GGUF" / "mmproj-thing-F16.gguf", model())
    loose = write(tmp_path / "loose.gguf", model())
    found = by_name(kept_in(LM_STUDIO, tmp_path))
    assert found["pub/thing-GGUF:Q4_K_M"].path == path
    assert found["pub/thing-GGUF/mmproj-thing-F16.gguf"].path == side
    assert found["lm-studio/loose"].path == loose


def test_ollama(tmp_path: Path) -> None:
    data = model()
    sha256 = hashlib.sha256(data).hexdigest()
    blob = write(tmp_path / "blobs" / f"sha256-{sha256}", data)
    others = [{"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "0" * 64}]
    ollama(tmp_path, "registry.ollama.ai/library/llama3.2/3b", [layer(f"sha256:{sha256}"), *others])
    ollama(tmp_path, "registry.ollama.ai/someone/thing/latest", [layer(f"sha256:{sha256}")])
    ollama(tmp_path, "hf.co/user/repo/Q4_K_M", [layer(f"sha256-{sha256}")])
    ollama(tmp_path, "registry.ollama.ai/library/cloud-only/latest", others)
    found = by_name(kept_in(OLLAMA, tmp_path))
    assert set(found) == {"ollama/llama3.2:3b", "someone/thing:latest", "user/repo:Q4_K_M"}
    assert found["ollama/llama3.2:3b"] == Found(OLLAMA, "ollama/llama3.2:3b", blob, (blob,), len(data), (sha256,))
    assert found["user/repo:Q4_K_M"].repo == "user/repo"


@pytest.mark.parametrize(
    "layers, problem",
    [
        ([layer("sha256:" + "0" * 64)], "its blob is missing"),
        ([layer("sha256:../../../../etc/passwd")], "no single file of weights"),
        ([layer("../" * 20 + "etc/passwd")], "no single file of weights"),
        ([layer("sha256:" + "A" * 64)], "no single file of weights"),
        ([layer("sha256:" + "0" * 64), layer("sha256:" + "1" * 64)], "no single file of weights"),
        ([{"mediaType": "application/vnd.ollama.image.model"}], "its manifest is broken"),
        ("{", "its manifest is broken"),
        ("[]", "its manifest is broken"),
        ('{"layers": 5}', "its manifest is broken"),
        ('{"layers": ["a"]}', "its manifest is broken"),
        ("[" * 100_000, "its manifest is broken"),
        ('{"x": "' + "x" * (2 << 20) + '"}', "its manifest is broken"),
    ],
)
def test_ollama_hostile_manifests(tmp_path: Path, layers: Any, problem: str) -> None:
    ollama(tmp_path, "registry.ollama.ai/library/evil/latest", layers)
    [found] = kept_in(OLLAMA, tmp_path)
    assert problem in found.problem
    assert found.files == () or not found.path.exists()


def test_an_ollama_blob_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f"sha256-{'0' * 64}").symlink_to(write(tmp_path / "secret", model()))
    ollama(tmp_path, "registry.ollama.ai/library/evil/latest", [layer("sha256:" + "0" * 64)])
    assert [one.problem for one in kept_in(OLLAMA, tmp_path)] == ["its blob is missing"]


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_jan(tmp_path: Path, quote: str) -> None:
    jan = tmp_path / "Jan" / "data"
    path = write(jan / "llamacpp" / "models" / "user" / "thing" / "model.gguf", model())
    elsewhere = write(tmp_path / "my models" / "m.gguf", model())
    relative = "llamacpp/models/user/thing/model.gguf"
    write(path.with_name("model.yml"), f"name: thing\nmodel_path: {quote}{relative}{quote}\nsize_bytes: 5\n")
    write(jan / "llamacpp/models/own/model.yml", f"model_path: {quote}{elsewhere}{quote}\n")
    write(jan / "llamacpp/models/gone/model.yml", "model_path: llamacpp/models/gone/model.gguf\n")
    write(jan / "llamacpp/models/evil/model.yml", "model_path: ../../my models/m.gguf\n")
    write(jan / "llamacpp/models/empty/model.yml", "name: empty\n")
    found = by_name(kept_in(JAN, jan))
    assert found["jan/user/thing"].path == path
    assert found["jan/own"].path == elsewhere
    assert found["jan/gone"].problem == "its file is missing"
    assert found["jan/evil"].problem == "it names a file outside of Jan's folder"
    assert len(found) == 4


def test_llama_cpp(tmp_path: Path) -> None:
    write(tmp_path / "manifest=ggml-org=gemma_3-GGUF=latest.json", "{}")
    write(tmp_path / "manifest=..=..=latest.json", "{}")
    path = write(tmp_path / "ggml-org_gemma_3-GGUF_gemma-Q4_K_M.gguf", model())
    write(tmp_path / "unknown-Q8_0.gguf", model())
    found = by_name(kept_in(LLAMA_CPP, tmp_path))
    assert found["ggml-org/gemma_3-GGUF:Q4_K_M"].path == path
    assert found["ggml-org/gemma_3-GGUF:Q4_K_M"].repo == "ggml-org/gemma_3-GGUF"
    assert set(found) == {"ggml-org/gemma_3-GGUF:Q4_K_M", "llama.cpp/unknown-Q8_0"}
