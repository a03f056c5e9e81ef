"""Whatever is thrown at a live server gets the right status and a message that names the field; the server goes on."""

import json
import shutil

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.adapters import edit_adapter_config, make_adapter
from support.models import make_checkpoint

COMPLETION = {"model": "tiny-base", "prompt": "The", "max_tokens": 2}


@pytest.fixture(autouse=True)
def server_goes_on(server):
    yield
    answer = httpx.post(f"{server.url}/v1/completions", json=COMPLETION, timeout=60)
    assert answer.status_code == 200, answer.text


def post(server, path="/v1/completions", **options):
    return httpx.post(server.url + path, timeout=60, **options)


def error_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1.5),
        ("n", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("seed", -(2**63) - 1),
        ("logprobs", 1000),
        ("stop", [""]),
        ("stop_token_ids", [400]),
        ("logit_bias", {"400": 1}),
        ("logit_bias", {"3": 1e9}),
        ("prompt", []),
        ("prompt", [400]),
        ("prompt", [-1]),
        ("prompt", 7),
        ("tools", [{"type": "function"}]),
        ("no_such_parameter", 1),
    ],
)
def test_a_wrong_parameter_is_a_400_that_names_it(server, field, value):
    answer = post(server, json={**COMPLETION, field: value})
    assert answer.status_code == 400
    error = error_of(answer)
    assert field in error["message"]
    assert error["param"].startswith(field)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(server, text):
    body = json.dumps(COMPLETION)[:-1] + f', "temperature": {text}}}'
    answer = post(server, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1, 2]", b'"text"', b"null", b'{"model": "\xff\xfe"}', b'{"a":' * 5000 + b"1" + b"}" * 5000]
)
def test_bodies_that_are_not_a_json_object_in_utf8_are_refused(server, body):
    answer = post(server, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)["message"]


def test_a_body_of_ten_megabytes_is_refused_whether_its_size_is_announced_or_not(server):
    body = json.dumps({**COMPLETION, "prompt": "x" * 10_000_000}).encode()
    assert post(server, content=body).status_code == 413

    def chunks():
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    try:
        answer = post(server, content=chunks())
    except httpx.WriteError:  # the server may hang up on the rest
        return
    assert answer.status_code == 413


def test_unknown_models_and_routes_are_404_and_wrong_methods_405(server):
    assert post(server, json={**COMPLETION, "model": "nobody"}).status_code == 404
    assert post(server, "/v1/nothing", json={}).status_code == 404
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


def test_a_prompt_longer_than_the_context_is_a_400_with_both_lengths(server):
    error = error_of(post(server, json={**COMPLETION, "prompt": [5] * 1000}))
    assert error["code"] == "context_length_exceeded"
    assert "1000" in error["message"] and "512" in error["message"]


def broken_adapter(kind, folder, base_path):
    """Make an adapter folder with one thing wrong."""
    if kind == "wrong base":
        other = make_checkpoint(folder.parent / "other-base", "llama", hidden_size=32, vocab_size=400)
        return make_adapter(folder, other)
    make_adapter(folder, base_path, seed=50)
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    tensors = load_file(weights)
    name = next(iter(tensors))
    if kind == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif kind == "corrupt header":
        weights.write_bytes(data[:20] + b"\xff" * 40 + data[60:])
    elif kind == "wrong shape":
        save_file({**tensors, name: torch.zeros(3, 5)}, weights)
    elif kind == "nan":
        save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, weights)
    elif kind == "missing tensor":
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    elif kind == "rank 0":
        edit_adapter_config(folder, r=0)
    elif kind == "negative rank":
        edit_adapter_config(folder, r=-4)
    elif kind == "unknown key":
        edit_adapter_config(folder, use_magic=True)
    elif kind == "no config":
        (folder / "adapter_config.json").unlink()
    elif kind == "malformed config":
        (folder / "adapter_config.json").write_text("{")
    elif kind == "pickle":
        weights.unlink()
        canary = folder.parent / "canary"
        torch.save({"weight": _Malicious(str(canary))}, folder / "adapter_model.bin")
    return folder


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def cards(server):
    """All adapters as the server shows them, but for the count of loads that failed."""
    return [
        {key: value for key, value in card.items() if key != "num_failures"}
        for card in httpx.get(f"{server.url}/v1/adapters").json()["data"]
    ]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("truncated", "adapter_model.safetensors"),
        ("corrupt header", "adapter_model.safetensors"),
        ("wrong shape", "lora_"),
        ("wrong base", "lora_"),
        ("nan", "lora_"),
        ("missing tensor", "lora_"),
        ("rank 0", "r:"),
        ("negative rank", "r:"),
        ("unknown key", "use_magic"),
        ("no config", "adapter_config.json"),
        ("malformed config", "adapter_config.json"),
        ("pickle", "adapter_model.bin"),
    ],
)
def test_a_broken_adapter_is_refused_with_the_reason_and_changes_nothing(server, adapters_dir, base_path, kind, named):
    before = cards(server)
    folder = adapters_dir / "broken"
    try:
        broken_adapter(kind, folder, base_path)
        answer = post(server, "/v1/adapters", json={"name": "adapter-1", "source": str(folder)})
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(folder.parent / "other-base", ignore_errors=True)
    assert 400 <= answer.status_code < 500
    assert named in error_of(answer)["message"]
    assert not (adapters_dir / "canary").exists(), "code in a pickle was executed"
    assert cards(server) == before


def test_sources_outside_the_allowed_folders_are_forbidden_whether_or_not_they_exist(server, adapters_dir, tmp_path):
    link = adapters_dir / "link"
    link.symlink_to(tmp_path)
    try:
        sources = [str(tmp_path), "/etc", "/no/such/folder", f"{adapters_dir}/../..", str(link), "org/name"]
        answers = [post(server, "/v1/adapters", json={"name": "x", "source": source}) for source in sources]
    finally:
        link.unlink()
    assert {answer.status_code for answer in answers} == {403}


@pytest.mark.parametrize("name", ["", "a:b", "tiny-base", "x" * 200, "a b", "../up"])
def test_a_malformed_adapter_name_is_refused(server, adapters_dir, name):
    answer = post(server, "/v1/adapters", json={"name": name, "source": str(adapters_dir / "adapter-0")})
    assert answer.status_code in (400, 409)
    assert "name" in error_of(answer)["message"]
