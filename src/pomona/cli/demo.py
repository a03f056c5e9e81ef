"""``pomona demo``: one server, every adapter asked at once over HTTP, the answers in a table; then it keeps serving."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pomona.bench.events import DONE, EventSplitter
from pomona.cli.accuracy import BundledTask, read_tasks
from pomona.cli.build import adapters_dirs
from pomona.cli.config import AppConfig
from pomona.cli.hub import bundled_dir
from pomona.cli.options import print_table
from pomona.cli.serve import Running, run_server
from pomona.core.errors import ConfigError, PomonaError

_WORDS = ("banana", "orchard")
_MAX_TOKENS = 48


@dataclass(slots=True)
class Answer:
    """One streamed answer."""

    model: str
    prompt: str
    text: str = ""
    num_tokens: int = 0
    ttft_s: float = 0.0
    duration_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first token; 0 if there was only one."""
        rest = self.duration_s - self.ttft_s
        return (self.num_tokens - 1) / rest if self.num_tokens > 1 and rest > 0 else 0.0


def run_demo(config: AppConfig) -> None:
    """Serve the bundled model and show it at work.

    Raises:
        ConfigError: another model was asked for: the demo's questions are for the bundled adapters.
    """
    bundled = str(bundled_dir() / "adapters")
    if adapters_dirs(config) != [bundled]:
        raise ConfigError("the demo asks the bundled adapters; to serve your own use `pomona serve MODEL`")
    tasks = {task.name: task for task in read_tasks()}
    api_key = None if config.api_key is None else config.api_key.get_secret_value()

    async def show(running: Running) -> None:
        console = Console()
        answers, duration_s = await ask_all(
            running.url, running.base_name, [entry.name for entry in running.adapters.entries], api_key
        )
        ranks = {entry.name: entry.info.lora_rank for entry in running.adapters.entries if entry.info is not None}
        print_table(_table(answers, tasks, ranks, running.base_name))
        num_tokens = sum(answer.num_tokens for answer in answers)
        console.print(
            f"{len(answers)} requests to {len(ranks)} adapters and the base, in flight together: "
            f"{num_tokens} tokens in {duration_s * 1000:.0f} ms.\n",
            soft_wrap=True,
        )
        try_it = _try_it(running.url, next(iter(ranks)), asks_for_key=api_key is not None)
        console.print(try_it, markup=False, highlight=False, soft_wrap=True)

    run_server(config, show)


async def ask_all(
    url: str, base_name: str, adapters: list[str], api_key: str | None = None
) -> tuple[list[Answer], float]:
    """Send every word to every adapter and to the base, all at once.

    Args:
        url: root of the server.
        base_name: of the base model.
        adapters: names.
        api_key: what the server asks for.

    Returns:
        The answers, and the seconds until the last was complete.

    Raises:
        PomonaError: one was refused, or there was none.
    """
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120.0, trust_env=False) as client:
        started_s = time.perf_counter()
        asked = [_ask(client, model, word) for word in _WORDS for model in (base_name, *adapters)]
        try:
            answers = await asyncio.gather(*asked)
        except httpx.HTTPError as error:
            raise PomonaError(f"no answer from {url}: {error or type(error).__name__}") from error
        return list(answers), time.perf_counter() - started_s


async def _ask(client: httpx.AsyncClient, model: str, word: str) -> Answer:
    answer = Answer(model, word)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": word}],
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            await response.aread()
            raise PomonaError(f"{model}: {response.text}")
        async for chunk in _chunks(response):
            if chunk.get("usage"):
                answer.num_tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    answer.ttft_s = answer.ttft_s or time.perf_counter() - started_s
                    answer.text += piece
    answer.duration_s = time.perf_counter() - started_s
    return answer


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    splitter = EventSplitter()
    async for piece in response.aiter_bytes():
        for payload in splitter.feed(piece):
            if payload != DONE:
                yield json.loads(payload)


def _table(answers: list[Answer], tasks: dict[str, BundledTask], ranks: dict[str, int], base_name: str) -> Table:
    table = Table(
        "adapter", "rank", "prompt", "answer", "", "TTFT ms", "tokens/s", "does", header_style="bold", box=None
    )
    for answer in answers:
        is_base = answer.model == base_name
        task = tasks.get(answer.model)
        right = task.answers.get(answer.prompt) if task else None
        is_right = answer.text == right
        verdict = Text("right", "green") if is_right else Text("" if right is None else f"wrong: {right}", "red")
        table.add_row(
            "(base)" if is_base else answer.model,
            "" if is_base else str(ranks[answer.model]),
            answer.prompt,
            answer.text,
            verdict,
            f"{answer.ttft_s * 1000:.0f}",
            f"{answer.tokens_per_s:.0f}",
            Text("" if task is None else task.description, "dim"),
        )
    return table


def _try_it(url: str, adapter: str, *, asks_for_key: bool) -> str:
    # The key itself is not shown.
    key, words = ("KEY", ", with the server's API key for KEY") if asks_for_key else ("unused", "")
    header, flag = (" -H 'authorization: Bearer KEY'", " --api-key KEY") if asks_for_key else ("", "")
    body = json.dumps({"model": adapter, "messages": [{"role": "user", "content": "cider"}]})
    return f"""Still serving at {url}. Try it{words}:

  curl {url}/v1/chat/completions{header} -H 'content-type: application/json' -d '{body}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="{key}")
  answer = client.chat.completions.create(model="{adapter}", messages=[{{"role": "user", "content": "cider"}}])
  print(answer.choices[0].message.content)

  pomona chat --url {url}{flag} --model {adapter} cider
  pomona adapters list --url {url}{flag}

Ctrl-C stops."""
