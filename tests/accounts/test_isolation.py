"""A server with accounts: who may do what, and what nobody learns of others."""

import json
import re
import secrets

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from pomona.accounts import keys
from pomona.adapters.stores import StoredAdapter
from pomona.cli.accounts import announce_adapters
from pomona.core.errors import AdapterError, AdapterUnavailableError
from pomona.server.auth import RULES, Who, who_may
from pomona.server.middleware import OPEN_PATHS
from support.accounts import ServedAccounts
from support.driver import FolderHost, make_adapter
from support.server import BASE

STAFF = ("admin", "operator", "auditor")


@pytest.fixture
def database_url():
    """What is tested here does not depend on the database: SQLite will do."""


def own_folder(served: ServedAccounts, tenant: str, content: str) -> str:
    folder = served.served.folder / tenant
    folder.mkdir(exist_ok=True)
    return make_adapter(folder / content, content)


async def load(served: ServedAccounts, who: str, name: str, content: str = "one", **fields):
    source = own_folder(served, who, content)
    return await served.call(who, "POST", "/v1/adapters", {"name": name, "source": source, **fields})


def routes(served: ServedAccounts):
    for route in served.served.app.routes:
        assert isinstance(route, Route | APIRoute)
        for method in sorted(route.methods - {"HEAD"}):
            path = re.sub(r"{(\w+)(:path)?}", "x", route.path)
            yield method, path


async def test_every_route_is_closed_to_those_without_a_key(served):
    num_closed = 0
    for method, path in routes(served):
        if path in OPEN_PATHS:
            continue
        for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": f"Bearer {keys.new_key().text}"}):
            response = await served.served.http.request(method, path, headers=headers, json={})
            assert response.status_code == 401, (method, path, headers)
            assert response.json()["error"]["code"] == "invalid_api_key"
            num_closed += 1
    assert num_closed > 50


async def test_every_route_has_a_rule_and_a_route_without_one_is_closed_to_everybody(served):
    for method, path in routes(served):
        assert path in OPEN_PATHS or who_may(method, path) is not None, (method, path)

    async def forgotten():
        raise AssertionError("reached")

    served.served.app.add_api_route("/v1/forgotten", forgotten)
    for who in served.keys:
        response = await served.call(who, "GET", "/v1/forgotten")
        assert response.status_code == 404
        assert response.json()["error"]["message"] == "There is no /v1/forgotten here."


async def test_keys_open_what_the_table_says_and_nothing_else(served):
    kinds = {"acme": Who.TENANT, "admin": Who.ADMIN, "operator": Who.OPERATOR, "auditor": Who.AUDITOR}
    for method, path in routes(served):
        rule = Who(0) if path in OPEN_PATHS else who_may(method, path)
        for who, kind in kinds.items():
            if path not in OPEN_PATHS and not rule & kind:
                response = await served.call(who, method, path, {})
                assert response.status_code == 403, (method, path, who)


async def test_a_key_of_the_wrong_kind_is_told_which_one_to_send_and_how_to_make_it(served):
    for who, path, needed in (
        ("admin", "/v1/chat/completions", "of kind admin; this takes one of kind tenant (pomona keys create TENANT)."),
        ("acme", "/v1/admin/keys", "of kind tenant; this takes one of kind admin (pomona keys admin --role ROLE)."),
    ):
        error = (await served.call(who, "POST", path, {})).json()["error"]
        assert error["message"] == f"This API key is {needed}"


def test_no_rule_lets_tenants_administrate():
    for method, path, who in RULES:
        if path.startswith(("/v1/admin", "/metrics")):
            assert not who & Who.TENANT, (method, path)


async def test_a_tenants_adapter_does_not_exist_for_others_in_any_way(served):
    assert (await load(served, "acme", "legal")).status_code == 200
    assert (await served.complete("acme", model="legal")).status_code == 200
    for name in ("legal", "acme/legal", f"{BASE}:legal", f"{BASE}:acme/legal"):
        absent = name.replace("legal", "absent")
        for method, path, body in (
            ("POST", "/v1/completions", {"model": name, "prompt": "x"}),
            ("POST", "/tokenize", {"model": name, "prompt": "x"}),
            ("GET", f"/v1/models/{name}", None),
            ("GET", f"/v1/adapters/{name}", None),
            ("DELETE", f"/v1/adapters/{name}", None),
        ):
            hidden = await served.call("bolt", method, path, body)
            missing = await served.call("bolt", method, path.replace(name, absent), body and {**body, "model": absent})
            assert hidden.status_code == missing.status_code == 404, (method, path)
            assert hidden.text.replace(name, absent) == missing.text
            assert set(hidden.headers) == set(missing.headers)
    for path in ("/v1/models", "/v1/adapters"):
        text = (await served.call("bolt", "GET", path)).text
        assert "legal" not in text
        assert "acme" not in text


async def test_two_tenants_may_use_one_name_for_different_adapters(served):
    answers = {}
    for who in ("acme", "bolt"):
        assert (await load(served, who, "legal", who)).status_code == 200
    for who in ("acme", "bolt"):
        answers[who] = (await served.complete(who, model="legal")).json()["choices"][0]["text"]
        cards = (await served.call(who, "GET", "/v1/adapters")).json()["data"]
        assert [card["name"] for card in cards] == ["legal"]
        assert cards[0]["source"].endswith(f"/{who}/{who}")
    ids = {(await served.call(who, "GET", "/v1/adapters/legal")).json()["id"] for who in ("acme", "bolt")}
    assert len(ids) == 2
    names = [card["name"] for card in (await served.call("admin", "GET", "/v1/adapters")).json()["data"]]
    assert names == ["acme/legal", "bolt/legal"]


async def test_a_shared_adapter_is_there_for_whom_it_is_shared_with_until_it_is_not(served):
    await load(served, "acme", "legal")
    assert (await served.complete("bolt", model="acme/legal")).status_code == 404
    for body in ({"tenants": ["bolt"]}, {"public": True}):
        assert (await served.call("acme", "PUT", "/v1/shares", {"name": "legal", **body})).status_code == 200
        assert (await served.complete("bolt", model="acme/legal")).status_code == 200
        (card,) = (await served.call("bolt", "GET", "/v1/adapters")).json()["data"]
        assert (card["name"], card["source"], card["num_requests"]) == ("acme/legal", "", 0)
        assert (await served.call("bolt", "DELETE", "/v1/adapters/acme/legal")).status_code == 404
        assert (await served.call("acme", "PUT", "/v1/shares", {"name": "legal"})).status_code == 200
        assert (await served.complete("bolt", model="acme/legal")).status_code == 404
    refused = await served.call("bolt", "PUT", "/v1/shares", {"name": "acme/legal", "tenants": ["bolt"]})
    assert refused.status_code == 404


async def test_sharing_does_not_tell_a_tenant_which_others_there_are(served):
    await load(served, "acme", "legal")
    answers = []
    for tenant in ("bolt", "nobody"):
        answers.append(await served.call("acme", "PUT", "/v1/shares", {"name": "legal", "tenants": [tenant]}))
        expected = {"bolt"} if tenant == "bolt" else set()
        assert served.accounts.adapters["acme/legal"].shared_with == expected
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].text.replace("bolt", "nobody") == answers[1].text
    by_staff = {"name": "acme/legal", "tenants": ["nobody"]}
    assert (await served.call("admin", "PUT", "/v1/shares", by_staff)).status_code == 404


async def test_the_operators_adapters_are_for_all_and_only_the_operators_to_change(served):
    source = make_adapter(served.served.folder / "common", "common")
    loaded = await served.call("operator", "POST", "/v1/adapters", {"name": "common", "source": source})
    assert loaded.status_code == 200
    for who in ("acme", "bolt"):
        assert (await served.complete(who, model="common")).status_code == 200
        assert (await served.call(who, "DELETE", "/v1/adapters/common")).status_code == 404
    await load(served, "acme", "common", "own")
    own = (await served.call("acme", "GET", "/v1/adapters/common")).json()["id"]
    assert own != loaded.json()["id"]
    assert (await served.call("bolt", "GET", "/v1/adapters/common")).json()["id"] == loaded.json()["id"]


async def test_a_tenant_loads_only_from_its_own_folder(served):
    source = own_folder(served, "bolt", "secret")
    refused = await served.call("acme", "POST", "/v1/adapters", {"name": "stolen", "source": source})
    missing = await served.call("acme", "POST", "/v1/adapters", {"name": "stolen", "source": source + "-not"})
    assert refused.status_code == missing.status_code == 403
    assert refused.text == missing.text.replace("secret-not", "secret")
    by_staff = await served.call("admin", "POST", "/v1/adapters", {"name": "x", "source": source, "tenant": "acme"})
    assert by_staff.json()["name"] == "acme/x"
    assert (await served.complete("acme", model="x")).status_code == 200
    for_other = await load(served, "acme", "y", "y", tenant="bolt")
    assert for_other.status_code == 400
    with_slash = await load(served, "acme", "bolt/y", "y")
    assert with_slash.status_code == 400


@pytest.mark.parametrize("failure", ["its own fault", "the disk's"])
async def test_only_whose_adapter_it_is_learns_why_it_cannot_be_used(served, failure, monkeypatch):
    (served.served.folder / "acme").mkdir()
    places = {name: served.served.folder / name for name in ("private-place", "acme/private-place")}
    for place in places.values():
        place.mkdir()
    served.served.adapters.announce([StoredAdapter("common", str(places["private-place"]))])
    await served.accounts.change(served.accounts.shares.put, "acme", "legal", str(places["acme/private-place"]))
    await served.call("acme", "PUT", "/v1/shares", {"name": "legal", "public": True})
    announce_adapters(served.served.adapters, served.accounts.adapters)
    error_type = AdapterError if failure == "its own fault" else AdapterUnavailableError

    def stage(self, path):
        raise error_type(f"nothing good in {path}")

    monkeypatch.setattr(FolderHost, "stage", stage)
    for who, model in (("acme", "common"), ("bolt", "common"), ("bolt", "acme/legal")):
        for _ in range(2):  # the failure itself, and what is remembered of it
            refused = await served.complete(who, model=model)
            assert refused.status_code == (409 if failure == "its own fault" else 503)
            assert refused.json()["error"]["message"].startswith(f"The adapter '{model}' cannot be ")
            assert "private-place" not in refused.text
            if refused.status_code == 503:
                assert int(refused.headers["retry-after"]) >= 1
    own = (await served.complete("acme", model="legal")).json()["error"]["message"]
    assert f"nothing good in {places['acme/private-place']}" in own


async def test_no_tenants_adapter_has_the_base_models_name(served):
    refused = await load(served, "acme", BASE)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "name")
    assert refused.json()["error"]["message"] == f"name is '{BASE}': must be another name than the base model's"
    source = own_folder(served, "acme", "one")
    by_staff = await served.call("admin", "POST", "/v1/adapters", {"name": BASE, "source": source, "tenant": "acme"})
    assert by_staff.status_code == 400
    assert not served.accounts.adapters


async def test_one_tenants_prompts_are_not_found_in_the_others_prefix_cache(served):
    prompt = [5] * 200
    body = {"prompt": prompt, "max_tokens": 1}

    async def num_cached(who):
        usage = (await served.complete(who, **body)).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert await num_cached("acme") == 0
    assert await num_cached("bolt") == 0
    assert await num_cached("acme") == await num_cached("bolt") > 100
    for tenant in ("acme", "bolt"):
        await served.call("admin", "PATCH", f"/v1/admin/tenants/{tenant}", {"prefix_group": "friends"})
    assert await num_cached("acme") == 0
    assert await num_cached("bolt") > 100


async def test_a_tenant_sees_its_own_usage_only(served):
    for who in ("acme", "bolt", "bolt"):
        assert (await served.complete(who)).status_code == 200
    await served.accounts.ledger.flush()
    for query in ("", "?tenant=bolt", "?group_by=tenant"):
        (sums,) = (await served.call("bolt", "GET", f"/v1/usage{query}")).json()["data"]
        assert sums["num_requests"] == 2
    for query in ("?tenant=acme", "?tenant=absent", "?format=csv&tenant=acme", "?tenant="):
        refused = await served.call("bolt", "GET", f"/v1/usage{query}")
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].endswith(": must be left out: you see your own usage")
    lines = (await served.call("bolt", "GET", "/v1/usage?format=csv")).text.splitlines()
    assert len(lines) == 3
    assert all(",bolt," in line for line in lines[1:])
    everything = (await served.call("auditor", "GET", "/v1/usage?group_by=tenant")).json()["data"]
    assert [(row["group"], row["num_requests"]) for row in everything] == [
        ({"tenant": "acme"}, 1),
        ({"tenant": "bolt"}, 2),
    ]


async def test_secrets_are_in_no_answer_log_or_metric(served, caplog):
    caplog.set_level("DEBUG")
    secret = served.keys["acme"].rsplit("-", 1)[1]
    prompt = f"private words {secrets.token_hex(8)}"
    word = prompt.rsplit(" ", 1)[1]
    texts = []
    for who in ("acme", *STAFF):
        for path in ("/v1/admin/keys", "/v1/admin/tenants", "/v1/usage", "/metrics", "/openapi.json", "/v1/nothing"):
            texts.append((await served.call(who, "GET", path)).text)
    texts.append((await served.complete("acme", prompt, max_tokens=-1)).text)
    texts.append((await served.complete("acme", prompt, model="absent")).text)
    texts.append(
        (await served.call("acme", "POST", "/v1/completions", {"model": BASE, "prompt": prompt, "odd": 1})).text
    )
    await served.complete("acme", prompt)
    await served.accounts.ledger.flush()
    texts.append(json.dumps([record.getMessage() for record in caplog.records if record.name.startswith("pomona")]))
    texts.append(json.dumps(await served.usage()))
    texts.append((await served.call("admin", "GET", "/v1/usage?format=csv")).text)
    for text in texts:
        assert secret not in text
        assert word not in text


async def test_a_key_is_shown_once(served):
    made = (await served.call("admin", "POST", "/v1/admin/keys", {"tenant": "acme", "name": "web"})).json()
    assert made["key"].startswith(made["prefix"])
    listed = (await served.call("admin", "GET", "/v1/admin/keys?tenant=acme")).json()["data"]
    assert [card["name"] for card in listed] == ["", "web"]
    assert all(card["key"] is None for card in listed)
