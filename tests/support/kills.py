"""Kills servers and engines with SIGKILL at random moments under load, and then asks the ledger what it knows."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.tables import SpendingRow
from pomona.accounts.tenants import TenantStore
from pomona.accounts.usage import UsageFilter, UsageStore
from support.ledger_server import BASE
from support.tokenizers import make_tokenizer_files

_NUM_CLIENTS = 6
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Seen:
    """What a client saw of one request."""

    num_prompt_tokens: int
    num_tokens: int = 0
    is_whole: bool = False


@dataclass
class Summary:
    """What came of it."""

    num_server_kills: int = 0
    num_engine_kills: int = 0
    num_sent: int = 0
    num_seen: int = 0
    """Requests of which the client saw the beginning of an answer at least."""
    num_whole: int = 0
    num_rows: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Nothing missing, nothing twice, nothing wrong."""
        return not (self.missing or self.twice or self.wrong)


class KillRun:
    """One run.

    Args:
        folder: for everything.
        database_url: None is SQLite.
        seed: of the moments and victims.
    """

    def __init__(self, folder: Path, database_url: str | None, seed: int) -> None:
        self._folder = folder
        self._url = database_url
        self._random = random.Random(seed)
        self._seen: dict[str, Seen] = {}
        self._summary = Summary()
        self._config = AccountsConfig(data_dir=folder / "data", database_url=database_url)
        self._config.data_dir.mkdir()
        make_tokenizer_files(folder / "tokenizer")
        database = Database(self._config.url)
        database.migrate()
        store = TenantStore(database)
        store.create_tenant("acme")
        _, key = store.create_key("acme")
        database.close()
        self._headers = {"authorization": f"Bearer {key.text}"}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    async def run(self, num_kills: int) -> Summary:
        """Kill so many times; returns what the ledger says in the end."""
        start_s = time.monotonic()
        try:
            await self._start()
            clients = [asyncio.create_task(self._client(number)) for number in range(_NUM_CLIENTS)]
            for _ in range(num_kills):
                await asyncio.sleep(self._random.uniform(0.0, 1.0))
                await self._kill()
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            # The last start takes over what the last death left, and ends in an orderly way.
            await self._stop()
            await self._start()
            await self._stop()
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
        self._compare()
        self._summary.seconds = round(time.monotonic() - start_s, 1)
        return self._summary

    async def _start(self) -> None:
        command = [sys.executable, "-m", "support.ledger_server", str(self._folder), str(self._port)]
        command += [] if self._url is None else [self._url]
        paths = f"{_ROOT / 'src'}{os.pathsep}{_ROOT / 'tests'}"
        with (self._folder / "log").open("ab") as log:
            environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        await self._until_ready()

    async def _until_ready(self) -> None:
        assert self._process is not None
        give_up_s = time.monotonic() + 60.0
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.get(f"http://127.0.0.1:{self._port}/ready") as response:
                        if response.status == 200:
                            return
                assert self._process.poll() is None, (self._folder / "log").read_text()[-4000:]
                assert time.monotonic() < give_up_s, (self._folder / "log").read_text()[-4000:]
                await asyncio.sleep(0.02)

    async def _stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        await asyncio.to_thread(self._process.wait, 30.0)

    async def _kill(self) -> None:
        """The server, or its engine, which the server then starts again."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if self._random.random() < 0.4 and children:
            os.kill(int(children[-1]), signal.SIGKILL)
            self._summary.num_engine_kills += 1
            await asyncio.sleep(0.05)
            await self._until_ready()
            return
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        self._summary.num_server_kills += 1
        await self._start()

    async def _client(self, number: int) -> None:
        """Send requests one after the other, streamed and whole, short and long; some are given up half-way."""
        rng = random.Random(number)
        async with aiohttp.ClientSession() as session:
            while True:
                body = {
                    "model": BASE,
                    "prompt": [rng.randrange(1, 900) for _ in range(rng.randint(1, 40))],
                    "max_tokens": rng.choice((1, 5, 50, 300)),
                    "stream": rng.random() < 0.7,
                }
                self._summary.num_sent += 1
                try:
                    await self._ask(session, body, give_up_after=rng.choice((None, None, None, 3)))
                except (aiohttp.ClientError, OSError, TimeoutError):
                    await asyncio.sleep(0.05)  # nobody is there

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any], give_up_after: int | None) -> None:
        url = f"http://127.0.0.1:{self._port}/v1/completions"
        async with session.post(url, json=body, headers=self._headers) as response:
            if response.status != 200:
                await asyncio.sleep(0.05)
                return
            seen = self._seen[f"cmpl-{response.headers['x-request-id']}"] = Seen(len(body["prompt"]))
            if not body["stream"]:
                answer = json.loads(await response.read())
                seen.num_tokens, seen.is_whole = answer["usage"]["completion_tokens"], True
                return
            num_events = 0
            async for line in response.content:
                if line == b"data: [DONE]\n":
                    seen.is_whole = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return
                    num_events += 1
                    if num_events == give_up_after:
                        return
            if seen.is_whole:
                seen.num_tokens = body["max_tokens"]

    def _compare(self) -> None:
        database = Database(self._config.url)
        rows = [row for page in UsageStore(database).rows(UsageFilter()) for row in page]
        with database.session() as session:
            spent = session.get(SpendingRow, ("tenant", "acme", rows[0]["day"][:7]))
        database.close()
        summary = self._summary
        counts = Counter(row["request_id"] for row in rows)
        found = {row["request_id"]: row for row in rows}
        summary.num_seen, summary.num_rows = len(self._seen), len(rows)
        summary.num_whole = sum(seen.is_whole for seen in self._seen.values())
        summary.outcomes = dict(Counter(row["outcome"] for row in rows))
        summary.twice = [name for name, count in counts.items() if count > 1]
        summary.missing = [name for name in self._seen if name not in found]
        if len(rows) > summary.num_sent:
            summary.wrong.append(f"{len(rows)} rows of {summary.num_sent} requests")
        for name, seen in self._seen.items():
            row = found.get(name)
            if row is None:
                continue
            if row["input_tokens"] != seen.num_prompt_tokens or row["output_tokens"] < seen.num_tokens:
                summary.wrong.append(f"{name}: {seen} but {row}")
            if seen.is_whole and (row["outcome"], row["output_tokens"]) != ("finish", seen.num_tokens):
                summary.wrong.append(f"{name}: {seen} but {row}")
        total = sum(row["input_tokens"] + row["output_tokens"] for row in rows)
        if spent is None or (spent.num_requests, spent.num_tokens) != (len(rows), total):
            summary.wrong.append(f"the month's sums are {spent and (spent.num_requests, spent.num_tokens)}")
        left = sorted(path.name for path in (self._config.data_dir / "journal").iterdir() if path.name[0] != ".")
        if left:
            summary.wrong.append(f"journals are left: {left}")


def show(summary: Summary) -> str:
    """The summary as JSON for people."""
    return json.dumps({**asdict(summary), "is_clean": summary.is_clean}, indent=1)
