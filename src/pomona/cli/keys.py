"""``pomona keys``: API keys. The first administrator's key is made in the database, all others through the server."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pomona.accounts.config import AccountsConfig
from pomona.accounts.principal import Role
from pomona.cli.options import DEFAULT_URL, ApiKey, Url, print_table
from pomona.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from pomona.cli.api import Api

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_FORMAT = "%Y-%m-%d %H:%M"


def _api(url: str, api_key: str | None) -> "Api":
    from pomona.cli.api import Api  # here, because it brings a whole HTTP client, which --help can do without

    return Api(url, api_key)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in (("admin", admin), ("create", create), ("list", show), ("rotate", rotate), ("revoke", revoke)):
        app.command(name)(command)


def admin(
    role: Annotated[Role, typer.Option(help="What the key may do.")] = Role.ADMIN,
    name: Annotated[str, typer.Option(help="For people.")] = "",
    data_dir: Annotated[Path, typer.Option(envvar="POMONA_DATA_DIR", help="As given to `pomona serve`.")] = Path(
        "pomona-data"
    ),
    database_url: Annotated[
        str | None, typer.Option(envvar="POMONA_DATABASE_URL", help="As given to `pomona serve`.")
    ] = None,
) -> None:
    """Make an administrator's key, in the database itself. The key is shown once.

    Examples:

        pomona keys admin

        pomona keys admin --role auditor --name billing --data-dir /srv/pomona
    """
    from pomona.accounts.database import Database
    from pomona.accounts.tenants import TenantStore

    config = AccountsConfig(data_dir=data_dir.expanduser(), database_url=database_url)
    config.make_data_dir()
    database = Database(config.url)
    try:
        database.migrate()
        _, new = TenantStore(database).create_key(None, role=role, name=name)
    finally:
        database.close()
    typer.echo(new.text)


def create(
    tenant: Annotated[str, typer.Argument(help="Whose key it will be.")],
    name: Annotated[str, typer.Option(help="For people.")] = "",
    expires_in: Annotated[str | None, typer.Option(help="Such as 90d, 12h or 30m; default: never.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Make a key of a tenant. The key is shown once.

    Example:

        pomona keys create acme --name website --expires-in 90d --api-key $ADMIN
    """
    body: dict[str, Any] = {"tenant": tenant, "name": name}
    if expires_in is not None:
        body["expires_at"] = time.time() + seconds_of("--expires-in", expires_in)  # noqa: TID251  # a date
    typer.echo(_api(url, api_key).call("POST", "/v1/admin/keys", body)["key"])


def show(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List keys; of each only the visible prefix.

    Example:

        pomona keys list --tenant acme --api-key $ADMIN
    """
    path = "/v1/admin/keys" + (f"?tenant={tenant}" if tenant else "")
    table = Table("prefix", "tenant", "role", "name", "created", "expires", "revoked", box=None, header_style="bold")
    for key in _api(url, api_key).call("GET", path)["data"]:
        dates = (_date(key[name]) for name in ("created_at", "expires_at", "revoked_at"))
        table.add_row(key["prefix"], key["tenant"] or "", key["role"] or "", key["name"], *dates)
    print_table(table, if_empty="There are no keys. Make one: pomona keys create TENANT")


def rotate(
    key: Annotated[str, typer.Argument(help="The old key's visible prefix.")],
    overlap: Annotated[str, typer.Option(help="How long the old key is accepted still, such as 24h.")] = "0s",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Make a key that replaces another, with the same limits. The new key is shown once.

    Example:

        pomona keys rotate pk-a1b2c3d4e5f6 --overlap 24h --api-key $ADMIN
    """
    body = {"overlap_s": seconds_of("--overlap", overlap)}
    typer.echo(_api(url, api_key).call("POST", f"/v1/admin/keys/{key}/rotate", body)["key"])


def revoke(
    key: Annotated[str, typer.Argument(help="Its visible prefix.")], url: Url = DEFAULT_URL, api_key: ApiKey = None
) -> None:
    """End a key now, on all servers.

    Example:

        pomona keys revoke pk-a1b2c3d4e5f6 --api-key $ADMIN
    """
    card = _api(url, api_key).call("DELETE", f"/v1/admin/keys/{key}")
    typer.echo(f"{card['prefix']}: revoked")


def seconds_of(option: str, text: str) -> float:
    """Read a duration such as 90d, 12h, 30m or 10s.

    Raises:
        InvalidRequestError: it is none.
    """
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise InvalidRequestError.out_of_range(option, text, "a duration such as 90d, 12h, 30m or 10s")
    return float(int(match[1]) * _UNITS_S[match[2]])


def _date(unix_s: float | None) -> str:
    return "" if unix_s is None else time.strftime(_FORMAT, time.localtime(unix_s))
