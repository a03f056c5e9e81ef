"""/v1/admin: tenants, keys, limits and prices, for administrators; /v1/shares for owners of adapters."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pomona.accounts.accounts import Accounts
from pomona.accounts.keys import NewKey
from pomona.accounts.principal import Limits, Role
from pomona.accounts.tenants import Key, Tenant
from pomona.accounts.usage_rows import Price
from pomona.core.errors import InvalidRequestError
from pomona.core.request import Priority, ServiceLevel
from pomona.server import account_types as wire
from pomona.server.body import read_model
from pomona.server.context import context_of
from pomona.server.errors import UnknownAdapterError
from pomona.server.paging import check_names
from pomona.server.tenant import principal_of

_NANOS = 1_000_000_000
_MILLION = 1_000_000
_SCOPES = ("tenant", "key", "adapter")
_NO_STORE = {"cache-control": "no-store"}


def accounts_of(request: Request) -> Accounts:
    """Return the accounts of a server that has some."""
    accounts = context_of(request).accounts
    assert accounts is not None, "these routes exist only on a server with accounts"
    return accounts


def json_answer(answer: msgspec.Struct) -> Response:
    """Return an answer that no cache keeps."""
    return Response(msgspec.json.encode(answer), media_type="application/json", headers=_NO_STORE)


def _max_body_bytes(request: Request) -> int:
    return context_of(request).config.max_body_bytes


async def create_tenant(request: Request) -> Response:
    """Add a tenant."""
    body = await read_model(request, wire.TenantCreateRequest, _max_body_bytes(request))
    accounts = accounts_of(request)
    level = _changed(ServiceLevel(), body)
    tenant = await accounts.change(
        accounts.tenants.create_tenant, body.id, level, prefix_group=body.prefix_group or None
    )
    return json_answer(_tenant_card(tenant))


async def list_tenants(request: Request) -> Response:
    """List all tenants."""
    accounts = accounts_of(request)
    tenants = await accounts.database.run(accounts.tenants.tenants)
    return json_answer(wire.TenantList([_tenant_card(tenant) for tenant in tenants]))


async def get_tenant(request: Request) -> Response:
    """Show one tenant."""
    accounts = accounts_of(request)
    tenant = await accounts.database.run(accounts.tenants.tenant, request.path_params["tenant_id"])
    return json_answer(_tenant_card(tenant))


async def update_tenant(request: Request) -> Response:
    """Change what a tenant may expect of the scheduler, or its prefix group; disable or enable it."""
    body = await read_model(request, wire.TenantUpdateRequest, _max_body_bytes(request))
    accounts = accounts_of(request)
    tenant = await accounts.change(
        accounts.tenants.update_tenant,
        request.path_params["tenant_id"],
        change_level=lambda level: _changed(level, body),
        is_disabled=body.is_disabled,
        prefix_group=body.prefix_group,
    )
    return json_answer(_tenant_card(tenant))


async def create_key(request: Request) -> Response:
    """Make a key. The answer is the only place where the whole key is ever shown."""
    body = await read_model(request, wire.KeyCreateRequest, _max_body_bytes(request))
    if (body.tenant is None) == (body.role is None):
        raise InvalidRequestError("tenant", "tenant or role: exactly one of them is needed")
    accounts = accounts_of(request)
    role = None if body.role is None else Role(body.role)
    key, new = await accounts.change(
        accounts.tenants.create_key, body.tenant, role=role, name=body.name or "", expires_s=body.expires_at
    )
    return json_answer(_key_card(key, new))


async def list_keys(request: Request) -> Response:
    """List keys, all or those of the tenant given as ``?tenant=``."""
    check_names(request.query_params, ("tenant",))
    accounts = accounts_of(request)
    keys = await accounts.database.run(accounts.tenants.keys, request.query_params.get("tenant"))
    return json_answer(wire.KeyList([_key_card(key) for key in keys]))


async def rotate_key(request: Request) -> Response:
    """Make a key that replaces another; both are accepted during the overlap."""
    body = await read_model(request, wire.KeyRotateRequest, _max_body_bytes(request))
    accounts = accounts_of(request)
    key, new = await accounts.change(accounts.tenants.rotate_key, request.path_params["key_id"], body.overlap_s)
    return json_answer(_key_card(key, new))


async def revoke_key(request: Request) -> Response:
    """End a key now."""
    accounts = accounts_of(request)
    return json_answer(_key_card(await accounts.change(accounts.tenants.revoke_key, request.path_params["key_id"])))


async def get_limits(request: Request) -> Response:
    """Show the limits of a tenant, a key or an adapter."""
    accounts = accounts_of(request)
    scope, scope_id = _scope_of(request)
    return json_answer(
        _limits_card(scope, scope_id, await accounts.database.run(accounts.tenants.limits, scope, scope_id))
    )


async def set_limits(request: Request) -> Response:
    """Replace the limits of a tenant, a key or an adapter."""
    body = await read_model(request, wire.LimitsRequest, _max_body_bytes(request))
    accounts = accounts_of(request)
    scope, scope_id = _scope_of(request)
    limits = Limits(
        requests_per_minute=body.requests_per_minute,
        tokens_per_minute=body.tokens_per_minute,
        max_concurrency=body.max_concurrency,
        monthly_tokens=body.monthly_tokens,
        monthly_cost_nanos=None if body.monthly_cost is None else round(body.monthly_cost * _NANOS),
    )
    return json_answer(
        _limits_card(scope, scope_id, await accounts.change(accounts.tenants.set_limits, scope, scope_id, limits))
    )


async def list_prices(request: Request) -> Response:
    """List all prices."""
    accounts = accounts_of(request)
    prices = await accounts.database.run(accounts.usage.prices)
    return json_answer(wire.PriceList([_price_card(adapter, price) for adapter, price in sorted(prices.items())]))


async def set_price(request: Request) -> Response:
    """Set the price of an adapter, or of all that have none of their own. The ledger's rows keep theirs."""
    body = await read_model(request, wire.PriceRequest, _max_body_bytes(request))
    accounts = accounts_of(request)
    cached = body.input_per_million if body.cached_per_million is None else body.cached_per_million
    price = Price(
        _nanos_per_token("input_per_million", body.input_per_million),
        _nanos_per_token("cached_per_million", cached),
        _nanos_per_token("output_per_million", body.output_per_million),
    )
    adapter = body.adapter or ""
    await accounts.change(accounts.usage.set_price, adapter, price)
    return json_answer(_price_card(adapter, price))


async def share_adapter(request: Request) -> Response:
    """Say with whom an adapter is shared. A tenant is not told which other tenants there are."""
    body = await read_model(request, wire.ShareRequest, _max_body_bytes(request))
    accounts = accounts_of(request)
    principal = principal_of(request)
    assert principal is not None, "every request has a key"
    owner, name = (principal.tenant_id, body.name) if principal.tenant_id else body.name.partition("/")[::2]
    if f"{owner}/{name}" not in accounts.adapters:
        raise UnknownAdapterError(f"No adapter is called {body.name[:200]!r}.")
    assert owner is not None, "found above"
    await accounts.change(
        accounts.shares.share,
        owner,
        name,
        frozenset(body.tenants),
        is_public=body.public,
        ignores_unknown=principal.tenant_id is not None,
    )
    return json_answer(wire.ShareCard(owner, name, sorted(set(body.tenants)), body.public))


def _scope_of(request: Request) -> tuple[str, str]:
    scope, scope_id = request.path_params["scope"], request.path_params["scope_id"]
    if scope not in _SCOPES:
        raise InvalidRequestError.out_of_range("scope", scope[:100], "one of " + ", ".join(_SCOPES))
    return scope, scope_id


def _nanos_per_token(field: str, per_million: float) -> int:
    nanos = round(per_million * (_NANOS // _MILLION))
    if nanos * _MILLION / _NANOS != per_million:  # what is stored is what is shown
        raise InvalidRequestError.out_of_range(field, per_million, f"a multiple of {_MILLION / _NANOS:g}")
    return nanos


def _tenant_card(tenant: Tenant) -> wire.TenantCard:
    level = tenant.service_level
    return wire.TenantCard(
        id=tenant.id,
        created_at=tenant.created_s,
        is_disabled=tenant.is_disabled,
        weight=level.weight,
        priority=level.priority.name.lower(),
        ttft_s=level.ttft_s,
        tpot_s=level.tpot_s,
        prefix_group=tenant.prefix_group,
    )


def _changed(level: ServiceLevel, body: wire.TenantCreateRequest | wire.TenantUpdateRequest) -> ServiceLevel:
    """Return a service level with what a body says; what it leaves out stays."""
    return ServiceLevel(
        priority=level.priority if body.priority is None else Priority[body.priority.upper()],
        weight=level.weight if body.weight is None else body.weight,
        ttft_s=level.ttft_s if body.ttft_s is None else body.ttft_s or None,
        tpot_s=level.tpot_s if body.tpot_s is None else body.tpot_s or None,
    )


def _key_card(key: Key, new: NewKey | None = None) -> wire.KeyCard:
    return wire.KeyCard(
        id=key.id,
        prefix=key.prefix,
        tenant=key.tenant,
        role=key.role,
        name=key.name,
        created_at=key.created_s,
        expires_at=key.expires_s,
        revoked_at=key.revoked_s,
        replaces=key.replaces,
        key=None if new is None else new.text,
    )


def _limits_card(scope: str, scope_id: str, limits: Limits) -> wire.LimitsCard:
    return wire.LimitsCard(
        scope=scope,
        id=scope_id,
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        max_concurrency=limits.max_concurrency,
        monthly_tokens=limits.monthly_tokens,
        monthly_cost=None if limits.monthly_cost_nanos is None else limits.monthly_cost_nanos / _NANOS,
    )


def _price_card(adapter: str, price: Price) -> wire.PriceCard:
    return wire.PriceCard(
        adapter=adapter or None,
        input_per_million=price.input_nanos * _MILLION / _NANOS,
        cached_per_million=price.cached_nanos * _MILLION / _NANOS,
        output_per_million=price.output_nanos * _MILLION / _NANOS,
    )
