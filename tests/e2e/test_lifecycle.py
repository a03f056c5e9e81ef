"""A live server over time: adapters replaced and unloaded under load, the engine killed, wrong starts."""

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from support.adapters import make_adapter
from support.live import live_server

PROMPT = {"prompt": "The quick brown fox", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


def complete(server, model, **options):
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": model, **PROMPT, **options}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def load(server, name, source):
    answer = httpx.post(f"{server.url}/v1/adapters", json={"name": name, "source": str(source)}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def versions(adapters_dir, base_path):
    paths = [make_adapter(adapters_dir / f"version-{seed}", base_path, seed=900 + seed) for seed in range(2)]
    yield paths
    for path in paths:
        shutil.rmtree(path)


def test_weights_replaced_under_a_name_answer_at_once_and_in_flight_requests_finish_on_the_old(server, versions):
    load(server, "nightly", versions[0])
    old = complete(server, "nightly")
    long_answers = []
    threads = [
        threading.Thread(target=lambda: long_answers.append(complete(server, "nightly", max_tokens=200)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while server.metric("pomona_running_requests") == 0:
        time.sleep(0.01)
    second = load(server, "nightly", versions[1])
    new = complete(server, "nightly")
    for thread in threads:
        thread.join()
    assert second["version"] == 2
    assert new != old
    assert complete(server, "nightly") == new
    assert all(text.startswith(old) for text in long_answers)
    assert len(set(long_answers)) == 1
    httpx.delete(f"{server.url}/v1/adapters/nightly", timeout=60).raise_for_status()


def test_an_unloaded_adapter_is_gone_and_its_pages_are_free(server, versions):
    complete(server, "adapter-0")
    pages = server.metric("pomona_adapter_pages_used")
    load(server, "short-lived", versions[0])
    complete(server, "short-lived")
    assert server.metric("pomona_adapter_pages_used") > pages
    httpx.delete(f"{server.url}/v1/adapters/short-lived", timeout=60).raise_for_status()
    server.wait_until("pomona_adapter_pages_used", pages)
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "short-lived", **PROMPT})
    assert answer.status_code == 404
    assert httpx.delete(f"{server.url}/v1/adapters/short-lived").status_code == 404


def test_what_the_http_library_logs_has_a_date_and_a_level_too(server):
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert b"400" in connection.recv(100)
    (line,) = (line for line in server.log.read_text().splitlines() if "Invalid HTTP request" in line)
    assert re.match(r"\d{4}-\d\d-\d\d .* WARNING ", line)


def test_a_killed_engine_fails_its_requests_and_comes_back_with_its_adapters(base_path, adapters_dir, tmp_path):
    arguments = [str(base_path), "--adapters-dir", str(adapters_dir), "--dtype", "float32"]
    with live_server(arguments, tmp_path / "log") as server:
        expected = complete(server, "adapter-3")
        ends = []

        def ask():
            body = {"model": "adapter-3", **PROMPT, "max_tokens": 400}
            ends.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=120))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while server.metric("pomona_running_requests") < 4:
            time.sleep(0.01)
        os.kill(server.engine_pid(), signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in ends} <= {500, 503}
        assert all(answer.json()["error"]["message"] for answer in ends)
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert "restart" in health.json()["engine"]
        give_up_s = time.monotonic() + 60
        while httpx.get(f"{server.url}/ready").status_code != 200:
            assert time.monotonic() < give_up_s
            time.sleep(0.1)
        assert complete(server, "adapter-3") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_streams_with_an_error_that_their_clients_get(tmp_path, number):
    body = {"model": "pippin", **PROMPT, "max_tokens": 2000, "stream": True}
    with (
        live_server([], tmp_path / "log") as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(number)
        for _ in range(100):  # the first was heard before the second comes
            next(lines)
        server.process.send_signal(number)
        events = [line for line in lines if line]
    assert "shutting down" in events[-2] and events[-1] == "data: [DONE]"
    assert "Traceback" not in server.log.read_text()


ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_a_signal_while_the_model_is_loaded_ends_the_server_and_leaves_nothing_behind(
    base_path, tmp_path, number, status
):
    command = [sys.executable, "-m", "pomona", "serve", str(base_path), "--port", "0"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background do not
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=heed, env=environment) as process,
    ):
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while not (engine := children.read_text()):
                time.sleep(0.01)
            process.send_signal(number)
            assert process.wait(timeout=60) == status
        finally:
            process.kill()
    assert not Path(f"/proc/{engine.strip()}").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_a_signal_while_the_command_is_imported_ends_it_quietly(tmp_path, number, status):
    (tmp_path / "typer.py").write_text(f"import signal\nsignal.raise_signal({int(number)})\n")
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background do not
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "pomona", "version"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        preexec_fn=heed,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_command_whose_standard_files_are_closed_gives_their_numbers_to_nothing_else(tmp_path):
    """libuv would abort the server."""
    (tmp_path / "typer.py").write_text("import os\nnumber = os.open(os.devnull, os.O_RDONLY)\nos._exit(number)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "pomona", "version"]
    done = subprocess.run(
        command, timeout=60, env=environment, preexec_fn=functools.partial(os.closerange, 0, 3), check=False
    )
    assert done.returncode > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/model"], "/no/such/model"),
        (["org/model-that-is-not-cached"], "hub"),
        (["{base}", "--kv-cache-bytes", "1KiB"], "kv_cache_bytes"),
        (["{base}", "--config", "/no/such/file.toml"], "/no/such/file.toml"),
        # Without weights: minutes of reading them are not spent before these are said.
        (["{bare}", "--adapter", "x=/no/such/adapter"], "'x' from '/no/such/adapter'"),
        (["{bare}", "--adapter", "no-equals-sign"], "NAME=PATH"),
        (["{bare}", "--adapter", "bare={bare}"], "another name than the base model's"),
        (["{bare}", "--adapters-dir", "/no/such/folder"], "/no/such/folder"),
        (["{bare}", "--max-model-len", "100000"], "max_model_len"),
        (["{bare}", "--device", "abacus"], "device"),
    ],
)
def test_a_server_started_wrongly_says_why_in_one_line_and_exits_1(base_path, tmp_path, arguments, message):
    bare = shutil.copytree(base_path, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    filled = [argument.replace("{base}", str(base_path)).replace("{bare}", str(bare)) for argument in arguments]
    command = [sys.executable, "-m", "pomona", "serve", *filled, "--port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert message in last
