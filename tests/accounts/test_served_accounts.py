"""A server with accounts over HTTP: limits, the ledger, keys, with OpenAI's own client too."""

import asyncio
import datetime
import sys

import openai
import pytest

from pomona.accounts.accounts import Accounts
from pomona.adapters.stores import StoredAdapter
from pomona.core.errors import ConfigError, DatabaseUnavailableError
from pomona.core.request import Priority, ServiceLevel
from pomona.metrics.registry import LEDGER_METRICS
from pomona.sched.fairness import FairnessConfig
from pomona.sched.pace import Pace
from pomona.server.limits import duration
from support.accounts import serve_accounts
from support.driver import make_adapter
from support.server import BASE, Connection, listen


async def set_limits(served, path, **limits):
    response = await served.call("admin", "PUT", f"/v1/admin/limits/{path}", limits)
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_ledger_agrees_with_the_answers_and_with_the_engine(served):
    told = []
    for n, who in enumerate(("acme", "bolt", "acme"), start=1):
        told.append((await served.complete(who, "one two three " * n)).json()["usage"])
    async with served.served.http.stream(
        "POST",
        "/v1/completions",
        json={"model": BASE, "prompt": "four five", "max_tokens": 5, "stream": True},
        headers={"authorization": f"Bearer {served.keys['acme']}"},
    ) as response:
        assert (await response.aread()).endswith(b"data: [DONE]\n\n")
    rows = await served.usage()
    assert [row["tenant_id"] for row in rows] == ["acme", "bolt", "acme", "acme"]
    for row, usage in zip(rows, told, strict=False):
        assert row["input_tokens"] == usage["prompt_tokens"]
        assert row["output_tokens"] == usage["completion_tokens"]
        assert row["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
        assert row["outcome"] == "finish"
        assert row["engine_s"] > 0
    stats = served.served.client.stats()
    assert sum(row["output_tokens"] for row in rows) == stats.num_output_tokens
    assert sum(row["input_tokens"] - row["cached_tokens"] for row in rows) == stats.num_prompt_tokens


async def test_refused_requests_are_not_in_the_ledger(served):
    for body in ({"model": "absent"}, {"max_tokens": -1}, {"prompt": ""}):
        assert (await served.complete("acme", **body)).status_code >= 400
    assert await served.usage() == []


async def test_a_client_that_goes_away_has_a_row_of_what_it_got(served):
    served.served.executor.gate.clear()
    body = {"model": BASE, "prompt": "one two three", "stream": True, "max_tokens": 64}
    connection = Connection(served.served.app, "/v1/completions", body, key=served.keys["acme"])
    await asyncio.sleep(0.1)
    served.served.executor.gate.set()
    await asyncio.sleep(0.05)
    await connection.disconnect()
    (row,) = await served.usage()
    assert row["outcome"] in ("abort", "finish")
    assert row["input_tokens"] > 0


async def test_a_failing_engine_has_rows_too(served):
    served.served.executor.fail_with = "broken"
    assert (await served.complete("acme")).status_code == 500
    (row,) = await served.usage()
    assert (row["outcome"], row["output_tokens"]) == ("fail", 0)


async def test_a_full_queue_is_a_row_that_costs_nothing(config, tmp_path):
    async with serve_accounts(tmp_path, config, max_waiting=1, max_num_seqs=1) as served:
        served.served.executor.gate.clear()
        asked = [asyncio.create_task(served.complete("acme")) for _ in range(8)]
        await asyncio.sleep(0.2)
        served.served.executor.gate.set()
        statuses = sorted([(await task).status_code for task in asked])
        assert statuses[0] == 200
        assert statuses[-1] == 429
        rows = await served.usage()
    assert len(rows) == 8
    assert sum(row["outcome"] == "reject" for row in rows) == statuses.count(429)
    assert all(row["input_tokens"] + row["output_tokens"] == 0 for row in rows if row["outcome"] == "reject")


@pytest.mark.parametrize("reason", ["rate_limit_exceeded", "deadline_unreachable"])
async def test_what_the_scheduler_does_not_admit_is_a_row_that_costs_nothing(config, tmp_path, reason, monkeypatch):
    monkeypatch.setattr(Pace, "seconds", lambda *_: 1.0)
    fairness = FairnessConfig(policy="rpm", requests_per_minute=1)
    async with serve_accounts(tmp_path, config, fairness=fairness) as served:
        if reason == "deadline_unreachable":
            await served.call("admin", "PATCH", "/v1/admin/tenants/bolt", {"ttft_s": 0.5})
        who = "acme" if reason == "rate_limit_exceeded" else "bolt"
        served.served.executor.gate.clear()
        first = asyncio.create_task(served.complete("acme"))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(served.complete(who))
        await asyncio.sleep(0.1)
        served.served.executor.gate.set()  # the first has its first token, and computes while the second comes
        refused = await second
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, reason)
        assert (await first).status_code == 200
        rows = await served.usage(tenant_id=who)
        costs = [(row["input_tokens"], row["output_tokens"]) for row in rows if row["outcome"] == "reject"]
        assert costs == [(0, 0)]
        metrics = (await served.call("admin", "GET", "/metrics")).text
        assert f'pomona_requests_total{{adapter="{BASE}",finish_reason="reject"}} 1.0' in metrics
        assert 'finish_reason="abort"' not in metrics


async def test_a_request_over_its_limit_brings_no_adapter_in(served):
    source = make_adapter(served.served.folder / "cold", "cold")
    served.served.adapters.announce([StoredAdapter("cold", source)])
    for limits in ({"requests_per_minute": 0}, {"max_concurrency": 0}, {"monthly_tokens": 1}):
        await set_limits(served, "tenant/acme", **limits)
        assert (await served.complete("acme", model="cold")).status_code == 429
    card = (await served.call("admin", "GET", "/v1/adapters/cold")).json()
    assert (card["state"], card["num_loads"], card["num_misses"]) == ("registered", 0, 0)
    assert await served.usage() == []
    await set_limits(served, "tenant/acme", max_concurrency=1)
    for _ in range(2):
        assert (await served.complete("acme", model="cold")).status_code == 200


async def test_an_adapter_that_cannot_be_brought_in_costs_nothing_and_keeps_no_place(served):
    served.served.adapters.announce([StoredAdapter("broken", str(served.served.folder))])
    await set_limits(served, "tenant/acme", max_concurrency=1, tokens_per_minute=100)
    for _ in range(3):
        refused = await served.complete("acme", model="broken", max_tokens=60)
        assert refused.status_code in (404, 409), refused.text
        assert refused.headers["x-ratelimit-limit-tokens"] == "100"
    assert await served.usage() == []
    assert (await served.complete("acme", max_tokens=60)).status_code == 200


async def test_the_token_that_nobody_asked_for_is_not_billed(served):
    for parameters in ({}, {"n": 2}, {"logprobs": 1}):
        answer = (await served.complete("acme", "one two", echo=True, max_tokens=0, **parameters)).json()
        row = (await served.usage())[-1]
        assert answer["choices"][0]["text"] == "one two"
        assert answer["usage"]["completion_tokens"] == row["output_tokens"] == 0
        assert answer["usage"]["prompt_tokens"] == row["input_tokens"] > 0


async def test_limits_refuse_with_openais_headers_and_error(served):
    await set_limits(served, "tenant/acme", requests_per_minute=2, tokens_per_minute=1000)
    first = await served.complete("acme")
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 1000
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert (await served.complete("acme")).status_code == 200
    refused = await served.complete("acme")
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    other = await served.complete("bolt")
    assert other.status_code == 200
    assert "x-ratelimit-limit-requests" not in other.headers
    assert len(await served.usage()) == 3


async def test_unused_output_tokens_are_given_back(served):
    await set_limits(served, "tenant/acme", tokens_per_minute=300)
    response = await served.complete("acme", "one", max_tokens=200)
    used = response.json()["usage"]["total_tokens"]
    assert used < 100
    response = await served.complete("acme", "one", max_tokens=200)
    assert response.status_code == 200
    assert (
        (await served.complete("acme", "one", max_tokens=301))
        .json()["error"]["message"]
        .startswith("The tenant's limit")
    )


async def test_a_key_and_an_adapter_have_limits_of_their_own(served):
    key = (await served.call("admin", "GET", "/v1/admin/keys?tenant=acme")).json()["data"][0]
    await set_limits(served, f"key/{key['prefix']}", requests_per_minute=1)
    assert (await served.complete("acme")).status_code == 200
    assert "key's limit" in (await served.complete("acme")).json()["error"]["message"]
    await set_limits(served, f"adapter/{BASE}", max_concurrency=0)
    assert "adapter's limit" in (await served.complete("bolt")).json()["error"]["message"]


async def test_a_spent_budget_says_so(served):
    await set_limits(served, "tenant/acme", monthly_tokens=30)
    assert (await served.complete("acme")).status_code == 200
    await served.accounts.ledger.flush()
    refused = await served.complete("acme", max_tokens=25)
    assert refused.json()["error"]["code"] == "insufficient_quota"
    await served.call("admin", "PUT", "/v1/admin/prices", {"input_per_million": 1e6, "output_per_million": 1e6})
    await set_limits(served, "tenant/bolt", monthly_cost=3.5)
    assert (await served.complete("bolt")).status_code == 200
    await served.accounts.ledger.flush()
    assert (await served.complete("bolt")).json()["error"]["code"] == "insufficient_quota"


async def test_an_adapters_budget_holds_for_all_who_use_it(served):
    used = (await served.complete("acme")).json()["usage"]
    await served.accounts.ledger.flush()
    await set_limits(served, f"adapter/{BASE}", monthly_tokens=used["prompt_tokens"] + 8)  # enough for one
    refused = await served.complete("bolt")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert "adapter's budget" in refused.json()["error"]["message"]


async def test_only_so_many_requests_are_in_flight(served):
    await set_limits(served, "tenant/acme", max_concurrency=2)
    served.served.executor.gate.clear()
    running = [asyncio.create_task(served.complete("acme")) for _ in range(2)]
    await asyncio.sleep(0.3)
    refused = await served.complete("acme")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    served.served.executor.gate.set()
    assert [(await task).status_code for task in running] == [200, 200]
    assert (await served.complete("acme")).status_code == 200


async def test_openais_client_understands_limits_and_keys(served):
    await set_limits(served, "tenant/acme", requests_per_minute=1)
    async with listen(served.served.app) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=served.keys["acme"], max_retries=0)
        raw = await client.completions.with_raw_response.create(model=BASE, prompt="one two", max_tokens=4)
        assert raw.headers["x-ratelimit-limit-requests"] == "1"
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model=BASE, prompt="one two", max_tokens=4)
        assert caught.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="pk-wrong").models.list()
        with pytest.raises(openai.NotFoundError):
            await client.with_options(max_retries=0).models.retrieve("absent")
        await client.close()


async def test_keys_live_and_die_over_http(served):
    made = (await served.call("admin", "POST", "/v1/admin/keys", {"tenant": "acme"})).json()
    served.keys["new"] = made["key"]
    assert (await served.complete("new")).status_code == 200
    rotated = await served.call("admin", "POST", f"/v1/admin/keys/{made['prefix']}/rotate", {"overlap_s": 60})
    served.keys["newer"] = rotated.json()["key"]
    assert [(await served.complete(who)).status_code for who in ("new", "newer")] == [200, 200]
    assert (await served.call("admin", "DELETE", f"/v1/admin/keys/{made['id']}")).status_code == 200
    assert [(await served.complete(who)).status_code for who in ("new", "newer")] == [401, 200]
    await served.call("admin", "PATCH", "/v1/admin/tenants/acme", {"is_disabled": True})
    assert [(await served.complete(who)).status_code for who in ("newer", "bolt")] == [401, 200]


async def test_what_administrators_get_wrong_is_named(served):
    for method, path, body, status in (
        ("POST", "/v1/admin/tenants", {"id": "acme"}, 409),
        ("POST", "/v1/admin/tenants", {"id": "No Good"}, 400),
        ("POST", "/v1/admin/tenants", {"id": "x", "odd": 1}, 400),
        ("GET", "/v1/admin/tenants/absent", None, 404),
        ("PATCH", "/v1/admin/tenants/absent", {"weight": 1.0}, 404),
        ("POST", "/v1/admin/keys", {}, 400),
        ("POST", "/v1/admin/keys", {"tenant": "acme", "role": "admin"}, 400),
        ("POST", "/v1/admin/keys", {"tenant": "absent"}, 404),
        ("POST", "/v1/admin/keys", {"tenant": "acme", "expires_at": 1}, 400),
        ("POST", "/v1/admin/keys", {"tenant": "acme", "expires_at": 1e12}, 400),  # such as milliseconds
        ("POST", "/v1/admin/keys/pk-absent/rotate", {}, 404),
        ("DELETE", "/v1/admin/keys/pk-absent", None, 404),
        ("PUT", "/v1/admin/limits/planet/earth", {}, 400),
        ("PUT", "/v1/admin/limits/tenant/absent", {}, 404),
        ("GET", "/v1/admin/limits/tenant/absent", None, 404),
        ("GET", "/v1/admin/keys?odd=1", None, 400),
        ("PUT", "/v1/admin/limits/tenant/acme", {"max_concurrency": -1}, 400),
        ("PUT", "/v1/admin/prices", {"input_per_million": 0.0125}, 400),
        ("GET", "/v1/usage?group_by=secret", None, 400),
        ("GET", "/v1/usage?start=yesterday", None, 400),
        ("GET", "/v1/usage?start=nan", None, 400),
        ("GET", "/v1/usage?format=xls", None, 400),
        ("GET", "/v1/usage?odd=1", None, 400),
    ):
        response = await served.call("admin", method, path, body)
        assert response.status_code == status, (method, path, response.text)
        assert response.json()["error"]["message"]


async def test_prices_are_kept_as_they_are_shown_or_refused(served):
    for body, field in (
        ({"input_per_million": 0.0125}, "input_per_million is 0.0125"),
        ({"cached_per_million": 0.0004}, "cached_per_million is 0.0004"),
        ({"output_per_million": 1e-9}, "output_per_million is 1e-09"),
    ):
        refused = await served.call("admin", "PUT", "/v1/admin/prices", body)
        assert refused.json()["error"]["message"] == f"{field}: must be a multiple of 0.001"
    for price in (0.0, 0.001, 0.1, 0.35, 2.675, 1234.567, 1e6):
        body = {"input_per_million": price, "output_per_million": price}
        told = (await served.call("admin", "PUT", "/v1/admin/prices", body)).json()
        (kept,) = (await served.call("admin", "GET", "/v1/admin/prices")).json()["data"]
        assert told == kept
        assert kept["input_per_million"] == kept["output_per_million"] == price


async def test_dates_of_usage_may_have_an_offset(served):
    await served.complete("acme")
    (row,) = await served.usage()
    ended = datetime.datetime.fromtimestamp(row["ended_s"], datetime.timezone(datetime.timedelta(hours=-5)))
    for start, num_requests in ((ended - datetime.timedelta(hours=1), 1), (ended + datetime.timedelta(hours=1), 0)):
        params = {"start": start.isoformat()}
        report = await served.served.http.get(
            "/v1/usage", params=params, headers={"authorization": f"Bearer {served.keys['acme']}"}
        )
        assert report.json()["data"][0]["num_requests"] == num_requests
        params = {"start": start.astimezone(datetime.UTC).replace(tzinfo=None).isoformat()}
        report = await served.served.http.get(
            "/v1/usage", params=params, headers={"authorization": f"Bearer {served.keys['acme']}"}
        )
        assert report.json()["data"][0]["num_requests"] == num_requests


async def test_usage_is_exported_as_files(served):
    import io

    from pyarrow import parquet

    for _ in range(3):
        await served.complete("acme")
    await served.accounts.ledger.flush()
    today = (await served.usage())[0]["day"]
    table = parquet.read_table(
        io.BytesIO((await served.call("admin", "GET", f"/v1/usage?format=parquet&start={today}")).content)
    )
    assert table.num_rows == 3
    empty = await served.call("admin", "GET", f"/v1/usage?format=csv&end={today}")
    assert len(empty.text.splitlines()) == 1
    for kind in ("csv", "parquet"):
        refused = await served.call("admin", "GET", f"/v1/usage?format={kind}&group_by=day")
        assert refused.status_code == 400, "rows are not sums"
        assert refused.json()["error"]["param"] == "group_by"


async def test_an_export_that_the_server_cannot_write_is_named(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # it is an extra
    refused = await served.call("acme", "GET", "/v1/usage?format=parquet")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "format")
    assert "pomona[parquet]" in refused.json()["error"]["message"]


async def test_exports_without_the_database_say_so(served, monkeypatch):
    def fail(*_, **__):
        raise DatabaseUnavailableError("down")

    await served.complete("acme")
    monkeypatch.setattr(served.accounts.database, "read", fail)
    for kind in ("csv", "parquet"):
        assert (await served.call("acme", "GET", f"/v1/usage?format={kind}")).status_code == 503


async def test_adapters_belong_to_their_tenants_after_a_restart(config, tmp_path):
    async with serve_accounts(tmp_path, config) as served:
        folder = tmp_path / "acme"
        folder.mkdir()
        source = make_adapter(folder / "one", "one")
        await served.call("acme", "POST", "/v1/adapters", {"name": "legal", "source": source})
    async with Accounts(config) as accounts:
        (adapter,) = accounts.adapters.values()
    assert (adapter.qualified_name, adapter.source) == ("acme/legal", source)


def test_durations_are_written_as_openai_does():
    assert [duration(s) for s in (0, 0.02, 0.5, 1, 1.5, 59.9, 60, 360.4)] == [
        "0ms", "20ms", "500ms", "1s", "1.5s", "59.9s", "1m0s", "6m0s",
    ]  # fmt: skip


def test_a_server_has_either_one_key_or_accounts(tmp_path):
    from pomona.cli.accounts import open_accounts
    from pomona.cli.config import load_config

    config = load_config({"accounts": True, "api_key": "x", "data_dir": str(tmp_path)})

    async def run():
        async with open_accounts(config, None):
            pass

    with pytest.raises(ConfigError, match="api_key and accounts"):
        asyncio.run(run())


async def test_the_scheduler_is_told_what_a_tenant_may_expect(served, monkeypatch):
    submitted = []
    submit = served.served.client.submit
    monkeypatch.setattr(served.served.client, "submit", lambda request: submitted.append(request) or submit(request))
    changes = {"weight": 3.0, "priority": "interactive", "ttft_s": 60.0}
    card = (await served.call("admin", "PATCH", "/v1/admin/tenants/acme", changes)).json()
    assert (card["weight"], card["priority"], card["ttft_s"], card["tpot_s"]) == (3.0, "interactive", 60.0, None)
    await served.complete("acme")
    await served.complete("bolt")
    first, second = submitted
    assert first.tenant_id == "acme"
    assert first.service_level == ServiceLevel(Priority.INTERACTIVE, 3.0, 60.0)
    assert second.service_level == ServiceLevel()
    assert first.cache_salt != second.cache_salt
    card = (await served.call("admin", "PATCH", "/v1/admin/tenants/acme", {"ttft_s": 0.0})).json()
    assert (card["weight"], card["ttft_s"]) == (3.0, None)


async def test_metrics_tell_whether_the_bill_is_being_written(served):
    for _ in range(3):
        await served.complete("acme")
    await served.accounts.ledger.flush()
    text = (await served.call("operator", "GET", "/metrics")).text
    for metric in LEDGER_METRICS:
        assert f"# TYPE {metric.name} {metric.kind}" in text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(("pomona_ledger", "pomona_acc")))
    assert values["pomona_ledger_rows_total"] == "3.0"
    assert values["pomona_ledger_waiting_rows"] == values["pomona_ledger_open_requests"] == "0.0"
    assert values["pomona_accounts_database_down_seconds"] == values["pomona_ledger_failed_writes_total"] == "0.0"
