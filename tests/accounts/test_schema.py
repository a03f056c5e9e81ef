"""Schemathesis over the server's own OpenAPI document: without a key, and with keys of every kind.

Many more examples: pytest tests/accounts/test_schema.py -m slow -n 0
"""

import asyncio
import copy
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pomona.adapters.stores import FolderStore
from pomona.server.middleware import OPEN_PATHS
from support.accounts import serve_accounts
from support.server import BASE, listen

GenerationMode = schemathesis.GenerationMode
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


BROKEN = "broken"
"""An adapter that everybody may name and nobody can use."""


@pytest.fixture
async def served(config, tmp_path):
    store = FolderStore(tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / BROKEN).symlink_to("/")
    async with serve_accounts(tmp_path, config, stores=(store,)) as running:
        running.served.adapters.announce(store.list())
        yield running


def with_models(document, *names):
    """The document with these names for the models that generate, which nobody would guess."""
    document = copy.deepcopy(document)
    for kind in ("ChatCompletionRequest", "CompletionRequest"):
        document["components"]["schemas"][kind]["properties"]["model"]["enum"] = list(names)
    return document


def check_all(url, document, key, num_examples, mode):
    """Generate examples for every operation; returns how many answers of which status there were, by path."""
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    statuses = Counter()

    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and operation.path in OPEN_PATHS:
            continue  # nothing can be wrong with what has no parameters

        @settings(
            max_examples=num_examples,
            database=None,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            case.headers.pop("authorization", None)
            response = case.call(headers=headers, timeout=30)
            statuses[case.path, response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        check()
    return statuses


async def run(served, who, num_examples, mode=GenerationMode.POSITIVE):
    async with listen(served.served.app) as url:
        key = None if who is None else served.keys[who]
        document = with_models(served.served.app.openapi(), BASE, BROKEN)
        return await asyncio.to_thread(check_all, url, document, key, num_examples, mode)


async def test_without_a_key_every_operation_is_closed(served):
    statuses = await run(served, None, 3)
    assert len({path for path, _ in statuses}) > 20
    assert {status for (path, status) in statuses if path not in OPEN_PATHS} == {401}


@pytest.mark.parametrize("who", ["acme", "admin"])
async def test_whatever_the_document_allows_is_answered_as_it_says(served, who):
    statuses = await run(served, who, 4)
    assert {200, 400} <= {status for _, status in statuses}


async def test_the_document_says_what_an_adapter_that_cannot_be_used_is_answered_with(served):
    messages = [{"role": "user", "content": "hi"}]
    document = served.served.app.openapi()
    for path, body in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": messages})):
        answer = await served.call("acme", "POST", path, {"model": BROKEN, **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_failed")
        assert "409" in document["paths"][path]["post"]["responses"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("who", ["acme", "admin", "operator", "auditor"])
@pytest.mark.parametrize("mode", list(GenerationMode))
async def test_whatever_the_document_allows_or_forbids_is_answered_as_it_says_many_times(served, who, mode):
    statuses = await run(served, who, 100, mode)
    by_path = Counter({path: 0 for path, _ in statuses})
    by_status = Counter()
    for (path, status), number in statuses.items():
        by_path[path] += number
        by_status[status] += number
    print(
        f"{who}, {mode.value}: {by_status.total()} answers over {len(by_path)} paths, {dict(sorted(by_status.items()))}"
    )
    print(" ".join(f"{path}={number}" for path, number in sorted(by_path.items())))
    assert by_status.total() > 1000
