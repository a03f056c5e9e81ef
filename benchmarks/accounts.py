"""What accounts cost: one load on two servers of the bundled model, with and without everything about tenants.

    python -m benchmarks.accounts            # measures (two minutes), appends a row, writes the page
    python -m benchmarks.accounts --report   # only writes docs/benchmarks/accounts.md from the newest row

Both servers run all the time; rounds alternate between them (A B B A ...), so that what else happens on the machine
meets both. The full server has accounts, limits on requests, tokens and concurrency of tenant and key, the ledger, and
weighted VTC; the bare one has none of it and serves in order of arrival.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from benchmarks import results
from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.principal import Limits
from pomona.accounts.tenants import TenantStore
from pomona.bench.machine import describe_hardware
from pomona.cli.bench import spawned_server

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks" / "accounts.md"
NUM_CLIENTS, NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 16, 128, 64, 48
LIMITS = Limits(10**7, 10**9, 10**4, 10**12, 10**15)
KINDS = ("bare", "full")


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[dict[str, tuple[str, dict[str, str]]]]:
    """Both servers: kind -> address and headers."""
    database = Database(AccountsConfig(data_dir=folder).url)
    database.migrate()
    store = TenantStore(database)
    store.create_tenant("acme")
    _, key = store.create_key("acme")
    store.set_limits("tenant", "acme", LIMITS)
    store.set_limits("key", key.key_id, LIMITS)
    database.close()
    full = ["--accounts", "--data-dir", str(folder), "--fairness", "wvtc"]
    with spawned_server(["--fairness", "fcfs"]) as bare_url, spawned_server(full) as full_url:
        yield {"bare": (bare_url, {}), "full": (full_url, {"authorization": f"Bearer {key.text}"})}


def bodies(models: list[str], number: int) -> list[dict[str, Any]]:
    """Requests of a round, of prompts that no other round has: none is found in a prefix cache."""
    rng = random.Random(f"round {number}")  # of an integer the sign would not count
    return [
        {
            "model": models[index % len(models)],
            "prompt": [rng.randrange(3, 200) for _ in range(NUM_PROMPT_TOKENS)],
            "max_tokens": NUM_OUTPUT_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        for index in range(NUM_REQUESTS)
    ]


async def load(url: str, headers: dict[str, str], models: list[str], number: int) -> float:
    """One round; returns output tokens per second."""
    todo = iter(bodies(models, number))

    async def client(session: aiohttp.ClientSession) -> None:
        for body in todo:
            async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
                assert response.status == 200, await response.text()
                await response.read()

    async with aiohttp.ClientSession() as session:
        start_s = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(NUM_CLIENTS)))
        return NUM_REQUESTS * NUM_OUTPUT_TOKENS / (time.perf_counter() - start_s)


def measure(num_rounds: int) -> dict[str, Any]:
    """Alternate rounds on both servers."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as found:
        url, headers = found["bare"]
        models = [card["id"] for card in httpx.get(f"{url}/v1/models", headers=headers).json()["data"]]
        for number in range(-1, num_rounds):  # the first pair warms up
            for kind in KINDS if number % 2 else reversed(KINDS):
                rate = asyncio.run(load(*found[kind], models, number))
                if number >= 0:
                    rates[kind].append(round(rate, 1))
    ratios = [full / bare for bare, full in zip(rates["bare"], rates["full"], strict=True)]
    return {
        "kind": "accounts",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **results.setup(),
        "hardware": describe_hardware(),
        "num_clients": NUM_CLIENTS,
        "num_requests": NUM_REQUESTS,
        "num_prompt_tokens": NUM_PROMPT_TOKENS,
        "num_output_tokens": NUM_OUTPUT_TOKENS,
        "tokens_per_s": rates,
        "median_ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def page(row: dict[str, Any]) -> str:
    """The page of one row."""
    bare, full = (statistics.median(row["tokens_per_s"][kind]) for kind in KINDS)
    lines = [
        "# What accounts cost",
        "",
        "Generated by `python -m benchmarks.accounts` from `benchmarks/results`; do not edit.",
        "",
        f"{row['num_clients']} clients, {row['num_requests']} streamed requests a round of {row['num_prompt_tokens']} "
        f"prompt and {row['num_output_tokens']} output tokens, over the bundled model and its adapters; rounds "
        "alternate between a bare server and one with accounts, limits of tenant and key, ledger and weighted VTC.",
        "",
        "| | output tokens per second, median |",
        "|---|---|",
        f"| bare | {bare:.0f} |",
        f"| accounts, limits, ledger, VTC | {full:.0f} |",
        f"| median of the rounds' ratios | {row['median_ratio']:.3f} |",
        f"| smallest and largest ratio | {min(row['ratios']):.3f}, {max(row['ratios']):.3f} |",
        "",
        f"{row['hardware']}; commit {row['commit']}; {row['date']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, or only report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the page from the newest row")
    parser.add_argument("--rounds", type=results.positive, default=24)
    options = parser.parse_args()
    if not options.report:
        row = measure(options.rounds)
        path = RESULTS / f"{row['date'][:10]}-accounts.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row))
    newest = max(RESULTS.glob("*-accounts.jsonl"))
    PAGE.write_text(page(json.loads(newest.read_text().splitlines()[-1])))


if __name__ == "__main__":
    main()
