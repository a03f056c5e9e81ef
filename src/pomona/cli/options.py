"""Options that many commands share, and how what comes from elsewhere is printed."""

from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

Url = Annotated[str, typer.Option("--url", help="Root of the server.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="POMONA_API_KEY", help="Bearer token, if the server asks for one."),
]
DEFAULT_URL = "http://127.0.0.1:8000"
_ANY_WIDTH: Final = 100_000


def plain_console() -> Console:
    """Prints words of others: nothing that a config, a server or a person writes is markup or an emoji's code."""
    return Console(markup=False, emoji=False)


def print_table(table: Table, *, if_empty: str = "") -> None:
    """Prints words of others in columns, none cut short: a line too long for a terminal goes on in its next one."""
    if if_empty and not table.row_count:
        typer.echo(if_empty)
        return
    console = plain_console()
    console.width = _ANY_WIDTH
    with console.capture() as shown:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in shown.get().splitlines()))
