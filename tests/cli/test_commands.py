"""Commands that talk to a server, against one that writes down what it was asked."""

import asyncio
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from pomona import __version__
from pomona.accounts.accounts import Accounts
from pomona.accounts.config import AccountsConfig
from pomona.adapters.digest import adapter_digest
from pomona.adapters.sources import read_files
from pomona.cli import bench, demo, main, serve
from pomona.cli.ceilings import CeilingsConfig, measure
from pomona.cli.config import load_config
from pomona.cli.hub import bundled_dir
from pomona.cli.main import app
from pomona.cli.serve import Running
from pomona.core import machine
from pomona.core.errors import ConfigError, PomonaError

CARD = {"name": "legal", "state": "ready", "lora_rank": 8, "id": "0" * 64}
CHUNK = {"choices": [{"delta": {"content": "ananab"}}], "usage": {"completion_tokens": 3}}


@dataclass
class Server:
    """Answers everything with the same bytes."""

    url: str = ""
    api_key: str | None = None
    """Whoever sends no other is refused."""
    answer: bytes = b'{"data": [], "has_more": false}'
    num_missing_bytes: int = 0
    """The answer breaks off so many bytes before what was announced."""
    asked: list[tuple[str, str, str | None, Any]] = field(default_factory=list)
    """Method, path, authorization, body."""


@pytest.fixture
def server():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            num_bytes = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(num_bytes)) if num_bytes else None
            given = self.headers.get("authorization")
            state.asked.append((self.command, self.path, given, body))
            is_refused = state.api_key is not None and given != f"Bearer {state.api_key}"
            answer = b'{"error": {"message": "The API key is wrong."}}' if is_refused else state.answer
            self.send_response(401 if is_refused else 200)
            self.send_header("content-length", str(len(answer) + state.num_missing_bytes))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_PUT = do_GET

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("POMONA_API_KEY", "POMONA_DATA_DIR", "POMONA_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)


def pomona(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, PomonaError):
        raise result.exception  # which is one line for people
    assert result.exit_code == 0, result.output
    return result.output


def test_the_api_key_may_come_from_the_environment(server, monkeypatch):
    server.api_key = "from-env"
    with pytest.raises(PomonaError, match=r"The API key is wrong\."):
        pomona("adapters", "list", "--url", server.url)
    monkeypatch.setenv("POMONA_API_KEY", "from-env")
    for command in (["adapters", "list"], ["tenants", "list"], ["keys", "list"]):
        pomona(*command, "--url", server.url)
    server.api_key = "from-flag"
    pomona("adapters", "list", "--url", server.url, "--api-key", "from-flag")


def test_usage_is_written_to_a_file(server, tmp_path):
    server.answer = b"tenant,tokens\nacme,3\n"
    rows = tmp_path / "rows.csv"
    assert pomona("tenants", "usage", "--output", rows, "--start", "2026-11-01", "--url", server.url) == f"{rows}\n"
    assert rows.read_bytes() == server.answer
    assert server.asked == [("GET", "/v1/usage?start=2026-11-01&format=csv", None, None)]
    with pytest.raises(ConfigError, match="--group-by day: must be left out with --output"):
        pomona("tenants", "usage", "--output", rows, "--group-by", "day", "--url", server.url)


@pytest.mark.parametrize("name", ["rows.txt", "rows", "no-such-folder/rows.csv"])
def test_usage_goes_only_where_it_can(server, tmp_path, name):
    with pytest.raises(ConfigError, match=rf"--output .*{name}: must be a \.csv or \.parquet file"):
        pomona("tenants", "usage", "--output", tmp_path / name, "--url", server.url)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.csv cannot be written: Is a directory"):
        pomona("tenants", "usage", "--output", tmp_path / "folder.csv", "--url", server.url)


def test_usage_that_does_not_come_whole_leaves_no_file(server, tmp_path):
    rows = tmp_path / "rows.csv"
    with pytest.raises(PomonaError, match="nothing answers at"):
        pomona("tenants", "usage", "--output", rows, "--url", "http://127.0.0.1:9")
    server.num_missing_bytes = 5
    with pytest.raises(PomonaError, match=server.url):
        pomona("tenants", "usage", "--output", rows, "--url", server.url)
    server.num_missing_bytes, server.api_key = 0, "secret"
    with pytest.raises(PomonaError, match=r"The API key is wrong\."):
        pomona("tenants", "usage", "--output", rows, "--url", server.url)
    assert not rows.exists()


def test_an_adapter_is_added_for_a_tenant(server):
    server.answer = json.dumps(CARD).encode()
    pomona("adapters", "add", "legal", "org/legal", "--tenant", "acme", "--url", server.url)
    pomona("adapters", "add", "legal", "org/legal", "--url", server.url)
    assert [body for *_, body in server.asked] == [
        {"name": "legal", "source": "org/legal", "tenant": "acme"},
        {"name": "legal", "source": "org/legal"},
    ]


def test_help_says_what_adapters_list_shows_and_from_where_adapters_may_be_added():
    shown = pomona("adapters", "list", "--help")
    assert "features" not in shown
    assert "source" not in shown
    shown = pomona("adapters", "add", "--help")
    for flag in ("--adapters-dir", "--allowed-adapter-root", "--allow-hub-adapters"):
        assert flag in shown


def test_the_first_key_is_made_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POMONA_DATA_DIR", "~/data")
    assert pomona("keys", "admin").startswith("pk-")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_demo_sends_the_servers_key_and_shows_answers_whole_but_not_the_key(server, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    server.api_key = "very-secret"
    server.answer = f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n".encode()
    adapters = SimpleNamespace(entries=[SimpleNamespace(name="reverse", info=SimpleNamespace(lora_rank=16))])
    running = Running(server.url, "pippin", adapters)  # type: ignore[arg-type]
    monkeypatch.setattr(demo, "run_server", lambda config, show: asyncio.run(show(running)))
    demo.run_demo(load_config({"api_key": "very-secret"}))
    shown = capsys.readouterr().out
    assert "4 requests" in shown
    line = next(line for line in shown.splitlines() if "reverse" in line and "banana" in line)
    assert "ananab" in line and line.endswith("Writes the word backwards.")
    assert "Bearer KEY" in shown
    assert "very-secret" not in shown


def test_a_spawned_server_asks_for_the_key_that_is_sent(monkeypatch):
    started = []
    process = SimpleNamespace(send_signal=lambda number: None, wait=lambda timeout: 0)

    def start(command, env):
        assert "k1" not in command  # others could read it
        started.append(env.get("POMONA_API_KEY"))
        return process

    monkeypatch.setattr(bench.subprocess, "Popen", start)
    monkeypatch.setattr(bench, "_wait_until_ready", lambda url, process: None)
    sent = []
    monkeypatch.setattr(bench, "run_bench", lambda config: sent.append(config.api_key))
    pomona("bench", "serve", "--spawn", "--api-key", "k1")
    monkeypatch.setenv("POMONA_API_KEY", "k2")
    pomona("bench", "serve", "--spawn")
    assert started == sent == ["k1", "k2"]


def test_a_spawned_server_ends_with_a_benchmark_that_is_terminated(monkeypatch):
    sent = []
    process = SimpleNamespace(send_signal=sent.append, wait=lambda timeout: 0)
    monkeypatch.setattr(bench.subprocess, "Popen", lambda command, env: process)
    monkeypatch.setattr(bench, "_wait_until_ready", lambda url, process: None)
    monkeypatch.setattr(bench, "run_bench", lambda config: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # or the tests would end, too
    assert app(["bench", "serve", "--spawn"], standalone_mode=False) == 130
    assert sent == [signal.SIGINT]
    signal.signal(signal.SIGTERM, before)


def test_a_server_on_this_machine_is_not_asked_through_the_proxy_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server.answer = b"data: " + json.dumps(CHUNK).encode() + b"\n\ndata: [DONE]\n\n"
    answers, _ = asyncio.run(demo.ask_all(server.url, "base", ["reverse"]))
    assert {answer.text for answer in answers} == {"ananab"}
    bench._wait_until_ready(server.url, SimpleNamespace(poll=lambda: None))
    with pytest.raises(PomonaError, match=r"no answer from http://127\.0\.0\.1:9: "):
        asyncio.run(demo.ask_all("http://127.0.0.1:9", "base", []))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "ftp://x"], "--url is 'ftp://x': must be"),
        (["--rate", "0"], "--rate is 0.0: must be positive, or inf"),
        (["--popularity", "base,base"], "--popularity is base, base: must name each once"),
        (["--prompt-tokens", "0"], "--prompt-tokens '0': num_tokens is 0: must be"),
        (["--output-tokens", "5-3"], "--output-tokens '5-3': max_tokens is 3: must be"),
        (["--slo-ttft-ms", "-1"], "--slo-ttft-ms, in seconds, is -0.001: must be"),
        (["--url", "http://127.0.0.1:9"], "--url: no answer from http://127.0.0.1:9/v1/models"),
    ],
)
def test_what_is_wrong_with_a_benchmark_is_said_of_its_options(arguments, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        app(["bench", "serve", *arguments], standalone_mode=False)


def test_without_affinity_as_on_macos_all_cores_are_used(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)  # without a container's limits
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    pomona("adapters", "inspect", bundled_dir() / "adapters" / "reverse", "--model", "pippin")
    measure(CeilingsConfig(device="cpu", num_runs=1, run_s=0.001, is_small=True))
    assert asked == [os.cpu_count()] * 2


def test_tables_show_what_others_wrote_as_it_is(server, tmp_path):
    words = "layers.[qv]_proj [/x] :apple:"
    folder = shutil.copytree(bundled_dir() / "adapters" / "reverse", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    changed = {"target_modules": words, "base_model_name_or_path": words}
    (folder / "adapter_config.json").write_text(json.dumps(config | changed))
    assert pomona("adapters", "inspect", folder).count(words) == 2
    key = {"prefix": "pk-1", "tenant": "acme", "role": None, "name": words, "created_at": 1.0}
    server.answer = json.dumps({"data": [key | {"expires_at": None, "revoked_at": None}]}).encode()
    assert words in pomona("keys", "list", "--url", server.url)
    tenant = {"id": "acme", "weight": 1.0, "priority": "standard", "prefix_group": words, "is_disabled": False}
    server.answer = json.dumps({"data": [tenant]}).encode()
    assert words in pomona("tenants", "list", "--url", server.url)


def test_tables_cut_nothing_short_however_narrow_the_terminal(server, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    folder = bundled_dir() / "adapters" / "leet"  # it saves a module, which makes the first column wider
    assert adapter_digest(read_files(str(folder))) in pomona("adapters", "inspect", folder)
    key = {"prefix": "pk-a1b2c3d4e5f6", "tenant": "acme", "role": None, "name": "the-website", "created_at": 1.0}
    server.answer = json.dumps({"data": [key | {"expires_at": 2.0, "revoked_at": 3.0}]}).encode()
    (line,) = (line for line in pomona("keys", "list", "--url", server.url).splitlines() if key["prefix"] in line)
    assert "the-website" in line
    counts = dict.fromkeys(("version", "num_requests", "num_waiting", "num_hits", "num_loads", "num_evictions"), 0)
    card = CARD | counts | {"name": "legal-contracts-v2", "state": "registered", "pinned": False}
    card |= {"num_host_bytes": None, "last_used": None, "error": "adapter_config.json: r: is 0"}
    server.answer = json.dumps({"data": [card], "has_more": False}).encode()
    line = pomona("adapters", "list", "--url", server.url).splitlines()[-1]
    assert line.split()[:2] == ["legal-contracts-v2", "registered"]
    assert line.endswith("adapter_config.json: r: is 0")


def test_a_log_that_is_no_terminal_has_a_line_for_each_message():
    words = (
        "Adapter legal cannot be brought in: " + "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight " * 3
    )
    log = io.StringIO()
    handler = serve.log_handler(Console(file=log, width=40))
    handler.handle(logging.LogRecord("pomona", logging.WARNING, "adapter_loading.py", 1, words, None, None))
    (line,) = log.getvalue().splitlines()
    assert line.endswith(f" WARNING {words}")


def test_a_port_in_an_error_is_no_emojis_code(monkeypatch, capsys):
    def fail():
        raise ConfigError("cannot listen on 127.0.0.1:1234: [in use]")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == "error: cannot listen on 127.0.0.1:1234: [in use]\n"


def test_only_minus_one_lifts_a_limit(server):
    names = ("requests_per_minute", "tokens_per_minute", "max_concurrency", "monthly_tokens", "monthly_cost")
    server.answer = json.dumps(dict.fromkeys(names, 600)).encode()
    with pytest.raises(PomonaError, match="requests_per_minute is -600: must be 0 or larger, or -1 to lift the limit"):
        pomona("tenants", "limits", "acme", "--requests", "-600", "--url", server.url)
    assert server.asked == []
    pomona("tenants", "limits", "acme", "--requests", "-1", "--url", server.url)
    assert server.asked[-1][3] == dict.fromkeys(names, 600) | {"requests_per_minute": None}


def test_a_data_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for name in ("file", "file/below"):
        with pytest.raises(ConfigError, match=rf"data_dir '.*{name}': cannot be made: .*; name another folder"):
            pomona("keys", "admin", "--data-dir", tmp_path / name)
        with pytest.raises(ConfigError, match="data_dir"):
            Accounts(AccountsConfig(tmp_path / name))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"accounts": True, "api_key": "x"}, "api_key and accounts"),
        ({"target": ["foo"]}, "target 'foo': must be"),
        ({"accounts": True, "database_url": "mysql://x"}, "database_url: must begin"),
        ({"accounts": True, "data_dir": "/dev/null/x"}, "data_dir '/dev/null/x': cannot be made"),
    ],
)
def test_settings_are_refused_before_the_model_is_loaded(monkeypatch, tmp_path, wrong, said):
    def load(_):
        pytest.fail("loading began")

    monkeypatch.setattr(serve, "engine_builder", load)
    with pytest.raises(ConfigError, match=said):
        serve.run_server(load_config({"port": 0, "data_dir": str(tmp_path), **wrong}))


@pytest.mark.parametrize(("max_waiting", "max_choices"), [(4, 4), (1024, 256)])
def test_no_request_has_more_choices_than_the_queue_takes(max_waiting, max_choices):
    assert serve._server_config(load_config({"max_waiting": max_waiting})).max_choices == max_choices


def test_the_line_of_a_server_that_is_ready_shows_addresses_and_names_as_they_are():
    running = Running("http://[fd00::1]:8000", "llama[int4]", SimpleNamespace(entries=["reverse"]))
    shown = Text.from_markup(serve.ready_line(running), emoji=False).plain
    assert shown.startswith("Ready at http://[fd00::1]:8000: llama[int4] and 1 adapters. ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["adapters", "list", "--url", "http://localhost:80a"], "--url 'http://localhost:80a': Invalid port"),
        (["adapters", "list", "--api-key", "k\N{RIGHT DOUBLE QUOTATION MARK}"], "--api-key: holds characters that"),
        (["chat", "hello", "--model", "m", "--temperature", "inf"], "this cannot be asked of a server: .* not JSON"),
        (["tenants", "price", "--input", "nan", "--output", "1"], "this cannot be asked of a server: .* not JSON"),
    ],
)
def test_what_cannot_be_asked_of_a_server_is_one_line(server, arguments, said):
    at = [] if "--url" in arguments else ["--url", server.url]
    with pytest.raises(PomonaError, match=said):
        pomona(*arguments, *at)


def test_the_package_can_be_run_as_a_module():
    done = subprocess.run([sys.executable, "-m", "pomona", "version"], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == __version__, done.stderr
