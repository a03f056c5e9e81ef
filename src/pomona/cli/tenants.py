"""``pomona tenants``: tenants of a running server, their limits and their usage."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer
from rich.table import Table

from pomona.cli.options import DEFAULT_URL, ApiKey, Url, print_table
from pomona.core.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from pomona.cli.api import Api

_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency", "monthly_tokens", "monthly_cost")
_SUFFIXES = (".csv", ".parquet")


def _api(url: str, api_key: str | None) -> "Api":
    from pomona.cli.api import Api  # here, because it brings a whole HTTP client, which --help can do without

    return Api(url, api_key)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in (
        ("create", create), ("list", show), ("update", update), ("limits", limits), ("share", share), ("price", price),
        ("usage", usage),
    ):  # fmt: skip
        app.command(name)(command)


def create(
    tenant: Annotated[str, typer.Argument(help="Id: lower-case letters, digits and dashes.")],
    weight: Annotated[float, typer.Option(help="Share where tenants compete.")] = 1.0,
    priority: Annotated[str, typer.Option(help="interactive, standard or batch.")] = "standard",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Add a tenant. Give it a key next: pomona keys create TENANT.

    Example:

        pomona tenants create acme --weight 2 --api-key $ADMIN
    """
    card = _api(url, api_key).call("POST", "/v1/admin/tenants", {"id": tenant, "weight": weight, "priority": priority})
    typer.echo(f"{card['id']}: created")


def show(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List tenants.

    Example:

        pomona tenants list --api-key $ADMIN
    """
    table = Table("tenant", "weight", "priority", "prefix group", "state", box=None, header_style="bold")
    for tenant in _api(url, api_key).call("GET", "/v1/admin/tenants")["data"]:
        state = "disabled" if tenant["is_disabled"] else ""
        table.add_row(tenant["id"], f"{tenant['weight']:g}", tenant["priority"], tenant["prefix_group"] or "", state)
    print_table(table, if_empty="There are no tenants. Add one: pomona tenants create NAME")


def update(
    tenant: Annotated[str, typer.Argument(help="Its id.")],
    weight: Annotated[float | None, typer.Option(help="Share where tenants compete.")] = None,
    priority: Annotated[str | None, typer.Option(help="interactive, standard or batch.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(help="Target for the time to first token; 0 takes it away.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Target per output token; 0 takes it away.")] = None,
    disabled: Annotated[bool | None, typer.Option(help="Accept none of its keys, or accept them again.")] = None,
    prefix_group: Annotated[
        str | None, typer.Option(help="Tenants of one group share their prefix cache; '' leaves it.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Change a tenant; what is not given stays.

    Examples:

        pomona tenants update acme --weight 4 --priority interactive --ttft-ms 500 --api-key $ADMIN

        pomona tenants update acme --disabled --api-key $ADMIN
    """
    given = {"weight": weight, "priority": priority, "is_disabled": disabled, "prefix_group": prefix_group}
    given |= {
        "ttft_s": None if ttft_ms is None else ttft_ms / 1000,
        "tpot_s": None if tpot_ms is None else tpot_ms / 1000,
    }
    body = {name: value for name, value in given.items() if value is not None}
    _api(url, api_key).call("PATCH", f"/v1/admin/tenants/{tenant}", body)
    typer.echo(f"{tenant}: changed")


def limits(
    tenant: Annotated[str, typer.Argument(help="A tenant's id, a key's prefix, or an adapter's qualified name.")],
    scope: Annotated[str, typer.Option(help="tenant, key or adapter.")] = "tenant",
    requests: Annotated[int | None, typer.Option(help="Requests per minute; -1 lifts the limit.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per minute, prompt and output; -1 lifts it.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight; -1 lifts it.")] = None,
    monthly_tokens: Annotated[int | None, typer.Option(help="Tokens per month; -1 lifts it.")] = None,
    monthly_cost: Annotated[float | None, typer.Option(help="Cost per month; -1 lifts it.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show limits, or change those that are given.

    Examples:

        pomona tenants limits acme --requests 600 --tokens 100000 --api-key $ADMIN

        pomona tenants limits acme/legal --scope adapter --concurrency 8 --api-key $ADMIN
    """
    api, path = _api(url, api_key), f"/v1/admin/limits/{scope}/{tenant}"
    given = dict(zip(_LIMITS, (requests, tokens, concurrency, monthly_tokens, monthly_cost), strict=True))
    for name, value in given.items():
        if value is not None and value < 0 and value != -1:
            raise InvalidRequestError.out_of_range(name, value, "0 or larger, or -1 to lift the limit")
    found = api.call("GET", path)
    changed = {name: (None if value < 0 else value) for name, value in given.items() if value is not None}
    if changed:
        found = api.call("PUT", path, {name: found[name] for name in _LIMITS} | changed)
    for name in _LIMITS:
        typer.echo(f"{name}: {'-' if found[name] is None else found[name]}")


def share(
    adapter: Annotated[str, typer.Argument(help="tenant/name; with a tenant's own key just the name.")],
    tenants: Annotated[list[str] | None, typer.Option("--with", help="Tenant that may use it; repeatable.")] = None,
    public: Annotated[bool, typer.Option("--public", help="All tenants may use it.")] = False,  # noqa: FBT002
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Say with whom an adapter is shared, from now on and with nobody else.

    Examples:

        pomona tenants share acme/legal --with bolt --with core --api-key $ADMIN

        pomona tenants share acme/legal --api-key $ADMIN
    """
    body = {"name": adapter, "tenants": tenants or [], "public": public}
    card = _api(url, api_key).call("PUT", "/v1/shares", body)
    who = "everybody" if card["public"] else ", ".join(card["tenants"]) or "nobody"
    typer.echo(f"{card['owner']}/{card['name']}: shared with {who}")


def price(
    input_per_million: Annotated[float, typer.Option("--input", help="Per million prompt tokens.")],
    output_per_million: Annotated[float, typer.Option("--output", help="Per million output tokens.")],
    cached_per_million: Annotated[
        float | None, typer.Option("--cached", help="Per million prompt tokens found in the prefix cache.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Qualified name; default: all without a price.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Set prices. The ledger's rows keep the prices they were written with.

    Example:

        pomona tenants price --input 0.5 --output 1.5 --adapter acme/legal --api-key $ADMIN
    """
    body: dict[str, Any] = {"adapter": adapter, "input_per_million": input_per_million}
    body |= {"output_per_million": output_per_million, "cached_per_million": cached_per_million}
    card = _api(url, api_key).call("PUT", "/v1/admin/prices", body)
    typer.echo(f"{card['adapter'] or '(all others)'}: {input_per_million:g} in, {output_per_million:g} out")


def usage(
    group_by: Annotated[
        str | None, typer.Option(help="Columns by commas: tenant, key, adapter, day, ...; default: tenant.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="Ended then or later: date or Unix time.")] = None,
    end: Annotated[str | None, typer.Option(help="Ended before: date or Unix time.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write every row to this .csv or .parquet file.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Sum up usage, or export every row.

    Examples:

        pomona tenants usage --group-by tenant,day --start 2026-11-01 --api-key $ADMIN

        pomona tenants usage --output november.parquet --start 2026-11-01 --end 2026-12-01 --api-key $ADMIN
    """
    query = {name: value for name, value in {"start": start, "end": end}.items() if value is not None}
    if output is not None:
        if output.suffix not in _SUFFIXES or not output.parent.is_dir():
            raise ConfigError(f"--output {output}: must be a .csv or .parquet file in a folder that exists")
        if group_by is not None:
            raise ConfigError(f"--group-by {group_by}: must be left out with --output, which writes every row")
        query["format"] = output.suffix.removeprefix(".")
        _api(url, api_key).download(f"/v1/usage?{urlencode(query)}", output)
        typer.echo(str(output))
        return
    group_by = "tenant" if group_by is None else group_by
    groups = [name for name in group_by.split(",") if name]
    rows = _api(url, api_key).call("GET", f"/v1/usage?{urlencode({**query, 'group_by': group_by})}")["data"]
    table = Table(*groups, "requests", "input", "cached", "output", "engine s", "cost", box=None, header_style="bold")
    for row in rows:
        tokens = (str(row[name]) for name in ("num_requests", "input_tokens", "cached_tokens", "output_tokens"))
        table.add_row(
            *(row["group"][name] for name in groups), *tokens, f"{row['engine_seconds']:.1f}", f"{row['cost']:.6f}"
        )
    print_table(table)
