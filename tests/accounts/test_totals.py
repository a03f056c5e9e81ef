"""Totals of the ledger are what the engine counted, to the last token, however requests end."""

import asyncio
import random
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pomona.accounts.config import AccountsConfig
from support.accounts import ServedAccounts, serve_accounts
from support.driver import until
from support.server import BASE, Connection

WORDS = ("one", "two", "three", "fox", "dog", "hello")


class Mix:
    """Requests of every kind at once, over an engine that is too small for them."""

    def __init__(self, served: ServedAccounts, seed: int, n: int) -> None:
        self.served = served
        self.random = random.Random(seed)
        self.n = n
        self.told: dict[str, dict[str, int]] = {}
        """Request id -> the usage in its answer."""

    def body(self) -> dict[str, object]:
        prompts = [
            " ".join(self.random.choices(WORDS, k=self.random.randint(3, 60))) for _ in range(self.random.randint(1, 2))
        ]
        common = {"model": BASE, "prompt": prompts, "n": self.n, "temperature": self.random.choice([0, 1])}
        return common | {"max_tokens": self.random.randint(1, 80), "ignore_eos": self.random.random() < 0.7}

    async def finish(self) -> None:
        await self._answered(self.body())

    async def stop(self) -> None:
        """Most words are found in the middle of what the engine goes on to produce."""
        await self._answered(self.body() | {"stop": [self.random.choice(WORDS)], "max_tokens": 80, "ignore_eos": True})

    async def disconnect(self) -> None:
        body = self.body() | {"stream": self.random.random() < 0.5, "max_tokens": 80, "ignore_eos": True}
        connection = Connection(self.served.served.app, "/v1/completions", body, key=self.served.keys["acme"])
        await asyncio.sleep(self.random.random() * 0.03)
        await connection.disconnect()

    async def fail(self) -> None:
        """Until it has its answer every sequence fails that takes part in a step, those of others too."""
        await asyncio.sleep(self.random.random() * 0.05)
        self.served.served.executor.fail_with = "broken"
        await self._answered(self.body())
        self.served.served.executor.fail_with = None

    async def run(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            kinds = self.random.choices((self.finish, self.stop, self.disconnect), k=9)
            await asyncio.gather(*(kind() for kind in kinds), self.fail())

    async def _answered(self, body: dict[str, object]) -> None:
        response = await self.served.call("acme", "POST", "/v1/completions", body)
        if response.status_code == 200:
            answer = response.json()
            self.told[answer["id"]] = answer["usage"]


def metric(text: str, name: str) -> float:
    """Sum of a counter over its labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", [1, 2])
async def test_rows_and_metrics_add_up_to_what_the_engine_counted(tmp_path, seed, n):
    limits = {"num_kv_blocks": 40, "max_waiting": 30, "max_num_seqs": 12}
    async with serve_accounts(tmp_path, AccountsConfig(data_dir=tmp_path), **limits) as served:
        mix = Mix(served, seed, n)
        await mix.run(6)
        stats = served.served.client.stats()
        rows = {row["request_id"]: row for row in await served.usage()}
        metrics = (await served.call("operator", "GET", "/metrics")).text
        computed = served.served.executor.num_prompt_tokens

    outcomes = [row["outcome"] for row in rows.values()]
    assert len(rows) == 60
    assert {"finish", "abort", "fail"} <= set(outcomes)
    assert n < 3 or stats.num_preemptions > 0

    assert sum(row["output_tokens"] for row in rows.values()) == stats.num_output_tokens
    assert metric(metrics, "pomona_output_tokens_total") == stats.num_output_tokens
    assert metric(metrics, "pomona_prompt_tokens_total") == stats.num_prefix_queries
    assert metric(metrics, "pomona_cached_tokens_total") == stats.num_prefix_hits
    if n == 1:
        assert sum(row["input_tokens"] for row in rows.values()) == stats.num_prefix_queries
        assert sum(row["cached_tokens"] for row in rows.values()) == stats.num_prefix_hits
    prompts = {}  # (request, which of its prompts) -> tokens, of all prompts that were begun
    for request_id, num_prompt_tokens in computed.items():
        response_id, _, choice = request_id.rpartition("-")
        prompts[response_id, int(choice) // n] = num_prompt_tokens
    for request_id, row in rows.items():
        assert row["input_tokens"] == sum(size for (owner, _), size in prompts.items() if owner == request_id)

    for request_id, usage in mix.told.items():
        row = rows[request_id]
        assert row["outcome"] == "finish"
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (row["input_tokens"], row["output_tokens"])
        assert usage["prompt_tokens_details"]["cached_tokens"] == row["cached_tokens"]


@pytest.mark.parametrize("goes_away", [False, True])
async def test_the_step_under_way_when_a_stop_string_is_found_is_counted(tmp_path, goes_away):
    async with serve_accounts(tmp_path, AccountsConfig(data_dir=tmp_path)) as served:
        executor = served.served.executor
        prompt = "one two three fox dog"
        num_before = len(served.served.tokenizer.encode("one two three fox"))
        options = {"max_tokens": 80, "temperature": 0, "ignore_eos": True, "stop": "fox", "stream": True}
        body = {"model": BASE, "prompt": prompt, "stream_options": {"include_usage": True}, **options}
        earlier: list[dict[str, Any]] = []
        while executor.gate.is_set():
            # An engine that is held up may hear of the stop before it begins another step: then once more.
            earlier = await served.usage()
            assert len(earlier) < 20
            executor.pause_at_token = num_before
            connection = Connection(served.served.app, "/v1/completions", body, key=served.keys["acme"])
            await until(lambda made=connection: b'"finish_reason":"stop"' in made.body, "the stop string is found")
            async with asyncio.timeout(30):
                while executor.gate.is_set() and await served.usage() == earlier:
                    await asyncio.sleep(0.005)
        assert await served.usage() == earlier
        leaving = asyncio.create_task(connection.disconnect()) if goes_away else connection.done
        await asyncio.sleep(0.01)
        executor.gate.set()
        await leaving
        rows = await served.usage()
        stats = served.served.client.stats()
    (row,) = (row for row in rows if row not in earlier)
    assert row["output_tokens"] == num_before + 1
    assert sum(row["output_tokens"] for row in rows) == stats.num_output_tokens
    if not goes_away:
        assert f'"completion_tokens":{num_before + 1}'.encode() in connection.body
