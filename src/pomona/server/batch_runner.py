"""Carries out batches: takes one that nobody works on, sends its requests through the application, writes answers.

Every line takes the way of a request from outside, with the limits, the ledger and the errors of the key that made the
batch; only its urgency differs. Answers are appended to the output files as they come, so that whoever takes the batch
over after a death goes on after the last whole line. A line whose answer was not yet written then runs again.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starlette.types import ASGIApp, Message

from pomona.accounts import clock
from pomona.accounts.accounts import Accounts
from pomona.accounts.batches import LEASE_S, Batch
from pomona.accounts.principal import Principal
from pomona.core.errors import AccountNotFoundError, DatabaseUnavailableError
from pomona.server.auth import TRUSTED_PRINCIPAL

_LOGGER = logging.getLogger(__name__)
_POLL_S: Final = 2.0
_MAX_LINES: Final = 50_000
_MAX_ERRORS: Final = 20
_RETRY_S: Final = 1.0
_MAX_RETRY_S: Final = 30.0
_BUSY: Final = frozenset({429, 503})
"""Answers after which a line waits and tries again."""


@dataclass(frozen=True, slots=True)
class _Line:
    custom_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    request_id: str
    body: Any
    retry_after_s: float


class BatchRunner:
    """Works on batches, one after the other. Belongs to the event loop.

    Args:
        app: the whole application.
        accounts: of the server.
        wake: set when there may be a new batch.
    """

    def __init__(self, app: ASGIApp, accounts: Accounts, wake: asyncio.Event) -> None:
        self._app = app
        self._accounts = accounts
        self._store = accounts.batches
        self._wake = wake

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                batch = await self._accounts.database.run(self._store.claim, self._accounts.process_id)
                if batch is not None:
                    await self._work(batch)
                    continue
            except DatabaseUnavailableError as error:
                _LOGGER.warning("Batches wait: %s", error)
            except OSError:
                _LOGGER.exception("A batch's files cannot be used; it is tried again later")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _POLL_S)
            self._wake.clear()

    async def _work(self, batch: Batch) -> None:
        try:
            lines, errors = await self._accounts.database.run(_read_lines, self._input_path(batch), batch.endpoint)
        except (AccountNotFoundError, FileNotFoundError):
            lines, errors = [], [{"code": "file_not_found", "message": "The input file is gone.", "line": None}]
        if errors:
            await self._end(batch, "failed", errors=json.dumps(errors))
            return
        files = _OutputFiles.open(self._store.path_of, batch, self._store.new_file_id)
        now_s = clock.now_s()
        names = {"output_file_id": files.output_id, "error_file_id": files.error_id}
        started = {"status": "in_progress", "in_progress_s": now_s} if batch.status == "validating" else {}
        await self._update(batch, num_total=len(lines), **names)
        if started:
            await self._update(batch, **started)
        todo = iter([line for line in lines if line.custom_id not in files.done])
        renewal = asyncio.create_task(self._renew(batch, files))
        workers = [
            asyncio.create_task(self._worker(batch, todo, files))
            for _ in range(self._accounts.config.batch_concurrency)
        ]
        try:
            ended = await self._wait(batch, workers, renewal)
        finally:
            for task in (renewal, *workers):
                task.cancel()
            await asyncio.gather(renewal, *workers, return_exceptions=True)
            files.close()
        if ended is not None:
            await self._finish(batch, ended, files)

    async def _wait(
        self, batch: Batch, workers: "list[asyncio.Task[None]]", renewal: "asyncio.Task[str | None]"
    ) -> str | None:
        """Wait for the end of all lines, or for another reason to stop. Returns how it ended; None if not by us."""
        pending: set[asyncio.Task[Any]] = {*workers, renewal}
        while pending - {renewal}:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if renewal in done:
                return renewal.result()
            for task in done:
                task.result()
        return "completed"

    async def _renew(self, batch: Batch, files: "_OutputFiles") -> str | None:
        """Keep the lease and tell of progress, until the batch is cancelled, expired or another process's."""
        while True:
            await asyncio.sleep(min(1.0, LEASE_S / 4))
            if clock.now_s() >= batch.expires_s:
                return "expired"
            try:
                now = await self._update(batch, num_completed=files.num_completed, num_failed=files.num_failed)
            except DatabaseUnavailableError as error:
                _LOGGER.warning("%s", error)
                continue
            if now is None:
                return None
            if now.status == "cancelling":
                return "cancelled"

    async def _finish(self, batch: Batch, status: str, files: "_OutputFiles") -> None:
        ids: dict[str, str | None] = {"output_file_id": None, "error_file_id": None}
        for name, file_id, count in (
            ("output_file_id", files.output_id, files.num_completed),
            ("error_file_id", files.error_id, files.num_failed),
        ):
            if count:
                filename = f"{batch.id}_{name.partition('_')[0]}.jsonl"
                add = self._store.add_file
                await self._accounts.database.run(add, file_id, batch.tenant_id, filename, "batch_output")
                ids[name] = file_id
            else:
                self._store.path_of(file_id).unlink(missing_ok=True)
        counts = {"num_completed": files.num_completed, "num_failed": files.num_failed}
        await self._end(batch, status, **ids, **counts)

    async def _end(self, batch: Batch, status: str, **values: Any) -> None:
        await self._update(batch, status=status, ended_s=clock.now_s(), is_released=True, **values)

    async def _update(self, batch: Batch, **values: Any) -> Batch | None:
        return await self._accounts.database.run(self._store.update, batch.id, self._accounts.process_id, **values)

    async def _worker(self, batch: Batch, todo: Iterator[_Line], files: "_OutputFiles") -> None:
        for line in todo:
            answer = await self._ask_until_answered(batch, line)
            files.write(line, answer)

    async def _ask_until_answered(self, batch: Batch, line: _Line) -> _Answer:
        wait_s = _RETRY_S
        while True:
            principal = await self._accounts.authenticator.principal_of(batch.key_id)
            if principal is None:
                error = {"message": "The API key that made this batch is no longer valid.", "code": "invalid_api_key"}
                return _Answer(401, "", {"error": error}, 0.0)
            answer = await self._ask(principal, batch.endpoint, line.body)
            if answer.status not in _BUSY or answer.retry_after_s < 0:
                return answer
            await asyncio.sleep(max(wait_s, min(answer.retry_after_s, _MAX_RETRY_S)))
            wait_s = min(2 * wait_s, _MAX_RETRY_S)

    async def _ask(self, principal: Principal, path: str, body: bytes) -> _Answer:
        """Send one request through the application, without a connection."""
        messages: list[Message] = []
        is_sent = False

        async def receive() -> Message:
            nonlocal is_sent
            if is_sent:
                await asyncio.Event().wait()  # the client never goes away
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            messages.append(message)

        await self._app(_scope(principal, path), receive, send)
        headers = {name.decode().lower(): value.decode() for name, value in messages[0]["headers"]}
        content = b"".join(message.get("body", b"") for message in messages[1:])
        # Refusals that can never succeed say so by having no time to try again.
        retry_after_s = float(headers.get("retry-after", "-1"))
        return _Answer(messages[0]["status"], headers.get("x-request-id", ""), json.loads(content), retry_after_s)

    def _input_path(self, batch: Batch) -> Path:
        return self._store.path_of(batch.input_file_id)


class _OutputFiles:
    """A batch's answers and errors, one JSON object per line."""

    def __init__(self, output: tuple[str, Path], error: tuple[str, Path]) -> None:
        self.output_id, self.error_id = output[0], error[0]
        self.done: set[str] = set()
        """Custom ids of lines that have their answer."""
        self.num_completed = _recover(output[1], self.done)
        self.num_failed = _recover(error[1], self.done)
        self._output = output[1].open("ab", buffering=0)
        self._error = error[1].open("ab", buffering=0)

    @classmethod
    def open(cls, path_of: Any, batch: Batch, new_id: Any) -> "_OutputFiles":
        """Begin, or go on where somebody else ended."""
        output_id, error_id = batch.output_file_id or new_id(), batch.error_file_id or new_id()
        return cls((output_id, path_of(output_id)), (error_id, path_of(error_id)))

    def write(self, line: _Line, answer: _Answer) -> None:
        """Append an answer."""
        is_ok = answer.status == 200
        record = {
            "id": f"batch_req_{secrets.token_hex(16)}",
            "custom_id": line.custom_id,
            "response": {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body},
            "error": None,
        }
        content = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        (self._output if is_ok else self._error).write(content)
        if is_ok:
            self.num_completed += 1
        else:
            self.num_failed += 1

    def close(self) -> None:
        """Close both."""
        self._output.close()
        self._error.close()


def _recover(path: Path, done: set[str]) -> int:
    """Cut a torn last line off; return how many whole lines there are."""
    if not path.exists():
        path.touch(mode=0o600)
        return 0
    count = end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            done.add(json.loads(line)["custom_id"])
            count, end = count + 1, end + len(line)
    os.truncate(path, end)
    return count


def _read_lines(path: Path, endpoint: str) -> tuple[list[_Line], list[dict[str, Any]]]:
    """Check a batch's input file; returns its lines, or what is wrong with the first few bad ones."""
    lines: list[_Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            problem, line = _check_line(text, endpoint, seen)
            if line is not None:
                seen.add(line.custom_id)
                lines.append(line)
            if len(lines) > _MAX_LINES:
                problem = ("too_many_requests", f"The file has more than {_MAX_LINES} requests.")
            if problem is not None:
                errors.append({"code": problem[0], "message": problem[1], "line": number})
                if len(errors) >= _MAX_ERRORS or len(lines) > _MAX_LINES:
                    break
    if not lines and not errors:
        errors.append({"code": "empty_file", "message": "The file has no requests.", "line": None})
    return lines, errors


def _check_line(text: bytes, endpoint: str, seen: set[str]) -> tuple[tuple[str, str] | None, _Line | None]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return ("invalid_json_line", "This line is not valid JSON."), None
    if not isinstance(content, dict):
        return ("invalid_json_line", "This line is not a JSON object."), None
    custom_id, body = content.get("custom_id"), content.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        return ("missing_required_parameter", "custom_id must be a text of 1 to 512 characters."), None
    if custom_id in seen:
        return ("duplicate_custom_id", "This custom_id was used on an earlier line."), None
    if content.get("method") != "POST":
        return ("invalid_method", "method must be POST."), None
    if content.get("url") != endpoint:
        return ("mismatched_endpoint", f"url must be {endpoint}, the endpoint of the batch."), None
    if not isinstance(body, dict):
        return ("missing_required_parameter", "body must be a JSON object."), None
    if body.get("stream"):
        return ("invalid_request", "Answers of a batch cannot be streamed."), None
    return None, _Line(custom_id, json.dumps(body).encode())


def _scope(principal: Principal, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
        "state": {"is_batch": True},
        TRUSTED_PRINCIPAL: principal,
    }


@contextlib.asynccontextmanager
async def running_batches(app: ASGIApp, accounts: Accounts | None, wake: asyncio.Event) -> AsyncIterator[None]:
    """Work on batches beside the block, if there are accounts."""
    if accounts is None:
        yield
        return
    task = asyncio.create_task(BatchRunner(app, accounts, wake).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
