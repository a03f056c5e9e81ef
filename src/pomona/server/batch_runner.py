"""Carries out batches: takes those that nobody works on, sends their requests through the application, writes answers.

Every line takes the way of a request from outside, with the limits, the ledger and the errors of the key that made the
batch; only its urgency differs. Answers are appended to the output files as they come, so that whoever takes the batch
over after a death goes on after the last whole line. A line whose answer was not yet written then runs again, under
the same id: the ledger has one row of it, of the first run that has answered it.

Batches of different tenants are worked on beside each other, one of each: whatever a tenant's lines have to wait for,
only its own batches wait with them.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

from starlette.types import ASGIApp, Message

from pomona.accounts import clock
from pomona.accounts.accounts import Accounts
from pomona.accounts.batches import LEASE_S, Batch
from pomona.accounts.principal import Principal
from pomona.core.errors import AccountNotFoundError, DatabaseUnavailableError
from pomona.server.auth import TRUSTED_PRINCIPAL
from pomona.server.batch_files import Answer, Line, OutputFiles, Problems, read_lines

_LOGGER = logging.getLogger(__name__)
_POLL_S: Final = 2.0
_MAX_BATCHES: Final = 32
"""Worked on at once. Most of them wait, for a limit or an adapter, and cost little then."""
_MAX_REQUESTS: Final = 64
"""In flight at once, of all batches together: the engine's queue must keep room for everybody else."""
_MAX_DEATHS: Final = 2
"""Of the engine, with the same line in it; then that has failed. Everybody's requests die with the engine."""
_RETRY_S: Final = 1.0
_MAX_RETRY_S: Final = 30.0
_FAILED: Final = "The server failed; the operator can find out why in its log."


class BatchRunner:
    """Works on batches. Belongs to the event loop.

    Args:
        app: the whole application.
        accounts: of the server.
        wake: set when there may be a new batch.
        max_line_bytes: of an input file.
    """

    def __init__(self, app: ASGIApp, accounts: Accounts, wake: asyncio.Event, max_line_bytes: int) -> None:
        self._app = app
        self._accounts = accounts
        self._store = accounts.batches
        self._wake = wake
        self._max_line_bytes = max_line_bytes
        self._working: dict[str, asyncio.Task[None]] = {}
        """Tenant -> work on a batch of it."""
        self._leased_until_s: dict[str, float] = {}
        """Batch -> monotonic time from which on another process may work on it."""
        self._requests = asyncio.Semaphore(_MAX_REQUESTS)
        self._suspects = asyncio.Lock()
        """For lines with which the engine died: one at a time, so that only the one to blame dies with it again."""

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                await self._take_up()
                with contextlib.suppress(TimeoutError):
                    # Not wait_for, which in Python 3.11 swallows a cancellation that comes with the event.
                    async with asyncio.timeout(_POLL_S):
                        await self._wake.wait()
                self._wake.clear()
        finally:
            works = list(self._working.values())
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _take_up(self) -> None:
        """Begin to work on what nobody works on, as far as there is room."""
        try:
            while len(self._working) < _MAX_BATCHES:
                batch = await self._accounts.database.run(
                    self._store.claim, self._accounts.process_id, tuple(self._working)
                )
                if batch is None:
                    return
                self._working[batch.tenant_id] = asyncio.create_task(self._work(batch))
        except DatabaseUnavailableError as error:
            _LOGGER.warning("Batches wait: %s", error)
        except Exception:
            _LOGGER.exception("Batches wait: this is a bug")

    async def _work(self, batch: Batch) -> None:
        """Work on a batch until it has ended. What goes wrong concerns this batch only."""
        try:
            await self._carry_out(batch)
        except DatabaseUnavailableError as error:
            _LOGGER.warning("The batch %s waits: %s", batch.id, error)
        except OSError:
            _LOGGER.exception("The files of the batch %s cannot be used; it is tried again later", batch.id)
        except Exception:
            _LOGGER.exception("The batch %s waits: this is a bug", batch.id)
        finally:
            del self._working[batch.tenant_id]
            self._leased_until_s.pop(batch.id, None)
            self._wake.set()

    async def _carry_out(self, batch: Batch) -> None:
        run_long = self._accounts.database.run_long
        async with self._leased(batch):
            files = await run_long(OutputFiles.open, self._store.path_of, batch)
        problems: Problems = []
        try:
            ended = _end_of(batch)
            if ended is None:
                async with self._leased(batch):
                    lines, problems = await self._lines_of(batch)
                ended = "failed" if problems else await self._ask_all(batch, lines, files)
        except (DatabaseUnavailableError, OSError):
            raise
        except Exception:
            _LOGGER.exception("The batch %s failed: this is a bug", batch.id)
            ended = "failed"  # and not tried again: it would fail again
            problems = [{"code": "internal_error", "message": _FAILED, "line": None}]
        finally:
            files.close()
        if ended is not None:
            await self._finish(batch, ended, files, problems)

    @contextlib.asynccontextmanager
    async def _leased(self, batch: Batch) -> AsyncIterator[None]:
        """Keep the lease for the length of the block, however large the files are and however many wait before them."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(LEASE_S / 4)
                with contextlib.suppress(DatabaseUnavailableError):
                    await self._update(batch)

        renewal = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)

    async def _lines_of(self, batch: Batch) -> tuple[list[Line], Problems]:
        try:
            path, max_bytes = self._input_path(batch), self._max_line_bytes
            return await self._accounts.database.run_long(read_lines, path, batch.endpoint, max_bytes)
        except (AccountNotFoundError, FileNotFoundError):
            return [], [{"code": "file_not_found", "message": "The input file is gone.", "line": None}]

    async def _ask_all(self, batch: Batch, lines: list[Line], files: OutputFiles) -> str | None:
        """Have all lines answered that are not yet. Returns how the batch ended; None if not by us."""
        about = {"num_total": len(lines), "output_file_id": files.output_id, "error_file_id": files.error_id}
        started = {"status": "in_progress", "in_progress_s": clock.now_s()} if batch.status == "validating" else {}
        # The first is None too if the batch has been cancelled since it was claimed.
        now = await self._update(batch, **about, **started) or await self._update(batch, **about)
        if now is None or _end_of(now) is not None:
            return None if now is None else _end_of(now)
        todo = iter([line for line in lines if line.custom_id not in files.done])
        renewal = asyncio.create_task(self._renew(batch, files))
        num_workers = self._accounts.config.batch_concurrency
        places = _Places(num_workers)
        workers = [asyncio.create_task(self._worker(batch, todo, files, places)) for _ in range(num_workers)]
        try:
            return await self._wait(workers, renewal)
        finally:
            for task in (renewal, *workers):
                task.cancel()
            await asyncio.gather(renewal, *workers, return_exceptions=True)

    async def _wait(self, workers: "list[asyncio.Task[None]]", renewal: "asyncio.Task[str | None]") -> str | None:
        """Wait for the end of all lines, or for another reason to stop. Returns how it ended; None if not by us."""
        pending: set[asyncio.Task[Any]] = {*workers, renewal}
        while pending - {renewal}:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if renewal in done:
                return renewal.result()
            for task in done:
                task.result()
        return "completed"

    async def _renew(self, batch: Batch, files: OutputFiles) -> str | None:
        """Keep the lease and tell of progress, until the batch is cancelled, expired or another process's."""
        while True:
            await asyncio.sleep(min(1.0, LEASE_S / 4))
            try:
                now = await self._update(batch, num_completed=files.num_completed, num_failed=files.num_failed)
            except DatabaseUnavailableError as error:
                _LOGGER.warning("%s", error)
                continue
            if now is None or _end_of(now) is not None:
                return None if now is None else _end_of(now)

    async def _finish(self, batch: Batch, status: str, files: OutputFiles, problems: Problems) -> None:
        if await self._update(batch) is None:
            return  # another process's by now, its files too
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
        values = {
            "errors": json.dumps(problems) if problems else None,
            "num_completed": files.num_completed,
            "num_failed": files.num_failed,
            "ended_s": clock.now_s(),
            "is_released": True,
            **ids,
        }
        if await self._update(batch, status=status, **values) is None and status == "completed":
            await self._update(batch, status="cancelled", **values)  # that came between

    async def _update(self, batch: Batch, **values: Any) -> Batch | None:
        now_s = time.monotonic()
        update = self._store.update
        now = await self._accounts.database.run(update, batch.id, self._accounts.process_id, **values)
        if now is not None:
            self._leased_until_s[batch.id] = now_s + LEASE_S
        return now

    async def _worker(self, batch: Batch, todo: Iterator[Line], files: OutputFiles, places: "_Places") -> None:
        for line in todo:
            answer = await self._ask_until_answered(batch, line, places)
            while time.monotonic() >= self._leased_until_s[batch.id]:
                await asyncio.sleep(_RETRY_S)  # until the database says whose the batch is: two must not write
            files.write(line, answer)

    async def _ask_until_answered(self, batch: Batch, line: Line, places: "_Places") -> Answer:
        wait_s, num_deaths = _RETRY_S, 0
        body = await self._accounts.database.run(line.read, self._input_path(batch))
        while True:
            principal = await self._accounts.authenticator.principal_of(batch.key_id)
            if principal is None:
                error = {"message": "The API key that made this batch is no longer valid.", "code": "invalid_api_key"}
                return Answer(401, "", {"error": error}, 0.0)
            is_suspect = num_deaths > 0
            suspects = self._suspects if is_suspect else contextlib.nullcontext()
            async with suspects, places.taken(is_alone=is_suspect), self._requests:
                answer = await self._ask(principal, batch, line, body)
            num_deaths += answer.is_of_a_death
            if answer.is_final or num_deaths == _MAX_DEATHS:
                return answer
            await asyncio.sleep(max(wait_s, min(answer.retry_after_s, _MAX_RETRY_S)))
            wait_s = min(2 * wait_s, _MAX_RETRY_S)

    async def _ask(self, principal: Principal, batch: Batch, line: Line, body: bytes) -> Answer:
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

        await self._app(_scope(principal, batch, line), receive, send)
        headers = {name.decode().lower(): value.decode() for name, value in messages[0]["headers"]}
        content = b"".join(message.get("body", b"") for message in messages[1:])
        retry_after_s = float(headers.get("retry-after", "-1"))
        return Answer(messages[0]["status"], headers.get("x-request-id", ""), json.loads(content), retry_after_s)

    def _input_path(self, batch: Batch) -> Path:
        return self._store.path_of(batch.input_file_id)


class _Places:
    """Of lines of one batch in flight: one each; or all for a line that is to be alone. Other tenants' batches do not
    wait for that."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._free = asyncio.Semaphore(num_places)
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def taken(self, *, is_alone: bool) -> AsyncIterator[None]:
        """Have one or all for the length of the block."""
        async with contextlib.AsyncExitStack() as taken:
            async with self._turn:
                for _ in range(self._num_places if is_alone else 1):
                    await taken.enter_async_context(self._free)
            yield


def _end_of(batch: Batch) -> str | None:
    """Return how a batch ends before its last line, if it does: somebody wanted it to, or its time is over."""
    if batch.status == "cancelling":
        return "cancelled"
    return "expired" if clock.now_s() >= batch.expires_s else None


def _scope(principal: Principal, batch: Batch, line: Line) -> dict[str, Any]:
    path, name = batch.endpoint, f"{batch.id} {line.custom_id}"
    request_id = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:32]
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
        "state": {"is_batch": True, "request_id": request_id},
        TRUSTED_PRINCIPAL: principal,
    }


@contextlib.asynccontextmanager
async def running_batches(
    app: ASGIApp, accounts: Accounts | None, wake: asyncio.Event, max_line_bytes: int
) -> AsyncIterator[None]:
    """Work on batches beside the block, if there are accounts."""
    if accounts is None:
        yield
        return
    task = asyncio.create_task(BatchRunner(app, accounts, wake, max_line_bytes).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
