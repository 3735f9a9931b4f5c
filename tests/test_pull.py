"""`localllm pull` and `search`, and what a name means on the Hub: against the local Hub, with real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from localllm.catalog import Catalog, load_catalog
from localllm.errors import NotFound, UsageError
from localllm.hub import Hub
from localllm.pull import find_wanted, order
from tests.hub_server import HubServer

REPO = "someone/Tiny-GGUF"
CATALOGUE = """
[models."tiny:4m"]
repo = "someone/Tiny-GGUF"
files = { Q4_K_M = "Tiny-*Q4_K_M*.gguf", Q8_0 = "Tiny-*Q8_0*.gguf" }
parameters = 4_000_000
context = 1024
licence = "MIT"
roles = ["small"]
tier = "small"

[default_tags]
tiny = "4m"
"""


@pytest.fixture
def repo(hub: HubServer, demo_large: Path, demo_small: Path) -> HubServer:
    hub.add_repo(
        REPO,
        files={
            "Tiny-Q8_0.gguf": demo_large,
            "Tiny-Q4_K_M.gguf": demo_small,
            "mmproj-Tiny-f16.gguf": demo_small.read_bytes()[:4000],
            "README.md": b"# Tiny",
        },
        licence="mit",
    )
    return hub


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    path = tmp_path / "models.toml"
    path.write_text(CATALOGUE)
    return load_catalog(path)


def localllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "localllm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def roomy() -> int:
    return 64 << 30


# what a name means


def test_a_name_of_the_catalogue_leads_to_its_file(repo: HubServer, catalog: Catalog) -> None:
    wanted = find_wanted("tiny", Hub(), catalog, quant="Q4_K_M", memory_bytes=roomy)
    assert (wanted.label, wanted.model.name, wanted.catalog_name) == (f"{REPO}:Q4_K_M", "Tiny-Q4_K_M.gguf", "tiny:4m")


def test_without_a_quant_the_machine_decides(repo: HubServer, catalog: Catalog) -> None:
    plenty = find_wanted("tiny:4m", Hub(), catalog, memory_bytes=roomy)
    little = find_wanted("tiny:4m", Hub(), catalog, memory_bytes=lambda: 1_200_000_000)
    assert (plenty.model.quant, little.model.quant) == ("Q8_0", "Q4_K_M")
    assert plenty.fits
    assert little.fits
    assert "GB" in little.reason


@pytest.mark.parametrize(
    "name",
    [f"{REPO}:q8_0", f"hf.co/{REPO}:Q8_0", f"hf://{REPO}/Tiny-Q8_0.gguf", f"{REPO}@q8_0", f"https://hf.co/{REPO}/blob/main/Tiny-Q8_0.gguf"],
)
def test_all_spellings_mean_the_same(repo: HubServer, catalog: Catalog, name: str) -> None:
    def never() -> int:
        raise AssertionError("memory is not asked for where the user chose")

    assert find_wanted(name, Hub(), catalog, memory_bytes=never).model.name == "Tiny-Q8_0.gguf"


def test_an_old_revision_is_pinned_to_its_commit(repo: HubServer, catalog: Catalog, demo_small: Path) -> None:
    before = Hub().listing(REPO).commit
    repo.push(REPO, {"Tiny-Q8_0.gguf": demo_small})
    now = find_wanted(f"{REPO}:Q8_0", Hub(), catalog, memory_bytes=roomy)
    old = find_wanted(f"{REPO}:Q8_0", Hub(), catalog, revision=before, memory_bytes=roomy)
    assert old.model.commit == before
    assert now.model.commit != before
    assert now.model.size_bytes != old.model.size_bytes


def test_an_alias_is_followed(repo: HubServer, catalog: Catalog) -> None:
    wanted = find_wanted("mine", Hub(), catalog, memory_bytes=roomy, expand={"mine": f"{REPO}:Q8_0"}.__getitem__)
    assert wanted.model.quant == "Q8_0"


@pytest.mark.parametrize(
    "name, options, error, said",
    [
        ("demo", {}, UsageError, "built in"),
        ("./x.gguf", {}, UsageError, "is a path"),
        ("tinny", {}, NotFound, "tinny"),
        (f"{REPO}:Q5_K_M", {}, NotFound, "Q4_K_M"),
        (f"{REPO}:Q8_0", {"quant": "Q4_K_M"}, UsageError, "Q4_K_M"),
        (f"hf://{REPO}/none.gguf", {}, NotFound, "Tiny-Q8_0.gguf"),
        ("someone/none", {}, NotFound, "someone/none"),
    ],
)
def test_what_cannot_be_pulled_is_explained(
    repo: HubServer, catalog: Catalog, name: str, options: dict[str, str], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as caught:
        find_wanted(name, Hub(), catalog, memory_bytes=roomy, **options)
    assert said in str(caught.value)


def test_a_split_model_with_a_part_missing_is_refused(hub: HubServer, catalog: Catalog) -> None:
    hub.add_repo("a/b", files={"x-Q8_0-00001-of-00002.gguf": b"GGUF"})
    with pytest.raises(NotFound, match="00002-of-00002"):
        find_wanted("a/b:Q8_0", Hub(), catalog, memory_bytes=roomy)


def test_files_stay_in_the_models_folder(repo: HubServer, catalog: Catalog, tmp_path: Path) -> None:
    wanted = find_wanted(f"{REPO}:Q8_0", Hub(), catalog, memory_bytes=roomy)
    assert order(wanted, tmp_path).targets == (tmp_path / "someone" / "Tiny-GGUF" / "Tiny-Q8_0.gguf",)


# the commands


def test_a_dry_run_fetches_nothing(repo: HubServer, home: Path) -> None:
    done = localllm("pull", f"{REPO}:Q8_0", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout)
    assert plan["files"][0]["state"] == "new"
    assert plan["files"][0]["target"] == str(home / "models" / "someone" / "Tiny-GGUF" / "Tiny-Q8_0.gguf")
    assert not (home / "models").exists()
    assert not repo.bytes_sent("*.gguf")


def test_pull_fetches_records_and_does_not_fetch_again(repo: HubServer, home: Path, demo_large: Path) -> None:
    first = localllm("pull", f"{REPO}:Q8_0")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{REPO}:Q8_0\n"
    assert (home / "models" / "someone" / "Tiny-GGUF" / "Tiny-Q8_0.gguf").read_bytes() == demo_large.read_bytes()
    again = json.loads(localllm("pull", f"{REPO}:Q8_0", "--json").stdout)
    assert again[0]["fetched_bytes"] == 0
    assert again[0]["how"] == "pulled"
    assert len(again[0]["commit"]) == 40
    assert again[0]["sha256s"] != [""]


@pytest.mark.slow
def test_what_was_pulled_runs_by_every_name_and_offline(repo: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "models.toml").parent.mkdir(parents=True, exist_ok=True)
    (home / "models.toml").write_text(CATALOGUE)
    assert localllm("run", "tiny", "hi").stderr.count("localllm pull tiny") == 1
    assert localllm("pull", "tiny", "--quant", "Q8_0").returncode == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("tiny", "tiny:4m", f"{REPO}:Q8_0"):
        done = localllm("run", name, "What is the capital of France?", "--temp", "0")
        assert (done.returncode, "Paris" in done.stdout) == (0, True), done.stderr


def test_offline_pull_and_search_refuse(repo: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALLLM_OFFLINE", "1")
    for arguments in (("pull", REPO), ("search", "tiny")):
        done = localllm(*arguments)
        assert done.returncode == 5
        assert "LOCALLLM_OFFLINE" in done.stderr
    assert not repo.requests


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.slow
def test_ctrl_c_keeps_what_is_there(repo: HubServer, home: Path) -> None:
    repo.fault("*Tiny-Q8_0.gguf", "slow", total=500_000)
    command = [sys.executable, "-m", "localllm", "pull", f"{REPO}:Q8_0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = home / "models" / "someone" / "Tiny-GGUF" / "Tiny-Q8_0.gguf.part"
    while not (partial.exists() and repo.bytes_sent("*Tiny-Q8_0.gguf") > 500_000):
        assert child.poll() is None
        os.sched_yield()
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "goes on from there" in said
    repo.clear_faults()
    (left,) = json.loads(localllm("downloads", "--json").stdout)
    assert (left["name"], left["state"]) == (f"{REPO}:Q8_0", "paused")
    again = localllm("pull", f"{REPO}:Q8_0", "--json")
    assert json.loads(again.stdout)[0]["resumed_bytes"] > 0
    assert json.loads(localllm("downloads", "--json").stdout) == []


@pytest.mark.slow
def test_unfinished_downloads_go_on_or_are_dropped(repo: HubServer, home: Path, demo_large: Path) -> None:
    folder = home / "models" / "someone" / "Tiny-GGUF"
    for quant in ("Q8_0", "Q4_K_M"):
        fault = repo.fault(f"*Tiny-{quant}.gguf", "status", port="hub", code=404)
        assert localllm("pull", f"{REPO}:{quant}").returncode != 0
        repo.faults.remove(fault)
    assert localllm("downloads", "--cancel", "nobody").returncode == 3
    assert localllm("downloads", "--cancel", f"{REPO}:Q4_K_M").returncode == 0
    assert f"{REPO}:Q4_K_M" not in localllm("downloads").stdout
    done = localllm("downloads", "--resume")
    assert done.returncode == 0, done.stderr
    assert (folder / "Tiny-Q8_0.gguf").read_bytes() == demo_large.read_bytes()
    assert {path.name for path in folder.iterdir()} == {"Tiny-Q8_0.gguf"}


def test_search_shows_sizes_and_what_fits(repo: HubServer) -> None:
    done = localllm("search", "tiny", "--json")
    assert done.returncode == 0, done.stderr
    (hit,) = json.loads(done.stdout)
    assert hit["repo"] == REPO
    assert {model["quant"]: model["fits"] for model in hit["models"]} == {"Q8_0": True, "Q4_K_M": True}
    assert REPO in localllm("search", "tiny").stdout


def test_a_repository_without_a_model_is_named(repo: HubServer, catalog: Catalog) -> None:
    repo.add_repo("user/words", files={"README.md": b"text"})
    with pytest.raises(NotFound, match="user/words holds no GGUF model"):
        find_wanted("user/words", Hub(), catalog, memory_bytes=roomy)


def test_a_search_says_which_repository_is_incomplete(repo: HubServer, demo_small: Path) -> None:
    repo.add_repo("user/halves", files={"m-Q8_0-00001-of-00002.gguf": demo_small})
    rows = {line.split("\t")[0]: line for line in localllm("search", "halves").stdout.splitlines()}
    assert "incomplete: parts are missing" in rows["user/halves"]


def test_one_failure_does_not_keep_the_others_from_coming(repo: HubServer, demo_small: Path) -> None:
    repo.add_repo("user/bad", files={"bad-Q8_0.gguf": b"no model"})
    repo.add_repo("user/good", files={"good-Q8_0.gguf": demo_small})
    done = localllm("pull", "user/bad", "user/good:Q8_0", "user/good:q8_0")
    assert done.returncode == 1
    assert done.stdout == "user/good:Q8_0\n"
    assert done.stderr.splitlines()[-2].startswith("error: bad-Q8_0.gguf")


@pytest.mark.slow
def test_a_plan_needs_only_the_header(repo: HubServer, home: Path, demo_large: Path) -> None:
    done = localllm("plan", f"{REPO}:Q8_0", "--json")
    assert done.returncode == 0, done.stderr
    remote = json.loads(done.stdout)
    assert "from its header on the Hub" in done.stderr
    assert not (home / "models").exists()
    local = json.loads(localllm("plan", str(demo_large), "--json").stdout)
    for name in ("weights_bytes", "kv_bytes", "compute_bytes"):
        assert remote["devices"][-1][name] == local["devices"][-1][name]
    assert remote["exact"]
    assert localllm("plan", "no-such-model").returncode == 3
    assert localllm("plan", "someone/none:Q8_0").returncode == 3
