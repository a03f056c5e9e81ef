"""Settings: one precedence, unknown keys refused, secrets never shown, flags derived from the fields."""

from typing import get_args, get_origin

import pytest
from typer.testing import CliRunner

from pomona.cli.build import startup_adapters
from pomona.cli.config import AppConfig, format_config, load_config
from pomona.cli.main import app
from pomona.core.errors import ConfigError
from pomona.runner import memory

LISTS = {
    name: (get_args(field.annotation)[0], "8" if get_args(field.annotation)[0] is int else "a=./b")
    for name, field in AppConfig.model_fields.items()
    if get_origin(field.annotation) is tuple
}
"""Every setting that is a list: the type of its items, and an item as people write it."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("POMONA_PORT", raising=False)


def print_config(*arguments):
    result = CliRunner().invoke(app, ["serve", *arguments, "--print-config"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_flags_beat_environment_beats_file_beats_defaults(monkeypatch, tmp_path):
    file = tmp_path / "pomona.toml"
    file.write_text("port = 1\nmax_num_seqs = 11\nblock_size = 8\n")
    monkeypatch.setenv("POMONA_PORT", "2")
    monkeypatch.setenv("POMONA_MAX_NUM_SEQS", "22")
    config = load_config({"port": 3}, file)
    assert (config.port, config.max_num_seqs, config.block_size, config.max_waiting) == (3, 22, 8, 1024)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 70000}, "port"),
        ({"dtype": "int3"}, "dtype"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"gpu_memory_fraction": 1.5}, "gpu_memory_fraction"),
        ({"num_threads": 1025}, "num_threads.*1024.*1025"),
        ({"kv_cache_bytes": "lots"}, "kv_cache_bytes"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_a_wrong_setting_is_named(flags, named):
    with pytest.raises(ConfigError, match=named):
        load_config(flags)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_may_be_one_value_wherever_it_comes_from(name, monkeypatch, tmp_path):
    kind, item = LISTS[name]
    expected = (kind(item),)
    assert getattr(load_config({name: item}), name) == expected
    assert getattr(load_config({name: kind(item)}), name) == expected
    file = tmp_path / "pomona.toml"
    for text in (f'"{item}"', f'["{item}"]'):
        file.write_text(f"{name} = {text}\n")
        assert getattr(load_config({}, file), name) == expected
    variable = f"POMONA_{name.upper()}"
    for text, several in ((item, expected), (f' ["{item}", "{item}"]', expected * 2), ("[]", ()), ("", ())):
        monkeypatch.setenv(variable, text)
        assert getattr(load_config({}), name) == several
    monkeypatch.setenv(variable, '["a')
    with pytest.raises(ConfigError, match=rf"{name} \(environment variable {variable}\): must be one value, or a JSON"):
        load_config({})


def test_an_error_says_where_the_value_came_from(monkeypatch, tmp_path):
    file = tmp_path / "pomona.toml"
    file.write_text("port = 70000\n")
    with pytest.raises(ConfigError, match=r"port \(--config .*pomona.toml\): .*70000"):
        load_config({}, file)
    monkeypatch.setenv("POMONA_PORT", "many")
    with pytest.raises(ConfigError, match=r"port \(environment variable POMONA_PORT\): .*'many'"):
        load_config({}, file)
    with pytest.raises(ConfigError, match=r"^port: .*-1"):
        load_config({"port": -1}, file)
    file.write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match=r"--config .*pomona\.toml"):
        load_config({}, file)


def test_unknown_keys_in_file_and_environment_are_refused(monkeypatch, tmp_path):
    file = tmp_path / "pomona.toml"
    file.write_text('api_kee = "very-secret"\n')
    with pytest.raises(ConfigError, match=r"^api_kee \(--config .*\) is not a setting; see `pomona serve --help`$"):
        load_config({}, file)
    file.write_text("port = = 1\n")
    with pytest.raises(ConfigError, match=r"pomona\.toml"):
        load_config({}, file)
    monkeypatch.setenv("POMONA_PORTT", "1")
    with pytest.raises(ConfigError, match="POMONA_PORTT"):
        load_config({})


def test_print_config_prints_a_file_that_gives_the_same_settings(tmp_path):
    arguments = ["some/model", "--port", "9", "--adapter", "a=/b", "--adapter", "c=/d", "--kv-cache-bytes", "2GiB"]
    printed = print_config(*arguments, "--no-prefix-cache")
    file = tmp_path / "pomona.toml"
    file.write_text(printed)
    config = load_config({}, file)
    assert config == AppConfig(
        model="some/model", port=9, adapter=("a=/b", "c=/d"), kv_cache_bytes=2 * 2**30, prefix_cache=False
    )
    assert format_config(config) == printed


def test_print_config_prints_toml_whatever_the_values_are(tmp_path):
    values = {"step_timeout_s": float("inf"), "served_model_name": "caf\u00e9 \N{RED APPLE}", "max_step_s": 1e-5}
    config = load_config(values)
    file = tmp_path / "pomona.toml"
    file.write_text(format_config(config), encoding="utf-8")
    assert load_config({}, file) == config


@pytest.mark.parametrize("key", ["", " ", "sk-x\n", "sk-schlüssel"])
def test_an_api_key_that_no_client_can_send_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("POMONA_API_KEY", key)
    with pytest.raises(ConfigError, match=r"api_key .*POMONA_API_KEY\): must be printable") as caught:
        load_config({})
    assert "sk-" not in str(caught.value)


def test_the_api_key_is_never_shown(monkeypatch):
    monkeypatch.setenv("POMONA_API_KEY", "very-secret")
    assert "very-secret" not in print_config()
    assert "very-secret" not in repr(load_config({}))


def test_every_setting_has_a_flag_and_a_description():
    output = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for name, field in AppConfig.model_fields.items():
        assert field.description
        if name != "model":
            assert f"--{name.replace('_', '-')}" in output


def test_descriptions_say_what_is_done():
    described = {name: field.description for name, field in AppConfig.model_fields.items()}
    assert "every route but /health and /ready" in described["api_key"]
    assert "a URL may have an index.json instead" in described["adapters_dir"]
    assert (memory._CPU_FRACTION, memory._ADAPTER_FRACTION) == (1 / 2, 1 / 5)
    assert f"a fifth, at most {memory._MAX_ADAPTER_BYTES // 2**30}GiB" in described["adapter_bytes"]
    assert "half of the free host memory" in described["adapter_bytes"]
    assert "ADAPTER_BYTES" in described["kv_cache_bytes"]


@pytest.mark.parametrize("command", [[], ["serve"], ["demo"], ["chat"], ["adapters", "add"], ["bench", "serve"]])
def test_help_shows_an_example(command):
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert not command or f"pomona {' '.join(command)}" in result.output.split("Usage:")[1].split("\n", 1)[1]


def test_adapters_named_and_found_in_folders_load_at_start_in_order(tmp_path):
    for name in ("b", "a", "not-an-adapter"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    config = load_config({"model": "m", "adapter": ["x=/path=with=equals"], "adapters_dir": [str(tmp_path)]})
    found = startup_adapters(config)
    assert [(adapter.name, adapter.is_required) for adapter in found] == [("x", True), ("a", False), ("b", False)]
    assert found[0].source == "/path=with=equals"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"adapter": ["nameless"]}, "nameless"),
        ({"adapter": ["=path"]}, "=path"),
        ({"adapter": ["a=x", "a=y"]}, "'a'"),
        ({"adapters_dir": ["/no/such/folder"]}, "/no/such/folder"),
    ],
)
def test_adapters_given_wrongly_are_named(flags, named):
    with pytest.raises(ConfigError, match=named):
        startup_adapters(load_config({"model": "m", **flags}))
