"""Options that many commands share."""

from typing import Annotated

import typer

Url = Annotated[str, typer.Option("--url", help="Root of the server.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="POMONA_API_KEY", help="Bearer token, if the server asks for one."),
]
DEFAULT_URL = "http://127.0.0.1:8000"
