"""Clients that ask, clients that change what names mean, people who look, and one who kills the engine: all at once."""

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import aiohttp

from pomona.cli.config import BUNDLED_MODEL
from pomona.driver.client import ProcessClient
from pomona.server.adapter_service import AdapterService
from support.driver import until
from support.versions import Meanings

LIMIT_S = 60.0
"""Whatever takes longer hangs."""
_NUM_ASKERS, _NUM_CHANGERS = 14, 4


@dataclass(frozen=True, slots=True)
class Scale:
    """How long and how hard."""

    num_answers: int
    """Whole answers until it is enough."""
    num_kills: int
    """Of the engine, spread over the answers."""
    seed: int


@dataclass(frozen=True, slots=True)
class Question:
    """What a client asks, apart from whom."""

    prompt: str
    num_tokens: int

    def body(self, name: str, *, stream: bool = False) -> dict[str, Any]:
        """Of a completion request."""
        words = {"model": name, "prompt": self.prompt, "max_tokens": self.num_tokens, "stream": stream}
        return {**words, "temperature": 0, "ignore_eos": True}


@dataclass(slots=True)
class Seen:
    """What a client saw of one answer."""

    name: str
    question: Question
    sent: int
    accepted: int = 0
    """When the answer's status arrived; if none did, when the client gave up."""
    ended: int = 0
    text: str = ""
    outcome: str = "gone"
    """whole, absent, unavailable or gone; everything else is wrong."""


class Storm:
    """One storm over one server.

    Args:
        url: of the server.
        client: its engine.
        service: its adapters, to see when something is under way.
        questions: what clients ask.
        versions: of which source each; names begin with meaning the version called the same.
        bad_sources: what is refused with which status.
    """

    def __init__(
        self,
        url: str,
        client: ProcessClient,
        service: AdapterService,
        questions: Sequence[Question],
        versions: Mapping[str, str],
        bad_sources: Mapping[str, int],
    ) -> None:
        self.seen: list[Seen] = []
        self.events: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.meanings = Meanings()
        self.outages: list[tuple[int, int]] = []
        """From a kill to the readiness of the next engine."""
        self.unavailable: list[tuple[str, int, int]] = []
        """Changes that were answered with 503: what, from when to when."""
        self._url = url
        self._client = client
        self._service = service
        self._questions = questions
        self._versions = versions
        self._names = (*versions, "late")
        self._bad_sources = bad_sources
        self._is_over = False
        for name in versions:
            self.meanings.end(self.meanings.begin(name, name))

    async def run(self, scale: Scale) -> None:
        """Blow until there were enough answers and kills; then let everybody come to an end."""
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(self._url, connector=connector, timeout=aiohttp.ClientTimeout()) as http,
            asyncio.TaskGroup() as group,
        ):

            def begin(actor: Callable[..., Awaitable[None]], number: int) -> None:
                group.create_task(self._repeat(actor, http, random.Random(f"{scale.seed} {actor.__name__} {number}")))

            for number in range(_NUM_ASKERS):
                begin(self._ask, number)
            for number in range(_NUM_CHANGERS):
                begin(self._change, number)
            begin(self._look, 0)
            for number in range(1, scale.num_kills + 1):
                await self._until_answered(scale.num_answers * number // (scale.num_kills + 1))
                await self._kill()
            await self._until_answered(scale.num_answers)
            self._is_over = True

    def judge(self, expected: Mapping[Question, Mapping[str | None, str]]) -> None:
        """Compare what was seen with what each version answers; to be called when all is over. Adds to ``wrong``."""
        for what, began, ended in self.unavailable:
            self._judge_outage(what, began, ended)
        for seen in self.seen:
            what = f"a request for {seen.name} from {seen.sent} to {seen.ended}"
            if seen.outcome == "unavailable":
                self._judge_outage(what, seen.sent, seen.ended)
            elif seen.outcome not in ("whole", "gone", "absent"):
                self.wrong.append(f"{what}: {seen.outcome}")
            possible = (
                {None} if seen.name == BUNDLED_MODEL else self.meanings.possible(seen.name, seen.sent, seen.accepted)
            )
            if seen.outcome == "absent":
                if None not in possible or seen.name == BUNDLED_MODEL:
                    self.wrong.append(f"{what} was not found")
                continue
            texts = [expected[seen.question][version] for version in possible if version or seen.name == BUNDLED_MODEL]
            is_right = (
                seen.text in texts if seen.outcome == "whole" else any(text.startswith(seen.text) for text in texts)
            )
            if not is_right and (seen.text or seen.outcome == "whole"):
                who = [version for version, text in expected[seen.question].items() if text.startswith(seen.text)]
                self.wrong.append(f"{what} was answered by {who}, allowed were {possible}")

    def _judge_outage(self, what: str, began: int, ended: int) -> None:
        if not any(began < back and killed < ended for killed, back in self.outages):
            self.wrong.append(f"{what} was answered with 503 while there was an engine")

    async def _until_answered(self, num_answers: int) -> None:
        await until(lambda: self.events["whole"] >= num_answers or bool(self.wrong), "enough answers", 20 * LIMIT_S)

    async def _kill(self) -> None:
        """End the engine while adapters are brought in, and wait for the next."""
        await until(lambda: self._service.num_waiting > 0 or bool(self.wrong), "a load for a request", LIMIT_S)
        began, num_restarts = self.meanings.tick(), self._client.num_restarts
        self.events["engine killed"] += 1
        self.events["waiting for adapters when it was killed"] += self._service.num_waiting
        os.kill(self._client.pid, signal.SIGKILL)
        await until(
            lambda: self._client.num_restarts > num_restarts and self._client.is_ready,
            "the engine is back",
            4 * LIMIT_S,  # a process that imports torch, beside everything else
        )
        self.outages.append((began, self.meanings.tick()))

    async def _repeat(
        self, actor: Callable[..., Awaitable[None]], http: aiohttp.ClientSession, rng: random.Random
    ) -> None:
        while not self._is_over:
            await actor(http, rng)

    def _draw_name(self, rng: random.Random) -> str:
        return self._names[min(int(rng.expovariate(0.4)), len(self._names) - 1)]

    async def _ask(self, http: aiohttp.ClientSession, rng: random.Random) -> None:
        """Ask; one in four goes away, after some pieces or some time."""
        name = BUNDLED_MODEL if rng.random() < 0.05 else self._draw_name(rng)
        seen = Seen(name, rng.choice(self._questions), self.meanings.tick())
        stream = rng.random() < 0.7
        patience_s = rng.uniform(0.0, 0.15) if rng.random() < 0.15 else None
        num_pieces = rng.randrange(12) if stream and rng.random() < 0.15 else None
        try:
            async with asyncio.timeout(patience_s or LIMIT_S):
                async with http.post("/v1/completions", json=seen.question.body(name, stream=stream)) as response:
                    seen.accepted = self.meanings.tick()
                    await self._read(response, seen, num_pieces)
        except TimeoutError:
            if patience_s is None:
                seen.outcome = "hangs"
        seen.ended = self.meanings.tick()
        seen.accepted = seen.accepted or seen.ended
        self.seen.append(seen)
        self.events[seen.outcome] += 1
        if seen.outcome in ("unavailable", "absent"):
            await asyncio.sleep(rng.uniform(0.0, 0.2))

    async def _read(self, response: aiohttp.ClientResponse, seen: Seen, num_pieces: int | None) -> None:
        if response.status != 200:
            seen.outcome = _outcome_of(response.status, (await response.json())["error"]["code"])
            return
        if response.content_type == "application/json":
            seen.text = (await response.json())["choices"][0]["text"]
            seen.outcome = "whole"
            return
        async for line in response.content:
            if num_pieces == 0:
                return
            if line == b"data: [DONE]\n" and seen.outcome == "gone":
                seen.outcome = "whole"
            elif line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    seen.outcome = _outcome_of(503, event["error"]["code"])
                    continue
                seen.text += event["choices"][0]["text"]
                num_pieces = None if num_pieces is None else num_pieces - 1

    async def _change(self, http: aiohttp.ClientSession, rng: random.Random) -> None:
        """Change what a name means, or try to, or whether it may be evicted."""
        await asyncio.sleep(rng.uniform(0.0, 0.06))
        name = self._draw_name(rng)
        kind = rng.choices(("load", "unload", "refused load", "pin"), (55, 15, 10, 20))[0]
        if kind == "load":
            version = rng.choice(tuple(self._versions))
            body = {"name": name, "source": self._versions[version]}
            await self._do(kind, http.post("/v1/adapters", json=body), rng, name, version)
        elif kind == "unload":
            await self._do(kind, http.delete(f"/v1/adapters/{name}"), rng, name, None)
        elif kind == "pin":
            await self._pin(http, name, is_pinned=rng.random() < 0.4)
        else:
            source, status = rng.choice(tuple(self._bad_sources.items()))
            began = self.meanings.tick()
            async with (
                asyncio.timeout(LIMIT_S),
                http.post("/v1/adapters", json={"name": name, "source": source}) as answer,
            ):
                self._check_status(f"loading {source}", answer.status, {status}, began)
            self.events[kind] += 1

    async def _do(
        self,
        kind: str,
        call: AbstractAsyncContextManager[aiohttp.ClientResponse],
        rng: random.Random,
        name: str,
        version: str | None,
    ) -> None:
        """One change; one in eight callers does not wait for the answer, so nobody knows when it happens."""
        change = self.meanings.begin(name, version)
        patience_s = rng.uniform(0.0, 0.05) if rng.random() < 0.12 else None
        try:
            async with asyncio.timeout(patience_s or LIMIT_S), call as answer:
                self.meanings.end(change, is_refused=answer.status != 200)
                allowed = {200} if kind == "load" else {200, 404}
                self._check_status(kind, answer.status, allowed, int(change.began))
                self.events[kind if answer.status == 200 else f"{kind}, answered with {answer.status}"] += 1
        except TimeoutError:
            self.events[f"{kind}, caller gone"] += 1
            if patience_s is None:
                self.wrong.append(f"{kind} of {name} hangs")

    async def _pin(self, http: aiohttp.ClientSession, name: str, *, is_pinned: bool) -> None:
        async with asyncio.timeout(LIMIT_S), http.patch(f"/v1/adapters/{name}", json={"pinned": is_pinned}) as answer:
            # Half of the budget may be pinned already, or the name be gone.
            if answer.status not in (200, 400, 404):
                self.wrong.append(f"pinning {name} is answered with {answer.status}")
            self.events["pin" if is_pinned else "unpin"] += answer.status == 200

    async def _look(self, http: aiohttp.ClientSession, rng: random.Random) -> None:
        """Read what operators read."""
        await asyncio.sleep(rng.uniform(0.0, 0.1))
        for path in ("/v1/adapters", "/v1/models", "/metrics"):
            async with asyncio.timeout(LIMIT_S), http.get(path) as answer:
                if answer.status != 200:
                    self.wrong.append(f"{path} is answered with {answer.status}")
        cache = self._service.host.cache
        if cache.num_bytes > cache.max_bytes:
            self.wrong.append(f"{cache.num_bytes} bytes are staged, the budget is {cache.max_bytes}")
        self.events["look"] += 1

    def _check_status(self, what: str, status: int, allowed: set[int], began: int) -> None:
        """503 is a proper answer as well, for who asks while there is no engine; that is judged in the end."""
        if status == 503:
            self.unavailable.append((what, began, self.meanings.tick()))
        elif status not in allowed:
            self.wrong.append(f"{what} is answered with {status}")


def _outcome_of(status: int, code: str) -> str:
    known = {
        (404, "model_not_found"): "absent",
        (503, "engine_unavailable"): "unavailable",
        (503, "engine_died"): "unavailable",
    }
    return known.get((status, code), f"{status} {code}")
