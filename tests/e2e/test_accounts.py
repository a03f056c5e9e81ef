"""``pomona serve --accounts`` and its commands as an operator uses them, from the first key to the bill."""

import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from support.live import live_server


def pomona(*arguments, folder):
    """Run a command; returns what it printed."""
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "pomona", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def ask(server, key, **body):
    content = {"model": "tiny-base", "prompt": "The quick brown fox", "max_tokens": 8, **body}
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=content, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("accounts")


def test_from_the_first_key_to_the_bill(base_path, adapters_dir, folder):
    admin = pomona("keys", "admin", "--data-dir", str(folder / "data"), folder=folder)
    arguments = [str(base_path), "--adapters-dir", str(adapters_dir), "--dtype", "float32", "--accounts"]
    arguments += ["--data-dir", str(folder / "data")]
    log = folder / "server.log"
    with live_server(arguments, log) as server:
        staff = ["--url", server.url, "--api-key", admin]
        assert ask(server, None).status_code == 401
        pomona("tenants", "create", "acme", *staff, folder=folder)
        key = pomona("keys", "create", "acme", "--expires-in", "1d", *staff, folder=folder)
        assert ask(server, key).status_code == 200
        assert ask(server, key, model="adapter-1").status_code == 200
        pomona("tenants", "limits", "acme", "--requests", "2", *staff, folder=folder)
        assert [ask(server, key).status_code for _ in range(3)] == [200, 200, 429]
        # The engine dies in mid-answer: the request is in the bill all the same.
        pomona("tenants", "limits", "acme", "--requests", "-1", *staff, folder=folder)
        os.kill(server.engine_pid(), signal.SIGKILL)
        time.sleep(0.2)
        assert ask(server, key).status_code == 503
        assert "acme" in pomona("tenants", "list", *staff, folder=folder)
        assert key.rsplit("-", 1)[0] in pomona("keys", "list", *staff, folder=folder)
        new = pomona("keys", "rotate", key.rsplit("-", 1)[0], *staff, folder=folder)
        assert ask(server, key).status_code == 401
        pomona("keys", "revoke", new.rsplit("-", 1)[0], *staff, folder=folder)
        assert ask(server, new).status_code == 401
        rows = folder / "rows.csv"
        time.sleep(0.5)
        pomona("tenants", "usage", "--output", str(rows), *staff, folder=folder)
        assert len(rows.read_text().splitlines()) == 1 + 5
    assert not list((folder / "data" / "journal").iterdir())
    for secret in (admin, key, new):
        assert secret.rsplit("-", 1)[1] not in log.read_text()


def test_no_secret_is_in_the_printed_settings(folder):
    environment = {
        **os.environ,
        "POMONA_DATABASE_URL": "postgresql://ann:hunter2@db/pomona",
        "POMONA_API_KEY": "opensesame",
    }
    command = [sys.executable, "-m", "pomona", "serve", "--print-config"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment).stdout
    assert "database_url" in shown
    assert "hunter2" not in shown
    assert "opensesame" not in shown
