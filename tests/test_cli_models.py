"""`localllm list`, `show`, `rm`, `verify`, `alias`, `df`, `prune`, `import`, `adopt`: what is printed where, and the exit codes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from localllm.cli.app import main
from localllm.cli.table import bytes_bar, count, show_pairs, show_table
from localllm.library import Library
from tests import gguf_file as raw


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        return [line.split("\t") for line in self.out.splitlines()]


Run = Callable[..., Ran]
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")


class Stdin(io.TextIOWrapper):
    """Standard input: nothing, or what a person at a terminal types."""

    def __init__(self, typed: str | None) -> None:
        super().__init__(io.BytesIO((typed or "").encode()))
        self.terminal = typed is not None

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def localllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `localllm …` in this process; `typed` is what a person answers."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "APPDATA", "OLLAMA_MODELS", "LLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, typed: str | None = None) -> Ran:
        monkeypatch.setattr(sys, "argv", ["localllm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", Stdin(typed))
        with pytest.raises(SystemExit) as ended:
            main()
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    return run


def model(**texts: str) -> bytes:
    keys = [raw.string(f"general.{key}", value) for key, value in {"architecture": "llama", **texts}.items()]
    return raw.gguf(keys, [raw.tensor("a.weight", [32])], bytes(128))


def put(home: Path, key: str, data: bytes) -> Path:
    path = home / "models" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_list_is_tab_separated_in_a_pipe(localllm: Run, home: Path, demo_small: Path) -> None:
    put(home, "user/repo/m-Q8_0.gguf", demo_small.read_bytes())
    put(home, "user/bad/m-Q8_0.gguf", b"nonsense")
    localllm("alias", "mine", "user/repo:Q8_0")
    ran = localllm("list")
    assert (ran.code, ran.err) == (0, "")
    assert ran.rows[0] == ["NAME", "SIZE", "QUANT", "PARAMS", "ARCHITECTURE", "FROM", "ADDED", "NOTE"]
    rows = {row[0]: row for row in ran.rows[1:]}
    assert list(rows) == ["demo-large", "demo-small", "user/bad:Q8_0", "user/repo:Q8_0"]
    assert rows["user/repo:Q8_0"][1:6] == ["1.0 MB", "Q8_0", "886K", "llama", "found"]
    assert rows["user/repo:Q8_0"][7] == "alias mine"
    assert "not a GGUF file" in rows["user/bad:Q8_0"][7]
    assert localllm("ls").out == ran.out


def test_list_json_is_an_array_of_models(localllm: Run, home: Path) -> None:
    path = put(home, "user/repo/m-Q8_0.gguf", model())
    ran = localllm("list", "--json")
    assert [one["name"] for one in ran.json] == ["demo-large", "demo-small", "user/repo:Q8_0"]
    assert ran.json[2] == Library().find("user/repo").to_json()
    assert ran.json[2]["files"] == [str(path)]


def test_show(localllm: Run, home: Path) -> None:
    put(home, "user/repo/m-Q8_0.gguf", model(name="A model", license="apache-2.0"))
    ran = localllm("show", "user/repo")
    facts = dict(row for row in ran.rows if len(row) == 2)
    assert facts["name"] == "user/repo:Q8_0"
    assert facts["title"] == "A model"
    assert facts["licence"] == "apache-2.0"
    assert facts["chat template"] == "no"
    assert facts["sha256"].startswith("not known")
    out = localllm("show", "user/repo", "--json").json
    assert out.items() >= Library().find("user/repo").to_json().items()
    assert (out["licence"], out["has_chat_template"], out["n_vocab"], out["roles"]) == ("apache-2.0", False, 0, [])


def test_show_of_a_built_in_model_knows_the_catalogue(localllm: Run) -> None:
    out = localllm("show", "demo", "--json").json
    assert (out["catalog"], out["draft"]) == ("demo-large", ["demo-small"])
    assert out["has_chat_template"] is True
    assert out["n_vocab"] == 2048
    assert "roles\tchat, large" in localllm("show", "demo").out


def test_show_template_and_metadata(localllm: Run) -> None:
    assert "<|im_start|>" in localllm("show", "demo", "--template").out
    keys = localllm("show", "demo", "--metadata", "--json").json
    assert keys["general.architecture"] == "llama"
    assert keys["llama.context_length"] == 1024
    assert "general.architecture\tllama\n" in localllm("show", "demo", "--metadata").out
    assert localllm("show", "demo", "--template", "--json").code == 2


def test_show_of_a_path_and_of_a_broken_file(localllm: Run, home: Path, tmp_path: Path, demo_small: Path) -> None:
    outside = tmp_path / "m.gguf"
    outside.write_bytes(demo_small.read_bytes())
    assert localllm("show", outside, "--json").json["n_params"] == 885504
    inside = put(home, "user/repo/m-Q8_0.gguf", b"nonsense")
    ran = localllm("show", inside)
    assert ran.code == 0
    assert "name\tuser/repo:Q8_0" in ran.out
    assert "not a GGUF file" in ran.out
    assert localllm("show", inside, "--metadata").code == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_nothing_on_disk_steers_the_terminal(localllm: Run, home: Path, tmp_path: Path) -> None:
    put(home, "user/\x1b]0;evil\x07repo/m\x1b[2J\n-Q8_0.gguf", model(name="\x1b[31mred\nline", license="\x9b5m"))
    (tmp_path / "x\x1b[31m.gguf").write_bytes(b"nonsense")
    name = "user/\x1b]0;evil\x07repo:Q8_0"
    for arguments in (
        ["list"],
        ["df"],
        ["verify", "--all"],
        ["show", name],
        ["show", name, "--metadata"],
        ["list", "--json"],
        ["show", name, "--json"],
        ["adopt", "--from", home / "models"],
        ["show", tmp_path / "x\x1b[31m.gguf", "--metadata"],
        ["rm", "user/evil", "-y"],
        ["rm", name, "-y"],
    ):
        ran = localllm(*arguments)
        assert not {"\x1b", "\x07", "\x9b"} & {*ran.out, *ran.err}, arguments
    assert not list((home / "models").iterdir())


def test_rm_frees_and_says_so(localllm: Run, home: Path) -> None:
    put(home, "user/repo/m-Q8_0.gguf", model())
    put(home, "user/repo/m-Q4_0.gguf", model())
    ambiguous = localllm("rm", "user/repo")
    assert ambiguous.code == 3
    assert "hint: choose one: user/repo:Q4_0, user/repo:Q8_0" in ambiguous.err
    ran = localllm("rm", "user/repo:Q8_0", "user/repo:q8_0", "--json")
    [removed] = ran.json
    assert removed["name"] == "user/repo:Q8_0"
    assert removed["freed_bytes"] == len(model())
    assert localllm("rm", "user/repo").out == f"removed user/repo:Q4_0, freed {len(model())} B\n"
    assert not list((home / "models").iterdir())


def test_rm_removes_nothing_when_one_name_is_wrong(localllm: Run, home: Path) -> None:
    path = put(home, "user/repo/m-Q8_0.gguf", model())
    assert localllm("rm", "user/repo", "user/nothing").code == 3
    assert path.exists()


def test_rm_asks_on_a_terminal(localllm: Run, home: Path) -> None:
    path = put(home, "user/repo/m-Q8_0.gguf", model())
    refused = localllm("rm", "user/repo", typed="n\n")
    assert refused.code == 1
    assert str(path) in refused.err
    assert "Remove?" in refused.err
    assert not refused.out.strip()
    assert path.exists()
    assert localllm("rm", "user/repo", typed="y\n").code == 0
    assert not path.exists()


def test_verify(localllm: Run, home: Path) -> None:
    path = put(home, "user/repo/m-Q8_0.gguf", model())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert localllm("verify", "user/repo").rows[1] == ["user/repo:Q8_0", "first hash recorded", sha256, str(path)]
    ran = localllm("verify", "--all", "--json")
    assert [one["state"] for one in ran.json] == ["recorded", "recorded", "ok"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    damaged = localllm("verify", "--all", "--json")
    assert damaged.code == 6
    assert [one["state"] for one in damaged.json] == ["ok", "ok", "mismatch"]
    assert damaged.json[2]["expected"] == sha256
    assert f"error: {path} has changed: its SHA-256 should be {sha256}" in damaged.err
    assert "hint: remove it with localllm rm user/repo:Q8_0" in damaged.err
    assert "MISMATCH" in localllm("verify", "user/repo").out


@pytest.mark.parametrize("arguments", [[], ["demo", "--all"]])
def test_verify_wants_names_or_all(localllm: Run, arguments: list[str]) -> None:
    assert localllm("verify", *arguments).code == 2


def test_alias(localllm: Run) -> None:
    assert localllm("alias", "tiny", "demo-small") == Ran(0, "", "")
    note = "note: llama3.3:70b is not on this machine; fetch it with: localllm pull llama3.3:70b\n"
    assert localllm("alias", "big", "llama3.3:70b") == Ran(0, "", note)
    assert localllm("alias", "tiny", "demo-small", "--json").json == [{"alias": "tiny", "target": "demo-small"}]
    assert localllm("alias").rows == [["ALIAS", "MODEL"], ["big", "llama3.3:70b"], ["tiny", "demo-small"]]
    assert localllm("alias", "big", "--json").json == [{"alias": "big", "target": "llama3.3:70b"}]
    assert localllm("show", "tiny", "--json").json["name"] == "demo-small"
    assert localllm("alias", "--rm", "big").code == 0
    assert localllm("alias", "--json").json == [{"alias": "tiny", "target": "demo-small"}]
    assert localllm("alias", "--rm", "big").code == 3
    assert localllm("alias", "nothing").code == 3
    assert localllm("alias", "--rm").code == 2
    assert localllm("alias", "a/b", "demo").code == 2


def test_df(localllm: Run, home: Path) -> None:
    put(home, "user/repo/m-Q8_0.gguf", model())
    put(home, "other/repo/m-Q8_0.gguf", model())
    put(home, "other/repo/x-Q8_0.gguf.part", os.urandom(4096))
    out = localllm("df", "--json").json
    size = len(model())
    assert out["models"] == [{"name": "other/repo:Q8_0", "size_bytes": size}, {"name": "user/repo:Q8_0", "size_bytes": size}]
    assert out["publishers"] == [{"publisher": "other", "size_bytes": size}, {"publisher": "user", "size_bytes": size}]
    assert (out["models_bytes"], out["partial_bytes"], out["path"]) == (2 * size, 4096, str(home / "models"))
    assert out["disk_free_bytes"] < out["disk_total_bytes"]
    text = localllm("df").out
    assert f"user/repo:Q8_0\t{size} B\n" in text
    assert "partial downloads\t4.1 kB\n" in text
    assert f"folder\t{home / 'models'}\n" in text


def test_prune(localllm: Run, home: Path) -> None:
    part = put(home, "user/repo/m-Q8_0.gguf.part", os.urandom(4096))
    dry = localllm("prune", "--dry-run", "--json").json
    assert (dry["dry_run"], dry["freed_bytes"]) == (True, 0)
    assert dry["items"] == [{"what": "partial", "name": "user/repo/m-Q8_0.gguf", "size_bytes": 4096, "paths": [str(part)]}]
    refused = localllm("prune", typed="n\n")
    assert refused.code == 1
    assert "A paused download starts again" in refused.err
    assert part.exists()
    assert localllm("prune").out.splitlines()[-1] == "freed 4.1 kB"
    assert not part.exists()
    assert localllm("prune", "--json").json == {"dry_run": False, "freed_bytes": 0, "items": []}


def test_import(localllm: Run, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "m-Q8_0.gguf"
    path.write_bytes(model())
    ran = localllm("import", path, "--name", "me/mine")
    assert (ran.code, ran.out) == (0, "me/mine:Q8_0\n")
    assert (home / "models" / "me" / "mine" / "m-Q8_0.gguf").read_bytes() == model()
    assert localllm("import", path, "--name", "me/mine").code == 2
    assert localllm("import", path, "--name", "../x").code == 2
    assert localllm("import", path, "--move", "--link").code == 2
    assert localllm("import", tmp_path / "nothing.gguf").code == 3
    (tmp_path / "bad.gguf").write_bytes(b"nonsense")
    assert localllm("import", tmp_path / "bad.gguf").code == 1
    linked = localllm("import", path, "--link", "--json").json
    assert (linked["name"], linked["how"]) == ("local/m:Q8_0", "imported")
    assert Path(linked["path"]).samefile(path)


def test_adopt(localllm: Run, tmp_path: Path, demo_small: Path) -> None:
    assert "no other program keeps models" in localllm("adopt").err
    data = demo_small.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    ollama = tmp_path / "user" / ".ollama" / "models"
    manifest = ollama / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "1m"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{sha256}"}]}))
    (ollama / "blobs").mkdir()
    (ollama / "blobs" / f"sha256-{sha256}").write_bytes(data)
    bad = manifest.with_name("bad")
    bad.write_text("{")

    rows = {row[0]: row for row in localllm("adopt").rows[1:]}
    assert rows["ollama/tiny:1m"][1:4] == ["1.0 MB", "Ollama", "same as localllm demo-small"]
    assert rows["ollama/tiny:bad"][3] == "its manifest is broken"
    assert localllm("adopt", "ollama/nothing").code == 3
    assert localllm("adopt", "ollama/tiny:bad").code == 1
    ran = localllm("adopt", "--all")
    assert (ran.code, ran.out) == (0, "ollama/tiny:1m\n")
    assert "warning: ollama/tiny:bad of Ollama cannot be adopted" in ran.err
    [adopted] = [one for one in localllm("adopt", "--json").json if one["name"] == "ollama/tiny:1m"]
    assert adopted["adopted"] is True
    assert adopted["sha256s"] == [sha256]
    assert localllm("adopt", "--all").out == ""
    forgot = localllm("rm", "tiny:1m")
    assert forgot.out.startswith("forgot ollama/tiny:1m; its files stay: ")
    assert localllm("adopt", "ollama/tiny:1m", "--json").json[0]["how"] == "adopted"
    assert localllm("adopt", "x", "--all").code == 2
    assert localllm("adopt", "--from", tmp_path / "nothing").code == 2


def test_run_says_how_to_get_what_is_not_here(localllm: Run) -> None:
    ran = localllm("run", "llama3.3:70b", "hello")
    assert ran.code == 3
    assert ran.err == "error: llama3.3:70b is not on this machine\nhint: fetch it with: localllm pull llama3.3:70b\n"


@pytest.mark.parametrize(
    "number, text", [(0, ""), (7, "7"), (494_032_768, "494M"), (8_030_261_248, "8.0B"), (70_553_706_496, "70.6B"), (1.2e12, "1.2T")]
)
def test_parameters_as_people_write_them(number: int, text: str) -> None:
    assert count(number) == text


def test_tables_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    show_table(("NAME", "SIZE"), [("[bold]x[/bold]\x1b[31m", "1 B"), ("y" * 80, "200 B")])
    show_pairs([("name", "a\nb"), ("nothing", ""), ("longer name", "c")])
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert lines[0].split() == ["NAME", "SIZE"]
    assert lines[1].split() == ["[bold]x[/bold]␛[31m", "1", "B"]
    assert sum(line.count("y") for line in lines) == 80, "nothing is cut"
    assert lines[-2:] == ["name         a␊b", "longer name  c"]


def test_a_narrow_terminal_goes_without_columns_before_a_name_is_folded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(columns: int) -> list[list[str]]:
        monkeypatch.setenv("COLUMNS", str(columns))
        rows = [("bartowski/Llama-3.3-70B-Instruct-GGUF:Q4_K_M", "42.5 GB", "llama", "70.6B", "", "alias big")]
        show_table(("NAME", "SIZE", "ARCHITECTURE", "PARAMS", "ADDED", "NOTE"), rows, spare=("ARCHITECTURE", "PARAMS"))
        return [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()]

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert shown(120)[0] == ["NAME", "SIZE", "ARCHITECTURE", "PARAMS", "NOTE"], "an empty column tells nothing"
    assert shown(80) == [
        ["NAME", "SIZE", "PARAMS", "NOTE"],
        ["bartowski/Llama-3.3-70B-Instruct-GGUF:Q4_K_M", "42.5", "GB", "70.6B", "alias", "big"],
    ]
    assert shown(70)[0] == ["NAME", "SIZE", "NOTE"]


def test_list_says_what_demo_means(localllm: Run) -> None:
    rows = {row[0]: row for row in localllm("list").rows}
    assert rows["demo-large"][7] == "alias demo"
    assert rows["demo-small"][7] == ""


def test_a_gone_file_is_not_also_called_changed(localllm: Run, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs" / "m-Q8_0.gguf"
    theirs.parent.mkdir()
    theirs.write_bytes(model())
    name = localllm("adopt", "--all", "--from", theirs.parent).out.strip()
    localllm("verify", name)
    theirs.unlink()
    assert {row[0]: row for row in localllm("list").rows}[name][7] == "the file is gone"


def test_adopt_leaves_out_what_is_in_the_models_folder(localllm: Run, home: Path) -> None:
    put(home, "user/repo/m-Q8_0.gguf", model())
    assert localllm("adopt", "--all", "--from", home / "models").out == ""
    assert [row[0] for row in localllm("list").rows[1:]] == ["demo-large", "demo-small", "user/repo:Q8_0"]


def test_the_bar_goes_to_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with bytes_bar("hashing", 100) as progress:
        progress(50)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with bytes_bar("hashing", 100) as progress:
        progress(50)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "hashing" in shown.err


def test_a_long_list_reads_no_headers_and_loads_nothing_heavy(localllm: Run, home: Path) -> None:
    for n in range(100):
        put(home, f"user/r{n}/m-Q8_0.gguf", model())
    assert len(localllm("list").rows) == 103
    code = (
        "import sys, localllm.gguf, localllm.cli.app as app\n"
        "localllm.gguf.read_model = None\n"
        "sys.argv = ['localllm', 'list']\n"
        "try: app.main()\n"
        "finally: print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(ran.stdout.splitlines()) == 103
    assert not {"llama_cpp", "huggingface_hub", "numpy", "textual"} & set(ran.stderr.split())


@pytest.mark.skipif(os.name == "nt", reason="POSIX descriptors")
@pytest.mark.parametrize("redirection, code", [(">&-", 0), ("<&- >&- 2>&-", 0), pytest.param(">/dev/full", 1, marks=needs_full)])
def test_a_lost_stdout_is_no_traceback(redirection: str, code: int) -> None:
    ran = subprocess.run(f"{sys.executable} -m localllm list {redirection}", shell=True, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert ran.stderr == ("error: cannot write the answer: No space left on device\nhint: see where stdout goes\n" if code else "")
