from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from localllm.engine.config import EngineConfig
from localllm.errors import ConfigError
from localllm.paths import directories
from localllm.settings import Settings, load, read_file, set_value, template, unset_value


@pytest.fixture
def file(home: Path) -> Path:
    home.mkdir()
    return home / "config.toml"


def env(home: Path, **variables: str) -> dict[str, str]:
    return {"LOCALLLM_HOME": str(home), **variables}


def test_without_anything_the_defaults_hold(home: Path) -> None:
    loaded = load(env=env(home))
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {"default"}
    assert not home.exists(), "reading creates nothing"


def test_defaults_are_those_of_the_engine() -> None:
    options = Settings().engine_options()
    defaults = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    assert options == {name: defaults[name] for name in options}
    assert EngineConfig("x.gguf", **options) == EngineConfig("x.gguf")


def test_each_layer_overrides_the_next(home: Path, file: Path) -> None:
    file.write_text("n_ctx = 10\nn_seq = 10\nn_threads = 10\ncolor = true\n")
    variables = env(home, LOCALLLM_N_CTX="20", LOCALLLM_N_SEQ="20", NO_COLOR="1")
    loaded = load({"n_ctx": 30, "n_threads": None}, variables)
    assert (loaded.settings.n_ctx, loaded.origins["n_ctx"]) == (30, "flag")
    assert (loaded.settings.n_seq, loaded.origins["n_seq"]) == (20, "LOCALLLM_N_SEQ")
    assert (loaded.settings.n_threads, loaded.origins["n_threads"]) == (10, str(file))
    assert loaded.settings.color, "the file wins over another tool's variable"
    file.write_text("")
    loaded = load({}, variables)
    assert (loaded.settings.color, loaded.origins["color"]) == (False, "NO_COLOR")
    assert load({}, env(home, NO_COLOR="")).settings.color, "https://no-color.org: empty does not count"


def test_an_empty_variable_is_not_set(home: Path) -> None:
    assert load(env=env(home, LOCALLLM_N_CTX="")).origins["n_ctx"] == "default"


def test_unknown_variables_are_reported_not_fatal(home: Path) -> None:
    assert load(env=env(home, LOCALLLM_NCTX="1", LOCALLLM_DEBUG="1", OTHER="1")).ignored == ("LOCALLLM_NCTX",)


def test_unknown_key_in_the_file_names_file_key_and_neighbours(home: Path, file: Path) -> None:
    file.write_text("n_thread = 4\n")
    with pytest.raises(ConfigError) as caught:
        load(env=env(home))
    assert str(file) in caught.value.message
    assert "n_thread" in caught.value.message
    assert "n_threads" in caught.value.hint


def test_unknown_flag_is_an_error(home: Path) -> None:
    with pytest.raises(ConfigError, match="flag: speed is no setting"):
        load({"speed": 1}, env(home))


@pytest.mark.parametrize(
    "text", ["n_seq = 0", "n_seq = 'many'", "n_seq = 1.5", "flash_attn = 'maybe'", "cache_ram_bytes = -1", "model = ''"]
)
def test_a_bad_value_names_its_origin_and_key(home: Path, file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(env=env(home))
    assert caught.value.message.startswith(f"{file}: {text.split()[0]} = ")
    assert caught.value.hint


def test_a_bad_variable_is_named(home: Path) -> None:
    with pytest.raises(ConfigError, match="^LOCALLLM_N_SEQ: n_seq = 'many': "):
        load(env=env(home, LOCALLLM_N_SEQ="many"))


@pytest.mark.parametrize("content", [b"n_ctx = = 1", b"n_ctx = 1\nn_ctx = 2", b"model = '\xff'", b"[model"])
def test_a_file_that_is_not_toml_is_named(home: Path, file: Path, content: bytes) -> None:
    file.write_bytes(content)
    for read in (lambda: load(env=env(home)), lambda: set_value(file, "n_ctx", "1")):
        with pytest.raises(ConfigError, match="config.toml"):
            read()
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "text, count",
    [("0", 0), ("1024", 1024), ("2GiB", 2 << 30), ("1.5 gib", 3 << 29), ("500 MB", 500_000_000), ("10k", 10_000)],
)
def test_sizes_are_read_with_units(file: Path, text: str, count: int) -> None:
    assert set_value(file, "cache_ram_bytes", text) == count
    assert read_file(file) == {"cache_ram_bytes": count}


@pytest.mark.parametrize("text", ["GiB", "-1", "1 2", "1XB", ""])
def test_a_size_that_makes_no_sense_is_refused(file: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        set_value(file, "cache_ram_bytes", text)
    assert not file.exists()


def test_set_keeps_comments_and_order_and_types(file: Path) -> None:
    file.write_text("# mine\nn_seq = 4  # four\n\nmodel = 'demo' # the small one\n")
    assert set_value(file, "n_seq", "6") == 6
    set_value(file, "color", "false")
    set_value(file, "model", 'with "quotes" and \\ and é')
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# mine\nn_seq = 6  # four\n\nmodel = ")
    assert "# the small one" in text
    assert tomllib.loads(text) == {"n_seq": 6, "model": 'with "quotes" and \\ and é', "color": False}


def test_set_refuses_before_it_writes(file: Path) -> None:
    file.write_text("n_seq = 4\n")
    with pytest.raises(ConfigError, match="n_seq = '0'"):
        set_value(file, "n_seq", "0")
    with pytest.raises(ConfigError, match="n_sek is no setting"):
        set_value(file, "n_sek", "1")
    assert file.read_text() == "n_seq = 4\n"


def test_set_and_unset_repair_a_file_that_load_refuses(home: Path, file: Path) -> None:
    file.write_text("nonsense = 1\nn_seq = 0\n")
    set_value(file, "n_seq", "2")
    assert unset_value(file, "nonsense")
    assert not unset_value(file, "nonsense")
    assert load(env=env(home)).settings.n_seq == 2


def test_the_template_is_the_defaults_once_uncommented(home: Path, file: Path) -> None:
    assert tomllib.loads(template()) == {}
    lines = [line.removeprefix("# ") if " = " in line else line for line in template().splitlines()]
    assert Settings.model_validate(tomllib.loads("\n".join(lines))) == Settings()
    assert "KV cache" in template()


def test_every_setting_has_help() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_directories_follow_the_platform_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = directories({"LOCALLLM_HOME": str(tmp_path)})
    assert told.config_file == tmp_path / "config.toml"
    assert {told.data, told.cache.parent, told.state.parent} == {tmp_path}
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    default = directories({})
    assert default.config.is_absolute()
    assert "localllm" in default.config.parts
    assert default.cache != default.data
