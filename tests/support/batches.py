"""Batches of a server with accounts, as OpenAI's own client sends and reads them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from openai import AsyncOpenAI
from openai.types import Batch

from pomona.server.batch_runner import running_batches
from support.accounts import ServedAccounts
from support.server import BASE


@contextlib.asynccontextmanager
async def working(served: ServedAccounts) -> AsyncIterator[None]:
    """Let the server work on batches."""
    context = served.served.app.state.context
    async with running_batches(served.served.app, served.accounts, context.wake_batches, context.config.max_body_bytes):
        yield


def body(prompt: str = "one two", **fields: Any) -> dict[str, Any]:
    """The body of a line."""
    return {"model": BASE, "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}


def lines(*bodies: Any, url: str = "/v1/completions") -> bytes:
    """A file of lines with these bodies, called line-0 and so on."""
    return b"".join(
        json.dumps({"custom_id": f"line-{index}", "method": "POST", "url": url, "body": body}).encode() + b"\n"
        for index, body in enumerate(bodies)
    )


async def start(client: AsyncOpenAI, content: bytes, endpoint: str = "/v1/completions", **fields: Any) -> Batch:
    """Upload a file and begin a batch of it."""
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await start_with(client, file.id, endpoint, **fields)


async def start_with(client: AsyncOpenAI, file_id: str, endpoint: str = "/v1/completions", **fields: Any) -> Batch:
    """Begin a batch of a file that is there."""
    which: Any = endpoint
    return await client.batches.create(input_file_id=file_id, endpoint=which, completion_window="24h", **fields)


async def until_ended(client: AsyncOpenAI, batch: Batch) -> Batch:
    """Wait until a batch has ended; returns how it is then."""
    async with asyncio.timeout(30):
        while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
            await asyncio.sleep(0.05)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def results(client: AsyncOpenAI, file_id: str) -> dict[str, Any]:
    """The lines of a file of results, by what they are called."""
    content = await client.files.content(file_id)
    return {json.loads(line)["custom_id"]: json.loads(line) for line in content.text.splitlines()}
