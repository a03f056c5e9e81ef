"""The ledger: exactly one row of usage per accepted request, whoever dies when; a batch's line is one request, which
has its row when it is answered, however often it was begun.

A request is written into this process's journal before the engine sees it, its tokens are counted there before the
client sees them, and its end is written there in the same turn of the event loop in which it ends. From the journal
rows go to the database in groups, keyed by request id, so that a group sent twice changes nothing; a journal is removed
only after the commit. Journals of processes that have died are taken over by whoever starts, or looks, next.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pomona.accounts import clock
from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.journal import (
    Counted,
    Journal,
    Start,
    Usage,
    clear_left_overs,
    dead_journals,
    remove_folder,
)
from pomona.accounts.usage_rows import Prices, Spending, insert_usage, read_prices
from pomona.core.errors import DatabaseUnavailableError
from pomona.core.output import RequestOutput

_LOGGER = logging.getLogger(__name__)
_SHIP_INTERVAL_S: Final = 0.2
_ROUNDS_PER_ADOPTION: Final = 150
_RETRY_S: Final = 1.0
_GROUP: Final = 500
JOURNAL_FOLDER: Final = "journal"


class Entry:
    """One request's line, from its acceptance to its end. Belongs to the event loop.

    Args:
        ledger: where it will be written.
        start: as it was written.
        choices_per_prompt: of the request; the first choice of each prompt says what of the prompt was cached.
    """

    __slots__ = (
        "_begun_s",
        "_choices_per_prompt",
        "_engine_s",
        "_is_closed",
        "_ledger",
        "_prompts",
        "counted",
        "start",
    )

    def __init__(self, ledger: "Ledger", start: Start, choices_per_prompt: int) -> None:
        self._ledger = ledger
        self._choices_per_prompt = choices_per_prompt
        self._begun_s: dict[int, float] = {}
        """Choice in the engine -> since when."""
        self._prompts: set[int] = set()
        """Prompts that the engine has begun with."""
        self._engine_s = 0.0
        self._is_closed = False
        self.start = start
        self.counted = Counted()
        """So far, over all choices."""

    def note(self, index: int, output: RequestOutput, now_s: float) -> None:
        """Count one output of choice ``index`` that the engine has reported, before anything is made of it.

        Args:
            index: of the choice.
            output: of the engine.
            now_s: on the engine's clock.
        """
        num_output, num_cached, num_input = self.counted
        if index not in self._begun_s and output.first_scheduled_s is not None:
            self._begun_s[index] = output.first_scheduled_s
            prompt = index // self._choices_per_prompt
            if prompt not in self._prompts:
                # The prompt's other choices find in the cache what this one computes; that is no discount.
                self._prompts.add(prompt)
                num_cached += output.num_cached_tokens
                num_input += self.start.prompt_tokens[prompt]
        self.counted = Counted(num_output + len(output.new_token_ids), num_cached, num_input)
        self._ledger.advance(self.start, self.counted)
        if output.finish_reason is not None:
            self._end_choice(index, now_s)

    def _end_choice(self, index: int, now_s: float) -> None:
        """Note that a choice has left the engine."""
        begun_s = self._begun_s.get(index)
        if begun_s is not None:
            self._engine_s += max(0.0, now_s - begun_s)
            self._begun_s[index] = now_s

    def close(self, outcome: str, now_s: float) -> None:
        """Write the row: the request has ended. Only the first time counts.

        Args:
            outcome: finish, abort, fail or reject.
            now_s: on the engine's clock.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for index in self._begun_s:
            self._end_choice(index, now_s)
        start = self.start
        usage = Usage(
            number=start.number,
            request_id=start.request_id,
            tenant_id=start.tenant_id,
            key_id=start.key_id,
            root_id=start.root_id,
            adapter=start.adapter,
            adapter_id=start.adapter_id,
            **self.counted._asdict(),
            engine_s=self._engine_s,
            outcome=outcome,
            started_s=start.started_s,
            ended_s=clock.now_s(),
            is_batch=start.is_batch,
        )
        self._ledger.finish(start, usage)


class Ledger:
    """Writes the ledger. Belongs to one event loop.

    Args:
        database: migrated.
        config: where the journal lies, and what to do without the database.
        process_id: of this server process; never used before.
        on_spending: called on the event loop with the new sums, and the requests, of every group that has arrived in
            the database.
    """

    def __init__(
        self,
        database: Database,
        config: AccountsConfig,
        process_id: str,
        on_spending: Callable[[list[Spending], list[str]], None],
    ) -> None:
        self._database = database
        self._config = config
        self._folder = config.data_dir / JOURNAL_FOLDER
        self._journal = Journal(self._folder, process_id)
        self._on_spending = on_spending
        self._position = (0, 0)
        self._num_written = 0
        self._num_synced = 0
        self._num_shipped = 0
        self._num_ended = 0
        self._num_own_rows = 0
        self._num_adopted_rows = 0
        self._num_failed_writes = 0
        self._unwritten: list[tuple[Start, Usage]] = []
        self._prices: list[Prices] = []
        """What holds now, if it has been read; another list after every change."""
        self._shipping = asyncio.Lock()

    @property
    def num_open(self) -> int:
        """Requests that have begun and not ended."""
        return self._journal.num_open

    def totals(self) -> Mapping[str, float]:
        """Return what is exported, by the ``stat`` of ``metrics.registry.LEDGER_METRICS``."""
        return {
            "rows": self._num_own_rows + self._num_adopted_rows,
            "waiting_rows": self._num_ended - self._num_own_rows,
            "open_requests": self._journal.num_open - len(self._unwritten),
            "journal_bytes": self._journal.num_bytes,
            "failed_writes": self._num_failed_writes,
            "database_down_seconds": self._database.down_s,
        }

    def check(self) -> None:
        """Ask whether a request may be accepted now.

        Raises:
            DatabaseUnavailableError: the database is down and the operator wants no requests then, or too much waits.
        """
        if self._config.when_database_is_down == "refuse" and self._database.down_since_s is not None:
            raise DatabaseUnavailableError("The accounts database is down; requests are refused until it is back.")
        if self._journal.num_bytes > self._config.max_journal_bytes:
            raise DatabaseUnavailableError("Too much usage waits for the accounts database.")

    def begin(self, start: Start, choices_per_prompt: int) -> Entry:
        """Write down that a request is accepted; only then may the engine see it.

        Args:
            start: what is known; number and slot are given here.
            choices_per_prompt: of the request.

        Raises:
            DatabaseUnavailableError: it cannot be written, or see ``check``.
        """
        self.check()
        self._num_written += 1
        return Entry(self, self._journal.start(start), choices_per_prompt)

    def advance(self, start: Start, counted: Counted) -> None:
        """Count for a request, in case this process dies."""
        self._journal.advance(start, counted, clock.now_s())

    def finish(self, start: Start, usage: Usage) -> None:
        """Write a request's end."""
        self._num_written += 1
        self._num_ended += 1
        try:
            self._journal.finish(start, usage)
        except DatabaseUnavailableError as error:
            _LOGGER.error("%s; it will be tried again", error)
            self._unwritten.append((start, usage))

    def forget_prices(self) -> None:
        """Read the prices again: they have changed."""
        self._prices = []

    async def run(self) -> None:
        """Move rows to the disk and to the database, until cancelled."""
        num_rounds = 0
        while True:
            await asyncio.sleep(_SHIP_INTERVAL_S)
            num_rounds += 1
            try:
                await self.flush()
                if num_rounds % _ROUNDS_PER_ADOPTION == 0:
                    await self.adopt()
            except DatabaseUnavailableError as error:
                self._num_failed_writes += 1
                _LOGGER.warning("%s; usage waits in the journal (%d bytes)", error, self._journal.num_bytes)
                await asyncio.sleep(_RETRY_S)
            except Exception:  # whatever it was, such as a full disk: rows are moved as long as the server runs
                self._num_failed_writes += 1
                _LOGGER.exception("Usage could not be moved; trying again")
                await asyncio.sleep(_RETRY_S)

    async def flush(self) -> None:
        """Move everything that has ended so far to the database.

        Raises:
            DatabaseUnavailableError: it does not answer; everything stays in the journal.
        """
        async with self._shipping:
            while self._unwritten:
                self._journal.finish(*self._unwritten[0])
                del self._unwritten[0]
            num_written = self._num_written
            if num_written != self._num_synced:
                await self._database.run(self._journal.sync)
                self._num_synced = num_written
            while num_written != self._num_shipped:
                rows, position = await self._database.run(self._journal.read_from, self._position, _GROUP)
                if not rows:
                    self._num_shipped = num_written
                    return
                self._on_spending(await self._insert(rows), [row.request_id for row in rows])
                self._num_own_rows += len(rows)
                self._position = position
                self._journal.forget_before(position)

    async def adopt(self) -> int:
        """Take over the journals of processes that have died; returns the number of rows in them.

        Raises:
            DatabaseUnavailableError: the database does not answer; the journals stay.
        """
        num_rows, spending = await self._database.run(self._adopt)
        self._num_adopted_rows += num_rows
        self._on_spending(spending, [])
        return num_rows

    async def close(self) -> None:
        """Move the last rows; what the database does not take stays in the journal for the next start."""
        try:
            await self.flush()
        except (DatabaseUnavailableError, OSError) as error:
            _LOGGER.error("%s; usage stays in %s until the next start", error, self._journal.folder)
            self._journal.close()
            return
        if self._journal.num_open:
            self._journal.close()
        else:
            self._journal.remove()

    async def _insert(self, rows: Sequence[Usage]) -> list[Spending]:
        prices = self._prices  # what is read into it while it is forgotten is forgotten with it

        def insert() -> list[Spending]:
            with self._database.write() as connection:
                if not prices:
                    prices.append(read_prices(connection))
                return insert_usage(connection, rows, prices[0])

        return await self._database.run(insert)

    def _adopt(self) -> tuple[int, list[Spending]]:
        num_rows, spending = 0, []
        clear_left_overs(self._folder)
        with dead_journals(self._folder) as found:
            for folder, rows in found:
                if rows:
                    with self._database.write() as connection:
                        spending += insert_usage(connection, rows, read_prices(connection))
                    _LOGGER.warning("Took over %d rows of usage from a server that died", len(rows))
                num_rows += len(rows)
                remove_folder(folder)
        return num_rows, spending
