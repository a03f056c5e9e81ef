"""A live server over a folder with good and broken adapters: each is what it is, and none disturbs another."""

import shutil
import time

import httpx
import pytest

from support.adapters import edit_adapter_config, make_adapter
from support.live import live_server

BROKEN = ("truncated", "flipped", "other-rank", "link", "no-config")


@pytest.fixture(scope="module")
def mixed_dir(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    good = make_adapter(folder / "good", base_path, seed=1)
    make_adapter(folder / "fine", base_path, seed=2)
    for name in BROKEN:
        if name != "link":
            shutil.copytree(good, folder / name)
    weights = (good / "adapter_model.safetensors").read_bytes()
    (folder / "truncated" / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "flipped" / "adapter_model.safetensors").write_bytes(
        weights[:20] + bytes([weights[20] ^ 4]) + weights[21:]
    )
    edit_adapter_config(folder / "other-rank", r=8)
    (folder / "no-config" / "adapter_config.json").unlink()
    (folder / "link").symlink_to(shutil.copytree(good, tmp_path_factory.mktemp("outside") / "adapter"))
    return folder


def ask(server, model):
    body = {"model": model, "prompt": "The quick brown fox", "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def card(server, name):
    return httpx.get(f"{server.url}/v1/adapters/{name}", timeout=60).json()


def test_a_folder_of_good_and_broken_adapters_is_served_as_far_as_it_can_be(base_path, mixed_dir, tmp_path):
    arguments = [str(base_path), "--adapters-dir", str(mixed_dir), "--dtype", "float32"]
    with live_server(arguments, tmp_path / "log") as server:
        assert card(server, "good")["state"] == "registered"
        expected = ask(server, "good").json()["choices"][0]["text"]
        assert card(server, "good")["state"] == "resident"
        for name in BROKEN:
            answer = ask(server, name)
            assert answer.status_code == 409, (name, answer.text)
            assert answer.json()["error"]["code"] == "adapter_failed"
            found = card(server, name)
            assert (found["state"], found["num_failures"]) == ("failed", 1)
            assert found["error"]
            assert ask(server, "good").json()["choices"][0]["text"] == expected
        assert server.metric("pomona_staged_adapters") == 1
        assert server.metric("pomona_failed_adapters") == len(BROKEN)
        assert server.metric("pomona_adapter_waiting_requests") == 0

        good = mixed_dir / "good" / "adapter_model.safetensors"
        shutil.copy(good, mixed_dir / "truncated" / "adapter_model.safetensors")
        time.sleep(card(server, "truncated")["retry_s"])
        assert ask(server, "truncated").json()["choices"][0]["text"] == expected
        assert card(server, "truncated")["error"] is None
        # The same bytes under two names are in memory once.
        assert server.metric("pomona_staged_adapters") == 1
        assert ask(server, "fine").status_code == 200
