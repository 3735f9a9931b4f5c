from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm import paths
from localllm.catalog import ROLES, Catalog, ModelSpec, load_catalog
from localllm.demo import demo_models
from localllm.errors import ConfigError, NotFound

MINE = """
[models."mine:7b"]
repo = "me/Mine-7B-GGUF"
files = { Q4_K_M = "Mine-7B-Q4_K_M*.gguf" }
parameters = 7_000_000_000
context = 32_768
licence = "MIT"
roles = ["chat"]
tier = "middle"
"""
CATALOG = load_catalog()
KEYS = [spec.key for spec in CATALOG.models]


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    return tmp_path / "config" / "models.toml"


def load(user_file: Path, text: str) -> Catalog:
    user_file.parent.mkdir(exist_ok=True)
    user_file.write_text(text, encoding="utf-8")
    return load_catalog(user_file)


@pytest.fixture(params=CATALOG.models, ids=KEYS)
def shipped(request: pytest.FixtureRequest) -> ModelSpec:
    return request.param


class TestShipped:
    def test_names_the_families_people_use(self) -> None:
        names = {spec.name for spec in CATALOG.models}
        assert {"llama3.1", "llama3.2", "llama3.3", "qwen2.5", "qwen2.5-coder", "qwen3", "qwen3.5", "gemma3", "gemma4"} <= names
        assert {"devstral-small-2", "phi4", "gpt-oss", "deepseek-r1", "smollm2", "nomic-embed-text"} <= names
        assert len(CATALOG.models) >= 40
        assert len(set(KEYS)) == len(KEYS)

    def test_says_where_and_when_it_was_seen(self, shipped: ModelSpec) -> None:
        sources = r"(https://|github:[\w.-]+/[\w.-]+ )\S+( \(.+\))?"
        assert all(re.fullmatch(sources, source) for source in shipped.source) or shipped.built_in
        assert isinstance(shipped.checked, date)
        assert shipped.source
        assert shipped.note.endswith(".")

    def test_has_the_usual_quants(self, shipped: ModelSpec) -> None:
        expected = {"Q4_K_M", "Q8_0"}
        if shipped.name == "gpt-oss":
            expected = {"MXFP4"}
        elif shipped.built_in or "embed" in shipped.roles:
            # Small enough that their makers stop at eight bits.
            expected = {"Q8_0"}
        assert expected <= set(shipped.files)

    def test_a_pattern_takes_its_quant_and_no_other(self, shipped: ModelSpec) -> None:
        for quant, pattern in shipped.files.items():
            whole = pattern.replace("*", "")
            assert shipped.quant_of(whole) == quant
            if not shipped.built_in:
                stem = whole.removesuffix(".gguf")
                assert shipped.quant_of(f"{stem}/{stem}-00001-of-00003.gguf") == quant
            beside = [f"mmproj-{whole}", f"MTP/mtp-{whole}", *(whole.replace(quant, other) for other in (f"UD-{quant}", "IQ2_M", "Q4_K_L"))]
            assert not [path for path in beside if path != whole and shipped.quant_of(path)]

    def test_tier_follows_the_size(self, shipped: ModelSpec) -> None:
        size = shipped.parameters / 1e9
        assert shipped.tier == ("small" if size < 6 else "middle" if size < 20 else "large")

    def test_roles_fit_the_size(self, shipped: ModelSpec) -> None:
        if "embed" in shipped.roles:
            assert shipped.roles == ("embed",)
        elif not shipped.built_in:
            assert ("small" in shipped.roles) == (shipped.tier != "large")
            assert ("large" in shipped.roles) == (shipped.tier != "small")

    def test_active_parameters_only_where_fewer(self, shipped: ModelSpec) -> None:
        assert shipped.active_parameters <= shipped.parameters
        moe = {"qwen3:30b", "qwen3-coder:30b", "qwen3.5:35b", "qwen3.6:35b", "gemma4:26b", "gpt-oss:20b", "gpt-oss:120b"}
        assert (shipped.active_parameters < shipped.parameters) == (shipped.key in moe)

    def test_drafts_are_smaller_models_of_the_family(self, shipped: ModelSpec) -> None:
        drafts = CATALOG.drafts_for(shipped)
        assert [draft.key for draft in drafts] == list(shipped.draft)
        for draft in drafts:
            assert draft.parameters * 3 < shipped.parameters or draft.built_in
            assert "draft" in draft.roles
            assert re.match(r"[a-z]+\d?", draft.name)[0] == re.match(r"[a-z]+\d?", shipped.name)[0]  # type: ignore[index]

    def test_a_draft_drafts_for_something(self) -> None:
        used = {key for spec in CATALOG.models for key in spec.draft}
        assert used == {spec.key for spec in CATALOG.models if "draft" in spec.roles}

    def test_every_name_has_a_default(self, shipped: ModelSpec) -> None:
        assert CATALOG.find(shipped.name).name == shipped.name

    def test_built_in_models_are_there(self) -> None:
        built_in = {spec.name: spec for spec in CATALOG.models if spec.built_in}
        files = demo_models()
        assert set(built_in) == set(files) - {"demo"}
        for name, spec in built_in.items():
            assert list(spec.files.values()) == [files[name].name]

    def test_an_installed_package_reads_the_copy_inside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        inside = tmp_path / "localllm"
        inside.mkdir()
        text = (Path(__file__).parent.parent / "models.toml").read_text(encoding="utf-8")
        (inside / "models.toml").write_text(text.replace('note = "Text only', 'note = "Inside. Text only'), encoding="utf-8")
        monkeypatch.setattr(paths, "PACKAGE", inside)
        assert load_catalog().find("gemma3:1b").note.startswith("Inside.")

    def test_a_shipped_entry_needs_its_sources(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "models.toml").write_text(MINE)
        monkeypatch.setattr(paths, "PACKAGE", tmp_path)
        with pytest.raises(ConfigError, match=r"models\.toml, line 2: mine:7b lacks source, checked"):
            load_catalog()


class TestFind:
    @pytest.mark.parametrize(
        "name, tag, key",
        [
            ("llama3.3", "70b", "llama3.3:70b"),
            ("llama3.3:70b", None, "llama3.3:70b"),
            ("Llama3.3", "70B", "llama3.3:70b"),
            ("llama3.2", None, "llama3.2:3b"),
            ("llama3.2", "", "llama3.2:3b"),
            ("llama3.2", "latest", "llama3.2:3b"),
            ("nomic-embed-text", None, "nomic-embed-text:v1.5"),
            ("demo-small", None, "demo-small"),
        ],
    )
    def test_by_name_and_tag(self, name: str, tag: str | None, key: str) -> None:
        assert CATALOG.find(name, tag).key == key

    @pytest.mark.parametrize(
        "name, hint",
        [
            ("lama3.3", "did you mean llama3.3"),
            ("lama3.3:70b", "did you mean llama3.3:70b"),
            ("gptoss", "did you mean gpt-oss"),
            ("xyzzy", "localllm search xyzzy"),
            ("qwen3:9b", "choose one of qwen3:0.6b, qwen3:1.7b, qwen3:4b, qwen3:8b, qwen3:14b, qwen3:30b, qwen3:32b"),
            ("demo-small:7b", "choose one of demo-small"),
        ],
    )
    def test_a_wrong_name_gets_neighbours(self, name: str, hint: str) -> None:
        with pytest.raises(NotFound) as caught:
            CATALOG.find(name)
        assert hint in caught.value.hint

    def test_tags_from_small_to_large(self) -> None:
        assert CATALOG.tags("gemma4") == ("e2b", "e4b", "12b", "26b", "31b")
        assert CATALOG.tags("demo-large") == ("",)
        assert CATALOG.tags("nothing") == ()

    def test_drafts_best_first(self) -> None:
        assert [spec.key for spec in CATALOG.drafts_for(CATALOG.find("llama3.3:70b"))] == ["llama3.2:1b", "llama3.2:3b"]

    def test_an_entry_can_be_a_key(self) -> None:
        assert len({CATALOG.find("phi4"), CATALOG.find("phi4:14b"), load_catalog().find("phi4")}) == 1


class TestFilesOnTheHub:
    """How authors really lay out their repositories."""

    @pytest.mark.parametrize(
        "key, path, quant",
        [
            ("llama3.3:70b", "Llama-3.3-70B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
            ("llama3.3:70b", "Llama-3.3-70B-Instruct-Q8_0/Llama-3.3-70B-Instruct-Q8_0-00002-of-00002.gguf", "Q8_0"),
            ("llama3.3:70b", "llama-3.3-70b-instruct-q4_k_m.gguf", "Q4_K_M"),
            ("llama3.3:70b", "Llama-3.3-70B-Instruct-Q4_K_S.gguf", None),
            ("gemma4:26b", "google_gemma-4-26B-A4B-it-Q8_0.gguf", "Q8_0"),
            ("gemma4:26b", "mtp-google_gemma-4-26B-A4B-it-Q8_0.gguf", None),
            ("gemma4:e2b", "MTP/mtp-gemma-4-E2B-it-Q8_0.gguf", None),
            ("gpt-oss:20b", "gpt-oss-20b-mxfp4.gguf", "MXFP4"),
            ("gpt-oss:20b", "eagle3-gpt-oss-20b-Q8_0.gguf", None),
            ("nomic-embed-text", "nomic-embed-text-v1.5.Q8_0.gguf", "Q8_0"),
        ],
    )
    def test_quant_of(self, key: str, path: str, quant: str | None) -> None:
        assert CATALOG.find(key).quant_of(path) == quant


class TestUserFile:
    def test_none_is_fine(self, user_file: Path) -> None:
        assert load_catalog(user_file) == CATALOG
        assert load(user_file, "") == CATALOG
        assert load(user_file, "# nothing yet\n[models]\n") == CATALOG

    def test_a_new_entry_needs_no_source(self, user_file: Path) -> None:
        catalog = load(user_file, MINE)
        spec = catalog.find("mine:7b")
        assert (spec.source, spec.checked, spec.draft, spec.note, spec.active_parameters) == ((), None, (), "", 7_000_000_000)
        assert len(catalog.models) == len(CATALOG.models) + 1

    def test_a_known_entry_keeps_the_fields_that_are_not_given(self, user_file: Path) -> None:
        text = """
            [models."llama3.3:70b"]
            context = 8192
            draft = []
            [models."llama3.3:70b".files]
            IQ3_XS = "Llama-3.3-70B-Instruct-IQ3_XS.gguf"
        """
        before, after = CATALOG.find("llama3.3"), load(user_file, text).find("llama3.3")
        assert (after.context, after.draft, dict(after.files)) == (8192, (), {"IQ3_XS": "Llama-3.3-70B-Instruct-IQ3_XS.gguf"})
        assert (after.repo, after.source, after.licence, after.note) == (before.repo, before.source, before.licence, before.note)
        assert [spec.key for spec in load(user_file, text).models] == KEYS

    def test_default_tags(self, user_file: Path) -> None:
        catalog = load(user_file, '[default_tags]\n"llama3.2" = "1b"\nmine = "7b"\n' + MINE)
        assert catalog.find("llama3.2").tag == "1b"
        assert catalog.find("mine").tag == "7b"
        assert catalog.find("gemma3").tag == "4b"

    def test_without_a_default_the_bare_name_is_no_guess(self, user_file: Path) -> None:
        with pytest.raises(NotFound, match="has no default tag") as caught:
            load(user_file, MINE).find("mine")
        assert caught.value.hint == "choose one of mine:7b"

    def test_a_tag_may_be_called_latest(self, user_file: Path) -> None:
        assert load(user_file, MINE.replace("mine:7b", "mine:latest")).find("mine").tag == "latest"

    def test_it_can_draft_for_a_shipped_model(self, user_file: Path) -> None:
        text = MINE.replace("mine:7b", "mine:tiny") + '[models."gpt-oss:120b"]\ndraft = ["mine:tiny"]\n'
        catalog = load(user_file, text)
        assert catalog.drafts_for(catalog.find("gpt-oss:120b")) == (catalog.find("mine:tiny"),)

    def test_windows_editors(self, user_file: Path) -> None:
        user_file.parent.mkdir()
        user_file.write_bytes(b"\xef\xbb\xbf" + MINE.replace("\n", "\r\n").encode())
        assert load_catalog(user_file).find("mine:7b").licence == "MIT"


def broken(user_file: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(user_file, text)
    assert caught.value.message.startswith(str(user_file))
    assert caught.value.hint
    return caught.value


class TestErrors:
    @pytest.mark.parametrize(
        "old, new, line, what, hint",
        [
            ("repo =", "repos =", 3, "'repos'", "did you mean repo?"),
            ("context =", "zzz = 1\ncontext =", 6, "'zzz'", "the fields are repo, files,"),
            ('repo = "me/Mine-7B-GGUF"\n', "", 2, "mine:7b lacks repo", "needs them"),
            ('tier = "middle"\n', "", 2, "mine:7b lacks tier", "needs them"),
            ('"me/Mine-7B-GGUF"', '"Mine-7B-GGUF"', 3, "'Mine-7B-GGUF'", '"owner/name"'),
            ('"me/Mine-7B-GGUF"', '"../Mine"', 3, "'../Mine'", '"owner/name"'),
            ('"me/Mine-7B-GGUF"', "7", 3, "repo of mine:7b is 7", '"owner/name"'),
            ("repo =", "built_in = true\nrepo =", 3, "'built_in'", "fields are"),
            ('"Mine-7B-Q4_K_M*.gguf"', '"../*.gguf"', 4, "files of mine:7b", "pattern"),
            ('"Mine-7B-Q4_K_M*.gguf"', '"/etc/*.gguf"', 4, "files of mine:7b", "pattern"),
            ('"Mine-7B-Q4_K_M*.gguf"', '"Mine-7B.safetensors"', 4, "files of mine:7b", ".gguf"),
            ("Q4_K_M =", "q4_k_m =", 4, "files of mine:7b", "Q4_K_M"),
            ('{ Q4_K_M = "Mine-7B-Q4_K_M*.gguf" }', "{}", 4, "files of mine:7b", "quants"),
            ("7_000_000_000", '"7B"', 5, "parameters of mine:7b is '7B'", "whole number"),
            ("7_000_000_000", "0", 5, "parameters of mine:7b is 0", "positive"),
            ("7_000_000_000", "7e9", 5, "parameters of mine:7b", "whole number"),
            ("32_768", "true", 6, "context of mine:7b is True", "whole number"),
            ('"MIT"', '" "', 7, "licence of mine:7b", "text in quotes"),
            ('["chat"]', '["chat", "cook"]', 8, "roles of mine:7b", ", ".join(ROLES)),
            ('["chat"]', '["chat", "chat"]', 8, "roles of mine:7b", "each once"),
            ('["chat"]', '"chat"', 8, "roles of mine:7b is 'chat'", "list"),
            ('"middle"', '"huge"', 9, "tier of mine:7b is 'huge'", "small, middle, large"),
            ('"middle"', '"middle"\nchecked = "2026-11-23"', 10, "checked of mine:7b", "without quotes"),
            ('"middle"', '"middle"\nchecked = 2026-11-23T10:00:00', 10, "checked of mine:7b", "without quotes"),
            ('"middle"', '"middle"\nsource = []', 10, "source of mine:7b", "list of texts"),
            ('"middle"', '"middle"\ndraft = ["lama3.2:1b"]', 10, "'lama3.2:1b', to draft for mine:7b, is no entry", "llama3.2:1b"),
            ('"middle"', '"middle"\ndraft = ["llama3.3:70b"]', 10, "llama3.3:70b is no smaller than mine:7b", "smaller"),
            ('"middle"', '"middle"\ndraft = ["mine:7b"]', 10, "mine:7b is no smaller than mine:7b", "smaller"),
            ('"middle"', '"middle"\nactive_parameters = 8_000_000_000', 10, "more active parameters", "smaller number"),
            ("mine:7b", "Mine:7b", 2, "'Mine:7b' is not a name", "small letters"),
            ("mine:7b", "mine:7b:Q4", 2, "'mine:7b:Q4' is not a name", "name:tag"),
            ("mine:7b", "../mine", 2, "'../mine' is not a name", "name:tag"),
            ('"middle"', '"middle"\n[model."a:b"]\nrepo = "c/d"', 10, "'model' is not part of a catalogue", "[models."),
            ('"middle"', '"middle"\n[models]\nother = 7', 11, "other is not a table", "[table]"),
            ('"middle"', '"middle"\n[default_tags]\nmine = "8b"', 11, "mine:8b is no entry", "choose one of mine:7b"),
            ('"middle"', '"middle"\n[default_tags]\nmine = 7', 11, "the default tag of mine is 7", "as a text"),
        ],
    )
    def test_the_line_and_the_way_out(self, user_file: Path, old: str, new: str, line: int, what: str, hint: str) -> None:
        assert MINE.count(old) == 1
        error = broken(user_file, MINE.replace(old, new))
        assert f", line {line}: " in error.message
        assert what in error.message
        assert hint in error.hint

    @pytest.mark.parametrize(
        "text, line, what",
        [
            (MINE + MINE, 11, "Cannot declare"),
            (MINE + 'licence = "GPL"\n', 10, "Cannot overwrite"),
            (MINE + "note = \n", 10, "Invalid value"),
            (MINE + 'note = "never closed\n\n', 10, "Illegal character"),
            (MINE + 'note = """never closed\n\n', 10, "Unterminated string"),
        ],
    )
    def test_broken_toml(self, user_file: Path, text: str, line: int, what: str) -> None:
        error = broken(user_file, text)
        assert f", line {line}: {what}" in error.message
        assert "(at" not in error.message

    def test_an_overlay_is_blamed_for_what_it_changed(self, user_file: Path) -> None:
        error = broken(user_file, '\n\n[models."phi4:14b"]\ndraft = [\n  "phi4:1b",\n]\n')
        assert ", line 4: 'phi4:1b', to draft for phi4:14b, is no entry" in error.message

    @pytest.mark.parametrize("content", [b"\xff\xfe", None])
    def test_unreadable(self, user_file: Path, content: bytes | None) -> None:
        user_file.parent.mkdir()
        user_file.mkdir() if content is None else user_file.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot read") as caught:
            load_catalog(user_file)
        assert str(user_file) in caught.value.message

    @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_the_line_is_right_in_any_layout(self, tmp_path: Path, data: st.DataObject) -> None:
        fields = ["repo", "files", "parameters", "context", "licence", "roles", "tier", "note"]
        values = {
            "repo": ['"a/b"', "'a/b'"],
            "files": ['{ Q8_0 = "x*.gguf" }', '{ Q4_K_M = "a.gguf", Q8_0 = "[models]*.gguf" }'],
            "parameters": ["7_000", "0x1F"],
            "context": ["1024", "2_048 # tokens"],
            "licence": ['"MIT"', '"""\n[models."m0:a"]\ncontext = 1\n"""'],
            "roles": ['["chat"]', '[\n  "chat",\n\n  # why\n  "small",\n]'],
            "tier": ['"small"', "'large'"],
            "note": ['"n"', "'''a\n\n'b' = 1'''"],
        }
        entries = data.draw(st.integers(1, 4))
        bad = data.draw(st.integers(0, entries - 1)), data.draw(st.sampled_from(fields))
        text, line = "", 0
        for number in range(entries):
            text += data.draw(st.sampled_from(["", "\n", "# a comment with [models] in it\n\n"]))
            header = data.draw(st.sampled_from(['[models."m{}:a"]', "[ models . 'm{}:a' ]", '[models."m\\u0{:03x}:a"]']))
            text += header.format(0x30 + number if "\\u" in header else number) + "\n"
            for name in data.draw(st.permutations(fields)):
                text += data.draw(st.sampled_from(["", "\n", "  # note = 5\n"]))
                if bad == (number, name):
                    line = text.count("\n") + 1
                value = "[[1]]" if bad == (number, name) else data.draw(st.sampled_from(values[name]))
                text += f"  {name} = {value}\n"
        file = tmp_path / "models.toml"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_catalog(file)
        assert caught.value.message.startswith(f"{file}, line {line}: {bad[1]} of m{bad[0]}:a")


def test_loading_pulls_in_nothing_heavy() -> None:
    code = """
import json, sys
from localllm.catalog import load_catalog
load_catalog()
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pydantic", "huggingface_hub", "llama_cpp", "typer", "numpy", "tomlkit"} & set(json.loads(done.stdout))
