"""Options that many commands share, and how what comes from elsewhere is printed."""

from typing import Annotated

import typer
from rich.console import Console

Url = Annotated[str, typer.Option("--url", help="Root of the server.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="POMONA_API_KEY", help="Bearer token, if the server asks for one."),
]
DEFAULT_URL = "http://127.0.0.1:8000"


def plain_console() -> Console:
    """Prints words of others: nothing that a config, a server or a person writes is markup or an emoji's code."""
    return Console(markup=False, emoji=False)
