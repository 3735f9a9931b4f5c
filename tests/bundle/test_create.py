"""Writing a bundle: what is on the stick, what survives an interruption, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from localllm.bundle.create import CHUNK_BYTES as DEFAULT
from localllm.bundle.manifest import MANIFEST, MAX_CHUNK_BYTES, SIGNATURE, UNFINISHED, Refused, folded
from localllm.bundle.settings import settings_for
from localllm.bundle.sign import generate
from localllm.bundle.sources import sources
from localllm.bundle.stick import Contents
from localllm.bundle.verify import check_hashes, open_bundle, read_public_key
from localllm.errors import DoesNotFit, NotFound, UsageError, VerificationFailed
from localllm.library.library import Library
from tests.bundle.sticks import CHUNK_BYTES, content, edit, make, model_bytes, source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "stick"


def test_what_is_on_the_stick(out: Path, tmp_path: Path) -> None:
    manifest = make(out, source(tmp_path / "a", "one"), source(tmp_path / "b", "two", seed=1))
    found = content(out)
    assert set(found) == {piece.file for piece in manifest.pieces} | {MANIFEST}
    assert {"README.txt", "verify.py", "licences/models.txt", "localllm_bundle/verify.py"} <= set(found)
    assert b"licence: mit" in found["licences/models.txt"]
    for seed, model in enumerate(manifest.models):
        (file,) = model.files
        assert b"".join(found[chunk.file] for chunk in file.chunks) == model_bytes(seed)
        assert file.sha256 == hashlib.sha256(model_bytes(seed)).hexdigest()
        assert {chunk.size_bytes for chunk in file.chunks[:-1]} == {CHUNK_BYTES}
    check_hashes(open_bundle(out))


def test_names_fit_fat32(out: Path, tmp_path: Path) -> None:
    strange = source(tmp_path / "a", "Mödel ö" + "x" * 150)
    manifest = make(out, strange, source(tmp_path / "b", "two"))
    names = [chunk.file for chunk in manifest.chunks]
    assert len({folded(name) for name in names}) == len(names)
    assert all(len(name) < 120 and name.isascii() and ":" not in name for name in names)
    assert DEFAULT < MAX_CHUNK_BYTES == 4 * 1024**3 - 1


def test_one_chunk_is_enough_for_a_small_model(out: Path, tmp_path: Path) -> None:
    manifest = make(out, source(tmp_path / "a"), chunk_bytes=DEFAULT)
    assert len(list(manifest.chunks)) == 1
    check_hashes(open_bundle(out))


@pytest.mark.parametrize("size", [0, -1, MAX_CHUNK_BYTES + 1])
def test_a_chunk_has_a_size_that_fat32_takes(out: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="chunk"):
        make(out, source(tmp_path / "a"), chunk_bytes=size)
    assert not out.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.bundle.sticks import make, source

def die(what, done, total):
    if what.endswith(".003"):
        os.kill(os.getpid(), signal.SIGKILL)

make(Path(sys.argv[1]), source(Path(sys.argv[2])), on_progress=die)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills with a signal")
def test_killed_and_run_again_it_writes_only_what_is_missing(out: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(tmp_path / "a")], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (out / UNFINISHED).is_file()
    with pytest.raises(Refused, match="not finished") as caught:
        open_bundle(out)
    assert caught.value.exit_code == 3
    written = {path: path.stat().st_ino for path in (out / "weights").glob("*.00[0-9]")}
    assert len(written) == 3
    make(out, source(tmp_path / "a"))
    assert {path: path.stat().st_ino for path in written} == written
    check_hashes(open_bundle(out))
    assert not (out / UNFINISHED).exists()
    assert not list(out.rglob("*.part"))


def test_a_chunk_that_went_bad_is_written_anew(out: Path, tmp_path: Path) -> None:
    manifest = make(out, source(tmp_path / "a"))
    chunk = out / list(manifest.chunks)[2].file
    chunk.write_bytes(b"x" * CHUNK_BYTES)
    make(out, source(tmp_path / "a"))
    check_hashes(open_bundle(out))


def test_another_bundle_in_its_place_leaves_no_old_chunks(out: Path, tmp_path: Path) -> None:
    make(out, source(tmp_path / "a", "one"))
    (out / "weights" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="holds a bundle with .*one") as caught:
        make(out, source(tmp_path / "b", "two"))
    assert "--force" in caught.value.hint
    check_hashes(open_bundle(out))
    manifest = make(out, source(tmp_path / "b", "two"), force=True)
    assert set(content(out)) == {piece.file for piece in manifest.pieces} | {MANIFEST, "weights/holiday.jpg"}
    make(out, source(tmp_path / "b", "two"), source(tmp_path / "c", "three", seed=1))


def test_a_folder_with_other_things_is_refused(out: Path, tmp_path: Path) -> None:
    out.mkdir()
    (out / "thesis.doc").write_text("years")
    with pytest.raises(UsageError, match="not empty, and no bundle"):
        make(out, source(tmp_path / "a"))
    (out / MANIFEST).write_text('{"name": "a web app"}')
    with pytest.raises(UsageError, match="not empty, and no bundle"):
        make(out, source(tmp_path / "a"))
    make(out, source(tmp_path / "a"), force=True)
    assert (out / "thesis.doc").read_text() == "years"


def test_a_fresh_stick_is_empty_whatever_systems_left_on_it(out: Path, tmp_path: Path) -> None:
    (out / "System Volume Information").mkdir(parents=True)
    (out / ".Trashes").mkdir()
    make(out, source(tmp_path / "a"))
    check_hashes(open_bundle(out))


def test_a_link_in_the_folder_is_refused(out: Path, tmp_path: Path) -> None:
    make(out, source(tmp_path / "a"))
    (out / "weights").rename(tmp_path / "elsewhere")
    (out / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link"):
        make(out, source(tmp_path / "a"))


def test_a_model_that_is_not_what_was_recorded_is_not_carried(out: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match="damaged"):
        make(out, source(tmp_path / "a", sha256="0" * 64))
    assert not (out / MANIFEST).exists()


def test_room_is_checked_first(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5_000_000})())
    with pytest.raises(DoesNotFit, match="stick"):
        make(out, source(tmp_path / "a"))
    assert not out.exists()


def test_signed(out: Path, tmp_path: Path) -> None:
    public = generate(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    make(out, source(tmp_path / "a"), key=tmp_path / "key")
    assert open_bundle(out).signature.state == "unknown key"
    assert open_bundle(out, public).signature.state == "trusted"
    assert open_bundle(out, str(tmp_path / "key.pub")).signature.public_key == public
    with pytest.raises(Refused, match="another key"):
        open_bundle(out, generate(tmp_path / "other"))
    edit(out, lambda raw: raw.update(created="yesterday"))
    for key in (None, public):
        with pytest.raises(Refused, match="not what was signed") as caught:
            open_bundle(out, key)
        assert caught.value.exit_code == 6
    make(out, source(tmp_path / "a"))
    assert not (out / SIGNATURE).exists()
    with pytest.raises(Refused, match="unsigned") as caught:
        open_bundle(out, public)
    assert caught.value.exit_code == 6


def test_a_key_that_cannot_sign_is_told_before_anything_is_written(out: Path, tmp_path: Path) -> None:
    generate(tmp_path / "key")
    for key, error in (("key.pub", UsageError), ("missing", NotFound)):
        with pytest.raises(error):
            make(out, source(tmp_path / "a"), key=tmp_path / key)
    assert not out.exists()
    with pytest.raises(UsageError, match="there already"):
        generate(tmp_path / "key")
    with pytest.raises(Refused, match="no public key"):
        read_public_key(str(tmp_path / "key"))


def test_the_library_says_what_to_carry() -> None:
    library = Library()
    large, small = sources(library, ["demo", "demo-small", "demo-large"])
    assert (large.name, small.name) == ("localllm/demo-large:Q8_0", "localllm/demo-small:Q8_0")
    assert large.files[0].target == "localllm/demo-large/demo-large-q8_0.gguf"
    assert large.licence == "mit"
    with pytest.raises(NotFound):
        sources(library, ["nonesuch"])


def test_a_model_of_the_library_keeps_its_place_and_its_notices(tmp_path: Path) -> None:
    library = Library()
    path = library.root / "pub" / "repo" / "Q4_0" / "m-Q4_0.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(model_bytes())
    (path.parent / "LICENSE").write_text("do as you like")
    library.record(path, how="pulled", sha256s={path: hashlib.sha256(model_bytes()).hexdigest()}, repo="pub/repo", commit="c" * 40)
    (found,) = sources(library, ["pub/repo:Q4_0"])
    assert (found.name, found.repo, found.commit) == ("pub/repo:Q4_0", "pub/repo", "c" * 40)
    (file,) = found.files
    assert (file.target, file.sha256) == ("pub/repo/Q4_0/m-Q4_0.gguf", hashlib.sha256(model_bytes()).hexdigest())
    make(tmp_path / "stick", found)
    assert content(tmp_path / "stick")["licences/models/pub_repo_Q4_0/LICENSE"] == b"do as you like"


def test_settings_travel_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('# mine\nmodel = "big"\nn_ctx = 4096\nhf_token = "hf_x"\n[cloud]\napi_key = "sk-x"\nurl = "https://x"\n')
    text = settings_for(file, ["p/r:Q4_0"]).decode()
    assert "hf_x" not in text
    assert "sk-x" not in text
    assert "n_ctx = 4096" in text
    assert 'model = "p/r:Q4_0"' in text
    file.write_text('model = "p/r:Q4_0"\nmodels_dir = "/home/alice/models"\n')
    assert settings_for(file, ["a/b:Q", "p/r:Q4_0"]).decode() == 'model = "p/r:Q4_0"\n'
    assert settings_for(tmp_path / "none", []) == b""


def test_settings_are_on_the_stick(out: Path, tmp_path: Path) -> None:
    from localllm.bundle.create import create

    create(out, Contents((source(tmp_path / "a"),), config=b"n_ctx = 1\n"))
    assert json.loads((out / MANIFEST).read_bytes())["platform"] is None
    assert (out / "config.toml").read_bytes() == b"n_ctx = 1\n"
