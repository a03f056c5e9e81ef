"""A server with accounts whose engine, in a process of its own, has no tensors: it starts in a moment.

python -m support.ledger_server FOLDER PORT [DATABASE_URL]
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from pomona.accounts.accounts import Accounts
from pomona.accounts.config import AccountsConfig
from pomona.adapters.catalogue import Catalogue
from pomona.adapters.sources import AdapterSources
from pomona.driver.client import ProcessClient
from pomona.server.adapter_service import AdapterService
from pomona.server.app import create_app
from pomona.server.config import ServedModel, ServerConfig
from pomona.text.tokenizer import Tokenizer
from support.driver import VOCAB_SIZE, TinyBuilder

BASE = "base"
STEP_S = 0.002


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which ends by raising the signal again, before the accounts are closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(folder: Path, port: int, database_url: str | None) -> None:
    """Serve until killed."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    config = AccountsConfig(data_dir=folder / "data", database_url=database_url)
    async with ProcessClient(TinyBuilder(step_s=STEP_S)) as client, Accounts(config) as accounts:
        service = AdapterService(client, AdapterSources(), Catalogue(BASE))
        model = ServedModel(BASE, 4096, VOCAB_SIZE, (VOCAB_SIZE + 1,))
        app = create_app(client, tokenizer, None, service, model, ServerConfig(), accounts=accounts)
        server = _Server(uvicorn.Config(app, port=port, log_level="warning"))
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, server.handle_exit, signal.SIGINT, None)
        await server.serve()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None))
